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

from moegguf.checks import LARGEST, check_range
from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header, whole
from moegguf.runtime.bandwidth import memory_bandwidth
from moegguf.runtime.context import Context, Entry
from moegguf.runtime.machine import physical_cores
from moegguf.runtime.model import open_model
from moegguf.runtime.offload import demand_of
from moegguf.runtime.run_options import MIN_CTX, RunOptions, hparam
from moegguf.watch import Progress, Watch, unheard

PROMPTS, ANSWERS = (128, 512), (32, 128)
"""Lengths that are run where none are given, or the model's context where that is shorter."""
LONGEST = 1 << 20


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

    def as_json(self) -> dict:
        def rates(of: Sequence[Rate]) -> list[dict]:
            return [
                {"tokens": rate.n_tokens, "tokens_per_s": rate.mean, "stdev": rate.spread, "seconds": rate.seconds}
                for rate in of
            ]

        return {
            "file": str(self.path),
            "prompts": rates(self.prompts),
            "generations": rates(self.generations),
            "first_token_seconds": {rate.n_tokens: rate.n_tokens / rate.mean for rate in self.prompts},
            "load_seconds": self.load_seconds,
            "resident_bytes": self.resident,
            "touched_bytes_per_token": self.touched,
            "bytes_per_s": self.bandwidth,
        }


@dataclass(frozen=True)
class Speeds:
    """Files measured one after the other, on a machine whose memory reads `stream` bytes in a second."""

    stream: float
    models: tuple[Bench, ...]

    def as_json(self) -> dict:
        return {"stream_bytes_per_s": self.stream, "models": [each.as_json() for each in self.models]}


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


def bench_all(
    paths: Sequence[Path],
    options: RunOptions,
    watch: Watch,
    *,
    prompts: Sequence[int] | None = None,
    generations: Sequence[int] | None = None,
    repeat: int = 5,
) -> Speeds:
    """Measure each file, with the same prompts and generations, of so many tokens. Raises UserError as `bench` does."""
    check_range("--repeat", repeat, 1)
    headers = [read_header(path) for path in paths]
    longest = min(hparam(header, "context_length", LARGEST) for header in headers)
    lengths = Lengths(
        _lengths("--prompt", prompts, PROMPTS, longest), _lengths("--generate", generations, ANSWERS, longest), repeat
    )
    if not lengths.prompts + lengths.generations:
        raise UserError("--prompt 0 and --generate 0 leave nothing to measure", "leave one of them out")
    check_range("--ctx", options.ctx, lengths.longest)
    for header in headers:
        _check_trained(header, lengths)
    stream = memory_bandwidth(options.threads or physical_cores())
    found = []
    for path in paths:
        with watch(path.name, "tokens") as step:
            step.has(lengths.n_tokens)
            found.append(bench(path, options, lengths, step.did))
    return Speeds(stream, tuple(found))


def bench(path: Path, options: RunOptions, lengths: Lengths, progress: Progress = unheard) -> Bench:
    """Measure the GGUF at `path`. Raises UserError as `open_model` does."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with open_model(path, replace(options, ctx=options.ctx or max(lengths.longest, MIN_CTX))) as model:
        load_seconds = time.perf_counter() - start
        with model.open_context(n_batch=options.batch, n_sequences=1, n_outputs=1) as context:
            runs = _Runs(context, model.vocab.n_tokens, options.batch, progress)
            runs.prompt(_warm_up(lengths.prompts))
            runs.generation(1 if lengths.generations else 0)
            measured = tuple(_repeated(runs.prompt, n, lengths.repeat) for n in lengths.prompts)
            generated = tuple(_repeated(runs.generation, n, lengths.repeat) for n in lengths.generations)
        resident = psutil.Process().memory_info().rss - before
        demand = demand_of(whole(model.header), experts_used=options.experts_used, kv_cache=0)
    touched = round(sum(weight.touched for weight in demand.weights))
    return Bench(path, load_seconds, measured, generated, resident, touched)


def _lengths(flag: str, asked: Sequence[int] | None, default: Sequence[int], longest: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(dict.fromkeys(min(n, longest) for n in default))
    for n in asked:
        check_range(flag, n, 0, LONGEST)
    return tuple(n for n in asked if n)


def _warm_up(prompts: Sequence[int]) -> int:
    return max(prompts, default=0)


def _check_trained(header: Header, lengths: Lengths) -> None:
    trained = hparam(header, "context_length", lengths.longest)
    if lengths.longest > trained:
        raise UserError(
            f"{header.path.name}: its context is {trained} tokens, {lengths.longest} were asked for", "ask fewer"
        )


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
