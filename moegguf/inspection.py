"""What is in a finished GGUF, and whether it is sound.

`inspect` reads the header only. `check` reads every byte and recomputes what it can: sizes, the router from its
mode and seed, the scale of every block, and that every expert slot holds weights. A GGUF that is no mix of ours
is inspected and checked as far as that makes sense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from moegguf import routers
from moegguf.families import TensorName
from moegguf.gguf_header import Header, TensorInfo, read_header
from moegguf.metadata import Card, read_card
from moegguf.quant import ggml
from moegguf.recipe import Layout, RouterMode, RouterSpec
from moegguf.sources.blob import LocalFile

GROUPS = ("embedding", "output", "attention", "norms", "router", "routed experts", "shared experts", "dense FFN", "other")
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
        return 8 * sum(group.n_bytes for group in self.groups) / self.n_weights


def inspect(path: Path) -> Inspection:
    """Describe `path` from its header. Raises UserError when it is no intact GGUF."""
    header = read_header(path)
    arch = header.get("general.architecture", "unknown")

    def hparam(key: str) -> int:
        value = header.get(f"{arch}.{key}", 0)
        return int(max(value) if isinstance(value, list) else value)

    return Inspection(
        path=path,
        n_bytes=header.file_size,
        arch=arch,
        name=header.get("general.name", path.stem),
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


def check(path: Path, progress: Callable[[int], None] = lambda n_bytes: None) -> list[str]:
    """Everything that is wrong with `path`, in words; an empty list for a sound file.

    `progress` hears the bytes as they are read. Raises UserError when the header itself is damaged.
    """
    header = read_header(path)
    card = read_card(header)
    faults = _size_faults(header)
    if card is not None:
        faults += _count_faults(header, card)
    blob = LocalFile(path)
    for info in header.tensors.values():
        faults += _data_faults(blob, info, progress)
        if card is not None and TensorName.parse(info.name).role == "ffn_gate_inp":
            faults += _router_faults(blob, info, card)
    return faults


def _size_faults(header: Header) -> list[str]:
    end = max((info.offset + info.nbytes for info in header.tensors.values()), default=0)
    alignment = header.get("general.alignment", 32)
    if header.file_size - end >= alignment:
        return [f"the file has {header.file_size - end} bytes after its last tensor"]
    return []


def _count_faults(header: Header, card: Card) -> list[str]:
    """Expert counts of the architecture and the shapes of the expert tensors, against the card."""
    arch = header.get("general.architecture")
    n = len(card.experts)
    if card.layout == Layout.FUSED:
        width = header.get(f"{arch}.feed_forward_length")
        widths = width if isinstance(width, list) else [width]
        return [f"the FFN width {w} is no multiple of {n} experts" for w in widths if w % n]
    n_shared = 0
    if card.layout == Layout.SHARED:
        shared_width = header.get(f"{arch}.expert_shared_feed_forward_length", 0)
        n_shared = shared_width // header.get(f"{arch}.feed_forward_length")
    faults = []
    stacked, used = header.get(f"{arch}.expert_count"), header.get(f"{arch}.expert_used_count")
    if stacked + n_shared != n:
        faults.append(f"{stacked} stacked and {n_shared} shared experts, but {n} are named")
    if used + (n_shared if card.layout == Layout.SHARED else 0) != card.k:
        faults.append(f"{used} stacked and {n_shared} shared experts run for a token, but the router's k is {card.k}")
    for layer in range(header.get(f"{arch}.block_count")):
        for role in ("ffn_gate", "ffn_up", "ffn_down"):
            info = header.tensors.get(f"blk.{layer}.{role}_exps.weight")
            if info is None or info.shape[0] != stacked:
                faults.append(f"blk.{layer}.{role}_exps has {info.shape[0] if info else 0} experts, expected {stacked}")
    return faults


def _data_faults(blob: LocalFile, info: TensorInfo, progress: Callable[[int], None]) -> list[str]:
    """NaN or Inf in a tensor, and expert slots (slices of a stack) that hold only zeros."""
    n_slices = info.shape[0] if len(info.shape) == 3 else 1
    is_weight = len(info.shape) > 1 and TensorName.parse(info.name).role != "ffn_gate_inp"
    faults = []
    for i in range(n_slices):
        is_valid, is_filled = True, False
        for rows in _read_slice(blob, info, i, n_slices):
            is_valid &= ggml.is_valid(info.type, rows)
            is_filled |= bool(rows.any())
            progress(rows.nbytes)
        where = f"{info.name}[{i}]" if n_slices > 1 else info.name
        if not is_valid:
            faults.append(f"{where} holds NaN or Inf")
        if not is_filled and is_weight:
            faults.append(f"{where} is empty: it holds only zeros")
    return faults


def _read_slice(blob: LocalFile, info: TensorInfo, i: int, n_slices: int) -> Iterator[np.ndarray]:
    """The rows of slice `i`, uint8 (n, row_bytes), a few MiB at a time."""
    row_bytes = info.nbytes // prod(info.shape[:-1])
    n_rows = prod(info.shape[:-1]) // n_slices
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(0, n_rows, step):
        n = min(step, n_rows - row)
        yield blob.read(info.offset + (i * n_rows + row) * row_bytes, n * row_bytes).reshape(n, row_bytes)


def _router_faults(blob: LocalFile, info: TensorInfo, card: Card) -> list[str]:
    """A router that is not what its mode, std and seed make."""
    found = blob.read(info.offset, info.nbytes).view("<f4").reshape(info.shape)
    if card.router not in set(RouterMode):
        return []
    spec = RouterSpec(RouterMode(card.router), card.k, card.std or 0.0, card.seed or 0)
    expected = routers.rows(spec, TensorName.parse(info.name).layer or 0, *info.shape)
    if np.allclose(found, expected, rtol=1e-5, atol=0):
        return []
    return [f"{info.name} is not the router of mode {card.router}"]
