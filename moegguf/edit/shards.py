"""One GGUF file into several of at most a given size, and back: to the byte, if moegguf wrote the file.

Names and keys are those of llama.cpp (tools/gguf-split, src/llama-model-loader.cpp): PREFIX-00001-of-00003.gguf has
all metadata and the first tensors, the others have tensors only; each says by `split.no`, `split.count` and
`split.tensors.count` which of how many it is. Unlike there, a part is never larger than was asked for, header included.
Tensors are not divided. Works on any GGUF file whose types can be copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValue, GGUFValueType

from moegguf.assembly import usable_cores
from moegguf.atomic import atomic_files, check_space, check_writable
from moegguf.edit.change import check_ending
from moegguf.errors import UserError
from moegguf.gguf_header import read_header, shard_name, shards
from moegguf.journal import held
from moegguf.layouts.form import copy
from moegguf.sizes import show_size
from moegguf.sources.gguf_file import open_gguf
from moegguf.tensor import Metadata, Planned
from moegguf.watch import Progress, Watch, unheard, unwatched
from moegguf.writer import data_bytes, header_bytes, padded, unpadded_header_bytes, write_gguf, write_into

MAX_PARTS = 200
"""They are all open while they are written, and macOS allows 256 open files."""
_SPLIT = "split."


@dataclass(frozen=True)
class PlannedFile:
    """A file that is planned and not written."""

    path: Path
    header: bytes
    planned: tuple[Planned, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + data_bytes(self.planned)

    @property
    def n_tensor_bytes(self) -> int:
        """What a write tells its progress in all."""
        return sum(tensor.nbytes for tensor in self.planned)


@dataclass(frozen=True)
class Part:
    """One that was written, and its size."""

    path: Path
    n_bytes: int


@dataclass(frozen=True)
class Parts:
    """A file that was split. Runtimes open the first part."""

    files: tuple[Part, ...]
    seconds: float

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "files": [{"file": str(file.path), "bytes": file.n_bytes} for file in self.files],
            "bytes": self.n_bytes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Merged:
    """A file that parts were put together to."""

    path: Path
    n_bytes: int
    seconds: float

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {"file": str(self.path), "bytes": self.n_bytes, "seconds": round(self.seconds, 3)}


def split_file(
    path: Path,
    max_bytes: int,
    prefix: Path | None = None,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Parts:
    """Write the GGUF at `path` in parts; `prefix` is how their names begin, by default as the file's does.

    Raises UserError as `plan_split` does.
    """
    start, prefix = time.monotonic(), prefix or path.with_suffix("")
    if prefix.is_dir():
        raise UserError(f"-o {prefix}: is a folder, the parts need a name", f"write -o {prefix / path.stem}")
    parts = plan_split(path, max_bytes, prefix, overwrite=overwrite)
    with watch("writing", "bytes") as step:
        step.has(sum(part.n_tensor_bytes for part in parts))
        write_parts(path, parts, threads=threads or usable_cores(), progress=step.did)
    return Parts(tuple(Part(part.path, part.n_bytes) for part in parts), time.monotonic() - start)


def merge_parts(
    part: Path,
    output: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Merged:
    """Write the file that the set of `part` was split from. Raises UserError as `plan_merge` does."""
    start = time.monotonic()
    check_ending(output)
    merged = plan_merge(part, output, overwrite=overwrite)
    with watch("writing", "bytes") as step:
        step.has(merged.n_tensor_bytes)
        write_merged(merged, threads=threads or usable_cores(), progress=step.did)
    return Merged(merged.path, merged.n_bytes, time.monotonic() - start)


def plan_split(path: Path, max_bytes: int, prefix: Path, *, overwrite: bool = False) -> list[PlannedFile]:
    """The parts of `path`, PREFIX-00001-of-… and so on, each at most `max_bytes` long.

    Raises UserError when it is split already, when a tensor is larger than that, and when nothing may be written there.
    """
    header = read_header(path)
    if header.get("split.count", 1) > 1:
        raise UserError(f"{path}: is one part of a split file", "put it together first: `moegguf merge`")
    source = open_gguf(path, str(path), path.name)
    metadata = {key: header.value(key) for key in header.fields if not key.startswith(_SPLIT)}
    infos = sorted(header.tensors.values(), key=lambda info: info.offset)
    tensors = [Planned(copy(source.tensors[info.name]), info.type) for info in infos]
    groups = _grouped(path, source.arch, metadata, tensors, max_bytes)
    parts = []
    for i, group in enumerate(groups):
        keys = (metadata if i == 0 else {}) | _numbers(i, len(groups), len(tensors))
        target = shard_name(prefix, i + 1, len(groups))
        check_writable(target, overwrite)
        parts.append(PlannedFile(target, header_bytes(source.arch, keys, group), tuple(group)))
    return parts


def write_parts(path: Path, parts: Sequence[PlannedFile], *, threads: int = 1, progress: Progress = unheard) -> None:
    """Write the parts of `path`: all of them or none."""
    check_space(parts[0].path.parent, sum(part.n_bytes for part in parts), "the split file")
    with held(path), atomic_files([part.path for part in parts]) as files:
        for part, file in zip(parts, files, strict=True):
            write_into(file, part.header, part.planned, threads, progress)


def plan_merge(part: Path, output: Path, *, overwrite: bool = False) -> PlannedFile:
    """The file that the set of `part` was split from. Raises UserError where a part is missing or of another set."""
    paths = shards(part)
    if len(paths) == 1:
        raise UserError(f"{part}: is no part of a split file", "pass NAME-00001-of-0000N.gguf")
    source, header = open_gguf(part, str(part), part.name), read_header(paths[0])
    check_writable(output, overwrite)
    if any(output.exists() and output.samefile(path) for path in paths):
        raise UserError(f"{output}: is one of the parts", "choose another -o")
    metadata = {key: header.value(key) for key in header.fields if not key.startswith(_SPLIT)}
    planned = tuple(Planned(copy(tensor), tensor.type) for tensor in source.tensors.values())
    return PlannedFile(output, header_bytes(source.arch, metadata, planned), planned)


def write_merged(merged: PlannedFile, *, threads: int = 1, progress: Progress = unheard) -> None:
    """Write it, whole or not at all."""
    check_space(merged.path.parent, merged.n_bytes, "the merged file")
    write_gguf(merged.path, merged.header, merged.planned, threads, progress)


def _numbers(i: int, n: int, n_tensors: int) -> Metadata:
    """The keys of part `i`, counted from 0."""
    u16 = GGUFValueType.UINT16
    return {
        "split.no": GGUFValue(i, u16),
        "split.count": GGUFValue(n, u16),
        "split.tensors.count": GGUFValue(n_tensors, GGUFValueType.INT32),
    }


def _grouped(
    path: Path, arch: str, metadata: Metadata, tensors: Sequence[Planned], max_bytes: int
) -> list[list[Planned]]:
    """`tensors` in order, as many in each part as fit."""
    numbers = _numbers(0, 1, 0)
    groups: list[list[Planned]] = [[]]
    n_header, n_data = len(unpadded_header_bytes(arch, metadata | numbers, [])), 0
    for tensor in tensors:
        n_info = 24 + len(tensor.name.encode()) + 8 * len(tensor.shape)  # as in ggml/docs/gguf.md
        if groups[-1] and padded(n_header + n_info) + n_data + padded(tensor.nbytes) > max_bytes:
            groups.append([])
            n_header, n_data = len(unpadded_header_bytes(arch, numbers, [])), 0
        n_header, n_data = n_header + n_info, n_data + padded(tensor.nbytes)
        if padded(n_header) + n_data > max_bytes:
            what = f"{tensor.name} and its header take {show_size(padded(n_header) + n_data, up=True)}"
            raise UserError(f"{path}: {what}, more than {show_size(max_bytes)}", "allow larger parts: --max-size")
        groups[-1].append(tensor)
    if not 1 < len(groups) <= MAX_PARTS:
        what = f"{len(groups)} parts of {show_size(max_bytes)}" if groups[1:] else "all of it fits into one part"
        raise UserError(f"{path}: {what}, expected 2 to {MAX_PARTS} parts", "choose another --max-size")
    return groups
