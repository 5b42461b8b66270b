"""Importance matrices: how much the squared error of each input column of a weight counts.

The file holds, per weight tensor, sums of squared inputs and how many inputs were summed; their quotient is the
importance. llama.cpp's GGUF format is read and written (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp), its
old .dat is read. `moegguf calibrate` adds keys of its own that say of which model and which texts the sums are, so
that they can go on later; llama-quantize takes no notice of them.

In a build every slice of an output tensor has its own importance: that measured on this very mix, in whatever layout,
else that of its expert's file, else that of the dense model in the recipe's file, because an expert's FFN sees inputs
of the same kind. Experts that no token reached count as all others together do, where llama-quantize counts their
columns alike.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.gguf_header import Header, is_gguf, read_header
from moegguf.sources.blob import LocalFile
from moegguf.squares import Squares
from moegguf.tensor import Form, Part, Planned, Slot, constant
from moegguf.watch import unheard
from moegguf.writer import header_bytes, write_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MODEL, _TEXTS = "moegguf.imatrix.model", "moegguf.imatrix.text."
_AGAIN = "make the imatrix again"
_MAX_NAME = 512


@dataclass(frozen=True)
class Imatrix:
    """`entries`: weight name → float32 (n_matrices, n_cols), mean squares; more than one matrix for stacked experts,
    which the old .dat has side by side, as one row. `counts`: weight name → tokens of each matrix; empty for a .dat."""

    path: Path
    entries: Mapping[str, np.ndarray]
    n_chunks: int
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class CountedText:
    """A text that is in the sums: its name, and of its tokens that were counted their number and a digest."""

    name: str
    n_tokens: int
    digest: str


@dataclass(frozen=True)
class Calibration:
    """What a calibration has counted so far. `model` is a digest, empty where the file does not say."""

    squares: Mapping[str, Squares] = field(repr=False)
    chunk_size: int
    model: str = ""
    texts: tuple[CountedText, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def n_chunks(self) -> int:
        """As llama.cpp counts them: chunks of the weight that saw most tokens."""
        return max((int(one.counts.max()) for one in self.squares.values()), default=0) // max(1, self.chunk_size)


# ------------------------------------------------------------------------------------------------ files


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix. Raises UserError when the file is none, or is damaged."""
    if path.is_file() and not is_gguf(path):
        return _read_dat(path)
    calibration = read_calibration(path)
    squares = calibration.squares
    return Imatrix(
        path,
        {name: one.means() for name, one in squares.items()},
        calibration.n_chunks,
        {name: one.counts for name, one in squares.items()},
    )


def read_calibration(path: Path) -> Calibration:
    """The sums of an importance matrix in GGUF format. Raises UserError when the file is none, or is damaged."""
    header = read_header(path)
    names = [name.removesuffix(SUMS) for name in header.tensors if name.endswith(SUMS)]
    if header.get("general.type") != "imatrix" or not names:
        raise UserError(f"{path}: is a GGUF, but no imatrix", "make one with `moegguf calibrate` or llama-imatrix")
    blob = LocalFile(path)
    squares = {name: _read_squares(header, blob, name) for name in names}
    model = header.get(_MODEL, "")
    return Calibration(
        squares,
        _number(header, CHUNK_SIZE),
        model if isinstance(model, str) else "",
        _read_texts(header),
        tuple(map(str, _list(header, DATASETS))),
    )


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write `calibration` to `path`, whole or not at all. Raises UserError when it cannot be written."""
    tensors = []
    for name, one in sorted(calibration.squares.items()):
        tensors += [constant(name + SUMS, one.sums), constant(name + COUNTS, one.counts[:, None])]
    planned = [Planned(Slot(tensor.name, tensor.shape, ((Part(tensor),),)), tensor.type) for tensor in tensors]
    write_gguf(path, header_bytes("", _metadata(calibration), planned), planned, 1, unheard)


def _metadata(calibration: Calibration) -> dict[str, GGUFValue]:
    string, u32, u64 = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.UINT64
    texts = calibration.texts
    columns = {
        "names": ([text.name for text in texts], string),
        "tokens": ([text.n_tokens for text in texts], u64),
        "digests": ([text.digest for text in texts], string),
    }
    return {
        "general.type": GGUFValue("imatrix", string),
        DATASETS: GGUFValue(list(calibration.datasets), GGUFValueType.ARRAY, string),
        CHUNK_COUNT: GGUFValue(calibration.n_chunks, u32),
        CHUNK_SIZE: GGUFValue(calibration.chunk_size, u32),
        _MODEL: GGUFValue(calibration.model, string),
    } | {_TEXTS + name: GGUFValue(values, GGUFValueType.ARRAY, type) for name, (values, type) in columns.items()}


def _read_squares(header: Header, blob: LocalFile, name: str) -> Squares:
    infos = [header.tensors.get(name + suffix) for suffix in (SUMS, COUNTS)]
    if any(info is None or info.type.name != "F32" for info in infos):
        raise UserError(f"{header.path}: {name} lacks F32 sums or counts", _AGAIN)
    sums, counts = (blob.read(info.offset, info.nbytes).view("<f4").astype(np.float64) for info in infos)
    if sums.size % counts.size:
        raise UserError(f"{header.path}: {name} has {sums.size} sums for {counts.size} counts", _AGAIN)
    _check_values(header.path, name, sums, counts)
    return Squares(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64))


def _check_values(path: Path, name: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(values).all() for values in arrays):
        raise UserError(f"{path}: {name} holds NaN or Inf", _AGAIN)
    if any((values < 0).any() for values in arrays):
        raise UserError(f"{path}: {name} holds negative numbers, which no sum of squares is", _AGAIN)


def _read_texts(header: Header) -> tuple[CountedText, ...]:
    """What texts the file says it holds; none where it does not say so soundly."""
    names, tokens, digests = (_list(header, _TEXTS + column) for column in ("names", "tokens", "digests"))
    rows = list(zip(names, tokens, digests, strict=False))
    is_sound = len(names) == len(tokens) == len(digests) and all(
        isinstance(name, str) and type(n) is int and isinstance(digest, str) for name, n, digest in rows
    )
    return tuple(CountedText(*row) for row in rows) if is_sound else ()


def _number(header: Header, key: str) -> int:
    value = header.get(key, 0)
    if type(value) is not int:
        raise UserError(f"{header.path}: {key} is {value!r:.80}, expected a whole number", _AGAIN)
    return value


def _list(header: Header, key: str) -> list:
    value = header.get(key, [])
    return value if isinstance(value, list) else []


def _read_dat(path: Path) -> Imatrix:
    """The format of before GGUF: per weight its name, the number of chunks, and means times that number."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        if not 0 <= n <= len(data) - at:
            raise UserError(
                f"{path}: is no imatrix, or a damaged one (at byte {at} of {len(data)})",
                "make one with `moegguf calibrate`, or with llama-imatrix",
            )
        at += n
        return data[at - n : at]

    def number(low: int, high: int) -> int:
        (value,) = struct.unpack("<i", take(4))
        return value if low <= value <= high else take(-1)  # which refuses it

    entries = {}
    for _ in range(number(1, len(data))):
        name = take(number(1, _MAX_NAME)).decode(errors="replace")
        n_chunks, n_values = number(0, 2**31 - 1), number(1, len(data))
        values = np.frombuffer(take(4 * n_values), "<f4")
        _check_values(path, name, values)
        entries[name] = (values / np.float32(max(1, n_chunks)))[None]
    n_chunks = number(0, 2**31 - 1) if at < len(data) else 0
    return Imatrix(path, entries, n_chunks)


# ------------------------------------------------------------------------------------------- into a build


def taken_apart(imatrix: Imatrix, n: int, widths: Mapping[str, int]) -> tuple[list[Imatrix], Imatrix]:
    """What the imatrix of a mix of `n` experts says of each, under the names of a dense model, and all the rest of it
    but routers, which are not quantised.

    `widths`: name of an expert's FFN projection → its columns. A mix has the experts stacked, or in one FFN.
    """
    of_experts: list[dict[str, np.ndarray]] = [{} for _ in range(n)]
    rest = {}
    for name, entry in imatrix.entries.items():
        parsed = TensorName.parse(name)
        dense = str(replace(parsed, role=parsed.role.removesuffix("_exps")))
        has_all = dense != name or parsed.role == "ffn_down"
        if has_all and entry.size == n * widths.get(dense, 0):
            for own, row in zip(of_experts, entry.reshape(n, 1, -1), strict=True):
                own[dense] = row
        elif parsed.role != "ffn_gate_inp":
            rest[name] = entry
    return [replace(imatrix, entries=own) for own in of_experts], replace(imatrix, entries=rest)


def with_importance(form: Form, imatrix: Imatrix) -> Form:
    """`form` with the importance of every part that the imatrix knows; a part that has one of its expert's own keeps
    it, unless the imatrix is of this very mix. Raises UserError, naming them, for tensors that the mix does not have
    and for those of another width."""
    _check_names(form, imatrix)
    is_own = all(_is_own(slot, imatrix.entries[slot.name]) for slot in form.slots if slot.name in imatrix.entries)
    if faults := list(_width_faults(form, imatrix)):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"{imatrix.path}: {faults[0]}{more}", "make the imatrix from this mix or from a model of the same shape"
        )
    return replace(form, slots=tuple(_important(slot, imatrix, is_own) for slot in form.slots))


def with_trunk_importance(form: Form, imatrices: Sequence[Imatrix]) -> Form:
    """`form`, its trunk with the mean of what the experts' own imatrices say: all of them ran through a trunk."""
    return replace(form, slots=tuple(slot if slot.preset else _of_trunk(slot, imatrices) for slot in form.slots))


def importance_notes(planned: Iterable[Planned]) -> Iterator[str]:
    """What is quantised without an importance although other weights have one. Embeddings never have any, and the
    output matrix seldom."""
    multiplied = [
        tensor.slot
        for tensor in planned
        if tensor.type.name not in ("F32", "F16", "BF16") and tensor.name not in ("token_embd.weight", "output.weight")
    ]
    known = {slot.name: sum(part.importance is not None for part in slot.parts) for slot in multiplied}
    if not any(known.values()):
        return
    if partly := [slot.name for slot in multiplied if 0 < known[slot.name] < len(slot.parts)]:
        yield f"{_some(partly)}: some experts have an importance and others none; these are quantised without"
    if unknown := [slot.name for slot in multiplied if not known[slot.name]]:
        yield f"{_some(unknown)}: no importance is known, quantised without"


def _check_names(form: Form, imatrix: Imatrix) -> None:
    known = {slot.name for slot in form.slots} | {part.tensor.name for slot in form.slots for part in slot.parts}
    unknown = [name for name in imatrix.entries if name not in known]
    if unknown:
        example = next(slot.name for slot in form.slots if slot.name.startswith("blk."))
        raise UserError(
            f"{imatrix.path}: {_some(unknown)} {'is no tensor' if len(unknown) == 1 else 'are no tensors'} of this "
            f"mix, which has {example} and others",
            "make the imatrix from this mix, in this layout, or from its base",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _is_own(slot: Slot, entry: np.ndarray) -> bool:
    """Whether an entry of a tensor's name has its width too, in every matrix. The down projection of a fused FFN has
    the name of the dense model's, and is wider."""
    return entry.size == slot.n_cols or (len(slot.shape) == 3 and entry.size == slot.n_cols * slot.shape[0])


def _width_faults(form: Form, imatrix: Imatrix) -> Iterator[str]:
    """Entries that fit neither the tensor of their name nor the parts of tensors that have the name."""
    parts = {part.tensor.name: (1, part.n_dense_cols) for slot in form.slots for part in slot.parts}
    slots = {slot.name: slot for slot in form.slots}
    for name, entry in imatrix.entries.items():
        slot = slots.get(name)
        if entry.shape == parts.get(name) or (slot and _is_own(slot, entry)):
            continue
        n, n_cols = parts.get(name) or (len(slot.bands), slot.n_cols)
        yield f"{name} has {entry.shape[0]} × {entry.shape[1]} values, expected {n} × {n_cols}"


def _important(slot: Slot, imatrix: Imatrix, is_own: bool) -> Slot:
    own = imatrix.entries.get(slot.name) if is_own else None
    if own is None:
        return replace(slot, bands=tuple(tuple(_from_dense(part, imatrix) for part in band) for band in slot.bands))
    matrices = own.reshape(-1, slot.n_cols)
    return replace(
        slot, bands=tuple(_split_over(band, matrices[i % len(matrices)]) for i, band in enumerate(slot.bands))
    )


def _split_over(band: tuple[Part, ...], row: np.ndarray) -> tuple[Part, ...]:
    ends = np.cumsum([part.tensor.n_cols for part in band])
    pieces = np.split(row, ends[:-1])
    return tuple(replace(part, importance=piece) for part, piece in zip(band, pieces, strict=True))


def _from_dense(part: Part, imatrix: Imatrix) -> Part:
    entry = imatrix.entries.get(part.tensor.name)
    if entry is None or part.importance is not None:
        return part
    return replace(part, importance=entry[0][part.columns.numbers] if part.columns else entry[0])


def _of_trunk(slot: Slot, imatrices: Sequence[Imatrix]) -> Slot:
    rows = [imatrix.entries[slot.name] for imatrix in imatrices if slot.name in imatrix.entries]
    rows = [row for row in rows if row.shape == (1, slot.n_cols)]
    if not rows:
        return slot
    mean = np.mean(rows, axis=0, dtype=np.float32)
    return replace(slot, bands=tuple(_split_over(band, mean[0]) for band in slot.bands))
