"""From a file and what was asked for it to what its server is told, checked as far as headers allow."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.gguf_header import Header, read_header
from moegguf.metadata import Card, read_card
from moegguf.runtime.model import check_adapter, check_experts_used
from moegguf.runtime.offload import ALL, Offload, Placement
from moegguf.runtime.run_options import RunOptions, ctx_of, threads_for
from moegguf.runtime.sampling import SETTINGS, suggested_by_file
from moegguf.runtime.serve import llama_server, own_server
from moegguf.runtime.serve.llama_server import ALL_LAYERS, FITTING_LAYERS

_SAMPLING_NAMES = {"repeat_penalty": "penalty_repeat"}
"""Ours → llama.cpp's, where they differ."""


@dataclass(frozen=True)
class Served:
    """A file that was found fit to be served."""

    header: Header
    card: Card | None
    settings: llama_server.Settings | own_server.Settings
    ctx: int
    """Tokens that a conversation may take."""
    only_own: Sequence[str] = ()
    """The flags for which moegguf's own server answers, and not llama.cpp's."""


def only_own_can(options: RunOptions) -> list[str]:
    """The flags that llama.cpp's server in the xllamacpp package has nothing for: moegguf's own serves them."""
    asked = {
        "--rpc": bool(options.offload.workers),
        "--device": bool(options.offload.devices),
        "--experts-used": options.experts_used is not None,
    }
    return [flag for flag, is_asked in asked.items() if is_asked]


def prepare_own(name: str, path: Path, options: RunOptions) -> Served:
    """Check the file for moegguf's own server. Raises UserError; what the machine allows is found out when it loads."""
    header = read_header(path)
    card = read_card(header)
    check_experts_used(header, card, options.experts_used)
    settings = own_server.Settings(str(path.absolute()), name, secrets.token_urlsafe(32), options)
    return Served(header, card, settings, ctx_of(header, options), only_own_can(options))


def prepare(name: str, path: Path, options: RunOptions, *, slots: int, adapters: Sequence[Path]) -> Served:
    """Check the file for llama.cpp's server, its adapters and what is asked of the machine. Raises UserError."""
    header = read_header(path)
    card = read_card(header)
    check_experts_used(header, card, options.experts_used)
    for adapter in adapters:
        check_adapter(read_header(adapter), header)
    settings = llama_server.Settings(
        model=str(path.absolute()),
        name=name,
        key=secrets.token_urlsafe(32),
        ctx=ctx_of(header, options),
        slots=slots,
        threads=options.threads or threads_for(header),
        batch=options.batch,
        sampling=_sampling(header),
        adapters=[str(adapter.absolute()) for adapter in adapters],
        has_pooling=f"{header.get('general.architecture')}.pooling_type" in header.fields,
        kv_type=options.kv_type.name,
        flash_attention={"AUTO": "AUTO", "ON": "ENABLED", "OFF": "DISABLED"}[options.flash_attention.name],
        load_mode=_LOAD_MODES[options.mmap, options.mlock],
        is_verbose=options.verbose,
        **_placement(header, options.offload),
    )
    return Served(header, card, settings, settings.ctx)


_LOAD_MODES = {
    (True, False): "MMAP",
    (True, True): "MMAP_MLOCK",
    (False, False): "NONE",
    (False, True): "MLOCK",
}
"""(mmap, mlock) → enum llama_load_mode."""


def _sampling(header: Header) -> dict[str, float]:
    """The defaults of `chat`, so that both answer alike: ours, or the file's own."""
    suggested = suggested_by_file(header.get)
    return {_SAMPLING_NAMES.get(name, name): getattr(suggested, name) for name, s in SETTINGS.items() if s.file_key}


def _placement(header: Header, asked: Offload) -> dict[str, object]:
    """The fields of Settings that say what goes where. What fits is left to llama.cpp, which knows its own devices."""
    n_layer = header.get(f"{header.get('general.architecture')}.block_count", 0)
    n_left = n_layer if asked.cpu_experts == ALL else min(asked.cpu_experts, n_layer)
    overrides = Placement(n_layer, cpu_experts=tuple(range(n_left)), overrides=asked.overrides).all_overrides
    layers = {None: FITTING_LAYERS, ALL: ALL_LAYERS}.get(asked.layers, asked.layers)
    return dict(
        gpu_layers=0 if asked.devices == () else layers,
        tensor_overrides=",".join(f"{override.pattern}={override.device}" for override in overrides),
        main_gpu=asked.main_gpu,
        tensor_split=list(asked.tensor_split),
    )
