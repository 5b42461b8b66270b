"""Bytes at an offset, from a local file or from anywhere else that can be read in ranges.

A model file is opened once and read in many small ranges by several threads. Local files are read, not
mapped: mapped pages would count as memory of the process, and a bad disk would be a signal instead of an error.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from moegguf.errors import UserError
from moegguf.watch import Progress, unheard

_CHUNK_BYTES = 8 << 20


class Blob(Protocol):
    """A file that can be read in ranges from several threads at once."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def read(self, offset: int, size: int) -> np.ndarray:
        """`size` bytes from `offset` as uint8. Raises UserError when they cannot be had."""
        ...


def sha256_of(path: Path, progress: Progress = unheard) -> str:
    """The SHA-256 of a file, as hex. `progress` hears its bytes.

    A file is read once, and again when it was changed: by its size, times, or place on the disk. One that changed just
    now is read again too, as clocks of file systems are coarse.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key in _DIGESTS:
            progress(status.st_size)
            return _DIGESTS[key]
        is_settled = abs(time.time() - status.st_mtime) > _CLOCK_SECONDS
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    if is_settled:
        _DIGESTS[key] = digest.hexdigest()
    return digest.hexdigest()


_DIGESTS: dict[tuple[str | int, ...], str] = {}
_CLOCK_SECONDS = 2.0
"""What the clock of any file system can tell apart."""


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (stays open as long as the source lives)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror})", "check the path and its permissions"
            ) from error
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, offset: int, size: int) -> np.ndarray:
        buffer = np.empty(size, np.uint8)
        try:
            done = self._read_into(memoryview(buffer), offset)
        except OSError as error:
            raise UserError(
                f"{self.path}: reading failed at byte {offset} ({error.strerror})", "check the disk"
            ) from error
        if done != size:
            raise UserError(
                f"{self.path}: ends at byte {offset + done}, expected data up to byte {offset + size}",
                "the file shrank or was never complete: download or copy it again",
            )
        return buffer

    def _read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            if hasattr(os, "preadv"):
                n = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            else:  # Windows, older macOS: one position per file, so one reader at a time
                with self._lock:
                    self._file.seek(offset + done)
                    n = self._file.readinto(view[done:])
            if not n:
                break
            done += n
        return done
