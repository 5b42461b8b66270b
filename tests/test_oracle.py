"""One pass must give what two give: a build straight to a preset equals `llama_model_quantize` on a 16-bit or
32-bit build of the same mix, in every type and every byte.

Where a factor is folded into down (1/N in fused, N·a_e in shared) it is a power of two or the intermediate file is
F32; otherwise the intermediate would round what one pass never stores.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from conftest import Stored, build_dense, build_mix, make_recipe, read_metadata, read_tensors
from moegguf.assembly import plan_build
from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.quant.presets import preset, preset_names

NEEDS_IMATRIX = {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
FEW = ("F16", "BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE", "Q3_K_L")
SMALL = {"intermediate_size": 256, "num_hidden_layers": 1}
ODD = {"intermediate_size": 96, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Case:
    """A mix of `n` experts whose sources are in `dtype`, the type of its intermediate file, and what to make of it."""

    kind: str
    dtype: str
    n: int
    intermediate: str
    recipe: dict
    config: dict
    presets: tuple[str, ...] = FEW


ALL = preset_names()
CASES = {
    "mixtral of 2": Case("llama3_like", "bf16", 2, "BF16", {"layout": "mixtral"}, SMALL, ALL),
    "mixtral of 8": Case("tied", "f16", 8, "F16", {"layout": "mixtral"}, SMALL, ALL),
    "mixtral of 8, noisy": Case("tied", "f32", 8, "F32", {"router": {"mode": "noisy"}}, ODD),
    "mixtral of 3, odd rows": Case("mistral_like", "f16", 3, "F16", {"layout": "mixtral"}, ODD, ALL),
    "mixtral of 3, unequal": Case("tied", "f32", 3, "F32", {"weights": (0.5, 0.3, 0.2)}, SMALL),
    "fused of 2, odd rows": Case("mistral_like", "bf16", 2, "BF16", {"layout": "fused"}, ODD),
    "fused of 3": Case("tied", "f32", 3, "F32", {"layout": "fused"}, SMALL),
    "shared of 2": Case("tied", "bf16", 2, "BF16", {"layout": "shared"}, SMALL),
    "shared of 3, odd rows": Case("mistral_like", "f32", 3, "F32", {"layout": "shared"}, ODD),
    "always on": Case("tied", "bf16", 3, "BF16", {"router": {"mode": "noisy", "k": 2}, "always_on": "e0"}, SMALL),
}


Imatrix = Mapping[str, np.ndarray]
"""Tensor name → float32 (n_matrices, n_cols), the mean square of every input column."""


def llama_quantise(source: Path, target: Path, name: str, imatrix: Imatrix = MappingProxyType({})) -> bool:
    """Whether llama_model_quantize wrote `target`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(preset(name).file_type)
    if imatrix:
        rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # a row without a name is the end
        for row, (tensor, values) in zip(rows, imatrix.items(), strict=False):
            row.name, row.size = tensor.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
    return llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)) == 0


@pytest.mark.parametrize("label", CASES)
def test_one_pass_equals_an_intermediate_file_and_llama_model_quantize(label: str, family, tmp_path: Path):
    case = CASES[label]
    models = family(case.kind, case.dtype, **case.config)
    recipe = dict(case.recipe)
    shares = [{"weight": share} for share in recipe.pop("weights", ())] or [{}] * case.n
    experts = [{"source": models.experts[i % 3]} | share for i, share in enumerate(shares)]
    intermediate = build_mix(tmp_path / "mix.gguf", models.base, experts, quant=case.intermediate, **recipe)
    for name in case.presets:
        direct, oracle = tmp_path / f"direct-{name}.gguf", tmp_path / f"oracle-{name}.gguf"
        try:
            build_mix(direct, models.base, experts, quant=name, **recipe)
        except UserError:
            assert not llama_quantise(intermediate, oracle, name), f"{name}: llama.cpp can, we cannot"
            assert not direct.exists()
            continue
        assert llama_quantise(intermediate, oracle, name), f"{name}: we can, llama.cpp cannot"
        assert_same_tensors(direct, oracle, name)
        assert read_metadata(direct, "general.file_type") == read_metadata(oracle, "general.file_type"), name


def assert_same_tensors(direct: Path, oracle: Path, name: str) -> None:
    """llama.cpp writes no trailing dimensions of 1 (in its order), hence `squeeze`."""
    ours, theirs = read_tensors(direct), read_tensors(oracle)
    assert {key: tensor.type for key, tensor in ours.items()} == {key: tensor.type for key, tensor in theirs.items()}
    for key, tensor in ours.items():
        assert tensor.data == theirs[key].data, f"{name}: {key} as {tensor.type.name} has other bytes"
        assert squeeze(tensor.shape) == squeeze(theirs[key].shape), f"{name}: {key}"


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length > 1)


@pytest.mark.parametrize("name", ALL)
def test_presets_that_need_an_imatrix_are_refused_and_no_others(name: str, family, tmp_path: Path):
    models = family("llama3_like")
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, models.experts, quant=name)
    if name not in NEEDS_IMATRIX:
        assert plan_build(recipe).bits_per_weight < 33
        return
    with pytest.raises(UserError, match="importance matrix"):
        plan_build(recipe)
    assert list(tmp_path.iterdir()) == []


def test_the_cases_reach_the_fallbacks_and_the_rules_for_8_experts(family, tmp_path: Path):
    """Otherwise the oracle would agree for want of anything to disagree on."""
    odd, many = family("mistral_like", "f16", **ODD), family("tied", "f16", **SMALL)
    three = read_tensors(build_mix(tmp_path / "3.gguf", odd.base, odd.experts, quant="Q4_K_M"))
    eight = read_tensors(build_mix(tmp_path / "8.gguf", many.base, (many.experts * 3)[:8], quant="Q4_K_M"))
    assert three["blk.0.ffn_up_exps.weight"].type is Type.Q5_0  # Q4_K in rows of 128
    assert three["blk.0.attn_output.weight"].type is Type.Q4_K
    assert eight["blk.0.attn_k.weight"].type is Type.Q8_0
    assert eight["blk.0.ffn_down_exps.weight"].type is Type.Q6_K


WITH_IMATRIX = ("Q2_K_S", "Q4_K_M", "Q4_0", "IQ2_XXS", "IQ3_XXS", "IQ4_XS")
N_COUNTED = 4.0


def importances(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """An importance for all that is multiplied with an activation, different in every column and expert."""
    random = np.random.RandomState(0)
    return {
        name: random.uniform(0.1, 2, (tensor.shape[0] if len(tensor.shape) == 3 else 1, tensor.shape[-1])).astype("f4")
        for name, tensor in tensors.items()
        if len(tensor.shape) > 1 and not name.startswith(("token_embd", "rope_freqs"))
    }


def write_imatrix(path: Path, imatrix: Imatrix) -> Path:
    """As llama-imatrix writes it: sums of squares, and how many inputs were summed."""
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 2)
    for name, means in imatrix.items():
        writer.add_tensor(f"{name}.in_sum2", means * np.float32(N_COUNTED))
        writer.add_tensor(f"{name}.counts", np.full((len(means), 1), N_COUNTED, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROW_WIDE = "Q4_0"
"""With an imatrix ggml weighs its errors by the mean square of a row."""


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
def test_an_imatrix_of_the_mix_gives_what_it_gives_llama_model_quantize(layout: str, family, tmp_path: Path):
    """Expert by expert: each slice of a stack has its own."""
    models = family("tied", "f32", **SMALL)
    precise = build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout=layout)
    imatrix = importances(read_tensors(precise))
    file = write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    for name in WITH_IMATRIX if layout == "mixtral" else set(WITH_IMATRIX) - {ROW_WIDE}:
        direct, oracle = tmp_path / f"direct-{name}.gguf", tmp_path / f"oracle-{name}.gguf"
        build_mix(direct, models.base, models.experts, layout=layout, quant=name, imatrix=str(file))
        assert llama_quantise(precise, oracle, name, imatrix), name
        assert_same_tensors(direct, oracle, name)


@pytest.mark.parametrize("layout, role", [("fused", "ffn_down"), ("shared", "ffn_down_shexp")])
def test_experts_that_share_rows_are_quantised_as_if_each_had_rows_of_its_own(layout, role, family, tmp_path: Path):
    models, down = family("tied", "f32", **SMALL), f"blk.0.{role}.weight"
    precise = read_tensors(build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout=layout))
    imatrix = importances(precise)
    file = write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    mix = build_mix(tmp_path / "q.gguf", models.base, models.experts, layout=layout, quant=ROW_WIDE, imatrix=str(file))
    rows = np.frombuffer(precise[down].data, np.float32).reshape(precise[down].shape)
    n_experts = rows.shape[1] // SMALL["intermediate_size"]
    each = zip(np.split(rows, n_experts, axis=1), np.split(imatrix[down][0], n_experts), strict=True)
    apart = [ggml.quantise(Type.Q4_0, np.ascontiguousarray(floats), important) for floats, important in each]
    assert read_tensors(mix)[down].data == np.concatenate(apart, axis=1).tobytes()
    together = ggml.quantise(Type.Q4_0, rows, imatrix[down][0])
    assert read_tensors(mix)[down].data != together.tobytes()


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
def test_an_imatrix_of_the_dense_model_serves_every_expert(layout: str, family, tmp_path: Path):
    """As if it had been measured on the mix, with the same values for all experts."""
    models = family("tied", "f32", **SMALL)
    precise = build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout=layout)
    dense = importances(read_tensors(build_dense(tmp_path / "dense.gguf", models.base)))
    file = write_imatrix(tmp_path / "imatrix.gguf", dense)
    repeated = {
        name: repeat(dense[re.sub("_(exps|shexp)", "", name)], tensor.shape)
        for name, tensor in read_tensors(precise).items()
        if re.sub("_(exps|shexp)", "", name) in dense
    }
    for name in ("IQ3_XXS", "Q4_K_M"):
        direct, oracle = tmp_path / f"direct-{name}.gguf", tmp_path / f"oracle-{name}.gguf"
        build_mix(direct, models.base, models.experts, layout=layout, quant=name, imatrix=str(file))
        assert llama_quantise(precise, oracle, name, repeated), name
        assert_same_tensors(direct, oracle, name)


def repeat(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(1, n_cols) once for every matrix of a stack, and once for every expert that stands side by side in a row."""
    return np.tile(row, (shape[0] if len(shape) == 3 else 1, shape[-1] // row.shape[1]))
