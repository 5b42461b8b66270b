"""Values of a recipe table, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from moegguf.errors import UserError

MISSING = object()
"""In place of a value that is not there."""


class Reader:
    """Reads values out of a recipe table and collects what is wrong with them instead of stopping."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.faults: list[UserError] = []

    def fault(self, key: str, found: object, allowed: str, mend: str) -> None:
        self.faults.append(UserError(f"{self.where} {key}: found {_show(found)}, allowed {allowed}", mend))

    def known_keys(self, prefix: str, table: Mapping[str, object], keys: tuple[str, ...]) -> None:
        for key in table:
            if key not in keys:
                self.fault(f"{prefix}{key}", table[key], f"only the keys {', '.join(keys)}", "remove or rename it")

    def text(self, key: str, value: object, mend: str, *, empty: bool = False) -> str:
        if isinstance(value, str) and (value.strip() or empty) and "\0" not in value:
            return value
        self.fault(key, value, "a string" if empty else "a non-empty string", mend)
        return ""

    def texts(self, key: str, value: object, mend: str) -> tuple[str, ...]:
        """A list of strings; a single one may stand alone."""
        items = value if isinstance(value, list) else [value]
        return tuple(self.text(key, item, mend) for item in items)

    def number(self, key: str, value: object, *, integer: bool, low: float, high: float, mend: str):
        kinds = (int,) if integer else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.fault(key, value, f"{'an integer' if integer else 'a number'} from {low} to {high}", mend)
        return low

    def choice(self, key: str, value: object, kind: type[StrEnum], extra: tuple[str, ...] = ()):
        allowed = (*kind, *extra)
        if value in allowed:
            return value if value in extra else kind(value)
        self.fault(key, value, ", ".join(allowed), "pick one of these")
        return None


def _show(value: object) -> str:
    if value is MISSING:
        return "nothing"
    return repr(str(value) if isinstance(value, StrEnum) else value)
