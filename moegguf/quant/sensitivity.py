"""How much of each tensor's output is lost in each type that it could have.

Purpose: numbers that make types and tensors comparable, so that bits can go where they matter. For a weight W with
inputs x, what counts is not the error of W but of W x. With the mean squares d_j of the inputs (an imatrix) that is

    error = Σ_ij d_j (Ŵ_ij - W_ij)² / Σ_ij d_j W_ij²

relative to the power of the output; without an imatrix all d_j are equal and cancel out. Ŵ are the very values that a
build writes: rows that pass through unchanged have no error.

Experts add up before anything else sees them, and so do their errors and outputs: with shares a_e, both sums become
those of Σ_e a_e √d_e,j Ŵ_e,ij. Outputs of fine-tunes are much alike and errors hardly, so N experts are left with about
1/N of the error of one. Where a router picks k of N, each pair counts as often as it is picked together.

Method: an even sample of rows of every part, the same rows of each expert, is quantised to each candidate type.

Invariant: which rows are sampled depends on shapes only, so the same sources give the same numbers.

Not done: correlations between inputs (an imatrix is a diagonal), errors that come from llama.cpp quantising the inputs
as it computes, and how far an error at one place moves the logits (`moegguf.quant.influence`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from moegguf.mix import FFN_ROLES, Mix
from moegguf.quant import ggml
from moegguf.quant.presets import preset, requires_imatrix
from moegguf.quant.rows import make_rows
from moegguf.tensor import Part, Planned, Slot
from moegguf.watch import Progress, unheard

SAMPLE_ROWS = 64
"""Rows that stand for one part of a tensor."""
SAMPLE_WEIGHTS = 1 << 18
"""Weights that are enough however long the rows are, as long as they are `FEWEST_ROWS` rows."""
FEWEST_ROWS = 8

_CANDIDATES = (
    Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_K, Type.IQ4_XS, Type.Q3_K, Type.IQ3_S, Type.IQ3_XXS,
    Type.Q2_K, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS,
)  # fmt: skip
_CANDIDATES_OF_SHORT_ROWS = (
    Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.IQ4_NL, Type.Q4_0,
)  # fmt: skip
"""In place of the others where their blocks of 256 weights do not divide the rows."""
_SUPER_BLOCK = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Sensitivity:
    """What one tensor loses in each of several types, as a share of the power of its output.

    `errors[type]` is the error as it arrives in the output of the mix; `part_errors[type]` has that of each part on its
    own. `power` is the mean squared length of the output, for an embedding that of a row; without an importance, where
    `is_weighted` is False, that of the output for inputs of mean square 1. `n_rows` are those of one part.
    """

    slot: Slot
    errors: Mapping[Type, float]
    part_errors: Mapping[Type, tuple[float, ...]]
    power: float
    is_weighted: bool

    @property
    def n_rows(self) -> int:
        return self.slot.bands[0][0].tensor.n_rows


def candidates(slot: Slot) -> tuple[Type, ...]:
    """The types that `slot` may have: 16 bits as its sources have them, types whose blocks divide its rows, and none
    that is garbage without the importance that it lacks."""
    is_bf16 = all(part.tensor.type is Type.BF16 for part in slot.parts)
    types = _CANDIDATES if slot.n_cols % _SUPER_BLOCK == 0 else _CANDIDATES_OF_SHORT_ROWS
    types = (Type.BF16 if is_bf16 else Type.F16, *types)
    is_important = all(part.importance is not None for part in slot.parts)
    return tuple(
        type
        for type in types
        if slot.n_cols % GGML_QUANT_SIZES[type][0] == 0 and (is_important or not _needs_importance(slot.name, type))
    )


def _needs_importance(name: str, type: Type) -> bool:
    """Whether tensor `name` cannot be `type`, or is garbage in it, without an importance."""
    return ggml.requires_importance(type) or requires_imatrix(name, type, preset("Q4_K_M"))


def measure(slots: Sequence[Slot], mix: Mix, *, threads: int, progress: Progress = unheard) -> dict[str, Sensitivity]:
    """The sensitivity of each of `slots` to each of its candidate types, by tensor name.

    Reads a sample of the weights, in `threads` threads. Raises UserError for weights that cannot be used.
    """
    return measure_types([(slot, candidates(slot)) for slot in slots], mix, threads=threads, progress=progress)


def measure_planned(planned: Sequence[Planned], mix: Mix, *, threads: int) -> dict[str, Sensitivity]:
    """As `measure`, but each tensor in the one type that it is to have."""
    return measure_types([(tensor.slot, (tensor.type,)) for tensor in planned], mix, threads=threads)


def measure_types(
    asked: Sequence[tuple[Slot, Sequence[Type]]], mix: Mix, *, threads: int, progress: Progress = unheard
) -> dict[str, Sensitivity]:
    """As `measure`, but each tensor in the types that are asked for it."""
    numbers, together = _expert_numbers(mix), _together(mix)
    measured = {}
    for sensitivity in _in_threads(lambda each, stop: _measure(*each, numbers, together, stop), asked, threads):
        measured[sensitivity.slot.name] = sensitivity
        progress(1)
    return measured


def _expert_numbers(mix: Mix) -> dict[int, int]:
    """Whose a tensor is: the `id` of an FFN tensor → the number of the expert."""
    return {
        id(expert.ffn(layer, role)): number
        for number, expert in enumerate(mix.experts)
        for layer in mix.layers
        for role in FFN_ROLES
    }


def _together(mix: Mix) -> np.ndarray:
    """(n_expert, n_expert): how much a product of the outputs of two experts counts in the squared output of the mix.

    That is a_e a_f times how often both run for a token: always in a gate-less mix, else as if k were drawn at random.
    """
    router, n = mix.router, len(mix.experts)
    if router.is_gateless:
        weights = np.array([expert.weight for expert in mix.experts])
        return np.outer(weights, weights)
    is_fixed = np.array([expert.name == router.always_on for expert in mix.experts])
    k, m = router.k - is_fixed.sum(), n - is_fixed.sum()
    one = np.where(is_fixed, 1.0, k / max(m, 1))
    both = np.where(is_fixed[:, None] | is_fixed, np.outer(one, one), k * (k - 1) / max(m * (m - 1), 1))
    np.fill_diagonal(both, one)
    return both / router.k**2


def _in_threads(
    work: Callable[[T, threading.Event], Sensitivity], todo: Iterable[T], threads: int
) -> Iterator[Sensitivity]:
    """The results in order; a few at a time are in memory. What is under way hears when nobody waits any more."""
    waiting: deque[Future[Sensitivity]] = deque()
    stop = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sample")
    try:
        for each in todo:
            waiting.append(pool.submit(work, each, stop))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _measure(
    slot: Slot, types: Iterable[Type], numbers: Mapping[int, int], together: np.ndarray, stop: threading.Event
) -> Sensitivity:
    """Raises CancelledError soon after `stop` is set: all types of a wide tensor take many seconds."""
    bands = [tuple(_sample(part, slot.n_cols) for part in band) for band in slot.bands]
    counts = _counts([numbers.get(id(part.tensor)) for part in slot.parts], together)
    exact = _outputs(slot, bands, Type.F32, stop)
    powers = _products(exact)
    power = float((counts * powers).sum() / counts.sum())  # of the whole mix, where these are some of its experts
    errors, part_errors = {}, {}
    for type in types:
        found = _outputs(slot, bands, type, stop)
        losses = _products([stored - wanted for stored, wanted in zip(found, exact, strict=True)])
        errors[type] = max(0.0, float((counts * losses).sum() / power)) if power else 0.0
        part_errors[type] = tuple(map(_share, np.diag(losses), np.diag(powers)))
    is_weighted = all(part.importance is not None for part in slot.parts)
    rows_for_each = 1 if slot.name == "token_embd.weight" else slot.bands[0][0].tensor.n_rows
    whole_power = power * rows_for_each / bands[0][0].tensor.n_rows
    return Sensitivity(slot, errors, part_errors, whole_power, is_weighted)


def _counts(experts: Sequence[int | None], together: np.ndarray) -> np.ndarray:
    """How much a product of the outputs of two parts counts. Parts that are no whole expert's stand side by side."""
    return np.eye(len(experts)) / len(experts) if None in experts else together[np.ix_(experts, experts)]


def _products(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """(n_parts, n_parts), each with each; with itself only where other rows were sampled of another."""
    if len({len(output) for output in outputs}) == 1:
        stacked = np.stack(outputs)
        return (stacked @ stacked.T).astype(np.float64)
    return np.diag([float(output @ output) for output in outputs])


def _share(loss: float, power: float) -> float:
    return float(loss / power) if power else 0.0


def _sample(part: Part, n_cols: int) -> Part:
    """`part` with an even sample of its rows, read into memory."""
    n_rows = part.tensor.n_rows
    n = min(n_rows, SAMPLE_ROWS, max(FEWEST_ROWS, SAMPLE_WEIGHTS // n_cols))
    rows = np.concatenate([part.tensor.read_rows(at, at + 1) for at in np.arange(n) * n_rows // n])
    shape = (n, part.tensor.n_cols)
    return replace(part, tensor=replace(part.tensor, shape=shape, read_rows=lambda start, stop: rows[start:stop]))


def _outputs(slot: Slot, bands: Sequence[tuple[Part, ...]], type: Type, stop: threading.Event) -> list[np.ndarray]:
    """float32 (n_sampled · n_cols,): the sampled weights of each part as a build that writes `type` stores them,
    without the part's factor and times the root of their importance."""
    outputs = []
    for band in bands:
        if stop.is_set():
            raise CancelledError
        rows, _ = make_rows(Planned(slot, type), band, 0, band[0].tensor.n_rows)
        values = ggml.dequantise(type, np.ascontiguousarray(rows), slot.n_cols)
        ends = np.cumsum([part.tensor.n_cols for part in band])
        for part, piece in zip(band, np.split(values, ends[:-1], axis=1), strict=True):
            root = 1 if part.importance is None else np.sqrt(part.importance)
            outputs.append((piece * (root / np.float32(part.scale))).ravel())
    return outputs
