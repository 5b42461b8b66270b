"""`moegguf.open`: a model to talk to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moegguf.api.paths import Location, to_path
from moegguf.errors import UserError
from moegguf.kinds import checked
from moegguf.runtime.chat import Conversation, Stats, Turn
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.run_options import DEFAULT_OPTIONS, RunOptions
from moegguf.runtime.sampling import SETTINGS, suggested_by_file


@checked
def open(path: Location, *, system: str = "", options: RunOptions = DEFAULT_OPTIONS, **sampling: float | None) -> Chat:
    """Load a GGUF to talk to, as `moegguf chat` does. Close it, or use it as a context manager.

    `system` says in words how it is to behave; `sampling` are the settings of `moegguf chat`, such as temp=0 or
    max_tokens=100, in place of what the file suggests. Raises UserError.
    """
    if unknown := [name for name in sampling if name not in SETTINGS]:
        raise UserError(f"there is no setting {unknown[0]!r}", f"the settings are {', '.join(SETTINGS)}")
    model = open_model(to_path("path", path), options)
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
        if not isinstance(question, str):
            raise UserError(f"question {question!r}: expected a text", "for example 'What is 6 times 7?'")
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
