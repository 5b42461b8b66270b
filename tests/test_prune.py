"""Leaving experts out of a finished mix: the same file as a build without them, and the right ones to leave out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moegguf
from conftest import build_mix, read_tensors
from moegguf.cli import main
from moegguf.edit.change import write_copy
from moegguf.edit.experts import plan_drop
from moegguf.edit.finished import read_mix
from moegguf.inspection import check
from moegguf.jobs.saliency import rank
from moegguf.quant.ggml import dequantise
from moegguf.runtime import tap as taps
from moegguf.runtime.model import RunOptions, open_model

NOISY = {"mode": "noisy", "k": 2, "seed": 7}
TOKENS = [tuple(range(3 + i, 40 + i)) for i in range(4)]


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
        ("tied", {"router": NOISY | {"k": 3}}, "1"),
        ("mistral_like", {"router": NOISY, "always_on": "e1"}, "2"),
        ("tied", {"layout": "fused"}, "0"),
    ],
)
def test_naming_what_to_leave_out_is_what_drop_does(kind: str, table, drop: str, family, tmp_path: Path, capsys):
    models = family(kind)
    mix = build_mix(tmp_path / "mix.gguf", models.base, named(models, "012"), **table)
    names, output = [f"e{name}" for name in drop], tmp_path / "out.gguf"
    assert main(["prune", str(mix), *(f"--drop={name}" for name in names), "-o", str(output)]) == 0
    assert f"without {', '.join(names)}, " in capsys.readouterr().out
    write_copy(plan_drop(read_mix(mix), names), tmp_path / "expected.gguf")
    assert output.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert check(output) == []


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


def test_json_is_one_document_with_the_ranking_and_the_cost(gateless: Path, tmp_path: Path, capsys):
    flags = ["--keep", "2", "--text", "math=demo:math#4", "--max-tokens", "64", "--threads", "1", "--json"]
    assert main(["prune", str(gateless), *flags, "-o", str(tmp_path / "out.gguf")]) == 0
    found = json.loads(capsys.readouterr().out)
    ranked, left = [one["expert"] for one in found["ranking"]], [expert["name"] for expert in found["experts"]]
    assert found["dropped"] == ranked[2:]
    assert sorted(left) == sorted(ranked[:2])
    assert found["cost"]["kld"]["mean"] > 0
    same = {"keep": 2, "text": {"math": "demo:math#4"}, "max_tokens": 64, "threads": 1}
    pruned = moegguf.prune(gateless, output=tmp_path / "same.gguf", **same)
    assert pruned.made.path.read_bytes() == (tmp_path / "out.gguf").read_bytes()
    assert [one.expert for one in pruned.ranking] == ranked
    assert pruned.cost.as_json() == found["cost"]


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


@pytest.mark.parametrize("layout", ["fused", "shared"])
def test_experts_that_the_graph_does_not_tell_apart_are_not_ranked(layout: str, family, tmp_path: Path, capsys):
    models = family("tied")
    mix = build_mix(tmp_path / "mix.gguf", models.base, named(models, "012"), layout=layout)
    flags = ["--keep", "2", "--text", "demo:math", "-o", str(tmp_path / "out.gguf")]
    assert main(["prune", str(mix), *flags]) == 2
    assert f"layout {layout} does not tell its experts apart" in capsys.readouterr().err


def test_the_mix_itself_and_other_files_are_not_overwritten(gateless: Path, tmp_path: Path, capsys):
    assert main(["prune", str(gateless), "--drop", "e0", "--force", "-o", str(gateless)]) == 2
    assert "is the file itself" in capsys.readouterr().err
    other = tmp_path / "other.gguf"
    other.write_bytes(b"something")
    assert main(["prune", str(gateless), "--drop", "e0", "-o", str(other)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert other.read_bytes() == b"something"
