"""mixtral: architecture `llama`, experts stacked, a router in every layer. For every router mode.

The graph is softmax over all experts → top-k → divide by their sum → Σ p_e f_e (llama.cpp, src/models/llama.cpp).
Gate-less is a zero router with k = N: every p_e is exactly 1/N. Given weights a_e, down carries N · a_e.
"""

from __future__ import annotations

from moegguf import routers
from moegguf.layouts.form import architecture_metadata, assemble, stack, u32
from moegguf.mix import FFN_ROLES, Mix
from moegguf.recipe import RouterMode
from moegguf.tensor import Form, Part, Slot, constant


def lay_out(mix: Mix) -> Form:
    n = len(mix.experts)
    gateless = mix.router.mode is RouterMode.GATELESS
    shares = [(expert, n * expert.weight if gateless else 1.0) for expert in mix.experts]
    metadata = architecture_metadata(mix, mix.base.arch) | {
        f"{mix.base.arch}.expert_count": u32(n),
        f"{mix.base.arch}.expert_used_count": u32(mix.router.k),
    }

    def ffn_slots(layer: int) -> list[Slot]:
        return [router_slot(mix, layer, n), *(stack(layer, role, shares) for role in FFN_ROLES)]

    return Form(mix.base.arch, metadata, assemble(mix, ffn_slots))


def router_slot(mix: Mix, layer: int, n_expert: int) -> Slot:
    """blk.N.ffn_gate_inp.weight, float32 (n_expert, n_embd)."""
    name = f"blk.{layer}.ffn_gate_inp.weight"
    router = constant(name, routers.rows(mix.router, layer, n_expert, mix.n_embd))
    return Slot(name, router.shape, ((Part(router),),))
