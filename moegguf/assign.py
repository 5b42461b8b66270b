"""Which type every output tensor gets: a preset's choice, then what the recipe overrides.

From weak to strong: the recipe's preset for the trunk; the preset of its experts for an expert group; what a budget
or a plan chose for a tensor; a role; a pattern. A preset falls back where rows are too short for a type, as llama.cpp
does. A type that was asked for by name does not: if it cannot be had, that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.quant.presets import ModelFacts, preset, requires_imatrix, tensor_types
from moegguf.recipe import QuantSpec, Role
from moegguf.tensor import Form, Planned, Slot, largest


def assign_types(form: Form, quant: QuantSpec, *, has_imatrix: bool) -> list[Planned]:
    """Give every slot its type. Raises UserError, with all faults, when a type cannot be had."""
    shapes = {slot.name: slot.shape for slot in form.slots}
    facts = _facts(form)
    presets = {quant.preset} | {slot.preset for slot in form.slots if slot.preset}
    by_preset = {name: tensor_types(preset(name), shapes, facts, has_imatrix=has_imatrix) for name in sorted(presets)}
    tied = "output.weight" not in shapes
    planned, faults, unimportant = [], [], []
    for slot in form.slots:
        name = slot.preset or quant.preset
        try:
            asked = _asked_type(slot, quant, tied=tied)
        except UserError as error:
            faults.append(error)
            continue
        tensor = Planned(slot, by_preset[name][slot.name] if asked is None else asked)
        planned.append(tensor)
        is_needed = requires_imatrix(tensor.name, tensor.type, preset(name)) or ggml.requires_importance(tensor.type)
        if is_needed and not _is_important(slot):
            unimportant.append(tensor)
    if unimportant:
        faults.append(_needs_importance(unimportant))
    if faults:
        raise UserError.of(_first_of_each_kind(faults))
    return planned


def unassigned(planned: Sequence[Planned], quant: QuantSpec) -> list[Slot]:
    """The slots whose type is free for a budget to choose: quantised, of no preset of their own, and not overridden."""
    tied = all(tensor.name != "output.weight" for tensor in planned)
    return [
        tensor.slot
        for tensor in planned
        if tensor.type is not GGMLQuantizationType.F32
        and tensor.slot.preset in (None, quant.preset)
        and _asked_type(tensor.slot, replace(quant, types={}), tied=tied) is None
    ]


def _is_important(slot: Slot) -> bool:
    return all(part.importance is not None for part in slot.parts)


def _needs_importance(tensors: list[Planned]) -> UserError:
    """Very low bits without an imatrix give garbage: llama.cpp refuses them, and so do we."""
    first, more = tensors[0], f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
    return UserError(
        f"{first.name}{more}: {first.type.name} needs an importance matrix, and there is none for it",
        "pass --imatrix FILE (see `moegguf calibrate`), or choose a preset without, such as IQ3_S, Q3_K_M or Q2_K",
    )


def _facts(form: Form) -> ModelFacts:
    def get(key: str, default: int = 0) -> int:
        value = form.metadata.get(f"{form.arch}.{key}")
        return default if value is None else largest(value.value)

    n_head = get("attention.head_count")
    return ModelFacts(
        arch=form.arch,
        n_layer=get("block_count"),
        n_head=n_head,
        n_head_kv=get("attention.head_count_kv", n_head),
        n_expert=get("expert_count"),
    )


def _asked_type(slot: Slot, quant: QuantSpec, *, tied: bool) -> GGMLQuantizationType | None:
    """The type that a pattern, a role, a budget or a plan names for this slot, checked; None when none does."""
    if len(slot.shape) < 2 or slot.name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return None
    type = next((type for pattern, type in quant.tensors.items() if re.search(pattern, slot.name)), None)
    if type is None:
        type = next((quant.roles[role] for role in _roles(slot, tied) if role in quant.roles), None)
    if type is None:
        type = quant.types.get(slot.name)
    if type is None:
        return None
    block = GGML_QUANT_SIZES[type][0]
    if slot.n_cols % block:
        raise UserError(
            f"{slot.name}: {type.name} needs rows that are a multiple of {block} weights, these have {slot.n_cols}",
            "choose a type with smaller blocks, such as Q8_0 (32) or F16 (1)",
        )
    return type


def _roles(slot: Slot, tied: bool) -> tuple[Role, ...]:
    if slot.preset:
        return (Role.EXPERTS,)
    if slot.name == "token_embd.weight":
        return (Role.EMBED, Role.OUTPUT) if tied else (Role.EMBED,)
    if slot.name == "output.weight":
        return (Role.OUTPUT,)
    return (Role.ATTN,) if ".attn_" in slot.name else ()


def _first_of_each_kind(faults: list[UserError]) -> list[UserError]:
    """One fault for each kind of tensor: forty layers with the same fault are one line."""
    kinds = {re.sub(r"blk\.\d+\.", "", fault.message): fault for fault in reversed(faults)}
    return list(reversed(kinds.values()))
