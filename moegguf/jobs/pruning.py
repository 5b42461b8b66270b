"""A mix without the experts that matter least: they are ranked on texts, left out, and what that costs is measured.

One half of the texts' chunks ranks, on the others the cost is measured (`moegguf.jobs.saliency`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from moegguf.checks import check_range
from moegguf.edit.experts import plan_drop
from moegguf.edit.finished import FinishedMix
from moegguf.edit.made import Made, Target, make
from moegguf.errors import UserError
from moegguf.jobs.saliency import Rank, halves, measure_cost, rank
from moegguf.measurement.divergence import Divergence
from moegguf.texts import Record
from moegguf.watch import Watch, unwatched


@dataclass(frozen=True)
class Pruned:
    """A mix that was pruned. `ranking` has the expert that matters most first, and is empty where it was not asked for;
    `n_ranked` are the tokens that it is from. `cost` is what was lost, where there was text to measure it on."""

    made: Made
    dropped: tuple[str, ...]
    ranking: tuple[Rank, ...] = ()
    n_ranked: int = 0
    cost: Divergence | None = None

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return self.made.as_json() | {
            "dropped": list(self.dropped),
            "ranking": [asdict(one) for one in self.ranking],
            "cost": self.cost.as_json() if self.cost else None,
        }


def prune(
    target: Target,
    texts: Mapping[str, Sequence[Record]],
    *,
    drop: Sequence[str] = (),
    keep: int | None = None,
    max_tokens: int = 4096,
    threads: int | None = None,
    watch: Watch = unwatched,
) -> Pruned:
    """Leave out the experts `drop`, or all but the `keep` that matter most on `texts` (name → records).

    `max_tokens` are those of each text. Raises UserError, before anything is run, where that cannot be.
    """
    mix = target.mix
    _check(mix, drop, keep, has_texts=bool(texts))
    check_range("--max-tokens", max_tokens, 2)
    plan_drop(mix, drop or mix.routed_names[keep:])  # or fail now
    to_rank, to_measure = halves(mix.header, texts, max_tokens) if texts else ([], [])
    ranks, n_ranked = [], 0
    if keep:
        n_ranked = sum(map(len, to_rank))
        with watch("ranking", "tokens") as step:
            step.has(n_ranked)
            ranks = rank(mix, to_rank, threads=threads, progress=step.did)
    dropped = tuple(dict.fromkeys(drop or [one.expert for one in ranks[keep:]]))
    made = make(target, plan_drop(mix, dropped), threads=threads, watch=watch)
    cost = None
    if to_measure:
        with watch("measuring", "tokens") as step:
            step.has(2 * sum(len(chunk) - 1 for chunk in to_measure))
            cost = measure_cost(mix, made.path, to_measure, threads=threads, progress=step.did)
    return Pruned(made, dropped, tuple(ranks), n_ranked, cost)


def _check(mix: FinishedMix, drop: Sequence[str], keep: int | None, *, has_texts: bool) -> None:
    if bool(drop) == (keep is not None):
        raise UserError(f"{mix.path}: expected either experts to drop or how many to keep", "pass --drop or --keep")
    if keep is None:
        return
    n = len(mix.routed_names)
    if not (isinstance(keep, int) and 1 <= keep < n):
        besides = f" besides {mix.card.always_on}" if mix.card.always_on else ""
        raise UserError(f"--keep {keep}: expected 1 to {n - 1}", f"{mix.path} has {n} experts{besides}")
    if {info.shape[0] for info in mix.sites.values()} != {n}:
        message = f"{mix.path}: layout {mix.card.layout} does not tell its experts apart, so they cannot be ranked"
        raise UserError(message, "name those to leave out: --drop")
    if not has_texts:
        raise UserError(f"--keep {keep}: takes text to rank experts by", "pass --text FILE or --domains RECIPE")
