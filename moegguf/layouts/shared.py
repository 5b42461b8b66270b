"""shared: an always-on FFN beside a routed stack, in one layer. Architecture `granitemoe`.

Its graph is that of `llama` plus a shared expert, added to the routed output (llama.cpp, src/models/granite.cpp):
out = shared(x) + Σ p_e f_e(x). The factors are folded into `down`. With granite's scales at 1, and attention's at
1/√head, the rest is the same computation, rotary order included. llama.cpp does without most of them; the copy of it in
Ollama up to 0.24 asks for each.

Gate-less: the shared group holds the experts of one precision, fused, each times its weight; the stack holds the
others behind a zero router with k = its size R, each times R · weight. Of two precisions the finer one is shared;
with a single precision all experts but the last are.
Split: the shared group holds the fine neurons of all experts, the stack the others, as one expert behind a zero router,
which gets the whole weight of 1. The graph has one width for each group (llama.cpp, src/models/granite.cpp and
src/llama-hparams.h: `n_ff_shexp`), so all layers have equally many fine neurons.
Always-on, with k of them active in all: shared is f_a / k, the stack carries (k − 1) / k and k − 1 are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.layouts.form import Share, architecture_metadata, assemble, fuse, gather, stack, u32
from moegguf.layouts.mixtral import router_slot
from moegguf.mix import FFN_ROLES, Mix
from moegguf.quant.presets import preset_names
from moegguf.quant.split import Split
from moegguf.routers import FFN
from moegguf.tensor import Form, Metadata, Slot

ARCH = "granitemoe"


def lay_out(mix: Mix) -> Form:
    return _of_neurons(mix, mix.split) if mix.split else _of_experts(mix)


def _of_neurons(mix: Mix, groups: Split) -> Form:
    shares = [(expert, expert.weight) for expert in mix.experts]
    width = u32(groups.n_neurons - groups.n_fine)
    metadata = _metadata(mix, 1, groups.n_fine, 1) | {f"{ARCH}.feed_forward_length": width}

    def ffn_slots(layer: int) -> list[Slot]:
        coarse, fine = (
            [gather(layer, role, f"{role}_{suffix}", shares, neurons) for role in FFN_ROLES]
            for suffix, neurons in (("exps", groups.coarse(layer)), ("shexp", groups.fine(layer)))
        )
        stacked = [replace(slot, shape=(1, *slot.shape)) for slot in coarse]
        return [router_slot(np.zeros((1, mix.n_embd)), layer), *stacked, *fine]

    return Form(ARCH, metadata, assemble(mix, ffn_slots))


def _of_experts(mix: Mix) -> Form:
    shared, routed, k = _groups(mix)
    metadata = _metadata(mix, len(routed), len(shared) * int(mix.base.hparam("feed_forward_length")), k)

    def ffn_slots(layer: int) -> list[Slot]:
        matrix = np.zeros((len(routed), mix.n_embd)) if mix.router.is_gateless else mix.router.matrices[layer, FFN]
        slots = [router_slot(matrix, layer), *(stack(layer, role, routed) for role in FFN_ROLES)]
        if shared:
            slots += [fuse(layer, role, f"{role}_shexp", shared) for role in FFN_ROLES]
        return slots

    return Form(ARCH, metadata, assemble(mix, ffn_slots))


def _groups(mix: Mix) -> tuple[list[Share], list[Share], int]:
    """The shared group, the routed stack, and how many of the stack run for a token."""
    quants = {expert.name: expert.spec.quant for expert in mix.experts}
    names, _ = split(quants, mix.router.always_on)
    in_shared = [expert for expert in mix.experts if expert.name in names]
    in_routed = [expert for expert in mix.experts if expert.name not in names]
    if mix.router.always_on:
        k = mix.router.k
        return [(e, 1 / k) for e in in_shared], [(e, (k - 1) / k) for e in in_routed], k - 1
    size = len(in_routed)
    return [(e, e.weight) for e in in_shared], [(e, size * e.weight) for e in in_routed], size


def split(quants: Mapping[str, str], always_on: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The experts of the shared group and those of the stack, in order. `quants`: expert → preset, or what all experts
    have instead; without an `always_on` expert the mix is gate-less."""
    if always_on:
        shared = [always_on]
    elif len(set(quants.values())) == 1:
        shared = list(quants)[:-1]
    else:
        finest = min(quants.values(), key=preset_names().index)
        shared = [name for name, quant in quants.items() if quant == finest]
    return tuple(shared), tuple(name for name in quants if name not in shared)


def _metadata(mix: Mix, n_routed: int, shared_width: int, k: int) -> Metadata:
    metadata = architecture_metadata(mix, ARCH)
    metadata.pop(f"{ARCH}.rope.scaling.finetuned", None)  # granite reads it as "no RoPE at all"
    one, scale = np.float32(1), np.float32(1) / np.sqrt(np.float32(mix.base.head_size))  # as llama.cpp computes it
    scales = {"logit_scale": one, "residual_scale": one, "embedding_scale": one, "attention.scale": scale}
    metadata |= {f"{ARCH}.{key}": GGUFValue(float(value), GGUFValueType.FLOAT32) for key, value in scales.items()}
    return metadata | {
        f"{ARCH}.expert_count": u32(n_routed),
        f"{ARCH}.expert_used_count": u32(k),
        f"{ARCH}.expert_shared_feed_forward_length": u32(shared_width),
    }
