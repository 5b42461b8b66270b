"""Likelihoods and greedy answers of many sequences at once, against one at a time."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from conftest import CLOSE, build_mix, distance, logits
from ctrl_c import pressing_ctrl_c
from moegguf.errors import UserError
from moegguf.runtime import batch
from moegguf.runtime.batch import generate_greedy, score
from moegguf.runtime.log import llama_log
from moegguf.runtime.model import Model, RunOptions, open_model
from moegguf.runtime.sampling import Sampling
from tiny_gguf import END, N_VOCAB, babbling, repeating, saying, write_gguf

EXACT = RunOptions(threads=1, kv_type=GGMLQuantizationType.F32)
NOISY = {"mode": "noisy", "k": 2, "std": 0.05, "seed": 11}
GREEDY = Sampling(temp=0)


def sequences(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, 400, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def mix(family, tmp_path_factory) -> Path:
    models = family("llama3_like", dtype="f32")
    return build_mix(tmp_path_factory.mktemp("batch") / "mix.gguf", models.base, models.experts, router=NOISY)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


# --- scores ---


def test_scores_are_the_log_softmax_of_the_logits(mix: Path):
    texts, starts = sequences(30, 2, 14, 1), [0, 1, 9, 0]
    with open_model(mix, EXACT) as model:
        scored = list(score(model, texts, starts))
    for text, start, found in zip(texts, starts, scored, strict=True):
        first = max(start, 1)
        every = log_softmax(logits(mix, text))
        expected = every[np.arange(first - 1, len(text) - 1), text[first:]]
        assert found.logprobs.dtype == np.float32 and found.is_greedy.dtype == bool
        assert found.logprobs.shape == expected.shape
        assert not len(expected) or distance(found.logprobs, expected) < CLOSE


def test_small_batches_and_few_outputs_give_the_same_scores(mix: Path, monkeypatch):
    texts, starts = sequences(40, 7, 25, 3, 11), [5, 0, 24, 1, 2]
    with open_model(mix, EXACT) as model:
        expected = list(score(model, texts, starts))
        monkeypatch.setattr(batch, "MAX_BATCH", 16)
        monkeypatch.setattr(batch, "max_outputs", lambda n_vocab: 5)
        found = list(score(model, texts, starts))
    for a, b in zip(expected, found, strict=True):
        assert distance(a.logprobs, b.logprobs) < CLOSE


def test_a_greedy_answer_scores_as_greedy(mix: Path):
    (prompt,) = sequences(6)
    with open_model(mix, EXACT) as model:
        answer = list(itertools.islice(model.generate(prompt, GREEDY), 5))
        altered = [*answer[:2], (answer[2] + 1) % 400, *answer[3:]]
        greedy, other = score(model, [[*prompt, *answer], [*prompt, *altered]], [6, 6])
    assert greedy.is_greedy.all()
    assert other.is_greedy.tolist()[:3] == [True, True, False]
    assert (greedy.logprobs <= 0).all()


def test_large_logits_neither_overflow_nor_vanish(tmp_path: Path):
    """Of two tokens that are equally likely, each has half; the rest is e^-1790 away."""
    chain = np.zeros((N_VOCAB, N_VOCAB), np.float32)
    chain[[1, 2]] = 100
    with open_model(write_gguf(tmp_path / "m.gguf", chain), RunOptions(threads=1)) as model:
        (found,) = score(model, [[5, 1, 2, 3]], [1])
    assert found.logprobs[:2] == pytest.approx(np.log(0.5))
    assert -1800 < found.logprobs[2] < -1700
    assert found.is_greedy.tolist() == [True, True, False]


def test_a_text_longer_than_the_context_is_refused(mix: Path):
    with open_model(mix, RunOptions(ctx=32, threads=1)) as model:
        with pytest.raises(UserError, match="33 tokens, the context holds 32"):
            list(score(model, sequences(3, 33), [0, 0]))
        with pytest.raises(UserError, match="33 tokens, the context holds 32"):
            list(generate_greedy(model, sequences(3, 13), 20, lambda token: False))
        assert len(list(score(model, sequences(32), [0]))) == 1


# --- answers ---


def one_at_a_time(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, ends) -> dict[int, list[int]]:
    def answer(prompt: Sequence[int]) -> list[int]:
        tokens = itertools.islice(model.generate(prompt, GREEDY), max_tokens)
        return list(itertools.takewhile(lambda token: not ends(token), tokens))

    return {index: answer(prompt) for index, prompt in enumerate(prompts)}


@pytest.mark.parametrize(("n_sequences", "n_batch"), [(32, 512), (3, 512), (1, 512), (4, 8)])
def test_answers_are_those_of_one_prompt_at_a_time(mix: Path, monkeypatch, n_sequences: int, n_batch: int):
    prompts = sequences(5, 30, 1, 12, 8, 2, 19, 3)
    monkeypatch.setattr(batch, "MAX_SEQUENCES", n_sequences)
    monkeypatch.setattr(batch, "MAX_BATCH", n_batch)

    def ends(token: int) -> bool:
        return token % 7 == 0

    with open_model(mix, EXACT) as model:
        expected = one_at_a_time(model, prompts, 12, ends)
        assert len({len(answer) for answer in expected.values()}) > 2, "they are to end at different times"
        assert dict(generate_greedy(model, prompts, 12, ends)) == expected


def test_prompts_wait_until_the_context_has_room(mix: Path):
    """16 answers of 40 tokens each share 64 cells: one at a time."""
    prompts = sequences(*[10] * 16)
    with open_model(mix, RunOptions(ctx=64, threads=1, kv_type=GGMLQuantizationType.F32)) as model:
        expected = one_at_a_time(model, prompts, 30, lambda token: False)
        assert dict(generate_greedy(model, prompts, 30, lambda token: False)) == expected


def test_the_end_token_is_not_part_of_an_answer(tmp_path: Path):
    with open_model(write_gguf(tmp_path / "m.gguf", saying("xyz")), RunOptions(threads=1)) as model:
        prompts = [model.vocab.tokenize(text) for text in ("<|user|>q<|assistant|>", "<|assistant|>x", "z")]
        answers = dict(generate_greedy(model, prompts, 10, model.vocab.ends_answer))
        assert {index: bytes(answer) for index, answer in answers.items()} == {0: b"xyz", 1: b"yz", 2: b""}
        kept = dict(generate_greedy(model, prompts[:1], 10, lambda token: False))
        assert kept[0][3] == END and len(kept[0]) == 10


def test_no_prompts_give_no_answers(mix: Path):
    with open_model(mix, EXACT) as model:
        assert list(generate_greedy(model, [], 10, model.vocab.ends_answer)) == []
        assert list(score(model, [], [])) == []


def test_the_model_goes_on_undisturbed(tmp_path: Path):
    with open_model(write_gguf(tmp_path / "m.gguf", repeating("abc")), RunOptions(threads=1)) as model:
        stream = model.generate(model.vocab.tokenize("<|assistant|>"), GREEDY)
        said = list(itertools.islice(stream, 2))
        dict(generate_greedy(model, [[5], [6]], 3, model.vocab.ends_answer))
        list(score(model, [[5, 6]], [0]))
        assert bytes(said + list(itertools.islice(stream, 3))) == b"abcab"


def test_ctrl_c_ends_it_and_leaves_the_model_usable(tmp_path: Path):
    with open_model(write_gguf(tmp_path / "m.gguf", babbling()), RunOptions(threads=1)) as model:
        with pressing_ctrl_c():
            list(generate_greedy(model, [[7]] * 10_000, 200, lambda token: False))
        assert len(dict(generate_greedy(model, [[7]] * 3, 5, lambda token: False))) == 3


class PressOnce:
    """A stderr whose first line presses Ctrl-C."""

    def __init__(self) -> None:
        self.was_pressed = False

    def write(self, text: str) -> None:
        if not self.was_pressed:
            self.was_pressed = True
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_llama_cpp_writes_its_log_is_not_lost(tmp_path: Path, monkeypatch):
    """An exception raised in a callback of C is lost, so a key press is kept until the call is over."""
    path = write_gguf(tmp_path / "m.gguf", babbling())
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", PressOnce())
        with pytest.raises(KeyboardInterrupt):
            open_model(path, RunOptions(threads=1, verbose=True))
    with open_model(path, RunOptions(threads=1)) as model, monkeypatch.context() as patch:
        patch.setattr(llama_log(), "_verbose", True)
        patch.setattr("sys.stderr", PressOnce())
        with pytest.raises(KeyboardInterrupt):
            list(score(model, [[5, 6]], [0]))
