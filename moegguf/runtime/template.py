"""A chat template: what a model was trained to see of a conversation.

A template is foreign code: it runs in jinja2's immutable sandbox (llama-cpp-python's formatter, which mirrors
Transformers'), and whatever it raises becomes a UserError. Where a template takes no system message, the
system text goes in front of the first question. A file without a template gets `PLAIN`: text to continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from moegguf.errors import UserError
from moegguf.gguf_header import Header
from moegguf.runtime.vocab import Vocab

PLAIN = "{% for message in messages %}{{ message.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"

_MEND = "convert the model again with a working template"
_PROBE = "moegguf-probe"

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates want them."""


class ChatTemplate:
    """A jinja2 chat template. Raises UserError when it does not compile, and when rendering fails.

    `bos` and `eos` are the names of those tokens, empty where there is none.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        try:
            self._formatters = {
                ask: Jinja2ChatFormatter(source, eos, bos, add_generation_prompt=ask) for ask in (True, False)
            }
        except jinja2.TemplateError as error:
            raise UserError(f"the file's chat template is broken: {error}", _MEND) from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that asks for an answer to `messages`, the last of which is the user's."""
        return self._render(self._acceptable(messages), ask=True)

    def whole(self, messages: Sequence[Message]) -> str:
        """The text of `messages`, the last of which is an answer, with what the template writes after it."""
        return self._render(self._acceptable(messages), ask=False)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message neither fails nor vanishes."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hello"}]
        try:
            return _PROBE in self._render(messages, ask=True)
        except UserError:
            return False

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an answer; empty when it cannot be told."""
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            return self._render(messages, ask=False).partition(_PROBE)[2].lstrip()
        except UserError:
            return ""

    def _acceptable(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` with a system message in the form that the template takes."""
        match messages:
            case [{"role": "system", "content": system}, {"role": "user", "content": question}, *rest]:
                if not self.takes_system:
                    return [{"role": "user", "content": f"{system}\n\n{question}"}, *rest]
        return list(messages)

    def _render(self, messages: list[Message], *, ask: bool) -> str:
        try:
            return self._formatters[ask](messages=messages).prompt
        except Exception as error:  # foreign code may raise anything
            raise UserError(f"the file's chat template fails: {error!r}", _MEND) from error


def chat_template(source: str | None, vocab: Vocab) -> ChatTemplate:
    """The template `source` with the names of `vocab`; `PLAIN` where there is none."""
    return ChatTemplate(PLAIN if source is None else source, vocab.name(vocab.bos), vocab.name(vocab.eos))


def template_of(header: Header, vocab: Vocab) -> ChatTemplate:
    """The template of a GGUF file; `PLAIN` where it has none."""
    source = header.get("tokenizer.chat_template")
    return chat_template(source if isinstance(source, str) else None, vocab)


def end_of_turn(template: ChatTemplate, vocab: Vocab) -> int | None:
    """The control token that the template writes after an answer: some files do not mark it as an end."""
    after = vocab.tokenize(template.after_answer)[:1]
    return after[0] if after and vocab.is_control(after[0]) else None
