"""How whoever asked hears of steps that take long: bars at a terminal, anything else from Python, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """One that is under way."""

    def has(self, n_parts: int) -> None:
        """It is known how many parts there are to do."""

    def did(self, n_parts: int) -> None:
        """So many more of them are done."""

    def says(self, what: str) -> None:
        """What it is at now."""


Watch = Callable[[str, str], AbstractContextManager[Step]]
"""Is given the name of each step, and what it counts ("bytes", "tokens"); open while it runs."""


Progress = Callable[[int], None]
"""Hears how many parts have just been done: bytes, tokens, tensors."""


def unheard(n_parts: int) -> None:
    """A progress that tells nobody."""


class _Unwatched:
    def has(self, n_parts: int) -> None: ...

    def did(self, n_parts: int) -> None: ...

    def says(self, what: str) -> None: ...


@contextmanager
def unwatched(what: str, unit: str) -> Iterator[Step]:
    """A watch that tells nobody."""
    yield _Unwatched()
