"""One pass from source rows to the finished file, with bounded memory.

Every output tensor is cut into chunks of whole rows. Worker threads read, decode, scale and quantise chunks
(all of it in C calls that release the GIL) while this thread writes the finished ones in order, so cores and
disk are busy at once and only a few chunks per core are in memory, whatever the model. Rows whose source
already has the wanted type are never decoded: their bytes pass through, with their block scales multiplied
where a factor has to go in.

The header is written by the `gguf` package; every byte after it is counted against the plan.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.tensor import Metadata, Part, Planned, Tensor

ALIGNMENT = 32
CHUNK_WEIGHTS = 1 << 20
"""Weights of a chunk: 4 MiB as float32. Large enough to forget the cost of a call, small enough for any laptop."""
CHUNKS_PER_THREAD = 3

Progress = Callable[[int], None]
"""Hears how many bytes have just been written."""


@dataclass(frozen=True)
class Requantised:
    """What requantising already quantised sources cost, in sums over all weights concerned."""

    n_weights: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0
    types: frozenset[tuple[str, str]] = frozenset()

    def __add__(self, other: Requantised) -> Requantised:
        return Requantised(
            self.n_weights + other.n_weights,
            self.squared_error + other.squared_error,
            self.squared_weights + other.squared_weights,
            self.types | other.types,
        )

    @property
    def relative_error(self) -> float:
        """Root mean square of the error over that of the weights."""
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0


@dataclass(frozen=True)
class Written:
    """What a finished write did; `n_bytes` is the size of the file."""

    n_bytes: int
    requantised: Requantised


def header_bytes(arch: str, metadata: Metadata, planned: Sequence[Planned]) -> bytes:
    """The file up to its first tensor: magic, counts, metadata, tensor table and padding."""
    writer = GGUFWriter(None, arch)
    for key, value in metadata.items():
        is_empty = value.type == GGUFValueType.ARRAY and not value.value
        if key not in ("general.architecture", "general.alignment") and not is_empty:
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.slot.shape, np.dtype("f4"), tensor.nbytes, tensor.type)
    with tempfile.TemporaryDirectory(prefix="moegguf-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def data_bytes(planned: Sequence[Planned]) -> int:
    """Bytes of all tensors, padding included."""
    return sum(_padded(tensor.nbytes) for tensor in planned)


def write_gguf(path: Path, header: bytes, planned: Sequence[Planned], threads: int, progress: Progress) -> Written:
    """Write `header` and `planned` to `path`, whole or not at all.

    Raises UserError for weights that are NaN or Inf, for damaged sources, and when the disk cannot take the file.
    """
    _refuse_unwritable_types(planned)
    requantised = Requantised()
    with atomic_file(path) as file:
        file.write(header)
        for tensor, rows in _in_order(planned, threads):
            file.write(rows.data)
            requantised += rows.requantised
            progress(rows.data.nbytes)
            if rows.is_last:
                file.write(bytes(-tensor.nbytes % ALIGNMENT))
        expected = len(header) + data_bytes(planned)
        if file.tell() != expected:
            raise AssertionError(f"{file.tell()} bytes written, {expected} planned")
    return Written(expected, requantised)


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _refuse_unwritable_types(planned: Sequence[Planned]) -> None:
    """A float64 tensor makes stock llama.cpp crash at its first token, so none may be planned."""
    for tensor in planned:
        if tensor.type not in ggml.supported_types():
            raise UserError(f"{tensor.name}: cannot be written as {tensor.type.name}", "choose another type")


@dataclass(frozen=True)
class _Rows:
    """Finished rows of an output tensor: uint8 (n, row_bytes)."""

    data: np.ndarray
    requantised: Requantised
    is_last: bool


def _in_order(planned: Sequence[Planned], threads: int) -> Iterator[tuple[Planned, _Rows]]:
    """Make all chunks on `threads` workers, and give them in file order with few of them in memory."""
    waiting: deque[tuple[Planned, Future[_Rows]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    try:
        for tensor, band, start, stop, is_last in _chunks(planned):
            waiting.append((tensor, pool.submit(_make_rows, tensor, band, start, stop, is_last)))
            if len(waiting) > threads * CHUNKS_PER_THREAD:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(planned: Sequence[Planned]) -> Iterator[tuple[Planned, tuple[Part, ...], int, int, bool]]:
    for tensor in planned:
        step = max(1, CHUNK_WEIGHTS // tensor.slot.n_cols)
        for band in tensor.slot.bands:
            n_rows = band[0].tensor.n_rows
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                yield tensor, band, start, stop, stop == n_rows and band is tensor.slot.bands[-1]


def _make_rows(tensor: Planned, band: tuple[Part, ...], start: int, stop: int, is_last: bool) -> _Rows:
    raw = [part.tensor.read_rows(start, stop) for part in band]
    passed = [_passed_through(part, rows, tensor.type) for part, rows in zip(band, raw, strict=True)]
    requantised = Requantised()
    if any(rows is not None for rows in passed) and _splits_at_blocks(band, tensor.type):
        pieces = []
        for part, rows, done in zip(band, raw, passed, strict=True):
            if done is None:
                done, cost = _quantised([part], [rows], tensor.type)
                requantised += cost
            pieces.append(done)
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    else:
        data, requantised = _quantised(band, raw, tensor.type)
    if not ggml.is_valid(tensor.type, data):
        raise _not_writable(tensor, band)
    return _Rows(data, requantised, is_last)


def _passed_through(part: Part, rows: np.ndarray, type: GGMLQuantizationType) -> np.ndarray | None:
    """The bytes of `rows` times the part's scale without decoding them; None where that cannot be done."""
    if part.tensor.type != type:
        return None
    return rows if part.scale == 1.0 else ggml.scale_rows(type, rows, part.scale)


def _splits_at_blocks(band: Sequence[Part], type: GGMLQuantizationType) -> bool:
    """Whether every part of a row is whole blocks of `type`, so that each can be made on its own."""
    block = GGML_QUANT_SIZES[type][0]
    return all(part.tensor.n_cols % block == 0 for part in band)


def _quantised(
    band: Sequence[Part], raw: Sequence[np.ndarray], type: GGMLQuantizationType
) -> tuple[np.ndarray, Requantised]:
    """Decode, scale, put side by side and quantise; with what it cost where a source was quantised already."""
    floats = np.concatenate([_floats(part, rows) for part, rows in zip(band, raw, strict=True)], axis=1)
    importances = [part.importance for part in band]
    is_important = all(importance is not None for importance in importances)
    data = ggml.quantise(type, floats, np.concatenate(importances) if is_important else None)
    sources = {part.tensor.type for part in band if part.tensor.is_quantised}
    if not sources:
        return data, Requantised()
    error = ggml.dequantise(type, data, floats.shape[1]) - floats
    types = frozenset((source.name, type.name) for source in sources)
    return data, Requantised(floats.size, float(np.vdot(error, error)), float(np.vdot(floats, floats)), types)


def _floats(part: Part, rows: np.ndarray) -> np.ndarray:
    """float32 (n, n_cols) of a part, scaled. Raises UserError when a weight is NaN or Inf: ggml aborts on those."""
    floats = ggml.dequantise(part.tensor.type, rows, part.tensor.n_cols)
    with np.errstate(invalid="ignore", over="ignore"):  # Inf - Inf, or a sum past float32, in what is checked here
        is_suspect = not np.isfinite(floats.sum())
    if is_suspect and not np.isfinite(floats).all():
        raise _not_finite(part.tensor)
    return floats if part.scale == 1.0 else floats * np.float32(part.scale)


def _not_finite(tensor: Tensor) -> UserError:
    return UserError(
        f"{tensor.origin or tensor.name}: {_count_not_finite(tensor)} of {tensor.n_rows * tensor.n_cols} weights "
        "are NaN or Inf",
        "download it again, or leave this model out: it is broken",
    )


def _count_not_finite(tensor: Tensor) -> int:
    step = max(1, CHUNK_WEIGHTS // tensor.n_cols)
    count = 0
    for start in range(0, tensor.n_rows, step):
        rows = tensor.read_rows(start, min(start + step, tensor.n_rows))
        floats = ggml.dequantise(tensor.type, rows, tensor.n_cols)
        count += floats.size - int(np.isfinite(floats).sum())
    return count


def _not_writable(tensor: Planned, band: Sequence[Part]) -> UserError:
    """Why valid rows could not be made: a source holds NaN or Inf, or its values do not fit the type."""
    for part in band:
        if _count_not_finite(part.tensor):
            return _not_finite(part.tensor)
    return UserError(
        f"{band[0].tensor.origin or tensor.name}: holds weights too large for {tensor.type.name}",
        "choose BF16 or F32, or a quantised type, for this tensor",
    )
