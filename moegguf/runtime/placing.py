"""Where a model goes: on this machine, by simulating its allocation, or on one that is only described.

`runtime.offload` decides; here it gets what it needs: the file's tensors, the devices with their free memory, and from
llama.cpp the buffers that each placement would take, laid out without allocating them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import llama_cpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.gguf_header import Header, whole
from moegguf.runtime.devices import accelerators, resolved
from moegguf.runtime.footprint import LONG, footprint
from moegguf.runtime.machine import memory
from moegguf.runtime.offload import (
    CPU,
    Device,
    FlashAttention,
    Footprint,
    Placement,
    Plan,
    check_names,
    find_plan,
    n_layers,
)
from moegguf.runtime.run_options import MIN_CTX, RunOptions, ctx_of, hparam, key_of
from moegguf.runtime.workers import connect
from moegguf.sizes import show_size

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_SHORT = 4096, 8192


def place_model(header: Header, options: RunOptions) -> Placement:
    """Where the model of `header` goes on this machine and its workers. Raises UserError for devices that are missing.

    Where there is nothing but a CPU, that is known at once; else its allocation is simulated.
    """
    connect(options.offload.workers)
    devices = accelerators(options.offload)
    check_room([header], options, devices)
    if not devices and not options.offload.overrides:
        return Placement(n_layers(header))
    return plan_model(header, options).placement


def plan_model(header: Header, options: RunOptions) -> Plan:
    """Where the model of `header` goes on this machine and its workers, and the memory that each part of it takes."""

    def lay_out(placement: Placement) -> Footprint:
        return _laid_out(header, options, placement)

    connect(options.offload.workers)
    devices = accelerators(options.offload)
    asked = resolved(options.offload, devices)
    return find_plan(whole(header), devices, asked, lay_out, experts_used=options.experts_used)


def plan_elsewhere(header: Header, options: RunOptions, devices: Sequence[Device]) -> Plan:
    """Where the model would go on `devices` that are not here; each is taken to need the compute buffers of a CPU."""
    here = _laid_out(header, options, Placement(n_layers(header)))

    def lay_out(placement: Placement) -> Footprint:
        used = {name: here.compute[CPU] for name, n in zip(placement.devices, placement.layers, strict=True) if n}
        return replace(here, compute={**here.compute, **used})

    check_names(options.offload, devices)
    return find_plan(whole(header), devices, options.offload, lay_out, experts_used=options.experts_used)


def check_room(
    headers: Sequence[Header], options: RunOptions, devices: Sequence[Device], *, ctx: int | None = None, slots: int = 1
) -> None:
    """Raises UserError where contexts cannot be had with all free memory, that of `devices` too.

    Each file gets `slots` of them, of `ctx` tokens or what `options` say. llama.cpp would fill memory with their caches
    until the system ends the program. Compute buffers are only counted beyond a million tokens: they are filled as far
    as a context is.
    """
    room = memory().available + sum(device.room for device in devices)
    lengths = [ctx or ctx_of(header, options) for header in headers]
    needed = sum(_context_bytes(each, options, slots * n, room) for each, n in zip(headers, lengths, strict=True))
    if needed > room:
        fitting = min(_fitting_cells(each, options, room // len(headers)) for each in headers) // slots
        take = f"a context of {lengths[0]} tokens takes"
        if slots * len(headers) > 1:
            take = f"{slots * len(headers)} contexts, {lengths[0]} tokens in each, take"
        raise UserError(
            f"{', '.join(str(each.path) for each in headers)}: {take} {show_size(needed, up=True)} of memory, "
            f"{show_size(room)} are free",
            f"--ctx {fitting} fits" if fitting >= MIN_CTX else "take a smaller model",
        )


def _context_bytes(header: Header, options: RunOptions, n_cells: int, room: int) -> int:
    """What a context takes: of the cache alone where that clearly has room, else as llama.cpp lays it out."""
    reckoned = n_cells * _bytes_per_token(header, options.kv_type)
    if n_cells <= LONG and reckoned <= room:
        return reckoned
    found = _laid_out(header, replace(options, ctx=n_cells), Placement(n_layers(header)))
    return found.total() if n_cells > LONG else found.kv_cache


def _fitting_cells(header: Header, options: RunOptions, room: int) -> int:
    """How many tokens fit `room` bytes of main memory, with the weights and what llama.cpp computes in; 0 for none."""
    on_cpu = Placement(n_layers(header))
    short, long = (_laid_out(header, replace(options, ctx=n_cells), on_cpu).total() for n_cells in _SHORT)
    per_token = (long - short) / (_SHORT[1] - _SHORT[0])
    weights = sum(info.nbytes for info in whole(header).tensors.values())
    return max(0, int((room - weights - short) / per_token) + _SHORT[0]) // 256 * 256


def _bytes_per_token(header: Header, kv_type: GGMLQuantizationType) -> int:
    """What a token takes in the key-value cache at most, by the header's numbers; 0 where it has none."""
    n_head, n_kv = (header.get(key_of(header, f"attention.{name}"), 0) for name in ("head_count", "head_count_kv"))
    per_layer = n_kv or n_head  # a list where layers differ
    n_heads = sum(per_layer) if isinstance(per_layer, list) else n_layers(header) * per_layer
    width = hparam(header, "embedding_length", 0) // max(max(n_head) if isinstance(n_head, list) else n_head, 1)
    widths = sum(hparam(header, f"attention.{kind}_length", width) for kind in ("key", "value"))
    n_values, n_bytes = GGML_QUANT_SIZES[kv_type]
    return n_heads * widths * n_bytes // n_values


def _laid_out(header: Header, options: RunOptions, placement: Placement) -> Footprint:
    """What running takes besides the weights."""
    return footprint(header.path, placement, _context_params(header, options, placement))


def flash_attention(options: RunOptions, placement: Placement) -> FlashAttention:
    """What llama.cpp is told. Raises UserError where the cache needs what was turned off."""
    kv, asked = options.kv_type, options.flash_attention
    if kv not in _FLOATS and asked is FlashAttention.OFF:
        raise UserError(f"--kv-type {kv.name.lower()} needs flash attention", "leave --flash-attn off out")
    is_better_off = kv is GGMLQuantizationType.F32 or (kv in _FLOATS and not placement.n_gpu_layers)
    return FlashAttention.OFF if asked is FlashAttention.AUTO and is_better_off else asked


def _context_params(header: Header, options: RunOptions, placement: Placement) -> llama_cpp.llama_context_params:
    """What `runtime.model` asks of a context, as far as it changes memory."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = ctx_of(header, options)
    params.n_batch = params.n_ubatch = min(options.batch, params.n_ctx)
    params.type_k = params.type_v = int(options.kv_type)
    params.flash_attn_type = flash_attention(options, placement).value
    return params
