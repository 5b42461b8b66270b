"""The oracle of the presets is llama.cpp's own quantiser: for the same file, type and imatrix it must choose the
same type for every tensor, and our quantiser must give the same bytes.

Tensors have two or three rows, which is all that a choice needs; `llama_model_quantize` loads hyperparameters
only, so neither a vocabulary nor tensors that form a working graph are required.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType

from moegguf.errors import UserError
from moegguf.quant import ggml, presets
from moegguf.quant.presets import ModelFacts, Preset


@dataclass(frozen=True)
class Model:
    """A file's worth of small tensors: `widths` are its row lengths (hidden, FFN)."""

    facts: ModelFacts
    is_tied: bool = False
    shared_expert: bool = False
    widths: tuple[int, int] = (256, 256)
    is_bf16: bool = False
    only_values: bool = False
    """Leave out all but the attn_v of 16 layers."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, ffn = self.widths
        if self.only_values:
            return {f"blk.{i}.attn_v.weight": (2, hidden) for i in range(16)}
        stack = (self.facts.n_expert,) if self.facts.n_expert else ()
        suffix = "_exps" if stack else ""
        shapes = {"token_embd.weight": (3, hidden), "output_norm.weight": (hidden,), "rope_freqs.weight": (16,)}
        if not self.is_tied:
            shapes["output.weight"] = (3, hidden)
        for i in range(self.facts.n_layer):
            block = {
                "attn_norm.weight": (hidden,),
                "attn_q.weight": (2, hidden),
                "attn_k.weight": (2, hidden),
                "attn_v.weight": (2, hidden),
                "attn_v.bias": (2,),
                "attn_output.weight": (2, hidden),
                f"ffn_gate{suffix}.weight": (*stack, 2, hidden),
                f"ffn_up{suffix}.weight": (*stack, 2, hidden),
                f"ffn_down{suffix}.weight": (*stack, 2, ffn),
            }
            if stack:
                block["ffn_gate_inp.weight"] = (*stack, hidden)
            if self.shared_expert:
                block |= {f"ffn_{p}_shexp.weight": (2, ffn if p == "down" else hidden) for p in ("gate", "up", "down")}
            shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        return shapes

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """float32 values that the file's 16-bit type holds exactly."""
        rng = np.random.default_rng(1)
        type = Type.BF16 if self.is_bf16 else Type.F16

        def values(shape: tuple[int, ...]) -> np.ndarray:
            rows = rng.standard_normal((int(np.prod(shape[:-1])), shape[-1]), dtype=np.float32)
            return ggml.dequantise(type, ggml.quantise(type, rows), shape[-1]).reshape(shape)

        return {name: values(shape) for name, shape in self.shapes.items()}

    @cached_property
    def imatrix(self) -> dict[str, np.ndarray]:
        """float32 (n_expert or 1, n_cols) of every matrix but the embedding, which llama.cpp never measures."""
        rng = np.random.default_rng(2)
        return {
            name: rng.random((shape[0] if len(shape) == 3 else 1, shape[-1]), dtype=np.float32) + 0.1
            for name, shape in self.shapes.items()
            if len(shape) > 1 and name != "token_embd.weight"
        }

    def types(self, preset: str, *, has_imatrix: bool) -> dict[str, Type]:
        return presets.tensor_types(presets.preset(preset), self.shapes, self.facts, has_imatrix=has_imatrix)

    def write(self, path: Path) -> Path:
        facts = self.facts
        writer = GGUFWriter(path, facts.arch)
        writer.add_context_length(64)
        writer.add_embedding_length(self.widths[0])
        writer.add_block_count(facts.n_layer)
        writer.add_feed_forward_length(self.widths[1])
        writer.add_head_count(facts.n_head)
        writer.add_head_count_kv(facts.n_head_kv)
        writer.add_layer_norm_eps(1e-5)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_logit_scale(1.0)
        if facts.n_expert:
            writer.add_expert_count(facts.n_expert)
            writer.add_expert_used_count(facts.n_expert)
        preset = "BF16" if self.is_bf16 else "F16"
        for name, type in self.types(preset, has_imatrix=False).items():
            values = self.tensors[name]
            rows = ggml.quantise(type, values.reshape(-1, values.shape[-1]))
            writer.add_tensor(name, rows, (*values.shape[:-1], rows.shape[-1]), raw_dtype=type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def llama(n_expert: int = 0, *, n_layer: int = 8, gqa: int = 1, **rest) -> Model:
    return Model(ModelFacts("llama", n_layer, 8, 8 // gqa, n_expert), **rest)


MODELS = {
    "dense": llama(n_layer=16, gqa=2),
    "dense, tied, gqa 4, bf16": llama(gqa=4, is_tied=True, is_bf16=True),
    "2 experts, tied": llama(2, n_layer=16, is_tied=True),
    "4 experts, 10 layers": llama(4, n_layer=10),
    "8 experts": llama(8),
    "granitemoe": Model(ModelFacts("granitemoe", 8, 8, 4, 3), shared_expert=True),
    "granitemoe, 1 routed": Model(ModelFacts("granitemoe", 8, 8, 2, 1), is_tied=True, shared_expert=True),
    "rows of 160 and 288": llama(2, widths=(160, 288)),
    "rows of 96 and 72, tied": llama(widths=(96, 72), is_tied=True),
    "rows of 128 and 40, 8 experts": llama(8, widths=(128, 40)),
    "70b": llama(n_layer=80, gqa=8, only_values=True),
    "80 layers, gqa 2": llama(n_layer=80, gqa=2, only_values=True),
    "80 layers without gqa": llama(n_layer=80, only_values=True),
    **{
        f"{arch} of 80 layers": Model(ModelFacts(arch, 80, 8, 2), only_values=True)
        for arch in ("llama-embed", "qwen2", "qwen3", "olmo", "deci")
    },
}

WITHOUT_IMATRIX = ("dense", "2 experts, tied", "granitemoe, 1 routed", "rows of 96 and 72, tied")
"""Models that are also quantised without an imatrix; it matters to few rules."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("presets")
    return {label: model.write(folder / f"{i}.gguf") for i, (label, model) in enumerate(MODELS.items())}


def llama_quantise(source: Path, target: Path, file_type: LlamaFileType, imatrix: dict[str, np.ndarray] | None) -> bool:
    """Whether llama_model_quantize wrote `target`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(file_type)
    if imatrix is not None:
        rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for row, (name, values) in zip(rows, imatrix.items(), strict=False):
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
    return llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)) == 0


def our_bytes(model: Model, name: str, type: Type, imatrix: dict[str, np.ndarray] | None) -> bytes:
    values = model.tensors[name]
    slices = values.reshape(-1, *values.shape[-2:]) if values.ndim > 1 else values.reshape(1, 1, -1)
    weights = imatrix[name] if imatrix and name in imatrix else [None] * len(slices)
    return b"".join(ggml.quantise(type, rows, row).tobytes() for rows, row in zip(slices, weights, strict=True))


@pytest.mark.parametrize("label", MODELS)
def test_types_and_bytes_equal_llama_cpps_for_every_preset(label: str, files, tmp_path):
    for name in presets.preset_names():
        check_against_llama_cpp(MODELS[label], files[label], presets.preset(name), MODELS[label].imatrix, tmp_path)


@pytest.mark.parametrize("label", WITHOUT_IMATRIX)
def test_types_and_bytes_equal_llama_cpps_without_an_imatrix(label: str, files, tmp_path):
    for name in presets.preset_names():
        check_against_llama_cpp(MODELS[label], files[label], presets.preset(name), None, tmp_path)


def check_against_llama_cpp(model: Model, source: Path, preset: Preset, imatrix, folder: Path) -> None:
    target = folder / f"{preset.name}.gguf"
    written = llama_quantise(source, target, preset.file_type, imatrix)
    try:
        types = model.types(preset.name, has_imatrix=imatrix is not None)
    except UserError:
        assert not written, f"{preset.name}: llama.cpp has a type where we have none"
        return
    if imatrix is None and any(presets.requires_imatrix(name, type, preset) for name, type in types.items()):
        assert not written, f"{preset.name}: llama.cpp needs no imatrix where we ask for one"
        return
    assert written, f"{preset.name}: llama.cpp refuses what we accept"
    reader = GGUFReader(target)
    assert {tensor.name: tensor.tensor_type for tensor in reader.tensors} == types, preset.name
    assert reader.get_field("general.file_type").contents() == preset.file_type
    for tensor in reader.tensors:
        expected = our_bytes(model, tensor.name, tensor.tensor_type, imatrix)
        assert tensor.data.tobytes() == expected, f"{preset.name}: {tensor.name} as {tensor.tensor_type.name}"


def test_float_presets_leave_vectors_norms_and_routers_in_f32():
    shapes = {
        "token_embd.weight": (3, 256),
        "blk.0.attn_q.weight": (2, 256),
        "blk.0.attn_q.bias": (2, 256),
        "blk.0.attn_q_norm.weight": (2, 256),
        "blk.0.ffn_gate_inp.weight": (2, 256),
        "blk.0.attn_norm.weight": (256,),
        "rope_freqs.weight": (32,),
    }
    types = presets.tensor_types(presets.preset("bf16"), shapes, ModelFacts("llama", 1, 4, 4))
    matrices = {"token_embd.weight", "blk.0.attn_q.weight"}
    assert types == {name: Type.BF16 if name in matrices else Type.F32 for name in shapes}


def test_types_do_not_depend_on_the_order_in_which_tensors_are_given():
    model = MODELS["granitemoe"]
    backwards = dict(reversed(model.shapes.items()))
    assert list(presets.tensor_types(presets.preset("Q3_K_M"), backwards, model.facts).items()) == list(
        model.types("Q3_K_M", has_imatrix=False).items()
    )


@pytest.mark.parametrize(
    ("alias", "name"),
    [("Q3_K", "Q3_K_M"), ("q4_k", "Q4_K_M"), ("Q5_K", "Q5_K_M"), ("mxfp4", "MXFP4_MOE"), ("iq2_xxs", "IQ2_XXS")],
)
def test_presets_are_known_by_llama_cpps_names_in_any_case(alias: str, name: str):
    assert presets.preset(alias).name == name


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'Q9_Z'.*Q4_K_M"):
        presets.preset("Q9_Z")


def test_types_are_known_by_ggmls_names_in_any_case():
    assert presets.parse_type("q4_k") is Type.Q4_K


@pytest.mark.parametrize("name", ["Q4_K_M", "I32", "F64", "Q8_1"])
def test_a_type_that_cannot_be_quantised_to_is_an_error_that_lists_those_that_can(name: str):
    with pytest.raises(UserError, match=f"'{name}'.*Q4_K, "):
        presets.parse_type(name)


def test_a_type_without_a_fallback_is_an_error_for_odd_rows():
    with pytest.raises(UserError, match=r"rows of 160 weights cannot be Q1_0.*128"):
        presets.fallback(Type.Q1_0, 160)
