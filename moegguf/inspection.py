"""What is in a finished GGUF, and whether it is sound.

`inspect` reads headers only: of a split file, those of all its shards. `check` reads every byte and recomputes what it
can: sizes, the router from its mode and seed, the scale of every block, and that every expert slot holds weights. A
GGUF that is no mix of ours is inspected and checked as far as that makes sense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from gguf import LlamaFileType

from moegguf.families import TensorName, stacked
from moegguf.gguf_header import DEFAULT_ALIGNMENT, Header, TensorInfo, read_header, shards, whole
from moegguf.metadata import Card, SplitCard, read_card
from moegguf.mix import FFN_ROLES
from moegguf.quant import ggml
from moegguf.recipe import Layout, RouterMode, RouterSpec
from moegguf.routers import FFN, digest, noise
from moegguf.sources.blob import LocalFile
from moegguf.tensor import largest
from moegguf.watch import Progress, unheard

GROUPS = (
    "embedding",
    "output",
    "attention",
    "norms",
    "router",
    "routed experts",
    "shared experts",
    "dense FFN",
    "other",
)
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Group:
    """Tensors of one kind. `types` counts tensors by ggml type name."""

    name: str
    types: dict[str, int]
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class Inspection:
    """What a file says of itself. `card` is None for a GGUF that is no mix of ours."""

    path: Path
    n_bytes: int
    arch: str
    name: str
    file_type: int | None
    n_layer: int
    n_embd: int
    n_ctx: int
    n_expert: int
    n_expert_used: int
    has_chat_template: bool
    card: Card | None
    groups: tuple[Group, ...]

    @property
    def n_weights(self) -> int:
        return sum(group.n_weights for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(group.n_bytes for group in self.groups) / max(1, self.n_weights)

    @property
    def quant(self) -> str:
        """The preset that the file says it was made with, by llama.cpp's name."""
        if self.file_type is None:
            return "unknown"
        try:
            return LlamaFileType(self.file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return f"file type {self.file_type}"

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "file": str(self.path),
            "bytes": self.n_bytes,
            "is_mix": self.card is not None,
            "name": self.name,
            "architecture": self.arch,
            "quant": self.quant,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "weights": self.n_weights,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            "n_ctx": self.n_ctx,
            "n_expert": self.n_expert,
            "n_expert_used": self.n_expert_used,
            "has_chat_template": self.has_chat_template,
            "card": asdict(self.card) if self.card else None,
            "groups": [
                {
                    "name": group.name,
                    "types": group.types,
                    "bits_per_weight": round(group.bits_per_weight, 4),
                    "weights": group.n_weights,
                    "bytes": group.n_bytes,
                }
                for group in self.groups
            ],
        }


def inspect(path: Path) -> Inspection:
    """Describe `path` from its header. Raises UserError when it is no intact GGUF."""
    header = whole(read_header(shards(path)[0]))
    arch = header.get("general.architecture", "unknown")

    def hparam(key: str) -> int:
        return largest(header.get(f"{arch}.{key}", 0))

    return Inspection(
        path=path,
        n_bytes=header.file_size,
        arch=arch,
        name=str(header.get("general.name", path.stem)),
        file_type=header.get("general.file_type"),
        n_layer=hparam("block_count"),
        n_embd=hparam("embedding_length"),
        n_ctx=hparam("context_length"),
        n_expert=hparam("expert_count"),
        n_expert_used=hparam("expert_used_count"),
        has_chat_template="tokenizer.chat_template" in header.fields,
        card=read_card(header),
        groups=_groups(header),
    )


def _groups(header: Header) -> tuple[Group, ...]:
    members: dict[str, list[TensorInfo]] = {name: [] for name in GROUPS}
    for info in header.tensors.values():
        members[_group_of(info.name)].append(info)
    return tuple(
        Group(
            name,
            dict(Counter(info.type.name for info in infos).most_common()),
            sum(prod(info.shape) for info in infos),
            sum(info.nbytes for info in infos),
        )
        for name, infos in members.items()
        if infos
    )


def _group_of(name: str) -> str:
    role = TensorName.parse(name).role
    if role == "token_embd":
        return "embedding"
    if role == "output":
        return "output"
    if role.endswith("_norm"):
        return "norms"
    if role.startswith("attn_"):
        return "attention"
    if role == "ffn_gate_inp":
        return "router"
    if role.endswith("_exps"):
        return "routed experts"
    if role.endswith("_shexp"):
        return "shared experts"
    return "dense FFN" if role in ("ffn_gate", "ffn_up", "ffn_down") else "other"


def check(path: Path, progress: Progress = unheard) -> list[str]:
    """Everything that is wrong with `path`, in words; an empty list for a sound file.

    `progress` hears the bytes as they are read. Raises UserError when the header itself is damaged.
    """
    parts = [read_header(part) for part in shards(path)]
    header, card = whole(parts[0]), read_card(parts[0])
    header = replace(header, tensors={name: stacked(info) for name, info in header.tensors.items()})
    faults = [fault for part in parts for fault in _size_faults(part)]
    bands: dict[str, Bands] = {}
    if card is not None:
        counts = _Counts.of(header, card)
        bands = _expert_bands(header, card, counts)
        faults += _card_faults(card, counts) + _shape_faults(header, bands)
    blobs = {name: blob for part in parts for blob in [LocalFile(part.path)] for name in part.tensors}
    for info in header.tensors.values():
        faults += _data_faults(blobs[info.name], info, bands.get(info.name, Bands.of(info)), progress)
    return faults + (_router_faults(blobs, header, card) if card else [])


def _size_faults(header: Header) -> list[str]:
    end = max((info.offset + info.nbytes for info in header.tensors.values()), default=0)
    alignment = header.get("general.alignment", DEFAULT_ALIGNMENT)
    extra = header.file_size - -(-end // alignment) * alignment
    return [f"the file has {extra} bytes after its last tensor"] if extra > 0 else []


@dataclass(frozen=True)
class _Counts:
    """Experts of a layer by the keys of the architecture: in stacks, run of those, and fused into one FFN."""

    stacked: int
    used: int
    fused: int
    widths: tuple[int, ...] = ()
    """Neurons of each mixed layer of a dense FFN; where neurons are split, those of the fine group and the others."""

    @classmethod
    def of(cls, header: Header, card: Card) -> _Counts:
        arch = header.get("general.architecture")
        if card.layout == Layout.FUSED:
            return cls(0, 0, len(card.experts), _widths(header, card))
        width, n_ff = (header.get(f"{arch}.{role}feed_forward_length", 0) for role in ("expert_shared_", ""))
        if card.split:
            stacked, used = (header.get(f"{arch}.expert_{key}", 0) for key in ("count", "used_count"))
            return cls(stacked, used, 1, (width, n_ff))
        fused = width // n_ff if isinstance(n_ff, int) and n_ff else 0
        return cls(header.get(f"{arch}.expert_count", 0), header.get(f"{arch}.expert_used_count", 0), fused)


def _mixed_layers(header: Header, card: Card) -> Sequence[int]:
    """The layers that hold experts; of no more layers than the file has tensors, whatever it says."""
    n_layer = header.get(f"{header.get('general.architecture')}.block_count", 0)
    return card.layers or range(min(n_layer, len(header.tensors)))


def _widths(header: Header, card: Card) -> tuple[int, ...]:
    """By the tensors: whether they agree with the keys is for llama.cpp to say."""
    names = (f"blk.{layer}.ffn_down.weight" for layer in _mixed_layers(header, card))
    return tuple(header.tensors[name].shape[-1] for name in names if name in header.tensors)


@dataclass(frozen=True)
class Bands:
    """Into how many equal bands of rows, or of columns, the experts divide a tensor."""

    rows: int = 1
    cols: int = 1

    @classmethod
    def of(cls, info: TensorInfo) -> Bands:
        """Those of a file that says nothing of its experts: the slices of a stack."""
        return cls(rows=info.shape[0]) if len(info.shape) == 3 else cls()

    def fit(self, info: TensorInfo) -> bool:
        if len(info.shape) == 3:
            return self == self.of(info)
        return prod(info.shape[:-1]) % self.rows == 0 and info.shape[-1] % self.cols == 0


def _expert_bands(header: Header, card: Card, counts: _Counts) -> dict[str, Bands]:
    """Every tensor that a mix has because of its experts, by name."""
    suffix = "" if card.layout == Layout.FUSED else "_shexp"
    bands: dict[str, Bands] = {}
    n_fused = 1 if card.is_dense or card.compact else counts.fused
    for layer in _mixed_layers(header, card):
        if counts.stacked:
            bands[f"blk.{layer}.ffn_gate_inp.weight"] = Bands()
            bands |= {f"blk.{layer}.{role}_exps.weight": Bands(rows=counts.stacked) for role in FFN_ROLES}
        if counts.fused:
            bands |= {f"blk.{layer}.{role}{suffix}.weight": Bands(rows=n_fused) for role in FFN_ROLES}
            bands[f"blk.{layer}.ffn_down{suffix}.weight"] = Bands(cols=n_fused)
    return bands


def _card_faults(card: Card, counts: _Counts) -> list[str]:
    """Where the keys that stock runtimes go by contradict ours."""
    n, faults = len(card.experts), []
    if card.layout not in set(Layout):
        faults.append(f"the layout {card.layout!r} is unknown")
    if card.router not in set(RouterMode):
        faults.append(f"the router mode {card.router!r} is unknown")
    faults += _split_faults(card.split, counts) if card.split else _number_faults(card, counts)
    if card.is_gateless and card.k != n:
        faults.append(f"the router is gateless, but {card.k} of {n} experts run for a token")
    if card.compact and counts.widths != card.compact.widths:
        faults.append("the widths of its layers are not those that it was compacted to")
    return faults


def _number_faults(card: Card, counts: _Counts) -> Iterator[str]:
    n = len(card.experts)
    if counts.stacked + counts.fused != n:
        yield f"{counts.stacked} stacked and {counts.fused} fused experts, but {n} are named"
    if counts.used + counts.fused != card.k:
        yield f"{counts.used} stacked and {counts.fused} fused experts run for a token, but k is {card.k}"


def _split_faults(split: SplitCard, counts: _Counts) -> Iterator[str]:
    if (counts.stacked, counts.used) != (1, 1):
        yield f"its neurons are split in two groups, but {counts.used} of {counts.stacked} stacked experts run"
    if counts.widths != (split.fine, split.neurons - split.fine):
        yield f"its groups have {' and '.join(map(str, counts.widths))} neurons, not {split.fine} of {split.neurons}"


def _shape_faults(header: Header, bands: dict[str, Bands]) -> list[str]:
    missing = [name for name in bands if name not in header.tensors]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    faults = [f"{missing[0]}{more}: missing"] if missing else []
    return faults + [
        f"{name} has shape {header.tensors[name].shape}, which is not {band.rows * band.cols} experts"
        for name, band in bands.items()
        if name in header.tensors and not band.fit(header.tensors[name])
    ]


def _data_faults(blob: LocalFile, info: TensorInfo, bands: Bands, progress: Progress) -> list[str]:
    """NaN or Inf in a tensor, and experts in it that hold only zeros."""
    if not bands.fit(info):
        bands = Bands.of(info)
    is_weight = len(info.shape) > 1 and TensorName.parse(info.name).role != "ffn_gate_inp"
    is_filled = np.zeros((bands.rows, bands.cols), bool)
    faults = []
    for i in range(bands.rows):
        is_valid = True
        for rows in _read_band(blob, info, i, bands.rows):
            is_valid &= ggml.is_valid(info.type, rows)
            if not is_filled[i].all():
                is_filled[i] |= _has_weights(info, rows, bands.cols)
            progress(rows.nbytes)
        if not is_valid:
            faults.append(f"{_part(info, i, bands.rows)} holds NaN or Inf")
    if is_weight:
        for i, filled in enumerate(is_filled.ravel()):
            if not filled:
                faults.append(f"{_part(info, i, is_filled.size)} is empty: it holds only zeros")
    return faults


def _part(info: TensorInfo, i: int, n: int) -> str:
    return f"{info.name}[{i}]" if n > 1 else info.name


def _has_weights(info: TensorInfo, rows: np.ndarray, n_bands: int) -> np.ndarray:
    """Which bands of columns hold anything but zeros, bool (n_bands,)."""
    is_readable = info.type in ggml.supported_types()
    values = ggml.dequantise(info.type, rows, info.shape[-1]) if is_readable else rows
    return values.reshape(len(values), n_bands, -1).any(axis=(0, 2))


def _read_band(blob: LocalFile, info: TensorInfo, i: int, n_bands: int) -> Iterator[np.ndarray]:
    """The rows of band `i`, uint8 (n, row_bytes), a few MiB at a time."""
    row_bytes = info.nbytes // prod(info.shape[:-1])
    n_rows = prod(info.shape[:-1]) // n_bands
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(0, n_rows, step):
        n = min(step, n_rows - row)
        yield blob.read(info.offset + (i * n_rows + row) * row_bytes, n * row_bytes).reshape(n, row_bytes)


def _read_router(blob: LocalFile, info: TensorInfo) -> np.ndarray | None:
    """The matrix of a router, float32 (n_expert, n_embd); None where it is no F32 matrix."""
    if info.type.name != "F32" or len(info.shape) != 2:
        return None
    return blob.read(info.offset, info.nbytes).view("<f4").reshape(info.shape)


def _router_faults(blobs: Mapping[str, LocalFile], header: Header, card: Card) -> list[str]:
    """Routers that are not what the file says of them: by their digest, or for gate-less, zeros."""
    infos = [info for info in header.tensors.values() if TensorName.parse(info.name).role == "ffn_gate_inp"]
    infos.sort(key=lambda info: TensorName.parse(info.name).layer or 0)
    found = {info.name: _read_router(blobs[info.name], info) for info in infos}
    if wrong := [info for info in infos if found[info.name] is None]:
        return [f"{info.name} is {info.type.name} of shape {info.shape}, expected an F32 matrix" for info in wrong]
    if card.is_gateless:
        return [f"{name} is not the router of mode gateless" for name, matrix in found.items() if matrix.any()]
    return _noise_faults(found, card) if card.router == RouterMode.NOISY else _digest_faults(found, card)


def _noise_faults(found: Mapping[str, np.ndarray], card: Card) -> list[str]:
    """Routers that are not the noise of the stored seed."""
    spec = RouterSpec(RouterMode.NOISY, card.k, card.std or 0.0, card.seed or 0, shared=card.shared)
    faults = []
    for name, matrix in found.items():
        try:
            expected = noise(spec, (TensorName.parse(name).layer or 0, FFN), *matrix.shape)
        except ValueError:  # a seed that no recipe can have
            return [f"{name} cannot have been made with seed {card.seed}"]
        if not np.allclose(matrix, expected, rtol=1e-5, atol=0):
            faults.append(f"{name} is not the router of mode noisy")
    return faults


def _digest_faults(found: Mapping[str, np.ndarray], card: Card) -> list[str]:
    if digest(found.values()) == card.router_digest:
        return []
    return [f"the router is not the one that was written: its SHA-256 differs from {card.router_digest[:12]}…"]
