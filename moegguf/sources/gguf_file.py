"""A GGUF file, whole or split into shards, as a Source. Quantised tensors stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from moegguf.errors import UserError
from moegguf.gguf_header import Header, TensorInfo, read_header, shards
from moegguf.quant import ggml
from moegguf.sources.blob import Blob, LocalFile
from moegguf.tensor import Metadata, Source, Tensor

_NOT_OF_THE_MODEL = ("split.", "tokenizer.")


def open_gguf(path: Path, ref: str, label: str) -> Source:
    """The model in `path` (any shard of a split one). Raises UserError when a file is missing or damaged."""
    headers = [read_header(shard) for shard in shards(path)]
    _check_numbers(headers)
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
        read_vocab=lambda: _vocab(first, tensors),
        files=tuple(header.path for header in headers),
    )


def _check_numbers(headers: Sequence[Header]) -> None:
    """Shards say which of how many they are."""
    for i, header in enumerate(headers):
        number, count = header.get("split.no", i), header.get("split.count", len(headers))
        if len(headers) > 1 and (number, count) != (i, len(headers)):
            message = f"is shard {number + 1} of {count} by its keys, {i + 1} of {len(headers)} by its name"
            raise UserError(f"{header.path}: {message}", "give it its own name, or download it again")


def _select(header: Header, wanted) -> Metadata:
    return {key: header.value(key) for key in header.fields if wanted(key)}


def _vocab(header: Header, tensors: Mapping[str, Tensor]) -> Metadata:
    """The tokenizer's keys. llama.cpp loads no model whose tokens and embedding rows differ in number."""
    tokens, embedding = header.get("tokenizer.ggml.tokens"), tensors.get("token_embd.weight")
    if not isinstance(tokens, list) or embedding is None or len(tokens) != embedding.n_rows:
        n_tokens, n_rows = len(tokens) if isinstance(tokens, list) else 0, embedding.n_rows if embedding else 0
        raise UserError(
            f"{header.path}: its tokenizer has {n_tokens} tokens, expected one for each of {n_rows} embedding rows",
            "use a GGUF that holds a whole model as the base",
        )
    return _select(header, lambda key: key.startswith("tokenizer."))


def _tensor(blob: Blob, info: TensorInfo) -> Tensor:
    if info.type not in ggml.supported_types():
        raise UserError(
            f"{blob.name}: tensor {info.name} is {info.type.name}, which ggml cannot read back",
            "use another GGUF of the model",
        )
    row = info.nbytes // prod(info.shape[:-1])

    def read_rows(start: int, stop: int) -> np.ndarray:
        return blob.read(info.offset + start * row, (stop - start) * row).reshape(stop - start, row)

    return Tensor(info.name, info.shape, info.type, read_rows, f"{blob.name}: {info.name}")
