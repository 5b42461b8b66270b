"""scripts/paper.py: verdicts follow from the numbers alone, errors are standard errors, and a quick run is whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import build_mix
from moegguf.runtime.batch import generate_greedy, score
from moegguf.runtime.model import RunOptions, open_model

pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "paper.py"


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("paper", SCRIPT)
    sys.modules["paper"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(paper) -> list:
    return [row for some in paper.groups(Path("full"), 2).values() for row in some]


def random_scores(paper, seed: int, n: int = 40) -> dict:
    """Made-up outcomes of all rows."""
    rng = np.random.RandomState(seed)
    return {
        row.name: {
            **{domain: (rng.rand(row.n_seeds, n) < rng.rand()).astype(float) for domain in paper.DOMAINS},
            paper.PEAK: rng.uniform(0.25, 1, (row.n_seeds, 16)),
        }
        for row in rows_of(paper)
    }


# ------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("value", "error", "above", "expected"),
    [
        (3.0, 1.0, 0.0, "agrees"),
        (2.0, 1.0, 0.0, "cannot be told at this n"),
        (-2.0, 1.0, 0.0, "cannot be told at this n"),
        (-3.0, 1.0, 0.0, "does not"),
        (-1.0, 0.4, -2.0, "agrees"),
        (-3.0, 0.4, -2.0, "does not"),
        (-3.0, 0.6, -2.0, "cannot be told at this n"),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(paper, value, error, above, expected):
    assert paper.verdict(paper.Estimate(value, error), above) == expected


def test_a_claim_falls_with_one_comparison_and_stands_with_all(paper):
    agrees, does_not, untold, not_run = paper.Verdict
    assert paper.verdict_of_all([agrees, agrees]) is agrees
    assert paper.verdict_of_all([agrees, untold]) is untold
    assert paper.verdict_of_all([untold, not_run, agrees]) is not_run
    assert paper.verdict_of_all([agrees, untold, not_run, does_not]) is does_not


def test_claims_turn_over_when_the_numbers_do(paper):
    """The same claims, the outcomes of left and right exchanged: a verdict follows from the numbers, not the names."""
    comparison = paper.Comparison(paper.score("gate-less 4x"), paper.score("base"))
    right, wrong = (np.full((1, 40), float(value)) for value in (1, 0))
    better, worse = ({domain: each for domain in paper.DOMAINS} for each in (right, wrong))
    for left, other, expected in ((better, worse, "agrees"), (worse, better, "does not")):
        assert paper.find({"gate-less 4x": left, "base": other}, comparison).verdict == expected
    assert paper.find({"base": better}, comparison).verdict == "not run"


@pytest.mark.parametrize("seed", [0, 1])
def test_every_finding_is_the_verdict_of_its_own_difference(paper, seed):
    scores = random_scores(paper, seed)
    claims = paper.tested(scores, (*paper.PAPER, *paper.NEIGHBOURS))
    findings = [finding for claim in claims for finding in claim.findings]
    findings += [paper.find(scores, comparison) for comparison in paper.OPEN]
    for each in findings:
        assert each.difference.value == pytest.approx(each.values[0] - each.values[1])
        assert each.verdict == paper.verdict(each.difference, each.above)
    assert len({claim.verdict for claim in claims}) > 1


# --------------------------------------------------------------------------------------------------- errors


def test_the_error_of_a_difference_is_that_of_paired_questions(paper):
    """Two models that answer alike except on one question of forty differ by 2.5 ± 2.5 points there."""
    same = np.tile([1.0, 0.0], 20)[None]
    other = same.copy()
    other[0, 1] = 1.0
    side = paper.score("b", "math").minus(paper.score("a", "math"))
    found = paper.estimate({"a": {"math": same}, "b": {"math": other}}, side)
    assert (found.value, found.error) == pytest.approx((2.5, 2.5))


def test_an_error_holds_the_spread_of_questions_and_of_seeds(paper):
    rng = np.random.RandomState(0)
    outcomes = (rng.rand(5, 200) < np.linspace(0.2, 0.8, 5)[:, None]).astype(float)
    found = paper.estimate({"noisy": {"math": outcomes}}, paper.score("noisy", "math"))
    of_questions = outcomes.mean(axis=0).std(ddof=1) / np.sqrt(200)
    of_seeds = outcomes.mean(axis=1).std(ddof=1) / np.sqrt(5)
    assert found.error == pytest.approx(100 * np.hypot(of_questions, of_seeds))


def test_all_right_is_no_certainty(paper):
    right = np.ones((1, 200))
    assert paper.estimate({"a": {"math": right}}, paper.score("a", "math")) == paper.Estimate(100.0, 0.5)


# --------------------------------------------------------------------------------------------------- the run


def test_claims_speak_of_rows_that_there_are(paper):
    names = [row.name for row in rows_of(paper)]
    assert len(names) == len(set(names))
    comparisons = [each for claim in (*paper.PAPER, *paper.NEIGHBOURS) for each in claim.comparisons]
    sides = [side for each in (*comparisons, *paper.OPEN) for side in (each.left, each.right)]
    assert {row for side in sides for row, _ in side.weights} <= set(names)
    assert set(paper.DRAWN) <= set(names)


def test_questions_are_different_and_held_out(paper):
    from moegguf.demo.text import examples

    asked = paper.held_out(50)
    for domain, chats in asked.items():
        questions = {chat.messages[0].content for chat in chats}
        assert len(questions) == 50
        assert questions.isdisjoint(e.question for e in examples(domain, "train", 3000, 0))


def test_an_answer_is_right_if_and_only_if_the_model_says_just_that(paper, tmp_path):
    """One pass over question and answer finds what generating the answer finds."""
    path = build_mix(tmp_path / "base.gguf", "demo:base", ["demo:base"], layout="fused", quant="F16")
    with open_model(path, RunOptions(threads=1)) as model:
        (domain, encoded), *_ = paper.in_tokens(model, {"math": paper.held_out(30)["math"]}).items()
        right = paper.right_answers(partial(score, model), {domain: encoded})[domain]
        prompts = [each.tokens[: each.n_prompt] for each in encoded]
        said = dict(generate_greedy(model, prompts, 40, model.vocab.ends_answer))
    assert right == [list(each.tokens[each.n_prompt : -1]) == said[i] for i, each in enumerate(encoded)]
    assert 0 < sum(right) < len(right)


def test_a_quick_run_writes_every_row_and_a_second_one_asks_nothing_again(paper, tmp_path, capsys):
    command = ["--quick", "--questions", "2", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert paper.main(command) == 0
    page, results = (tmp_path / "out" / name for name in ("README.md", "results.json"))
    first, numbers = page.read_text(), json.loads(results.read_text())
    lines = first.splitlines()
    for row in rows_of(paper):
        (line,) = [line for line in lines if line.startswith(f"| {paper.name_of(row)} |")]
        assert ("–" in line) == (row.name not in numbers["rows"])
    slow = {row.name for row in rows_of(paper) if paper.is_slow(row, Path("full"))}
    assert set(numbers["rows"]) == {row.name for row in rows_of(paper)} - slow
    assert (tmp_path / "out" / "scores.png").stat().st_size < 150_000

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")}
    assert paper.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")} == kept
    assert page.read_text() == first
    capsys.readouterr()


def test_more_questions_than_there_are_is_refused_in_one_line(paper, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper, "MAX_QUESTIONS", 10**6)
    assert paper.main(["--quick", "--questions", "900", "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("paper: error: --questions 900: there are only ")
