"""How far something is: a bar on stderr at a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
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
def shown(what: str, unit: str) -> Iterator[Bar]:
    """A bar for a step, with its speed where that counts bytes: the watch of commands (`moegguf.watch`)."""
    is_hidden, console = not sys.stderr.isatty(), Console(stderr=True)
    counts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn()
    with Progress(*columns, console=console, disable=is_hidden, transient=True) as progress:
        yield Bar(progress, progress.add_task(one_line(what), total=None))
