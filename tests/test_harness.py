"""lm-evaluation-harness against a model: the server gives it what is true, and its figures are ours."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import build_dense, logits
from moegguf.cli import main
from moegguf.demo import folder
from moegguf.demo.text import examples
from moegguf.runtime.completions import CompletionServer
from moegguf.runtime.model import Model, RunOptions, open_model
from test_eval import cloze
from test_texts import lines
from tiny_gguf import repeating, write_gguf

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness (extra harness) is not installed")

TASK = """\
task: cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The demo family's base: no BOS, so that every token needs its own place."""
    return build_dense(tmp_path_factory.mktemp("harness") / "base.gguf", folder("base"), quant="F16")


@pytest.fixture(scope="module")
def with_bos(family, tmp_path_factory) -> Path:
    """A model that wants a BOS."""
    return build_dense(tmp_path_factory.mktemp("harness") / "bos.gguf", family("llama3_like").base)


@contextlib.contextmanager
def served(path: Path) -> Iterator[tuple[Model, str]]:
    with open_model(path, RunOptions(threads=1, ctx=128)) as model, CompletionServer(model) as server:
        yield model, server.url


def ask(url: str, content: dict | None = None) -> dict:
    data = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:
        return json.load(response)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


# --------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("kind", ["base", "with_bos"])
def test_an_echo_has_the_log_p_of_each_token_after_those_before_it(kind, request):
    path = request.getfixturevalue(kind)
    prompts = [[5, 9, 33, 70, 11], [40, 41], [8] * 20]
    with served(path) as (model, url):
        bos = model.vocab.tokenize_prompt("")
        asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        choices = ask(f"{url}/v1/completions", asked)["choices"]
    assert bool(bos) == (kind == "with_bos")
    for prompt, choice in zip(prompts, choices, strict=True):
        whole = [*bos, *prompt]
        expected = log_softmax(logits(path, whole))
        found = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert len(found) == len(tops) == len(prompt) + 1
        for i in range(1 - len(bos), len(prompt)):
            at = len(bos) + i - 1
            assert found[i] == pytest.approx(expected[at, prompt[i]], abs=0.02)
            margin = expected[at].max() - expected[at, prompt[i]]
            if not 0 < margin < 0.05:
                assert (max(tops[i].values()) == found[i]) == (margin == 0)
        assert bos or found[0] is None


def test_continuations_are_greedy_and_end_before_the_first_stop_string(tmp_path):
    path = write_gguf(tmp_path / "endless.gguf", repeating("abcdefghij\nklmno"))
    with served(path) as (model, url):
        prompts = [model.vocab.tokenize("a"), model.vocab.tokenize("k")]
        ask_for = {"prompt": prompts, "temperature": 0}
        texts = [
            [choice["text"] for choice in ask(f"{url}/v1/completions", ask_for | more)["choices"]]
            for more in (
                {"max_tokens": 4},
                {"max_tokens": 60, "stop": ["\n"]},
                {"max_tokens": 40, "stop": ["oabc", "never"]},
                {"max_tokens": 37},
            )
        ]
    circle = "abcdefghij\nklmno" * 4
    assert texts[0] == ["bcde", "lmno"]
    assert texts[1] == ["bcdefghij", "lmnoabcdefghij"]
    assert texts[2] == ["bcdefghij\nklmn", "lmn"]
    assert texts[3] == [circle[1:38], circle[12:49]]


@pytest.mark.parametrize("kind", ["base", "with_bos"])
def test_the_tokenizer_is_the_models_own(kind, request):
    with served(request.getfixturevalue(kind)) as (model, url):
        info = ask(f"{url}/tokenizer_info")
        text = "Häagen <|end|> 12345\n"
        tokens = ask(f"{url}/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        assert tokens == model.vocab.tokenize(text)
        plain = ask(f"{url}/tokenize", {"prompt": "plain 12"})["tokens"]
        assert ask(f"{url}/detokenize", {"tokens": plain})["prompt"].strip() == "plain 12"
        names = {key: None if token is None else model.vocab.name(token)
                 for key, token in (("bos_token", model.vocab.bos), ("eos_token", model.vocab.eos))}  # fmt: skip
        assert info == names | {"chat_template": model.chat_template}


def test_a_wrong_request_is_answered_and_the_server_lives_on(base):
    with served(base) as (_, url):
        for path, content, status in (
            ("/v1/completions", {"prompt": [[5]], "temperature": 1}, 400),
            ("/v1/completions", {"prompt": [[5] * 500], "max_tokens": 4}, 400),
            ("/v1/completions", {}, 400),
            ("/v1/models", {}, 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(f"{url}{path}", content)
            assert caught.value.code == status
            assert json.load(caught.value)["error"]["message"]
        assert ask(f"{url}/tokenize", {"prompt": "plain"})["tokens"]
    with pytest.raises(urllib.error.URLError):
        ask(f"{url}/tokenizer_info")


# -------------------------------------------------------------------------------------------- the harness


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with the task `cloze`: raw prompts from held-out questions, `cloze.jsonl` its items."""
    prompts = [example.prompt for example in examples("clinic", "heldout", 30, seed=3)]
    rows = [{"prompt": prompt, "choices": row["choices"], "answer": row["answer"]}
            for prompt, row in zip(prompts, cloze(30), strict=True)]  # fmt: skip
    data = lines(tmp_path / "cloze.jsonl", *rows)
    (tmp_path / "cloze.yaml").write_text(TASK.format(data=data))
    return tmp_path


@needs_harness
def test_the_harness_finds_the_accuracies_that_tasks_find(base, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out.json"
    argv = ["eval", base, "--tasks", task / "cloze.jsonl", "--harness", "cloze", "--harness-path", task, "--save", out]
    assert main([*map(str, argv), "--cache", str(tmp_path / "cache"), "--threads", "1"]) == 0
    (model,) = json.loads(out.read_text())["models"]
    ours, theirs = model["tasks"]["cloze"], model["harness"]["cloze"]
    assert 0.3 < ours["value"] < 1
    assert theirs["acc,none"] == pytest.approx(ours["value"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["value_by_length"])
    assert "|cloze|" in capsys.readouterr().out


@needs_harness
def test_an_unknown_benchmark_is_refused_in_one_line(base, capsys):
    assert main(["eval", str(base), "--harness", "no_such_benchmark", "--threads", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no_such_benchmark" in line and "lm-eval ls tasks" in line


@needs_harness
def test_ctrl_c_leaves_no_process_behind(base, task):
    argv = ["eval", base, "--harness", "cloze", "--harness-path", task]
    process = subprocess.Popen(
        [sys.executable, "-m", "moegguf", *map(str, argv)], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert found and not any(Path(f"/proc/{pid}").exists() for pid in found)


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_one_line_says_how_to_get_it(base, capsys):
    assert main(["eval", str(base), "--harness", "arc_easy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("run: pip install 'moegguf[harness]'")
