"""mixtral: architecture `llama`, experts stacked, a router in every layer. For every router mode.

The graph is softmax over all experts → top-k → divide by their sum → Σ p_e f_e (llama.cpp, src/models/llama.cpp).
Gate-less is a zero router with k = N: every p_e is exactly 1/N. Given weights a_e, down carries N · a_e.
"""

from __future__ import annotations

import numpy as np

from moegguf.layouts.form import architecture_metadata, assemble, stack, u32
from moegguf.mix import FFN_ROLES, Mix
from moegguf.routers import FFN
from moegguf.tensor import Form, Part, Slot, constant


def lay_out(mix: Mix) -> Form:
    n = len(mix.experts)
    shares = [(expert, n * expert.weight if mix.router.is_gateless else 1.0) for expert in mix.experts]
    metadata = architecture_metadata(mix, mix.base.arch) | {
        f"{mix.base.arch}.expert_count": u32(n),
        f"{mix.base.arch}.expert_used_count": u32(mix.router.k),
    }

    def ffn_slots(layer: int) -> list[Slot]:
        router = router_slot(mix.router.matrices[layer, FFN], layer)
        return [router, *(stack(layer, role, shares) for role in FFN_ROLES)]

    return Form(mix.base.arch, metadata, assemble(mix, ffn_slots))


def router_slot(matrix: np.ndarray, layer: int) -> Slot:
    """blk.N.ffn_gate_inp.weight, float32 (n_expert, n_embd)."""
    router = constant(f"blk.{layer}.ffn_gate_inp.weight", matrix)
    return Slot(router.name, router.shape, ((Part(router),),))
