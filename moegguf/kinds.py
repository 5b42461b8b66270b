"""Values of other kinds than type hints say, from Python: mistakes, told before anything is done with them.

What a flag cannot be, a keyword can: overwrite="no" would replace a file, and offload=5 fail deep inside. So functions
that users call are `checked`, and options that they fill in call `check_fields`: numbers, texts, options and hooks are
what their hints say, numbers of NumPy become Python's, and several values a tuple. Paths have checks that say more
(`api.paths`), and keywords that no parameter names (`**keys`) those of whoever reads them.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from moegguf.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which raises UserError for values of kinds that the hints of its parameters do not name."""
    parameters = inspect.signature(function).parameters
    named = {name: each.annotation for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    scope = vars(sys.modules[function.__module__])

    @functools.cache
    def hints() -> dict[str, Any]:
        return get_type_hints(SimpleNamespace(__annotations__=named), scope)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [*zip(positional, args, strict=False), *kwargs.items()]
        values = _kept(given, hints(), named)
        n_first = len(values) - len(kwargs)
        return function(*values[:n_first], *args[n_first:], **dict(zip(kwargs, values[n_first:], strict=True)))

    return call


def check_fields(options: Any) -> None:
    """Let every field of a frozen dataclass be of the kind that its hint names. Raises UserError."""
    shown = {field.name: field.type for field in fields(options)}
    values = _kept([(name, getattr(options, name)) for name in shown], _hints_of(type(options)), shown)
    for name, value in zip(shown, values, strict=True):
        object.__setattr__(options, name, value)


_hints_of = functools.cache(get_type_hints)


def _kept(given: Sequence[tuple[str, Any]], hints: Mapping[str, Any], shown: Mapping[str, Any]) -> list[Any]:
    """The values of `given`, as the hints of their names say. Raises one UserError for all that are not."""
    values, faults = [], []
    for name, value in given:
        try:
            values.append(_converted(value, hints.get(name, Any)))
        except TypeError:
            faults.append(UserError(f"{name} {reprlib.repr(value)}: expected {shown[name]}", "pass one of that type"))
    if faults:
        raise UserError.of(faults)
    return values


def _converted(value: Any, hint: Any) -> Any:
    """`value` as a `hint`. Raises TypeError for one of another kind."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if hint is Any or _has_paths(hint):
        return value
    if kind is UnionType:
        return _first_of(value, of)
    if kind in _NUMBERS:
        return _number(value, kind)
    if not (callable(value) if kind is Callable else isinstance(value, Sequence if kind is tuple else kind)):
        raise TypeError
    if kind is Mapping:
        return {_converted(key, of[0]): _converted(each, of[1]) for key, each in value.items()}
    if kind in (Sequence, tuple):
        if isinstance(value, str | bytes):
            raise TypeError
        return tuple(_converted(each, of[0]) for each in value)
    return value


def _first_of(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _converted(value, hint)
        except TypeError:
            continue
    raise TypeError


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[kind]):
        raise TypeError
    return value if isinstance(value, int | float) else kind(value)


def _has_paths(hint: Any) -> bool:
    return get_origin(hint) is os.PathLike or any(map(_has_paths, get_args(hint)))
