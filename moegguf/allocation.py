"""A plan with a budget: measure what every type costs every tensor, choose, and say so.

    plan → sensitivities (a sample of the weights) → influences → options → choice → the plan with those types

`survey` does the first half, which takes the time; `allocate` the second, so that many budgets can be tried on one
survey, and so that `moegguf.jobs.probing` can correct the influences in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from gguf import GGMLQuantizationType as Type

from moegguf.assembly import Plan, with_types
from moegguf.assign import unassigned
from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.mix import FFN_ROLES, Expert
from moegguf.quant import budget, ggml
from moegguf.quant.budget import Option
from moegguf.quant.influence import Site, influences
from moegguf.quant.sensitivity import Sensitivity, measure, measure_planned
from moegguf.recipe import Budget
from moegguf.sizes import show_size
from moegguf.tensor import Planned
from moegguf.watch import Progress, unheard
from moegguf.writer import padded


@dataclass(frozen=True)
class Survey:
    """What is known of the tensors whose types are free: what each type costs, and how much that matters.

    `influences` are nats for a relative error of 1, `is_measured` whether they were corrected by measurements.
    """

    plan: Plan
    sensitivities: Mapping[str, Sensitivity]
    influences: Mapping[str, float]
    is_measured: bool = False

    @property
    def options(self) -> dict[str, list[Option]]:
        return {
            name: [
                Option(type, padded(Planned(sensitivity.slot, type).nbytes), self.influences[name] * error)
                for type, error in sensitivity.errors.items()
            ]
            for name, sensitivity in self.sensitivities.items()
        }


@dataclass(frozen=True)
class Allocation:
    """A budget that was met. `losses` are the predicted nats by tensor, of those that were free."""

    survey: Survey
    plan: Plan
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


def survey(plan: Plan, *, threads: int, progress: Progress = unheard) -> Survey:
    """Measure the tensors of `plan` whose types nothing decides. Reads a sample of the weights of each.

    Raises UserError when every type is decided, and for weights that cannot be used.
    """
    slots = unassigned(plan.planned, plan.recipe.quant)
    if not slots:
        raise UserError("the recipe decides the type of every tensor, so no budget can", "leave some types open")
    sensitivities = measure(slots, plan.mix, threads=threads, progress=progress)
    return Survey(plan, sensitivities, influences(sensitivities, plan.mix.n_layer, _norms(plan)))


def _norms(plan: Plan) -> dict[Site, float]:
    """The mean squared weights of the norms that attention and FFNs see their inputs through."""
    norms = {}
    for name, tensor in plan.mix.trunk.items():
        parsed = TensorName.parse(name)
        if parsed.role in ("attn_norm", "ffn_norm") and parsed.kind == "weight":
            weights = ggml.dequantise(tensor.type, tensor.read_rows(0, 1), tensor.n_cols)
            norms[parsed.layer, parsed.role] = float(np.square(weights).mean())
    return norms


def n_surveyed(plan: Plan) -> int:
    """How many tensors `survey` will measure."""
    return len(unassigned(plan.planned, plan.recipe.quant))


def allocate(found: Survey, limit: Budget) -> Allocation:
    """The types of least predicted loss within `limit`.

    Raises UserError when not even the smallest types fit, saying what they take and cost.
    """
    options = found.options
    typed = _typed(found, budget.smallest(options), limit)
    fixed = typed.n_bytes - budget.total_bytes(budget.smallest(options))
    n_bytes = limit.n_bytes - fixed if limit.n_bytes else _data_bytes(typed, limit) - fixed + len(typed.header)
    try:
        choice = budget.choose(options, n_bytes)
    except ValueError:
        raise _too_small(typed, budget.smallest(options), limit) from None
    return Allocation(found, _typed(found, choice, limit), {name: option.loss for name, option in choice.items()})


def _data_bytes(plan: Plan, limit: Budget) -> int:
    """What all tensors may take at so many bits for each weight."""
    return int(limit.bpw * plan.n_weights / 8)


def _typed(found: Survey, choice: budget.Choice, limit: Budget) -> Plan:
    return with_types(found.plan, {name: option.type for name, option in choice.items()}, limit.text)


def _too_small(plan: Plan, choice: budget.Choice, limit: Budget) -> UserError:
    smallest = (
        f"{ceil(100 * plan.bits_per_weight) / 100} bits per weight" if limit.bpw else show_size(plan.n_bytes, up=True)
    )
    mend = f"give it {smallest}, at a predicted loss of {budget.total_loss(choice):.2g} nats"
    if any(part.importance is None for tensor in plan.planned if tensor.name in choice for part in tensor.slot.parts):
        mend += ", or pass --imatrix: with one, types below 3 bits can be had"
    return UserError(f"budget {limit.text}: the mix does not fit, its smallest size is {smallest}", mend)


@dataclass(frozen=True)
class Precision:
    """What an expert's FFNs are stored in. `error` is the weighted relative error of their outputs, where measured."""

    types: Mapping[Type, int]
    bits_per_weight: float
    error: float | None


def expert_errors(plan: Plan, *, threads: int) -> dict[str, Sensitivity]:
    """What the experts' tensors lose in the types that `plan` gives them. Reads a sample of the weights of each.

    Raises UserError for weights that cannot be used.
    """
    return measure_planned([tensor for tensor in plan.planned if tensor.slot.preset], plan.mix, threads=threads)


def precisions(plan: Plan, sensitivities: Mapping[str, Sensitivity]) -> dict[str, Precision]:
    """Expert → its precision in `plan`; none for experts that a merge has taken apart."""
    return {
        expert.name: precision
        for expert in plan.mix.experts
        if (precision := _precision(plan, expert, sensitivities)) is not None
    }


def _precision(plan: Plan, expert: Expert, sensitivities: Mapping[str, Sensitivity]) -> Precision | None:
    own = {id(expert.ffn(layer, role)) for layer in plan.mix.layers for role in FFN_ROLES}
    types: Counter[Type] = Counter()
    n_bits, n_weights, errors = 0, 0, []
    for tensor in plan.planned:
        for number, part in enumerate(tensor.slot.parts):
            if id(part.tensor) in own:
                types[tensor.type] += 1
                n_weights += prod(part.tensor.shape)
                n_bits += 8 * tensor.nbytes * prod(part.tensor.shape) // tensor.slot.n_weights
                if tensor.name in sensitivities:
                    errors.append(sensitivities[tensor.name].part_errors[tensor.type][number])
    if not n_weights:
        return None
    error = sum(errors) / len(errors) if len(errors) == types.total() else None
    return Precision(types, n_bits / n_weights, error)
