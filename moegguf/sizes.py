"""Sizes of files and of memory, as people write them: decimal kB, MB, GB, TB, binary KiB, MiB, GiB, TiB."""

from __future__ import annotations

import re

from moegguf.errors import UserError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", 1)
}

_SHOWN = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def parse_size(text: str) -> int:
    """Bytes of a size such as 12GB, 800 MB, 7.5GiB or 4096. Raises UserError for anything else, and for none at all."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not (n_bytes := int(float(match[1]) * unit)):
        raise UserError(f"{text!r}: is no size", "write it like 12GB, 800MB or 7.5GiB")
    return n_bytes


def size_of(flag: str, size: int | str) -> int:
    """Bytes of a size that was given as `flag`: a number of them, or what `parse_size` takes. Raises UserError."""
    if isinstance(size, int) and size > 0:
        return size
    try:
        return parse_size(str(size))
    except UserError as error:
        raise UserError(f"{flag} {error.message}", error.mend) from error


def show_size(n_bytes: int, *, up: bool = False) -> str:
    """In GB, MB or kB with two decimals, or in bytes; `up` rounds up, for a size that is to be enough."""
    unit, name = next(((unit, name) for unit, name in _SHOWN if n_bytes >= unit), (1, "B"))
    if unit == 1:
        return f"{n_bytes:.0f} B"
    hundredths = -(-100 * n_bytes // unit) if up else 100 * n_bytes / unit
    return f"{hundredths / 100:.2f} {name}"
