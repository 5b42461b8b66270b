"""`moegguf eval`: figures are those of the models, outcomes are kept and never believed of anything else."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moegguf
from conftest import Heard, build_dense, logits
from moegguf.cli import main
from moegguf.demo import MEMBERS, MODELS, folder
from moegguf.demo.text import examples
from moegguf.errors import UserError
from moegguf.measurement.results import Figure, Mean, figure, mean, wilson
from moegguf.measurement.scores import Answered, Weighed, windows
from moegguf.measurement.tasks import Metric, read_tasks
from moegguf.runtime.vocab import open_vocab
from moegguf.texts import named_ref
from test_texts import lines
from tiny_gguf import repeating, write_gguf

N = 60
OWN_DOMAIN = {"base": "general", "math": "math", "clinic": "clinic", "strings": "strings"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict[str, Path]:
    """The members of the embedded family as plain GGUF files."""
    output = tmp_path_factory.mktemp("members")
    return {name: build_dense(output / f"{name}.gguf", folder(name), quant="F16") for name in MEMBERS}


@pytest.fixture
def evaluate(tmp_path, capsys) -> Callable[..., dict]:
    """`evaluate(*argv)`: run the command with a cache of its own; the JSON that it prints."""

    def run(*argv: object) -> dict:
        flags = ("--json", "--details", "--cache", tmp_path / "cache", "--threads", 1)
        assert main(["eval", *map(str, (*argv, *flags))]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def cloze(n: int) -> list[dict]:
    """Multiple choice from held-out questions: the right cure of a robot's part among three that are wrong."""
    lot = random.Random(0)
    cures = sorted({example.answer.partition(": ")[2] for example in examples("clinic", "train", 400, 1)})
    rows = []
    for example in examples("clinic", "heldout", n, seed=3):
        head, _, cure = example.answer.partition(": ")
        choices = lot.sample([other for other in cures if other != cure], 3)
        right = lot.randrange(4)
        choices.insert(right, cure)
        rows.append({"question": example.question, "choices": [f"{head}: {c}" for c in choices], "answer": right})
    return rows


# -------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_the_demo_family_scores_what_family_json_records(name, demo, evaluate):
    recorded = json.loads((MODELS / "family.json").read_text())["exact_match_percent"][name]
    domains = OWN_DOMAIN.values() if name == "base" else [OWN_DOMAIN[name]]
    (model,) = evaluate(demo[name], "--tasks", *(f"demo:{domain}/heldout#{N}" for domain in domains))["models"]
    assert model["tasks"][OWN_DOMAIN[name]]["value"] >= 0.95
    for domain in domains:
        share, found = recorded[domain] / 100, model["tasks"][domain]
        error = math.sqrt(share * (1 - share) / N)
        assert found["n"] == N
        assert found["value"] == pytest.approx(share, abs=3.5 * error + 1.5 / N)


def test_log_likelihood_of_a_choice_is_that_of_its_tokens_after_the_question(demo, evaluate, tmp_path):
    rows = cloze(4)
    (model,) = evaluate(demo["base"], "--tasks", lines(tmp_path / "cloze.jsonl", *rows))["models"]
    tokenize = open_vocab(demo["base"]).tokenize
    for row, item in zip(rows, model["items"]["cloze"], strict=True):
        for choice, found in zip(row["choices"], item["logprobs"], strict=True):
            prompt = f"<|user|>{row['question']}<|assistant|>"
            tokens, start = tokenize(f"{prompt}{choice}<|end|>"), len(tokenize(prompt))
            exact = logits(demo["base"], tokens).astype(np.float64)
            exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
            expected = sum(exact[i - 1, tokens[i]] for i in range(start, len(tokens)))
            assert found == pytest.approx(expected, abs=0.05)
        best = int(np.argmax(item["logprobs"]))
        assert item["is_right"] == (best == row["answer"])


def test_the_expert_picks_the_right_choice_of_its_own_domain(demo, evaluate, tmp_path):
    (model,) = evaluate(demo["clinic"], "--tasks", lines(tmp_path / "cloze.jsonl", *cloze(30)))["models"]
    found = model["tasks"]["cloze"]
    assert found["metric"] == "multiple choice"
    assert found["value"] >= 0.95 and found["value_by_length"] >= 0.9
    assert found["ci"] == list(wilson(found["value"], 30))


def test_perplexity_is_that_of_the_logits_window_by_window(demo, evaluate, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(example.answer for example in examples("math", "train", 12, 1)))
    ctx = 64
    (model,) = evaluate(demo["base"], "--tasks", tmp_path / "long.txt", "--ctx", ctx)["models"]
    tokens = open_vocab(demo["base"]).tokenize((tmp_path / "long.txt").read_text())
    nll, n = 0.0, 0
    for at in range(0, len(tokens) - 1, ctx - 1):
        window = tokens[at : at + ctx]
        exact = logits(demo["base"], window).astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        nll -= exact[np.arange(len(window) - 1), window[1:]].sum()
        n += len(window) - 1
    found = model["tasks"]["long"]
    assert n > 3 * ctx and found["n"] == n == len(tokens) - 1
    assert math.log(found["value"]) == pytest.approx(nll / n, abs=2e-3)
    assert found["ci"][0] < found["value"] < found["ci"][1]


def test_a_raw_prompt_gets_no_template(demo, evaluate, tmp_path):
    (example,) = examples("math", "heldout", 1, seed=3)
    half = example.answer.index(" The answer")
    row = {"prompt": example.prompt + example.answer[:half], "answer": example.answer[half:]}
    (model,) = evaluate(demo["math"], "--tasks", lines(tmp_path / "raw.jsonl", row))["models"]
    assert model["items"]["raw"][0]["is_right"]


def test_as_many_lines_of_a_continuation_count_as_the_answer_has(evaluate, tmp_path):
    endless = write_gguf(tmp_path / "endless.gguf", repeating("ab\nc"))  # a → b⏎cab⏎cab⏎…
    rows = [{"prompt": "a", "answer": answer} for answer in ("b", " b\ncab ", "b\nc", "cab")]
    (model,) = evaluate(endless, "--tasks", lines(tmp_path / "raw.jsonl", *rows))["models"]
    assert [item["is_right"] for item in model["items"]["raw"]] == [True, True, False, False]


def test_domains_of_a_recipe_are_tasks_and_texts(demo, evaluate, tmp_path):
    recipes = tmp_path / "mine.toml"
    lines(
        tmp_path / "sums.jsonl",
        *({"question": e.question, "answer": e.answer} for e in examples("math", "heldout", 6, 3)),
    )
    (tmp_path / "notes.txt").write_text("One, two, three, four.")
    recipes.write_text(
        '[mix.mine]\nbase = "demo:base"\n'
        'experts = [{ name = "math", source = "demo:math" }, { name = "base", source = "demo:base" }]\n'
        'domains = { math = "sums.jsonl", base = "notes.txt" }\n'
    )
    (model,) = evaluate(demo["math"], "--domains", "mine", "--recipes", recipes)["models"]
    assert {name: task["metric"] for name, task in model["tasks"].items()} == {
        "math": "exact match",
        "math text": "perplexity",
        "base text": "perplexity",
    }
    assert model["tasks"]["math"]["value"] == 1
    assert 1 < model["tasks"]["math text"]["value"] < 1.2 < model["tasks"]["base text"]["value"]


# -------------------------------------------------------------------------------------------- what is kept


def tamper(cache: Path, said: str) -> None:
    """Make the ledgers claim that every model said this."""
    for path in cache.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        path.write_text("".join(json.dumps(row | {"said": said}) + "\n" for row in rows))


def said(report: dict) -> list[str]:
    return [item["said"] for item in report["models"][0]["items"]["math"]]


def test_what_was_asked_before_is_not_asked_again(demo, evaluate, tmp_path):
    task = ("--tasks", "demo:math/heldout#8")
    first = said(evaluate(demo["math"], *task, "--limit", 3))
    tamper(tmp_path / "cache", "kept")
    more = said(evaluate(demo["math"], *task))
    assert more[:3] == ["kept"] * 3 and "kept" not in more[3:]
    assert said(evaluate(demo["math"], *task, "--fresh"))[:3] == first


def test_outcomes_of_another_file_or_setting_are_not_believed(demo, evaluate, tmp_path):
    copy = tmp_path / "math.gguf"
    copy.write_bytes(demo["math"].read_bytes())
    task = ("--tasks", "demo:math/heldout#2")
    evaluate(copy, *task)
    tamper(tmp_path / "cache", "kept")
    assert said(evaluate(copy, *task)) == ["kept"] * 2
    assert "kept" not in said(evaluate(demo["math"], *task))
    assert "kept" not in said(evaluate(copy, *task, "--ctx", 128))
    os.utime(copy, ns=(0, 0))
    assert "kept" not in said(evaluate(copy, *task))


def test_a_line_that_was_cut_short_is_asked_again(demo, evaluate, tmp_path):
    task = ("--tasks", "demo:math/heldout#3")
    first = said(evaluate(demo["math"], *task))
    (ledger,) = (tmp_path / "cache").iterdir()
    ledger.write_bytes(ledger.read_bytes()[:-20])
    assert said(evaluate(demo["math"], *task)) == first
    n_lines = len(ledger.read_text().split())
    assert said(evaluate(demo["math"], *task)) == first
    assert len(ledger.read_text().split()) == n_lines


def test_ctrl_c_keeps_what_is_known_and_says_how_to_go_on(demo, tmp_path):
    argv = ["eval", demo["base"], "--tasks", "demo:strings/heldout#1000", "--threads", 1, "--cache", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moegguf", *map(str, argv)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "cache").glob("*.jsonl")) and process.poll() is None:
        time.sleep(0.02)
    (ledger,) = (tmp_path / "cache").glob("*.jsonl")
    while ledger.stat().st_size < 1000 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    n_kept = sum(1 for line in ledger.read_text().splitlines() if "said" in json.loads(line or "{}"))
    first, last = err.splitlines()
    assert first.startswith(f"{n_kept} of 1000 outcomes are kept in {tmp_path / 'cache'}: ")
    assert last == "moegguf: interrupted"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full here")
def test_a_full_disk_and_a_folder_that_cannot_be_are_one_line_with_the_file(demo, evaluate, tmp_path, capsys):
    task = ("--tasks", "demo:math/heldout#2")
    evaluate(demo["base"], *task)
    (ledger,) = (tmp_path / "cache").iterdir()
    full = tmp_path / "full" / ledger.name
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    (tmp_path / "file").touch()
    for place, why in (("full", "No space left on device"), ("file", "File exists"), ("file/x", "Not a directory")):
        argv = ["eval", demo["base"], *task, "--cache", tmp_path / place, "--threads", 1, "--fresh"]
        assert main([*map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: {tmp_path / place / ledger.name}: cannot be written ({why})" in line


# --------------------------------------------------------------------------------------------- what is shown


def test_json_alone_is_on_stdout_and_the_same_in_a_file(demo, tmp_path, capsys):
    kept, flags = tmp_path / "kept.json", ("--cache", str(tmp_path / "cache"), "--threads", "1")
    model, task = str(demo["base"]), "demo:math/heldout#5"
    assert main(["eval", model, "--tasks", task, *flags, "--json", "--details", "--save", str(kept)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(kept.read_text())
    assert [len(each["tasks"]) for each in found["models"]] == [1]


def test_the_table_has_a_row_a_model_a_column_a_task_and_bars(demo, tmp_path, capsys):
    tasks = ("--tasks", "demo:math/heldout#4", "--tasks", "demo:general/heldout#4")
    argv = ["eval", demo["base"], demo["math"], *tasks, "--cache", tmp_path / "cache", "--threads", 1]
    assert main([*map(str, argv)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["math", "general"]
    assert out[2].split() == ["model", "n=4", "n=4", "mean"]
    assert [line.split()[0] for line in out[3:5]] == ["base", "math"]
    assert out[4].split()[1:4] == ["100.0", "[51.0,", "100.0]"]
    assert f"  math  {'#' * 40} 100.0" in out


def test_a_file_that_exists_is_replaced_only_when_asked_to_and_never_after_long_work(demo, tmp_path, capsys):
    argv = ["eval", str(demo["base"]), "--threads", "1", "--cache", str(tmp_path / "cache"), "--tasks"]
    argv += ["demo:math/heldout#2", str(lines(tmp_path / "text.jsonl", {"text": "One and one is two."}))]
    chart, second, kept = tmp_path / "c.svg", tmp_path / "c-perplexity.svg", tmp_path / "kept.json"
    for path, flags in ((kept, ["--save", kept]), (chart, ["--chart", chart]), (second, ["--chart", chart])):
        path.write_text("mine")
        assert main([*argv, *map(str, flags)]) == 2
        assert f"{path}: exists already; " in (said := capsys.readouterr().err) and "--force" in said
        assert path.read_text() == "mine" and not (tmp_path / "cache").exists()
        path.unlink()
    assert main([*argv, "--chart", str(tmp_path / "c.bmp")]) == 2
    assert "not a name for a figure" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    for path in (chart, second, kept):
        path.write_text("mine")
    assert main([*argv, "--chart", str(chart), "--save", str(kept), "--force"]) == 0
    assert chart.read_text() != "mine" != second.read_text() and "models" in json.loads(kept.read_text())


# --------------------------------------------------------------------------------------------- from Python


def test_python_gives_what_the_command_gives(demo, evaluate, tmp_path):
    expected = evaluate(demo["base"], demo["math"], "--tasks", "sums=demo:math/heldout#3", "--limit", 2)
    how = {"limit": 2, "threads": 1, "watch": (heard := Heard())}
    found = moegguf.eval([demo["base"], demo["math"]], tasks={"sums": "demo:math/heldout#3"}, cache=tmp_path, **how)
    assert json.loads(json.dumps(found.as_json(details=True))) == expected
    assert heard.parts == {"asking": [4, 4]}
    again = moegguf.eval({"x": demo["base"]}, tasks="demo:math/heldout#3", cache=tmp_path, **how)
    assert again.models[0].name == "x" and again.models[0].figures["math"].n == 2
    assert again.draw(tmp_path / "c.svg") == [tmp_path / "c.svg"]
    with pytest.raises(UserError, match=r"c\.svg: exists already"):
        again.draw(tmp_path / "c.svg")


def test_mistakes_in_python_are_user_errors(demo, tmp_path):
    for models, how, says in (
        (5, {}, r"models 5: expected a path"),
        ([], {}, "models: none are given"),
        (demo["base"], {"tasks": 7}, "tasks 7: expected a path"),
        (demo["base"], {"ctx": "long"}, "ctx 'long': expected int"),
        (demo["base"], {"limit": 0}, "--limit 0: expected a whole number"),
        (demo["base"], {"engine": "jax"}, "the engines are llama, torch"),
        (demo["base"], {"tasks": ()}, "nothing to measure"),
    ):
        with pytest.raises(UserError, match=says):
            moegguf.eval(models, cache=tmp_path / "cache", **{"tasks": "demo:math#2"} | how)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 10, 0.2366, 0.7634), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775)]
)
def test_wilson_intervals_are_those_of_the_books(share, n, low, high):
    assert wilson(share, n) == pytest.approx((low, high), abs=5e-5)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    lot = np.random.default_rng(1)
    for share in (0.5, 0.9):
        hits = lot.binomial(60, share, 2000) / 60
        covered = np.mean([low <= share <= high for low, high in (wilson(hit, 60) for hit in hits)])
        assert 0.92 < covered < 0.98
    covered = []
    for _ in range(500):
        n_tokens = lot.integers(5, 40, 50)
        nlls = [lot.gamma(2.0, 1.0, n).sum() for n in n_tokens]
        low, high = figure(Metric.PERPLEXITY, [Weighed(tuple(nlls), tuple(map(int, n_tokens)))]).interval
        covered.append(low <= math.exp(2.0) <= high)
    assert 0.91 < np.mean(covered) < 0.98


def test_the_mean_is_over_accuracies_and_is_narrower_than_its_parts():
    half = Figure(Metric.EXACT_MATCH, 0.5, 100, wilson(0.5, 100))
    all_right = figure(Metric.EXACT_MATCH, [Answered("x", True)] * 100)
    found = mean([half, all_right, Figure(Metric.PERPLEXITY, 9.0, 10, None)])
    assert isinstance(found, Mean) and found.value == 0.75
    assert found.interval[0] < 0.75 < found.interval[1]
    assert found.interval[1] - found.interval[0] < half.interval[1] - half.interval[0]
    assert mean([half]) is None


def test_perplexity_of_equally_likely_tokens_is_their_number_and_certain():
    found = figure(Metric.PERPLEXITY, [Weighed((3 * math.log(7), 5 * math.log(7)), (3, 5)), Weighed((), ())])
    assert found.value == pytest.approx(7) and found.n == 8
    assert found.interval == pytest.approx((7, 7))
    with pytest.raises(UserError, match="single token"):
        figure(Metric.PERPLEXITY, [Weighed((), ())])


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("start", [0, 1, 5, 17])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 15, 40])
def test_windows_count_every_token_once_and_fit_the_context(length, start, bos):
    tokens, counted = list(range(length)), []
    for window, first in windows(tokens, start, 8, bos):
        assert len(window) <= 8 and 1 <= first < len(window)
        counted += window[first:]
        before = window[first - 1]
        assert before == window[first] - 1 or before == bos
    assert counted == tokens[max(start, 1) :]


# ----------------------------------------------------------------------------------------------- bad input


GOOD = {"question": "Q?", "answer": "A."}
CHOICE = {"question": "Q?", "choices": ["a", "b"]}
BAD_TASKS = {
    "bad JSON": ([GOOD, "{"], ":2: is no valid JSON"),
    "no answer": ([GOOD, {"question": "Q?"}], ':2: found {"question"}, expected one of {"question", "answer"}'),
    "empty answer": ([{"question": "Q?", "answer": ""}], ":1: answer is empty"),
    "mixed": ([GOOD, {"text": "t"}], ":2: is an item of perplexity, those before it are of exact match"),
    "empty": ([], "tasks.jsonl: is empty"),
    "no answer at the end": (
        [{"messages": [{"role": "user", "content": "Q?"}]}],
        ":1: messages do not end in an answer",
    ),
    "answer out of range": ([CHOICE | {"answer": 2}], ":1: answer is 2, expected 0 to 1"),
    "negative answer": ([CHOICE | {"answer": -1}], ":1: answer is -1, expected 0 to 1"),
    "answer of no choice": ([CHOICE | {"answer": "c"}], ":1: answer is none of the choices"),
    "choices without answer": ([CHOICE], ":1: answer is missing"),
    "one choice": ([{"question": "Q?", "choices": ["a"], "answer": 0}], ":1: choices is no list of two or more"),
    "choices of nothing": ([{"choices": ["a", "b"], "answer": 0}], ":1: choices without a question or a prompt"),
    "choice that is no text": ([{"question": "Q?", "choices": ["a", 7], "answer": 0}], ":1: choices is 7"),
}


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """`refused(*argv)`: run the command, which must fail with exit code 2 before anything is kept; its one line."""

    def run(*argv: object) -> str:
        assert main(["eval", *map(str, argv), "--cache", str(tmp_path / "cache")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and not (tmp_path / "cache").exists()
        (line,) = err.splitlines()
        assert line.startswith("moegguf: error: ") and "; " in line
        return line

    return run


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_bad_task_file_is_refused_with_the_line(case, demo, refused, tmp_path):
    rows, says = BAD_TASKS[case]
    assert says in refused(demo["base"], "--tasks", lines(tmp_path / "tasks.jsonl", *rows))


def test_what_cannot_be_measured_is_refused_in_one_line(demo, refused, tmp_path):
    (tmp_path / "no.gguf").write_text("no model, but long enough to hold a header")
    base, task = demo["base"], ("--tasks", "demo:math/heldout#2")
    assert "gone.jsonl: cannot be read" in refused(base, "--tasks", tmp_path / "gone.jsonl")
    assert "not a GGUF file" in refused(base, tmp_path / "no.gguf", *task)
    assert "gone.gguf: cannot be read" in refused(tmp_path / "gone.gguf", *task)
    assert "has no recipe 'poetry'" in refused(base, "--domains", "poetry")
    assert "names no domains" in refused(base, "--domains", "merlinite-2x")
    assert "nothing to measure" in refused(base)
    assert "there is a task math already" in refused(base, *task, "demo:math")
    assert "--limit 0: expected" in refused(base, *task, "--limit", 0)
    assert "--ctx 3: expected" in refused(base, *task, "--ctx", 3)
    assert "--details is part of the JSON" in refused(base, *task, "--details")
    assert "--chart draws --tasks" in refused(base, "--harness", "arc_easy", "--chart", tmp_path / "c.png")


def test_an_item_longer_than_the_context_is_named(demo, tmp_path, capsys):
    for row in (
        {"question": "why? " * 100, "answer": "A."},
        {"question": "Q?", "choices": ["a", "why? " * 100], "answer": 0},
    ):
        task = lines(tmp_path / "tasks.jsonl", row)
        argv = ["eval", demo["base"], "--tasks", task, "--cache", tmp_path / "cache", "--ctx", 64]
        assert main([*map(str, argv)]) == 2
        assert f"{task}:1: " in capsys.readouterr().err


def test_tasks_are_named_by_flag_or_file_or_domain(tmp_path):
    path = lines(tmp_path / "sums.jsonl", GOOD)
    tasks = read_tasks(map(named_ref, [str(path), f"more={path}", "demo:math/heldout#3", "few=demo:math#2"]))
    assert [(task.name, len(task.items)) for task in tasks] == [("sums", 1), ("more", 1), ("math", 3), ("few", 2)]
