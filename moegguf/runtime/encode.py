"""Records of text as tokens, with the place where a prompt ends and what is to be said after it begins.

A prompt and what follows it are tokenised in one go, as a model has seen them in training; where a token spans the
border, it belongs to what follows. A conversation is written by the model's own chat template, and its last answer
includes the token that ends a turn. Whoever trains or scores looks at the tokens from `n_prompt` on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moegguf.errors import UserError
from moegguf.runtime.template import ChatTemplate, chat_template
from moegguf.runtime.vocab import Vocab
from moegguf.texts import Chat, Completion, Record, Text

MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Encoded:
    """A record in tokens. The first `n_prompt` of them are given, those after it are what counts; 0 for plain text."""

    tokens: tuple[int, ...]
    n_prompt: int


def encode(vocab: Vocab, template: ChatTemplate | None, record: Record) -> Encoded:
    """`record` in tokens of `vocab`; a conversation through `template`, or as plain text where there is none.

    Raises UserError for a conversation that does not end in an answer, and when the template fails.
    """
    match record:
        case Text(text):
            return Encoded(tuple(vocab.tokenize_prompt(text)), 0)
        case Completion(prompt, completion):
            return _joined(vocab, prompt, prompt + completion, _end(vocab.eos))
        case Chat():
            return _chat(vocab, template or chat_template(None, vocab), record)


def beginning(record: Record, n_tokens: int) -> Record:
    """`record`; of a plain text only as much as its first `n_tokens` can take, as a file may be large."""
    if isinstance(record, Text):
        return Text(record.text[: MAX_CHARACTERS_PER_TOKEN * n_tokens], record.where)
    return record


def chunks(encoded: Iterable[Encoded], n: int) -> Iterator[tuple[int, ...]]:
    """The tokens of all records, in pieces of at most `n`; no piece spans two records."""
    for record in encoded:
        for start in range(0, len(record.tokens), n):
            yield record.tokens[start : start + n]


def _chat(vocab: Vocab, template: ChatTemplate, chat: Chat) -> Encoded:
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{chat.where}: the conversation does not end in an answer", "end it with one of the assistant")
    answer = messages[-1]["content"]
    prompt = template.prompt(messages[:-1])
    head, found, tail = _rest(template.whole(messages), prompt).rpartition(answer)
    if not found:
        head, tail = "", template.after_answer
    return _joined(vocab, prompt, prompt + head + answer, _end_of_answer(vocab, tail))


def _rest(whole: str, prompt: str) -> str:
    """What `whole` has after `prompt`; nothing where a template writes the two in different ways."""
    return whole.removeprefix(prompt) if whole.startswith(prompt) else ""


def _end_of_answer(vocab: Vocab, tail: str) -> list[int]:
    """What a template writes after an answer, up to its first control token; where it has none, the end of text."""
    tokens = vocab.tokenize(tail.lstrip())
    for count, token in enumerate(tokens, 1):
        if vocab.is_control(token):
            return tokens[:count]
    return _end(vocab.eos)


def _end(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _joined(vocab: Vocab, prompt: str, whole: str, end: list[int]) -> Encoded:
    tokens = vocab.tokenize_prompt(whole)
    return Encoded((*tokens, *end), _n_common(vocab.tokenize_prompt(prompt), tokens))


def _n_common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
