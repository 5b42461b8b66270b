"""What a build makes, in words and in numbers: for the tables of `moegguf build`, its JSON, and Python.

    prepared → described (reads samples of the weights that are at hand) → finished: the file is written

A description says everything that is known before the file is there, so that of a dry run lacks only what writing finds
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gguf import GGMLQuantizationType

from moegguf.allocation import Allocation, Precision, expert_errors, precisions
from moegguf.assembly import Built, Plan, build
from moegguf.drift import Drift, measure_drift
from moegguf.estimate import Memory, memory_to_run
from moegguf.families import PER_LAYER_WIDTHS, TensorName
from moegguf.jobs.preparation import BuildOptions, Prepared
from moegguf.metadata import ExpertCard
from moegguf.mix import unused_targets
from moegguf.quant.imatrix import importance_notes
from moegguf.quant.influence import group
from moegguf.recipe import Layout
from moegguf.sizes import show_size
from moegguf.tensor import Planned
from moegguf.watch import Watch, unwatched


@dataclass(frozen=True)
class BuildReport:
    """A mix that was built, or is to be: `built` is None then. `notes` are worth a user's knowing.

    `precisions` are by expert, without those that a merge has taken apart; `drift` is there where one dense FFN could
    take the place of the experts.
    """

    plan: Plan
    memory: Memory
    precisions: dict[str, Precision]
    notes: tuple[str, ...]
    allocation: Allocation | None = None
    drift: Drift | None = None
    built: Built | None = None

    @property
    def path(self) -> Path:
        return self.plan.path

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        plan, built, card = self.plan, self.built, self.plan.card
        return {
            "file": str(plan.path),
            "written": built is not None,
            "bytes": plan.n_bytes,
            "seconds": round(built.seconds, 3) if built else None,
            "name": plan.recipe.name,
            "base": card.base,
            "layout": str(card.layout),
            "architecture": plan.form.arch,
            "quant": card.quant,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "weights": plan.n_weights,
            "tensors": len(plan.planned),
            "router": card.describe_router(),
            "experts": [self._expert_as_json(expert) for expert in card.experts],
            "allocation": _allocation_as_json(self.allocation) if self.allocation else None,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "drift": self.drift.as_json() if self.drift else None,
            "requantised": built.requantised.as_json() if built else None,
            "notes": list(self.notes),
        }

    def _expert_as_json(self, expert: ExpertCard) -> dict[str, object]:
        precision = self.precisions.get(expert.name)
        return {
            "name": expert.name,
            "source": expert.source,
            "weight": expert.weight if self.plan.card.is_gateless else None,
            "quant": expert.quant,
            "types": counted(precision.types) if precision else None,
            "bits_per_weight": round(precision.bits_per_weight, 4) if precision else None,
            "error": precision.error if precision else None,
        }


@dataclass(frozen=True)
class Share:
    """What a group of tensors got of a budget: `loss` is its share of the predicted loss."""

    name: str
    types: Counter[GGMLQuantizationType]
    bits_per_weight: float
    n_bytes: int
    loss: float


def describe(prepared: Prepared, options: BuildOptions) -> BuildReport:
    """What is to be built. Raises UserError for weights that cannot be used."""
    plan, allocation = prepared.plan, prepared.allocation
    is_at_hand = not (options.stream or options.is_dry)
    is_measured = allocation or (is_at_hand and has_precisions(plan))
    errors = expert_errors(plan, threads=options.n_threads) if is_measured else {}
    drift = measure_drift(plan.mix) if is_at_hand and _could_be_dense(plan) else None
    notes = [*prepared.notes, *_notes(plan), *_drift_notes(plan, drift)]
    if options.is_dry and plan.recipe.compact:
        notes.append("these are the sizes of the whole mix; what is merged is chosen by a build")
    return BuildReport(plan, memory_to_run(plan), precisions(plan, errors), tuple(notes), allocation, drift)


def finish(report: BuildReport, options: BuildOptions, watch: Watch = unwatched) -> BuildReport:
    """`report` of the file that is written now. Raises as `assembly.build` does."""
    with watch("writing", "bytes") as step:
        step.has(report.plan.n_bytes_to_do)
        return replace(report, built=build(report.plan, threads=options.n_threads, progress=step.did))


def has_precisions(plan: Plan) -> bool:
    """Whether experts are stored in several precisions, or may be."""
    recipe = plan.recipe
    return bool(recipe.quant.types) or len({expert.quant for expert in recipe.experts}) > 1


def shares(allocation: Allocation) -> list[Share]:
    """A budget by group of tensors, in the order of the file."""
    groups: dict[str, list[Planned]] = {}
    for tensor in allocation.plan.planned:
        if tensor.name in allocation.losses:
            groups.setdefault(_kind(tensor.name, allocation.plan), []).append(tensor)
    return [_share(name, tensors, allocation) for name, tensors in groups.items()]


def counted(types: Mapping[GGMLQuantizationType, int]) -> dict[str, int]:
    """Name of a type → how many tensors have it, the most frequent first."""
    return {type.name: n for type, n in sorted(types.items(), key=lambda item: -item[1])}


def _allocation_as_json(allocation: Allocation) -> dict[str, object]:
    return {
        "budget": allocation.plan.recipe.quant.label,
        "loss": allocation.loss,
        "is_measured": allocation.survey.is_measured,
        "tensors": [
            {
                "name": share.name,
                "types": counted(share.types),
                "bits_per_weight": round(share.bits_per_weight, 4),
                "bytes": share.n_bytes,
                "share_of_loss": share.loss,
            }
            for share in shares(allocation)
        ],
    }


def _share(name: str, tensors: list[Planned], allocation: Allocation) -> Share:
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    bits = 8 * n_bytes / sum(tensor.slot.n_weights for tensor in tensors)
    loss = sum(allocation.losses[tensor.name] for tensor in tensors) / (allocation.loss or 1)
    return Share(name, Counter(tensor.type for tensor in tensors), bits, n_bytes, loss)


def _kind(name: str, plan: Plan) -> str:
    """A projection; of a mix whose neurons are split, with the group."""
    role = group(name)
    in_group = {f"{role}_shexp": ", fine", f"{role}_exps": ", others"} if plan.mix.split else {}
    return role + in_group.get(TensorName.parse(name).role, "")


def _notes(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    if plan.card.is_gateless and recipe.layout is Layout.MIXTRAL and len(recipe.experts) > 1:
        yield (
            "--layout fused gives the same numbers from one dense FFN: prompts run some 1.5 to 1.8 times as fast on a "
            "CPU (scripts/bench_run.py), but experts can no longer be told apart, routed or swapped"
        )
    for expert in plan.mix.experts:
        if unused := unused_targets(expert, recipe.mixed, recipe.trunk):
            yield (
                f"the adapter of {expert.name} also changes {', '.join(unused)}, which this mix takes from its trunk; "
                "a gate-less mix with --mix ffn+attention averages the attention of all experts"
            )
    requantised = {
        part.tensor.type.name
        for tensor in plan.planned
        for part in tensor.slot.parts
        if part.tensor.is_quantised and part.tensor.type != tensor.type
    }
    if requantised:
        yield (
            f"some sources are quantised already ({', '.join(sorted(requantised))}) and are quantised again, which "
            "costs quality; sources in bf16 or f16 avoid that"
        )
    yield from plan.mix.base.notes
    yield from importance_notes(plan.planned)


def _could_be_dense(plan: Plan) -> bool:
    return plan.card.is_gateless and not plan.card.is_dense and len(plan.mix.experts) > 1


def _drift_notes(plan: Plan, drift: Drift | None) -> Iterator[str]:
    """What one dense FFN in the place of the experts would save and cost."""
    if drift and not plan.mix.compaction and plan.mix.base.arch in PER_LAYER_WIDTHS:
        n = len(plan.mix.experts)
        saved = sum(tensor.nbytes for tensor in plan.planned if tensor.slot.preset) * (n - 1) / n
        yield (
            f"--compact 1x would save {show_size(int(saved))} at a KLD of some {drift.estimated_kld:.0e} nats (an "
            "estimate by the fourth power of drift); --compact kld=0.001 finds and measures what is between"
        )
