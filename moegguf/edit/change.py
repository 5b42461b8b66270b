"""A changed mix: decided first, then written into its file or as a copy of it.

In place, a change overwrites the header, which a build leaves some room in, and the parts of tensors that are new;
no tensor moves. It goes through a journal (`moegguf.journal`), so it is made whole or not at all. A copy is written
in one pass and has the header that a build would write, with all of that room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from moegguf.assembly import verify
from moegguf.atomic import check_space, check_writable
from moegguf.edit.finished import FinishedMix, read_mix
from moegguf.errors import UserError
from moegguf.journal import Patch, held, locked, undoable, write
from moegguf.layouts.form import copy
from moegguf.metadata import PREFIX, SPARE, SPARE_BYTES, Card, spare_bytes
from moegguf.sources.gguf_file import open_gguf
from moegguf.tensor import Expected, Metadata, Part, Planned, Source, row_bytes
from moegguf.watch import Progress, unheard
from moegguf.writer import (
    Chunk,
    Written,
    chunks_of,
    data_bytes,
    header_bytes,
    unpadded_header_bytes,
    write_chunks,
    write_gguf,
)

_ANEW = "write a copy with -o, or build the mix again"


@dataclass(frozen=True)
class Replaced:
    """A part that is not in the file yet: of which tensor, and where it goes in it."""

    tensor: Planned
    part: Part
    row: int
    byte: int
    """Of each row."""

    @property
    def n_bytes(self) -> int:
        return self.part.tensor.n_rows * row_bytes(self.tensor.type, self.part.tensor.n_cols)


@dataclass(frozen=True)
class Change:
    """What becomes of a finished mix. `planned` are all of its tensors, `replaced` the parts of them that are new."""

    mix: FinishedMix
    card: Card
    metadata: Metadata
    planned: tuple[Planned, ...]
    replaced: tuple[Replaced, ...] = ()
    sources: tuple[Source, ...] = ()
    """Where the new parts come from."""
    notes: tuple[str, ...] = ()
    """What whoever asked for it should know."""

    @property
    def to_verify(self) -> tuple[Expected, ...]:
        """Files of its sources whose digests are known, each once."""
        return tuple(dict.fromkeys(file for source in self.sources for file in source.expected))

    def n_bytes_to_do(self, *, in_place: bool) -> int:
        """What a write tells its progress in all: bytes to verify, and bytes of tensor data to write."""
        written = [part.n_bytes for part in self.replaced] if in_place else [tensor.nbytes for tensor in self.planned]
        return sum(file.n_bytes for file in self.to_verify) + sum(written)

    def chunks(self) -> Iterator[Chunk]:
        """What is written in place."""
        for each in self.replaced:
            offset = self.mix.header.tensors[each.tensor.name].offset + each.row * each.tensor.row_bytes + each.byte
            yield from chunks_of(each.tensor, (each.part,), offset)


def stored_tensors(mix: FinishedMix) -> tuple[Planned, ...]:
    """The tensors of the file as they are."""
    source = open_gguf(mix.path, str(mix.path), mix.path.name)
    return tuple(Planned(copy(source.tensors[info.name]), info.type) for info in mix.tensors)


def with_card(metadata: Metadata, card: Card) -> Metadata:
    """`metadata` with the keys of `card` in place of those that it has: last, as a build writes them."""
    stock = {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}
    spare = {SPARE: metadata[SPARE]} if SPARE in metadata else {}
    return stock | card.to_metadata() | spare


def refitted_header(mix: FinishedMix, file: BufferedRandom, metadata: Metadata) -> Patch:
    """The header of `file` with `metadata`, as long as it is: what it needs more or less is taken from its room.

    Raises UserError when there is not as much, or when the file is not the one that was read.
    """

    def header(metadata: Metadata) -> bytes:
        return unpadded_header_bytes(mix.arch, metadata, mix.tensors)

    old = header(mix.metadata)
    file.seek(0)
    if file.read(len(old)) != old or SPARE not in mix.metadata:
        raise UserError(f"{mix.path}: its header was changed by another program, or just now", _ANEW)
    n_spare = len(mix.metadata[SPARE].value) + len(old) - len(header(metadata))
    if n_spare < 1:
        raise UserError(f"{mix.path}: its header has room for {1 - n_spare} bytes less than that takes", _ANEW)
    return Patch(0, header(metadata | spare_bytes(n_spare)))


def write_in_place(change: Change, *, threads: int = 1, progress: Progress = unheard) -> Written:
    """Make `change` in its file, whole or not at all; `n_bytes` of the result is what was written of tensors.

    `progress` hears the bytes as they are written. Raises UserError when the header has no room for it, when the disk
    has none for the journal, when weights cannot be used, and when another process changes the file.
    """
    mix, chunks = change.mix, list(change.chunks())
    verify(change.to_verify, progress)
    with locked(mix.path) as file:
        header = refitted_header(mix, file, change.metadata)
        with undoable(mix.path, file, [header.span, *(span for chunk in chunks for span in chunk.spans)]):
            written = write_chunks(file, chunks, threads, progress)
            write(file, [header])
    return written


def write_copy(change: Change, output: Path, *, threads: int = 1, progress: Progress = unheard) -> Written:
    """Write the changed mix to `output`, whole or not at all; the file that it was made from stays as it is.

    Raises UserError as `write_in_place` does.
    """
    for source in change.sources:
        if any(output.exists() and file.exists() and output.samefile(file) for file in source.files):
            raise UserError(f"{output}: is also a source ({source.ref}) of this change", "choose another -o")
    header = header_bytes(change.mix.arch, change.metadata | spare_bytes(SPARE_BYTES), change.planned)
    check_space(output.parent, len(header) + data_bytes(change.planned), "the copy")
    verify(change.to_verify, progress)
    with held(change.mix.path):
        if read_mix(change.mix.path).metadata != change.mix.metadata:
            raise UserError(f"{change.mix.path}: was changed meanwhile", "try again")
        return write_gguf(output, header, change.planned, threads, progress)


def check_ending(output: Path) -> None:
    """Raises UserError for a name that runtimes do not take for a model's."""
    if output.suffix != ".gguf":
        raise UserError(f"-o {output}: expected a name that ends in .gguf", "runtimes look for that ending")


def check_copy(path: Path, output: Path, *, overwrite: bool) -> None:
    """Raises UserError where no copy of `path` can be written to `output`."""
    check_writable(output, overwrite)
    if output.exists() and output.samefile(path):
        raise UserError(f"{output}: is the file itself", "choose another -o")
