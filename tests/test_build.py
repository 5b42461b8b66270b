"""A build puts every weight where it belongs, says of itself what it is, and gives the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_VERSION, GGUFValue, GGUFValueType, LlamaFileType

import tiny_models
from conftest import Family, build_dense, build_mix, make_recipe, read_metadata, read_tensors, rewrite
from moegguf import __version__
from moegguf.assembly import build, plan_build
from moegguf.edit.finished import read_mix
from moegguf.edit.keys import plan_set
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.metadata import Card, ExpertCard, read_card
from moegguf.runtime.model import open_model
from moegguf.runtime.run_options import RunOptions

LAYOUTS = ("mixtral", "fused", "shared")
N_MANY = 11
"""More than ten experts and layers: e1 must not be taken for e10, nor layer 1 for layer 10."""
MANY_SHARES = (0.05, 0.15, 0.1, 0.1, 0.05, 0.05, 0.1, 0.1, 0.1, 0.05, 0.15)
THREE_SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def deep(family) -> Family:
    return family("tied", "f32", num_hidden_layers=N_MANY, hidden_size=32, intermediate_size=32)


def weighted(experts, shares) -> list[dict]:
    return [{"source": expert, "weight": share} for expert, share in zip(experts, shares, strict=True)]


def hf_weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: values for name, (_, values) in tiny_models.read_safetensors(folder / "model.safetensors").items()}


def ffn(weights: Mapping[str, np.ndarray], layer: int) -> tuple[np.ndarray, ...]:
    """gate, up, down."""
    return tuple(weights[f"model.layers.{layer}.mlp.{role}_proj.weight"] for role in ("gate", "up", "down"))


def test_every_slot_of_a_stack_holds_its_own_expert(deep: Family, tmp_path: Path):
    order = [0, 1, 2, 1, 0, 2, 2, 0, 1, 1, 2]
    mix = build_mix(tmp_path / "mix.gguf", deep.base, weighted([deep.experts[i] for i in order], MANY_SHARES))
    tensors = read_tensors(mix)
    weights = [hf_weights(folder) for folder in deep.experts]
    for layer in range(N_MANY):
        stacks = [tensors[f"blk.{layer}.ffn_{role}_exps.weight"].values for role in ("gate", "up", "down")]
        for slot, (i, share) in enumerate(zip(order, MANY_SHARES, strict=True)):
            gate, up, down = ffn(weights[i], layer)
            assert np.array_equal(stacks[0][slot], gate)
            assert np.array_equal(stacks[1][slot], up)
            assert np.array_equal(stacks[2][slot], down * np.float32(N_MANY * share))


def test_a_fused_ffn_holds_the_rows_of_all_experts_and_their_scaled_columns(deep: Family, tmp_path: Path):
    experts = weighted(deep.experts, THREE_SHARES)
    tensors = read_tensors(build_mix(tmp_path / "mix.gguf", deep.base, experts, layout="fused"))
    weights = [hf_weights(folder) for folder in deep.experts]
    for layer in range(N_MANY):
        gates, ups, downs = zip(*(ffn(each, layer) for each in weights), strict=True)
        scaled = [down * np.float32(share) for down, share in zip(downs, THREE_SHARES, strict=True)]
        assert np.array_equal(tensors[f"blk.{layer}.ffn_gate.weight"].values, np.concatenate(gates))
        assert np.array_equal(tensors[f"blk.{layer}.ffn_up.weight"].values, np.concatenate(ups))
        assert np.array_equal(tensors[f"blk.{layer}.ffn_down.weight"].values, np.concatenate(scaled, axis=1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trunk_is_the_bases_and_only_the_bases(layout: str, family, tmp_path: Path):
    """An expert with other attention, norms and embeddings gives its FFNs and nothing else."""
    models = family("llama3_like")
    stranger = tiny_models.write_model(tmp_path / "stranger", "llama3_like", seed=99)
    dense = read_tensors(build_dense(tmp_path / "base.gguf", models.base))
    mix = read_tensors(build_mix(tmp_path / "mix.gguf", models.base, [stranger] * 2, layout=layout))
    trunk = {name: tensor for name, tensor in dense.items() if not re.search(r"ffn_(gate|up|down)", name)}
    assert {name: tensor for name, tensor in mix.items() if name in trunk} == trunk


def test_experts_may_have_another_vocabulary(family, tmp_path: Path):
    """FFNs never see a token: fine-tunes with added tokens fit, and the base's vocabulary stays."""
    models = family("tied")
    larger = tiny_models.write_model(tmp_path / "larger", "tied", seed=5, vocab_size=400)
    mix = build_mix(tmp_path / "mix.gguf", models.base, [models.experts[0], larger])
    assert read_tensors(mix)["token_embd.weight"].shape == (392, 64)
    assert read_header(mix).get("llama.vocab_size") == len(read_header(mix).get("tokenizer.ggml.tokens")) == 392


def routers(path: Path) -> list[np.ndarray]:
    return [tensor.values for name, tensor in read_tensors(path).items() if name.endswith("ffn_gate_inp.weight")]


@pytest.mark.parametrize(("layout", "n_routed"), [("mixtral", 3), ("shared", 1)])
def test_a_gateless_router_is_zero(layout: str, n_routed: int, family, tmp_path: Path):
    models = family("tied")
    rows = routers(build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout=layout))
    assert [row.shape for row in rows] == [(n_routed, 64)] * 2
    assert not np.any(rows)


def test_a_noisy_router_is_the_frozen_stream_of_its_seed_and_layer(family, tmp_path: Path):
    """In float32, whatever the quant."""
    models = family("tied")
    router = {"mode": "noisy", "k": 2, "std": 0.5, "seed": 123}
    rows = routers(build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=router, quant="Q8_0"))
    assert len(rows) == 2
    for layer, row in enumerate(rows):
        noise = np.random.RandomState([123, layer]).standard_normal((3, 64)) * 0.5
        assert np.array_equal(row, noise.astype(np.float32))


def test_the_noise_of_a_seed_never_changes(family, tmp_path: Path):
    """These are the first numbers, and the hash of all, of two layers of three experts with std 0.02 and seed 0."""
    models = family("tied")
    rows = routers(build_mix(tmp_path / "mix.gguf", models.base, models.experts, router={"mode": "noisy"}))
    assert [row[0, :2].tolist() for row in rows] == [
        [-0.00725180609151721, -0.008319495245814323],
        [-0.004019822459667921, -0.018932368606328964],
    ]
    digest = hashlib.sha256(np.stack(rows).tobytes()).hexdigest()
    assert digest == "31c078130065005431f3a94ad2077c45abd4da7aea9e5738fed60fa92a45c9f4"


@pytest.mark.parametrize("recipe", [{"quant": "Q4_K_M"}, {"layout": "fused"}, {"router": "noisy"}], ids=str)
def test_the_same_recipe_gives_the_same_bytes(recipe: dict, family, tmp_path: Path, monkeypatch):
    """With other threads, in another folder, from copies of the sources, in a process with another hash seed."""
    models = family("mistral_like")
    first = build_mix(tmp_path / "mix.gguf", models.base, models.experts, threads=1, **recipe)
    shutil.copytree(models.base.parent, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = [word for i, path in enumerate(models.experts) for word in ("--expert", f"e{i}={path.name}")]
    flags += [word for key, value in ({"quant": "F32"} | recipe).items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "moegguf", "build", "--base", models.base.name, *flags, "-o", "mix.gguf"]
    environment = os.environ | {"PYTHONHASHSEED": "17"}
    subprocess.run([*command, "--threads", "5"], check=True, env=environment, capture_output=True)
    assert Path("mix.gguf").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("shards", [2, 5])
def test_sharded_and_single_safetensors_give_the_same_tensors(shards: int, family, tmp_path: Path):
    sharded = tiny_models.write_model(tmp_path / "base", "tied", shards=shards)
    assert len(list(sharded.glob("*.safetensors"))) == shards
    single = build_dense(tmp_path / "single.gguf", family("tied").base)
    assert read_tensors(build_dense(tmp_path / "sharded.gguf", sharded)) == read_tensors(single)


RECIPES = {
    "gateless": {},
    "weights": {"weights": THREE_SHARES, "quant": "Q8_0", "layout": "fused"},
    "noisy": {"router": {"mode": "noisy", "k": 2, "std": 0.1, "seed": 2**32 - 1}, "quant": "Q4_K_M"},
    "always on": {"router": {"mode": "noisy", "k": 3, "seed": 5}, "always_on": "e1"},
    "two precisions": {"quants": ("F16", "Q8_0", "F16"), "quant": "Q8_0"},
}


@pytest.mark.parametrize("label", RECIPES)
def test_the_card_of_a_mix_is_its_recipe(label: str, family, tmp_path: Path):
    models, table = family("tied"), dict(RECIPES[label])
    columns = {"weight": table.pop("weights", None), "quant": table.pop("quants", None)}
    experts = [
        {"source": path} | {key: values[i] for key, values in columns.items() if values}
        for i, path in enumerate(models.experts)
    ]
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, experts, **table)
    header = read_header(build(plan_build(recipe)).plan.path)
    is_noisy = recipe.router.mode == "noisy"
    assert read_card(header) == Card(
        name="mix",
        tool_version=__version__,
        layout=recipe.layout,
        router=recipe.router.mode,
        k=recipe.router.k,
        base="base",
        quant=recipe.quant.preset,
        experts=tuple(
            ExpertCard(spec.name, Path(spec.source).name, float(np.float32(spec.weight)), spec.quant)
            for spec in recipe.experts
        ),
        std=float(np.float32(recipe.router.std)) if is_noisy else None,
        seed=recipe.router.seed if is_noisy else None,
        always_on=table.get("always_on"),
    )


def test_a_file_that_is_no_mix_has_no_card(family, tmp_path: Path):
    mix = build_dense(tmp_path / "mix.gguf", family("tied").base)
    other = rewrite(mix, tmp_path / "other.gguf", keep=lambda key: not key.startswith("moegguf."))
    assert read_card(read_header(mix)) is not None
    assert read_card(read_header(other)) is None


GRANITE_SCALES = {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0, "attention.scale": 0.25}
"""All that old versions of llama.cpp ask for; a head has 16 numbers."""
NOISY_3 = {"router": {"mode": "noisy", "k": 3}}
ARCHITECTURES = {
    "mixtral": ({}, "llama", {"expert_count": 3, "expert_used_count": 3, "feed_forward_length": 96}),
    "noisy": ({"router": "noisy"}, "llama", {"expert_count": 3, "expert_used_count": 2}),
    "fused": ({"layout": "fused"}, "llama", {"feed_forward_length": 288, "expert_count": None}),
    "shared": (
        {"layout": "shared"},
        "granitemoe",
        {"expert_count": 1, "expert_used_count": 1, "expert_shared_feed_forward_length": 192} | GRANITE_SCALES,
    ),
    "always on": (
        NOISY_3 | {"always_on": "e0"},
        "granitemoe",
        {"expert_count": 2, "expert_used_count": 2, "expert_shared_feed_forward_length": 96} | GRANITE_SCALES,
    ),
}


@pytest.mark.parametrize("label", ARCHITECTURES)
def test_the_keys_of_the_architecture_say_what_the_graph_computes(label: str, family, tmp_path: Path):
    table, arch, keys = ARCHITECTURES[label]
    models = family("tied")
    header = read_header(build_mix(tmp_path / "mix.gguf", models.base, models.experts, **table))
    assert header.get("general.architecture") == arch
    assert {key: header.get(f"{arch}.{key}") for key in keys} == keys
    assert header.get(f"{arch}.embedding_length") == 64
    assert not [key for key in header.fields if key.split(".")[0] in {"llama", "granitemoe"} - {arch}]


def test_the_general_keys_name_the_mix_its_parents_and_its_form(family, tmp_path: Path):
    models = family("llama3_like")
    table = {"quant": "Q4_K_M", "description": "three of a kind", "license": "mit"}
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, **table)
    general = read_metadata(mix, "general.")
    names = {f"general.base_model.{i}.name": path.name for i, path in enumerate((models.base, *models.experts))}
    assert general == names | {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "mix",
        "general.description": "three of a kind",
        "general.license": "mit",
        "general.size_label": "3x1.4M",
        "general.tags": general["general.tags"],
        "general.base_model.count": 4,
        "general.file_type": LlamaFileType.MOSTLY_Q4_K_M,
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    assert {"moe", "moegguf"} <= set(general["general.tags"])


def test_a_name_that_llama_cpp_would_fail_on_is_refused_by_builds_and_changes(family, tmp_path: Path):
    models = family("llama3_like")
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts)
    misnamed = {"general.name": GGUFValue("my-Phi-3-mix", GGUFValueType.STRING)}
    with pytest.raises(UserError, match="unordered_map::at"):
        open_model(rewrite(mix, tmp_path / "misnamed.gguf", keys=misnamed), RunOptions(threads=1))
    recipe = replace(make_recipe(tmp_path / "other.gguf", models.base, models.experts), name="my-Phi-3-mix")
    with pytest.raises(UserError, match="takes that for a Phi 3, whose tokens </s>, <s>, <unk>"):
        plan_build(recipe)
    with pytest.raises(UserError, match="takes that for a Phi 3"):
        plan_set(read_mix(mix), {"general.name": "phi3"})


def test_what_a_source_said_of_itself_as_a_mix_is_not_said_of_the_new_one(family, tmp_path: Path):
    """Ollama 0.24 renames moegguf.* to llama.moegguf.* when it quantises a file."""
    models = family("tied")
    dense = build_dense(tmp_path / "dense.gguf", models.base)
    old = {key: read_header(dense).value(key) for key in read_header(dense).fields if key.startswith("moegguf.")}
    renamed = rewrite(
        dense,
        tmp_path / "renamed.gguf",
        keys={f"llama.{key}": value for key, value in old.items()},
        keep=lambda key: key not in old,
    )
    mix = build_mix(tmp_path / "mix.gguf", renamed, [renamed, models.experts[0]])
    assert old
    assert not [key for key in read_header(mix).fields if key.startswith("llama.moegguf.")]


def test_no_path_of_this_machine_is_written_into_a_mix(family, tmp_path: Path):
    """A published mix must not tell where its author keeps things."""
    models = family("tied")
    content = build_mix(tmp_path / "mix.gguf", models.base, models.experts).read_bytes()
    assert str(models.base.parent).encode() not in content
    assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_reads_no_weights_and_knows_the_size_to_the_byte(layout: str, family, tmp_path: Path):
    models, target = family("mistral_like"), tmp_path / "mix.gguf"
    poisoned = [poison(shutil.copytree(path, tmp_path / path.name)) for path in models.experts]
    plan = plan_build(make_recipe(target, models.base, poisoned, quant="Q4_K_M", layout=layout))
    assert not target.exists()
    mix = build_mix(target, models.base, models.experts, quant="Q4_K_M", layout=layout)
    assert plan.n_bytes == mix.stat().st_size


def poison(folder: Path) -> Path:
    """Turn all weights into NaN, so that whoever reads them stops."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    return folder
