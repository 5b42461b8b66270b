"""Neurons in two precisions: the same mix, the groups that importances ask for, budgets that are met and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValue, GGUFValueType

from conftest import CLOSE, Family, build_mix, distance, logits, make_recipe, read_metadata, read_tensors, rewrite
from moegguf.allocation import Survey, allocate, survey
from moegguf.assembly import Plan, build, plan_build, with_split, with_types
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.inspection import check
from moegguf.layouts.shared import split as groups_of_presets
from moegguf.mix import FFN_ROLES
from moegguf.quant import ggml
from moegguf.quant.split import fine_sizes, split_neurons
from moegguf.recipe import Budget, Layout, Splitting
from moegguf.splitting import allocate_split, survey_split
from test_oracle import write_imatrix

KIND, N_FF, N_EMBD, N_LAYER = "tied", 96, 64, 2
WEIGHTS = (0.5, 0.3, 0.2)
BUDGET, N_BYTES = "140kB", 140_000


@pytest.fixture(scope="module")
def tiny(family) -> Family:
    return family(KIND)


@pytest.fixture(scope="module")
def squares() -> list[dict[str, np.ndarray]]:
    """What enters the FFNs of each expert: some neurons put out a hundred times as much as others."""
    random = np.random.RandomState(5)
    return [
        {
            f"blk.{layer}.{role}.weight": random.lognormal(0, 2 if role == "ffn_down" else 0.5, (1, width)).astype("f4")
            for layer in range(N_LAYER)
            for role, width in (("ffn_gate", N_EMBD), ("ffn_up", N_EMBD), ("ffn_down", N_FF))
        }
        for _ in range(3)
    ]


@pytest.fixture(scope="module")
def experts(tiny: Family, squares, tmp_path_factory) -> list[dict[str, object]]:
    """Experts of a recipe with shares and imatrices of their own."""
    folder = tmp_path_factory.mktemp("imatrices")
    return [
        {"source": source, "weight": weight, "imatrix": str(write_imatrix(folder / f"e{i}.gguf", squares[i]))}
        for i, (source, weight) in enumerate(zip(tiny.experts, WEIGHTS, strict=True))
    ]


@pytest.fixture(scope="module")
def f32(tiny: Family, experts, tmp_path_factory) -> Path:
    """The mix in layout mixtral, not split."""
    return build_mix(tmp_path_factory.mktemp("whole") / "mix.gguf", tiny.base, experts)


def plan_of(tiny: Family, experts, path: Path, quant: object = "F32", **table) -> Plan:
    return plan_build(make_recipe(path, tiny.base, experts, quant=quant, **table), overwrite=True)


def split_plan(plan: Plan, by: Splitting = Splitting.NEURONS, n_fine: int = N_FF) -> Plan:
    return with_split(plan, split_neurons(plan.mix.energies, by, n_fine))


def budget_plan(tiny: Family, experts, path: Path, **quant) -> Plan:
    return plan_of(tiny, experts, path, {"budget": BUDGET, **quant}, layout="auto")


@pytest.fixture(scope="module")
def found(tiny: Family, experts, tmp_path_factory) -> Survey:
    """Of a mix that may be split."""
    return survey(budget_plan(tiny, experts, tmp_path_factory.mktemp("survey") / "m.gguf"), threads=1)


# ------------------------------------------------------------------------------------------------ the groups


@pytest.mark.parametrize("by", [Splitting.NEURONS, Splitting.EXPERTS])
def test_a_split_mix_gives_the_logits_of_the_whole(by: Splitting, tiny, experts, f32, tmp_path: Path):
    path = build(split_plan(plan_of(tiny, experts, tmp_path / "m.gguf"), by), threads=1).plan.path
    assert distance(logits(path), logits(f32)) < CLOSE
    assert check(path) == []


def test_a_split_mix_of_super_blocks_gives_the_logits_of_the_whole(family, tmp_path: Path):
    """256 of 1536 neurons: groups of widths that K-quants can have."""
    wide = family("llama3_like")
    random, whole = np.random.RandomState(1), build_mix(tmp_path / "whole.gguf", wide.base, wide.experts)
    energies = {layer: random.uniform(size=(3, 512)) for layer in range(2)}
    plan = with_split(plan_of(wide, wide.experts, tmp_path / "m.gguf"), split_neurons(energies, Splitting.NEURONS, 256))
    assert distance(logits(build(plan, threads=1).plan.path), logits(whole)) < CLOSE
    widths = {tensor.shape[-1] for tensor in plan.planned if "ffn_down_" in tensor.name}
    assert widths == {256, 1280}


def test_the_fine_group_holds_the_neurons_that_put_out_most(tiny, experts, squares, f32, tmp_path: Path):
    stored = read_tensors(build(split_plan(plan_of(tiny, experts, tmp_path / "m.gguf")), threads=1).plan.path)
    whole = read_tensors(f32)
    for layer in range(N_LAYER):
        energies = [w**2 * each[f"blk.{layer}.ffn_down.weight"][0] for w, each in zip(WEIGHTS, squares, strict=True)]
        is_fine = np.argsort(np.argsort(-np.concatenate(energies))) < N_FF
        gates, downs = (whole[f"blk.{layer}.ffn_{role}_exps.weight"].values for role in ("gate", "down"))
        gates, downs = gates.reshape(-1, N_EMBD), np.concatenate(list(downs / 3), axis=1)
        for suffix, is_in in (("shexp", is_fine), ("exps", ~is_fine)):
            gate, down = (stored[f"blk.{layer}.ffn_{role}_{suffix}.weight"].values for role in ("gate", "down"))
            assert np.array_equal(gate.reshape(-1, N_EMBD), gates[is_in])
            np.testing.assert_allclose(down.reshape(N_EMBD, -1), downs[:, is_in], rtol=1e-6)


def test_each_group_has_the_bytes_of_its_neurons_in_its_type(tiny, experts, squares, tmp_path: Path):
    plan = split_plan(plan_of(tiny, experts, tmp_path / "f32.gguf"))
    exact = read_tensors(build(plan, threads=1).plan.path)
    types = {f"blk.{layer}.{role}_{suffix}.weight": type for layer in range(N_LAYER) for role in FFN_ROLES
             for suffix, type in (("shexp", Type.Q8_0), ("exps", Type.IQ4_NL))}  # fmt: skip
    path = build(replace(with_types(plan, types, "x"), path=tmp_path / "m.gguf"), threads=1).plan.path
    stored = read_tensors(path)
    for layer in range(N_LAYER):
        for suffix, neurons in (("shexp", plan.mix.split.fine(layer)), ("exps", plan.mix.split.coarse(layer))):
            name = f"blk.{layer}.ffn_down_{suffix}.weight"
            squared = [each[f"blk.{layer}.ffn_down.weight"][0][some]
                       for each, some in zip(squares, neurons, strict=True)]  # fmt: skip
            rows = exact[name].values.reshape(N_EMBD, -1)
            assert stored[name].data == ggml.quantise(types[name], rows, np.concatenate(squared)).tobytes()


@pytest.mark.parametrize("layout", ["mixtral", "fused"])
def test_an_imatrix_of_the_whole_mix_splits_it_as_those_of_its_experts(layout, tiny, experts, squares, tmp_path: Path):
    own = split_plan(plan_of(tiny, experts, tmp_path / "m.gguf"))
    bare = [{key: value for key, value in expert.items() if key != "imatrix"} for expert in experts]
    of_mix = {}
    for name in squares[0]:
        rows = [each[name] for each in squares]
        stacked = {name.replace(".weight", "_exps.weight"): np.concatenate(rows)}
        fused = {name: np.concatenate(rows, axis=1) if "down" in name else rows[0]}
        of_mix |= stacked if layout == "mixtral" else fused
    of_mix |= {"blk.0.ffn_gate_inp.weight": np.ones((1, N_EMBD), "f4")} if layout == "mixtral" else {}
    imatrix = str(write_imatrix(tmp_path / "mix.imatrix.gguf", of_mix))
    plan = split_plan(plan_of(tiny, bare, tmp_path / "m.gguf", layout="fused", imatrix=imatrix))
    assert plan.mix.split.digest == own.mix.split.digest


@pytest.mark.parametrize(("n", "n_ff", "by", "sizes"), [
    (4, 256, Splitting.NEURONS, [256, 512]),
    (8, 14336, Splitting.NEURONS, [14336, 28672, 57344]),
    (3, 96, Splitting.NEURONS, [32, 64, 128]),
    (1, 256, Splitting.NEURONS, []),
    (4, 256, Splitting.EXPERTS, [256, 512]),
    (1, 14336, Splitting.EXPERTS, []),
])  # fmt: skip
def test_groups_are_whole_blocks_and_neither_is_empty(n: int, n_ff: int, by: Splitting, sizes: list[int]):
    assert fine_sizes(n, n_ff, by) == sizes


# ------------------------------------------------------------------------------------------------- budgets


def test_rows_in_one_type_lose_as_much_in_two_groups_as_in_one(found: Survey):
    """Rows of gate and up are quantised each on its own, so only a share of their loss moves with them."""
    split = survey_split(found, split_neurons(found.plan.mix.energies, Splitting.NEURONS, N_FF), threads=1)
    for layer in range(N_LAYER):
        for role in ("ffn_gate", "ffn_up"):
            whole = found.sensitivities[f"blk.{layer}.{role}.weight"].errors
            fine, others = (split.sensitivities[f"blk.{layer}.{role}_{suffix}.weight"].errors
                            for suffix in ("shexp", "exps"))  # fmt: skip
            for type, error in whole.items():
                assert fine[type] + others[type] == pytest.approx(error, rel=1e-6)
                assert fine[type] > others[type] or not error


def test_a_split_file_is_as_large_as_planned_and_no_better_type_would_fit(found: Survey, tmp_path: Path):
    split = survey_split(found, split_neurons(found.plan.mix.energies, Splitting.NEURONS, 64), threads=1)
    plan = allocate(split, Budget("x", n_bytes=N_BYTES)).plan
    path = build(replace(plan, path=tmp_path / "m.gguf"), threads=1).plan.path
    types = {tensor.name: tensor.type for tensor in plan.planned}
    steps = [
        larger.n_bytes - now.n_bytes
        for name, options in split.options.items()
        for now in options
        if now.type is types[name]
        for larger in options
        if larger.loss < now.loss
    ]
    assert path.stat().st_size == plan.n_bytes
    assert 0 <= N_BYTES - plan.n_bytes < min(steps)
    assert check(path) == []


@pytest.mark.parametrize(("n_bytes", "n_fine"), [(105_000, 0), (N_BYTES, 128)])
def test_the_choice_between_splits_and_none_is_that_of_least_predicted_loss(n_bytes: int, n_fine: int, found: Survey):
    """Near the smallest size the few hundred bytes count that two groups take in the header."""
    limit, energies = Budget("x", n_bytes=n_bytes), found.plan.mix.energies
    losses = {0: allocate(found, limit).loss}
    for n in (32, 64, 128):
        split = survey_split(found, split_neurons(energies, Splitting.NEURONS, n), threads=1)
        losses[n] = allocate(split, limit).loss
    best = allocate_split(found, limit, threads=2)
    assert best.loss == losses[n_fine] == min(losses.values())
    assert (best.plan.card.split.fine if best.plan.card.split else 0) == n_fine


def test_a_split_that_was_asked_for_is_made_even_where_none_is_predicted_to_lose_less(tiny, experts, tmp_path: Path):
    alike = survey(budget_plan(tiny, experts, tmp_path / "m.gguf", split="experts"), threads=1)
    best = allocate_split(alike, Budget("x", n_bytes=N_BYTES), threads=1)
    assert best.plan.card.split.by == "experts"
    assert best.plan.recipe.layout is Layout.SHARED


def test_without_an_importance_a_mix_is_split_only_where_that_was_asked_for(tiny: Family, tmp_path: Path):
    plan = budget_plan(tiny, tiny.experts, tmp_path / "m.gguf")
    assert (plan.recipe.quant.split, plan.recipe.layout) == (Splitting.NONE, Layout.FUSED)
    with pytest.raises(UserError, match=r"no importance matrix says that of all experts; pass --imatrix"):
        budget_plan(tiny, tiny.experts, tmp_path / "m.gguf", split="neurons")


def test_whole_experts_in_the_shared_layout_meet_a_budget_to_the_byte(tiny, experts, tmp_path: Path):
    """The layout as it is without a split: all experts but the last in one group."""
    path = tmp_path / "m.gguf"
    plan = plan_of(tiny, experts, path, {"budget": BUDGET}, layout="shared")
    limited = allocate(survey(plan, threads=1), plan.recipe.quant.budget).plan
    assert build(limited, threads=1).plan.path.stat().st_size == limited.n_bytes <= N_BYTES
    assert limited.card.split is None
    quants = {expert.name: expert.quant for expert in limited.card.experts}
    assert groups_of_presets(quants, None) == (("e0", "e1"), ("e2",))


# --------------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def built(tiny, experts, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A recipes file, the split mix that the command line builds of it, and its plan."""
    folder = tmp_path_factory.mktemp("built")
    recipes, path, plan = folder / "r.toml", folder / "m.gguf", folder / "plan.json"
    tables = ",\n".join(
        f'{{ name = "e{i}", source = "{e["source"]}", weight = {e["weight"]}, imatrix = "{e["imatrix"]}" }}'
        for i, e in enumerate(experts)
    )
    recipes.write_text(f'[mix.m]\nbase = "{tiny.base}"\nexperts = [\n{tables}\n]\n', encoding="utf-8")
    flags = ("--layout", "auto", "--budget", BUDGET, "--save-plan", str(plan), "-o", str(path))
    assert main(["build", "m", "--recipes", str(recipes), "--threads", "1", *flags]) == 0
    return recipes, path, plan


def build_again(recipes: Path, plan: Path, output: Path) -> int:
    flags = ("--recipes", str(recipes), "--plan", str(plan), "-o", str(output), "--threads", "1")
    return main(["build", "m", *flags])


def test_a_saved_plan_gives_the_same_split_file(built, tmp_path: Path):
    recipes, path, plan = built
    assert build_again(recipes, plan, tmp_path / "again.gguf") == 0
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert json.loads(plan.read_text())["split"]["fine"] in fine_sizes(3, N_FF, Splitting.NEURONS)


def test_the_same_mix_and_budget_give_the_same_split_file(built, found: Survey):
    _, path, _ = built
    again = allocate_split(found, Budget(BUDGET, n_bytes=N_BYTES), threads=2).plan
    types = {name: stored.type for name, stored in read_tensors(path).items()}
    assert {tensor.name: tensor.type for tensor in again.planned} == types
    assert read_metadata(path, "moegguf.split.") == {
        key: value.value for key, value in again.card.to_metadata().items() if key.startswith("moegguf.split.")
    }


@pytest.mark.parametrize(("change", "reason"), [
    (lambda split: split.update(digest="0" * 64), "other neurons are fine by this one"),
    (lambda split: split.update(fine=96), "other neurons are fine by this one"),
    (lambda split: split.update(fine=10**9), "other neurons are fine by this one"),
    (lambda split: split.update(fine="64"), "its split lacks by = neurons or experts, a number fine or a digest"),
    (lambda split: split.update(by="layers"), "its split lacks by = neurons or experts"),
    (lambda split: split.pop("digest"), "its split lacks by"),
])  # fmt: skip
def test_a_damaged_split_in_a_plan_is_refused(change, reason: str, built, tmp_path: Path, capsys):
    recipes, _, plan = built
    content = json.loads(plan.read_text())
    change(content["split"])
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert build_again(recipes, tmp_path / "plan.json", tmp_path / "m.gguf") == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "m.gguf").exists()


def test_a_plan_that_splits_is_for_gate_less_mixes_only(built, tiny, experts, tmp_path: Path):
    plan = {"plan": str(built[2])}
    with pytest.raises(UserError, match="splits a gate-less mix of whole FFNs, which this is not"):
        bare = [{"source": expert["source"], "imatrix": expert["imatrix"]} for expert in experts]
        plan_of(tiny, bare, tmp_path / "m.gguf", plan, router={"mode": "noisy", "k": 2})
    with pytest.raises(UserError, match="no importance matrix says that of all experts"):
        plan_of(tiny, tiny.experts, tmp_path / "m.gguf", plan)


# ------------------------------------------------------------------------------------- what is said and refused


def test_a_split_file_says_so(built, capsys):
    assert main(["inspect", str(built[1]), "--check"]) == 0
    said = capsys.readouterr().out
    n_fine = json.loads(built[2].read_text())["split"]["fine"]
    assert f"by neurons: {n_fine} of {3 * N_FF} neurons of each layer in the finer group" in said
    assert "check: sound" in said


@pytest.mark.parametrize(("key", "value", "fault"), [
    ("moegguf.split.fine", 40, "groups have"),
    ("granitemoe.expert_used_count", 0, "0 of 1 stacked experts run"),
])  # fmt: skip
def test_keys_that_contradict_a_split_are_found(key: str, value: int, fault: str, tiny, experts, tmp_path: Path):
    path = build(split_plan(plan_of(tiny, experts, tmp_path / "m.gguf")), threads=1).plan.path
    damaged = rewrite(path, tmp_path / "d.gguf", keys={key: GGUFValue(value, GGUFValueType.UINT32)})
    assert any(fault in found for found in check(damaged))


@pytest.mark.parametrize("command", [
    ("swap", "FILE", "e0=SOURCE", "-o", "OUT"),
    ("drop", "FILE", "e0", "-o", "OUT"),
    ("prune", "FILE", "--drop", "e0", "-o", "OUT"),
    ("route", "set", "FILE", "--router", "noisy"),
], ids=" ".join)  # fmt: skip
def test_a_split_file_cannot_be_changed_by_the_expert(command, built, tiny, tmp_path: Path, capsys):
    before = built[1].read_bytes()
    words = {"FILE": str(built[1]), "OUT": str(tmp_path / "o.gguf"), "e0=SOURCE": f"e0={tiny.experts[1]}"}
    assert main([words.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(built[1]) in error
    assert built[1].read_bytes() == before and not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize(("table", "reason"), [
    ({"router": {"mode": "noisy", "k": 2}}, "only with router gateless"),
    ({"layout": "fused"}, "only with layout shared or auto"),
    ({"layout": "mixtral"}, "only with layout shared or auto"),
    ({"mix": "fine-grained"}, "only with a mix of whole FFNs in all layers that is not compact"),
    ({"layers": [0]}, "only with a mix of whole FFNs in all layers"),
    ({"quant": {"preset": "Q4_K_M", "split": "neurons"}}, "only with a budget"),
    ({"quant": {"budget": "1MB", "split": "auto"}, "layout": "shared"}, "only with layout auto"),
    ({"quant": {"budget": "1MB", "split": "halves"}}, "allowed auto, neurons, experts, none"),
], ids=str)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_what_can(table: dict, reason: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"quant\.split: found") as error:
        make_recipe(tmp_path / "m.gguf", Path("b"), [Path("e")], **{"quant": {"bpw": 4, "split": "neurons"}, **table})
    assert reason in str(error.value)


def test_an_architecture_without_two_groups_is_named(tiny: Family, tmp_path: Path):
    llama = build_mix(tmp_path / "dense.gguf", tiny.base, tiny.experts[:1], layout="fused")
    other = rewrite(llama, tmp_path / "q.gguf", arch="qwen2")
    with pytest.raises(UserError, match=r"architecture 'qwen2' has no stock MoE graph for layout shared"):
        budget_plan(Family(other, ()), [other, other], tmp_path / "m.gguf", split="neurons")
