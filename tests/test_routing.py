"""Statistics of routing against brute force on random choices, and against what is known of simple ones; then the
command, through the real runtime on tiny mixes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import moegguf
from conftest import build_dense, build_mix, read_tensors, rewrite
from moegguf import cli
from moegguf.jobs import mapping
from moegguf.measurement import routing
from moegguf.measurement.routing import Load, Locality, Routing, total
from moegguf.runtime.encode import chunks, encode
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.tap import ROUTER_INPUT, Tap
from moegguf.texts import read_records

N = 6
SEGMENT = 5


def random_choice(
    seed: int, n_tokens: int, k: int, n: int = N, *, sticky: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (T, N) that change slowly, and the numbers (T, k) of the most probable experts, in any order."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((n_tokens, n))
    state = rng.normal(size=n)
    for row in logits:
        state = sticky * state + rng.normal(size=n)
        row[:] = state
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=1)[:, :k]
    return probabilities.astype(np.float32), rng.permuted(chosen, axis=1)


def fixed_choice(sets: Sequence[Sequence[int]], n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """The experts of `sets`, the first of each the most probable."""
    chosen = np.array(sets)
    probabilities = np.full(((len(sets)), n), 0.01)
    for rank in range(chosen.shape[1]):
        np.put_along_axis(probabilities, chosen[:, rank : rank + 1], 0.5 / (rank + 1), axis=1)
    return probabilities, chosen


def windows(chosen: np.ndarray, length: int) -> list[np.ndarray]:
    return [chosen[i : i + length] for i in range(len(chosen) - length + 1)]


def best_f1(chosen: np.ndarray, n: int, length: int) -> tuple[float, float]:
    """SRP and size ratio by definition: for each threshold, classify every (token, expert) of every segment."""
    truth = np.array([[[e in token for token in w] for e in range(n)] for w in windows(chosen, length)])
    scores = []
    for threshold in range(length + 1):
        active = truth.sum(axis=2) >= threshold
        predicted = np.repeat(active[:, :, None], length, axis=2)
        hits = (predicted & truth).sum()
        scores.append((2 * hits / (predicted.sum() + truth.sum()), -active.sum() / len(active) / chosen.shape[1]))
    f1, size = max(scores)
    return f1, -size


def best_cover(chosen: np.ndarray, n: int, length: int, m: int) -> float:
    uses = [np.bincount(w.ravel(), minlength=n) for w in windows(chosen, length)]
    return sum(sum(sorted(u)[-m:]) for u in uses) / sum(u.sum() for u in uses)


def lru_hits(probabilities: np.ndarray, chosen: np.ndarray, m: int) -> float:
    """A cache of m experts, simulated with a list; it starts with those that are used first."""
    ranked = [sorted(map(int, row), key=lambda e: -p[e]) for p, row in zip(probabilities, chosen, strict=True)]
    order = list(dict.fromkeys(e for row in ranked for e in row))
    hits = 0
    for row in ranked:
        hits += sum(e in order[:m] for e in row)
        for e in reversed(row):
            order.remove(e)
            order.insert(0, e)
    return hits / chosen.size


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_locality_equals_brute_force_on_random_choices(seed, k):
    probabilities, chosen = random_choice(seed, 60, k)
    locality = Locality.of(probabilities, chosen, SEGMENT)
    assert (locality.srp, locality.srp_size) == pytest.approx(best_f1(chosen, N, SEGMENT))
    for m in range(1, N + 1):
        assert locality.sch(m) == pytest.approx(best_cover(chosen, N, SEGMENT, m))
        assert locality.lru(m) == pytest.approx(lru_hits(probabilities, chosen, m))
    top = probabilities.argmax(axis=1)
    assert locality.repeat == pytest.approx(np.mean(top[1:] == top[:-1]))


@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_size_of_a_block_changes_nothing(monkeypatch, block):
    probabilities, chosen = random_choice(2, 50, 2)
    whole = Locality.of(probabilities, chosen, SEGMENT)
    monkeypatch.setattr(routing, "BLOCK", block)
    assert same(Locality.of(probabilities, chosen, SEGMENT), whole)


def same(a, b) -> bool:
    return all(np.allclose(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_the_sum_of_parts_is_brute_force_over_all_of_them():
    parts = [random_choice(seed, n_tokens, 2) for seed, n_tokens in ((0, 30), (1, 4), (2, 41))]
    locality = total(Locality.of(*part, SEGMENT) for part in parts)
    uses = [np.bincount(w.ravel(), minlength=N) for _, chosen in parts for w in windows(chosen, SEGMENT)]
    assert locality.sch(2) == pytest.approx(sum(sum(sorted(u)[-2:]) for u in uses) / sum(u.sum() for u in uses))
    hits = sum(lru_hits(*part, 3) * part[1].size for part in parts)
    assert locality.lru(3) == pytest.approx(hits / sum(part[1].size for part in parts))
    load = total(Load.of(*part) for part in parts)
    assert same(load, Load.of(*map(np.concatenate, zip(*parts, strict=True))))


def test_figures_of_different_segments_or_k_are_not_added():
    one, two = random_choice(0, 20, 1), random_choice(0, 20, 2)
    with pytest.raises(ValueError, match="segment"):
        Locality.of(*one, 4) + Locality.of(*one, 5)
    with pytest.raises(ValueError, match="k differs"):
        Load.of(*one) + Load.of(*two)


def test_a_constant_choice_is_perfectly_local():
    locality = Locality.of(*fixed_choice([(3, 1)] * 20), SEGMENT)
    assert (locality.srp, locality.srp_size, locality.sch(2), locality.lru(2), locality.repeat) == (1, 1, 1, 1, 1)
    assert locality.sch(1) == 0.5


def test_round_robin_defeats_a_cache_that_forgets_and_half_fills_one_that_knows():
    locality = Locality.of(*fixed_choice([(i % N,) for i in range(10 * N)]), N)
    assert locality.sch(3) == pytest.approx(0.5)
    assert locality.lru(N - 1) == pytest.approx((N - 1) / (10 * N)), "only what the cache started with"
    assert locality.lru(N) == 1
    assert locality.repeat == 0
    assert (locality.srp, locality.srp_size) == pytest.approx((2 / (N + 1), N)), "taking every expert always"


def test_two_long_runs_are_local_but_for_the_seam():
    locality = Locality.of(*fixed_choice([(0,)] * 20 + [(4,)] * 20), 4)
    assert locality.lru(1) == pytest.approx(39 / 40)
    assert locality.sch(1) == pytest.approx((34 * 4 + 3 + 2 + 3) / (37 * 4))


def test_random_choices_hit_a_cache_of_m_experts_m_times_in_n():
    rng = np.random.default_rng(5)
    probabilities = rng.random((20000, N))
    chosen = np.argsort(-probabilities, axis=1)[:, :2]
    locality = Locality.of(probabilities, chosen, SEGMENT)
    for m in range(2, N + 1):
        assert locality.lru(m) == pytest.approx(m / N, abs=0.01)


def test_texts_shorter_than_a_segment_have_no_segment():
    locality = Locality.of(*fixed_choice([(0,)] * 3), 4)
    assert np.isnan([locality.srp, locality.srp_size, locality.sch(1)]).all()
    assert locality.lru(1) == 1
    assert np.isnan(Locality.of(*fixed_choice([(0,)]), 4).repeat)


def test_load_of_an_even_and_of_a_one_sided_router():
    even = Load.of(np.full((12, 4), 0.25), np.arange(12)[:, None] % 4)
    assert (even.variation, even.peak, even.relative_entropy) == pytest.approx((0, 1, 1))
    assert (even.balance_loss, even.entropy) == pytest.approx((1, np.log(4)))
    one_sided = Load.of(np.eye(4)[[2] * 12], np.full((12, 1), 2))
    assert (one_sided.peak, one_sided.balance_loss, one_sided.entropy) == (4, 4, 0)
    assert one_sided.variation == pytest.approx(np.sqrt(3))
    assert one_sided.top_share.tolist() == one_sided.used_share.tolist() == one_sided.mean_probability.tolist()


def test_shares_add_up_to_one_and_to_k():
    load = Load.of(*random_choice(7, 200, 3))
    assert load.top_share.sum() == pytest.approx(1)
    assert load.used_share.sum() == pytest.approx(3)
    assert load.mean_probability.sum() == pytest.approx(1)
    assert (load.used_share >= load.top_share).all()


def test_sigmoid_routers_are_measured_by_shares_of_their_sum():
    probabilities, chosen = random_choice(8, 50, 2)
    assert same(Load.of(probabilities * 3, chosen), Load.of(probabilities, chosen))


# --- the command ---

EXPERTS = ("e0", "e1", "e2")
KIND = "mistral_like"
TEXT = "The quick brown fox jumps over the lazy dog while twelve grey geese cross the road. "


def run_map(*argv: object) -> int:
    return cli.main(["route", "map", *map(str, argv), "--threads", "1"])


def mapped(tmp_path: Path, *argv: object) -> dict:
    """What the command writes as JSON."""
    assert run_map(*argv, "--save", tmp_path / "map.json", "--force") == 0
    return json.loads((tmp_path / "map.json").read_text())


@pytest.fixture
def noisy(family, tmp_path) -> Path:
    models = family(KIND)
    return build_mix(tmp_path / "noisy.gguf", models.base, models.experts, router={"mode": "noisy", "k": 2, "std": 0.2})


@pytest.fixture
def indifferent(family, tmp_path) -> Path:
    """A mix of one expert three times, k = 1: whatever its routers choose, the hidden states are the same."""
    models = family(KIND)
    return build_mix(tmp_path / "same.gguf", models.base, [models.experts[0]] * 3, router={"mode": "noisy", "k": 1})


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    return path


def tapped(path: Path, text: Path, node: str, n_ctx: int) -> dict[int, list[np.ndarray]]:
    """Layer → values of a node for each piece of the text."""
    with open_model(path, RunOptions(ctx=n_ctx, threads=1)) as model, Tap(model, [node]) as tap:
        pieces = list(chunks([encode(model.vocab, None, record) for record in read_records(str(text))], n_ctx))
        parts = list(tap.run(pieces))
        return {layer: [v for part in parts for v in part.split(node, layer)] for layer in range(model.n_layer)}


def with_routers(path: Path, target: Path, routers: dict[int, np.ndarray]) -> Path:
    names = {f"blk.{layer}.ffn_gate_inp.weight": rows.astype(np.float32) for layer, rows in routers.items()}
    return rewrite(path, target, tensors=names)


def test_the_map_is_what_router_times_input_gives(noisy, text, tmp_path):
    report = mapped(tmp_path, noisy, "--text", f"d={text}", "--ctx", 64, "--segment", 4, "--cache", 2)
    tensors, domain = read_tensors(noisy), report["domains"]["d"]
    inputs = tapped(noisy, text, ROUTER_INPUT, 64)
    assert (report["experts"], report["k"], domain["sequences"]) == (list(EXPERTS), 2, len(inputs[0])) != 1
    hits = uses = 0
    for layer in domain["layers"]:
        router = tensors[f"blk.{layer['layer']}.ffn_gate_inp.weight"].values
        logits = [x @ router.T for x in inputs[layer["layer"]]]
        chosen = [np.argsort(-rows, axis=1)[:, :2] for rows in logits]
        everything = np.concatenate(logits)
        p = np.exp(everything) / np.exp(everything).sum(axis=1, keepdims=True)
        top = np.bincount(everything.argmax(axis=1), minlength=3) / len(p)
        assert layer["top_share"] == pytest.approx(top.tolist())
        assert layer["used_share"] == pytest.approx((np.bincount(np.concatenate(chosen).ravel()) / len(p)).tolist())
        assert layer["mean_probability"] == pytest.approx(p.mean(axis=0).tolist(), abs=1e-5)
        assert layer["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean(), abs=1e-5)
        assert (sum(layer["top_share"]), sum(layer["used_share"])) == pytest.approx((1, 2))
        hits += sum(lru_hits(*pair, 2) * pair[1].size for pair in zip(logits, chosen, strict=True))
        uses += sum(each.size for each in chosen)
    assert domain["lru"]["2"] == pytest.approx(hits / uses)


def test_noise_is_unsure_and_over_seeds_prefers_no_expert(family, text, tmp_path):
    models, shares = family(KIND), []
    for seed in range(6):
        router = {"mode": "noisy", "k": 1, "seed": seed}
        mix = build_mix(tmp_path / f"{seed}.gguf", models.base, models.experts, router=router)
        layers = mapped(tmp_path, mix, "--text", f"d={text}")["domains"]["d"]["layers"]
        shares += [layer["top_share"] for layer in layers]
        assert all(layer["relative_entropy"] > 0.95 for layer in layers)
    assert np.mean(shares, axis=0) == pytest.approx([1 / 3] * 3, abs=0.12)


def test_a_router_that_always_prefers_one_expert_shows_it_alone_and_suits_a_disk(indifferent, text, tmp_path, capsys):
    flags = ("--text", f"d={text}", "--max-tokens", 90)
    inputs = tapped(indifferent, text, ROUTER_INPUT, 90)
    wish = np.array([0.0, 20.0, 0.0])
    routers = {layer: (np.linalg.pinv(x[0]) @ np.ones(90))[None] * wish[:, None] for layer, x in inputs.items()}
    sure = with_routers(indifferent, tmp_path / "sure.gguf", routers)
    report = mapped(tmp_path, sure, *flags)
    domain = report["domains"]["d"]
    for layer in domain["layers"]:
        assert layer["top_share"] == layer["used_share"] == [0, 1, 0]
        assert layer["entropy"] < 1e-3
        assert (layer["load_peak"], layer["balance_loss"]) == (3, pytest.approx(3, abs=1e-3))
    caches = {"1": 1, "2": 1}
    assert [domain[key] for key in ("tokens", "srp", "repeat", "sch", "lru")] == [90, 1, 1, caches, caches]
    assert report["verdict"].startswith("This mix suits running from disk or from system memory: with 1 of 3")
    assert len(re.findall(r"^\d +0 +100 +0$", capsys.readouterr().out, re.M)) == len(domain["layers"])


def test_an_always_on_expert_is_not_among_those_chosen(family, text, tmp_path, capsys):
    models = family(KIND)
    router = {"mode": "noisy", "k": 2}
    mix = build_mix(tmp_path / "on.gguf", models.base, models.experts, router=router, always_on="e1")
    report = mapped(tmp_path, mix, "--text", f"d={text}")
    assert (report["experts"], report["k"], report["always_on"]) == (["e0", "e2"], 1, "e1")
    assert all(sum(layer["used_share"]) == pytest.approx(1) for layer in report["domains"]["d"]["layers"])
    assert "1 of 2 experts a token, and e1 always" in capsys.readouterr().out


def test_a_mixture_of_experts_that_is_not_ours_has_numbers_for_names(noisy, text, tmp_path):
    plain = rewrite(noisy, tmp_path / "plain.gguf", keep=lambda key: not key.startswith("moegguf."))
    ours, theirs = (mapped(tmp_path, path, "--text", f"d={text}") for path in (noisy, plain))
    assert theirs["experts"] == ["0", "1", "2"]
    assert theirs["domains"] == ours["domains"]


def test_domains_come_from_a_recipe_and_from_flags_and_add_up(noisy, text, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"text": "Seven black cats sleep under the warm stove."}\n' * 2)
    (tmp_path / "my.toml").write_text(
        '[mix.my]\nbase = "b"\nexperts = [{ name = "e0", source = "x" }, { name = "e1", source = "y" }]\n'
        'domains = { e1 = "text.txt", e0 = "more.jsonl" }\n'
    )
    flags = ("--domains", "my", "--recipes", tmp_path / "my.toml", "--text", f"new={text}")
    domains = mapped(tmp_path, noisy, *flags, "--text", f"e0={text}")["domains"]
    assert list(domains) == ["e1", "e0", "new", mapping.ALL]
    assert domains["e1"]["layers"] == domains["new"]["layers"]
    assert domains["e0"]["sequences"] == domains["e1"]["sequences"] + 2
    assert domains[mapping.ALL]["tokens"] == sum(domains[name]["tokens"] for name in ("e1", "e0", "new"))


def test_max_tokens_ends_a_domain_and_a_short_one_has_no_segments(noisy, text, tmp_path, capsys):
    domain = mapped(tmp_path, noisy, "--text", f"d={text}", "--max-tokens", 10)["domains"]["d"]
    assert (domain["tokens"], domain["srp"], set(domain["sch"].values())) == (10, None, {None})
    assert re.search(r"SRP, segments of 16 tokens +-\n", capsys.readouterr().out)


def test_a_pipe_gets_plain_numbers_and_json_alone_when_asked(noisy, text, capsys, monkeypatch):
    assert run_map(noisy, "--text", f"d={text}") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = re.findall(r"^\d +(\d+) +(\d+) +(\d+)$", out, re.M)
    assert [abs(sum(map(int, row)) - total) <= 1 for row, total in zip(rows, [100] * 3 + [200] * 3, strict=True)]
    assert run_map(noisy, "--text", f"d={text}", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(noisy)
    assert report == moegguf.route.map(noisy, text={"d": text}, threads=1).as_json()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_shades_and_where_numbers_do_not_fit_shades_alone(noisy, text, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, cell in (("80", r"m +\d+ \x1b\[0m"), ("12", r"m  \x1b\[0m")):
        monkeypatch.setenv("COLUMNS", columns)
        assert run_map(noisy, "--text", f"d={text}") == 0
        assert len(re.findall(r"48;2;\d+;\d+;\d+" + cell, capsys.readouterr().out)) == 2 * 3 * 3
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_map(noisy, "--text", f"d={text}") == 0
    out = capsys.readouterr().out
    assert "48;" not in out
    assert "e0" in out, "numbers and names, however narrow"


def test_the_figure_is_written(noisy, text, tmp_path):
    pytest.importorskip("matplotlib")
    drawn, from_python = tmp_path / "map.png", tmp_path / "python.png"
    assert run_map(noisy, "--text", f"d={text}", "--text", f"again={text}", "-o", drawn) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    moegguf.route.map(noisy, text={"d": text, "again": [text]}, threads=1, output=from_python)
    assert from_python.read_bytes() == drawn.read_bytes()
    with pytest.raises(moegguf.UserError, match=r"map.png: exists already"):
        moegguf.route.map(noisy, text={"d": text}, output=drawn)


@pytest.mark.parametrize(
    "given",
    [
        {"text": {"d": 5}},
        {"text": {}},
        {"segment": "long"},
        {"cache": ["all"]},
        {"cache": 4},
        {"ctx": 1.5},
        {"output": 5},
    ],
)
def test_values_of_the_wrong_kind_are_users_mistakes(noisy, text, given):
    with pytest.raises(moegguf.UserError):
        moegguf.route.map(noisy, **({"text": {"d": text}} | given))


@pytest.mark.parametrize(
    ("n", "sets", "says"),
    [
        (4, {"a": [(0, 1)] * 40}, "suits running from disk or from system memory: with 2 of 4 experts"),
        (4, {"a": [(i % 4,) for i in range(40)]}, "does not suit"),
        (4, {"a": [(0,)] * 40, "b": [(i % 4,) for i in range(40)]}, "suits running .* for a, not for b: "),
        (3, {"a": [(0, 1, 2)] * 40}, "does not suit .* takes all experts"),
    ],
)
def test_the_verdict_goes_by_how_often_half_of_the_experts_suffice(n, sets, says):
    domains = {name: Routing.of({0: [fixed_choice(chosen, n)]}, 4) for name, chosen in sets.items()}
    k = len(next(iter(sets.values()))[0])
    choice = mapping.Choice("mix", tuple(map(str, range(n))), k, None)
    found = mapping.RoutingMap("mix.gguf", choice, 4, sorted(choice.default_caches()), domains)
    assert re.match(f"This mix {says}", found.verdict)


@pytest.mark.parametrize("table", [{}, {"layout": "fused"}, {"layout": "shared"}])
def test_a_gateless_mix_has_no_choice_to_map(family, tmp_path, text, capsys, table):
    models = family(KIND)
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, **table)
    assert run_map(mix, "--text", f"d={text}") == 2
    assert "uses all its experts for every token, so there is no choice" in capsys.readouterr().err


def test_a_dense_model_has_no_routers(family, tmp_path, text, capsys):
    dense = rewrite(
        build_dense(tmp_path / "one.gguf", family(KIND).base),
        tmp_path / "dense.gguf",
        keep=lambda key: not key.startswith("moegguf."),
    )
    assert run_map(dense, "--text", f"d={text}") == 2
    assert "has no routers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "no text to map"),
        (["--text", "math"], "--text math: expected NAME=FILE"),
        (["--text", "=text.txt"], "--text =text.txt: expected NAME=FILE"),
        (["--text", "a b=text.txt"], "domain 'a b': expected a name of letters"),
        (["--text", "d=missing.txt"], "missing.txt: cannot be read"),
        (["--text", "d=empty.txt"], "empty.txt: is empty"),
        (["--text", "d=text.pdf"], "text.pdf: is no text"),
        (["--domains", "nothing"], "has no recipe 'nothing'"),
        (["--domains", "merlinite-2x"], "recipe merlinite-2x names no domains"),
        (["--text", "d=text.txt", "--segment", "0"], "--segment 0: expected a whole number from 1 to"),
        (["--text", "d=text.txt", "--cache", "1", "4"], "--cache 4: expected a whole number from 1 to 3"),
        (["--text", "d=text.txt", "--max-tokens", "0"], "--max-tokens"),
        (["--text", "d=text.txt", "-o", "map.gif"], "map.gif: not a name for a figure"),
        (["--text", "d=text.txt", "--save", "no/such/map.json"], "no/such: no such folder to write map.json to"),
        (
            ["--text", "d=text.txt", "--save", "text.txt"],
            "text.txt: exists already; choose another name, or pass --force",
        ),
        (["--text", "d=text.txt", "-o", "old.png"], "old.png: exists already; choose another name, or pass --force"),
    ],
)
def test_mistakes_are_told_in_one_line(noisy, text, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "old.png").write_bytes(b"")
    assert run_map(noisy, *flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_in_a_pipe_no_name_is_cut(noisy, text, capsys):
    assert run_map(noisy, "--text", f"{'d' * 60}={text}", "--max-tokens", 64) == 0
    assert capsys.readouterr().out.splitlines().count("d" * 60) == 2  # over each of the two maps


def test_logits_in_place_of_probabilities_are_recognised():
    probabilities, _ = random_choice(9, 30, 2)
    assert mapping._probabilities(np.log(probabilities)) == pytest.approx(probabilities, abs=1e-6)
    assert mapping._probabilities(probabilities) is probabilities
