"""A conversation with a model: a chat template, a history that fits the context, an answer that streams.

A conversation is a system text and a list of turns, each a question with its answer; the messages that a
template sees are derived, so roles always alternate. Every answer renders the whole history again; the
model evaluates only what differs from what it has in its context already. When the history no longer fits,
the oldest turns are hidden from the model (the system text stays), but kept in `turns`.

A template is foreign code: it runs in jinja2's immutable sandbox (llama-cpp-python's formatter, which mirrors
Transformers'), and whatever it raises becomes a UserError. Where a template takes no system message, the
system text goes in front of the first question. A file without a template gets `PLAIN`: text to continue.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.runtime.model import Model
from moegguf.runtime.sampling import DEFAULTS, Sampling

PLAIN = "{% for message in messages %}{{ message.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"

_TEMPLATE_MEND = "convert the model again with a working template"

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates want them."""


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


class ChatTemplate:
    """A jinja2 chat template. Raises UserError when it does not compile, and when rendering fails."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        try:
            self._formatters = {
                ask: Jinja2ChatFormatter(source, eos, bos, add_generation_prompt=ask) for ask in (True, False)
            }
        except jinja2.TemplateError as error:
            raise UserError(f"the file's chat template is broken: {error}", _TEMPLATE_MEND) from error

    def render(self, system: str, turns: list[Turn], question: str) -> str:
        """The prompt that asks for an answer to `question`."""
        asked = _messages("", turns, question)
        if system and self.takes_system:
            asked = [{"role": "system", "content": system}, *asked]
        elif system:
            asked[0] = {"role": "user", "content": f"{system}\n\n{asked[0]['content']}"}
        return self._render(asked, ask=True)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message neither fails nor vanishes."""
        probe = "moegguf-probe"
        try:
            return probe in self._render(_messages(probe, [], "hello"), ask=True)
        except UserError:
            return False

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an answer; empty when it cannot be told."""
        probe = "moegguf-probe"
        try:
            return self._render(_messages("", [Turn("hello", probe)]), ask=False).partition(probe)[2].lstrip()
        except UserError:
            return ""

    def _render(self, messages: list[Message], *, ask: bool) -> str:
        try:
            return self._formatters[ask](messages=messages).prompt
        except Exception as error:  # foreign code may raise anything
            raise UserError(f"the file's chat template fails: {error!r}", _TEMPLATE_MEND) from error


class Conversation:
    """Questions to one model, each seen with the history before it.

    `system`, `sampling` and `turns` may be changed between answers. `stats` is of the last answer
    that began.
    """

    def __init__(self, model: Model, *, system: str = "", sampling: Sampling = DEFAULTS) -> None:
        source = model.header.get("tokenizer.chat_template")
        self.has_template = isinstance(source, str)
        self.system = system
        self.sampling = sampling
        self.turns: list[Turn] = []
        self.stats: Stats | None = None
        self._hidden = 0
        self.model = model
        self._template = ChatTemplate(source if self.has_template else PLAIN, model.bos, model.eos)

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
        if not _is_unicode(question + self.system):
            raise UserError("the prompt is not valid UTF-8 text", "convert it to UTF-8")
        self.stats = None
        return self._stream(question, self._fitting_prompt(question))

    def _fitting_prompt(self, question: str) -> list[int]:
        """Tokens of the prompt, hiding as few of the oldest turns as leave room for an answer."""
        room = min(self.sampling.max_tokens or self.model.n_ctx, self.model.n_ctx // 4)
        for hidden in range(min(self._hidden, len(self.turns)), len(self.turns) + 1):
            text = self._template.render(self.system, self.turns[hidden:], question)
            tokens = self.model.tokenize_prompt(text)
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
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        limit = min(self.sampling.max_tokens or self.model.n_ctx, self.model.n_ctx - len(prompt))
        clock = _Clock()
        cached = self.model.n_cached(prompt)
        said, n_tokens, end = "", 0, "interrupted"
        tokens = self.model.generate(prompt, self.sampling)
        try:
            while True:
                with clock:
                    token = next(tokens)
                if self._ends_answer(token):
                    end = "stop"
                    break
                n_tokens += 1
                piece = decoder.decode(self.model.piece(token))
                piece = piece if said else piece.lstrip()
                said += piece
                if piece:
                    yield piece
                if n_tokens == limit:
                    end = "length" if limit == self.sampling.max_tokens else "context"
                    break
            rest = decoder.decode(b"", final=True)
            said += rest
            if rest:
                yield rest
        finally:
            tokens.close()
            if said or end != "interrupted":
                self.turns.append(Turn(question, said))
            self.stats = Stats(
                prompt_tokens=len(prompt),
                cached_tokens=cached,
                generated_tokens=n_tokens,
                seconds_to_first_token=clock.first,
                seconds_after_first_token=clock.rest,
                ctx=self.model.n_ctx,
                turns_hidden=self._hidden,
                end=end,
            )

    def _ends_answer(self, token: int) -> bool:
        return token == self._end_of_turn or self.model.ends_answer(token)

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The control token that the template writes after an answer: some files do not mark it as an end."""
        after = self.model.tokenize(self._template.after_answer)[:1]
        return after[0] if after and self.model.is_control(after[0]) else None


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
    if not _is_unicode(system + "".join(content for _, content in messages)):
        raise UserError(f"{path}: a message holds half a character", "mend the file")
    conversation.reset()
    conversation.system, conversation.sampling = system, sampling
    conversation.turns = [Turn(question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=True)]


def _as_json(conversation: Conversation) -> str:
    return json.dumps(
        {
            "model": conversation.model.header.path.name,
            "settings": dataclasses.asdict(conversation.sampling),
            "messages": conversation.messages,
        },
        ensure_ascii=False,
        indent=2,
    )


def _as_markdown(conversation: Conversation) -> str:
    said = "\n".join(f"**{message['role']}**\n\n{message['content']}\n" for message in conversation.messages)
    return f"# Conversation with {conversation.model.header.path.name}\n\n{said}"


_FORMATS = {".json": _as_json, ".md": _as_markdown}


class _Clock:
    """Seconds spent inside it, the first time and later ones apart; the reader's own time is not ours."""

    def __init__(self) -> None:
        self.first = self.rest = 0.0
        self._runs = 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_) -> None:
        spent = time.perf_counter() - self._start
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


def _is_unicode(text: str) -> bool:
    """Whether `text` holds no lone surrogates, as Python makes of undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
