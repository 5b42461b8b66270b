"""One pass from source rows to the finished file, with bounded memory.

Every output tensor is cut into chunks of whole rows. The plan says where each chunk belongs in the file, so each
worker reads, quantises and writes its chunk there, and only a few chunks per worker are ever in memory, whatever
the model. The header is laid out by the `gguf` package; every byte after it is counted against the plan.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import BufferedRandom, BufferedWriter
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.gguf_header import TensorInfo
from moegguf.interrupt import kept_interrupt
from moegguf.journal import Span
from moegguf.quant import ggml
from moegguf.quant.rows import Requantised, make_rows
from moegguf.tensor import Metadata, Part, Planned, row_bytes
from moegguf.watch import Progress

ALIGNMENT = 32
CHUNK_WEIGHTS = 1 << 20
"""Weights of a chunk: 4 MiB as float32. Large enough to forget the cost of a call, small enough for any laptop."""
CHUNKS_PER_THREAD = 3


@dataclass(frozen=True)
class Written:
    """What a finished write did; of a whole file `n_bytes` is its size."""

    n_bytes: int
    requantised: Requantised


def header_bytes(arch: str, metadata: Metadata, tensors: Sequence[Planned | TensorInfo]) -> bytes:
    """The file up to its first tensor: magic, counts, metadata, tensor table and padding."""
    header = unpadded_header_bytes(arch, metadata, tensors)
    return header + bytes(-len(header) % ALIGNMENT)


def unpadded_header_bytes(arch: str, metadata: Metadata, tensors: Sequence[Planned | TensorInfo]) -> bytes:
    """The header without what aligns the first tensor."""
    writer = GGUFWriter(None, arch)
    for key, value in metadata.items():
        is_empty = value.type == GGUFValueType.ARRAY and not value.value
        if key not in ("general.architecture", "general.alignment") and not is_empty:
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("f4"), tensor.nbytes, tensor.type)
    header = io.BytesIO()
    writer.fout, writer.state = [header], WriterState.EMPTY  # as if it had opened a file: it goes to memory
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return header.getvalue()


def data_bytes(planned: Sequence[Planned]) -> int:
    """Bytes of all tensors, padding included."""
    return sum(padded(tensor.nbytes) for tensor in planned)


def write_gguf(path: Path, header: bytes, planned: Sequence[Planned], threads: int, progress: Progress) -> Written:
    """Write `header` and `planned` to `path`, whole or not at all.

    Raises UserError for weights that are NaN or Inf, for damaged sources, and when the disk cannot take the file.
    """
    with atomic_file(path) as file:
        return write_into(file, header, planned, threads, progress)


def write_into(
    file: BufferedWriter, header: bytes, planned: Sequence[Planned], threads: int, progress: Progress
) -> Written:
    """Write `header` and `planned` to the empty `file`; raises as `write_gguf` does."""
    _refuse_unwritable_types(planned)
    size = len(header) + data_bytes(planned)
    file.write(header)
    file.truncate(size)  # what no chunk fills is padding, and reads as zeros
    file.flush()
    written = write_chunks(file, _chunks(planned, len(header)), threads, progress)
    expected = sum(tensor.nbytes for tensor in planned)
    if written.n_bytes != expected:
        raise AssertionError(f"{written.n_bytes} bytes of tensors written, {expected} planned")
    return Written(size, written.requantised)


def padded(n: int) -> int:
    """`n` bytes with what aligns the tensor that follows."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def _refuse_unwritable_types(planned: Sequence[Planned]) -> None:
    """A float64 tensor makes stock llama.cpp crash at its first token, so none may be planned."""
    for tensor in planned:
        if tensor.type not in ggml.supported_types():
            raise UserError(f"{tensor.name}: cannot be written as {tensor.type.name}", "choose another type")


@dataclass(frozen=True)
class Chunk:
    """Rows start to stop of parts that stand side by side in a tensor, and where the first of them goes in the file."""

    tensor: Planned
    parts: tuple[Part, ...]
    start: int
    stop: int
    offset: int

    @property
    def spans(self) -> list[Span]:
        """What it fills: one piece where the parts are whole rows of the tensor, else one for each row."""
        whole, n_rows = self.tensor.row_bytes, self.stop - self.start
        width = row_bytes(self.tensor.type, sum(part.tensor.n_cols for part in self.parts))
        if width == whole:
            return [Span(self.offset, n_rows * whole)]
        return [Span(self.offset + row * whole, width) for row in range(n_rows)]


def chunks_of(tensor: Planned, parts: tuple[Part, ...], offset: int) -> Iterator[Chunk]:
    """All rows of `parts`, which stand side by side in `tensor` from `offset` of the file on."""
    step = max(1, CHUNK_WEIGHTS // tensor.slot.n_cols)
    n_rows = parts[0].tensor.n_rows
    for start in range(0, n_rows, step):
        yield Chunk(tensor, parts, start, min(start + step, n_rows), offset + start * tensor.row_bytes)


def _chunks(planned: Sequence[Planned], offset: int) -> Iterator[Chunk]:
    """All chunks in file order, the first at `offset`."""
    for tensor in planned:
        at = offset
        for band in tensor.slot.bands:
            yield from chunks_of(tensor, band, at)
            at += band[0].tensor.n_rows * tensor.row_bytes
        offset += padded(tensor.nbytes)


def write_chunks(
    file: BufferedWriter | BufferedRandom, chunks: Iterable[Chunk], threads: int, progress: Progress
) -> Written:
    """Make and write all chunks on `threads` workers; a worker's error is raised here. `n_bytes` is their size.

    However it ends, by an error or by Ctrl-C, no worker writes on.
    """
    n_bytes, requantised = 0, Requantised()
    with kept_interrupt() as pressed, closing(_written_chunks(file, chunks, threads)) as pieces:
        for done in pieces:
            n_bytes += done.n_bytes
            requantised += done.requantised
            progress(done.n_bytes)
            if pressed.is_set():
                break
    return Written(n_bytes, requantised)


def _written_chunks(file: BufferedWriter | BufferedRandom, chunks: Iterable[Chunk], threads: int) -> Iterator[Written]:
    waiting: deque[Future[Written]] = deque()
    write_at = _positioned_write(file)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_write_chunk, write_at, chunk))
            if len(waiting) > threads * CHUNKS_PER_THREAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunk(write_at: Callable[[memoryview, int], None], chunk: Chunk) -> Written:
    rows, requantised = make_rows(chunk.tensor, chunk.parts, chunk.start, chunk.stop)
    data, at = np.ascontiguousarray(rows).reshape(-1).data, 0
    for span in chunk.spans:
        write_at(data[at : at + span.n_bytes], span.offset)
        at += span.n_bytes
    return Written(at, requantised)


def _positioned_write(file: BufferedWriter | BufferedRandom) -> Callable[[memoryview, int], None]:
    """A function that writes bytes at an offset, from any thread."""
    lock = threading.Lock()

    def write_at(data: memoryview, offset: int) -> None:
        while data:
            n = os.pwrite(file.fileno(), data, offset)
            data, offset = data[n:], offset + n

    def seek_and_write(data: memoryview, offset: int) -> None:
        with lock:
            file.seek(offset)
            file.write(data)

    return write_at if hasattr(os, "pwrite") else seek_and_write  # Windows has no pwrite
