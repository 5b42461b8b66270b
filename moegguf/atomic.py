"""A file that is either there whole or not there at all.

Written under no name where the system can do that (O_TMPFILE on Linux: nothing is left even after kill -9), otherwise
under a temporary name beside the target that holds the writer's process id; then synced and renamed. `remove_stale`
deletes temporary files whose writer is gone. Of several files that belong together the first is named last: whoever
finds it finds them all.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from io import BufferedWriter
from pathlib import Path

from moegguf.errors import UserError
from moegguf.sizes import show_size

_MARK = ".moegguf-tmp."


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[BufferedWriter]:
    """A binary file that becomes `target` when the block ends well, and vanishes when it raises.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    remove_stale(target)
    temporary = target.with_name(f".{target.name}{_MARK}{os.getpid()}")
    try:
        file = _open_nameless(target.parent)
        is_nameless = file is not None
        if file is None:
            file = open(temporary, "xb")  # noqa: SIM115 (closed below, on every path)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if is_nameless:
                _give_name(file, temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        _remove(temporary)
        raise _unwritable(target, error) from error
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def atomic_files(targets: Sequence[Path]) -> Iterator[list[BufferedWriter]]:
    """Files that become `targets`, the first one last, when the block ends well; when it raises none of them does."""
    named: list[Path] = []

    def note(target: Path, error: type[BaseException] | None) -> None:
        if error is None:
            named.append(target)

    try:
        with contextlib.ExitStack() as stack:
            files = []
            for target in targets:
                stack.push(lambda error, *_, target=target: note(target, error))
                files.append(stack.enter_context(atomic_file(target)))
            yield files
    except BaseException:
        for target in named:
            _remove(target)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A folder to write to; if it is new and nothing comes of it, it goes again."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder", "choose another")
    is_new = not path.exists()
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        if is_new and not any(path.iterdir()):
            path.rmdir()


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent`, whose name begins with `name`, that is gone when the block ends.

    Those that killed processes left there are removed first. Raises UserError when it cannot be made.
    """
    for path in parent.glob(f"{glob.escape(name)}.*.*"):
        if _is_abandoned(path, name):
            shutil.rmtree(path, ignore_errors=True)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"{name}.{os.getpid()}.", dir=parent)
    except OSError as error:
        raise _unwritable(parent, error) from error
    with folder:
        yield Path(folder.name)


def _is_abandoned(folder: Path, name: str) -> bool:
    """Whether the process that made this scratch folder is gone; one that began later only has the same number."""
    import psutil

    match = re.fullmatch(re.escape(name) + r"\.(\d{1,9})\..*", folder.name)
    try:
        return bool(match) and psutil.Process(int(match[1])).create_time() > folder.stat().st_mtime
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def check_writable(target: Path, overwrite: bool) -> None:
    """Raises UserError where no file can be written to `target`, or one is there that must not be replaced."""
    if target.is_dir():
        raise UserError(f"{target}: is a folder, expected a file name", "name a file in it")
    if os.path.lexists(target) and not overwrite:  # also a link that leads nowhere
        raise UserError(f"{target}: exists already", "choose another name, or pass --force to replace it")
    if not target.parent.is_dir():
        raise UserError(
            f"{target.parent}: no such folder to write {target.name} to", "create it, or choose another name"
        )
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target.parent}: may not be written to", "choose another folder")


def check_space(folder: Path, n_bytes: int, what: str, mend: str = "free some space") -> None:
    """Raises UserError where `what`, of `n_bytes`, does not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(f"{folder}: {show_size(free)} are free, {what} needs {show_size(n_bytes, up=True)}", mend)


def remove_stale(target: Path) -> None:
    """Delete temporary files of `target` whose process no longer runs.

    One with our own process id is of an earlier process that had it, as all have in a container: ours is not made yet.
    """
    pattern = re.compile(re.escape(f".{target.name}{_MARK}") + r"(\d+)")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
                _remove(path)


def _open_nameless(folder: Path) -> BufferedWriter | None:
    """A file without a name in `folder`, or None where the file system or the system has no such thing."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except OSError:
        return None


def _give_name(file: BufferedWriter, path: Path) -> None:
    """Link a nameless file into its folder. `src_dir_fd` only makes Python call linkat, which follows /proc's link."""
    os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)


def _is_running(pid: int) -> bool:
    import psutil  # takes longer than all else that is imported here, and most commands find nothing to ask it

    return psutil.pid_exists(pid)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Windows cannot open folders and needs no such thing."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"{target}: cannot be written ({error.strerror})", "check the folder's permissions and its space")
