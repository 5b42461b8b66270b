"""Budgets: sizes are kept and used up, choices are the best there are, and better than llama.cpp's presets."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from conftest import Family, make_recipe, read_metadata, read_tensors
from moegguf.allocation import Survey, allocate, expert_errors, precisions, survey
from moegguf.assembly import build, plan_build
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.estimate import Fit, largest_file, memory_to_run
from moegguf.gguf_header import read_header
from moegguf.jobs import probing
from moegguf.jobs.divergences import chunk_length, compare, sequences_of
from moegguf.quant import ggml
from moegguf.quant.budget import Option, choose, smallest, total_bytes, total_loss
from moegguf.quant.sensitivity import measure
from moegguf.quant.type_plan import read_type_plan, write_type_plan
from moegguf.recipe import Budget, find_recipes_file, load_recipe
from moegguf.runtime.footprint import compute_bytes
from moegguf.sizes import parse_size, show_size
from moegguf.texts import read_domains

TYPES = tuple(Type)
DEMO_SIZES = (1_750_000, 2_000_000, 2_650_000, 3_100_000)


# --------------------------------------------------------------------------------------------- the choice


def random_options(seed: int, n_tensors: int, n_types: int) -> dict[str, list[Option]]:
    draw = random.Random(seed)
    return {
        f"t{number}": [
            Option(type, 32 * draw.randint(1, 60), draw.random() ** 3) for type in TYPES[: draw.randint(1, n_types)]
        ]
        for number in range(n_tensors)
    }


def all_choices(options: dict[str, list[Option]]) -> Sequence[tuple[int, float]]:
    """Bytes and loss of every combination."""
    return [
        (sum(option.n_bytes for option in choice), sum(option.loss for option in choice))
        for choice in itertools.product(*options.values())
    ]


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all_combinations(seed: int):
    options = random_options(seed, n_tensors=5, n_types=5)
    choices = all_choices(options)
    for n_bytes in random.Random(seed).choices([size for size, _ in choices], k=5):
        best = min(loss for size, loss in choices if size <= n_bytes)
        found = choose(options, n_bytes)
        assert total_bytes(found) <= n_bytes
        assert total_loss(found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_budget_never_predicts_more_loss(seed: int):
    options = random_options(seed, n_tensors=60, n_types=12)
    least = total_bytes(smallest(options))
    losses = [total_loss(choose(options, n_bytes)) for n_bytes in range(least, 2 * least, 211)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_no_other_type_of_less_loss_fits_into_what_is_left():
    options = random_options(7, n_tensors=300, n_types=12)
    n_bytes = total_bytes(smallest(options)) * 3 // 2
    choice = choose(options, n_bytes)
    left = n_bytes - total_bytes(choice)
    better = [
        option.n_bytes - choice[name].n_bytes
        for name, each in options.items()
        for option in each
        if option.loss < choice[name].loss
    ]
    assert 0 <= left < min(better)


def test_a_budget_below_the_smallest_choice_is_refused():
    options = random_options(1, n_tensors=3, n_types=3)
    with pytest.raises(ValueError):
        choose(options, total_bytes(smallest(options)) - 1)


# ------------------------------------------------------------------------------------------- sensitivities


@pytest.fixture(scope="module")
def demo_survey(tmp_path_factory) -> Survey:
    """The gate-less demo mix, without an imatrix: the IQ2 types take seconds to set up."""
    return survey(demo_plan(tmp_path_factory.mktemp("demo") / "demo.gguf"), threads=1)


@pytest.fixture(scope="module")
def probed_survey(demo_survey: Survey) -> Survey:
    """The same, corrected on a little of the recipe's training text."""
    return probing.corrected(demo_survey, threads=1, max_tokens=100)


def demo_plan(path: Path, **table):
    return plan_build(load_recipe("demo", find_recipes_file(), {"output": str(path), "quant": "Q4_K_M", **table}))


def tiny_survey(family: Family, path: Path, **table) -> Survey:
    return survey(plan_build(make_recipe(path, family.base, family.experts, **{"quant": "Q4_K_M", **table})), threads=1)


def test_an_error_is_that_of_the_bytes_a_build_writes(family, tmp_path: Path):
    """A matrix of few rows is sampled whole, so its error can be computed from two files."""
    tiny = family("llama3_like", num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    sensitivity = tiny_survey(tiny, tmp_path / "m.gguf").sensitivities["blk.1.attn_k.weight"]
    stored = {}
    for quant in ("F32", "Q4_K_S"):
        plan = plan_build(make_recipe(tmp_path / f"{quant}.gguf", tiny.base, tiny.experts, quant=quant))
        stored[quant] = read_tensors(build(plan, threads=1).plan.path)["blk.1.attn_k.weight"]
    assert stored["Q4_K_S"].type is Type.Q4_K
    exact, found = stored["F32"].values, stored["Q4_K_S"].values
    assert sensitivity.errors[Type.Q4_K] == pytest.approx(np.square(found - exact).sum() / np.square(exact).sum(), 1e-5)


def test_finer_types_lose_less(demo_survey: Survey):
    order = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.BF16]
    for sensitivity in demo_survey.sensitivities.values():
        errors = [sensitivity.errors[type] for type in order]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0


def test_types_that_are_garbage_without_an_importance_are_no_candidates(demo_survey: Survey):
    for name, sensitivity in demo_survey.sensitivities.items():
        assert not {Type.IQ2_XXS, Type.IQ2_XS} & set(sensitivity.errors), name
        assert name == "token_embd.weight" or not {Type.IQ3_XXS, Type.IQ2_S} & set(sensitivity.errors), name


def test_an_expert_of_n_matters_less_than_one_alone(family, tmp_path: Path):
    """Errors of experts are nearly independent, their outputs nearly the same."""
    tiny = family("llama3_like")
    name = "blk.0.ffn_up.weight"
    alone, mixed = (
        tiny_survey(Family(tiny.base, experts), tmp_path / f"{len(experts)}.gguf", layout="fused")
        .sensitivities[name].errors[Type.Q4_K]
        for experts in (tiny.experts[:1], tiny.experts)
    )  # fmt: skip
    assert 0.3 < mixed / alone < 0.45


def test_copies_of_one_expert_err_as_one(family, tmp_path: Path):
    tiny = family("llama3_like")
    name, same = "blk.0.ffn_up_exps.weight", tiny.experts[:1] * 3
    errors = tiny_survey(Family(tiny.base, same), tmp_path / "m.gguf").sensitivities[name]
    assert errors.errors[Type.Q4_K] == pytest.approx(errors.part_errors[Type.Q4_K][0], rel=1e-4)


@pytest.mark.parametrize("recipe", [
    {"layout": "mixtral"},
    {"layout": "fused"},
    {"layout": "shared"},
    {"mix": "fine-grained"},
    {"router": {"mode": "noisy", "k": 2}},
    {"router": {"mode": "noisy", "k": 2}, "always_on": "e1"},
], ids=str)  # fmt: skip
def test_every_kind_of_mix_meets_its_budget(recipe: dict, family, tmp_path: Path):
    tiny, path = family("tied"), tmp_path / "m.gguf"
    plan = plan_build(make_recipe(path, tiny.base, tiny.experts, quant="Q4_0", **recipe))
    allocation = allocate(survey(plan, threads=1), Budget("x", n_bytes=plan.n_bytes))
    build(allocation.plan, threads=1)
    assert path.stat().st_size == allocation.plan.n_bytes <= plan.n_bytes


# ------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("n_bytes", DEMO_SIZES)
def test_a_file_is_within_its_budget_and_no_better_type_would_be(n_bytes: int, demo_survey: Survey, tmp_path: Path):
    allocation = allocate(demo_survey, Budget("x", n_bytes=n_bytes))
    path = tmp_path / "b.gguf"
    build(replace(allocation.plan, path=path), threads=1)
    left = n_bytes - path.stat().st_size
    types = {tensor.name: tensor.type for tensor in allocation.plan.planned}
    steps = [
        larger.n_bytes - now.n_bytes
        for name, options in demo_survey.options.items()
        for now in options
        if now.type is types[name]
        for larger in options
        if larger.loss < now.loss
    ]
    assert 0 <= left < min(steps)


def test_bits_per_weight_are_met(demo_survey: Survey):
    plan = allocate(demo_survey, Budget("4bpw", bpw=4.0)).plan
    assert 3.98 < plan.bits_per_weight <= 4.0


def test_the_same_mix_and_budget_give_the_same_types(demo_survey: Survey):
    again = survey(demo_survey.plan, threads=2)
    assert {name: each.errors for name, each in again.sensitivities.items()} == {
        name: each.errors for name, each in demo_survey.sensitivities.items()
    }
    plans = [allocate(found, Budget("x", n_bytes=2_000_000)).plan for found in (demo_survey, again)]
    assert plans[0].header == plans[1].header


def test_what_a_recipe_decides_a_budget_leaves_alone(family, tmp_path: Path):
    tiny = family("llama3_like")
    quant = {"budget": "3MB", "attn": "Q8_0", "tensors": {"blk.0.ffn_up": "Q6_K"}}
    found = tiny_survey(tiny, tmp_path / "m.gguf", quant=quant, layout="fused")
    types = {t.name: t.type for t in allocate(found, found.plan.recipe.quant.budget).plan.planned}
    assert {types[f"blk.{layer}.attn_q.weight"] for layer in (0, 1)} == {Type.Q8_0}
    assert types["blk.0.ffn_up.weight"] is Type.Q6_K
    assert types["blk.0.ffn_gate.weight"] is not Type.Q4_K or types["blk.1.ffn_up.weight"] is not Type.Q4_K
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_up.weight"} & set(found.sensitivities)


def test_a_budget_lowers_the_divergence_that_presets_of_its_size_have(demo_survey: Survey, tmp_path: Path):
    """Mean KLD from the 16-bit mix on held-out text, neither side with an imatrix, by rule and not by probes."""
    reference = build(demo_plan(tmp_path / "f16.gguf", quant="F16"), threads=1).plan.path
    records = read_domains({name: [f"demo:{name}/heldout#20"] for name in ("general", "math", "clinic", "strings")})
    header = read_header(reference)
    texts = sequences_of(header, records, chunk=chunk_length(header), max_tokens=500)
    sequences = [tokens for chunks in texts.values() for tokens in chunks]

    def kld(plan) -> float:
        path = build(replace(plan, path=tmp_path / "m.gguf"), threads=1).plan.path
        return compare(reference, path, sequences, threads=1).kld.value

    ratios = []
    for preset in ("Q2_K", "Q5_K_M"):
        plan = demo_plan(tmp_path / "preset.gguf", quant=preset)
        ratios.append(kld(allocate(demo_survey, Budget("x", n_bytes=plan.n_bytes)).plan) / kld(plan))
    assert max(ratios) <= 0.8, ratios


def test_probes_find_a_factor_for_each_group_times_one_for_each_layer(demo_survey: Survey, probed_survey: Survey):
    factor = {name: probed_survey.influences[name] / each for name, each in demo_survey.influences.items()}
    assert probed_survey.is_measured and not demo_survey.is_measured
    assert len({round(each, 9) for each in factor.values()}) == len(factor)
    by_layer = [
        [factor[f"blk.{layer}.{role}.weight"] / factor[f"blk.0.{role}.weight"] for layer in range(4)]
        for role in ("ffn_down_exps", "attn_q")
    ]
    assert by_layer[0] == pytest.approx(by_layer[1])
    assert not list(demo_survey.plan.path.parent.iterdir())


# --------------------------------------------------------------------------------------------------- plans


def test_a_saved_plan_gives_the_same_file_as_its_budget(tmp_path: Path):
    build_demo = ("build", "demo", "--threads", "1", "--no-probe")
    files = [str(tmp_path / name) for name in ("a.gguf", "b.gguf", "plan.json")]
    assert main([*build_demo, "--budget", "2MB", "-o", files[0], "--save-plan", files[2]]) == 0
    assert main([*build_demo, "--plan", files[2], "-o", files[1]]) == 0
    first, second = (Path(file).read_bytes() for file in files[:2])
    assert len(first) <= 2_000_000
    assert first == second


def test_an_edited_plan_is_followed(demo_survey: Survey, tmp_path: Path):
    plan, path = allocate(demo_survey, Budget("2MB", n_bytes=2_000_000)).plan, tmp_path / "plan.json"
    write_type_plan(path, "demo", "2MB", 0.1, plan.planned)
    path.write_text(edited(path, "blk.2.attn_q.weight", "Q8_0"))
    types = {t.name: t.type for t in demo_plan(tmp_path / "m.gguf", quant={"plan": str(path)}).planned}
    assert types.pop("blk.2.attn_q.weight") is Type.Q8_0
    assert types == {t.name: t.type for t in plan.planned if t.name != "blk.2.attn_q.weight"}


def edited(path: Path, name: str, type: str) -> str:
    content = json.loads(path.read_text())
    content["types"][name] = type
    return json.dumps(content)


def test_a_plan_for_another_mix_is_refused_by_the_first_tensor_that_does_not_fit(
    demo_survey: Survey, family, tmp_path: Path
):
    path, tiny = tmp_path / "plan.json", family("llama3_like")
    write_type_plan(path, "demo", "2MB", 0.1, demo_survey.plan.planned)
    with pytest.raises(UserError, match=r"another mix: token_embd.weight is \(1024, 256\) in it, in this mix \(410"):
        plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, tiny.experts, quant={"plan": str(path)}, layout="fused"))
    with pytest.raises(UserError, match=r"another mix: blk.0.ffn_gate.weight is missing in it"):
        demo_plan(tmp_path / "m.gguf", quant={"plan": str(path)}, layout="fused")


@pytest.mark.parametrize(("type", "reason"), [
    ("IQ2_XXS", "needs an importance matrix"),
    ("Q9_K", "unknown tensor type 'Q9_K'"),
])  # fmt: skip
def test_a_plan_with_a_type_that_a_tensor_cannot_have_is_refused(type, reason, demo_survey, tmp_path: Path):
    path = tmp_path / "plan.json"
    write_type_plan(path, "demo", "2MB", 0.1, demo_survey.plan.planned)
    path.write_text(edited(path, "blk.2.attn_q.weight", type))
    with pytest.raises(UserError, match=reason) as error:
        demo_plan(tmp_path / "m.gguf", quant={"plan": str(path)})
    assert "blk.2.attn_q.weight" in str(error.value)


def test_a_plan_whose_blocks_do_not_divide_a_row_is_refused(family, tmp_path: Path):
    tiny, path = family("tied"), tmp_path / "plan.json"
    plan = plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, tiny.experts, quant="Q8_0"))
    write_type_plan(path, "mix", "2MB", 0.1, plan.planned)
    path.write_text(edited(path, "blk.0.attn_q.weight", "Q4_K"))
    with pytest.raises(UserError, match=r"blk.0.attn_q.weight: Q4_K needs rows that are a multiple of 256"):
        plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, tiny.experts, quant={"plan": str(path)}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "moegguf type plan", "version": 1}', "\0", "{" * 9999])
def test_a_file_that_is_no_plan_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: "):
        read_type_plan(path)


# ------------------------------------------------------------------------------------------------- memory


def test_what_the_runtime_says_of_its_buffers_is_what_a_mix_is_fitted_with(tmp_path: Path):
    plan = demo_plan(tmp_path / "m.gguf")
    compute = compute_bytes(plan.header, plan.n_bytes, 128, tmp_path)
    assert 0 < compute < memory_to_run(plan, 128).compute
    assert compute_bytes(plan.header, plan.n_bytes, 256, tmp_path) > compute
    assert list(tmp_path.iterdir()) == []
    kv_cache = memory_to_run(plan, 128).kv_cache
    assert largest_file(plan, Fit(16_000_000, 0, 128), compute) == 16_000_000 - kv_cache - compute
    with_gpu = (21_000_000 - kv_cache - 2 * compute) * 4 // 5
    assert largest_file(plan, Fit(16_000_000, 5_000_000, 128), compute) == with_gpu


def test_a_mix_fits_the_memory_that_was_asked_for(tmp_path: Path, capsys):
    path = tmp_path / "m.gguf"
    flags = ("--fit", "RAM=6MB", "--ctx", "128", "--no-probe", "--threads", "1", "-o", str(path))
    assert main(["build", "demo", *flags]) == 0
    plan = demo_plan(tmp_path / "other.gguf")
    compute = compute_bytes(plan.header, plan.n_bytes, 128, tmp_path)
    taken = path.stat().st_size + memory_to_run(plan, 128).kv_cache + compute
    assert 5_900_000 < taken <= 6_000_000


# ------------------------------------------------------------------------------------------ experts' types


@pytest.mark.parametrize(("rounding", "expected"), [
    ("up", ["Q8_0", "Q8_0", "Q4_K_M"]),
    ("down", ["Q6_K", "Q6_K", "Q4_K_M"]),
])  # fmt: skip
def test_three_precisions_are_rounded_to_the_two_that_a_layer_holds(rounding, expected, family, tmp_path: Path):
    tiny = family("llama3_like")
    experts = [{"source": e, "quant": q} for e, q in zip(tiny.experts, ("Q8_0", "Q6_K", "Q4_K_M"), strict=True)]
    with pytest.raises(UserError, match=r"'Q8_0', 'Q6_K', 'Q4_K_M'.*two different ones.*--round-types up or down"):
        make_recipe(tmp_path / "m.gguf", tiny.base, experts)
    recipe = make_recipe(tmp_path / "m.gguf", tiny.base, experts, round_types=rounding)
    assert [expert.quant for expert in recipe.experts] == expected


def test_the_precision_of_each_expert_is_that_of_its_tensors(family, tmp_path: Path):
    tiny = family("llama3_like")
    experts = [{"source": e, "quant": q} for e, q in zip(tiny.experts, ("Q8_0", "Q6_K", "Q6_K"), strict=True)]
    found = precisions(plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, experts)), {})
    assert {name: dict(precision.types) for name, precision in found.items()} == {
        "e0": {Type.Q8_0: 6}, "e1": {Type.Q6_K: 6}, "e2": {Type.Q6_K: 6},
    }  # fmt: skip
    assert [round(precision.bits_per_weight, 4) for precision in found.values()] == [8.5, 6.5625, 6.5625]


def test_the_error_of_each_expert_is_that_of_its_types_alone(family, tmp_path: Path):
    tiny = family("llama3_like")
    experts = [{"source": e, "quant": q} for e, q in zip(tiny.experts, ("Q6_K", "Q4_K", "Q4_K"), strict=True)]
    plan = plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, experts))
    errors = expert_errors(plan, threads=1)
    every_type = measure([tensor.slot for tensor in plan.planned if tensor.slot.preset], plan.mix, threads=1)
    for name, found in errors.items():
        assert all(every_type[name].part_errors[type] == parts for type, parts in found.part_errors.items())
    fine, *coarse = (precision.error for precision in precisions(plan, errors).values())
    assert 0 < 10 * fine < min(coarse)


def test_who_stops_waiting_for_a_measurement_need_not_wait_for_all_types_of_a_tensor(family, tmp_path, monkeypatch):
    tiny = family("llama3_like")
    plan = plan_build(make_recipe(tmp_path / "m.gguf", tiny.base, [{"source": e} for e in tiny.experts]))
    quantise, is_over, late = ggml.quantise, threading.Event(), []

    def slowly(*args):
        if is_over.is_set():
            late.append(args[0])
            time.sleep(0.02)
        return quantise(*args)

    def interrupt(_):
        is_over.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(ggml, "quantise", slowly)
    with pytest.raises(KeyboardInterrupt):
        measure([tensor.slot for tensor in plan.planned if tensor.slot.preset], plan.mix, threads=1, progress=interrupt)
    assert len(late) <= 2


def test_a_build_of_two_precisions_says_what_each_expert_loses(tmp_path: Path, capsys):
    (tmp_path / "r.toml").write_text(
        '[mix.two]\nbase = "demo:base"\nlayout = "shared"\nexperts = ['
        '{ name = "math", source = "demo:math", quant = "Q6_K" }, '
        '{ name = "clinic", source = "demo:clinic", quant = "Q4_K" }]\n',
        encoding="utf-8",
    )
    flags = ("--recipes", str(tmp_path / "r.toml"), "--threads", "1", "-o", str(tmp_path / "m.gguf"))
    assert main(["build", "two", *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(r"expert math: \d+ × Q6_K, 6\.56 bits per weight, weighted error 0\.\d\d%\n", said)
    assert re.search(r"expert clinic: .*Q4_K.* bits per weight, weighted error 0\.\d\d%\n", said)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("flags", "reason"), [
    (("--budget", "12 parsecs"), "'12 parsecs': is no size; write it like 12GB"),
    (("--budget", "0GB"), "is no size"),
    (("--budget", "1MB"), "the mix does not fit, its smallest size is 1.4"),
    (("--bpw", "1.5"), "the mix does not fit, its smallest size is 2.67 bits per weight"),
    (("--bpw", "0.1"), "quant.bpw: found 0.1, allowed a number from 1 to 32"),
    (("--budget", "3MB", "--quant", "Q8_0"), "'budget and preset', allowed one of"),
    (("--budget", "3MB", "--bpw", "4"), "'bpw and budget', allowed one of"),
    (("--budget", "3MB", "--fit", "RAM=4GB"), "both set the size"),
    (("--fit", "16GB"), "--fit 16GB: expected RAM=SIZE[,VRAM=SIZE]"),
    (("--fit", "RAM=1MB"), "leaves nothing for the file"),
    (("--fit", "RAM=9MB", "--ctx", "0"), "--ctx 0: expected a whole number from 1"),
    (("--ctx", "9"), "--ctx goes with --fit"),
    (("--save-plan", "p.json"), "--save-plan goes with --budget"),
    (("--budget", "3MB", "--save-plan", "m.gguf"), "m.gguf: is to be both plan and mix"),
    (("--plan", "none.json"), "none.json: cannot be read"),
    (("--budget", "3MB", "--quant-role", "attn=Q8_0", "--quant-role", "embed=Q8_0", "--quant-role", "experts=Q8_0"),
     "decides the type of every tensor"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(flags, reason: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["build", "demo", "--threads", "1", "--no-probe", "-o", str(tmp_path / "m.gguf"), *flags]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "n_bytes"), [
    ("12GB", 12 * 10**9), ("12 gb", 12 * 10**9), ("1.5GiB", 3 << 29), ("800MB", 800 * 10**6), ("2MiB", 2 << 20),
    ("4096", 4096),
])  # fmt: skip
def test_sizes_are_decimal_or_binary_as_their_unit_says(text: str, n_bytes: int):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(("n_bytes", "shown", "enough"), [
    (0, "0 B", "0 B"), (999, "999 B", "999 B"), (4096, "4.10 kB", "4.10 kB"), (65_541, "65.54 kB", "65.55 kB"),
    (4_999, "5.00 kB", "5.00 kB"), (1_500_001, "1.50 MB", "1.51 MB"), (12 * 10**9, "12.00 GB", "12.00 GB"),
])  # fmt: skip
def test_sizes_are_shown_in_the_unit_that_fits(n_bytes: int, shown: str, enough: str):
    assert (show_size(n_bytes), show_size(n_bytes, up=True)) == (shown, enough)


def test_the_smallest_size_that_an_error_names_is_enough(demo_survey: Survey):
    with pytest.raises(UserError, match="smallest size is") as error:
        allocate(demo_survey, Budget("1MB", n_bytes=1_000_000))
    named = re.search(r"give it (\S+ MB)", error.value.mend)[1]
    assert allocate(demo_survey, Budget("x", n_bytes=parse_size(named))).plan.n_bytes <= parse_size(named)


def test_the_card_of_a_mix_names_its_budget(demo_survey: Survey, tmp_path: Path):
    path = tmp_path / "m.gguf"
    build(replace(allocate(demo_survey, Budget("2MB", n_bytes=2_000_000)).plan, path=path), threads=1)
    metadata = read_metadata(path, "moegguf.")
    assert metadata["moegguf.quant"] == "2MB"
    assert metadata["moegguf.expert.quants"] == ["2MB"] * 4
    assert ggml.supported_types() >= {tensor.type for tensor in read_tensors(path).values()}
