"""fused: one dense FFN per layer that computes the whole gate-less mix. Works for any gated architecture.

Σ a_e · down_e(act(gate_e x) ⊙ up_e x) is a single FFN whose gate and up hold all experts' rows and whose down
holds their columns, times a_e. The architecture stays the base's, with `feed_forward_length` = Σ n_ff: no
router and no indirect matrix product, so prompts run faster than through stacked experts. Where only some layers
are mixed, the widths become an array, for which the graph of `llama` has a twin: `deci` (llama.cpp,
src/models/deci.cpp). The other layers keep the trunk's FFN.

A fine-grained mix averages the outputs of gate, up and down each on its own; they are linear, so that is the dense
FFN of mean weights, as wide as one expert's. A compacted mix lies in between: copies of a neuron that are nearly alike
are one neuron (`moegguf.quant.neurons`), and every layer is as wide as what is left.
"""

from __future__ import annotations

from gguf import GGUFValue, GGUFValueType

from moegguf.families import PER_LAYER_WIDTHS
from moegguf.layouts.form import Share, architecture_metadata, assemble, average, compact, fuse, fuse_bias
from moegguf.mix import FFN_ROLES, Mix
from moegguf.quant.neurons import width as width_of
from moegguf.tensor import Form, Slot


def lay_out(mix: Mix) -> Form:
    shares = [(expert, expert.weight) for expert in mix.experts]
    width = mix.base.metadata[f"{mix.base.arch}.feed_forward_length"]
    if not mix.is_dense:
        width = _widened(width, mix)
    arch = PER_LAYER_WIDTHS.get(mix.base.arch, mix.base.arch) if isinstance(width.value, list) else mix.base.arch
    metadata = architecture_metadata(mix, arch) | {f"{arch}.feed_forward_length": width}
    return Form(arch, metadata, assemble(mix, lambda layer: _ffn_slots(mix, layer, shares)))


def _ffn_slots(mix: Mix, layer: int, shares: list[Share]) -> list[Slot]:
    if mix.is_dense:
        kinds = ("weight", "bias") if mix.has_ffn_bias else ("weight",)
        return [average(layer, role, shares, kind) for kind in kinds for role in FFN_ROLES]
    if layer in mix.groupings:
        return [compact(layer, role, shares, mix.groupings[layer]) for role in FFN_ROLES]
    slots = [fuse(layer, role, role, shares) for role in FFN_ROLES]
    return slots + ([fuse_bias(layer, role, shares) for role in FFN_ROLES] if mix.has_ffn_bias else [])


def _widened(value: GGUFValue, mix: Mix) -> GGUFValue:
    """The widths of mixed layers with the neurons of all experts: a scalar, or an array where layers differ."""
    n = len(mix.experts)
    dense = value.value if isinstance(value.value, list) else [value.value] * mix.n_layer
    widths = [n * width if layer in mix.layers else width for layer, width in enumerate(dense)]
    for layer, grouping in mix.groupings.items():
        widths[layer] = width_of(grouping)
    if not isinstance(value.value, list) and len(set(widths)) == 1:
        return GGUFValue(widths[0], value.type)
    return GGUFValue(widths, GGUFValueType.ARRAY, value.sub_type or value.type)
