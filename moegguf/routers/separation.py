"""How well a router tells the domains apart: counted on text that it was not fitted on.

Every token of a domain's text is given to the expert that the layer's router ranks first. All shares weigh the
domains equally, however much text each has. Chance is 1 / number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NEARLY_NEVER = 0.1
"""Of the even share 1/N: an expert below it on average over the layers might as well not be there."""
NEAR_CHANCE = 0.1
"""Of the way from chance to perfect."""
SAME_DIRECTION = 0.99
"""Cosine of two rows from which on they are told apart by little more than noise."""


@dataclass(frozen=True)
class Separation:
    """`counts[layer, domain, expert]`: tokens of `domains[domain]` whose first choice is `experts[expert]`."""

    experts: tuple[str, ...]
    domains: tuple[str, ...]
    """Experts whose held-out text there was."""
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """float64 (n_layer, n_domain, n_expert); sums to 1 over the experts."""
        return self.counts / self.counts.sum(axis=-1, keepdims=True)

    @property
    def top1(self) -> np.ndarray:
        """Share of tokens whose first choice is the expert of their domain: float64 (n_layer,)."""
        own = [self.experts.index(domain) for domain in self.domains]
        return self.shares[:, np.arange(len(own)), own].mean(axis=-1)

    @property
    def load(self) -> np.ndarray:
        """Share of tokens whose first choice is each expert: float64 (n_layer, n_expert)."""
        return self.shares.mean(axis=1)

    def as_json(self) -> dict[str, object]:
        return {
            "domains": list(self.domains),
            "top1": float(self.top1.mean()),
            "top1_by_layer": self.top1.tolist(),
            "load": dict(zip(self.experts, self.load.mean(axis=0).tolist(), strict=True)),
            "load_by_layer": self.load.tolist(),
        }

    @property
    def covers_all(self) -> bool:
        return len(self.domains) == len(self.experts)


def count_choices(matrices: Mapping[int, np.ndarray], x: Mapping[int, np.ndarray]) -> np.ndarray:
    """How often each expert is the first choice: int64 (n_layer, n_expert), from router inputs (n_tokens, n_embd)."""
    n_expert = len(matrices[0])
    choices = [np.argmax(x[layer] @ matrices[layer].T, axis=1) for layer in sorted(matrices)]
    return np.stack([np.bincount(choice, minlength=n_expert) for choice in choices])


def warnings(
    experts: Sequence[str], matrices: Mapping[int, np.ndarray], separation: Separation | None
) -> Iterator[str]:
    """What is wrong with a router, in words; nothing when it is sound."""
    yield from _row_warnings(experts, matrices)
    if separation is None:
        return
    n = len(separation.experts)
    chance, top1 = 1 / n, separation.top1.mean()
    if top1 < chance + NEAR_CHANCE * (1 - chance):
        yield (
            f"the router hardly tells the domains apart: its first choice is right for {top1:.0%} of held-out tokens, "
            f"{chance:.0%} would be by chance"
        )
    if separation.covers_all:
        for name, load in zip(separation.experts, separation.load.mean(axis=0), strict=True):
            if load < NEARLY_NEVER / n:
                yield f"expert {name} is hardly ever the first choice ({load:.1%} of held-out tokens)"


def _row_warnings(experts: Sequence[str], matrices: Mapping[int, np.ndarray]) -> Iterator[str]:
    zero: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for layer, rows in matrices.items():
        norms = np.linalg.norm(rows, axis=1)
        for i in np.flatnonzero(norms < 1e-3 * norms.max() if norms.any() else norms == 0):
            zero.setdefault(experts[i], []).append(layer)
        cosines = (rows @ rows.T) / np.maximum(np.outer(norms, norms), np.finfo(np.float32).tiny)
        for i, j in np.argwhere(np.triu(cosines > SAME_DIRECTION, 1)):
            alike.setdefault(f"{experts[i]} and {experts[j]}", []).append(layer)
    for name, layers in zero.items():
        yield f"the row of expert {name} is nearly zero in {_layers(layers)}: its domain has nothing of its own there"
    for names, layers in alike.items():
        yield f"the rows of {names} are nearly equal in {_layers(layers)}: the router cannot tell these two apart"


def _layers(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:8])) + ("…" if len(layers) > 8 else "")
    return f"layer{'s' * (len(layers) > 1)} {shown}"
