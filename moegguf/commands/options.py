"""What the flags of several commands have in common. The one module of this package that commands import."""

from __future__ import annotations

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
