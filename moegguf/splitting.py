"""A budget for a gate-less mix that may hold two precisions in each layer: of all ways to split it the best, or none.

    survey of one group → for each number of fine neurons: the split, what its groups lose in each type → allocation

Invariant: losses of groups are shares of the loss of the tensor that they are taken from, so that those of all splits,
and that without one, are predicted alike and can be compared. A group's error in a type is the whole tensor's, times
the weight of its neurons among all (`moegguf.quant.split`), times what quantising them apart does to their relative
error. That is nothing for gate and up, whose rows are quantised each on its own; down's are quantised anew, because its
blocks hold other neurons, more alike in importance, than they did.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType as Type

from moegguf.allocation import Allocation, Survey, allocate
from moegguf.assembly import Plan, with_split
from moegguf.assign import unassigned
from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.mix import FFN_ROLES
from moegguf.quant.influence import group
from moegguf.quant.sensitivity import Sensitivity, measure_types
from moegguf.quant.split import Energies, Split, fine_sizes, split_neurons, weights
from moegguf.recipe import Budget, Splitting
from moegguf.tensor import Slot
from moegguf.watch import Progress, unheard


def fine_widths(plan: Plan) -> list[int]:
    """How many fine neurons `allocate_split` will try to have in each layer; none where the recipe wants no split."""
    by, n_ff = plan.recipe.quant.split, plan.mix.base.hparam("feed_forward_length")
    return [] if by is Splitting.NONE else fine_sizes(len(plan.mix.experts), int(n_ff), by)


def allocate_split(found: Survey, limit: Budget, *, threads: int, progress: Progress = unheard) -> Allocation:
    """The allocation of least predicted loss within `limit`: of the splits that the recipe asks for, and where it
    leaves that open, of none as well. `found` is a survey of the mix in layout fused. `progress` hears of each split.

    Raises UserError when none fits, and where a recipe asks for a split and decides the types of one group only.
    """
    mix, by = found.plan.mix, found.plan.recipe.quant.split
    must_split = by in (Splitting.NEURONS, Splitting.EXPERTS)
    allocations, faults = [] if must_split else [allocate(found, limit)], []
    for n_fine in fine_widths(found.plan):
        split = split_neurons(mix.energies, by, n_fine)
        try:
            allocations.append(allocate(survey_split(found, split, threads=threads), limit))
        except UserError as fault:  # some hundred bytes too many for the smallest types there are
            faults.append(fault)
        progress(1)
    if not allocations:
        raise faults[0]
    return min(allocations, key=lambda allocation: allocation.loss)


def survey_split(found: Survey, split: Split, *, threads: int) -> Survey:
    """What is known of the tensors of the mix of `found` when it is split.

    Reads a sample of the weights of ffn_down. Raises UserError for weights that cannot be used, and where the type of
    one group is free and that of the whole tensor was not.
    """
    plan, energies = with_split(found.plan, split), found.plan.mix.energies
    slots = {slot.name: slot for slot in unassigned(plan.planned, plan.recipe.quant)}
    whole = {name: _of_whole(found, name) for name in slots}
    downs = [(slot, tuple(whole[name].errors)) for name, slot in slots.items() if _is_group(name, "ffn_down")]
    anew = measure_types(downs, plan.mix, threads=threads)
    sensitivities = dict(whole)
    for name, slot in slots.items():
        if _is_group(name, *FFN_ROLES):
            sensitivities[name] = _of_group(slot, whole[name], anew.get(name), split, energies)
    influences = {name: found.influences[sensitivity.slot.name] for name, sensitivity in whole.items()}
    return replace(found, plan=plan, sensitivities=sensitivities, influences=influences)


def _is_group(name: str, *roles: str) -> bool:
    """Whether tensor `name` holds one of the two groups of a projection among `roles`."""
    return name != str(_dense(name)) and group(name) in roles


def _dense(name: str) -> TensorName:
    """What a tensor is called while there is one group."""
    return replace(TensorName.parse(name), role=group(name))


def _of_whole(found: Survey, name: str) -> Sensitivity:
    dense = str(_dense(name))
    if dense not in found.sensitivities:
        raise UserError(
            f"{name}: its type is free, that of {dense} is not, so what it would lose is not known",
            "write patterns that match all of ffn_down, ffn_down_exps and ffn_down_shexp, or none",
        )
    return found.sensitivities[dense]


def _of_group(
    slot: Slot, whole: Sensitivity, anew: Sensitivity | None, split: Split, energies: Energies
) -> Sensitivity:
    """Its errors as shares of the power of the `whole` projection's output; `anew`, where it was quantised again."""
    name, role = TensorName.parse(slot.name), group(slot.name)
    of_layer = energies[name.layer]
    neurons = split.coarse(name.layer) if name.role.endswith("_exps") else split.fine(name.layer)
    is_in = np.array([len(some) > 0 for some in neurons])  # an expert may have none in a group
    counts = weights(role, of_layer, neurons)[is_in]
    remains = _remains(whole, weights(role, of_layer, [slice(None)] * len(neurons)))
    if anew:
        part_errors = anew.part_errors
    else:
        part_errors = {type: tuple(np.array(each)[is_in]) for type, each in whole.part_errors.items()}
    errors = {type: float(remains[type] * (counts @ np.array(each))) for type, each in part_errors.items()}
    return replace(whole, slot=slot, errors=errors, part_errors=part_errors)


def _remains(whole: Sensitivity, counts: np.ndarray) -> dict[Type, float]:
    """Of the errors of experts, what is left in each type where they add up, for one as `counts` weigh them. A type in
    which nothing is lost has the least of the others: its weights pass through only as long as no block is cut."""
    losses = {type: float(counts @ np.array(errors)) for type, errors in whole.part_errors.items()}
    remains = {type: whole.errors[type] / loss for type, loss in losses.items() if loss}
    least = min(remains.values(), default=0.0)
    return {type: remains.get(type, least) for type in losses}
