"""A conversation with a model: a chat template, a history that fits the context, an answer that streams.

A conversation is a system text and a list of turns, each a question with its answer; the messages that a
template sees are derived, so roles always alternate. Every answer renders the whole history again; the
model evaluates only what differs from what it has in its context already. When the history no longer fits,
the oldest turns are hidden from the model (the system text stays), but kept in `turns`.

Whatever has an `Engine`'s methods can be talked to; `runtime.model.Model` is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.runtime.answer import Answer, without_leading_blanks
from moegguf.runtime.sampling import DEFAULTS, Sampling
from moegguf.runtime.template import Message, chat_template, end_of_turn
from moegguf.runtime.vocab import Vocab
from moegguf.texts import is_unicode


class Engine(Protocol):
    """What a conversation needs of a model."""

    @property
    def name(self) -> str:
        """What a saved conversation calls it."""

    @property
    def chat_template(self) -> str | None:
        """jinja2 source of its template; None when it has none."""

    @property
    def vocab(self) -> Vocab: ...

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may take together."""

    def n_cached(self, tokens: Sequence[int]) -> int:
        """How many tokens at the head of the prompt `tokens` need no evaluation."""

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The tokens that follow the prompt `tokens`, without end; the caller closes it."""


@dataclass(frozen=True)
class Turn:
    """A question and what was said to it, which Ctrl-C may have cut short."""

    question: str
    answer: str


@dataclass(frozen=True)
class Stats:
    """What an answer took. `cached_tokens` of the prompt were still in the context and cost nothing."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds_to_first_token: float
    seconds_after_first_token: float
    ctx: int
    turns_hidden: int
    end: str
    """Why it ended: `stop` (the model said so), `length` (max_tokens), `context` (full) or `interrupted`."""

    @property
    def ctx_used(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    @property
    def prompt_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / max(self.seconds_to_first_token, 1e-9)

    @property
    def generated_tokens_per_s(self) -> float:
        """The first token is the prompt's: it is not counted."""
        return max(self.generated_tokens - 1, 0) / max(self.seconds_after_first_token, 1e-9)


class Conversation:
    """Questions to one model, each seen with the history before it.

    `system`, `sampling` and `turns` may be changed between answers. `stats` is of the last answer
    that began.
    """

    def __init__(self, model: Engine, *, system: str = "", sampling: Sampling = DEFAULTS) -> None:
        self.has_template = model.chat_template is not None
        self.system = system
        self.sampling = sampling
        self.turns: list[Turn] = []
        self.stats: Stats | None = None
        self._hidden = 0
        self.model = model
        self._template = chat_template(model.chat_template, model.vocab)

    @property
    def messages(self) -> list[Message]:
        """The whole history, as a template would see it."""
        return _messages(self.system, self.turns)

    def reset(self) -> None:
        """Forget all turns; the system text and the settings stay."""
        self.turns, self._hidden = [], 0

    def answer(self, question: str) -> Iterator[str]:
        """The answer to `question`, piece by piece, in whole characters and without leading blanks.

        What was said joins the history when the iterator ends, by whatever cause: the model's end of turn, the
        limits, KeyboardInterrupt or close(). A question that was interrupted before its first token leaves no trace.
        Raises UserError for an empty question, one that alone exceeds the context, or a failing template.
        """
        if not question.strip():
            raise UserError("the prompt is empty", "say something")
        if not is_unicode(question + self.system):
            raise UserError("the prompt is not valid UTF-8 text", "convert it to UTF-8")
        self.stats = None
        return self._stream(question, self._fitting_prompt(question))

    def _fitting_prompt(self, question: str) -> list[int]:
        """Tokens of the prompt, hiding as few of the oldest turns as leave room for an answer."""
        room = min(self.sampling.max_tokens or self.model.n_ctx, self.model.n_ctx // 4)
        for hidden in range(min(self._hidden, len(self.turns)), len(self.turns) + 1):
            messages = _messages(self.system, self.turns[hidden:], question)
            tokens = self.model.vocab.tokenize_prompt(self._template.prompt(messages))
            if len(tokens) + room <= self.model.n_ctx:
                break
        if len(tokens) >= self.model.n_ctx:
            raise UserError(
                f"the prompt is {len(tokens)} tokens long, the context holds {self.model.n_ctx}",
                "shorten it, or start with a larger --ctx",
            )
        self._hidden = hidden
        return tokens

    def _stream(self, question: str, prompt: list[int]) -> Iterator[str]:
        limit = min(self.sampling.max_tokens or self.model.n_ctx, self.model.n_ctx - len(prompt))
        clock = _Clock()
        cached = self.model.n_cached(prompt)
        tokens = clock.timed(self.model.generate(prompt, self.sampling))
        answer = Answer(tokens, self.model.vocab, ends=self._ends_answer, limit=limit)
        said = ""
        try:
            with contextlib.closing(answer.pieces()) as pieces:
                for piece in without_leading_blanks(pieces):
                    said += piece
                    yield piece
        finally:
            if said or answer.end != "interrupted":
                self.turns.append(Turn(question, said))
            self.stats = Stats(
                prompt_tokens=len(prompt),
                cached_tokens=cached,
                generated_tokens=answer.n_tokens,
                seconds_to_first_token=clock.first,
                seconds_after_first_token=clock.rest,
                ctx=self.model.n_ctx,
                turns_hidden=self._hidden,
                end=self._why(answer, limit),
            )

    def _why(self, answer: Answer, limit: int) -> str:
        if answer.end != "limit":
            return answer.end
        return "length" if limit == self.sampling.max_tokens else "context"

    def _ends_answer(self, token: int) -> bool:
        return token == self._end_of_turn or self.model.vocab.ends_answer(token)

    @cached_property
    def _end_of_turn(self) -> int | None:
        return end_of_turn(self._template, self.model.vocab)


def save(conversation: Conversation, path: Path) -> None:
    """Write the conversation to `path`, all or nothing: as JSON that `load` reads, or as Markdown for people.

    Raises UserError for another extension (a typo must not overwrite a model) and when `path` cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: cannot save as {path.suffix or 'that'}", f"end the name in {' or '.join(_FORMATS)}")
    with atomic_file(path) as file:
        file.write(_FORMATS[path.suffix](conversation).encode())


def load(conversation: Conversation, path: Path) -> None:
    """Replace system text, settings and turns by those of a saved JSON file.

    Raises UserError when it cannot be read or is no such file; the conversation is then as it was.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        sampling = DEFAULTS.merged(saved["settings"])
        messages = [(message["role"], str(message["content"])) for message in saved["messages"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the name") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no saved conversation ({error!r})", "load a .json file that /save wrote") from error
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    questions, answers = messages[::2], messages[1::2]
    roles = [role for role, _ in messages]
    if roles != ["user", "assistant"] * len(answers):
        raise UserError(f"{path}: its messages do not alternate between user and assistant", "mend the file")
    if not is_unicode(system + "".join(content for _, content in messages)):
        raise UserError(f"{path}: a message holds half a character", "mend the file")
    conversation.reset()
    conversation.system, conversation.sampling = system, sampling
    conversation.turns = [Turn(question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=True)]


def _as_json(conversation: Conversation) -> str:
    return json.dumps(
        {
            "model": conversation.model.name,
            "settings": dataclasses.asdict(conversation.sampling),
            "messages": conversation.messages,
        },
        ensure_ascii=False,
        indent=2,
    )


def _as_markdown(conversation: Conversation) -> str:
    said = "\n".join(f"**{message['role']}**\n\n{message['content']}\n" for message in conversation.messages)
    return f"# Conversation with {conversation.model.name}\n\n{said}"


_FORMATS = {".json": _as_json, ".md": _as_markdown}


class _Clock:
    """Seconds spent inside it, the first time and later ones apart; the reader's own time is not ours."""

    def __init__(self) -> None:
        self.first = self.rest = 0.0
        self._runs = 0

    def timed(self, tokens: Iterator[int]) -> Iterator[int]:
        """`tokens`, each timed; closing this closes them."""
        with contextlib.closing(tokens):
            while True:
                start = time.perf_counter()
                token = next(tokens)
                self._count(time.perf_counter() - start)
                yield token

    def _count(self, spent: float) -> None:
        if self._runs == 0:
            self.first = spent
        else:
            self.rest += spent
        self._runs += 1


def _messages(system: str, turns: list[Turn], question: str = "") -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return [*messages, {"role": "user", "content": question}] if question else messages
