"""How a model does on the items of a task: answers it, or says how likely the answers are.

Works on any `Engine`: an object that turns records into tokens, scores tokens and continues prompts greedily.
llama.cpp is one, PyTorch can be another; their outcomes are comparable, item by item.

- *Exact match*: the greedy answer to the item's question equals the expected one, blanks around both removed. Through
  a chat template an answer ends with the turn. A raw prompt's continuation has no such end, so as many lines of it
  are compared as the expected answer has.
- *Multiple choice*: the sum of log p over the tokens of each choice, given the question; the largest sum wins, and
  in a second figure the largest sum divided by the choice's length in characters (`acc` and `acc_norm` of
  lm-evaluation-harness).
- *Perplexity*: every token is scored once. A text longer than the context is cut into windows that hold nothing of
  each other, except that a window begins with the token before it, or with BOS where the model has one. Of a
  record with a prompt, what follows the prompt counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from moegguf.errors import UserError
from moegguf.measurement.tasks import Choice, Metric, Task, answer_of
from moegguf.texts import Chat, Completion, Record

MIN_ANSWER = 16
"""Tokens that an answer may take whatever the expected one takes."""


class Encoded(Protocol):
    """A record in tokens, the first `n_prompt` of which are given."""

    tokens: Sequence[int]
    n_prompt: int


class Scored(Protocol):
    """log p of each token from the asked one on, float (n_scored,)."""

    logprobs: np.ndarray


class Engine(Protocol):
    """A model that can be asked. `bos` begins a sequence, None where nothing does."""

    n_ctx: int
    bos: int | None

    def encode(self, record: Record) -> Encoded: ...

    def encode_prompt(self, record: Chat | Completion) -> Sequence[int]:
        """What comes before the answer, as the model sees it when it is to give one."""

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterable[Scored]:
        """The scores of each sequence from its token `starts[i]` on, in order."""

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterable[tuple[int, str]]:
        """(number of the prompt, what the model says to it), in any order."""


@dataclass(frozen=True, slots=True)
class Answered:
    said: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class Chosen:
    """log p of every choice, and which of them is likeliest: as a whole, and per character."""

    logprobs: tuple[float, ...]
    is_right: bool
    is_right_by_length: bool


@dataclass(frozen=True, slots=True)
class Weighed:
    """Per window: −Σ log p in nats, and the number of tokens that it sums over."""

    nlls: tuple[float, ...]
    n_tokens: tuple[int, ...]


Outcome = Answered | Chosen | Weighed


def outcomes(
    engine: Engine, task: Task, todo: Sequence[int], max_tokens: int | None = None
) -> Iterator[tuple[int, Outcome]]:
    """(number of the item, its outcome) for the items `todo` of `task`, as they come.

    `max_tokens` limits an answer; by default twice what the longest expected one takes, or `MIN_ANSWER` if that is
    more. Raises UserError for an item that does not fit the context.
    """
    if not todo:
        return iter(())
    return _ASK[task.metric](engine, task, todo, max_tokens)


def _answers(engine: Engine, task: Task, todo: Sequence[int], max_tokens: int | None) -> Iterator[tuple[int, Answered]]:
    encoded = [engine.encode(task.items[i]) for i in todo]
    expected = max(len(each.tokens) - each.n_prompt for each in encoded)
    prompts = [engine.encode_prompt(task.items[i]) for i in todo]
    longest = max(range(len(todo)), key=lambda i: len(prompts[i]))
    room = engine.n_ctx - len(prompts[longest])
    if room < expected:
        raise UserError(
            f"{task.items[todo[longest]].where}: its prompt takes {len(prompts[longest])} tokens and an answer up to "
            f"{expected}, the context holds {engine.n_ctx}",
            "shorten it, or take a larger --ctx",
        )
    for i, said in engine.generate_greedy(prompts, min(max_tokens or max(MIN_ANSWER, 2 * expected), room)):
        item = task.items[todo[i]]
        yield todo[i], Answered(said, _is_right(item, said))


def _is_right(item: Chat | Completion, said: str) -> bool:
    expected, said = answer_of(item).strip(), said.strip()
    if isinstance(item, Completion):
        said = "\n".join(said.split("\n")[: expected.count("\n") + 1]).strip()
    return said == expected


def _choices(engine: Engine, task: Task, todo: Sequence[int], _: int | None) -> Iterator[tuple[int, Chosen]]:
    items: list[Choice] = [task.items[i] for i in todo]
    encoded = [engine.encode(option) for item in items for option in item.options]
    wheres = (item.where for item in items for _ in item.options)
    for each, where in zip(encoded, wheres, strict=True):
        _check_fits(engine, len(each.tokens), where)
    scored = iter(engine.score([each.tokens for each in encoded], [each.n_prompt for each in encoded]))
    for i, item in zip(todo, items, strict=True):
        sums = [float(np.sum(each.logprobs, dtype=np.float64)) for each in islice(scored, len(item.options))]
        per_character = [total / len(text) for total, text in zip(sums, item.texts, strict=True)]
        yield i, Chosen(tuple(sums), _is_best(sums, item.right), _is_best(per_character, item.right))


def _is_best(scores: Sequence[float], right: int) -> bool:
    """Whether `scores[right]` is the largest; of equal ones the first counts."""
    return max(range(len(scores)), key=scores.__getitem__) == right


def _perplexities(engine: Engine, task: Task, todo: Sequence[int], _: int | None) -> Iterator[tuple[int, Weighed]]:
    cut = []
    for i in todo:
        encoded = engine.encode(task.items[i])
        cut.append(list(windows(encoded.tokens, encoded.n_prompt, engine.n_ctx, engine.bos)))
    flat = [window for pieces in cut for window in pieces]
    scored = iter(engine.score([tokens for tokens, _ in flat], [start for _, start in flat])) if flat else iter(())
    for i, pieces in zip(todo, cut, strict=True):
        logprobs = [each.logprobs for each in islice(scored, len(pieces))]
        nlls = tuple(-float(np.sum(each, dtype=np.float64)) for each in logprobs)
        yield i, Weighed(nlls, tuple(map(len, logprobs)))


def windows(tokens: Sequence[int], start: int, n: int, bos: int | None) -> Iterator[tuple[Sequence[int], int]]:
    """`tokens` in windows of at most `n`: (tokens of the window, number of the first one that counts).

    Every token from number `start` on counts in exactly one window; the very first token, which follows nothing, never.
    """
    at = max(start, 1)
    if at < min(n, len(tokens)):
        yield tokens[:n], at
        at = n
    while at < len(tokens):
        head = tokens[at - 1] if bos is None else bos
        yield (head, *tokens[at : at + n - 1]), 1
        at += n - 1


def _check_fits(engine: Engine, n_tokens: int, where: str) -> None:
    if n_tokens > engine.n_ctx:
        raise UserError(
            f"{where}: takes {n_tokens} tokens, the context holds {engine.n_ctx}", "shorten it, or take a larger --ctx"
        )


_Ask = Callable[[Engine, Task, Sequence[int], int | None], Iterator[tuple[int, Outcome]]]
_ASK: dict[Metric, _Ask] = {
    Metric.EXACT_MATCH: _answers,
    Metric.CHOICE: _choices,
    Metric.PERPLEXITY: _perplexities,
}
