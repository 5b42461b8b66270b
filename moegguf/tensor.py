"""The values that the build side hands from room to room.

A `Tensor` is a name, a shape, a ggml type and a lazy read of whole rows; a `Source` is metadata plus
tensors under GGUF names, wherever they came from; a `Planned` is one tensor of the output file, laid out
from slices of source tensors. Nothing here reads a weight until the writer asks for rows, and a read
returns only the rows that were asked for: that is what bounds memory.

Shapes are numpy's, slowest dimension first: {n_embd, n_ff} in ggml notation is (n_ff, n_embd) here.
Bytes are little-endian, as GGUF and safetensors store them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue

Metadata = dict[str, GGUFValue]
"""GGUF key → typed value, exactly as it is (or will be) written."""

FLOAT_TYPES = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})


def row_bytes(type: GGMLQuantizationType, n_cols: int) -> int:
    """Bytes of one row of `n_cols` weights. `n_cols` must be a multiple of the type's block size."""
    block, size = GGML_QUANT_SIZES[type]
    if n_cols % block:
        raise ValueError(f"row length {n_cols} is not a multiple of the {type.name} block size {block}")
    return n_cols // block * size


def largest(value: int | list[int]) -> int:
    """A count of the metadata; where layers have numbers of their own, the largest."""
    return int(max(value) if isinstance(value, list) else value)


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet.

    `read_rows(start, stop)` returns uint8 of shape (stop - start, row_bytes): the stored bytes of those
    rows, where a 3-D tensor's rows are counted through all its slices and a 1-D tensor is one row.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    read_rows: Callable[[int, int], np.ndarray]
    origin: str = ""
    """File and name it is read from, for messages."""

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.n_cols)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def is_quantised(self) -> bool:
        return self.type not in FLOAT_TYPES


def constant(name: str, values: np.ndarray) -> Tensor:
    """A float32 tensor held in memory (a router, rope factors)."""
    values = np.ascontiguousarray(values, dtype="<f4")
    rows = values.reshape(-1, values.shape[-1]).view(np.uint8)
    return Tensor(name, values.shape, GGMLQuantizationType.F32, lambda start, stop: rows[start:stop])


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: scale · b @ a. a is (r, n_in); b is (n_out, r), its rows in ggml's order."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """Where the weights of a LoRA expert come from: a model, and what is added to tensors of it (by GGUF name)."""

    over: Source
    deltas: Mapping[str, LowRank]


@dataclass(frozen=True)
class Expected:
    """What a file must hold, by the store that it comes from: `n_bytes` of this SHA-256 (hex)."""

    path: Path
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A model to take weights from: an HF folder, a Hub repo, a GGUF file, an adapter over one of them.

    `metadata` holds the `general.*` and `<arch>.*` keys; the tokenizer's keys come from `read_vocab()`,
    because only the base's tokenizer is ever used and reading one is slow. `files` are the local files
    that it reads, so that a build never overwrites its own source.
    """

    ref: str
    label: str
    """What is recorded in a mix: the reference with its revision; for a local path only its last part."""
    metadata: Metadata
    tensors: Mapping[str, Tensor]
    read_vocab: Callable[[], Metadata]
    files: tuple[Path, ...] = ()
    lora: Lora | None = None
    """Set where `tensors` are those of another source with an adapter merged in."""
    expected: tuple[Expected, ...] = ()
    """Files whose digests are known, for a build to verify before it writes: that means reading them whole."""
    notes: tuple[str, ...] = ()
    """What a mix that has it as its base takes from elsewhere, or does not take along, in sentences."""

    @property
    def arch(self) -> str:
        return self.metadata["general.architecture"].value

    @property
    def licence(self) -> str:
        """The Hub's identifier of its licence, or the name that the model gives one of its own; empty where unknown."""
        licence, name = (self.metadata.get(f"general.license{part}") for part in ("", ".name"))
        if licence is None or not isinstance(licence.value, str):
            return ""
        is_named = licence.value == "other" and name is not None and isinstance(name.value, str)
        return name.value if is_named else licence.value

    def hparam(self, key: str, default: int | float | str | None = None):
        """The value of `<arch>.<key>`. Raises KeyError when it is absent and there is no default."""
        name = f"{self.arch}.{key}"
        if name not in self.metadata and default is not None:
            return default
        return self.metadata[name].value

    @property
    def n_layer(self) -> int:
        return int(self.hparam("block_count"))

    @property
    def head_size(self) -> int:
        """Numbers in a head of a query or key."""
        n_embd, n_head = int(self.hparam("embedding_length")), largest(self.hparam("attention.head_count"))
        return int(self.hparam("attention.key_length", n_embd // n_head))


class Columns(NamedTuple):
    """The columns `numbers` of a tensor that has `of`."""

    numbers: np.ndarray
    of: int


@dataclass(frozen=True)
class Part:
    """One source tensor inside an output tensor, times `scale`, quantised with `importance` (per column)."""

    tensor: Tensor
    scale: float = 1.0
    importance: np.ndarray | None = None
    columns: Columns | None = None
    """Which columns of the tensor of its name in a dense model it has; None is all."""

    @property
    def n_dense_cols(self) -> int:
        """Columns of that tensor."""
        return self.columns.of if self.columns else self.tensor.n_cols


@dataclass(frozen=True)
class Slot:
    """One output tensor before its type is chosen.

    `bands` are stacked from top to bottom (experts of a stack; gate and up rows of a fused FFN); the parts
    of one band stand side by side (the down columns of a fused FFN) and have equally many rows.
    """

    name: str
    shape: tuple[int, ...]
    bands: tuple[tuple[Part, ...], ...]
    preset: str | None = None
    """Quantisation preset of the experts inside; None for tensors of the trunk."""

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for band in self.bands for part in band)


@dataclass(frozen=True)
class Form:
    """An output file without types: what a layout makes of a mix. `metadata` holds the architecture's keys."""

    arch: str
    metadata: Metadata
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Planned:
    """One output tensor: a slot and the type that it is written in."""

    slot: Slot
    type: GGMLQuantizationType

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slot.shape

    @cached_property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.slot.n_cols)

    @property
    def nbytes(self) -> int:
        return prod(self.slot.shape[:-1]) * self.row_bytes
