"""A calibration, end to end: texts → tokens → a running model → what enters its weights, squared and summed → a file.

Texts run in pieces of at most `chunk` tokens, each on its own: a document, a conversation, or a piece of a longer one,
which then begins with BOS as llama.cpp's imatrix tool has it. The file says which texts it holds, so a calibration that
was stopped goes on, and more text is added to one that is there. Of an interrupted run at most a minute is lost.

Files of a mix have its tensors' names, as llama.cpp wants them. `experts_of` takes one apart into what it says of each
expert, under the names of a dense model, which serves the expert in any mix and layout; so does a calibration of the
expert alone, on the trunk of its base (`moegguf.jobs.dense`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from moegguf.atomic import check_writable
from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.gguf_header import Header, is_gguf, read_header
from moegguf.layouts.shared import split
from moegguf.metadata import PREFIX, Card, read_card
from moegguf.mix import FFN_ROLES
from moegguf.quant.imatrix import Calibration, CountedText, read_calibration, write_calibration
from moegguf.recipe import Layout
from moegguf.runtime.encode import beginning, encode
from moegguf.runtime.inputs import InputSquares
from moegguf.runtime.model import open_model
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.runtime.run_options import RunOptions, hparam
from moegguf.runtime.template import template_of
from moegguf.runtime.vocab import open_vocab
from moegguf.sources.blob import LocalFile
from moegguf.squares import Squares, added
from moegguf.texts import Record
from moegguf.watch import Progress, unheard

CHUNK = 512
MIN_CHUNK = 16
MAX_TOKENS = 100 * CHUNK
"""Of a text, unless told otherwise: what imatrices are usually made from."""
_BATCH = 512
_SAVE_SECONDS = 60
_SAMPLE_BYTES = 1024

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class CalibrationOptions:
    chunk: int | None = None
    """Tokens of a piece; default: 512, or the model's context where that is less."""
    max_tokens: int = MAX_TOKENS
    """Of each text; whole pieces are taken."""
    fresh: bool = False
    """Whether to replace what the output file holds."""
    output: bool = False
    """Whether `output.weight` is calibrated as well. llama.cpp advises against it."""
    threads: int | None = None
    offload: Offload = WHAT_FITS

    def __post_init__(self) -> None:
        check_range("--max-tokens", self.max_tokens, 1)
        check_range("--chunk", self.chunk, MIN_CHUNK)
        check_threads(self.threads)


@dataclass(frozen=True)
class TextToRun:
    """A text in pieces, of which the first `n_known` are in the sums already."""

    name: str
    pieces: tuple[Tokens, ...]
    n_known: int

    @property
    def n_tokens(self) -> int:
        """How many tokens will be run."""
        return sum(map(len, self.pieces[self.n_known :]))


@dataclass(frozen=True)
class CalibrationPlan:
    """All that is known before the model runs. `known` is what the output file holds, to be added to."""

    header: Header
    output: Path
    options: CalibrationOptions
    known: Calibration
    datasets: tuple[str, ...]
    material: tuple[TextToRun, ...]

    @property
    def n_tokens(self) -> int:
        return sum(material.n_tokens for material in self.material)


# ------------------------------------------------------------------------------------------------- plan


def plan_calibration(
    model: Path,
    texts: Mapping[str, Sequence[Record]],
    output: Path,
    options: CalibrationOptions = CalibrationOptions(),
    *,
    datasets: Iterable[str] = (),
) -> CalibrationPlan:
    """Tokenise `texts`, to be run through the GGUF `model`, and read what `output` holds of it already.

    `datasets` is what the file says of where the texts are from. Raises UserError when the model is none, when a text
    is shorter than one chunk or not the one that is in the file, and when the file is of something else.
    """
    header = read_header(model)
    if not header.tensors or not hparam(header, "block_count", 0):
        raise UserError(f"{model}: is a GGUF without weights of a language model", "pass a mix, or another model")
    chunk = _chunk(header, options.chunk)
    if options.max_tokens < chunk:
        raise UserError(
            f"--max-tokens {options.max_tokens}: is less than one chunk of {chunk}", "take more, or a smaller --chunk"
        )
    known = extended(output, options, Calibration({}, chunk, _digest_of(header)))
    encoder = _Encoder(header, chunk, options.max_tokens)
    material, faults = [], []
    for name, records in texts.items():
        counted = next((text for text in known.texts if text.name == name), None)
        try:
            material.append(_material(name, records, encoder, counted, output))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return CalibrationPlan(
        header, output, options, known, tuple(dict.fromkeys((*known.datasets, *datasets))), tuple(material)
    )


def check_target(path: Path) -> None:
    """Raises UserError when no imatrix can be written to `path`: before minutes go into it."""
    if path.suffix != ".gguf":
        raise UserError(f"{path}: expected a name that ends in .gguf", "choose another -o")
    check_writable(path, overwrite=True)
    if path.exists() and not is_gguf(path):
        raise UserError(f"{path}: exists already, and is no imatrix in GGUF format", "choose another -o")


def _chunk(header: Header, asked: int | None) -> int:
    n_ctx = hparam(header, "context_length", CHUNK)
    if asked is not None and asked > n_ctx:
        raise UserError(f"--chunk {asked}: expected at most {n_ctx}, the context of {header.path}", "leave it out")
    return asked or min(CHUNK, n_ctx)


def extended(output: Path, options: CalibrationOptions, empty: Calibration) -> Calibration:
    """What `output` holds, to be extended; `empty` where there is nothing, or where it is to begin anew.

    Raises UserError when it is not of the model and the chunks of `empty`, and when it is no imatrix at all.
    """
    check_target(output)
    if not output.exists():
        return empty
    found = read_calibration(output)
    if options.fresh:
        return empty
    mend = "pass --fresh to replace it, or choose another -o"
    if not found.model or not found.texts:
        raise UserError(f"{output}: exists already, and does not say which texts it holds", mend)
    if found.model != empty.model:
        raise UserError(f"{output}: is the imatrix of another model, or of other weights", mend)
    if found.chunk_size != empty.chunk_size:
        raise UserError(
            f"{output}: was made in chunks of {found.chunk_size} tokens, not {empty.chunk_size}",
            f"pass --chunk {found.chunk_size}, or {mend}",
        )
    return found


def _digest_of(header: Header) -> str:
    """What tells a model from others: its keys, its tensors, and some bytes of each."""
    keys = {key: header.get(key) for key in header.fields if not key.startswith(("tokenizer.", "general.", PREFIX))}
    digest = hashlib.sha256(repr(keys).encode())
    blob = LocalFile(header.path)
    for info in header.tensors.values():
        n = min(_SAMPLE_BYTES, info.nbytes)
        digest.update(repr((info.name, info.shape, info.type.name)).encode())
        digest.update(blob.read(info.offset + (info.nbytes - n) // 2, n).tobytes())
    return digest.hexdigest()[:16]


class _Encoder:
    """Records → pieces of tokens."""

    def __init__(self, header: Header, chunk: int, max_tokens: int) -> None:
        self._vocab = open_vocab(header.path)
        self._template = template_of(header, self._vocab)
        self._bos = tuple(self._vocab.tokenize_prompt(""))
        self.chunk, self.max_tokens = chunk, max_tokens

    def pieces(self, records: Iterable[Record], at_least: int) -> tuple[tuple[Tokens, ...], bool]:
        """The first pieces of `records`, of `max_tokens` tokens or `at_least` so many, and whether that is all."""
        room = max(self.max_tokens, at_least)
        pieces: list[Tokens] = []
        for record in records:
            for piece in self._cut(encode(self._vocab, self._template, beginning(record, room)).tokens):
                if len(piece) > room:
                    return tuple(pieces), False
                pieces.append(piece)
                room -= len(piece)
        return tuple(pieces), True

    def _cut(self, tokens: Tokens) -> Iterator[Tokens]:
        """In pieces; those after the first begin with BOS in place of their own first token (tools/imatrix)."""
        for start in range(0, len(tokens), self.chunk):
            piece = tokens[start : start + self.chunk]
            yield (*self._bos, *piece[1:]) if start and self._bos else piece


def _material(
    name: str, records: Sequence[Record], encoder: _Encoder, counted: CountedText | None, output: Path
) -> TextToRun:
    pieces, is_all = encoder.pieces(records, counted.n_tokens if counted else 0)
    n_tokens = sum(map(len, pieces))
    if is_all and n_tokens < encoder.chunk:
        raise UserError(
            f"text {name}: has {n_tokens} tokens, less than one chunk of {encoder.chunk}",
            "give more text, or a smaller --chunk",
        )
    n_known = 0
    if counted:
        lengths = np.cumsum([len(piece) for piece in pieces])
        n_known = int(np.searchsorted(lengths, counted.n_tokens)) + 1
        digest = _digest_of_pieces(pieces[:n_known]).hexdigest()
        if n_known > len(pieces) or lengths[n_known - 1] != counted.n_tokens or digest != counted.digest:
            raise UserError(
                f"text {name}: {output} holds other text of that name, which cannot be taken out",
                "give it another name, pass --fresh to begin anew, or choose another -o",
            )
    return TextToRun(name, pieces, n_known)


def _digest_of_pieces(pieces: Iterable[Tokens]):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(repr(piece).encode())
    return digest


# -------------------------------------------------------------------------------------------------- run


def run_calibration(plan: CalibrationPlan, progress: Progress = unheard) -> Calibration:
    """Run what is new in `plan`, add it to what is known, and write the file, every minute and at the end.

    Raises UserError when the model does not run, or its activations are not finite; at Ctrl-C the file is written, and
    KeyboardInterrupt is raised.
    """
    if not plan.n_tokens:
        return plan.known
    options = RunOptions(
        ctx=max(_BATCH, plan.known.chunk_size), threads=plan.options.threads, offload=plan.options.offload,
        kv_type=GGMLQuantizationType.F32,
    )  # fmt: skip
    calibration = replace(plan.known, datasets=plan.datasets)
    with open_model(plan.header.path, options) as model, InputSquares(model, output=plan.options.output) as inputs:
        saved = time.monotonic()
        try:
            for n_tokens, more in _run(plan, inputs, calibration):
                calibration = more
                progress(n_tokens)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    write_calibration(plan.output, calibration)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if calibration.squares:
                write_calibration(plan.output, calibration)
            raise
    write_calibration(plan.output, calibration)
    return calibration


def _run(plan: CalibrationPlan, inputs: InputSquares, calibration: Calibration) -> Iterator[tuple[int, Calibration]]:
    """`calibration` with more and more of the texts, and how many tokens each step took."""
    for material in plan.material:
        for n_tokens, more in _run_text(material, inputs, calibration):
            calibration = more
            yield n_tokens, calibration


def _run_text(material: TextToRun, inputs: InputSquares, calibration: Calibration) -> Iterator[tuple[int, Calibration]]:
    squares, others = calibration.squares, [text for text in calibration.texts if text.name != material.name]
    n_done = material.n_known
    digest = _digest_of_pieces(material.pieces[:n_done])
    n_tokens = sum(map(len, material.pieces[:n_done]))
    for lengths, new in inputs.run(material.pieces[n_done:]):
        squares = added(squares, new)
        for piece in material.pieces[n_done : n_done + len(lengths)]:
            digest.update(repr(piece).encode())
        n_done += len(lengths)
        n_tokens += sum(lengths)
        texts = (*others, CountedText(material.name, n_tokens, digest.hexdigest()))
        yield sum(lengths), replace(calibration, squares=squares, texts=texts)


# ---------------------------------------------------------------------------------------------- experts


def unreached(calibration: Calibration, header: Header) -> dict[str, list[int]]:
    """Expert → the layers in which no token reached it. Its importance is then that of all others together."""
    card = read_card(header)
    layers: dict[str, list[int]] = {}
    for name, squares in calibration.squares.items():
        parsed = TensorName.parse(name)
        if parsed.role == "ffn_down_exps":
            names = _members(card)[1] if card else ()
            for i, count in enumerate(squares.counts):
                if not count:
                    expert = names[i] if len(names) == len(squares.counts) else str(i)
                    layers.setdefault(expert, []).append(parsed.layer or 0)
    return {expert: sorted(some) for expert, some in layers.items()}


def experts_of(calibration: Calibration, header: Header) -> dict[str, Calibration]:
    """What the calibration of a mix says of each expert, under the names of a dense model.

    The trunk goes to all of them. Raises UserError as `card_of_mix` does, and where the experts that the file names
    are not those that its tensors hold.
    """
    card = card_of_mix(header)
    fused, stacked = _members(card)
    squares: dict[str, dict[str, Squares]] = {expert.name: {} for expert in card.experts}
    shapes: dict[int | None, set[tuple[int, ...]]] = {}
    for name, one in calibration.squares.items():
        for expert, role, part in _parts(name, one, card, fused, stacked):
            dense = replace(TensorName.parse(name), role=role)
            squares[expert][str(dense)] = part
            if role == "ffn_down":
                shapes.setdefault(dense.layer, set()).add(part.sums.shape)
    if any(len(found) > 1 for found in shapes.values()) or len({len(one) for one in squares.values()}) > 1:
        raise UserError(f"{header.path}: its tensors do not hold the experts that it names", "build the mix again")
    return {name: replace(calibration, squares=of_expert) for name, of_expert in squares.items()}


def card_of_mix(header: Header) -> Card:
    """Raises UserError when the file is no mix whose experts can be told apart."""
    card = read_card(header)
    if card is None:
        raise UserError(f"{header.path}: was not made by moegguf, so its experts are unknown", "leave --split out")
    if card.compact:
        raise UserError(f"{header.path}: its neurons are merged, so its experts are not apart", "leave --split out")
    if card.split:
        mend = "calibrate the mix before it is split"
        raise UserError(f"{header.path}: its neurons are in two groups, so its experts are not apart", mend)
    return card


def _members(card: Card) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The experts that a mix has side by side in one FFN, and those that it has stacked, in order."""
    names = tuple(expert.name for expert in card.experts)
    if card.layout == Layout.SHARED:
        try:
            return split({expert.name: expert.quant for expert in card.experts}, card.always_on)
        except ValueError as error:
            raise UserError(f"mix {card.name}: has presets that are unknown here", "build it again") from error
    return (names, ()) if card.layout == Layout.FUSED else ((), names)


def _parts(
    name: str, squares: Squares, card: Card, fused: Sequence[str], stacked: Sequence[str]
) -> Iterator[tuple[str, str, Squares]]:
    """Expert, role in its own model, and squares there, of one weight of a mix. A router belongs to none."""
    parsed = TensorName.parse(name)
    role = parsed.role.removesuffix("_exps").removesuffix("_shexp")
    is_mixed = card.layers is None or parsed.layer in card.layers
    if parsed.role == "ffn_gate_inp":
        return
    if parsed.role.endswith("_exps"):
        for i, expert in enumerate(stacked):
            yield expert, role, Squares(squares.sums[i : i + 1], squares.counts[i : i + 1])
    elif role == "ffn_down" and fused and is_mixed and not card.is_dense:
        for expert, sums in zip(fused, np.array_split(squares.sums, len(fused), axis=1), strict=True):
            yield expert, role, Squares(sums, squares.counts)
    elif role in FFN_ROLES and fused and is_mixed:
        for expert in fused:
            yield expert, role, squares
    else:
        for expert in (*fused, *stacked):
            yield expert, role, squares
