"""GGUF sources of architectures that moegguf knows nothing of: the fused layout holds them all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValue

from conftest import CLOSE, build_dense, build_mix, distance, logits, read_tensors
from moegguf.cli import main
from moegguf.layouts.form import copy
from moegguf.sources.gguf_file import open_gguf
from moegguf.tensor import Planned, Source, Tensor, constant
from moegguf.writer import header_bytes, write_gguf

ARCHITECTURES = {
    "qwen2": (),
    "gemma": (),
    "gemma2": ("post_attention_norm", "post_ffw_norm"),
    "qwen3": ("attn_q_norm", "attn_k_norm"),
}
"""Architecture of llama.cpp → the norms that it has and `llama` has not."""


def as_architecture(path: Path, arch: str, output: Path) -> Path:
    """The model of a `llama` GGUF as one of another architecture: same weights, another graph."""
    source = open_gguf(path, str(path), path.name)
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in source.metadata.items()}
    metadata["general.architecture"] = GGUFValue(arch, source.metadata["general.architecture"].type)
    metadata |= source.read_vocab()
    tensors = [*source.tensors.values(), *extra_norms(source, ARCHITECTURES[arch])]
    planned = [Planned(copy(tensor), tensor.type) for tensor in tensors]
    write_gguf(output, header_bytes(arch, metadata, planned), planned, 1, lambda n_bytes: None)
    return output


def extra_norms(source: Source, roles: tuple[str, ...]) -> list[Tensor]:
    widths = {role: int(source.hparam("embedding_length")) for role in roles}
    widths |= {role: int(source.hparam("attention.key_length")) for role in roles if role.startswith("attn_")}
    random = np.random.RandomState(0)
    return [
        constant(f"blk.{layer}.{role}.weight", 1 + 0.1 * random.standard_normal(widths[role]))
        for layer in range(source.n_layer)
        for role in roles
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request, family, tmp_path_factory) -> list[Path]:
    """A base and an expert of one architecture, as F32 GGUF files."""
    folder = tmp_path_factory.mktemp(request.param)
    llama = family("tied", attention_bias=False)
    sources = [llama.base, llama.experts[0]]
    dense = [build_dense(folder / f"llama{i}.gguf", source) for i, source in enumerate(sources)]
    return [as_architecture(path, request.param, folder / f"{request.param}{i}.gguf") for i, path in enumerate(dense)]


def test_three_copies_fused_are_the_dense_model_in_any_gated_architecture(models, tmp_path):
    base = models[0]
    fused = build_mix(tmp_path / "mix.gguf", base, [base] * 3, layout="fused")
    assert distance(logits(fused), logits(base)) < CLOSE


def test_a_fused_mix_of_another_architecture_holds_both_experts(models, tmp_path):
    base, expert = models
    fused = build_mix(tmp_path / "mix.gguf", base, [base, expert], layout="fused")
    parts = [read_tensors(path) for path in models]
    gate = [part["blk.0.ffn_gate.weight"].values for part in parts]
    down = [part["blk.0.ffn_down.weight"].values for part in parts]
    stored = read_tensors(fused)
    assert np.array_equal(stored["blk.0.ffn_gate.weight"].values, np.concatenate(gate))
    assert np.array_equal(stored["blk.0.ffn_down.weight"].values, np.concatenate(down, axis=1) / 2)
    assert distance(logits(fused), logits(base)) > 10 * CLOSE


def test_an_architecture_without_a_stock_moe_graph_is_refused_for_the_other_layouts(models, tmp_path, capsys):
    base, expert = models
    for layout in ("mixtral", "shared"):
        argv = ["build", "--base", str(base), "--expert", f"a={base}", "--expert", f"b={expert}", "--layout", layout]
        assert main([*argv, "-o", str(tmp_path / "mix.gguf")]) == 2
        assert "use router gateless with layout fused" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
