"""Importance matrices in llama.cpp's GGUF format: how much the squared error of each input column counts.

The file holds, per weight tensor, sums of squared inputs and how many inputs were summed; their quotient is the
importance (llama.cpp, tools/quantize/quantize.cpp). An entry measured on this very mix fits its tensor, expert by
expert; without one, the entry of the dense model that a part came from is used, because an expert's FFN sees
inputs of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moegguf.errors import UserError
from moegguf.gguf_header import Header, is_gguf, read_header
from moegguf.sources.blob import LocalFile
from moegguf.tensor import Form, Part, Slot

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """`entries`: weight name → float32 (n_matrices, n_cols); more than one matrix for stacked experts."""

    path: Path
    entries: Mapping[str, np.ndarray]
    n_chunks: int


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix. Raises UserError when the file is none, or is damaged."""
    if path.is_file() and not is_gguf(path):
        raise UserError(f"{path}: is no imatrix in GGUF format", "make it with a current llama-imatrix (no .dat)")
    header = read_header(path)
    blob = LocalFile(path)
    names = [name.removesuffix(SUMS) for name in header.tensors if name.endswith(SUMS)]
    if header.get("general.type") != "imatrix" or not names:
        raise UserError(f"{path}: is a GGUF, but no imatrix", "make one with llama-imatrix from a text of your domain")
    entries = {name: _mean_squares(header, blob, name) for name in names}
    return Imatrix(path, entries, header.get("imatrix.chunk_count", 0))


def _mean_squares(header: Header, blob: LocalFile, name: str) -> np.ndarray:
    """Sums over counts; experts that no input reached count every column alike."""
    infos = [header.tensors.get(name + suffix) for suffix in (SUMS, COUNTS)]
    if any(info is None or info.type.name != "F32" for info in infos):
        raise UserError(f"{header.path}: {name} lacks F32 sums or counts", "make the imatrix again")
    sums, counts = (blob.read(info.offset, info.nbytes).view("<f4") for info in infos)
    if sums.size % counts.size:
        raise UserError(f"{header.path}: {name} has {sums.size} sums for {counts.size} counts", "make it again")
    counts = counts[:, None]
    rows = sums.reshape(len(counts), -1)
    means = np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
    if not np.isfinite(means).all():
        raise UserError(f"{header.path}: {name} holds NaN or Inf", "make the imatrix again")
    return means


def with_importance(form: Form, imatrix: Imatrix) -> Form:
    """`form` with the importance of every part that the imatrix knows. Raises UserError where shapes disagree."""
    slots, faults = [], []
    for slot in form.slots:
        try:
            slots.append(_important(slot, imatrix))
        except UserError as fault:
            faults.append(fault)
    if faults:
        raise faults[0]
    return replace(form, slots=tuple(slots))


def _important(slot: Slot, imatrix: Imatrix) -> Slot:
    own = imatrix.entries.get(slot.name)
    if own is not None and own.shape[1] == slot.n_cols and own.shape[0] in (1, len(slot.bands)):
        matrices = [own[i if len(own) > 1 else 0] for i in range(len(slot.bands))]
        return replace(slot, bands=tuple(map(_split_over, slot.bands, matrices)))
    return replace(slot, bands=tuple(tuple(_from_dense(part, imatrix) for part in band) for band in slot.bands))


def _split_over(band: tuple[Part, ...], row: np.ndarray) -> tuple[Part, ...]:
    ends = np.cumsum([part.tensor.n_cols for part in band])
    pieces = np.split(row, ends[:-1])
    return tuple(replace(part, importance=piece) for part, piece in zip(band, pieces, strict=True))


def _from_dense(part: Part, imatrix: Imatrix) -> Part:
    entry = imatrix.entries.get(part.tensor.name)
    if entry is None:
        return part
    if entry.shape != (1, part.tensor.n_cols):
        raise UserError(
            f"{imatrix.path}: {part.tensor.name} has {entry.shape[0]} × {entry.shape[1]} values, "
            f"expected {part.tensor.n_cols}",
            "make the imatrix from this mix or from a model of the same shape",
        )
    return replace(part, importance=entry[0])
