"""What llama.cpp's own converter wrote for tiny models and for the demo base, kept in fixtures/converter.

`write_source` writes the Hugging Face folder that was converted, `converter_fixture` returns what came out of it:
every key with its type and value, and of every tensor the type, the shape and a hash of the bytes.
scripts/make_converter_fixtures makes the fixtures, from the table `SOURCES`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValue, GGUFValueType

import tiny_models
from moegguf import demo
from moegguf.tensor import Metadata

FOLDER = tiny_models.FIXTURES / "converter"
DEMO_BASE = demo.folder("base")
OUTTYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class SourceModel:
    """How a tiny model is written, and the pre-tokenizer that the converter is told."""

    seed: int
    dtype: str
    shards: int = 1
    pre: str = "default"


SOURCES = {
    "llama3_like": SourceModel(seed=1, dtype="bf16", shards=2, pre="llama-bpe"),
    "mistral_like": SourceModel(seed=2, dtype="f16"),
    "mistral_v1": SourceModel(seed=3, dtype="f32"),
    "tied": SourceModel(seed=4, dtype="f32", pre="qwen2"),
    "sentencepiece": SourceModel(seed=5, dtype="bf16"),
    "yarn": SourceModel(seed=6, dtype="f16", shards=3, pre="tekken"),
}
DEMO, DEMO_PRE = "demo", "qwen2"
MODELS = (*SOURCES, DEMO)


@dataclass(frozen=True)
class ConvertedTensor:
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest dimension first."""
    sha256: str


@dataclass(frozen=True)
class Converted:
    """A GGUF file of the converter: all its keys, and all its tensors by name."""

    metadata: Metadata
    tensors: dict[str, ConvertedTensor]


def write_source(folder: Path, model: str) -> Path:
    """Writes what was converted to the fixtures of `model` into folder/model (the demo base stays where it is)."""
    if model == DEMO:
        return DEMO_BASE
    source = SOURCES[model]
    return tiny_models.write_model(folder / model, model, seed=source.seed, dtype=source.dtype, shards=source.shards)


def converter_fixture(model: str, outtype: str) -> Converted:
    """What the converter makes of `model` (one of MODELS) at `outtype` (one of OUTTYPES)."""
    fixture = json.loads((FOLDER / f"{model}.json").read_text("utf-8"))
    metadata = {key: _value(*typed) for key, typed in (fixture["metadata"] | fixture[outtype]["metadata"]).items()}
    tensors = {
        name: ConvertedTensor(GGMLQuantizationType[type], tuple(shape), sha256)
        for name, (type, shape, sha256) in fixture[outtype]["tensors"].items()
    }
    return Converted(metadata, tensors)


def stored(metadata: Metadata) -> Metadata:
    """The metadata as a reader finds it: numbers in the precision of their type, and every array with its item type."""
    return {key: _stored(value) for key, value in metadata.items()}


def read_converted(path: Path) -> Converted:
    """The keys, the tensor types and shapes, and the hashes of the tensors' bytes of a GGUF file."""
    reader = GGUFReader(path)
    metadata = {
        name: GGUFValue(field.contents(), *field.types[:2])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: ConvertedTensor(
            tensor.tensor_type,
            tuple(int(n) for n in reversed(tensor.shape)),
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        )
        for tensor in reader.tensors
    }
    return Converted(metadata, tensors)


def write_fixture(model: str, converted: dict[str, Converted], made_with: dict[str, str]) -> None:
    """Writes the fixture of `model` from outtype → what came out; keys that are alike in all are written once."""
    first, *others = converted.values()
    common = {
        key: value for key, value in first.metadata.items() if all(other.metadata.get(key) == value for other in others)
    }
    fixture = {"made_with": made_with, "metadata": _typed(common)}
    for outtype, file in converted.items():
        own = {key: value for key, value in file.metadata.items() if key not in common}
        tensors = {name: (tensor.type.name, tensor.shape, tensor.sha256) for name, tensor in file.tensors.items()}
        fixture[outtype] = {"metadata": _typed(own), "tensors": tensors}
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(fixture, ensure_ascii=False, separators=(",", ":")).replace('],"', '],\n"')
    (FOLDER / f"{model}.json").write_text(lines + "\n", encoding="utf-8")


def _typed(metadata: Metadata) -> dict[str, tuple]:
    return {
        key: (value.value, value.type.name, *([value.sub_type.name] if value.sub_type is not None else []))
        for key, value in metadata.items()
    }


def _value(value: object, *types: str) -> GGUFValue:
    return GGUFValue(value, *(GGUFValueType[type] for type in types))


def _stored(value: GGUFValue) -> GGUFValue:
    if value.type == GGUFValueType.ARRAY:
        item = value.sub_type if value.sub_type is not None else GGUFValueType.get_type(value.value[0])
        return GGUFValue([_in_precision(entry, item) for entry in value.value], value.type, item)
    return GGUFValue(_in_precision(value.value, value.type), value.type)


def _in_precision(value: object, type: GGUFValueType) -> object:
    return float(np.float32(value)) if type == GGUFValueType.FLOAT32 else value
