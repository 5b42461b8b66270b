"""In-place changes of a large file that a crash cannot spoil.

The bytes that will be overwritten are first written to a journal beside the file, whole and synced; then the file is
changed and synced; then the journal is removed. An error in between puts the old bytes back at once. After a crash the
journal is still there and the file may be half changed: `recover`, and whoever locks the file next, puts them back.
A lock keeps two processes from changing one file at a time, and from changing what another one copies.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import NamedTuple

from moegguf.atomic import atomic_file, check_space
from moegguf.errors import UserError

_MAGIC = b"moegguf-journal-1"
_PIECE = struct.Struct("<QQ")


class Span(NamedTuple):
    """Bytes of a file."""

    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Patch:
    """Bytes that go to an offset of a file, within its present size."""

    offset: int
    data: bytes

    @property
    def span(self) -> Span:
        return Span(self.offset, len(self.data))


def journal_of(path: Path) -> Path:
    """Where the journal of `path` is while it is being changed: beside the file itself, whatever links lead to it."""
    file = Path(os.path.realpath(path))  # which, unlike resolve(), takes a link to itself as it is
    return file.parent / f".{file.name}.moegguf-journal"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BufferedRandom]:
    """`path`, open for changes, with what an interrupted change left undone put back first.

    Raises UserError when it cannot be written, or when another process is changing it.
    """
    try:
        file = open(path, "r+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be changed ({error.strerror})", "check the path and its permissions"
        ) from error
    with file:
        _lock(path, file)
        _recover(path, file)
        yield file


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """While the block copies `path` nobody changes it. Raises UserError when another process does so now."""
    with open(path, "rb") as file:
        if os.name != "nt":  # there a lock would keep ourselves from reading
            _lock(path, file, shared=True)
        yield


def recover(path: Path) -> bool:
    """Put back what an interrupted change of `path` left half written; whether there was anything to put back."""
    if not journal_of(path).exists():
        return False
    with locked(path):
        return True


UNDONE = "an interrupted change of it was undone"
"""What to say of a file where `recover` put something back."""


@contextlib.contextmanager
def undoable(path: Path, file: BufferedRandom, spans: Sequence[Span]) -> Iterator[None]:
    """While the block runs, `spans` of `file`, which `locked` opened at `path`, may be overwritten.

    All that the block wrote stays or, when it raises and after a crash, nothing. The spans must not overlap.
    Raises UserError when the disk has no room for the journal, and when it fails.
    """
    n_bytes = sum(span.n_bytes + _PIECE.size for span in spans)
    check_space(journal_of(path).parent, n_bytes, "the journal of this change")
    try:
        with atomic_file(journal_of(path)) as journal:
            journal.write(_MAGIC)
            for span in spans:
                journal.write(_PIECE.pack(*span) + _read(file, span))
        yield
        file.flush()
        os.fsync(file.fileno())
        journal_of(path).unlink()
    except BaseException as error:
        _recover(path, file)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be changed ({error.strerror})", "check the disk") from error
        raise


def apply(path: Path, file: BufferedRandom, patches: Sequence[Patch]) -> None:
    """Write `patches` into `file`, which `locked` opened at `path`: all of them or none."""
    with undoable(path, file, [patch.span for patch in patches]):
        write(file, patches)


def write(file: BufferedRandom, patches: Iterable[Patch]) -> None:
    """Put every patch into its place."""
    for patch in patches:
        file.seek(patch.offset)
        file.write(patch.data)


def _recover(path: Path, file: BufferedRandom) -> None:
    if not journal_of(path).exists():
        return
    with open(journal_of(path), "rb") as journal:
        if journal.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{journal.name}: is no journal of moegguf", "move it away if it is yours")
        write(file, _patches(journal))
    file.flush()
    os.fsync(file.fileno())
    journal_of(path).unlink()


def _patches(journal: BufferedReader) -> Iterator[Patch]:
    while piece := journal.read(_PIECE.size):
        offset, n_bytes = _PIECE.unpack(piece)
        yield Patch(offset, journal.read(n_bytes))


def _read(file: BufferedRandom, span: Span) -> bytes:
    file.seek(span.offset)
    data = file.read(span.n_bytes)
    if len(data) != span.n_bytes:
        raise AssertionError(f"{span} does not lie within the file")
    return data


def _lock(path: Path, file: BufferedRandom | BufferedReader, *, shared: bool = False) -> None:
    """Take the file's lock, which the system releases with the process. Where there is none, go on without."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{path}: another process is changing it", "wait for it to finish") from error
    except OSError:  # a file system without locks
        return
