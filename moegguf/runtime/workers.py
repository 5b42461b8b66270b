"""Devices of other machines, through llama.cpp's RPC backend: finding them, and being one.

ggml's client ends the process when a worker cannot be reached or is of another version, and waits without end for one
that is busy. So a worker is asked for its version first, over a socket of our own and with a time limit (`ask`). What
becomes of a program that loses one later is `lost`'s.

A worker serves one program at a time, in the clear, and lets it write to its memory: never let it listen to others than
those you trust. The protocol is that of ggml/src/ggml-rpc/ggml-rpc.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import time
from collections.abc import Callable, Sequence

from moegguf.checks import host_and_port
from moegguf.errors import UserError
from moegguf.interrupt import kept_interrupt
from moegguf.runtime.devices import add_worker, devices, function, handle, is_connected, named
from moegguf.runtime.offload import Device

PROTOCOL = 7, 0
"""RPC_PROTO_MAJOR_VERSION and RPC_PROTO_MINOR_VERSION of ggml/include/ggml-rpc.h; a worker's minor may be less."""
_HELLO, _CAPABILITIES = 14, 24  # RPC_CMD_HELLO; RPC_CONN_CAPS_SIZE
_ANSWER = struct.Struct(f"<QBB2x{_CAPABILITIES}x")
_SECONDS = 5.0


def connect(workers: Sequence[str]) -> None:
    """Make the devices of these `host:port` known to `runtime.devices`. Raises UserError when one is no fit worker."""
    for worker in workers:
        if is_connected(worker):
            continue
        check(worker)
        add_server = _rpc_function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
        with kept_interrupt():
            registry = add_server(worker.encode())
        if not registry:
            raise UserError(f"worker {worker}: has no devices", "start it again")
        add_worker(worker, registry)


def check(worker: str) -> None:
    """Raises UserError unless a worker answers at `host:port`, and speaks our version of the protocol."""
    major, minor = ask(worker)
    if major != PROTOCOL[0] or minor > PROTOCOL[1]:
        raise UserError(
            f"worker {worker}: speaks version {major}.{minor} of llama.cpp's RPC, expected {PROTOCOL[0]}.{PROTOCOL[1]}",
            "run the same version of llama-cpp-python on both machines",
        )


def ask(worker: str, *, seconds: float = _SECONDS) -> tuple[int, int]:
    """(major, minor) version of the protocol that a worker speaks. Raises UserError when none answers in time."""
    found = addresses(*host_and_port("worker", worker))
    if not found:
        raise UserError(f"worker {worker}: no machine is called so", "check the address")
    try:
        with socket.create_connection(min(found), timeout=seconds) as connection:
            connection.sendall(struct.pack(f"<BQ{_CAPABILITIES}x", _HELLO, _CAPABILITIES))
            answer = _receive(connection, _ANSWER.size, time.monotonic() + seconds)
    except TimeoutError as error:
        raise UserError(
            f"worker {worker}: no answer within {seconds:g} s",
            "it may be busy, as a worker serves one program at a time; or check address and firewall",
        ) from error
    except OSError as error:
        raise UserError(
            f"worker {worker}: cannot be reached ({error.strerror})",
            "start `moegguf worker` there, or check the address",
        ) from error
    size, major, minor = _ANSWER.unpack(answer) if len(answer) == _ANSWER.size else (0, 0, 0)
    if size != _ANSWER.size - 8:
        raise UserError(
            f"worker {worker}: what answers there is no worker, or one of another llama.cpp",
            "check the port, and run the same version of llama-cpp-python on both machines",
        )
    return major, minor


def lent(names: Sequence[str] | None) -> tuple[Device, ...]:
    """The devices that a worker lends: those called `names`, else all GPUs, else the CPU. Raises UserError."""
    there = devices()
    if names is not None:
        return tuple(named(name, "--device", there) for name in names)
    return tuple(device for device in there if device.kind in ("GPU", "IGPU")) or tuple(
        device for device in there if device.kind == "CPU"
    )


def is_up(worker: str, is_alive: Callable[[], bool]) -> bool:
    """Wait until our own worker answers; False when it ends instead."""
    while is_alive():
        with contextlib.suppress(UserError):
            ask(worker, seconds=1)
            return True
        time.sleep(0.05)
    return False


def serve(host: str, port: int, *, threads: int, names: Sequence[str]) -> None:
    """Be a worker at an IPv4 address, with the devices called `names`; returns only when it cannot."""
    handles = (ctypes.c_void_p * len(names))(*map(handle, names))
    text, size = ctypes.c_char_p, ctypes.c_size_t
    start = _rpc_function("ggml_backend_rpc_start_server", None, text, text, size, size, ctypes.c_void_p)
    start(f"{host}:{port}".encode(), None, threads, len(names), ctypes.addressof(handles))


def addresses(host: str, port: int) -> set[tuple[str, int]]:
    """The IPv4 addresses that a name stands for, which is all that ggml knows; empty when nobody knows the name."""
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {address for *_, address in found}


def _receive(connection: socket.socket, n: int, deadline: float) -> bytes:
    """`n` bytes, or fewer when the other side ends. Raises TimeoutError at `deadline`."""
    received = b""
    while len(received) < n:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        more = connection.recv(n - len(received))
        if not more:
            break
        received += more
    return received


def _rpc_function(name: str, result: type | None, *arguments: type):
    """A function of the RPC backend. Raises UserError when llama.cpp was built without it."""
    registry = function("ggml_backend_reg_by_name")(b"RPC")
    address = registry and function("ggml_backend_reg_get_proc_address")(registry, name.encode())
    if not address:
        raise UserError(
            "this llama.cpp was built without RPC", 'reinstall llama-cpp-python with CMAKE_ARGS="-DGGML_RPC=ON"'
        )
    return ctypes.CFUNCTYPE(result, *arguments)(address)
