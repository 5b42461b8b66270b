"""Ending the process where no exception can: from within C code that would abort it, or beside code that hangs."""

from __future__ import annotations

import os
from typing import NoReturn

_CLEAR_LINE_AND_SHOW_CURSOR = "\r\x1b[K\x1b[?25h"
_STDERR = os.dup(2)
"""llama-cpp-python turns stderr, both Python's and the system's, to nowhere while it loads a model."""


def leave(line: str, code: int) -> NoReturn:
    """Say `line` on stderr and end at once with exit code `code`, whatever else is under way."""
    if os.isatty(_STDERR):  # where a bar may be under way
        line = _CLEAR_LINE_AND_SHOW_CURSOR + line
    try:
        os.write(_STDERR, f"{line}\n".encode(errors="replace"))
    finally:
        os._exit(code)
