"""Where files are, as Python's users write it, and as the library takes it. Values of other kinds are mistakes."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from moegguf.errors import UserError
from moegguf.texts import named_ref

Location = str | os.PathLike[str]
Locations = Mapping[str, Location | Sequence[Location]]
"""Name → a file, or several."""
Texts = Location | Sequence[Location] | Locations
"""Files, which are called as a mapping says, or else like themselves."""
NO_FILES: Locations = MappingProxyType({})


def to_path(name: str, value: Location) -> Path:
    """`value`, which was given as `name`. Raises UserError when it is no path."""
    return Path(to_ref(name, value))


def maybe_path(name: str, value: Location | None) -> Path | None:
    return None if value is None else to_path(name, value)


def to_ref(name: str, value: object) -> str:
    """`value`, which was given as `name`, as a reference: a path, or what else names a model. Raises UserError."""
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise UserError(f"{name} {reprlib.repr(value)}: expected a path", "pass a string or a pathlib.Path")
    if not path or "\0" in path:
        raise UserError(f"{name} {path!r}: nothing is called so", "pass the path of a file")
    return path


def to_refs(name: str, files: Locations) -> dict[str, list[str]]:
    """Name → references. Raises UserError for what is no such mapping, given as `name`."""
    if not isinstance(files, Mapping):
        raise UserError(
            f"{name} {reprlib.repr(files)}: expected a mapping of names to files", f"for example {name}={{'math': …}}"
        )
    return {str(key): to_list(name, some) for key, some in files.items()}


def to_list(name: str, files: Location | Sequence[Location]) -> list[str]:
    """References of several files, or of one. Raises UserError for what is neither, given as `name`."""
    return [to_ref(name, one) for one in ([files] if isinstance(files, str | os.PathLike) else _several(name, files))]


def to_named(name: str, files: Texts) -> list[tuple[str, str]]:
    """(name, reference) of files, whose names a mapping gives, or else they themselves. Raises UserError."""
    if isinstance(files, Mapping):
        return [(key, ref) for key, refs in to_refs(name, files).items() for ref in refs]
    return [named_ref(ref) for ref in to_list(name, files)]


def _several(name: str, values: object) -> Sequence[object]:
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise UserError(
            f"{name} {reprlib.repr(values)}: expected a path, or a list of them", "pass strings or pathlib.Paths"
        )
    return values
