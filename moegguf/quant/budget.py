"""Which type every tensor gets, so that a mix fits a budget and loses as little as possible.

Purpose: a size is what people have; types are what a file needs. Each tensor offers options, a size and a loss each,
and one option of each has to be chosen: the multiple-choice knapsack problem.

Method: a tensor's loss is its error (`moegguf.quant.sensitivity`) times a coefficient that says what a relative error
at that place costs, in nats of mean KL divergence; losses add up. First the options on each tensor's convex hull are
taken in the order of loss saved per byte (what a Lagrange multiplier does), which is optimal up to one step; what is
left of the budget goes to whatever still fits. Then options that no better choice can contain are dropped (their
Lagrangian bound is too high), and the few that remain are searched completely.

Invariant: sizes are exact, padding included, so no other choice of less predicted loss fits. Deterministic. Where more
than `MAX_STATES` partial choices compete, the most promising are kept, and the choice is within the bound's gap of the
optimum.

Sources: Sinha and Zoltners 1979 (hull, bounds), Pisinger 1995 (search of the core); llama.cpp's proposal for a target
size (PR 15550) stops at the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from gguf import GGMLQuantizationType as Type

MAX_STATES = 1 << 13
ROUNDING = 1e-12
"""Sums of losses that differ by less, relatively, may be equal."""


@dataclass(frozen=True)
class Option:
    """A type that a tensor could have: its bytes in the file, and the loss that it is predicted to cost (nats)."""

    type: Type
    n_bytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]
"""Tensor name → its options, at least one."""
Choice = dict[str, Option]


def smallest(options: Options) -> Choice:
    """The choice of the fewest bytes; of equal ones the best."""
    return {name: min(each, key=lambda o: (o.n_bytes, o.loss)) for name, each in options.items()}


def total_bytes(choice: Choice) -> int:
    return sum(option.n_bytes for option in choice.values())


def total_loss(choice: Choice) -> float:
    return float(sum(option.loss for option in choice.values()))


def choose(options: Options, n_bytes: int) -> Choice:
    """The options of least total loss that fit into `n_bytes`. Raises ValueError when not even the smallest do."""
    if total_bytes(smallest(options)) > n_bytes:
        raise ValueError("the smallest choice does not fit")
    fronts = {name: pareto_front(each) for name, each in options.items()}
    choice, price = _by_price(fronts, n_bytes)
    choice = _filled(fronts, choice, n_bytes)
    return _searched(fronts, choice, price, n_bytes)


def pareto_front(options: Sequence[Option]) -> list[Option]:
    """Options by size, each of strictly less loss than all smaller ones."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.loss)):
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def convex_hull(front: Sequence[Option]) -> list[Option]:
    """The options of a front that are best at some price of a byte."""
    hull: list[Option] = []
    for option in front:
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _saving(smaller: Option, larger: Option) -> float:
    """Loss saved per byte by the larger of two."""
    return (smaller.loss - larger.loss) / (larger.n_bytes - smaller.n_bytes)


def _by_price(fronts: Mapping[str, list[Option]], n_bytes: int) -> tuple[Choice, float]:
    """Steps up the hulls, the best saving first, until one does not fit; and that saving, the price of a byte."""
    choice = {name: front[0] for name, front in fronts.items()}
    steps = [
        (-_saving(smaller, larger), number, larger.n_bytes - smaller.n_bytes, name, larger)
        for number, (name, front) in enumerate(fronts.items())
        for hull in [convex_hull(front)]
        for smaller, larger in pairwise(hull)
    ]
    left = n_bytes - total_bytes(choice)
    for negative_saving, _, cost, name, larger in sorted(steps, key=lambda step: step[:3]):
        if cost > left:
            return choice, -negative_saving
        choice[name] = larger
        left -= cost
    return choice, 0.0


def _filled(fronts: Mapping[str, list[Option]], choice: Choice, n_bytes: int) -> Choice:
    """`choice` with whatever still fits, the largest saving first."""
    choice = dict(choice)
    while True:
        left = n_bytes - total_bytes(choice)
        steps = [
            (option.loss - choice[name].loss, number, name, option)
            for number, (name, front) in enumerate(fronts.items())
            for option in front
            if option.loss < choice[name].loss and option.n_bytes - choice[name].n_bytes <= left
        ]
        if not steps:
            return choice
        _, _, name, option = min(steps, key=lambda step: step[:2])
        choice[name] = option


def _searched(fronts: Mapping[str, list[Option]], incumbent: Choice, price: float, n_bytes: int) -> Choice:
    """A better choice than `incumbent`, if there is one.

    At `price` a byte, each option costs loss + price · bytes; what it costs more than the cheapest of its tensor can
    never be won back. A choice that beats the incumbent pays at most `gap` more in all.
    """
    costs = {name: [o.loss + price * o.n_bytes for o in front] for name, front in fronts.items()}
    bound = sum(map(min, costs.values()))
    gap = max(0.0, total_loss(incumbent) + price * n_bytes - bound) + ROUNDING * bound
    kept = {
        name: [(o, cost - min(costs[name])) for o, cost in zip(front, costs[name], strict=True)
               if cost - min(costs[name]) <= gap]
        for name, front in fronts.items()
    }  # fmt: skip
    names = sorted(kept, key=lambda name: len(kept[name]))
    least = np.cumsum([0] + [min(o.n_bytes for o, _ in kept[name]) for name in reversed(names)])[::-1]
    sizes, losses, extras = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for name, least_after in zip(names, least[1:], strict=True):
        options = [option for option, _ in kept[name]]
        grown = (
            np.add.outer(sizes, [o.n_bytes for o in options]).ravel(),
            np.add.outer(losses, [o.loss for o in options]).ravel(),
            np.add.outer(extras, [extra for _, extra in kept[name]]).ravel(),
        )
        alive = _promising(*grown, n_bytes - least_after, gap)
        if not len(alive):
            return incumbent
        sizes, losses, extras = (values[alive] for values in grown)
        trail.append(divmod(alive, len(options)))
    best = int(np.argmin(losses))
    if losses[best] >= total_loss(incumbent):
        return incumbent
    found = {}
    for name, (parents, picks) in zip(reversed(names), reversed(trail), strict=True):
        found[name] = kept[name][picks[best]][0]
        best = parents[best]
    return {name: found[name] for name in fronts}


def _promising(sizes: np.ndarray, losses: np.ndarray, extras: np.ndarray, limit: int, gap: float) -> np.ndarray:
    """Indices of the partial choices that may still win: not too large, not too dear, no other smaller and better."""
    alive = np.flatnonzero((sizes <= limit) & (extras <= gap))
    alive = alive[np.lexsort((losses[alive], sizes[alive]))]
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], losses[alive][:-1]))) if len(alive) else losses[alive]
    alive = alive[losses[alive] < best_before]
    return alive if len(alive) <= MAX_STATES else alive[np.sort(np.argsort(extras[alive], kind="stable")[:MAX_STATES])]
