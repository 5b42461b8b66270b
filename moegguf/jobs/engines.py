"""Models as questions are put to them: GGUF files in llama.cpp, recipes in PyTorch.

Both become the same `Engine` of `moegguf.measurement.scores`, with the same tokens for the same text, so what they
answer can be compared item by item. A model has an identity, found without loading it: two runs that agree in it, and
in their settings, need not be done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.gguf_header import file_identity, read_header
from moegguf.jobs.torch_engine import identity, open_checked, open_engine
from moegguf.measurement.scores import Engine
from moegguf.recipe import load_recipe
from moegguf.runtime.batch import Scored, generate_greedy, score
from moegguf.runtime.encode import Encoded, encode
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.run_options import RunOptions
from moegguf.runtime.template import chat_template, end_of_turn
from moegguf.texts import Chat, Completion, Record

if TYPE_CHECKING:
    from moegguf.reference.engine import TorchEngine


@dataclass(frozen=True)
class EngineKind:
    """How a model is found and opened, by its reference; names of recipes are of the file that is given with it.

    `identity` tells one model from another, in JSON's types. Both raise UserError for what is no such model.
    """

    identity: Callable[[str, Path | None], Mapping[str, object]]
    open: Callable[[str, Path | None, RunOptions], AbstractContextManager[Engine]]


def by_name(refs: Iterable[str]) -> dict[str, str]:
    """Name → model, in order: the file's stem, or the whole reference where two share a stem."""
    refs = list(refs)
    stems = [Path(ref).stem for ref in refs]
    return {stem if stems.count(stem) == 1 else ref: ref for stem, ref in zip(stems, refs, strict=True)}


class _Asked:
    """A model with its template; `score` and `generate_greedy` are `runtime.batch`'s, for it."""

    def __init__(self, model: Model | TorchEngine, score: Callable, generate_greedy: Callable) -> None:
        self._model, self._score, self._generate_greedy = model, score, generate_greedy
        self._template = chat_template(model.chat_template, model.vocab)
        self._end_of_turn = end_of_turn(self._template, model.vocab)
        self.n_ctx = model.n_ctx
        self.bos = next(iter(model.vocab.tokenize_prompt("")), None)

    def encode(self, record: Record) -> Encoded:
        """The record in tokens. A completion ends with its text: whether the model would stop there is not asked."""
        encoded = encode(self._model.vocab, self._template, record)
        if isinstance(record, Completion) and encoded.tokens[-1] == self._model.vocab.eos:
            return Encoded(encoded.tokens[:-1], encoded.n_prompt)
        return encoded

    def encode_prompt(self, record: Chat | Completion) -> list[int]:
        """The prompt alone: which token would span its end, were the answer behind it, is not the model's to know."""
        if isinstance(record, Completion):
            return self._model.vocab.tokenize_prompt(record.prompt)
        return self._model.vocab.tokenize_prompt(self._template.prompt([asdict(each) for each in record.messages[:-1]]))

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[Scored]:
        return self._score(sequences, starts)

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[int, str]]:
        vocab = self._model.vocab
        for i, tokens in self._generate_greedy(prompts, max_tokens, self._ends):
            yield i, b"".join(map(vocab.piece, tokens)).decode("utf-8", errors="replace")

    def _ends(self, token: int) -> bool:
        return token == self._end_of_turn or self._model.vocab.ends_answer(token)


def _identify_gguf(ref: str, recipes: Path | None) -> dict[str, object]:
    return file_identity(read_header(Path(ref)))


@contextmanager
def _open_gguf(ref: str, recipes: Path | None, options: RunOptions) -> Iterator[Engine]:
    with open_model(ref, options) as model:
        yield _Asked(model, partial(score, model), partial(generate_greedy, model))


def _identify_recipe(ref: str, recipes: Path | None) -> dict[str, object]:
    recipe = load_recipe(ref, recipes)
    return identity(recipe, open_checked(recipe))


@contextmanager
def _open_recipe(ref: str, recipes: Path | None, options: RunOptions) -> Iterator[Engine]:
    recipe = load_recipe(ref, recipes)
    engine = open_engine(recipe, open_checked(recipe), ctx=options.ctx, threads=options.threads)
    yield _Asked(engine, engine.score, engine.generate_greedy)


LLAMA, TORCH = "llama", "torch"
ENGINES = {LLAMA: EngineKind(_identify_gguf, _open_gguf), TORCH: EngineKind(_identify_recipe, _open_recipe)}
