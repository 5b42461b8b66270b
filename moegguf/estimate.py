"""What it takes to run a planned mix: weights, KV cache and compute buffers, from shapes alone.

An estimate for a dry run, made before any file exists; a runtime that has the file can ask llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from moegguf.assembly import Plan
from moegguf.tensor import largest

DEFAULT_CONTEXT = 4096
MICRO_BATCH = 512  # llama.cpp's default n_ubatch
BYTES_F16, BYTES_F32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes. `kv_cache` is for `n_ctx` tokens in f16."""

    n_ctx: int
    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute


@dataclass(frozen=True)
class Fit:
    """Bytes of memory that there are to run a mix with a context of `n_ctx` tokens."""

    ram: int
    vram: int
    n_ctx: int


def largest_file(plan: Plan, fit: Fit, compute: int) -> int:
    """Bytes of the largest file of this mix that runs within `fit`, where `compute` are the bytes of compute buffers.

    A GPU has compute buffers of its own, and takes whole layers: what one layer takes is left free for that.
    """
    for_weights = fit.ram + fit.vram - memory_to_run(plan, fit.n_ctx).kv_cache - compute * (2 if fit.vram else 1)
    return for_weights * plan.mix.n_layer // (plan.mix.n_layer + 1) if fit.vram else for_weights


def memory_to_run(plan: Plan, n_ctx: int = DEFAULT_CONTEXT) -> Memory:
    """Memory of the mix at `n_ctx` tokens, or at the model's own context if that is shorter."""
    base = plan.mix.base
    n_ctx = min(n_ctx, int(base.hparam("context_length", n_ctx)))
    n_head = largest(base.hparam("attention.head_count"))
    n_head_kv = largest(base.hparam("attention.head_count_kv", n_head))
    head_dim = int(base.hparam("attention.key_length", plan.mix.n_embd // n_head))
    n_vocab = base.tensors["token_embd.weight"].n_rows
    n_ff = largest(base.hparam("feed_forward_length")) * plan.mix.router.k
    return Memory(
        n_ctx=n_ctx,
        weights=plan.n_bytes,
        kv_cache=2 * n_ctx * plan.mix.n_layer * n_head_kv * head_dim * BYTES_F16,
        compute=MICRO_BATCH * BYTES_F32 * (n_vocab + 3 * n_ff + 4 * plan.mix.n_embd),
    )
