"""The header of a GGUF file: metadata and tensor table, checked against the file before anything trusts it.

`gguf.GGUFReader` maps the file and follows whatever counts it finds there. This parser reads the same bytes
(format: ggml/docs/gguf.md) but treats each count, length and offset as a claim: it must fit in what is left
of the file, or the file is refused with the place where it went wrong. It also leaves the big string
arrays of a tokenizer undecoded until they are asked for, so that opening eight experts takes milliseconds.

Weights are never read here. Both sides of the house use it: `sources/` to build, `runtime/` before it loads.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.journal import journal_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is numpy's (slowest first), `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header. `fields` maps a key to a function that gives its value (arrays are decoded late)."""

    path: Path
    fields: Mapping[str, Callable[[], GGUFValue]]
    tensors: Mapping[str, TensorInfo]
    file_size: int

    def value(self, key: str) -> GGUFValue:
        """The typed value of `key`. Raises KeyError when the file has no such key."""
        return self.fields[key]()

    def get(self, key: str, default=None):
        """The plain value of `key`, or `default`."""
        return self.fields[key]().value if key in self.fields else default


def file_identity(header: Header) -> dict[str, object]:
    """Path, size, time of change, and a digest of the header. Weights are not read: a changed file has a new time."""
    n_header = min((tensor.offset for tensor in header.tensors.values()), default=header.file_size)
    with open(header.path, "rb") as file:
        digest = sha256(file.read(n_header)).hexdigest()
    path = header.path.resolve()
    return {"file": str(path), "bytes": header.file_size, "mtime": path.stat().st_mtime_ns, "header": digest}


def is_gguf(path: Path) -> bool:
    """Whether the file starts with GGUF's magic."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> Header:
    """Parse and check the header of `path`. Raises UserError when the file is no intact GGUF."""
    if journal_of(path).exists():
        raise UserError(
            f"{path}: a change of it was interrupted, or is being made", f"run `moegguf set {path} --recover`"
        )
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise UserError(f"{path}: {size} bytes are too few for a GGUF header", "download or convert it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error


def shards(path: Path) -> list[Path]:
    """The files that `path` is one of, in order; itself where it is not split. Raises UserError for a missing one."""
    match = SHARD.fullmatch(path.name)
    count = int(match["count"]) if match else 0
    if not count:
        return [path]
    shards = [shard_name(path.with_name(match["stem"]), number, count) for number in range(1, count + 1)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path}: shard {missing[0]}{more} is missing", f"put all {count} shards into one folder")
    return shards


def shard_name(prefix: Path, number: int, count: int) -> Path:
    """What llama.cpp calls a shard, counted from 1 (llama_split_path)."""
    return prefix.with_name(f"{prefix.name}-{number:05}-of-{count:05}.gguf")


def whole(header: Header) -> Header:
    """The header of a split model, with the tensors of all its shards; of any other file, itself. Raises UserError."""
    headers = [header, *(read_header(path) for path in shards(header.path) if path != header.path)]
    tensors = {name: info for part in headers for name, info in part.tensors.items()}
    return replace(header, tensors=tensors, file_size=sum(part.file_size for part in headers))


class _Cursor:
    """Reads little-endian values from a buffer and refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def corrupt(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: corrupt or truncated GGUF: {what} (at byte {self.at} of {self.size})",
            "download or convert it again",
        )

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.corrupt(f"{what} claims {n} bytes, {self.size - self.at} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def unpack(self, code: str, what: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string_bytes(self, what: str) -> bytes:
        return self.take(self.unpack("Q", what), what)

    def string(self, what: str) -> str:
        return self.string_bytes(what).decode("utf-8", errors="replace")

    def enum(self, kind: type, what: str):
        number = self.unpack("I", what)
        try:
            return kind(number)
        except ValueError:
            raise self.corrupt(f"{what} has the unknown type id {number}") from None


def _parse(path: Path, data: mmap.mmap, size: int) -> Header:
    cursor = _Cursor(path, data, size)
    if cursor.take(4, "magic") != MAGIC:
        raise UserError(f"{path}: not a GGUF file (it starts with {data[:4]!r})", "pass a .gguf file or a model folder")
    version = cursor.unpack("I", "version")
    if version not in VERSIONS:
        raise UserError(
            f"{path}: GGUF version {version} (read as little-endian), expected one of {VERSIONS}",
            "convert it with a current llama.cpp (big-endian files are not supported)",
        )
    n_tensors = _claimed_count(cursor, "tensor count", smallest=24)
    n_fields = _claimed_count(cursor, "metadata count", smallest=13)

    fields: dict[str, Callable[[], GGUFValue]] = {}
    for _ in range(n_fields):
        key = cursor.string("a metadata key")
        if key in fields:
            raise cursor.corrupt(f"metadata key {key!r} occurs twice")
        fields[key] = _read_value(cursor, key)
    _check_counts(cursor, fields)

    raw = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = fields["general.alignment"]().value if "general.alignment" in fields else DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {alignment!r}, expected a power of two from 8 on")
    start = -(-cursor.at // alignment) * alignment
    tensors = {info.name: _placed(cursor, info, start) for info in raw}
    if len(tensors) != n_tensors:
        raise cursor.corrupt(f"{n_tensors - len(tensors)} tensor names occur twice")
    _check_overlaps(cursor, tensors.values())
    return Header(path, fields, tensors, size)


_COUNTS = (
    "block_count", "context_length", "embedding_length", "expert_count", "expert_used_count",
    "expert_shared_feed_forward_length", "attention.key_length", "attention.value_length", "vocab_size",
)  # fmt: skip
_COUNTS_PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""These may be arrays, one number a layer."""


def _check_counts(cursor: _Cursor, fields: Mapping[str, Callable[[], GGUFValue]]) -> None:
    """What sizes are computed from must be counts, or every reader would have to ask."""
    if "general.architecture" not in fields:
        return
    arch = fields["general.architecture"]().value
    if not isinstance(arch, str) or not re.fullmatch(r"[\w.-]{1,64}", arch):
        raise cursor.corrupt(f"general.architecture is {arch!r:.80}, expected a short name")
    n_layer = 0
    for name in (*_COUNTS, *_COUNTS_PER_LAYER):
        key = f"{arch}.{name}"
        value = fields[key]().value if key in fields else 0
        is_per_layer = name in _COUNTS_PER_LAYER and isinstance(value, list) and len(value) == n_layer > 0
        if not all(type(number) is int and 0 <= number < 2**32 for number in (value if is_per_layer else [value])):
            raise cursor.corrupt(f"{key} is {value!r:.80}, expected a count")
        if name == "block_count":
            n_layer = value


def _claimed_count(cursor: _Cursor, what: str, *, smallest: int) -> int:
    count = cursor.unpack("Q", what)
    if count * smallest > cursor.size:
        raise cursor.corrupt(f"the {what} {count} cannot fit in this file")
    return count


def _read_value(cursor: _Cursor, key: str) -> Callable[[], GGUFValue]:
    """Step over one value and return a function that gives it; only arrays are decoded late."""
    kind = cursor.enum(GGUFValueType, f"metadata key {key!r}")
    if kind == GGUFValueType.STRING:
        value = GGUFValue(cursor.string(key), kind)
    elif kind == GGUFValueType.ARRAY:
        return _read_array(cursor, key)
    else:
        value = GGUFValue(cursor.unpack(_SCALARS[kind], key), kind)
    return lambda: value


def _read_array(cursor: _Cursor, key: str) -> Callable[[], GGUFValue]:
    kind = cursor.enum(GGUFValueType, f"array {key!r}")
    count = cursor.unpack("Q", f"length of array {key!r}")
    if kind == GGUFValueType.ARRAY:
        raise cursor.corrupt(f"array {key!r} holds arrays, which no model file needs")
    if kind != GGUFValueType.STRING:
        raw = cursor.take(count * struct.calcsize("<" + _SCALARS[kind]), f"array {key!r}")
        dtype = np.dtype(_SCALARS[kind].replace("?", "b1")).newbyteorder("<")
        return lambda: GGUFValue(np.frombuffer(raw, dtype).tolist(), GGUFValueType.ARRAY, kind)
    start = cursor.at
    _skip_strings(cursor, key, count)
    raw = cursor.data[start : cursor.at]
    return lambda: GGUFValue(_split_strings(raw), GGUFValueType.ARRAY, kind)


def _skip_strings(cursor: _Cursor, key: str, count: int) -> None:
    """Step over `count` strings. A tokenizer has hundreds of thousands, so this loop calls nothing else."""
    at, last, data, read_length = cursor.at, cursor.size - 8, cursor.data, struct.Struct("<Q").unpack_from
    for _ in range(count):
        if at > last:
            raise cursor.corrupt(f"array {key!r} claims {count} strings, which do not fit in the file")
        at += 8 + read_length(data, at)[0]
    if at > cursor.size:
        raise cursor.corrupt(f"array {key!r} runs past the end of the file")
    cursor.at = at


def _split_strings(raw: bytes) -> list[str | bytes]:
    """Strings of an array whose bounds were checked. Bytes that are no UTF-8 stay bytes, so that they round-trip."""
    strings: list[str | bytes] = []
    at = 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        piece = raw[at + 8 : at + 8 + length]
        try:
            strings.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            strings.append(piece)
        at += 8 + length
    return strings


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    """One row of the tensor table; its offset still counts from the start of the data."""
    name = cursor.string("a tensor name")
    n_dims = cursor.unpack("I", f"tensor {name!r}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise cursor.corrupt(f"tensor {name!r} has {n_dims} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.unpack("Q", f"tensor {name!r}") for _ in range(n_dims))[::-1]
    type = cursor.enum(GGMLQuantizationType, f"tensor {name!r}")
    offset = cursor.unpack("Q", f"tensor {name!r}")
    block, block_bytes = GGML_QUANT_SIZES[type]
    if shape[-1] % block or 0 in shape:
        raise cursor.corrupt(f"tensor {name!r} has shape {shape}, which {type.name} (blocks of {block}) cannot have")
    return TensorInfo(name, shape, type, offset, prod(shape) // block * block_bytes)


def _placed(cursor: _Cursor, info: TensorInfo, start: int) -> TensorInfo:
    offset = start + info.offset
    if offset + info.nbytes > cursor.size:
        raise cursor.corrupt(
            f"tensor {info.name!r} should end at byte {offset + info.nbytes}, the file ends at {cursor.size}"
        )
    return TensorInfo(info.name, info.shape, info.type, offset, info.nbytes)


def _check_overlaps(cursor: _Cursor, tensors) -> None:
    ordered = sorted(tensors, key=lambda info: info.offset)
    for first, second in pairwise(ordered):
        if first.offset + first.nbytes > second.offset:
            raise cursor.corrupt(f"tensors {first.name!r} and {second.name!r} overlap")
