"""Ctrl-C and SIGTERM: raised as exceptions, so that whatever is half done is put in order; and kept while C code runs.

Python handles a signal when it runs Python code next, which may be a callback that C called, such as llama.cpp's log;
an exception raised there is lost. Or it is the code that starts a thread, which is then waited for by nobody. So while
such code runs, a signal is only noted.

Which of such calls are under way, and since when, is known to all threads (`under_way`): where C waits for another
machine it may wait without end, and then only an onlooker can tell.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whoever puts things in order at Ctrl-C does so here; whoever goes on after Ctrl-C must not."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


_RAISING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
_begun: dict[object, float] = {}


@contextmanager
def terminable() -> Iterator[None]:
    """Within this block SIGTERM raises Terminated, unless somebody else handles it, or has it ignored."""
    if not _is_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def kept_interrupt() -> Iterator[threading.Event]:
    """Within this block Ctrl-C and SIGTERM set the event that it gives; what they raise is raised at its end.

    Only where they would raise; a server that handles signals itself is left alone.
    """
    pressed = threading.Event()
    with call_under_way(), _setting(pressed) as noted:
        yield pressed
    if noted:
        _RAISING[max(noted)](max(noted), None)  # SIGTERM, of both


@contextmanager
def call_under_way() -> Iterator[None]:
    """A block that `under_way` knows of. Signals mean in it what they mean around it."""
    block = object()
    _begun[block] = time.monotonic()
    try:
        yield
    finally:
        del _begun[block]


def under_way() -> Mapping[object, float]:
    """The blocks of calls that are under way, by an identity: when each began, on the monotonic clock."""
    return dict(_begun)


@contextmanager
def _setting(pressed: threading.Event) -> Iterator[set[int]]:
    """Let signals set the event; gives those that came."""
    noted: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        noted.add(number)
        pressed.set()

    kept = [number for number, handler in _RAISING.items() if _is_main_thread() and signal.getsignal(number) is handler]
    for number in kept:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in reversed(kept):
            signal.signal(number, _RAISING[number])


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
