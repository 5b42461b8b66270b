"""A GGUF file, whole or split into shards, as a Source. Quantised tensors stay as they are."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np

from moegguf.errors import UserError
from moegguf.gguf_header import Header, TensorInfo, read_header
from moegguf.sources.blob import Blob, LocalFile
from moegguf.tensor import Metadata, Source, Tensor

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NOT_OF_THE_MODEL = ("split.", "tokenizer.")


def open_gguf(path: Path, ref: str, label: str) -> Source:
    """The model in `path` (any shard of a split one). Raises UserError when a file is missing or damaged."""
    headers = [read_header(shard) for shard in _shards(path)]
    first = headers[0]
    if "general.architecture" not in first.fields:
        raise UserError(f"{path}: has no general.architecture", "use a GGUF that holds a whole model")
    tensors: dict[str, Tensor] = {}
    for header in headers:
        blob = LocalFile(header.path)
        for info in header.tensors.values():
            if info.name in tensors:
                raise UserError(f"{header.path}: tensor {info.name} is in another shard too", "download it again")
            tensors[info.name] = _tensor(blob, info)
    expected = first.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise UserError(f"{path}: its shards hold {len(tensors)} tensors, expected {expected}", "download it again")
    return Source(
        ref=ref,
        label=label,
        metadata=_select(first, lambda key: not key.startswith(_NOT_OF_THE_MODEL)),
        tensors=tensors,
        read_vocab=lambda: _select(first, lambda key: key.startswith("tokenizer.")),
        files=tuple(header.path for header in headers),
    )


def _shards(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{path}: shard {', '.join(missing)} is missing", f"put all {count} shards into one folder")
    return shards


def _select(header: Header, wanted) -> Metadata:
    return {key: header.value(key) for key in header.fields if wanted(key)}


def _tensor(blob: Blob, info: TensorInfo) -> Tensor:
    row = info.nbytes // prod(info.shape[:-1])

    def read_rows(start: int, stop: int) -> np.ndarray:
        return blob.read(info.offset + start * row, (stop - start) * row).reshape(stop - start, row)

    return Tensor(info.name, info.shape, info.type, read_rows, f"{blob.name}: {info.name}")

