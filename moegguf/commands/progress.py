"""How far something is: a bar on stderr at a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moegguf.errors import one_line


class Bar:
    """One that is shown. What it says may be a file's name, and is no markup."""

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self._shown, self._task = shown, task

    def has(self, n_parts: int) -> None:
        self._shown.update(self._task, total=n_parts, visible=n_parts > 0)

    def did(self, n_parts: int) -> None:
        self._shown.advance(self._task, n_parts)

    def says(self, what: str) -> None:
        self._shown.update(self._task, description=one_line(what))


@contextmanager
def counted(what: str, total: int | None, unit: str) -> Iterator[Bar]:
    """A bar of `total` parts, called `unit`, as far as it is known; none where there are none to do."""
    with _bar(what, total, MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()) as bar:
        yield bar


@contextmanager
def bytes_done(what: str, total: int | None) -> Iterator[Bar]:
    """A bar of `total` bytes, with their speed."""
    with _bar(what, total, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        yield bar


def shown(what: str, unit: str) -> AbstractContextManager[Bar]:
    """A bar for each step: the watch of commands (`moegguf.watch`)."""
    return bytes_done(what, None) if unit == "bytes" else counted(what, None, unit)


@contextmanager
def _bar(what: str, total: int | None, *columns: ProgressColumn) -> Iterator[Bar]:
    text = TextColumn("{task.description}", markup=False)
    is_hidden = not sys.stderr.isatty() or total == 0
    console = Console(stderr=True)
    with Progress(text, BarColumn(), *columns, console=console, disable=is_hidden, transient=True) as shown:
        yield Bar(shown, shown.add_task(one_line(what), total=total))
