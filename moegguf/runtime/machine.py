"""What this machine can run: cores, memory, disk, packages, llama.cpp's devices, model stores.

Read from the operating system without a dependency: /proc and /sys on Linux, sysctl and vm_stat on macOS,
kernel32 on Windows. Limits count: a container's CPU quota and memory limit, and the cores this process is
pinned to. What cannot be found out is None (or a fallback for the core count), never an error.

Does not touch a GPU beyond asking ggml for its device list, and imports no package to learn its version.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import moegguf

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
class Device:
    """A device that ggml can compute on. `kind` is CPU, GPU, IGPU (shares main memory) or ACCEL; memory in bytes."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int


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
class Store:
    """A place where another program keeps models."""

    name: str
    path: str
    models: int


@dataclass(frozen=True)
class Machine:
    """All that `moegguf doctor` shows. `runtime_error` says why llama.cpp did not load, when it did not."""

    system: str
    python: str
    cores: Cores
    memory: Memory | None
    disk_free: int
    packages: dict[str, str | None]
    runtime: Runtime | None
    runtime_error: str
    stores: tuple[Store, ...]


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


def is_complete(machine: Machine) -> bool:
    """Whether everything that moegguf cannot do without is here."""
    return machine.runtime is not None and all(machine.packages[name] for name in NEEDED)


def has_gpu() -> bool:
    """Whether llama.cpp can put layers on a GPU here."""
    runtime, _ = _load_runtime()
    return runtime is not None and runtime.has_gpu


def advice(machine: Machine) -> list[str]:
    """What is missing or could be better, each with what to do about it; empty when all is well."""
    lines = [f"{name} is not installed: pip install {name}" for name in NEEDED if machine.packages[name] is None]
    if machine.runtime is None:
        lines.append(f"llama.cpp does not load ({machine.runtime_error}): reinstall llama-cpp-python")
    elif not machine.runtime.has_gpu:
        lines.append(
            "no GPU backend: --gpu-layers has no effect; with a GPU, reinstall llama-cpp-python built for it, e.g."
            ' CMAKE_ARGS="-DGGML_CUDA=on" (or _METAL, _VULKAN, _HIP)'
        )
    else:
        lines.append("a GPU is there: --gpu-layers all uses it")
    if machine.packages["huggingface-hub"] is None:
        lines.append("huggingface-hub is not installed: hf: references need it")
    if machine.memory and machine.memory.available < 2 * 10**9:
        lines.append("less than 2 GB of memory is available: close something, or take small models only")
    if machine.disk_free < 10 * 10**9:
        lines.append("less than 10 GB of disk is free here: a mix of 7B models needs more")
    return lines


# --- cores ---


@functools.cache
def physical_cores() -> int:
    """Physical cores that this process may use, at least 1: hyperthreads, pinning and CPU quotas taken off."""
    found = _PHYSICAL_CORES.get(sys.platform, lambda: None)() or os.cpu_count() or 1
    return max(1, min(found, math.ceil(_cpu_quota() or found)))


def _linux_cores() -> int | None:
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(topology.format(cpu)) for cpu in os.sched_getaffinity(0)}
    return None if None in cores else len(cores)


def _macos_cores() -> int | None:
    return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")  # efficiency cores slow the others down


def _windows_cores() -> int | None:
    """GetLogicalProcessorInformation: one entry per core has relationship 0 (RelationProcessorCore)."""
    n_bytes = ctypes.c_ulong(0)
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.GetLogicalProcessorInformation(None, ctypes.byref(n_bytes))
    buffer = ctypes.create_string_buffer(n_bytes.value)
    if not kernel32.GetLogicalProcessorInformation(buffer, ctypes.byref(n_bytes)):
        return None
    pointer = ctypes.sizeof(ctypes.c_void_p)
    entry = 2 * pointer + 16  # mask, relationship (padded), union of 16 bytes
    raw = buffer.raw[: n_bytes.value]
    kinds = (int.from_bytes(raw[at + pointer : at + pointer + 4], "little") for at in range(0, len(raw), entry))
    return sum(kind == 0 for kind in kinds) or None


_PHYSICAL_CORES: dict[str, Callable[[], int | None]] = {
    "linux": _linux_cores,
    "darwin": _macos_cores,
    "win32": _windows_cores,
}


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


def memory() -> Memory | None:
    """Total and available memory, a container's limit applied; None on a system that we cannot ask."""
    found = _MEMORY.get(sys.platform, lambda: None)()
    if found is None:
        return None
    for limit, used in _memory_limits():
        found = Memory(min(found.total, limit), max(0, min(found.available, limit - used)))
    return found


def _linux_memory() -> Memory | None:
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", _text("/proc/meminfo") or ""))
    return Memory(int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024) if "MemAvailable" in kib else None


def _macos_memory() -> Memory | None:
    total, pages = _sysctl("hw.memsize"), _run("vm_stat") or ""
    page = int((re.search(r"page size of (\d+)", pages) or [0, 4096])[1])
    free = sum(int(n) for n in re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", pages))
    return Memory(total, free * page) if total else None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of sysinfoapi.h."""

    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
        (name, ctypes.c_ulonglong)
        for name in ("total", "available", "page_total", "page_free", "virtual_total", "virtual_free", "extended")
    ]


def _windows_memory() -> Memory | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    asked = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return Memory(status.total, status.available) if asked else None


_MEMORY: dict[str, Callable[[], Memory | None]] = {
    "linux": _linux_memory,
    "darwin": _macos_memory,
    "win32": _windows_memory,
}


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup we are in that has one; the page cache does not count as used."""
    for folder in _cgroups("memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "max"
        if limit == "max" or int(limit) >= _NO_LIMIT:
            continue
        used = int(_text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes") or 0)
        reclaimable = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat") or "", re.M)
        yield int(limit), used - int(reclaimable[1] if reclaimable else 0)


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of our cgroup and its parents under `controller` (v1) or the unified tree (v2)."""
    for line in (_text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP / controller if controllers else _CGROUP
        here = root / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder.is_relative_to(root) and _is_dir(folder))


# --- llama.cpp ---


def _load_runtime() -> tuple[Runtime | None, str]:
    try:
        import llama_cpp

        ggml = _Ggml(Path(llama_cpp.__file__).parent / "lib")
    except (ImportError, OSError, RuntimeError) as error:  # a missing package, shared library or symbol
        return None, str(error).splitlines()[0]
    features = llama_cpp.llama_print_system_info().decode("utf-8", errors="replace")
    return Runtime(
        ggml_version=ggml.text("ggml_version"),
        ggml_commit=ggml.text("ggml_commit"),
        features=tuple(re.findall(r"(\w+) = 1", features)),
        devices=tuple(ggml.devices()),
        mmap=llama_cpp.llama_supports_mmap(),
        mlock=llama_cpp.llama_supports_mlock(),
        rpc=llama_cpp.llama_supports_rpc(),
    ), ""


_DEVICE_KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type, ggml/include/ggml-backend.h


class _Ggml:
    """The few functions of ggml's device registry (ggml/include/ggml-backend.h) that llama_cpp does not wrap."""

    def __init__(self, folder: Path) -> None:
        from llama_cpp._ctypes_extensions import load_shared_library

        self._libraries = [load_shared_library(name, folder) for name in ("ggml", "ggml-base")]

    def _function(self, name: str, result: type, *arguments: type):
        call = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        call.restype, call.argtypes = result, arguments
        return call

    def text(self, name: str, *pointers: int) -> str:
        """What a function that returns a C string says of `pointers`."""
        call = self._function(name, ctypes.c_char_p, *[ctypes.c_void_p] * len(pointers))
        return (call(*pointers) or b"").decode("utf-8", errors="replace")

    def devices(self) -> Iterator[Device]:
        size_p = ctypes.POINTER(ctypes.c_size_t)
        get = self._function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
        kind = self._function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
        read_memory = self._function("ggml_backend_dev_memory", None, ctypes.c_void_p, size_p, size_p)
        for index in range(self._function("ggml_backend_dev_count", ctypes.c_size_t)()):
            device, free, total = get(index), ctypes.c_size_t(), ctypes.c_size_t()
            read_memory(device, ctypes.byref(free), ctypes.byref(total))
            yield Device(
                name=self.text("ggml_backend_dev_name", device),
                description=self.text("ggml_backend_dev_description", device),
                kind=_DEVICE_KINDS[kind(device)],
                memory_free=free.value,
                memory_total=total.value,
            )


# --- stores ---


def stores() -> Iterator[Store]:
    """The model stores of Hugging Face, Ollama and LM Studio that are on this machine."""
    home, env = Path.home(), os.environ
    hf_home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    places = [
        ("Hugging Face cache", Path(env.get("HF_HUB_CACHE") or hf_home / "hub"), "models--*"),
        ("Ollama", Path(env.get("OLLAMA_MODELS") or home / ".ollama/models"), "manifests/*/*/*/*"),
        ("Ollama (service)", Path("/usr/share/ollama/.ollama/models"), "manifests/*/*/*/*"),
        ("LM Studio", home / ".lmstudio/models", "*/*/*.gguf"),
        ("LM Studio (old)", home / ".cache/lm-studio/models", "*/*/*.gguf"),
    ]
    for name, path, pattern in places:
        if _is_dir(path):
            yield Store(name, str(path), sum(1 for _ in path.glob(pattern)))


# --- small things ---


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


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
