"""The devices that ggml sees, and how llama.cpp is told which to use: what llama_cpp does not wrap of ggml's registry.

The functions are those of ggml/include/ggml-backend.h and ggml.h, called through ctypes in the libraries that llama_cpp
has loaded. A device is known by its name. Those of workers are not registered with ggml, or every model would use them
from then on, alive or not; they are kept here, and only asked for by those who name the worker.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library

from moegguf.errors import UserError
from moegguf.interrupt import kept_interrupt
from moegguf.runtime.offload import Device, Offload, Placement

_KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type
_P, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_SIZES = ctypes.POINTER(_SIZE)


class InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


_FUNCTIONS = {
    "ggml_version": (_TEXT,),
    "ggml_commit": (_TEXT,),
    "ggml_backend_dev_count": (_SIZE,),
    "ggml_backend_dev_get": (_P, _SIZE),
    "ggml_backend_dev_by_name": (_P, _TEXT),
    "ggml_backend_dev_name": (_TEXT, _P),
    "ggml_backend_dev_description": (_TEXT, _P),
    "ggml_backend_dev_type": (ctypes.c_int, _P),
    "ggml_backend_dev_memory": (None, _P, _SIZES, _SIZES),
    "ggml_backend_dev_buffer_type": (_P, _P),
    "ggml_backend_buft_name": (_TEXT, _P),
    "ggml_backend_reg_dev_count": (_SIZE, _P),
    "ggml_backend_reg_dev_get": (_P, _P, _SIZE),
    "ggml_backend_reg_by_name": (_P, _TEXT),
    "ggml_backend_reg_get_proc_address": (_P, _P, _TEXT),
    "ggml_set_abort_callback": (_P, _P),
    "ggml_init": (_P, InitParams),
    "ggml_free": (None, _P),
    "ggml_new_tensor_1d": (_P, _P, ctypes.c_int, ctypes.c_int64),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_tensor_copy": (None, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
}
"""Name → type of the result, types of the arguments."""


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


@functools.cache
def function(name: str):
    """A function of ggml. Raises AttributeError when no library has it."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = [load_shared_library(library, folder) for library in ("ggml", "ggml-base")]
    result, *arguments = _FUNCTIONS[name]
    call = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
    if call is None:
        raise AttributeError(f"{name} is not in this build of ggml")
    call.restype, call.argtypes = result, arguments
    return call


def text(name: str, *arguments: object) -> str:
    """What a function of ggml says that returns a C string."""
    return (function(name)(*arguments) or b"").decode("utf-8", errors="replace")


_lent: dict[str, dict[str, int]] = {}
"""Worker → names of its devices → ggml's pointers to them."""


def add_worker(worker: str, registry: int) -> None:
    """Make the devices known that ggml's `registry` has of a worker."""
    get = function("ggml_backend_reg_dev_get")
    handles = [get(registry, i) for i in range(function("ggml_backend_reg_dev_count")(registry))]
    _lent[worker] = {text("ggml_backend_dev_name", handle): handle for handle in handles}


def is_connected(worker: str) -> bool:
    return worker in _lent


def devices(workers: Sequence[str] = ()) -> tuple[Device, ...]:
    """Those of `workers`, and then all that ggml has registered, the CPU too."""
    llama_cpp.llama_backend_init()
    lent = [handle for worker in workers for handle in _lent[worker].values()]
    here = map(function("ggml_backend_dev_get"), range(function("ggml_backend_dev_count")()))
    return tuple(map(_device, (*lent, *here)))


def _device(handle: int) -> Device:
    free, total = _SIZE(), _SIZE()
    with kept_interrupt():  # a worker is asked
        function("ggml_backend_dev_memory")(handle, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name=text("ggml_backend_dev_name", handle),
        description=text("ggml_backend_dev_description", handle),
        kind=_KINDS[function("ggml_backend_dev_type")(handle)],
        memory_free=free.value,
        memory_total=total.value,
    )


def accelerators(asked: Offload) -> tuple[Device, ...]:
    """The devices that layers may go on, in llama.cpp's order: workers, then GPUs, else integrated ones.

    Raises UserError for a name that no device has, and for numbers that are more than there are.
    """
    if asked.devices == ():
        return ()
    there = [device for device in devices(asked.workers) if device.kind != "CPU"]
    usable = [device for device in there if device.kind == "GPU"] or [
        device for device in there if device.kind == "IGPU"
    ]
    if asked.devices is not None:
        usable = [named(name, "--device", there) for name in asked.devices]
    if asked.main_gpu is not None:
        if asked.main_gpu >= len(usable):
            raise UserError(f"--main-gpu {asked.main_gpu}: {_names(usable)}", "they are counted from 0")
        usable = [usable[asked.main_gpu]]
    if len(asked.tensor_split) > len(usable):
        raise UserError(f"--tensor-split has {len(asked.tensor_split)} shares; {_names(usable)}", "give one for each")
    return tuple(usable)


def resolved(asked: Offload, used: Sequence[Device]) -> Offload:
    """`asked`, with each override's device by ggml's name: users may also say the buffer's name or a worker's address.

    Raises UserError for one that is not `used`, for which llama.cpp would have no backend.
    """
    there = [*(device for device in devices() if device.kind == "CPU"), *used]
    overrides = (replace(over, device=named(over.device, "--override-tensor", there).name) for over in asked.overrides)
    return replace(asked, overrides=tuple(overrides))


def buffer_name(device: str) -> str:
    """What llama.cpp calls the memory of a device in its log."""
    return text("ggml_backend_buft_name", buffer_type(device))


def fill(params: llama_cpp.llama_model_params, placement: Placement) -> llama_cpp.llama_model_params:
    """Write `placement` into `params`, which keeps what it points to alive."""
    handles = [handle(name) for name in placement.devices]
    devices = (_P * (len(handles) + 1))(*handles, None)
    pointed = [(over.pattern.encode(), buffer_type(over.device)) for over in placement.all_overrides]
    overrides = (_Override * (len(pointed) + 1))(*pointed, (None, None))
    split = (ctypes.c_float * llama_cpp.llama_max_devices())(*placement.layers)
    params.devices, params.tensor_buft_overrides = ctypes.addressof(devices), ctypes.addressof(overrides)
    params.tensor_split = split
    params.n_gpu_layers = placement.n_gpu_layers
    params.pointed_to = devices, overrides, split
    return params


def handle(name: str) -> int:
    """ggml's pointer to the device of this name."""
    lent = next((handles[name] for handles in _lent.values() if name in handles), None)
    return lent or function("ggml_backend_dev_by_name")(name.encode())


def buffer_type(device: str) -> int:
    """ggml's pointer to the type of buffers in the memory of a device."""
    return function("ggml_backend_dev_buffer_type")(handle(device))


def named(name: str, flag: str, there: Sequence[Device]) -> Device:
    """The one of `there` that `flag` calls by its name, its buffer's or its worker's address. Raises UserError."""
    for device in there:
        if name in (device.name, buffer_name(device.name)) or (name == device.description and ":" in name):
            return device
    raise UserError(f"{flag} names {name!r}; {_names(there)}", "`moegguf doctor` says more")


def _names(there: Sequence[Device]) -> str:
    named = ", ".join(f"{device.name} ({device.description})" for device in there)
    return f"there is {named}" if named else "there is no device but the CPU"
