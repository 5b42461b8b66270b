"""fused: one dense FFN per layer that computes the whole gate-less mix. Works for any gated architecture.

Σ a_e · down_e(act(gate_e x) ⊙ up_e x) is a single FFN whose gate and up hold all experts' rows and whose down
holds their columns, times a_e. The architecture stays the base's, with `feed_forward_length` = Σ n_ff: no
router and no indirect matrix product, so prompts run faster than through stacked experts.
"""

from __future__ import annotations

from gguf import GGUFValue

from moegguf.layouts.form import architecture_metadata, assemble, fuse, fuse_bias
from moegguf.mix import FFN_ROLES, Mix
from moegguf.tensor import Form, Slot


def lay_out(mix: Mix) -> Form:
    shares = [(expert, expert.weight) for expert in mix.experts]
    key = f"{mix.base.arch}.feed_forward_length"
    metadata = architecture_metadata(mix, mix.base.arch)
    metadata[key] = _times(metadata[key], len(mix.experts))

    def ffn_slots(layer: int) -> list[Slot]:
        slots = [fuse(layer, role, role, shares) for role in FFN_ROLES]
        if mix.has_ffn_bias:
            slots += [fuse_bias(layer, role, shares) for role in FFN_ROLES]
        return slots

    return Form(mix.base.arch, metadata, assemble(mix, ffn_slots))


def _times(value: GGUFValue, n: int) -> GGUFValue:
    """The widths of all layers times n: a scalar, or an array where the layers of the base differ."""
    widths = [n * width for width in value.value] if isinstance(value.value, list) else n * value.value
    return GGUFValue(widths, value.type, value.sub_type)
