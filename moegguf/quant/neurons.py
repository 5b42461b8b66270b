"""A gate-less FFN as a bag of neurons: which copies of a neuron can be one, at what cost, and how to read the result.

Neuron j of expert e is a gate row, an up row and a down column, and adds a_e · d · silu(g·x) (u·x) to the output. All
experts are fine-tunes of one base, so the N copies of a neuron are alike, and some of them may be merged into one: the
mean of their gate rows and of their up rows, weighted by their shares, and the sum of a_e · d. If all copies of all
neurons are merged, that is the dense FFN of mean weights.

A grouping of a layer is an integer array (N, n_ff): copies of a neuron that have the same number are one neuron; the
number is that of the group's first expert, so 0, 1, … N − 1 down a column is a neuron that is kept N-fold.

What a merge costs is E|Δoutput|² over activations x, exactly for one group alone; errors of different groups are taken
as uncorrelated. Copies are merged by agglomeration, the closest pairs first (complete linkage of what a pair would
cost), so every neuron has a path of N − 1 merges and every width can be met to the neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moegguf.quant import ggml
from moegguf.tensor import Tensor

GRID = (256, 32)
"""Widths are multiples of the first of these that divides the base's: rows of K-quants are multiples of 256."""
CHUNK_VALUES = 1 << 22
"""Activations of one expert's neurons that are in memory at once."""
CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Compaction:
    """What is merged in a mix. Layers that are not among the `groupings` are kept whole.

    `kld` is the measured mean divergence from the mix that is not compacted, in nats, over `n_tokens` tokens.
    """

    groupings: Mapping[int, np.ndarray]
    kld: float | None = None
    n_tokens: int = 0


# ----------------------------------------------------------------------------------------------- groupings


def separate(n: int, n_ff: int) -> np.ndarray:
    """The grouping that keeps all `n` copies of every neuron."""
    return np.repeat(np.arange(n, dtype=np.int8)[:, None], n_ff, axis=1)


def together(n: int, n_ff: int) -> np.ndarray:
    """The grouping that merges all copies of every neuron."""
    return np.zeros((n, n_ff), np.int8)


def width(grouping: np.ndarray) -> int:
    """How many neurons a grouping leaves: each group has one copy that carries its own number."""
    return int((grouping == np.arange(len(grouping))[:, None]).sum())


def grid(n_ff: int) -> int:
    """What all widths are to be multiples of."""
    return next((step for step in GRID if n_ff % step == 0), 1)


def kept(grouping: np.ndarray) -> list[np.ndarray]:
    """For each expert, its neurons that are in no group with others, ascending."""
    sizes = _sizes(grouping)
    return [np.flatnonzero(sizes[expert] == 1) for expert in range(len(grouping))]


def merged(grouping: np.ndarray) -> np.ndarray:
    """The neurons of the groups of two and more, ascending; one that is in two such groups comes twice."""
    return _Merged.of(grouping, np.ones(len(grouping))).neurons


def _sizes(grouping: np.ndarray) -> np.ndarray:
    """(N, n_ff): the size of the group that each copy is in."""
    return (grouping[:, None, :] == grouping[None, :, :]).sum(axis=1)


@dataclass(frozen=True)
class _Merged:
    """Groups of two and more: `neurons` (ascending) and, per expert, its share of the down column in each, or 0."""

    neurons: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, grouping: np.ndarray, shares: Sequence[float]) -> _Merged:
        experts = np.arange(len(grouping))[:, None]
        neurons, first = np.nonzero(((grouping == experts) & (_sizes(grouping) > 1)).T)
        is_in = grouping[:, neurons] == first
        return cls(neurons, np.where(is_in, np.asarray(shares, np.float32)[:, None], np.float32(0)))


# ------------------------------------------------------------------------------------------- lazy tensors


def gather_rows(tensor: Tensor, neurons: np.ndarray) -> Tensor:
    """Rows `neurons` (ascending) of a gate or up projection, in its own type. Spans are read, so each row once."""
    if len(neurons) == tensor.n_rows:
        return tensor

    def read_rows(start: int, stop: int) -> np.ndarray:
        return _span(neurons[start:stop], tensor.read_rows)

    return Tensor(tensor.name, (len(neurons), tensor.n_cols), tensor.type, read_rows, tensor.origin)


def gather_columns(tensor: Tensor, neurons: np.ndarray) -> Tensor:
    """Columns `neurons` of a down projection: in its own type, or decoded where that is made of blocks."""
    if len(neurons) == tensor.n_cols:
        return tensor
    block, size = GGML_QUANT_SIZES[tensor.type]
    type = tensor.type if block == 1 else GGMLQuantizationType.F32

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = tensor.read_rows(start, stop)
        if block > 1:
            return _bytes(ggml.dequantise(tensor.type, rows, tensor.n_cols)[:, neurons])
        return np.ascontiguousarray(rows.reshape(stop - start, -1, size)[:, neurons]).reshape(stop - start, -1)

    return Tensor(tensor.name, (tensor.n_rows, len(neurons)), type, read_rows, tensor.origin)


def merge_rows(tensors: Sequence[Tensor], shares: Sequence[float], grouping: np.ndarray) -> Tensor:
    """The gate or up rows of merged neurons, F32: means of the experts' own, weighted by their shares."""
    groups = _Merged.of(grouping, shares)
    means = groups.shares / groups.shares.sum(axis=0)

    def read_rows(start: int, stop: int) -> np.ndarray:
        neurons = groups.neurons[start:stop]
        total = np.zeros((stop - start, tensors[0].n_cols), np.float32)
        for tensor, factors in zip(tensors, means[:, start:stop], strict=True):
            rows = _span(neurons, tensor.read_rows)
            total += factors[:, None] * ggml.dequantise(tensor.type, rows, tensor.n_cols)
        return _bytes(total)

    return _f32(tensors, (len(groups.neurons), tensors[0].n_cols), read_rows)


def merge_columns(tensors: Sequence[Tensor], shares: Sequence[float], grouping: np.ndarray) -> Tensor:
    """The down columns of merged neurons, F32: sums of the experts' own, each times its share."""
    groups = _Merged.of(grouping, shares)

    def read_rows(start: int, stop: int) -> np.ndarray:
        total = np.zeros((stop - start, len(groups.neurons)), np.float32)
        for tensor, factors in zip(tensors, groups.shares, strict=True):
            rows = ggml.dequantise(tensor.type, tensor.read_rows(start, stop), tensor.n_cols)
            total += factors * rows[:, groups.neurons]
        return _bytes(total)

    return _f32(tensors, (tensors[0].n_rows, len(groups.neurons)), read_rows)


def _span(neurons: np.ndarray, read_rows: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Rows `neurons` (ascending) through one read of all rows from the first to the last of them."""
    first = int(neurons[0])
    return read_rows(first, int(neurons[-1]) + 1)[neurons - first]


def _f32(tensors: Sequence[Tensor], shape: tuple[int, int], read_rows: Callable[[int, int], np.ndarray]) -> Tensor:
    origin = " + ".join(dict.fromkeys(tensor.origin or tensor.name for tensor in tensors))
    return Tensor(tensors[0].name, shape, GGMLQuantizationType.F32, read_rows, origin)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, "<f4").view(np.uint8)


# ------------------------------------------------------------------------------------------------ ranking


@dataclass(frozen=True)
class Ffns:
    """The FFNs of one layer, by expert: gate and up (n_ff, n_embd), down (n_embd, n_ff), and the experts' shares."""

    gates: Sequence[Tensor]
    ups: Sequence[Tensor]
    downs: Sequence[Tensor]
    shares: Sequence[float]

    @property
    def n_ff(self) -> int:
        return self.gates[0].n_rows


@dataclass(frozen=True)
class Paths:
    """How the copies of each neuron of a layer are merged, one merge after the other.

    `groupings` is (N, N, n_ff): the grouping after 0, 1, … N − 1 merges of every neuron. `costs` is (N − 1, n_ff):
    what each merge adds to the relative E|Δoutput|², evened out to the convex minorant, so that no merge of a neuron
    is cheaper than the one before it.
    """

    groupings: np.ndarray
    costs: np.ndarray

    def ordered(self) -> np.ndarray:
        """The merges of all neurons, cheapest first, as flat indices of `costs`; a neuron's own stay in order."""
        return np.argsort(self.costs, axis=None, kind="stable")

    def after(self, n_merges: int) -> np.ndarray:
        """The grouping after the `n_merges` cheapest merges."""
        n_ff = self.costs.shape[1]
        counts = np.bincount(self.ordered()[:n_merges] % n_ff, minlength=n_ff)
        return self.groupings[counts, :, np.arange(n_ff)].T


def find_paths(x: np.ndarray, norms: np.ndarray, ffns: Ffns) -> Paths:
    """The merge paths of a layer, judged by its inputs `x`, float32 (n_tokens, n_embd). Reads every weight once.

    `norms` (n_tokens,) are the lengths of the hidden states that errors are added to. Costs are relative to them: what
    follows normalises these states, so only relative errors of different tokens and layers compare.
    """
    overlaps = _overlaps(ffns.downs)
    shares = np.asarray(ffns.shares, np.float32)
    relative_x = (x / norms[:, None]).astype(np.float32)  # the output is linear in u·x, so it is divided there
    step = max(1, CHUNK_VALUES // len(x))
    parts = []
    for start in range(0, ffns.n_ff, step):
        stop = min(start + step, ffns.n_ff)
        gates = np.stack([x @ _read(tensor, start, stop).T for tensor in ffns.gates])
        ups = np.stack([relative_x @ _read(tensor, start, stop).T for tensor in ffns.ups])
        parts.append(_agglomerate(_Copies(gates, ups, overlaps[..., start:stop], shares)))
    return Paths(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)))


def _read(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    return ggml.dequantise(tensor.type, tensor.read_rows(start, stop), tensor.n_cols)


def _overlaps(downs: Sequence[Tensor]) -> np.ndarray:
    """Products of the experts' down columns, (N, N, n_ff): [e, f, j] is column j of e times column j of f."""
    n, n_ff = len(downs), downs[0].n_cols
    products = np.zeros((n, n, n_ff))
    for rows in _row_chunks(downs):
        for e in range(n):
            for f in range(e, n):
                products[e, f] += np.einsum("rj,rj->j", rows[e], rows[f])
                products[f, e] = products[e, f]
    return products


def _row_chunks(tensors: Sequence[Tensor]) -> Iterator[list[np.ndarray]]:
    step = max(1, CHUNK_WEIGHTS // (len(tensors) * tensors[0].n_cols))
    for start in range(0, tensors[0].n_rows, step):
        yield [_read(tensor, start, min(start + step, tensor.n_rows)) for tensor in tensors]


class _Copies:
    """What the copies of some neurons do on the tokens of a sample, and what merging them would change.

    `gates` and `ups` are (N, n_tokens, n): g·x and u·x. Both are linear, so those of a mean are means of these.
    """

    def __init__(self, gates: np.ndarray, ups: np.ndarray, overlaps: np.ndarray, shares: np.ndarray) -> None:
        self._gates, self._ups, self._overlaps, self._shares = gates, ups, overlaps, shares
        self._outputs = [_swiglu(gate, up) for gate, up in zip(gates, ups, strict=True)]

    @property
    def shape(self) -> tuple[int, int]:
        """Experts, neurons."""
        return len(self._gates), self._gates.shape[-1]

    def cost(self, is_in: np.ndarray) -> np.ndarray:
        """E|Δoutput|² of merging, for each neuron, the copies of the experts that `is_in`, bool (N, n), names."""
        factors = is_in * self._shares[:, None]
        means = factors / factors.sum(axis=0)
        members = np.flatnonzero(is_in.any(axis=1))
        gate, up = (sum(means[e] * values[e] for e in members) for values in (self._gates, self._ups))
        output = _swiglu(gate, up)
        changes = {e: factors[e] * (output - self._outputs[e]) for e in members}
        cost = np.zeros(is_in.shape[1])
        for e, change in changes.items():
            cost += np.einsum("tj,tj->j", change, change) * self._overlaps[e, e]
        for e, f in combinations(members, 2):
            cost += 2 * np.einsum("tj,tj->j", changes[e], changes[f]) * self._overlaps[e, f]
        return np.maximum(cost / len(output), 0)  # a quadratic form: below 0 by rounding only


def _swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-gate) = inf makes silu 0, which it is
        return gate / (1 + np.exp(-gate)) * up


def _agglomerate(copies: _Copies) -> tuple[np.ndarray, np.ndarray]:
    """The fields of `Paths` for some neurons, each on its own way."""
    n, n_neurons = copies.shape
    columns = np.arange(n_neurons)
    distances = _pair_costs(copies)
    grouping, group_costs = separate(n, n_neurons), np.zeros((n, n_neurons))
    groupings, totals = [grouping], [np.zeros(n_neurons)]
    for _ in range(n - 1):
        first, second = np.unravel_index(distances.reshape(n * n, -1).argmin(axis=0), (n, n))
        grouping = np.where(grouping == second, first, grouping).astype(np.int8)
        group_costs[second, columns] = 0
        group_costs[first, columns] = copies.cost(grouping == first)
        distances = _linked(distances, first, second)
        groupings.append(grouping)
        totals.append(group_costs.sum(axis=0))
    return np.stack(groupings), _convex_steps(np.stack(totals))


def _pair_costs(copies: _Copies) -> np.ndarray:
    """(N, N, n): what merging two copies alone would cost; infinite below and on the diagonal."""
    n, n_neurons = copies.shape
    costs = np.full((n, n, n_neurons), np.inf)
    for pair in combinations(range(n), 2):
        is_in = np.zeros((n, n_neurons), bool)
        is_in[list(pair)] = True
        costs[pair] = copies.cost(is_in)
    return costs


def _linked(distances: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`distances` after group `second` went into group `first` (first < second): complete linkage."""
    columns, lower = np.arange(distances.shape[-1]), np.tril(np.ones(distances.shape[:2], bool))
    both = np.where(lower[..., None], distances.transpose(1, 0, 2), distances)  # symmetric
    farthest = np.maximum(both[first, :, columns], both[second, :, columns]).T
    both[:, first, columns] = farthest
    both[first, :, columns] = farthest.T
    both[:, second, columns] = both[second, :, columns] = np.inf
    both[lower] = np.inf
    return both


def _convex_steps(totals: np.ndarray) -> np.ndarray:
    """Total costs after 0, 1, … merges → the steps of their greatest convex minorant.

    Those are the isotonic regression of the plain steps, in its min-max form.
    """
    n = len(totals)
    steps = np.empty((n - 1, totals.shape[1]))
    for k in range(1, n):
        slopes = [[(totals[j] - totals[i]) / (j - i) for j in range(k, n)] for i in range(k)]
        steps[k - 1] = np.max([np.min(from_i, axis=0) for from_i in slopes], axis=0)
    return steps


# ------------------------------------------------------------------------------------------------- choice


class Merges:
    """Merges of many layers, in blocks of the grid, cheapest first wherever they are."""

    def __init__(self, paths: Mapping[int, Paths]) -> None:
        self._paths = paths
        self._step = {layer: grid(path.costs.shape[1]) for layer, path in paths.items()}
        blocks = {
            layer: np.sort(path.costs, axis=None).reshape(-1, self._step[layer]).sum(axis=1)
            for layer, path in paths.items()
        }
        costs = np.concatenate(list(blocks.values()))
        order = np.argsort(costs, kind="stable")
        self._layers = np.repeat(list(blocks), [len(some) for some in blocks.values()])[order]
        self.errors = np.concatenate([[0.0], np.cumsum(costs[order])])
        """After each number of blocks, the relative error that they add up to."""

    @property
    def n_blocks(self) -> int:
        """How many blocks of neurons can be saved at most."""
        return len(self._layers)

    def after(self, n_blocks: int) -> dict[int, np.ndarray]:
        """The grouping of every layer when the cheapest `n_blocks` are saved."""
        taken = self._layers[:n_blocks]
        return {
            layer: path.after(int((taken == layer).sum()) * self._step[layer]) for layer, path in self._paths.items()
        }
