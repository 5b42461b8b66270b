"""In-place changes of a large file that a crash cannot spoil.

The bytes that will be overwritten are first written to a journal beside the file, whole and synced; then the file is
changed and synced; then the journal is removed. While a journal is there, the file may be half changed: `recover`
puts the old bytes back. A lock keeps two processes from changing one file at a time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from moegguf.atomic import atomic_file
from moegguf.errors import UserError

_MAGIC = b"moegguf-journal-1"
_PIECE = struct.Struct("<QQ")


@dataclass(frozen=True)
class Patch:
    """Bytes that go to an offset of a file, within its present size."""

    offset: int
    data: bytes


def journal_of(path: Path) -> Path:
    """Where the journal of `path` is while it is being changed."""
    return path.with_name(f".{path.name}.moegguf-journal")


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


def apply(path: Path, file: BufferedRandom, patches: Sequence[Patch]) -> None:
    """Write `patches` into `file`, which `locked` opened at `path`: all of them or, after a crash, none."""
    old = [Patch(patch.offset, _read(file, patch.offset, len(patch.data))) for patch in patches]
    with atomic_file(journal_of(path)) as journal:
        journal.write(_MAGIC)
        for patch in old:
            journal.write(_PIECE.pack(patch.offset, len(patch.data)) + patch.data)
    _write(file, patches)
    journal_of(path).unlink()


def _recover(path: Path, file: BufferedRandom) -> None:
    journal = journal_of(path)
    if not journal.exists():
        return
    content = journal.read_bytes()
    if not content.startswith(_MAGIC):
        raise UserError(f"{journal}: is no journal of moegguf", "move it away if it is yours")
    _write(file, list(_patches(content)))
    journal.unlink()


def _patches(content: bytes) -> Iterator[Patch]:
    at = len(_MAGIC)
    while at < len(content):
        offset, length = _PIECE.unpack_from(content, at)
        at += _PIECE.size + length
        yield Patch(offset, content[at - length : at])


def _read(file: BufferedRandom, offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise AssertionError(f"a patch of {n_bytes} bytes at {offset} does not lie within the file")
    return data


def _write(file: BufferedRandom, patches: Sequence[Patch]) -> None:
    for patch in patches:
        file.seek(patch.offset)
        file.write(patch.data)
    file.flush()
    os.fsync(file.fileno())


def _lock(path: Path, file: BufferedRandom) -> None:
    """Take the file's lock, which the system releases with the process. Where there is none, go on without."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{path}: another process is changing it", "wait for it to finish") from error
    except OSError:  # a file system without locks
        return
