"""Ctrl-C while C code or other threads run: kept until it can be raised.

Python handles a signal when it runs Python code next, which may be a callback that C called, such as llama.cpp's log;
an exception raised there is lost. Or it is the code that starts a thread, which is then waited for by nobody. So while
such code runs, a key press is only noted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_interrupt() -> Iterator[threading.Event]:
    """Within this block Ctrl-C sets the event that it gives; KeyboardInterrupt is raised at its end.

    Only where Ctrl-C means Python's default; a server that handles signals itself is left alone.
    """
    pressed = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt
