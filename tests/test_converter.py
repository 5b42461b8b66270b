"""A build of one expert must equal what llama.cpp's own converter makes of the same folder (see converter_fixtures)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf import GGUFValue

from conftest import build_dense, read_tensors
from converter_fixtures import MODELS, OUTTYPES, ConvertedTensor, converter_fixture, stored, write_source
from moegguf.gguf_header import read_header


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return lambda model: write_source(folder, model)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_one_expert_has_the_tensors_and_keys_that_the_converter_writes(
    model: str, outtype: str, source, tmp_path: Path
):
    expected = converter_fixture(model, outtype)
    path = build_dense(tmp_path / "mix.gguf", source(model), quant=outtype.upper())
    tensors = {
        name: ConvertedTensor(tensor.type, tensor.shape, hashlib.sha256(tensor.data).hexdigest())
        for name, tensor in read_tensors(path).items()
    }
    assert tensors == expected.tensors
    expected_keys = {key: value for key, value in stored(expected.metadata).items() if is_compared(key)}
    assert typed_keys(path) == expected_keys


def is_compared(key: str) -> bool:
    """All keys of the architecture and the tokenizer, and those of `general.*` that a runtime acts on."""
    return key.startswith(("llama.", "tokenizer.")) or key in ("general.architecture", "general.file_type")


def typed_keys(path: Path) -> dict[str, GGUFValue]:
    header = read_header(path)
    return {key: header.value(key) for key in header.fields if is_compared(key)}
