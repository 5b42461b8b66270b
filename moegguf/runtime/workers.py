"""Devices of other machines, through llama.cpp's RPC backend: finding them, being one, and surviving the loss of one.

ggml's client ends the process when a worker cannot be reached, is of another version, or goes away, and waits without
end for one that is busy. So a worker is asked for its version first, over a socket of our own and with a time limit
(`ask`). Of one that is lost later nothing can be saved: ggml aborts in a thread of its own, after calling back; there
`when_lost` lets the program end with one line instead. A machine that vanishes without a word is found out by TCP's
keep-alive, which ggml does not ask for: `keep_watch` does.

A worker serves one program at a time, in the clear, and lets it write to its memory: never let it listen to others than
those you trust. The protocol is that of ggml/src/ggml-rpc/ggml-rpc.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from moegguf.errors import UserError
from moegguf.runtime.devices import add_worker, devices, function, handle, is_connected, named
from moegguf.runtime.offload import Device

PROTOCOL = 7, 0
"""RPC_PROTO_MAJOR_VERSION and RPC_PROTO_MINOR_VERSION of ggml/include/ggml-rpc.h; a worker's minor may be less."""
_HELLO, _CAPABILITIES = 14, 24  # RPC_CMD_HELLO; RPC_CONN_CAPS_SIZE
_ANSWER = struct.Struct(f"<QBB2x{_CAPABILITIES}x")
_SECONDS = 5.0
_SETTLING = 0.3
_DEAD_AFTER = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
}
"""Socket options, as far as the system knows them: half a minute of silence of the machine, not of the worker."""

_abort_callbacks: list[object] = []  # C keeps the pointer: they must outlive all use


def connect(workers: Sequence[str]) -> None:
    """Make the devices of these `host:port` known to `runtime.devices`. Raises UserError when one is no fit worker."""
    for worker in workers:
        if is_connected(worker):
            continue
        check(worker)
        registry = _rpc_function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)(worker.encode())
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
    found = addresses(*_host_and_port(worker))
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


def when_lost(workers: Sequence[str], leave: Callable[[str], NoReturn]) -> None:
    """From now on call `leave` with what happened when ggml would abort the process; it must end the program."""

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def aborting(message: bytes) -> None:
        reason = message.decode("utf-8", errors="replace")
        if "ggml-rpc" not in reason:
            leave(f"llama.cpp gave up: {reason}")
        time.sleep(_SETTLING)  # a process that dies closes its sockets one by one
        gone = [worker for worker in workers if not _accepts(worker)] or list(workers)
        leave(f"worker {' or '.join(gone)}: lost the connection; start it again, and this command")

    _abort_callbacks.append(aborting)
    function("ggml_set_abort_callback")(ctypes.cast(aborting, ctypes.c_void_p))


def keep_watch(workers: Sequence[str]) -> None:
    """Let a connection to a worker whose machine has vanished fail after half a minute, instead of never.

    The sockets are ggml's own, found among the open files of this process; on Windows there is no such list.
    """
    watched = {address for worker in workers for address in addresses(*_host_and_port(worker))}
    for connection in _sockets() if watched else ():
        with contextlib.suppress(OSError), connection:
            if connection.getpeername() in watched:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _DEAD_AFTER.items():
                    if hasattr(socket, name):
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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


def _host_and_port(worker: str) -> tuple[str, int]:
    host, _, port = worker.rpartition(":")
    return host, int(port)


def _accepts(worker: str) -> bool:
    """Whether anything listens at `host:port`."""
    with contextlib.suppress(OSError), socket.create_connection(_host_and_port(worker), timeout=1):
        return True
    return False


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


def _sockets() -> Iterator[socket.socket]:
    """The sockets of this process, under numbers of their own: closing one leaves the other open."""
    descriptors = Path("/dev/fd")
    for number in [int(entry.name) for entry in descriptors.iterdir()] if descriptors.is_dir() else ():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                yield socket.socket(fileno=os.dup(number))


def _rpc_function(name: str, result: type | None, *arguments: type):
    """A function of the RPC backend. Raises UserError when llama.cpp was built without it."""
    registry = function("ggml_backend_reg_by_name")(b"RPC")
    address = registry and function("ggml_backend_reg_get_proc_address")(registry, name.encode())
    if not address:
        raise UserError(
            "this llama.cpp was built without RPC", 'reinstall llama-cpp-python with CMAKE_ARGS="-DGGML_RPC=ON"'
        )
    return ctypes.CFUNCTYPE(result, *arguments)(address)
