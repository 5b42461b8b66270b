"""How fast a file runs here: prompts and generation in tokens per second, loading, memory.

What is measured is what llama-bench measures (tools/llama-bench of llama.cpp), so that numbers can stand side by side:
random tokens, no sampling, an empty cache before each run, one run to warm up, then the mean over repetitions of tokens
per second with its standard deviation. A prompt is evaluated in batches of 512, output for its last token alone; in
generation tokens are evaluated one by one.

The time to a first token is that of a prompt: its output is what the first token is drawn from.

Resident memory is how much this process grew from before loading to after the last run, so a mapped file counts as far
as it was touched.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from moegguf.errors import UserError
from moegguf.gguf_header import whole
from moegguf.runtime.context import Context, Entry
from moegguf.runtime.model import Model, RunOptions, open_model
from moegguf.runtime.offload import demand_of

Progress = Callable[[int], None]
"""Hears how many tokens have just been evaluated."""


@dataclass(frozen=True)
class Rate:
    """The runs of one length, in seconds each."""

    n_tokens: int
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Tokens per second: the mean of what the runs gave."""
        return statistics.fmean(self._rates)

    @property
    def spread(self) -> float:
        """Their standard deviation; 0 for a single run."""
        return statistics.stdev(self._rates) if len(self.seconds) > 1 else 0.0

    @property
    def _rates(self) -> list[float]:
        return [self.n_tokens / seconds for seconds in self.seconds]


@dataclass(frozen=True)
class Bench:
    """What was measured of one file, `prompts` and `generations` in the order in which they were asked for."""

    path: Path
    load_seconds: float
    prompts: tuple[Rate, ...]
    generations: tuple[Rate, ...]
    resident: int
    """Bytes."""
    touched: int
    """Bytes of weights that are read for a generated token."""

    @property
    def bandwidth(self) -> float:
        """Bytes of weights per second that the fastest generation read; 0 without one."""
        return self.touched * max((rate.mean for rate in self.generations), default=0.0)


@dataclass(frozen=True)
class Lengths:
    """What to run: prompts and generations of so many tokens, each `repeat` times."""

    prompts: tuple[int, ...]
    generations: tuple[int, ...]
    repeat: int

    @property
    def longest(self) -> int:
        return max(self.prompts + self.generations)

    @property
    def n_tokens(self) -> int:
        """All that will be evaluated, the warm-up included."""
        return self.repeat * sum(self.prompts + self.generations) + _warm_up(self.prompts) + bool(self.generations)


def bench(path: Path, options: RunOptions, lengths: Lengths, progress: Progress = lambda n: None) -> Bench:
    """Measure the GGUF at `path`. Raises UserError as `open_model` does, and for lengths beyond the model's context."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with open_model(path, replace(options, ctx=options.ctx or lengths.longest)) as model:
        load_seconds = time.perf_counter() - start
        _check_trained(model, lengths)
        with model.open_context(n_batch=options.batch, n_sequences=1, n_outputs=1) as context:
            runs = _Runs(context, model.vocab.n_tokens, options.batch, progress)
            runs.prompt(_warm_up(lengths.prompts))
            runs.generation(1 if lengths.generations else 0)
            prompts = tuple(_repeated(runs.prompt, n, lengths.repeat) for n in lengths.prompts)
            generations = tuple(_repeated(runs.generation, n, lengths.repeat) for n in lengths.generations)
        resident = psutil.Process().memory_info().rss - before
        demand = demand_of(whole(model.header), experts_used=options.experts_used, kv_cache=0)
    touched = round(sum(weight.touched for weight in demand.weights))
    return Bench(path, load_seconds, prompts, generations, resident, touched)


def _warm_up(prompts: Sequence[int]) -> int:
    return max(prompts, default=0)


def _check_trained(model: Model, lengths: Lengths) -> None:
    trained = model.header.get(f"{model.header.get('general.architecture')}.context_length", lengths.longest)
    if lengths.longest > trained:
        raise UserError(f"{model.name}: its context is {trained} tokens, {lengths.longest} were asked for", "ask fewer")


def _repeated(run: Callable[[int], float], n_tokens: int, repeat: int) -> Rate:
    return Rate(n_tokens, tuple(run(n_tokens) for _ in range(repeat)))


class _Runs:
    """Runs on one context; each returns its seconds."""

    def __init__(self, context: Context, n_vocab: int, n_batch: int, progress: Progress) -> None:
        self._context, self._n_vocab, self._n_batch, self._progress = context, n_vocab, n_batch, progress
        self._random = random.Random(0)

    def prompt(self, n_tokens: int) -> float:
        entries = [self._entry(position, position == n_tokens - 1) for position in range(n_tokens)]
        return self._timed([entries[at : at + self._n_batch] for at in range(0, n_tokens, self._n_batch)])

    def generation(self, n_tokens: int) -> float:
        return self._timed([[self._entry(position, has_output=True)] for position in range(n_tokens)])

    def _timed(self, batches: Sequence[Sequence[Entry]]) -> float:
        self._context.forget()
        start = time.perf_counter()
        for batch in batches:
            self._context.decode(batch)
            self._context.logits()
            self._progress(len(batch))
        return time.perf_counter() - start

    def _entry(self, position: int, has_output: bool) -> Entry:
        return Entry(self._random.randrange(self._n_vocab), position, 0, has_output)
