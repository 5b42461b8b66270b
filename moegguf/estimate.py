"""What it takes to run a planned mix: weights, KV cache and compute buffers, from shapes alone.

An estimate for a dry run, made before any file exists; a runtime that has the file can ask llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moegguf.assembly import Plan
from moegguf.checks import check_range
from moegguf.errors import UserError
from moegguf.sizes import parse_size
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

    @property
    def budget(self) -> str:
        """All of it, as a recipe names a budget."""
        return f"{(self.ram + self.vram) / 1e9:.6g}GB"


def parse_fit(text: str, n_ctx: int | None = None) -> Fit:
    """What --fit RAM=SIZE[,VRAM=SIZE] and --ctx say. Raises UserError for what they cannot mean."""
    pairs = [part.partition("=") for part in str(text).split(",")]
    sizes = {name.strip().upper(): size for name, _, size in pairs}
    if "RAM" not in sizes or not set(sizes) <= {"RAM", "VRAM"} or not all(sizes.values()) or len(sizes) < len(pairs):
        raise UserError(f"--fit {text}: expected RAM=SIZE[,VRAM=SIZE]", "for example --fit RAM=16GB,VRAM=8GB")
    check_range("--ctx", n_ctx, 1)
    vram = parse_size(sizes["VRAM"]) if "VRAM" in sizes else 0
    return Fit(parse_size(sizes["RAM"]), vram, n_ctx or DEFAULT_CONTEXT)


def with_budget_of(fit: Fit, quant: Mapping[str, object]) -> dict[str, object]:
    """The `quant` table of a recipe, with that memory as its budget. Raises UserError where it has another one."""
    if quant.get("budget"):
        raise UserError("--fit and --budget: both set the size of the file", "leave one of them out")
    return {**quant, "budget": fit.budget}


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
    n_head_kv = largest(base.hparam("attention.head_count_kv", largest(base.hparam("attention.head_count"))))
    n_vocab = base.tensors["token_embd.weight"].n_rows
    n_ff = largest(base.hparam("feed_forward_length")) * plan.mix.router.k
    return Memory(
        n_ctx=n_ctx,
        weights=plan.n_bytes,
        kv_cache=2 * n_ctx * plan.mix.n_layer * n_head_kv * base.head_size * BYTES_F16,
        compute=MICRO_BATCH * BYTES_F32 * (n_vocab + 3 * n_ff + 4 * plan.mix.n_embd),
    )
