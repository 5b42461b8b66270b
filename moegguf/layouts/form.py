"""What layouts share: the ways to put expert tensors together.

Shapes, numpy order: gate and up are (n_ff, n_embd), down is (n_embd, n_ff).
stack   → (n_expert, rows, cols), the experts one below the other
fuse    → gate and up (Σ n_ff, n_embd) below each other; down (n_embd, Σ n_ff) side by side
compact → as fuse, with copies of a neuron merged where a grouping says so
gather  → as fuse, with some of the neurons only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.families import TensorName
from moegguf.metadata import PREFIX
from moegguf.mix import Expert, Mix
from moegguf.quant.neurons import gather_columns, gather_rows, kept, merge_columns, merge_rows, merged
from moegguf.quant.sums import weighted_sum
from moegguf.tensor import Columns, Metadata, Part, Slot, Tensor

Share = tuple[Expert, float]
"""An expert and the factor that its down projection carries."""


def copy(tensor: Tensor) -> Slot:
    """A trunk tensor as it is."""
    return Slot(tensor.name, tensor.shape, ((Part(tensor),),))


def stack(layer: int, role: str, shares: Sequence[Share]) -> Slot:
    """blk.N.ROLE_exps: (n_expert, rows, cols). The factors go into down."""
    parts = [_part(layer, role, share) for share in shares]
    shape = (len(parts), *parts[0].tensor.shape)
    return Slot(
        str(TensorName(layer, f"{role}_exps", "weight")), shape, tuple((part,) for part in parts), _preset(shares)
    )


def fuse(layer: int, role: str, name: str, shares: Sequence[Share]) -> Slot:
    """One FFN projection that holds the neurons of all experts; the factors go into down."""
    parts = [_part(layer, role, share) for share in shares]
    return _side_by_side(layer, role, name, parts, _preset(shares))


def compact(layer: int, role: str, shares: Sequence[Share], grouping: np.ndarray) -> Slot:
    """`fuse` with some copies of neurons merged: those that stay, expert by expert, then those that were merged."""
    whole, n_ff = [_part(layer, role, share) for share in shares], grouping.shape[1]
    merge = merge_columns if role == "ffn_down" else merge_rows
    parts = _gathered(role, whole, kept(grouping))
    known = [part.importance for part in whole if part.importance is not None]
    mean = np.mean(known, axis=0, dtype=np.float32) if known else None
    together = merge([part.tensor for part in whole], [factor for _, factor in shares], grouping)
    parts.append(Part(together, **_inputs(role, mean, merged(grouping), n_ff)))
    return _side_by_side(layer, role, role, _nonempty(parts), _preset(shares))


def gather(layer: int, role: str, name: str, shares: Sequence[Share], neurons: Sequence[np.ndarray]) -> Slot:
    """`fuse` with only these neurons of each expert."""
    parts = _gathered(role, [_part(layer, role, share) for share in shares], neurons)
    return _side_by_side(layer, role, name, _nonempty(parts), _preset(shares))


def _gathered(role: str, whole: Sequence[Part], neurons: Sequence[np.ndarray]) -> list[Part]:
    take = gather_columns if role == "ffn_down" else gather_rows
    return [
        replace(part, tensor=take(part.tensor, numbers), **_inputs(role, part.importance, numbers, part.tensor.n_cols))
        for part, numbers in zip(whole, neurons, strict=True)
    ]


def _nonempty(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if 0 not in part.tensor.shape]


def _inputs(role: str, importance: np.ndarray | None, neurons: np.ndarray, n_cols: int) -> dict[str, object]:
    """What a part that has these of `n_cols` neurons says of its columns. Those of gate and up are no neurons."""
    if role != "ffn_down":
        return {"importance": importance}
    known = None if importance is None else importance[neurons]
    return {"importance": known, "columns": Columns(neurons, n_cols)}


def _side_by_side(layer: int, role: str, name: str, parts: Sequence[Part], preset: str) -> Slot:
    """Projections of several FFNs as those of one: down side by side, gate and up below each other."""
    rows, cols = parts[0].tensor.shape
    if role == "ffn_down":
        shape, bands = (rows, sum(part.tensor.n_cols for part in parts)), (tuple(parts),)
    else:
        shape, bands = (sum(part.tensor.n_rows for part in parts), cols), tuple((part,) for part in parts)
    return Slot(str(TensorName(layer, name, "weight")), shape, bands, preset)


def average(layer: int, role: str, shares: Sequence[Share], kind: str = "weight") -> Slot:
    """The sum of the experts' own projections, each times its factor: what a fine-grained mix collapses to."""
    name = str(TensorName(layer, role, kind))
    tensors = [expert.ffn(layer, role, kind) for expert, _ in shares]
    total = weighted_sum(name, tensors, [factor for _, factor in shares])
    known = [found for expert, _ in shares if (found := expert.importance(layer, role)) is not None]
    importance = np.mean(known, axis=0, dtype=np.float32) if known and kind == "weight" else None
    return Slot(name, total.shape, ((Part(total, importance=importance),),), _preset(shares))


def fuse_bias(layer: int, role: str, shares: Sequence[Share]) -> Slot:
    """The bias of a fused projection: gate and up side by side, down added up with its factors."""
    tensors = [expert.ffn(layer, role, "bias") for expert, _ in shares]
    name = str(TensorName(layer, role, "bias"))
    if role == "ffn_down":
        parts = (Part(weighted_sum(name, tensors, [factor for _, factor in shares])),)
    else:
        parts = tuple(map(Part, tensors))
    return Slot(name, (sum(part.tensor.n_cols for part in parts),), (parts,), _preset(shares))


def _part(layer: int, role: str, share: Share) -> Part:
    expert, factor = share
    return Part(expert.ffn(layer, role), _factor(role, factor), expert.importance(layer, role))


def _preset(shares: Sequence[Share]) -> str:
    """Experts of one group share a preset: the recipe made sure of it."""
    return shares[0][0].spec.quant


def _factor(role: str, factor: float) -> float:
    return factor if role == "ffn_down" else 1.0


def assemble(mix: Mix, ffn_slots) -> tuple[Slot, ...]:
    """All slots in file order: the FFN slots of each mixed layer (`ffn_slots(layer)`) after its trunk tensors."""
    by_layer: dict[int | None, list[Slot]] = {}
    for tensor in mix.trunk.values():
        by_layer.setdefault(TensorName.parse(tensor.name).layer, []).append(copy(tensor))
    slots = by_layer.pop(None)
    for layer in range(mix.n_layer):
        slots += by_layer[layer]
        slots += ffn_slots(layer) if layer in mix.layers else []
    return tuple(slots)


def architecture_metadata(mix: Mix, arch: str) -> Metadata:
    """The base's architecture keys, under the name of `arch`.

    Not those of a mix that the base once was: Ollama 0.24 renames `moegguf.*` to `llama.moegguf.*` when it quantises.
    """
    prefix = f"{mix.base.arch}."
    return {
        f"{arch}.{key.removeprefix(prefix)}": value
        for key, value in mix.base.metadata.items()
        if key.startswith(prefix) and not key.startswith(prefix + PREFIX)
    }


def u32(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)
