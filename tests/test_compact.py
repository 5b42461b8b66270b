"""Merging neurons: what it computes, that it takes the cheapest merges first, and that what it costs is measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import CLOSE, build_mix, distance, logits, make_recipe, read_metadata, read_tensors, rewrite
from moegguf import drift
from moegguf.assembly import build, plan_build
from moegguf.cli import main
from moegguf.drift import measure_drift
from moegguf.errors import UserError
from moegguf.inspection import check
from moegguf.jobs import compaction
from moegguf.jobs.compaction import CompactOptions, choose_merges
from moegguf.layouts import lay_out
from moegguf.quant import neurons
from moegguf.quant.imatrix import Imatrix, with_importance
from moegguf.quant.neurons import Compaction, Ffns, Merges, find_paths, separate, together, width
from moegguf.recipe import Layout, Recipe, find_recipes_file, load_recipe
from moegguf.tensor import constant

UNEQUAL = (0.5, 0.3, 0.2)
ONE_THREAD = CompactOptions(max_tokens=1000, threads=1)
ROLES = ("ffn_gate", "ffn_up", "ffn_down")


def weighted(experts, shares) -> list[dict]:
    return [{"source": expert, "weight": share} for expert, share in zip(experts, shares, strict=True)]


def compacted(recipe: Recipe, groupings) -> Path:
    return build(plan_build(recipe, compaction=Compaction(groupings)), threads=1).plan.path


def demo(output: Path, **table) -> Recipe:
    return load_recipe("demo", find_recipes_file(), {"quant": "F32", "output": str(output), **table})


def random_grouping(n: int, n_ff: int, seed: int) -> np.ndarray:
    """Any partition of the copies of each neuron, numbered as groupings are."""
    drawn = np.random.default_rng(seed).integers(0, n, (n, n_ff))
    is_alike = drawn[:, None, :] == drawn[None, :, :]
    return is_alike.argmax(axis=0).astype(np.int8)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


# --- what is written ---


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_merging_nothing_is_the_fused_mix_to_the_byte(quant: str, family, tmp_path: Path):
    models = family("mistral_like")
    experts = weighted(models.experts, UNEQUAL)
    fused = build_mix(tmp_path / "fused.gguf", models.base, experts, layout="fused", quant=quant)
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, experts, compact={"size": 3}, quant=quant)
    assert read_tensors(compacted(recipe, choose_merges(recipe).compaction.groupings)) == read_tensors(fused)
    assert read_metadata(recipe.output, "llama.") == read_metadata(fused, "llama.")


@pytest.mark.parametrize("kind", ["tied", "mistral_like"])
def test_merging_everything_is_the_dense_model_of_mean_weights(kind: str, family, tmp_path: Path):
    models = family(kind)
    experts = weighted(models.experts, UNEQUAL)
    dense = build_mix(tmp_path / "dense.gguf", models.base, experts, mix="fine-grained")
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, experts, compact={"size": "1x"})
    mix = compacted(recipe, choose_merges(recipe).compaction.groupings)
    assert distance(logits(mix), logits(dense)) < CLOSE
    assert {name: t.shape for name, t in read_tensors(mix).items()} == {
        name: t.shape for name, t in read_tensors(dense).items()
    }


@pytest.mark.parametrize("source_quant", ["F32", "Q8_0"])
def test_any_grouping_computes_the_groups_as_they_are_defined(source_quant: str, family, tmp_path: Path):
    """Against the definition, group by group, on the decoded weights; layers have widths of their own."""
    models = family("mistral_like")
    sources = [
        build_mix(tmp_path / f"e{i}.gguf", expert, [expert], layout="fused", quant=source_quant)
        for i, expert in enumerate(models.experts)
    ]
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, weighted(sources, UNEQUAL), compact={"size": 2})
    groupings = {layer: random_grouping(3, 352, layer) for layer in (0, 2)}
    stored, weights = read_tensors(compacted(recipe, groupings)), [read_tensors(path) for path in sources]
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    for layer, grouping in groupings.items():
        gate, up, down = (stored[f"blk.{layer}.{role}.weight"].values for role in ROLES)
        expected = np.zeros((5, 128))
        for j in range(352):
            for first in set(grouping[:, j]):
                members = np.flatnonzero(grouping[:, j] == first)
                shares = np.array(UNEQUAL)[members]
                rows = [[weights[e][f"blk.{layer}.{role}.weight"].values for e in members] for role in ROLES]
                g, u = (np.average([w[j] for w in role], axis=0, weights=shares) for role in rows[:2])
                d = sum(share * w[:, j] for share, w in zip(shares, rows[2], strict=True))
                expected += np.outer(swiglu(x @ g, x @ u), d)
        assert distance(swiglu(x @ gate.T, x @ up.T) @ down.T, expected) < 1e-5
    assert read_metadata(recipe.output)["deci.feed_forward_length"] == [
        width(groupings[0]), 3 * 352, width(groupings[2])
    ]  # fmt: skip
    assert check(recipe.output) == []


def test_kept_rows_of_a_quantised_source_pass_through(family, tmp_path: Path):
    models = family("llama3_like")
    sources = [
        build_mix(tmp_path / f"e{i}.gguf", expert, [expert], layout="fused", quant="Q4_0")
        for i, expert in enumerate(models.experts[:2])
    ]
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, sources, compact={"size": 2}, quant="Q4_0")
    grouping = separate(2, 512)
    grouping[:, ::2] = 0
    stored = read_tensors(compacted(recipe, {layer: grouping for layer in (0, 1)}))["blk.1.ffn_up.weight"].rows
    own = read_tensors(sources[1])["blk.1.ffn_up.weight"].rows
    assert np.array_equal(stored[256:512], own[1::2])


def test_layers_that_are_not_mixed_stay_as_they_are(family, tmp_path: Path):
    models = family("mistral_like")
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, models.experts, compact={"size": "1x"}, layers=[1])
    mix = compacted(recipe, choose_merges(recipe).compaction.groupings)
    dense = build_mix(tmp_path / "dense.gguf", models.base, models.experts, mix="fine-grained", layers=[1])
    assert distance(logits(mix), logits(dense)) < CLOSE


def test_importance_of_a_dense_model_follows_its_columns(family, tmp_path: Path):
    models = family("tied")
    recipe = make_recipe(tmp_path / "mix.gguf", models.base, models.experts, compact={"size": 2})
    grouping = random_grouping(3, 96, 5)
    form = plan_build(recipe, compaction=Compaction({0: grouping, 1: grouping})).form
    entry = np.arange(1, 97, dtype=np.float32)[None]
    importance = with_importance(form, Imatrix(Path("i"), {"blk.0.ffn_down.weight": entry}, 1))
    parts = next(slot for slot in importance.slots if slot.name == "blk.0.ffn_down.weight").parts
    kept, groups = neurons.kept(grouping), neurons.merged(grouping)
    assert [part.importance.tolist() for part in parts] == [(each + 1.0).tolist() for each in (*kept, groups)]


def test_importance_of_each_expert_follows_its_columns(family, tmp_path: Path):
    models = family("tied")
    mix = plan_build(make_recipe(tmp_path / "mix.gguf", models.base, models.experts, layout="fused")).mix
    entries = [{f"blk.{layer}.{role}.weight": np.full((1, 64), i + 1.0) for layer in (0, 1) for role in ROLES[:2]}
               | {f"blk.{layer}.ffn_down.weight": 100 * (i + 1) + np.arange(96.0)[None] for layer in (0, 1)}
               for i in range(3)]  # fmt: skip
    experts = tuple(
        replace(expert, imatrix=Imatrix(Path("i"), some, 1)) for expert, some in zip(mix.experts, entries, strict=True)
    )
    grouping = random_grouping(3, 96, 5)
    form = lay_out(replace(mix, experts=experts, compaction=Compaction({0: grouping})), Layout.FUSED)
    found = {slot.name: [part.importance.tolist() for part in slot.parts] for slot in form.slots if slot.preset}
    kept = [100 * (i + 1.0) + js for i, js in enumerate(neurons.kept(grouping))]
    assert found["blk.0.ffn_down.weight"] == [js.tolist() for js in (*kept, 200.0 + neurons.merged(grouping))]
    assert found["blk.0.ffn_up.weight"] == [[i] * 64 for i in (1.0, 2.0, 3.0, 2.0)]


# --- what is chosen ---


def small_ffns(n: int, n_ff: int = 12, n_embd: int = 8, *, apart: float = 0.3) -> tuple[np.ndarray, Ffns]:
    """Activations, and the FFNs of `n` fine-tunes of one random FFN."""
    rng = np.random.default_rng(n)
    base = [rng.standard_normal(shape) for shape in ((n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff))]
    tuned = [[constant(role, w + apart * rng.standard_normal(w.shape)) for _ in range(n)]
             for role, w in zip(ROLES, base, strict=True)]  # fmt: skip
    shares = rng.dirichlet(np.full(n, 5.0))
    return rng.standard_normal((40, n_embd)).astype(np.float32), Ffns(*tuned, shares.tolist())


def output(x: np.ndarray, ffns: Ffns, grouping: np.ndarray) -> np.ndarray:
    """Of the FFN with merged neurons, in float64."""
    shares, total = np.array(ffns.shares), 0.0
    values = [[tensor.read_rows(0, tensor.n_rows).view("<f4").reshape(tensor.shape) for tensor in role]
              for role in (ffns.gates, ffns.ups, ffns.downs)]  # fmt: skip
    for e, down in enumerate(values[2]):
        is_in = grouping == grouping[e]
        means = is_in * shares[:, None] / (is_in * shares[:, None]).sum(axis=0)
        g, u = (np.einsum("ej,ejd->jd", means, np.array(role)) for role in values[:2])
        total = total + shares[e] * swiglu(x @ g.T, x @ u.T) @ down.T
    return total


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_path_ends_at_what_merging_that_neuron_whole_costs(n: int):
    """The steps of a neuron add up to E|Δoutput / norm|² of the last grouping, measured on the whole FFN."""
    x, ffns = small_ffns(n)
    norms = np.random.default_rng(0).uniform(1, 3, len(x))
    paths = find_paths(x, norms, ffns)
    whole = output(x, ffns, separate(n, 12))
    for j in range(12):
        grouping = separate(n, 12)
        grouping[:, j] = 0
        change = (output(x, ffns, grouping) - whole) / norms[:, None]
        expected = np.square(change).sum(axis=1).mean()
        assert paths.costs[:, j].sum() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_paths_merge_one_copy_at_a_time_and_never_get_cheaper(n: int):
    x, ffns = small_ffns(n)
    paths = find_paths(x, np.ones(len(x)), ffns)
    for k, grouping in enumerate(paths.groupings):
        assert [len(set(column)) for column in grouping.T] == [n - k] * 12
    for before, after in pairwise(paths.groupings):
        for old, new in zip(before.T, after.T, strict=True):
            assert all(len({new[e] for e in np.flatnonzero(old == group)}) == 1 for group in set(old))
    assert (np.diff(paths.costs, axis=0) >= -1e-12).all()
    for n_merges in range(12 * (n - 1) + 1):
        assert width(paths.after(n_merges)) == n * 12 - n_merges


def test_the_closest_copies_are_merged_first():
    """Copies 0 and 2 are the same, copy 1 is another: only those two merge for nothing."""
    x, ffns = small_ffns(3)
    same = [[role[0], role[1], role[0]] for role in (ffns.gates, ffns.ups, ffns.downs)]
    paths = find_paths(x, np.ones(len(x)), Ffns(*same, [0.2, 0.5, 0.3]))
    assert (paths.groupings[1] == np.array([0, 1, 0])[:, None]).all()
    assert paths.costs[0].max() < 1e-10 < paths.costs[1].min()


def test_groups_are_as_far_apart_as_their_farthest_copies():
    """On a line, 0 and 1 merge first; 2.1 is nearer to 1 than to 3.3, but farther from 0."""
    x, ffns = small_ffns(1)
    gate, up, down = (role[0].read_rows(0, role[0].n_rows).view("<f4") for role in (ffns.gates, ffns.ups, ffns.downs))
    places = [1 + 0.1 * place for place in (0, 1, 2.1, 3.3)]  # both up and down differ: one alone merges for nothing
    line = [[constant("", gate)] * 4, *([constant("", place * w) for place in places] for w in (up, down))]
    paths = find_paths(x, np.ones(len(x)), Ffns(*line, [0.25] * 4))
    assert (paths.groupings[1] == np.array([0, 0, 2, 3])[:, None]).all()
    assert (paths.groupings[2] == np.array([0, 0, 2, 2])[:, None]).all()


def test_the_cheapest_blocks_are_saved_wherever_they_are():
    x, ffns = small_ffns(3, n_ff=64)
    _, apart = small_ffns(3, n_ff=64, apart=3.0)
    merges = Merges({0: find_paths(x, np.ones(40), apart), 4: find_paths(x, np.ones(40), ffns)})
    widths = [{layer: width(g) for layer, g in merges.after(n).items()} for n in range(merges.n_blocks + 1)]
    assert widths[0] == {0: 192, 4: 192}
    assert widths[4] == {0: 192, 4: 64}
    assert widths[8] == {0: 64, 4: 64}
    assert all(number % 32 == 0 for pair in widths for number in pair.values())
    assert (np.diff(merges.errors, 2) >= 0).all()


# --- what it costs ---


def test_error_falls_as_size_grows_and_partial_merges_pay(tmp_path: Path, monkeypatch):
    def kld(size: str) -> float:
        return choose_merges(demo(tmp_path / "mix.gguf", compact={"size": size}), ONE_THREAD).compaction.kld

    klds = [kld(size) for size in ("1x", "2x", "3x", "4x")]
    assert all(small > 1.5 * large for small, large in pairwise(klds))
    assert klds[0] < 4e-3
    assert klds[-1] < 1e-8

    def whole_only(x, norms, ffns):
        paths = find_paths(x, norms, ffns)
        groupings = np.concatenate([paths.groupings[:1], *[paths.groupings[-1:]] * (len(paths.groupings) - 1)])
        return neurons.Paths(groupings, np.broadcast_to(paths.costs.mean(axis=0), paths.costs.shape))

    monkeypatch.setattr(compaction, "find_paths", whole_only)
    assert kld("2x") > 1.2 * klds[1]
    assert not any(tmp_path.iterdir())


def test_a_largest_kld_is_kept_and_hardly_undercut(tmp_path: Path):
    recipe = demo(tmp_path / "mix.gguf", compact={"max_kld": 5e-4})
    chosen = choose_merges(recipe, ONE_THREAD)
    assert chosen.compaction.kld <= 5e-4
    assert chosen.divergence.kld.value == chosen.compaction.kld
    n_neurons = sum(map(width, chosen.compaction.groupings.values()))
    smaller = demo(tmp_path / "mix.gguf", compact={"size": round(n_neurons / 1024 - 0.25, 2)})
    assert choose_merges(smaller, ONE_THREAD).compaction.kld > 5e-4


def test_copies_of_one_expert_compact_to_one_model_for_nothing(tmp_path: Path):
    copies = [{"source": "demo:math"}] * 3
    recipe = make_recipe(
        tmp_path / "mix.gguf", "demo:base", copies, domains={"e0": "demo:math#40"}, compact={"max_kld": 1e-6}
    )
    chosen = choose_merges(recipe, ONE_THREAD)
    assert [width(g) for g in chosen.compaction.groupings.values()] == [256] * 4
    assert chosen.compaction.kld < 1e-9
    built = build(plan_build(recipe, compaction=chosen.compaction), threads=1).plan
    assert check(built.path) == []
    assert "1x of 3x" in built.card.describe_compact()


def test_without_memory_for_the_mix_a_size_is_judged_by_the_base(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compaction, "_preset_that_fits", lambda plan: None)
    chosen = choose_merges(demo(tmp_path / "mix.gguf", compact={"size": "2x"}), ONE_THREAD)
    assert sum(map(width, chosen.compaction.groupings.values())) == 2 * 4 * 256
    assert chosen.compaction.kld is None
    with pytest.raises(UserError, match=r"memory does not hold the whole mix.*choose compact = \{ size"):
        choose_merges(demo(tmp_path / "mix.gguf", compact={"max_kld": 1e-3}), ONE_THREAD)


# --- drift ---


def test_drift_is_the_distance_from_the_mean_relative_to_it(family, tmp_path: Path, monkeypatch):
    models = family("mistral_like")
    mix = plan_build(make_recipe(tmp_path / "mix.gguf", models.base, weighted(models.experts, UNEQUAL))).mix
    stacks = np.stack([
        np.concatenate([e.ffn(layer, role).read_rows(0, e.ffn(layer, role).n_rows).view(np.uint16).ravel()
                        for layer in range(3) for role in ROLES]) for e in mix.experts
    ])  # fmt: skip
    values = (stacks.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    mean = np.average(values, axis=0, weights=UNEQUAL)
    expected = np.linalg.norm(values - mean, axis=1) / np.linalg.norm(mean)
    found = measure_drift(mix)
    assert list(found.by_expert.values()) == pytest.approx(expected, rel=1e-5)
    assert found.overall == pytest.approx(np.sqrt(np.average(expected**2, weights=UNEQUAL)), rel=1e-5)
    monkeypatch.setattr(drift, "EXACT_WEIGHTS", 0)
    assert measure_drift(mix).overall == pytest.approx(found.overall, rel=0.05)


# --- the command ---


def test_a_build_says_what_drifted_what_was_merged_and_what_it_cost(tmp_path: Path, capsys):
    out = tmp_path / "mix.gguf"
    assert main(["build", "demo", "--threads", "1", "-o", str(out)]) == 0
    assert "drift of the experts from their mean: base 14.5%" in (said := " ".join(capsys.readouterr().out.split()))
    assert "--compact 1x would save 2.51 MB at a KLD of some 2e-03 nats (an estimate" in said
    experts = [flag for name in ("math", "clinic") for flag in ("--expert", f"{name}=demo:{name}")]
    flags = ["--compact", "1.5x", "--domain", "math=demo:math#20", "--quant", "Q4_K_M", "--threads", "1", "--force"]
    assert main(["build", "--base", "demo:base", *experts, *flags, "-o", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "compacted 1.5x of 2x: 256 to 512 neurons a layer, 512 in the mix; KLD 0.00" in said
    assert "nats from the whole mix, which finds the same token likeliest" in said
    metadata = read_metadata(out, "moegguf.compact.", "deci.feed")
    assert metadata["moegguf.compact.widths"] == metadata["deci.feed_forward_length"]
    assert 1e-5 < metadata["moegguf.compact.kld"] < 1e-2
    assert main(["inspect", str(out), "--check"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "compacted 1.5x of 2x" in said
    assert "check: sound" in said


def test_widths_that_are_not_those_of_the_card_are_found(tmp_path: Path):
    recipe = demo(tmp_path / "mix.gguf", compact={"size": "1x"})
    built = compacted(recipe, {layer: together(4, 256) for layer in range(4)})
    key = "moegguf.compact.widths"
    value = plan_build(recipe, compaction=Compaction({}), overwrite=True).card.to_metadata()[key]
    tampered = rewrite(built, tmp_path / "tampered.gguf", keys={key: value})
    assert "the widths of its layers are not those that it was compacted to" in check(tampered)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["demo-noisy", "--compact", "1x"], "compact: found {'size': '1x'}, allowed only with router gateless"),
        (["demo", "--compact", "1x", "--mix", "fine-grained"], "allowed only with mix = ffn or ffn+attention"),
        (["demo", "--compact", "1x", "--layout", "mixtral"], "layout: found 'mixtral', allowed fused"),
        (["demo", "--compact", "0.5x"], "compact.size: found '0.5x', allowed 1x to 4x"),
        (["demo", "--compact", "4.1x"], "compact.size: found '4.1x', allowed 1x to 4x"),
        (["demo", "--compact", "nanx"], "compact.size: found 'nanx', allowed 1x to 4x"),
        (["demo", "--compact", "kld=-1"], "compact.max_kld: found -1.0, allowed a number from 1e-09 to 10"),
        (["demo", "--compact", "kld=small"], "--compact small: is no number"),
        (["demo", "--compact", "ppl=1"], "compact: found {'ppl': 1.0}, allowed { size = "),
        (["--base", "demo:base", "--expert", "a=demo:math", "--expert", "b=demo:clinic", "--compact", "kld=0.01"],
         "compact = { max_kld = 0.01 } takes text to judge merges by, and there is none; pass --domain a=FILE"),
        (["--base", "demo:base", "--expert", "a=demo:math", "--expert", "b=demo:clinic", "--compact", "1.5x"],
         "compact = 1.5x takes text"),
        (["demo", "--compact", "1.5x", "--domain", "math=demo:math#1"], "single chunk"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(flags, says: str, tmp_path: Path, capsys):
    if "single chunk" in says:
        flags = ["--base", "demo:base", "--expert", "math=demo:math", "--expert", "b=demo:clinic", *flags[1:]]
    assert main(["build", *flags, "--threads", "1", "-o", str(tmp_path / "mix.gguf")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_architecture_without_widths_of_its_own_is_refused(family, tmp_path: Path):
    models = family("tied")
    dense = build_mix(tmp_path / "dense.gguf", models.base, [models.base], layout="fused")
    other = rewrite(dense, tmp_path / "other.gguf", arch="qwen3")
    recipe = make_recipe(tmp_path / "mix.gguf", other, [other, other], compact={"size": "1x"})
    with pytest.raises(UserError, match=r"architecture 'qwen3', which cannot be compacted, only llama"):
        plan_build(recipe)


def test_what_was_not_chosen_is_not_built(tmp_path: Path):
    plan = plan_build(demo(tmp_path / "mix.gguf", compact={"size": "2x"}))
    with pytest.raises(UserError, match="has not been chosen yet"):
        build(plan)
