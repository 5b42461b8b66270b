"""llama.cpp's own server for one model, in a process of its own.

The server comes from the `xllamacpp` wheel. It has a process to itself because it takes over Ctrl-C, because what it
says when a model does not load is on stderr alone, and because a fault in it is then not the end of the others.

Run as a program this is that process, as `child` has it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from moegguf.runtime.serve import child

PROMPT_CACHE_MIB = 1024
"""Main memory for the states of earlier prompts (llama.cpp's own default is 8 GiB)."""
ALL_LAYERS, FITTING_LAYERS = -2, -1  # n_gpu_layers of common/common.h
_MAX_DEVICES = 128


@dataclass(frozen=True)
class Settings:
    """What one server is to do, in llama.cpp's own words where it has some. Everything survives JSON."""

    module: ClassVar[str] = "moegguf.runtime.serve.llama_server"
    program: ClassVar[str] = "llama.cpp's server"
    model: str
    """Path of the GGUF."""
    name: str
    """What requests call it."""
    key: str
    """Opens the server to requests."""
    ctx: int
    """Tokens that a slot holds."""
    slots: int
    """Requests that are answered at a time."""
    threads: int
    batch: int
    """Tokens evaluated at once, and the longest text to embed."""
    sampling: dict[str, float]
    """Defaults of requests, by llama.cpp's names."""
    adapters: list[str]
    """LoRA GGUFs, each at scale 0 until a request sets it."""
    has_pooling: bool
    """Whether the file says how token states become the embedding of a text; if not, their mean does."""
    kv_type: str
    flash_attention: str
    load_mode: str
    gpu_layers: int
    tensor_overrides: str
    main_gpu: int | None
    tensor_split: list[float]
    is_verbose: bool

    @property
    def n_adapters(self) -> int:
        return len(self.adapters)

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str) -> Settings:
        return cls(**json.loads(line))


def start(line: str) -> tuple[int, object]:
    """Serve as `line` says; returns the port and the server."""
    import xllamacpp

    server = xllamacpp.Server(_params(xllamacpp, Settings.from_line(line)))
    return int(server.listening_address.rpartition(":")[2]), server


def _params(x: Any, settings: Settings) -> Any:
    """`settings` as xllamacpp's CommonParams."""
    params = x.CommonParams()
    params.model.path, params.model_alias = settings.model, {settings.name}
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [settings.key]
    params.cors_origins = ""
    params.endpoint_metrics = True
    params.verbosity = 3 if settings.is_verbose else 1

    params.n_parallel, params.n_ctx = settings.slots, settings.ctx * settings.slots
    params.n_batch = params.n_ubatch = settings.batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    params.cache_prompt, params.cache_ram_mib = not settings.adapters, 0 if settings.adapters else PROMPT_CACHE_MIB
    params.cache_type_k = params.cache_type_v = x.ggml_type[f"GGML_TYPE_{settings.kv_type}"]
    params.flash_attn_type = x.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{settings.flash_attention}"]

    params.embedding = True
    if not settings.has_pooling:
        params.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    for name, value in settings.sampling.items():
        setattr(params.sampling, name, value)
    params.lora_adapters = [x.CommonAdapterLoraInfo(path, 0.0) for path in settings.adapters]
    params.lora_init_without_apply = True
    _place(params, x, settings)
    return params


def _place(params: Any, x: Any, settings: Settings) -> None:
    """Say what goes where. Raises ValueError for devices that are not there, which the parent reports."""
    params.load_mode = x.llama_load_mode[f"LLAMA_LOAD_MODE_{settings.load_mode}"]
    params.n_gpu_layers, params.fit_params = settings.gpu_layers, settings.gpu_layers == FITTING_LAYERS
    asked = {
        "--gpu-layers": settings.gpu_layers not in (0, FITTING_LAYERS),
        "--main-gpu": settings.main_gpu is not None,
        "--tensor-split": bool(settings.tensor_split),
    }
    if any(asked.values()) and not any(kind.endswith("GPU") for _, kind in _devices(x)):
        flags = " and ".join(flag for flag, is_asked in asked.items() if is_asked)
        raise ValueError(f"xllamacpp sees no GPU here: leave {flags} out, or install its wheel for your GPU")
    if settings.tensor_overrides:
        try:
            params.tensor_buft_overrides = settings.tensor_overrides
        except ValueError:
            known = ", ".join(name for name, _ in _devices(x))
            raise ValueError(f"an override names an unknown device; xllamacpp knows {known}") from None
    if settings.main_gpu is not None:
        params.main_gpu, params.split_mode = settings.main_gpu, x.llama_split_mode.LLAMA_SPLIT_MODE_NONE
    if settings.tensor_split:
        params.tensor_split = [*settings.tensor_split, *[0.0] * (_MAX_DEVICES - len(settings.tensor_split))]


def _devices(x: Any) -> list[tuple[str, str]]:
    """Name and kind of every device; kinds end with CPU, GPU, IGPU or ACCEL (enum ggml_backend_dev_type)."""
    return [(device["name"], device["type"].name) for device in x.get_device_info()]


if __name__ == "__main__":
    child.run(start)
