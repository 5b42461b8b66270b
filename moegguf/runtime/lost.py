"""What becomes of a program whose worker is lost: one that died, one that vanished, and one that says nothing.

ggml ends the process when a connection fails, in a thread of its own, after calling back: nothing can be saved then,
but `when_lost` lets the program end with one line instead. A machine that vanishes without a word is found out by TCP's
keep-alive, which ggml does not ask for; `keep_alive` does.

A worker that is frozen keeps its connections. ggml waits for its answer without a limit, and its caller waits for
ggml: no signal handler, callback or exception ends that call, only the end of the process does. Nor can the worker be
asked whether it lives, as it serves one connection at a time; one that computes is as silent. So a thread looks on. It
hears of signals as they come, while Python's own handlers wait for the call, and leaves when a call outlasts Ctrl-C by
a second. And it leaves when a call has waited for `patience` seconds in which nothing went over the connections and
this process computed nothing. How long connections have been silent is known on Linux only (TCP_INFO of tcp(7)).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from moegguf.checks import host_and_port
from moegguf.interrupt import under_way
from moegguf.runtime.devices import function
from moegguf.runtime.workers import addresses

Leave = Callable[[str, int], NoReturn]
"""Is given what happened and an exit code, and must end the process."""

_SETTLING = 0.3
_DEAD_AFTER = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
}
"""Socket options, as far as the system knows them: half a minute of silence of the machine, not of the worker."""

_TICK, _GRACE = 0.1, 0.6  # seconds; from Ctrl-C to the end it is less than one
_COMPUTES = 0.1  # of a core
_TCP_INFO = struct.Struct("=44xI4xI") if sys.platform == "linux" else None
"""Milliseconds since data was last sent, and received (struct tcp_info of linux/tcp.h)."""

_abort_callbacks: list[object] = []  # C keeps the pointer: they must outlive all use


def when_lost(workers: Sequence[str], patience: float, leave: Leave) -> None:
    """From now on call `leave` where ggml would abort the process or wait for ever; it must end the program."""

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def aborting(message: bytes) -> None:
        reason = message.decode("utf-8", errors="replace")
        if "ggml-rpc" not in reason:
            leave(f"llama.cpp gave up: {reason}", 2)
        time.sleep(_SETTLING)  # a process that dies closes its sockets one by one
        gone = [worker for worker in workers if not _accepts(worker)] or list(workers)
        leave(f"worker {' or '.join(gone)}: lost the connection; start it again, and this command", 2)

    _abort_callbacks.append(aborting)
    function("ggml_set_abort_callback")(ctypes.cast(aborting, ctypes.c_void_p))
    _onlooker().look_on(workers, patience, leave)


def leave_at_second_press(note: Callable[[str], None]) -> None:
    """From now on it takes Ctrl-C twice to leave a call that does not come back; after the first, `note` says so."""
    _onlooker().note = note


def keep_alive(workers: Sequence[str]) -> None:
    """Let a connection to a worker whose machine has vanished fail after half a minute, instead of never.

    The sockets are ggml's own, found among the open files of this process; on Windows there is no such list.
    """
    for connection in _connections(workers):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _DEAD_AFTER.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Onlooker:
    """The thread that sees calls that do not come back. There is one in a process, `_onlooker()`."""

    def __init__(self) -> None:
        self.note: Callable[[str], None] | None = None
        self._noted: float | None = None
        self._workers: Sequence[str] = ()
        self._patience = math.inf
        self._heard, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._signals: deque[tuple[float, int]] = deque(maxlen=2)
        self._last_tick = self._last_computed = time.monotonic()
        self._cpu = time.process_time()

    def look_on(self, workers: Sequence[str], patience: float, leave: Leave) -> None:
        self._workers, self._patience, self._leave, self.note = workers, patience, leave, None
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

    def run(self) -> NoReturn:
        while True:
            is_signalled, _, _ = select.select([self._heard], [], [], _TICK)
            now = time.monotonic()
            if is_signalled:
                self._signals.extend((now, number) for number in self._heard.recv(64))
            self._note_computing(now)
            begun = min(under_way().values(), default=None)
            if begun is not None:
                self._consider_signals(begun, now)
                self._consider_silence(begun, now)

    def _note_computing(self, now: float) -> None:
        cpu = time.process_time()
        if cpu - self._cpu > _COMPUTES * (now - self._last_tick):
            self._last_computed = now
        self._cpu, self._last_tick = cpu, now

    def _consider_signals(self, begun: float, now: float) -> None:
        """A call is stuck that was under way at a signal, or began soon after as all was to end, and outlasts it."""
        at, number = self._signals[-1] if self._signals else (-math.inf, 0)
        is_stuck = begun < at + _GRACE and now > max(begun, at) + _GRACE
        if self.note and number == signal.SIGINT:
            must_leave = len(self._signals) == 2 and self._signals[0][0] > begun
            if is_stuck and not must_leave and self._noted != begun:
                self._noted = begun
                self.note(f"{self._who} has not answered yet; Ctrl-C again leaves")
        else:
            must_leave = is_stuck
        if must_leave and any(_connections(self._workers)):
            self._leave(f"interrupted, while {self._who} did not answer", 128 + number)

    def _consider_silence(self, begun: float, now: float) -> None:
        if now - max(begun, self._last_computed) <= self._patience:
            return
        silences = [silence for connection in _connections(self._workers) for silence in _silences(connection)]
        if silences and min(silences) > self._patience:
            self._leave(
                f"{self._who}: no answer for {self._patience:g} s; end it and start it again, or give it longer with "
                "--rpc-timeout",
                2,
            )

    @property
    def _who(self) -> str:
        return f"worker {' or '.join(self._workers)}"


@functools.cache
def _onlooker() -> _Onlooker:
    found = _Onlooker()
    threading.Thread(target=found.run, daemon=True).start()
    return found


def _silences(connection: socket.socket) -> Iterator[float]:
    """Seconds since data was sent, and since some was received, where the system says so."""
    if _TCP_INFO:
        with contextlib.suppress(OSError):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            yield from (milliseconds / 1000 for milliseconds in _TCP_INFO.unpack(info))


def _accepts(worker: str) -> bool:
    """Whether anything listens at `host:port`."""
    with contextlib.suppress(OSError), socket.create_connection(host_and_port("worker", worker), timeout=1):
        return True
    return False


def _connections(workers: Sequence[str]) -> Iterator[socket.socket]:
    """The sockets of this process that lead to workers, each open while it is looked at.

    They are ggml's own, and get numbers of ours: closing one leaves ggml's open.
    """
    wanted = {address for worker in workers for address in addresses(*host_and_port("worker", worker))}
    for connection in _sockets() if wanted else ():
        with contextlib.suppress(OSError), connection:
            if connection.getpeername() in wanted:
                yield connection


def _sockets() -> Iterator[socket.socket]:
    descriptors = Path("/dev/fd")
    for number in [int(entry.name) for entry in descriptors.iterdir()] if descriptors.is_dir() else ():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                yield socket.socket(fileno=os.dup(number))
