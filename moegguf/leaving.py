"""Ending the process where no exception can: from within C code that would abort it, or beside code that hangs."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

_CLEAR_LINE_AND_SHOW_CURSOR = "\r\x1b[K\x1b[?25h"


def leave(line: str, code: int) -> NoReturn:
    """Say `line` on stderr and end at once with exit code `code`, whatever else is under way."""
    if sys.stderr.isatty():  # where a bar may be under way
        line = _CLEAR_LINE_AND_SHOW_CURSOR + line
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(code)
