"""Tensors of one safetensors file, read in ranges.

The `safetensors` package maps whole files and cannot give BF16 as numpy, nor read a file that is not on this
disk; the format (8 bytes of header length, a JSON header, then the data) is parsed here over a `Blob` instead.
Every offset is checked against the file, the shape and the other tensors before a byte of data is read.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.sources.blob import Blob
from moegguf.tensor import Tensor

MAX_DIMENSIONS = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; `start` counts from the start of the file."""

    blob: Blob
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def tensor(self, name: str) -> Tensor:
        """This entry as a lazy tensor called `name`. Raises UserError for dtypes other than F32, F16 and BF16."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.blob.name}: tensor {self.name} is {self.dtype}, expected one of {', '.join(DTYPES)}",
                "use the original weights of the model, or a GGUF of it if it is only published quantised",
            )
        if not self.shape or 0 in self.shape:
            raise UserError(f"{self.blob.name}: tensor {self.name} is empty (shape {self.shape})", "save it again")
        row = self.nbytes // prod(self.shape[:-1])

        def read_rows(start: int, stop: int) -> np.ndarray:
            return self.blob.read(self.start + start * row, (stop - start) * row).reshape(stop - start, row)

        return Tensor(name, self.shape, DTYPES[self.dtype], read_rows, f"{self.blob.name}: {self.name}")


def read_entries(blob: Blob) -> Mapping[str, Entry]:
    """All tensors of the file, by name. Raises UserError when the header does not describe this file."""
    header, data_start = _read_header(blob)
    entries = {
        name: _checked_entry(blob, name, info, data_start) for name, info in header.items() if name != "__metadata__"
    }
    ordered = sorted(entries.values(), key=lambda entry: entry.start)
    for first, second in pairwise(ordered):
        if first.start + first.nbytes > second.start:
            raise _corrupt(blob, f"tensors {first.name} and {second.name} overlap")
    return entries


def _corrupt(blob: Blob, what: str) -> UserError:
    return UserError(f"{blob.name}: corrupt or truncated safetensors: {what}", "download or save it again")


def _read_header(blob: Blob) -> tuple[dict, int]:
    if blob.size < 8:
        raise _corrupt(blob, f"{blob.size} bytes are too few for a header")
    length = int.from_bytes(blob.read(0, 8).tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, blob.size - 8):
        raise _corrupt(blob, f"the header claims {length} bytes, the file has {blob.size}")
    try:
        header = json.loads(blob.read(8, length).tobytes())
    except (ValueError, RecursionError) as error:
        raise _corrupt(blob, f"the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(blob, "the header is no JSON object")
    return header, 8 + length


def _is_count(number) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _checked_entry(blob: Blob, name: str, info, data_start: int) -> Entry:
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        numbers = (*shape, start, end)
        if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, numbers)):
            raise ValueError(info)
    except (TypeError, KeyError, ValueError) as error:
        expected = "a dtype, a shape and two data_offsets"
        raise _corrupt(blob, f"tensor {name} has the entry {reprlib.repr(info)}, expected {expected}") from error
    if start > end:
        raise _corrupt(blob, f"tensor {name} ends at {end}, before it starts at {start}")
    if data_start + end > blob.size:
        raise _corrupt(blob, f"tensor {name} should end at byte {data_start + end}, the file ends at {blob.size}")
    expected = prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if dtype in DTYPE_BYTES and end - start != expected:
        raise _corrupt(blob, f"tensor {name} of shape {shape} and {dtype} has {end - start} bytes, expected {expected}")
    return Entry(blob, name, dtype, shape, data_start + start, end - start)
