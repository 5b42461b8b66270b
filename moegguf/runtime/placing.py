"""Where a model goes: on this machine, by simulating its allocation, or on one that is only described.

`runtime.offload` decides; here it gets what it needs: the file's tensors, the devices with their free memory, and from
llama.cpp the buffers that each placement would take, laid out without allocating them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import llama_cpp
from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.gguf_header import Header, whole
from moegguf.runtime.devices import accelerators, resolved
from moegguf.runtime.footprint import footprint
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
from moegguf.runtime.run_options import RunOptions, ctx_of
from moegguf.runtime.workers import connect

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def place_model(header: Header, options: RunOptions) -> Placement:
    """Where the model of `header` goes on this machine and its workers. Raises UserError for devices that are missing.

    Where there is nothing but a CPU, that is known at once; else its allocation is simulated.
    """
    connect(options.offload.workers)
    if not accelerators(options.offload) and not options.offload.overrides:
        return Placement(n_layers(header))
    return plan_model(header, options).placement


def plan_model(header: Header, options: RunOptions) -> Plan:
    """The same, with the memory that each part of it takes."""

    def lay_out(placement: Placement) -> Footprint:
        return footprint(header.path, placement, _context_params(header, options, placement))

    connect(options.offload.workers)
    devices = accelerators(options.offload)
    asked = resolved(options.offload, devices)
    return find_plan(whole(header), devices, asked, lay_out, experts_used=options.experts_used)


def plan_elsewhere(header: Header, options: RunOptions, devices: Sequence[Device]) -> Plan:
    """The same for devices that are not here, each with the compute buffers that a CPU would need."""
    on_cpu = Placement(n_layers(header))
    here = footprint(header.path, on_cpu, _context_params(header, options, on_cpu))

    def lay_out(placement: Placement) -> Footprint:
        used = {name: here.compute[CPU] for name, n in zip(placement.devices, placement.layers, strict=True) if n}
        return replace(here, compute={**here.compute, **used})

    check_names(options.offload, devices)
    return find_plan(whole(header), devices, options.offload, lay_out, experts_used=options.experts_used)


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
