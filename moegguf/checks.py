"""Numbers that users give, by a flag or from Python: checked alike, and called by the flag's name."""

from __future__ import annotations

import re

from moegguf.errors import UserError

LARGEST = 2**31 - 1
MAX_THREADS = 512
"""GGML_MAX_N_THREADS."""


def check_range(flag: str, value: int | None, low: int, high: int = LARGEST) -> None:
    """Raises UserError for what is no whole number of low … high; None is a flag that was not given."""
    if value is not None and not (isinstance(value, int) and low <= value <= high):
        raise UserError(f"{flag} {value}: expected a whole number from {low} to {high}", "leave it out for the default")


def check_threads(n: int | None) -> None:
    """Raises UserError for a --threads that ggml cannot start."""
    check_range("--threads", n, 1, MAX_THREADS)


def host_and_port(flag: str, text: str) -> tuple[str, int]:
    """The two parts of HOST:PORT. Raises UserError for what has another form."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
    if not is_port or not re.fullmatch(r"[\w.-]+", host, re.ASCII):
        raise UserError(f"{flag} {text}: expected HOST:PORT with a port from 1 to 65535", "for example 127.0.0.1:50052")
    return host, int(port)
