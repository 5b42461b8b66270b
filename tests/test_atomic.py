"""A build that ends early, however it ends, leaves the folder as it was, or with a file that the next build removes.

Builds run as the command line in a process of their own and are hit at known points (`striking`): in the middle of
the tensors, before the data is safe on the disk, before and after the rename.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Family, build_mix
from moegguf import atomic
from moegguf.atomic import atomic_file, remove_stale, scratch_folder
from moegguf.errors import UserError
from striking import CHUNK, NEVER, strike

WHILE_WRITING = [(CHUNK, 0), (CHUNK, 11), (CHUNK, 30), ("os.fsync", 0)]
AT_THE_END = [("os.replace", 0), ("os.fsync", 1)]
SIZE_LIMIT = 100_000


@pytest.fixture(scope="module")
def models(family) -> Family:
    return family("tied")


@pytest.fixture(scope="module")
def finished(models: Family, tmp_path_factory) -> bytes:
    """The mix that an undisturbed build writes."""
    return build_mix(tmp_path_factory.mktemp("finished") / "mix.gguf", models.base, models.experts).read_bytes()


def command(models: Family, target: Path, *flags: str) -> list[str]:
    experts = [word for i, path in enumerate(models.experts) for word in ("--expert", f"e{i}={path}")]
    return ["build", "--base", str(models.base), *experts, "--quant", "F32", "-o", str(target), *flags]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def has_nameless_files(folder: Path) -> bool:
    file = atomic._open_nameless(folder)
    if file is not None:
        file.close()
    return file is not None


@pytest.mark.parametrize("point", WHILE_WRITING, ids=str)
def test_a_kill_while_writing_leaves_nothing_behind(point, models: Family, tmp_path: Path):
    if not has_nameless_files(tmp_path):
        pytest.skip("this file system has no files without a name")
    killed = strike(signal.SIGKILL, point, command(models, tmp_path / "mix.gguf"), nameless=True)
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == []


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
@pytest.mark.parametrize("point", [*WHILE_WRITING[2:], *AT_THE_END], ids=str)
def test_after_a_kill_the_target_is_whole_or_absent_and_the_next_build_cleans_up(
    point, nameless: bool, models: Family, finished: bytes, tmp_path: Path
):
    target = tmp_path / "mix.gguf"
    killed = strike(signal.SIGKILL, point, command(models, target), nameless=nameless)
    assert killed.returncode == -signal.SIGKILL
    if target.exists():
        assert target.read_bytes() == finished
        assert names(tmp_path) == ["mix.gguf"]
        return
    assert all(name.startswith(".mix.gguf.moegguf-tmp.") for name in names(tmp_path))
    assert nameless or len(names(tmp_path)) == 1
    build_mix(target, models.base, models.experts)
    assert names(tmp_path) == ["mix.gguf"]
    assert target.read_bytes() == finished


def test_the_named_way_writes_the_same_file(models: Family, finished: bytes, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(atomic, "_open_nameless", lambda folder: None)
    assert build_mix(tmp_path / "mix.gguf", models.base, models.experts).read_bytes() == finished
    assert names(tmp_path) == ["mix.gguf"]


@pytest.mark.parametrize(
    ("number", "point", "nameless"),
    [
        (signal.SIGINT, (CHUNK, 11), True),
        (signal.SIGINT, (CHUNK, 11), False),
        (signal.SIGINT, ("os.fsync", 0), False),
        (signal.SIGTERM, (CHUNK, 11), False),
    ],
    ids=str,
)
def test_ctrl_c_and_sigterm_leave_nothing_behind(number, point, nameless: bool, models: Family, tmp_path: Path):
    stopped = strike(number, point, command(models, tmp_path / "mix.gguf"), nameless=nameless)
    assert stopped.returncode == 128 + number
    assert stopped.stderr == ("moegguf: interrupted\n" if number == signal.SIGINT else "moegguf: terminated\n")
    assert names(tmp_path) == []


def limit_file_size() -> None:
    """A write past the limit fails, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE_LIMIT, SIZE_LIMIT))


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_failing_write_is_a_user_error_and_leaves_the_old_file(
    nameless: bool, models: Family, finished: bytes, tmp_path: Path
):
    assert len(finished) > 2 * SIZE_LIMIT
    target = tmp_path / "mix.gguf"
    target.write_bytes(b"old")
    argv = command(models, target, "--force")
    failed = strike(0, NEVER, argv, nameless=nameless, preexec_fn=limit_file_size)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"moegguf: error: {target}: cannot be written (")
    assert failed.stderr.count("\n") == 1
    assert names(tmp_path) == ["mix.gguf"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_killed_rebuild_leaves_the_old_file(nameless: bool, models: Family, tmp_path: Path):
    target = tmp_path / "mix.gguf"
    target.write_bytes(b"old")
    strike(signal.SIGKILL, (CHUNK, 20), command(models, target, "--force"), nameless=nameless)
    assert target.read_bytes() == b"old"


def write(target: Path, content: bytes) -> None:
    with atomic_file(target) as file:
        file.write(content)


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_an_error_in_the_block_is_passed_on_and_leaves_the_old_file(nameless: bool, tmp_path: Path, monkeypatch):
    if not nameless:
        monkeypatch.setattr(atomic, "_open_nameless", lambda folder: None)
    target = tmp_path / "file"
    write(target, b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as file:
        file.write(b"new" * 100_000)
        1 / 0  # noqa: B018
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_new_file_has_the_permissions_of_a_new_file(tmp_path: Path):
    write(tmp_path / "file", b"content")
    (tmp_path / "plain").write_bytes(b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_temporary_files_of_others_stay(tmp_path: Path):
    """Of a build that still runs, of another target, and what only looks alike."""
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = [f".mix.gguf.moegguf-tmp.{alive.pid}", ".other.gguf.moegguf-tmp.99999999", ".mix.gguf.moegguf-tmp.x"]
    try:
        for name in [*kept, ".mix.gguf.moegguf-tmp.99999999"]:
            (tmp_path / name).write_bytes(b"")
        remove_stale(tmp_path / "mix.gguf")
        assert names(tmp_path) == sorted(kept)
    finally:
        alive.communicate()


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_stale_file_whose_process_id_is_ours_now_is_removed(nameless: bool, tmp_path: Path, monkeypatch):
    """In a container every run has the same process id."""
    if not nameless:
        monkeypatch.setattr(atomic, "_open_nameless", lambda folder: None)
    (tmp_path / f".file.moegguf-tmp.{os.getpid()}").write_bytes(b"stale")
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_scratch_folder_that_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path):
    """Those of processes that still run stay, and what only looks alike; one that began later has the same number."""
    script = f"""
import os, pathlib, signal
from moegguf.atomic import scratch_folder
with scratch_folder(pathlib.Path({str(tmp_path)!r}), ".fit") as folder:
    (folder / "model").write_bytes(b"weights")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (killed,) = tmp_path.iterdir()
    kept = [f".fit.{os.getppid()}.a", f".fit.{os.getpid()}.b", ".fit.x.c", ".fitting.99999999.d"]
    earlier = tmp_path / f".fit.{os.getpid()}.e"
    for folder in (*(tmp_path / name for name in kept), earlier):
        folder.mkdir()
    os.utime(earlier, (0, 0))
    with scratch_folder(tmp_path, ".fit") as folder:
        assert names(tmp_path) == sorted([*kept, folder.name])
        assert killed != folder
    assert names(tmp_path) == sorted(kept)


def test_a_scratch_folder_where_there_can_be_none_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"), scratch_folder(tmp_path / "absent", ".fit"):
        pass


def test_a_folder_that_does_not_exist_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "absent" / "file", b"")
