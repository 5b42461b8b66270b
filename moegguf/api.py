"""moegguf from Python: what the commands do, as functions.

    import moegguf

    moegguf.build("demo", output="demo.gguf")
    with moegguf.open("demo.gguf", temp=0) as model:
        print(model.chat("What is 6 times 7?"))
        for piece in model.stream("And 6 times 8?"):
            print(piece, end="", flush=True)

Mistakes raise UserError, whose text says how to mend them. Nothing is printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moegguf.assembly import Built
from moegguf.assembly import build as write_plan
from moegguf.errors import UserError
from moegguf.inspection import Inspection
from moegguf.inspection import check as check_file
from moegguf.inspection import inspect as inspect_file
from moegguf.preparation import DEFAULT_BUILD, BuildOptions, Watch, prepare, unwatched
from moegguf.recipe import find_recipes_file, load_recipe, parse_recipe
from moegguf.runtime.chat import Conversation, Stats, Turn
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.run_options import DEFAULT_OPTIONS, RunOptions
from moegguf.runtime.sampling import SETTINGS, suggested_by_file

Location = str | os.PathLike[str]


def build(
    recipe: str | Mapping[str, Any],
    *,
    recipes: Location | None = None,
    options: BuildOptions = DEFAULT_BUILD,
    watch: Watch = unwatched,
    **keys: Any,
) -> Built:
    """Build a mix, as `moegguf build` does, and say what was written and where.

    `recipe` is the name of a recipe in the file `recipes` (default: moegguf's models.toml), or a table of the keys that
    a recipe has; `keys` are put on top of it: build("demo", quant="Q6_K", output="mix.gguf"). Paths in a table are
    relative to the working directory. `watch` hears of the steps before the writing.
    """
    if isinstance(recipe, str):
        file = find_recipes_file() if recipes is None else Path(recipes)
        parsed = load_recipe(recipe, file, _texts(keys))
    else:
        name = Path(keys.get("output") or recipe.get("output") or "mix.gguf").stem
        parsed = parse_recipe(name, {**recipe, **_texts(keys)}, where="recipe:", folder=Path())
    return write_plan(prepare(parsed, options, watch).plan, threads=options.n_threads)


def _texts(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in keys.items()}


def open(path: Location, *, system: str = "", options: RunOptions = DEFAULT_OPTIONS, **sampling: float | None) -> Chat:
    """Load a GGUF to talk to, as `moegguf chat` does. Close it, or use it as a context manager.

    `system` says in words how it is to behave; `sampling` are the settings of `moegguf chat`, such as temp=0 or
    max_tokens=100, in place of what the file suggests.
    """
    if unknown := [name for name in sampling if name not in SETTINGS]:
        raise UserError(f"there is no setting {unknown[0]!r}", f"the settings are {', '.join(SETTINGS)}")
    model = open_model(Path(path), options)
    try:
        return Chat(model, system, sampling)
    except UserError:
        model.close()
        raise


class Chat:
    """A conversation with a loaded model: every answer sees the questions and answers before it."""

    def __init__(self, model: Model, system: str, sampling: Mapping[str, float | None]) -> None:
        self.model = model
        settings = suggested_by_file(model.header.get).merged(sampling)
        self._conversation = Conversation(model, system=system, sampling=settings)
        self._answer = (piece for piece in ())  # that is under way
        self._is_closed = False

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the context. An answer that is under way ends there."""
        self._answer.close()
        self._is_closed = True
        self.model.close()

    def chat(self, question: str) -> str:
        """The whole answer to `question`."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """The answer piece by piece. It joins the history when the iterator ends, is closed, or the next one begins."""
        if self._is_closed:
            raise UserError("the model is closed", "open it again")
        self._answer.close()
        self._answer = self._conversation.answer(question)
        return self._answer

    def reset(self) -> None:
        """Forget what was said."""
        self._conversation.reset()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far."""
        return tuple(self._conversation.turns)

    @property
    def stats(self) -> Stats | None:
        """Tokens and speed of the last answer."""
        return self._conversation.stats


def inspect(path: Location) -> Inspection:
    """What is in a GGUF, read from its header."""
    return inspect_file(Path(path))


def check(path: Location) -> list[str]:
    """Every fault of a mix that reading all of it finds; none for a sound one."""
    return check_file(Path(path))
