"""What this machine can run: cores, memory, disk, packages, llama.cpp's devices, model stores.

Limits count: a container's CPU quota and memory limit, and the cores this process is pinned to; and of a Mac's cores
only the fast ones, as the others slow them down. What cannot be found out is None (or a fallback for the core count),
never an error.

Does not touch a GPU beyond asking ggml for its device list, and imports no package to learn its version.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil

import moegguf
from moegguf.runtime.offload import Device
from moegguf.stores import Store, is_folder, stores

PACKAGES = ("llama-cpp-python", "gguf", "numpy", "huggingface-hub", "torch", "transformers")
NEEDED = PACKAGES[:3]
BITS_PER_WEIGHT = 4.85  # Q4_K_M of a 7B model

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # cgroup v1 writes "no limit" as a huge number


@dataclass(frozen=True)
class Cores:
    """`usable`: physical cores this process may run on, quota applied; the default number of threads."""

    name: str
    logical: int
    usable: int


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes, or the container's share of it."""

    total: int
    available: int

    @property
    def largest_file(self) -> int:
        """Bytes of the largest GGUF that runs at full speed: a fifth is left to the context and everything else."""
        return int(0.8 * self.available)

    @property
    def largest_model(self) -> int:
        """Weights that `largest_file` holds at Q4_K_M."""
        return int(8 * self.largest_file / BITS_PER_WEIGHT)


@dataclass(frozen=True)
class Runtime:
    """The llama.cpp inside llama-cpp-python. `features` is what its CPU code was compiled to use."""

    ggml_version: str
    ggml_commit: str
    features: tuple[str, ...]
    devices: tuple[Device, ...]
    mmap: bool
    mlock: bool
    rpc: bool

    @property
    def has_gpu(self) -> bool:
        return any(device.kind in ("GPU", "IGPU") for device in self.devices)


@dataclass(frozen=True)
class Machine:
    """All that `moegguf doctor` shows. `runtime_error` says why llama.cpp did not load, when it did not."""

    system: str
    python: str
    cores: Cores
    memory: Memory
    disk_free: int
    packages: dict[str, str | None]
    runtime: Runtime | None
    runtime_error: str
    stores: tuple[Store, ...]

    @property
    def is_complete(self) -> bool:
        """Whether everything that moegguf cannot do without is here."""
        return self.runtime is not None and all(self.packages[name] for name in NEEDED)

    @property
    def advice(self) -> list[str]:
        """What is missing or could be better, each with what to do about it; empty when all is well."""
        lines = [f"{name} is not installed: pip install {name}" for name in NEEDED if self.packages[name] is None]
        if self.runtime is None:
            lines.append(f"llama.cpp does not load ({self.runtime_error}): reinstall llama-cpp-python")
        elif not self.runtime.has_gpu:
            lines.append(
                "no GPU backend: --gpu-layers has no effect; with a GPU, reinstall llama-cpp-python built for it, e.g."
                ' CMAKE_ARGS="-DGGML_CUDA=on" (or _METAL, _VULKAN, _HIP)'
            )
        else:
            lines.append("a GPU is there, and is used: `moegguf plan FILE` says for what")
        if self.packages["huggingface-hub"] is None:
            lines.append("huggingface-hub is not installed: hf: references need it")
        if self.memory.available < 2 * 10**9:
            lines.append("less than 2 GB of memory is available: close something, or take small models only")
        if self.disk_free < 10 * 10**9:
            lines.append("less than 10 GB of disk is free here: a mix of 7B models needs more")
        return lines

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {**asdict(self), "advice": self.advice}


def inspect_machine(folder: Path) -> Machine:
    """Look at this machine, with the disk that `folder` is on."""
    runtime, runtime_error = _load_runtime()
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cores=Cores(_cpu_name(), os.cpu_count() or 1, physical_cores()),
        memory=memory(),
        disk_free=shutil.disk_usage(folder).free,
        packages={"moegguf": moegguf.__version__} | {name: _version(name) for name in PACKAGES},
        runtime=runtime,
        runtime_error=runtime_error,
        stores=tuple(stores()),
    )


def has_gpu() -> bool:
    """Whether llama.cpp can put layers on a GPU here."""
    runtime, _ = _load_runtime()
    return runtime is not None and runtime.has_gpu


# --- cores ---


@functools.cache
def physical_cores() -> int:
    """Physical cores that this process may use, at least 1: hyperthreads, pinning and CPU quotas taken off."""
    ask = _PHYSICAL_CORES.get(sys.platform, lambda: psutil.cpu_count(logical=False))
    found = ask() or os.cpu_count() or 1
    return max(1, min(found, math.ceil(_cpu_quota() or found)))


def _linux_cores() -> int | None:
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(topology.format(cpu)) for cpu in os.sched_getaffinity(0)}
    return None if None in cores else len(cores)


def _macos_cores() -> int | None:
    return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")


_PHYSICAL_CORES: dict[str, Callable[[], int | None]] = {"linux": _linux_cores, "darwin": _macos_cores}


def _cpu_quota() -> float | None:
    """Cores that the container's quota is worth, or None without one."""
    for folder in _cgroups("cpu"):
        quota, period = (_text(folder / "cpu.max") or "max 1").split()
        if quota != "max":
            return int(quota) / int(period)
        v1_quota = int(_text(folder / "cpu.cfs_quota_us") or -1)
        if v1_quota > 0:
            return v1_quota / int(_text(folder / "cpu.cfs_period_us") or 100_000)
    return None


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    named = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo") or "")
    return named[1] if named else platform.processor() or platform.machine()


# --- memory ---


def memory() -> Memory:
    """Total and available memory, a container's limit applied."""
    found = psutil.virtual_memory()
    found = Memory(found.total, found.available)
    for limit, used in _memory_limits():
        found = Memory(min(found.total, limit), max(0, min(found.available, limit - used)))
    return found


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup we are in that has one; the page cache does not count as used."""
    for folder in _cgroups("memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "max"
        if limit == "max" or int(limit) >= _NO_LIMIT:
            continue
        used = int(_text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes") or 0)
        stat = _text(folder / "memory.stat") or ""
        cached = [re.search(rf"^(?:total_)?{kind}_file (\d+)", stat, re.M) for kind in ("inactive", "active")]
        yield int(limit), used - sum(int(found[1]) for found in cached if found)


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of our cgroup and its parents under `controller` (v1) or the unified tree (v2)."""
    for line in (_text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP / controller if controllers else _CGROUP
        here = root / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder.is_relative_to(root) and is_folder(folder))


# --- llama.cpp ---


def _load_runtime() -> tuple[Runtime | None, str]:
    try:
        import llama_cpp

        from moegguf.runtime.devices import devices, text

        return Runtime(
            ggml_version=text("ggml_version"),
            ggml_commit=text("ggml_commit"),
            features=tuple(re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode(errors="replace"))),
            devices=devices(),
            mmap=llama_cpp.llama_supports_mmap(),
            mlock=llama_cpp.llama_supports_mlock(),
            rpc=llama_cpp.llama_supports_rpc(),
        ), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a package, a shared library or a symbol
        return None, str(error).splitlines()[0]


# --- small things ---


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _sysctl(key: str) -> int | None:
    value = _run("sysctl", "-n", key)
    return int(value) if value and value.isdigit() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
