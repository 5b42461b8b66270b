"""From a file and what was asked for it to what its server is told, checked as far as headers allow."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.checks import LARGEST, check_range
from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.metadata import Card, read_card
from moegguf.runtime.devices import devices
from moegguf.runtime.model import check_adapter, check_experts_used
from moegguf.runtime.offload import ALL, Offload, Placement
from moegguf.runtime.placing import check_room
from moegguf.runtime.run_options import MIN_CTX, RunOptions, ctx_of, hparam, key_of, threads_for
from moegguf.runtime.sampling import SETTINGS, suggested_by_file
from moegguf.runtime.serve import llama_server, own_server
from moegguf.runtime.serve.llama_server import ALL_LAYERS, FITTING_LAYERS

DEFAULT_SLOTS = 4
MAX_SLOTS = 256  # LLAMA_MAX_SEQ of llama.cpp

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


def name_of(path: Path) -> str:
    """What a model is called where no name is given: as its file, without the number of the first part."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)


def prepare(
    paths: Mapping[str, Path], options: RunOptions, *, slots: int | None, adapters: Mapping[str, Sequence[Path]]
) -> list[Served]:
    """Check every file, its adapters and what is asked of the machine. `paths` and `adapters` are by models' names.

    Raises UserError; what only llama.cpp can know is found out when a model is loaded.
    """
    check_range("--parallel", slots, 1, MAX_SLOTS)
    n_slots = slots or DEFAULT_SLOTS
    check_range("--ctx", options.ctx, MIN_CTX, LARGEST // n_slots)
    check_range("--batch", options.batch, 32)
    if flags := _only_own_can(options):
        _check_own(flags, options, n_models=len(paths), slots=slots or 1, has_adapters=any(adapters.values()))
        n_slots = 1
        found = [_prepared_own(name, path, options, flags) for name, path in paths.items()]
    else:
        found = [_prepared(name, path, options, n_slots, adapters.get(name, ())) for name, path in paths.items()]
    if not options.offload.workers:  # what they have is found out when the model is loaded
        there = [device for device in devices() if device.kind == "GPU"]
        check_room([served.header for served in found], options, there, slots=n_slots)
    return found


def _only_own_can(options: RunOptions) -> list[str]:
    """The flags that llama.cpp's server in the xllamacpp package has nothing for: moegguf's own serves them."""
    asked = {
        "--rpc": bool(options.offload.workers),
        "--device": bool(options.offload.devices),
        "--experts-used": options.experts_used is not None,
    }
    return [flag for flag, is_asked in asked.items() if is_asked]


def _check_own(flags: Sequence[str], options: RunOptions, *, n_models: int, slots: int, has_adapters: bool) -> None:
    """Raises UserError for what moegguf's own server, which these flags ask for, cannot do."""
    if slots > 1:
        raise UserError(
            f"--parallel {slots}: with {', '.join(flags)} there is one answer at a time", "leave --parallel out"
        )
    if has_adapters:
        raise UserError(
            f"--adapter: with {', '.join(flags)} requests cannot choose adapters",
            "build the mix with that router, or leave one of the flags out",
        )
    if options.offload.workers and n_models > 1:
        raise UserError(f"--rpc: a worker serves one program at a time, not {n_models} models", "serve one of them")


def _prepared_own(name: str, path: Path, options: RunOptions, flags: Sequence[str]) -> Served:
    header = read_header(path)
    card = read_card(header)
    check_experts_used(header, card, options.experts_used)
    settings = own_server.Settings(str(path.absolute()), name, secrets.token_urlsafe(32), options)
    return Served(header, card, settings, ctx_of(header, options), flags)


def _prepared(name: str, path: Path, options: RunOptions, slots: int, adapters: Sequence[Path]) -> Served:
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
        has_pooling=key_of(header, "pooling_type") in header.fields,
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
    n_layer = hparam(header, "block_count", 0)
    n_left = n_layer if asked.cpu_experts == ALL else min(asked.cpu_experts, n_layer)
    overrides = Placement(n_layer, cpu_experts=tuple(range(n_left)), overrides=asked.overrides).all_overrides
    layers = {None: FITTING_LAYERS, ALL: ALL_LAYERS}.get(asked.layers, asked.layers)
    return dict(
        gpu_layers=0 if asked.devices == () else layers,
        tensor_overrides=",".join(f"{override.pattern}={override.device}" for override in overrides),
        main_gpu=asked.main_gpu,
        tensor_split=list(asked.tensor_split),
    )
