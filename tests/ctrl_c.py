"""Ctrl-C, pressed while a test's block runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_FIRST, _AGAIN = 0.2, 10.0  # seconds


@contextmanager
def pressing_ctrl_c() -> Iterator[None]:
    """Expect KeyboardInterrupt of the block, as Ctrl-C is pressed soon after it begins, and again until it ends.

    Again, because no program can promise to hear one press: Python drops an exception that a handler raises while
    some C code looks at an object.
    """
    is_over = threading.Event()

    def press() -> None:
        wait = _FIRST
        while not is_over.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = _AGAIN

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        is_over.set()
        thread.join()
