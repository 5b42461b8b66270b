"""How a file would run on a machine: this one with its workers, or one that is only described.

Nothing is loaded: llama.cpp lays out its buffers without allocating them. A described GPU is taken to need the compute
buffers that a CPU needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header, whole
from moegguf.metadata import read_card
from moegguf.runtime.bandwidth import device_bandwidth, memory_bandwidth
from moegguf.runtime.devices import accelerators
from moegguf.runtime.machine import memory, physical_cores
from moegguf.runtime.model import check_experts_used
from moegguf.runtime.offload import CPU, Device
from moegguf.runtime.placing import plan_elsewhere, plan_model
from moegguf.runtime.planning import Outlook, suggestions
from moegguf.runtime.run_options import RunOptions
from moegguf.runtime.workers import connect
from moegguf.sizes import size_of

Size = int | str
"""Bytes, or words such as "8GB"."""


@dataclass(frozen=True)
class Forecast:
    """Where a file would go, what memory each part takes, how fast it would be, and what would make it fit."""

    path: Path
    outlook: Outlook
    suggestions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.outlook.fits

    @property
    def room(self) -> dict[str, int]:
        """Device → bytes that it has for a model; the CPU's is main memory."""
        return {CPU: self.outlook.ram} | {device.name: device.room for device in self.outlook.plan.devices}

    def as_json(self) -> dict:
        outlook, plan = self.outlook, self.outlook.plan
        return {
            "file": str(self.path),
            "fits": self.fits,
            "flags": plan.placement.flags(),
            "layers": dict(zip(plan.placement.devices, plan.placement.layers, strict=True)),
            "cpu_experts": plan.placement.cpu_experts,
            "memory": {device: dict(parts) for device, parts in plan.memory.items()},
            "room": self.room,
            "bytes_per_token": {"empty": dict(plan.touched(full=False)), "full": dict(plan.touched(full=True))},
            "bandwidth": dict(outlook.bandwidth),
            "tokens_per_s": {"empty": outlook.tokens_per_s(full=False), "full": outlook.tokens_per_s(full=True)},
            "suggestions": list(self.suggestions),
        }


def forecast(
    path: Path,
    options: RunOptions,
    *,
    vram: Sequence[Size] | None = None,
    ram: Size | None = None,
    bandwidth: Size | None = None,
    vram_bandwidth: Size | None = None,
) -> Forecast:
    """How the file at `path` would run with `options`.

    With `vram`, the free memory of each GPU, or `ram`, it is another machine. Bandwidths are bytes in a second; those
    of this machine are measured. Raises UserError.
    """
    model = whole(read_header(path))
    card = read_card(model)
    check_experts_used(model, card, options.experts_used)
    given = _Bandwidths(_bandwidth("--bandwidth", bandwidth), _bandwidth("--vram-bandwidth", vram_bandwidth))
    if vram is None and ram is None:
        machine = _here(options, given)
    else:
        gpus = [size_of("--vram", each) for each in vram or ()]
        machine = _elsewhere(options, gpus, memory().available if ram is None else size_of("--ram", ram), given)

    def outlook(options: RunOptions) -> Outlook:
        return machine.outlook(model, options)

    found = outlook(options)
    return Forecast(path, found, tuple(suggestions(found, model, card, options, outlook)))


@dataclass(frozen=True)
class _Bandwidths:
    """Bytes in a second that a user says main memory and each device's memory read, if anything."""

    ram: int | None
    vram: int | None


@dataclass(frozen=True)
class _Machine:
    """`ram`: bytes of main memory to give; `bandwidth`: device → bytes in a second, as far as known."""

    devices: Sequence[Device]
    ram: int
    bandwidth: Mapping[str, float]
    is_here: bool

    def outlook(self, model: Header, options: RunOptions) -> Outlook:
        plan = plan_model(model, options) if self.is_here else plan_elsewhere(model, options, self.devices)
        return Outlook(plan, self.ram, self.bandwidth)


def _here(options: RunOptions, given: _Bandwidths) -> _Machine:
    connect(options.offload.workers)
    devices = accelerators(options.offload)
    speeds = {device.name: given.vram or device_bandwidth(device.name) for device in devices}
    speeds[CPU] = given.ram or memory_bandwidth(options.threads or physical_cores())
    return _Machine(devices, memory().available, _known(speeds), is_here=True)


def _elsewhere(options: RunOptions, gpus: Sequence[int], ram: int, given: _Bandwidths) -> _Machine:
    asked = options.offload
    if asked.workers or asked.devices is not None or asked.main_gpu is not None:
        raise UserError("--vram and --ram describe another machine", "leave --rpc, --device and --main-gpu out")
    devices = [Device(f"GPU{i}", "described", "GPU", size, size) for i, size in enumerate(gpus)]
    speeds = dict.fromkeys((device.name for device in devices), given.vram) | {CPU: given.ram}
    return _Machine(devices, ram, _known(speeds), is_here=False)


def _known(speeds: Mapping[str, float | None]) -> dict[str, float]:
    return {name: speed for name, speed in speeds.items() if speed}


def _bandwidth(flag: str, size: Size | None) -> int | None:
    return None if size is None else size_of(flag, size.removesuffix("/s") if isinstance(size, str) else size)
