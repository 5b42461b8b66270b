"""Many sequences at once: how likely their tokens are, what may follow each, and how the model goes on greedily.

Each call has a context of its own on the weights of a model. Sequences share its batches, each seeing only itself;
sums then run in another order than for one sequence alone, so results may differ in their last bits, and a greedy
choice between two tokens that are all but equally likely may differ with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from moegguf.runtime.context import MAX_BATCH, MAX_SEQUENCES, Context, Entry, check_fits, groups, max_outputs
from moegguf.runtime.model import Model

_MAX_LOGITS = 2**24  # 64 MB


@dataclass(frozen=True)
class Scored:
    """How likely the tokens of one sequence are, each after those before it.

    `logprobs` is float32 (n_scored,), natural logarithms; `is_greedy` bool (n_scored,): no token was likelier.
    """

    logprobs: np.ndarray
    is_greedy: np.ndarray


def score(model: Model, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[Scored]:
    """How likely the tokens of each sequence are, from its token number `starts[i]` on, in the order given.

    The first token of a sequence has nothing before it, so a start of 0 means 1. No sequence is empty. Raises
    UserError for one longer than the context, KeyboardInterrupt at Ctrl-C.
    """
    check_fits(max(map(len, sequences), default=0), model.n_ctx)
    n_outputs = max_outputs(model.vocab.n_tokens)
    n_batch = min(MAX_BATCH, model.n_cells)
    n_sequences = min(MAX_SEQUENCES, n_batch, n_outputs)
    remaining_starts = iter(starts)
    with model.open_context(n_batch=n_batch, n_sequences=n_sequences, n_outputs=n_outputs) as context:
        for group in groups(sequences, n_batch, n_sequences):
            entries = _scoring(group, list(islice(remaining_starts, len(group))))
            yield from _score_group(context, group, entries, n_batch, n_outputs)


def logits(model: Model, sequences: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """The logits after every token of `sequences` that another one follows: float32 (n, n_vocab), batch by batch.

    They come in the order given, at most 64 MB at a time, valid until the next are asked for. Models of one vocabulary
    and one `n_cells` get the same batches. No sequence is empty. Raises UserError for one longer than the
    context, KeyboardInterrupt at Ctrl-C.
    """
    check_fits(max(map(len, sequences), default=0), model.n_ctx)
    n_outputs = max(1, min(MAX_BATCH, _MAX_LOGITS // model.vocab.n_tokens))
    n_batch = min(MAX_BATCH, model.n_cells)
    n_sequences = min(MAX_SEQUENCES, n_batch, n_outputs)
    with model.open_context(n_batch=n_batch, n_sequences=n_sequences, n_outputs=n_outputs) as context:
        for group in groups(sequences, n_batch, n_sequences):
            context.forget()
            for batch in _batches(_scoring(group, [1] * len(group)), n_batch, n_outputs):
                context.decode(batch)
                yield context.logits()


def _scoring(group: list[Sequence[int]], starts: list[int]) -> list[Entry]:
    """All tokens of some sequences; output is asked of each that precedes a token to score."""
    return [
        Entry(token, position, number, max(start, 1) <= position + 1 < len(tokens))
        for number, (tokens, start) in enumerate(zip(group, starts, strict=True))
        for position, token in enumerate(tokens)
    ]


def _score_group(
    context: Context, group: list[Sequence[int]], entries: list[Entry], n_batch: int, n_outputs: int
) -> Iterator[Scored]:
    logprobs: list[list[float]] = [[] for _ in group]
    is_greedy: list[list[bool]] = [[] for _ in group]
    context.forget()
    for batch in _batches(entries, n_batch, n_outputs):
        context.decode(batch)
        asked = [entry for entry in batch if entry.has_output]
        for entry, logits in zip(asked, context.logits(), strict=True):
            following = group[entry.sequence][entry.position + 1]
            logprobs[entry.sequence].append(_logprob(logits, following))
            is_greedy[entry.sequence].append(logits[following] == logits.max())
    for chances, greedy in zip(logprobs, is_greedy, strict=True):
        yield Scored(np.array(chances, np.float32), np.array(greedy, bool))


def _batches(entries: list[Entry], n_batch: int, n_outputs: int) -> Iterator[list[Entry]]:
    """`entries` in order, in lists of at most so many entries and outputs."""
    batch: list[Entry] = []
    asked = 0
    for entry in entries:
        if len(batch) == n_batch or asked + entry.has_output > n_outputs:
            yield batch
            batch, asked = [], 0
        batch.append(entry)
        asked += entry.has_output
    yield batch


def _logprob(logits: np.ndarray, token: int) -> float:
    """log softmax. The largest logit is subtracted before anything is exponentiated; the sum is kept in float64."""
    largest = logits.max()
    return float(logits[token] - largest) - float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))


def generate_greedy(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, ends: Callable[[int], bool]
) -> Iterator[tuple[int, list[int]]]:
    """How the model goes on after each prompt when it always takes the likeliest token: (index of the prompt, tokens).

    An answer ends before the first token that `ends`, or after `max_tokens`. As one ends, the next prompt takes its
    place, so answers come in the order in which they end. No prompt is empty. Raises UserError for one that leaves no
    room for `max_tokens` in the context, KeyboardInterrupt at Ctrl-C.
    """
    check_fits(max(map(len, prompts), default=0) + max_tokens, model.n_ctx)
    n_batch = min(MAX_BATCH, model.n_cells)
    n_sequences = min(MAX_SEQUENCES, n_batch, max_outputs(model.vocab.n_tokens))
    free = list(range(n_sequences))
    running: dict[int, _Answer] = {}
    waiting = [_Answer(index, prompt, max_tokens) for index, prompt in enumerate(prompts)][::-1]
    with model.open_context(n_batch=n_batch, n_sequences=n_sequences, n_outputs=n_sequences) as context:
        while waiting or running:
            while waiting and free and _fit([*running.values(), waiting[-1]], model.n_cells):
                running[free.pop()] = waiting.pop()
            for sequence, token in _step(context, running, n_batch):
                answer = running[sequence]
                if answer.take(token, ends):
                    del running[sequence]
                    free.append(sequence)
                    context.forget(sequence)
                    yield answer.index, answer.tokens


@dataclass
class _Answer:
    """An answer in the making. `unseen` are the tokens that the model has yet to evaluate."""

    index: int
    prompt: Sequence[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    unseen: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.unseen = list(self.prompt)

    @property
    def n_cells(self) -> int:
        """The cells that it may come to take."""
        return len(self.prompt) + self.max_tokens

    def next_entries(self, sequence: int, room: int) -> list[Entry]:
        """At most `room` of its unseen tokens, from now on seen; the last of them all asks for output."""
        position = len(self.prompt) + len(self.tokens) - len(self.unseen)
        taken, self.unseen = self.unseen[:room], self.unseen[room:]
        return [
            Entry(token, position + i, sequence, not self.unseen and i == len(taken) - 1)
            for i, token in enumerate(taken)
        ]

    def take(self, token: int, ends: Callable[[int], bool]) -> bool:
        """Go on with `token`, unless it ends the answer. Returns whether the answer is complete."""
        if ends(token):
            return True
        self.tokens.append(token)
        self.unseen = [token]
        return len(self.tokens) == self.max_tokens


def _fit(answers: Sequence[_Answer], n_cells: int) -> bool:
    return sum(answer.n_cells for answer in answers) <= n_cells


def _step(context: Context, running: dict[int, _Answer], n_batch: int) -> list[tuple[int, int]]:
    """Evaluate one batch: the last token of every answer first, then prompts as far as there is room.

    Returns (sequence, likeliest next token) of those that were evaluated to their end.
    """
    entries: list[Entry] = []
    for sequence, answer in sorted(running.items(), key=lambda item: len(item[1].unseen)):
        entries += answer.next_entries(sequence, n_batch - len(entries))
    context.decode(entries)
    asked = [entry.sequence for entry in entries if entry.has_output]
    return [(sequence, int(row.argmax())) for sequence, row in zip(asked, context.logits(), strict=True)]
