"""Leaving experts out of a finished mix: the same file as a build without them, and the right ones to leave out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import CLOSE, build_mix, distance, logits, read_metadata, read_tensors
from moegguf.cli import main
from moegguf.edit import read_mix
from moegguf.inspection import check
from moegguf.prune import plan_prune, write_pruned
from moegguf.quant.ggml import dequantise
from moegguf.runtime import tap as taps
from moegguf.runtime.model import RunOptions, open_model
from moegguf.saliency import rank

NOISY = {"mode": "noisy", "k": 2, "seed": 7}
VARYING = ("general.name", "moegguf.name", "moegguf.spare")
TOKENS = [tuple(range(3 + i, 40 + i)) for i in range(4)]


def pruned(mix: Path, *drop: str) -> Path:
    output = mix.with_name(f"{mix.stem}-pruned.gguf")
    write_pruned(plan_prune(read_mix(mix), drop, output), output)
    return output


def named(family, names: str, **table) -> list[dict]:
    """The experts of a family by their own names, whichever take part."""
    return [{"name": f"e{i}", "source": family.experts[int(i)], **table} for i in names]


@pytest.mark.parametrize(
    ("kind", "table", "drop"),
    [
        ("mistral_like", {}, "1"),
        ("llama3_like", {"quant": "Q4_K_M"}, "0"),
        ("llama3_like", {"quant": "Q8_0"}, "02"),
        ("tied", {"router": NOISY}, "2"),
        ("tied", {"router": NOISY | {"k": 3}}, "2"),
        ("mistral_like", {"router": NOISY, "always_on": "e1"}, "2"),
    ],
)
def test_pruning_is_a_build_without_that_expert_to_the_byte(kind: str, table, drop: str, family, tmp_path: Path):
    models = family(kind)
    mix = build_mix(tmp_path / "mix.gguf", models.base, named(models, "012"), **table)
    left = "".join(name for name in "012" if name not in drop)
    if "router" in table:
        table = table | {"router": table["router"] | {"k": min(table["router"]["k"], len(left))}}
    fresh = build_mix(tmp_path / "fresh.gguf", models.base, named(models, left), **table)
    found = pruned(mix, *(f"e{name}" for name in drop))
    assert read_tensors(found) == read_tensors(fresh)
    assert list(read_tensors(found)) == list(read_tensors(fresh))
    metadata, expected = (
        {key: value for key, value in read_metadata(path).items() if key not in VARYING} for path in (found, fresh)
    )
    assert metadata == expected
    assert check(found) == []
    assert distance(logits(found), logits(fresh)) < CLOSE


def test_a_router_keeps_the_rows_of_the_experts_that_stay(family, tmp_path: Path):
    """Noise without a row in the middle is no noise of that seed any more, so the file vouches for its numbers."""
    models = family("tied")
    mix = build_mix(tmp_path / "mix.gguf", models.base, named(models, "012"), router=NOISY)
    found = pruned(mix, "e1")
    for name, tensor in read_tensors(mix).items():
        if name.endswith("ffn_gate_inp.weight"):
            assert np.array_equal(read_tensors(found)[name].values, tensor.values[[0, 2]])
    assert check(found) == []
    card = read_mix(found).card
    assert card.describe_router() == "trained: 2 of 2 experts, noise std 0.02, seed 7, without the rows of e1"
    assert pruned(found, "e0").is_file()
    assert read_mix(found.with_name("mix-pruned-pruned.gguf")).card.k == 1


def test_the_router_of_a_pruned_mix_can_be_set_and_set_back(family, tmp_path: Path):
    models = family("tied")
    found = pruned(build_mix(tmp_path / "mix.gguf", models.base, named(models, "012"), router=NOISY), "e1")
    before = found.read_bytes()
    assert main(["route", "set", str(found), "--router", "noisy:3"]) == 0
    assert check(found) == []
    assert main(["route", "set", str(found), "--undo"]) == 0
    assert found.read_bytes() == before


@pytest.mark.parametrize("table", [{}, {"router": NOISY}, {"router": NOISY, "always_on": "e1"}])
def test_saliency_is_weight_times_length_of_output_over_the_tokens_that_reach_an_expert(table, family, tmp_path: Path):
    """Recomputed from the swiglu product, the weights of the router and the down projections in the file."""
    mix = build_mix(tmp_path / "mix.gguf", family("tied").base, named(family("tied"), "012"), **table)
    stored, routed = read_tensors(mix), [name for name in ("e0", "e1", "e2") if name != table.get("always_on")]
    shares = np.zeros((2, len(routed)))
    nodes = (taps.MOE_TOPK, taps.MOE_WEIGHTS, taps.MOE_SWIGLU)
    with open_model(mix, RunOptions(ctx=64, threads=1)) as model, taps.Tap(model, nodes) as tap:
        for layer in range(2):
            norms: dict[int, list[float]] = {i: [] for i in range(len(routed))}
            for tapped in tap.run(TOKENS):
                topk, weights, products = (tapped.values[node, layer] for node in nodes)
                down = stored[f"blk.{layer}.ffn_down_exps.weight"]
                values = dequantise(down.type, down.rows, down.shape[-1]).reshape(down.shape)
                for experts, some, product in zip(topk, weights, products.reshape(*topk.shape, -1), strict=True):
                    for expert, weight, h in zip(experts, some, product, strict=True):
                        norms[expert].append(weight * np.linalg.norm(values[expert] @ h))
            means = np.array([np.mean(some) if some else 0 for some in norms.values()])
            shares[layer] = means / means.sum()
    ranks = rank(read_mix(mix), TOKENS, threads=1, progress=lambda n: None)
    assert [one.expert for one in ranks] == [routed[i] for i in np.argsort(-shares.mean(axis=0))]
    assert {one.expert: one.score for one in ranks} == pytest.approx(
        dict(zip(routed, shares.mean(axis=0), strict=True)), rel=1e-3
    )


def test_keep_drops_what_matters_least_and_says_what_that_costs(tmp_path: Path, capsys):
    mix, output = tmp_path / "mix.gguf", tmp_path / "out.gguf"
    assert main(["build", "demo", "--threads", "1", "-o", str(mix)]) == 0
    capsys.readouterr()
    flags = ["--keep", "2", "--text", "math=demo:math#12", "demo:clinic#12", "--threads", "1", "-o", str(output)]
    assert main(["prune", str(mix), *flags]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.strip().endswith(("kept", "dropped"))]
    verdicts = {row[0]: row[-1] for row in rows}
    assert len(verdicts) == 4
    assert sorted(verdicts.values()) == ["dropped", "dropped", "kept", "kept"]
    left = [expert.name for expert in read_mix(output).card.experts]
    assert left == [name for name in ("base", "math", "clinic", "strings") if verdicts[name] == "kept"]
    assert "math" in left
    assert "cost: KLD 0." in said
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["mix.gguf", "out.gguf"]


@pytest.fixture(scope="module")
def gateless(family, tmp_path_factory) -> Path:
    return build_mix(tmp_path_factory.mktemp("mix") / "mix.gguf", family("tied").base, named(family("tied"), "012"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--drop", "e7"], "has no expert 'e7', only e0, e1, e2; name one of these"),
        (["--drop", "e0", "--drop", "e1", "--drop", "e2"], "no expert would be left of e0, e1, e2"),
        (["--keep", "3", "--text", "demo:math"], "--keep 3: expected 1 to 2"),
        (["--keep", "0", "--text", "demo:math"], "--keep 0: expected 1 to 2"),
        (["--keep", "2"], "--keep 2: takes text to rank experts by; pass --text FILE or --domains RECIPE"),
        (["--keep", "2", "--text", "demo:math#1"], "single chunk"),
        (["--keep", "2", "--text", "nothing.txt"], "nothing.txt: cannot be read"),
        (["--drop", "e0", "--keep", "2"], "not allowed with argument"),
        ([], "one of the arguments --drop --keep is required"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(flags, says: str, gateless: Path, tmp_path: Path, capsys):
    assert main(["prune", str(gateless), *flags, "-o", str(tmp_path / "out.gguf")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "weights", "drop", "says"),
    [
        ({}, (0.5, 0.3, 0.2), "e0", "its experts have weights, which are folded into them"),
        ({"layout": "shared"}, (None,) * 3, "e0", "layout shared has folded the number of experts into its weights"),
        ({"layout": "fused"}, (None,) * 3, "e0", "has no router in it: layout fused"),
        ({"router": NOISY, "always_on": "e0"}, (None,) * 3, "e0", "e0 is always on, so it cannot be dropped"),
        ({"router": NOISY | {"k": 3}, "always_on": "e0"}, (None,) * 3, "e1", "k is 3 by its weights, 2 experts would"),
    ],
)
def test_what_is_folded_into_the_weights_is_refused(
    table, weights, drop: str, says: str, family, tmp_path: Path, capsys
):
    models = family("tied")
    experts = [expert | ({"weight": weight} if weight else {})
               for expert, weight in zip(named(models, "012"), weights, strict=True)]  # fmt: skip
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, **table)
    assert main(["prune", str(mix), "--drop", drop, "-o", str(tmp_path / "out.gguf")]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mix.gguf"]


def test_the_mix_itself_and_other_files_are_not_overwritten(gateless: Path, tmp_path: Path, capsys):
    assert main(["prune", str(gateless), "--drop", "e0", "--force", "-o", str(gateless)]) == 2
    assert "is the mix itself" in capsys.readouterr().err
    other = tmp_path / "other.gguf"
    other.write_bytes(b"something")
    assert main(["prune", str(gateless), "--drop", "e0", "-o", str(other)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert other.read_bytes() == b"something"
