"""A change from opening the mix to what was made of it: in place, or as a copy where there is an output.

file, output → target: what can be known before weights are read → a change of its mix → made
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from moegguf.assembly import usable_cores
from moegguf.edit.change import Change, check_copy, check_ending, write_copy, write_in_place
from moegguf.edit.finished import FinishedMix, read_mix
from moegguf.journal import UNDONE, recover
from moegguf.metadata import Card
from moegguf.quant.rows import Requantised
from moegguf.watch import Watch, unwatched


@dataclass(frozen=True)
class Target:
    """A mix to change, and where to: `output` is None in place. `is_undone` says whether an interrupted change of it
    was undone first."""

    mix: FinishedMix
    output: Path | None
    is_undone: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever opened it should know."""
        return (UNDONE,) if self.is_undone else ()


@dataclass(frozen=True)
class Made:
    """What became of a mix. `n_bytes` is the size of the file, `n_written` what was written of it; in place only of
    tensors."""

    path: Path
    in_place: bool
    card: Card
    n_bytes: int
    n_written: int
    seconds: float
    requantised: Requantised
    notes: tuple[str, ...]
    is_undone: bool

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "file": str(self.path),
            "in_place": self.in_place,
            "undone": self.is_undone,
            "bytes": self.n_bytes,
            "bytes_written": self.n_written,
            "seconds": round(self.seconds, 3),
            "experts": [{"name": expert.name, "source": expert.source} for expert in self.card.experts],
            "router": self.card.describe_router(),
            "requantised": self.requantised.as_json(),
            "notes": list(self.notes),
        }


def open_target(path: Path, output: Path | None, *, overwrite: bool = False) -> Target:
    """Raises UserError where `path` is no whole mix of ours, and where nothing may be written to `output`."""
    if output:
        check_ending(output)
        check_copy(path, output, overwrite=overwrite)
    is_undone = recover(path)
    return Target(read_mix(path), output, is_undone)


def make(target: Target, change: Change, *, threads: int | None = None, watch: Watch = unwatched) -> Made:
    """Write `change` of the mix of `target`. Raises UserError as `write_in_place` and `write_copy` do."""
    start, output, n_threads = time.monotonic(), target.output, threads or usable_cores()
    with watch("writing", "bytes") as step:
        step.has(change.n_bytes_to_do(in_place=output is None))
        if output:
            written = write_copy(change, output, threads=n_threads, progress=step.did)
        else:
            written = write_in_place(change, threads=n_threads, progress=step.did)
    path = output or target.mix.path
    return Made(
        path=path,
        in_place=output is None,
        card=change.card,
        n_bytes=path.stat().st_size,
        n_written=written.n_bytes,
        seconds=time.monotonic() - start,
        requantised=written.requantised,
        notes=(*target.notes, *change.notes),
        is_undone=target.is_undone,
    )


def unchanged(target: Target) -> Made:
    """Nothing but what opening the mix did."""
    mix = target.mix
    n_bytes = mix.path.stat().st_size
    return Made(mix.path, True, mix.card, n_bytes, 0, 0.0, Requantised(), target.notes, target.is_undone)
