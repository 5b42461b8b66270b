"""The divergence of models from a reference on texts, end to end: texts → tokens → logits of both → `Divergence`.

Both models read the same tokens, those of the reference, in chunks that hold nothing of each other. A chunk begins with
BOS where the model wants one, otherwise with the token before it; all tokens but that first one count, also those of
questions and of chat templates. (llama.cpp's perplexity tool counts the second half of each chunk.)

`compare` runs both models in lockstep, batch by batch, when memory holds both. `keep_reference` runs the reference
alone and writes its logits to a file, against which any number of models are then compared, one in memory at a time;
what rounding in that file costs is said in `moegguf.measurement.divergence`. The key-value cache is F32, so that what
is measured is the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from moegguf import __version__
from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.gguf_header import Header, file_identity, read_header
from moegguf.measurement.divergence import (
    Divergence,
    pack,
    packed_type,
    reference_of,
    row_blocks,
    token_values,
    unpack,
)
from moegguf.measurement.scores import windows
from moegguf.runtime.batch import logits
from moegguf.runtime.context import MAX_BATCH
from moegguf.runtime.encode import beginning, encode
from moegguf.runtime.machine import memory
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.runtime.run_options import MIN_CTX, RunOptions, hparam
from moegguf.runtime.template import template_of
from moegguf.runtime.vocab import open_vocab
from moegguf.sizes import show_size
from moegguf.texts import Record
from moegguf.watch import Progress, unheard

CHUNK = 512
"""Tokens of a chunk, where the reference's context holds as many."""
_MAGIC = b"moegguf-logits-1"

Tokens = Sequence[int]


# -------------------------------------------------------------------------------------------------- texts


def chunk_length(reference: Header, asked: int | None = None) -> int:
    """Tokens of a chunk. Raises UserError when `asked` is more than the reference was made for."""
    n_ctx = hparam(reference, "context_length", CHUNK)
    if asked is None:
        return min(CHUNK, n_ctx)
    if not (isinstance(asked, int) and 2 <= asked <= n_ctx):
        raise UserError(
            f"--chunk {asked}: expected 2 to {n_ctx}, the context of {reference.path}", "leave it out for the default"
        )
    return asked


def sequences_of(
    reference: Header, texts: Mapping[str, Sequence[Record]], *, chunk: int, max_tokens: int
) -> dict[str, list[Tokens]]:
    """The chunks of every text in tokens of `reference`; the first that count `max_tokens` tokens.

    Raises UserError for a text in which no token has one before it.
    """
    _token_list(reference)
    vocab = open_vocab(reference.path)
    template = template_of(reference, vocab)
    bos = next(iter(vocab.tokenize_prompt("")), None)
    chunks: dict[str, list[Tokens]] = {}
    for name, records in texts.items():
        chunks[name] = []
        room = max_tokens
        for record in records:
            encoded = encode(vocab, template, beginning(record, max_tokens))
            for tokens, _ in windows(encoded.tokens, 0, chunk, bos):
                if room:
                    chunks[name].append(tokens[: room + 1])
                    room -= len(chunks[name][-1]) - 1
            if not room:
                break
        if not chunks[name]:
            raise UserError(f"text {name}: has fewer than two tokens, so none has one before it", "give it some words")
    return chunks


def check_vocabulary(reference: Header, model: Header) -> None:
    """Raises UserError unless both have the same list of tokens."""
    expected, found = _token_list(reference), _token_list(model)
    if expected == found:
        return
    how = f"{len(found)} tokens, expected {len(expected)}"
    if len(found) == len(expected):
        at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
        how = f"token {at} is {found[at]!r}, expected {expected[at]!r}"
    raise UserError(
        f"{model.path}: {reference.path} is a reference with another vocabulary: {how}",
        "measure against a file of the same tokenizer, such as the mix in F16",
    )


def _token_list(header: Header) -> list[str | bytes]:
    tokens = header.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{header.path}: has no vocabulary", "convert it again, with its tokenizer")
    return tokens


# ------------------------------------------------------------------------------------------------ lockstep


def compare(
    reference: Path,
    model: Path,
    sequences: Sequence[Tokens],
    *,
    threads: int | None = None,
    offload: Offload = WHAT_FITS,
    progress: Progress = unheard,
) -> Divergence:
    """How far `model` is from `reference` on `sequences`, each of which is a chunk of at least two tokens.

    Memory must hold both. Raises UserError when one does not run, the vocabularies differ, or logits are not finite;
    KeyboardInterrupt at Ctrl-C.
    """
    check_vocabulary(read_header(reference), read_header(model))
    options = _options(sequences, threads, offload)
    with open_model(reference, options) as first, open_model(model, options) as second:
        values = []
        for (p, following), (q, _) in zip(_blocks(first, sequences), _blocks(second, sequences), strict=True):
            values.append(token_values(reference_of(p, following), q, following))
            progress(len(following))
    return Divergence(np.concatenate(values), _lengths(sequences))


def check_both_fit(*paths: Path) -> None:
    """Raises UserError when memory does not hold all files at once."""
    needed, there = sum(path.stat().st_size for path in set(paths) if path.exists()), memory()
    if needed > there.largest_file:
        raise UserError(
            f"{' and '.join(map(str, paths))} take {show_size(needed, up=True)} together, memory has room for "
            f"{show_size(there.largest_file)}",
            "leave --no-cache out: then one at a time is enough",
        )


def _options(sequences: Sequence[Tokens], threads: int | None, offload: Offload) -> RunOptions:
    ctx = max(MIN_CTX, MAX_BATCH, *map(len, sequences))
    return RunOptions(ctx=ctx, threads=threads, offload=offload, kv_type=GGMLQuantizationType.F32)


def _lengths(sequences: Sequence[Tokens]) -> np.ndarray:
    return np.array([len(tokens) - 1 for tokens in sequences])


def _blocks(model: Model, sequences: Sequence[Tokens]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(logits (n, n_vocab), the tokens (n,) that follow), a few MB at a time."""
    following = np.concatenate([tokens[1:] for tokens in sequences])
    at = 0
    for batch in logits(model, sequences):
        for rows in row_blocks(*batch.shape):
            block = batch[rows]
            if not np.isfinite(block).all():
                raise UserError(
                    f"{model.header.path}: says NaN or infinity of the next token", "build it again from sound weights"
                )
            yield block, following[at : at + len(block)]
            at += len(block)


# ------------------------------------------------------------------------------------------- kept on disk


@dataclass(frozen=True)
class KeptReference:
    """The logits of a reference on `sequences`, in the file `path`, which may have yet to be written.

    The file is a head that says of what it is, then a row of `packed_type` for every token.
    """

    path: Path
    reference: Header
    sequences: Sequence[Tokens]
    offload: Offload = WHAT_FITS

    @cached_property
    def nbytes(self) -> int:
        """What the file takes."""
        return len(self._head) + int(_lengths(self.sequences).sum()) * self._row.itemsize

    @property
    def is_there(self) -> bool:
        """Whether the file is there, whole. Raises UserError when another one is in its place."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(len(self._head))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})", "name another file") from error
        if not self._head.startswith(head):
            what = "the logits of another reference or of other text" if head.startswith(_MAGIC) else "something else"
            raise UserError(f"{self.path}: exists already, and holds {what}", "delete it, or name another file")
        return self.path.stat().st_size == self.nbytes

    def write(self, *, threads: int | None = None, progress: Progress = unheard) -> None:
        """Run the reference and write the file, whole or not at all.

        Raises UserError when the disk has no room, the reference does not run, or its logits are not finite;
        KeyboardInterrupt at Ctrl-C.
        """
        _make_room(self.path, self.nbytes)
        options = _options(self.sequences, threads, self.offload)
        with open_model(self.reference.path, options) as model, atomic_file(self.path) as file:
            file.write(self._head)
            for block, following in _blocks(model, self.sequences):
                file.write(pack(block, following).tobytes())
                progress(len(following))

    def compare(self, model: Path, *, threads: int | None = None, progress: Progress = unheard) -> Divergence:
        """How far `model` is from the reference. The file must be there. Raises as `compare`."""
        check_vocabulary(self.reference, read_header(model))
        values = []
        with open_model(model, _options(self.sequences, threads, self.offload)) as opened, \
             open(self.path, "rb") as file:  # fmt: skip
            file.seek(len(self._head))
            for block, following in _blocks(opened, self.sequences):
                values.append(token_values(unpack(np.fromfile(file, self._row, len(block))), block, following))
                progress(len(following))
        return Divergence(np.concatenate(values), _lengths(self.sequences))

    @cached_property
    def _head(self) -> bytes:
        return _head(self.reference, self.sequences, self.offload)

    @cached_property
    def _row(self) -> np.dtype:
        return packed_type(len(_token_list(self.reference)))


def kept_in(
    folder: Path, reference: Header, sequences: Sequence[Tokens], *, offload: Offload = WHAT_FITS
) -> KeptReference:
    """The file in `folder` that is of just this: its name is a digest."""
    digest = _head(reference, sequences, offload)[len(_MAGIC) :].hex()
    return KeptReference(folder / f"{digest[:32]}.logits", reference, sequences, offload)


def keep_reference(
    reference: Path,
    sequences: Sequence[Tokens],
    folder: Path,
    *,
    threads: int | None = None,
    offload: Offload = WHAT_FITS,
    progress: Progress = unheard,
) -> KeptReference:
    """The kept logits of `reference` on `sequences`, written into `folder` unless they are there. Raises UserError."""
    kept = kept_in(folder, read_header(reference), sequences, offload=offload)
    if not kept.is_there:
        kept.write(threads=threads, progress=progress)
    return kept


def _head(reference: Header, sequences: Sequence[Tokens], offload: Offload) -> bytes:
    """How a file of logits begins: with a digest of all that they depend on."""
    of = {
        "reference": file_identity(reference),
        "tokens": [list(map(int, tokens)) for tokens in sequences],
        "offload": asdict(replace(offload, patience=WHAT_FITS.patience)),  # how long one waits changes no figure
        "versions": [__version__, version("llama-cpp-python")],
    }
    return _MAGIC + sha256(json.dumps(of, sort_keys=True).encode()).digest()


def _make_room(path: Path, nbytes: int) -> None:
    """Make the folder of `path`. Raises UserError where it cannot be, or is on a disk without so much room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})", "choose another folder") from error
    if nbytes > free:
        raise UserError(
            f"{path}: the reference's logits take {show_size(nbytes, up=True)}, {show_size(free)} are free",
            "give fewer --max-tokens, another folder, or --no-cache when memory holds both models",
        )
