"""What the flags of several commands have in common. The one module of this package that commands import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moegguf.errors import UserError

LARGEST = 2**31 - 1


def check_range(flag: str, value: int | None, low: int, high: int = LARGEST) -> None:
    """Raises UserError for a number outside of low … high; None is a flag that was not given."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{flag} {value}: expected a whole number from {low} to {high}", "leave it out for the default")


def gpu_layers(value: str) -> int:
    """The number that llama.cpp takes for the text of --gpu-layers: -1 for `all`. Raises UserError for other words."""
    if value == "all":
        return -1
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"--gpu-layers {value}: expected a whole number, or all", "leave it out for none")
    return int(value)


def from_here(ref: str | None) -> str | None:
    """A path on the command line is relative to the working directory, whatever recipe it goes into."""
    path = Path(os.path.expanduser(ref or ""))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    return str(path.absolute()) if ref and path.exists() else ref


def named_refs(flag: str, values: Sequence[str]) -> dict[str, list[str]]:
    """NAME → references of texts, from the NAME=FILE that a flag was given. Raises UserError for another form."""
    refs: dict[str, list[str]] = {}
    for value in values:
        name, _, ref = value.partition("=")
        if not name or not ref:
            raise UserError(f"{flag} {value}: expected NAME=FILE", f"for example {flag} math=math.jsonl")
        refs.setdefault(name, []).append(ref)
    return refs
