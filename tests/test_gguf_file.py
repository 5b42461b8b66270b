"""GGUF files as sources: they give what the folders they came from give, and quantised blocks go through unharmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValue, GGUFValueType

import tiny_models
from conftest import (
    CLOSE,
    Family,
    build_dense,
    build_mix,
    build_report,
    distance,
    logits,
    read_metadata,
    read_tensors,
    rewrite,
)
from moegguf.errors import UserError

ROLES = ("gate", "up", "down")
COPIED = ("Q8_0", "Q4_K", "Q6_K")


def as_gguf(models: Family, folder: Path, quant: object) -> Family:
    """The same family, every model a dense GGUF file."""
    base, *experts = (
        build_dense(folder / f"{model.name}.gguf", model, quant=quant) for model in (models.base, *models.experts)
    )
    return Family(base, tuple(experts))


@pytest.mark.parametrize(
    ("kind", "dtype", "quant"),
    [
        ("llama3_like", "bf16", "BF16"),
        ("mistral_like", "f16", "F16"),
        ("tied", "bf16", "F32"),
        ("tied", "f32", "F32"),
        ("yarn", "f16", "F32"),
    ],
)
def test_files_give_the_same_mix_as_the_folders_they_came_from(
    kind: str, dtype: str, quant: str, family, tmp_path: Path
):
    folders = family(kind, dtype)
    files = as_gguf(folders, tmp_path, quant)
    for layout, target_quant in (("mixtral", "Q4_K_M"), ("fused", "F16"), ("shared", "Q8_0")):
        table = {"layout": layout, "quant": target_quant}
        from_folders = build_mix(tmp_path / f"{layout}-from-folders.gguf", folders.base, folders.experts, **table)
        from_files = build_mix(tmp_path / f"{layout}-from-files.gguf", files.base, files.experts, **table)
        assert read_tensors(from_files) == read_tensors(from_folders)
        keys = ("llama.", "granitemoe.", "tokenizer.")
        assert read_metadata(from_files, *keys) == read_metadata(from_folders, *keys)


def test_a_folder_and_files_mix_with_each_other(family, tmp_path: Path):
    folders = family("llama3_like")
    files = as_gguf(folders, tmp_path, "BF16")
    mixed = build_mix(tmp_path / "mixed.gguf", files.base, [folders.experts[0], files.experts[1]], quant="Q4_K_M")
    plain = build_mix(tmp_path / "plain.gguf", folders.base, folders.experts[:2], quant="Q4_K_M")
    assert read_tensors(mixed) == read_tensors(plain)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """`quantised(type)`: a family whose FFNs are of that type, all else F32.

    Weights are larger than usual, so that every block scale is a normal f16 number even after a factor of 1/4.
    """
    folder = tmp_path_factory.mktemp("quantised")
    base = tiny_models.write_model(folder / "base", "llama3_like", seed=3, dtype="f32")
    models = Family(base, tuple(tiny_models.write_expert(folder / f"e{i}", base, i) for i in (1, 2, 3)))
    for model in (base, *models.experts):
        path = model / "model.safetensors"
        tensors = tiny_models.read_safetensors(path)
        large = {name: (dtype, values * np.float32(32)) for name, (dtype, values) in tensors.items() if ".mlp." in name}
        tiny_models.write_safetensors(path, tensors | large)

    def write(type: str) -> Family:
        subfolder = folder / type
        if not subfolder.exists():
            subfolder.mkdir()
            as_gguf(models, subfolder, only_ffn(type))
        return Family(subfolder / "base.gguf", tuple(subfolder / f"e{i}.gguf" for i in (1, 2, 3)))

    return write


def only_ffn(type: str) -> dict:
    return {"preset": "F32", "experts": type}


@pytest.mark.parametrize("type", COPIED)
def test_a_stack_of_quantised_experts_is_their_bytes_one_after_the_other(type: str, quantised, tmp_path: Path):
    models = quantised(type)
    built = build_report(tmp_path / "mix.gguf", models.base, models.experts, quant=only_ffn(type))
    assert built.requantised.n_weights == 0
    mix, experts = read_tensors(built.plan.path), [read_tensors(path) for path in models.experts]
    for layer in (0, 1):
        for role in ROLES:
            stack = mix[f"blk.{layer}.ffn_{role}_exps.weight"]
            assert stack.type is Type[type]
            assert stack.data == b"".join(expert[f"blk.{layer}.ffn_{role}.weight"].data for expert in experts)


@pytest.mark.parametrize("type", COPIED)
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3)], ids=str)
def test_fusing_quantised_experts_scales_their_blocks_and_nothing_else(shares, type: str, quantised, tmp_path: Path):
    """Exactly for powers of two, else with one rounding of every f16 scale, 2^-11."""
    models = quantised(type)
    weighted = [{"source": path, "weight": share} for path, share in zip(models.experts, shares, strict=False)]
    built = build_report(tmp_path / "mix.gguf", models.base, weighted, layout="fused", quant=only_ffn(type))
    assert built.requantised.n_weights == 0
    mix, experts = read_tensors(built.plan.path), [read_tensors(item["source"]) for item in weighted]
    for layer in (0, 1):
        for role in ("gate", "up"):
            name = f"blk.{layer}.ffn_{role}.weight"
            assert mix[name].data == b"".join(expert[name].data for expert in experts)
        name = f"blk.{layer}.ffn_down.weight"
        assert mix[name].type is Type[type]
        downs = np.split(mix[name].values, len(experts), axis=1)
        for down, expert, share in zip(downs, experts, shares, strict=True):
            assert_scaled(down, expert[name].values, share, type)


def assert_scaled(found: np.ndarray, values: np.ndarray, factor: float, type: str) -> None:
    if np.log2(factor) % 1 == 0:
        assert np.array_equal(found, values * np.float32(factor))
        return
    assert not np.array_equal(found, values * np.float32(factor))
    blocks = np.abs(values).reshape(-1, 256).max(axis=1, keepdims=True)
    # A Q4_K weight is a difference of two terms, each at most the range of its block, and each with a scale to round.
    bound = 4 * blocks if type == "Q4_K" else np.abs(values).reshape(-1, 256)
    error = np.abs(found - values * np.float32(factor)).reshape(-1, 256)
    assert (error <= factor * bound * (2.0**-11 + 2.0**-20)).all()


@pytest.mark.parametrize("type", COPIED)
def test_mixes_of_quantised_experts_are_the_same_in_every_layout(type: str, quantised, tmp_path: Path):
    """Powers of two, so that every layout holds the same numbers; what is left is rounding of activations."""
    models = quantised(type)
    table = {"quant": only_ffn(type)}
    shares = (0.5, 0.25, 0.25)
    weighted = [{"source": path, "weight": share} for path, share in zip(models.experts, shares, strict=True)]
    fused, shared = (
        logits(build_mix(tmp_path / f"{layout}.gguf", models.base, weighted, layout=layout, **table))
        for layout in ("fused", "shared")
    )
    other = logits(build_dense(tmp_path / "other.gguf", models.experts[0], quant=only_ffn(type)))
    assert distance(fused, shared) < distance(fused, other) / 10


def test_other_types_are_requantised_and_what_that_cost_is_told(quantised, tmp_path: Path):
    models = quantised("Q6_K")
    built = build_report(tmp_path / "mix.gguf", models.base, models.experts, quant=only_ffn("Q4_K"))
    assert built.requantised.n_weights == 3 * 2 * 3 * 256 * 512
    assert built.requantised.types == {("Q6_K", "Q4_K")}
    mix = read_tensors(built.plan.path)
    error, norm = 0.0, 0.0
    for i, path in enumerate(models.experts):
        expert = read_tensors(path)
        for layer in (0, 1):
            for role in ROLES:
                values = expert[f"blk.{layer}.ffn_{role}.weight"].values.astype(np.float64)
                error += np.square(mix[f"blk.{layer}.ffn_{role}_exps.weight"].values[i] - values).sum()
                norm += np.square(values).sum()
    assert built.requantised.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert 0.01 < built.requantised.relative_error < 0.2


def test_floats_of_another_type_are_no_requantising(family, tmp_path: Path):
    models = family("tied")
    assert build_report(tmp_path / "mix.gguf", models.base, models.experts, quant="Q8_0").requantised.n_weights == 0


@pytest.fixture
def split(family, tmp_path: Path) -> list[Path]:
    whole = build_dense(tmp_path / "whole.gguf", family("tied").base)
    rewrite(whole, tmp_path / "split.gguf", split_max_tensors=5)
    shards = sorted(tmp_path.glob("split-*.gguf"))
    assert len(shards) > 3
    return shards


@pytest.mark.parametrize("named", [0, 1, -1])
def test_any_shard_of_a_split_file_stands_for_the_whole(named: int, split: list[Path], tmp_path: Path):
    whole = tmp_path / "whole.gguf"
    from_shard = build_mix(tmp_path / "a.gguf", split[named], [split[0], whole], quant="Q8_0")
    from_whole = build_mix(tmp_path / "b.gguf", whole, [whole, whole], quant="Q8_0")
    assert read_tensors(from_shard) == read_tensors(from_whole)
    assert read_metadata(from_shard, "llama.", "tokenizer.") == read_metadata(from_whole, "llama.", "tokenizer.")
    assert not read_metadata(from_shard, "split.")


def test_a_missing_shard_is_named(split: list[Path], tmp_path: Path):
    split[2].unlink()
    with pytest.raises(UserError, match=split[2].name):
        build_mix(tmp_path / "mix.gguf", split[0], [split[0]])


@pytest.mark.parametrize("dtype", [np.float64, np.int32], ids=["F64", "I32"])
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_types_that_no_model_needs_are_refused_by_name(name: str, dtype, family, tmp_path: Path):
    """llama.cpp crashes on a float64 tensor at the first token."""
    good = build_dense(tmp_path / "good.gguf", family("tied").base)
    bad = rewrite(good, tmp_path / "bad.gguf", tensors={name: read_tensors(good)[name].values.astype(dtype)})
    with pytest.raises(UserError, match=f"bad.gguf: tensor {name} is {'F64' if dtype is np.float64 else 'I32'}"):
        build_mix(tmp_path / "mix.gguf", good, [good, bad])
    assert not (tmp_path / "mix.gguf").exists()


@pytest.fixture
def biased(family, tmp_path: Path) -> list[Path]:
    """Llama with biases in its FFNs, different ones in each expert."""
    models = family("tied")
    random = np.random.RandomState(1)
    paths = []
    for model in models.experts:
        path = build_dense(tmp_path / f"{model.name}.gguf", model, base=models.base)
        biases = {
            f"blk.{layer}.ffn_{role}.bias": 0.3 * random.standard_normal(rows).astype(np.float32)
            for layer in (0, 1)
            for role, rows in (("gate", 96), ("up", 96), ("down", 64))
        }
        paths.append(rewrite(path, tmp_path / f"biased-{model.name}.gguf", tensors=biases))
    return paths


def test_biases_of_the_ffn_are_fused_too(biased: list[Path], tmp_path: Path):
    dense = [logits(path) for path in biased]
    copies = build_mix(tmp_path / "copies.gguf", biased[0], [biased[1]] * 3, layout="fused")
    assert distance(logits(copies), dense[1]) < CLOSE < distance(dense[0], dense[1])
    shares = (0.5, 0.3, 0.2)
    mix = read_tensors(
        build_mix(
            tmp_path / "mix.gguf",
            biased[0],
            [{"source": path, "weight": share} for path, share in zip(biased, shares, strict=True)],
            layout="fused",
        )
    )
    experts = [read_tensors(path) for path in biased]
    up, down = (f"blk.1.ffn_{role}.bias" for role in ("up", "down"))
    assert mix[up].data == b"".join(expert[up].data for expert in experts)
    mean = sum(share * expert[down].values for share, expert in zip(shares, experts, strict=True))
    assert np.allclose(mix[down].values, mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["mixtral", "shared"])
def test_biases_of_the_ffn_are_refused_where_the_graph_has_none(layout: str, biased: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match="biases"):
        build_mix(tmp_path / "mix.gguf", biased[0], biased, layout=layout)


def test_a_flag_that_means_another_thing_in_the_shared_layout_is_left_out(family, tmp_path: Path):
    """Readers of granitemoe in some versions of llama.cpp take it for "no rotary embedding at all"."""
    dense = build_dense(tmp_path / "dense.gguf", family("tied").base)
    key = "rope.scaling.finetuned"
    flag = {f"llama.{key}": GGUFValue(False, GGUFValueType.BOOL)}
    flagged = rewrite(dense, tmp_path / "flagged.gguf", keys=flag)
    kept, left_out = (
        build_mix(tmp_path / f"{layout}.gguf", flagged, [flagged, flagged], layout=layout)
        for layout in ("mixtral", "shared")
    )
    assert read_metadata(kept, f"llama.{key}") == {f"llama.{key}": False}
    assert not read_metadata(left_out, f"granitemoe.{key}")
    assert distance(logits(left_out), logits(dense)) < CLOSE
