"""llama.cpp's log: shown when asked for, and otherwise kept, because it alone says why something failed."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level, ggml/include/ggml.h


class Log:
    """Where llama.cpp's lines go. There is one in a process, `llama_log()`."""

    def __init__(self) -> None:
        self._heard: list[str] | None = None
        self.start(verbose=False)
        self._callback = llama_cpp.llama_log_callback(self._write)  # C keeps the pointer: it must outlive all use
        llama_cpp.llama_log_set(self._callback, None)

    def start(self, verbose: bool) -> None:
        """Forget what was said so far; from now on show all on stderr, or nothing."""
        self._verbose = verbose
        self.forget()

    def forget(self) -> None:
        """Forget what was said so far, so that `reason` speaks of what follows."""
        self._level = 0
        self._errors: deque[str] = deque(maxlen=50)

    @contextmanager
    def heard(self) -> Iterator[list[str]]:
        """All that is said within this block, but for blocks of this kind within it; none of it is shown."""
        self.forget()
        before, self._heard = self._heard, []
        try:
            yield self._heard
        finally:
            self._heard = before

    def _write(self, level: int, text: bytes, _user_data) -> None:
        line = text.decode("utf-8", errors="replace")
        self._level = self._level if level == _CONTINUED else level
        if self._heard is not None:
            self._heard.append(line)
        elif self._verbose:
            sys.stderr.write(line)
        if self._level == _ERROR:
            self._errors.append(line.strip())

    def reason(self) -> str:
        """The most telling line of what went wrong: the innermost error, without the C function's name."""
        for line in self._errors:
            for marker in ("error loading model: ", "failed to apply lora adapter: "):
                if marker in line:
                    return line.partition(marker)[2]
        return next((line.partition(": ")[2] or line for line in self._errors if line), "")


@functools.cache
def llama_log() -> Log:
    """The one log, as llama.cpp has but one callback in a process."""
    return Log()
