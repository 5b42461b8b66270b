"""What commands say on stdout, in words: one console for all of them.

At a terminal, tables fit its width. In a pipe nothing is wrapped, cut or padded, so that lines can be searched and
columns counted. What is printed may come from a file, so nothing in it is markup. With --json it says nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Column, Table

from moegguf.errors import one_line

if TYPE_CHECKING:
    from moegguf.quant.rows import Requantised

UNLIMITED = 10_000
"""Columns of what is no terminal."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; but where there is no terminal, lines end where their text does."""
        if self.is_terminal or self.quiet:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))
        self.file.flush()

    def on_broken_pipe(self) -> NoReturn:
        """Whoever read it has left. rich would end the process with exit code 1; `cli.main` knows better."""
        raise  # rich calls this where it handles the BrokenPipeError


def console(args: argparse.Namespace) -> Console:
    """Where a command prints lines and tables. Raises BrokenPipeError where its reader closed stdout."""
    return _Console(
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,  # of lines, which a terminal wraps itself; columns of tables say themselves how they wrap
        width=None if sys.stdout.isatty() else UNLIMITED,
        quiet=getattr(args, "json", False),
    )


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what they have; long values go on below each other."""
    table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, one_line(value))
    return table


def in_shell(path: Path) -> str:
    """`path` as it can be copied into a command line."""
    return shlex.quote(f"{os.curdir}{os.sep}{path}" if str(path).startswith("-") else str(path))


def describe_requantised(cost: Requantised) -> str:
    """What quantising again cost; nothing where no weight was."""
    types = ", ".join(f"{source} → {target}" for source, target in sorted(cost.types))
    n_weights = f"{cost.n_weights / 1e6:.1f} M weights"
    return f"requantised {n_weights} ({types}): relative error {cost.relative_error:.2%}" if cost.n_weights else ""
