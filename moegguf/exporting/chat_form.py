"""A chat template as the five texts that it puts around messages, and those as a Go template for Ollama.

Ollama renders conversations with templates of Go's; a GGUF has a Jinja one, which is a program. Most of these programs
do one simple thing: they write some text before the first question, between question and answer, between answer and
question, and after the last question, and put a system message in front of the first question or of the last. That form
is not read out of the source but recognised from outside: a few conversations of unlikely words are rendered, and the
texts between the words are the form. Whether it is the whole truth is then checked on other conversations, by rendering
both ways; where they differ there is no form, and no template is claimed.

What cannot be seen this way: templates that trim what people say (Go's have no such function), that count turns past
those of the check, or that write today's date, which the caller has to exclude.

Source of what a template is given: ollama, template/template.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moegguf.errors import UserError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""
Render = Callable[[Sequence[Message]], str]
"""Messages, of which the last is a question → the text that asks for the answer. Raises UserError."""


@dataclass(frozen=True)
class ChatForm:
    """What a template writes around messages.

    `system` is what is around a system message: in place of `opening` where it comes first, else between what is there
    anyway and the last question.
    """

    opening: str
    """Before the first question."""
    answer: str
    """Between a question and its answer."""
    question: str
    """Between an answer and the next question."""
    closing: str
    """Between the last question and the answer that is asked for."""
    system: tuple[str, str]
    system_is_last: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The text of `messages`, at most one of which, the first, is a system message."""
        system = next((message["content"] for message in messages if message["role"] == "system"), "")
        turns = [message for message in messages if message["role"] != "system"]
        text = ""
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                text += self.answer + turn["content"]
                continue
            in_place = system and i == 0 and not self.system_is_last
            text += "" if in_place else self.question if i else self.opening
            if in_place or (system and self.system_is_last and i == len(turns) - 1):
                text += self.system[0] + system + self.system[1]
            text += turn["content"]
        return text + self.closing

    def without(self, beginning: str) -> ChatForm:
        """The form without a text that the runtime itself puts before everything."""
        opening, before = self.opening.removeprefix(beginning), self.system[0]
        before = before if self.system_is_last else before.removeprefix(beginning)
        return replace(self, opening=opening, system=(before, self.system[1]))

    def to_go(self) -> str:
        """The Go template. An answer that is begun, the last message then, is left open to be gone on with."""
        system = f"{_literal(self.system[0])}{{{{ $.System }}}}{_literal(self.system[1])}"
        opening, last = _if("$.System", system, _literal(self.opening)), ""
        if self.system_is_last:
            opening, last = _literal(self.opening), _if("and $.System (eq (len (slice $.Messages $i)) 1)", system)
        question = _if("$first", opening, _literal(self.question)) + last
        question += "{{ .Content }}{{ $first = false }}{{ $asks = true }}"
        answer = _literal(self.answer) + "{{ .Content }}{{ $asks = false }}"
        message = _if('eq .Role "user"', question, _if('eq .Role "assistant"', answer))
        return (
            "{{ $first := true }}{{ $asks := false }}"
            f"{{{{ range $i, $_ := .Messages }}}}{message}{{{{ end }}}}"
            f"{_if('$asks', _literal(self.closing))}"
        )


def recognise(render: Render) -> ChatForm | None:
    """The form of a template, or None where it is not of that form."""
    try:
        form = _probe(render)
        is_whole = form is not None and all(form.render(each) == render(each) for each in _CONVERSATIONS)
    except UserError:  # the template fails
        return None
    return form if is_whole else None


_SYSTEM, _FIRST, _REPLY, _SECOND = (f"m0egguf{word}" for word in ("system", "first", "reply", "second"))


def _conversation(system: str, *turns: str) -> list[Message]:
    """Questions and answers in turn, after a system message where there is one."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


_CONVERSATIONS = tuple(
    _conversation(system, *turns)
    for system in ("", "Answer in one word.\n\nBe kind: {never} <|rude|>.")
    for turns in (
        ("What is 2 + 2?",),
        ("Hello there", "Hi! How can I\nhelp?", "Say {{ .X }} and {% if %}"),
        ("a", "b", "c", "d", "e"),
        ("One\n\ntwo", "3", "[4]", "</5>", "6 \\ 7", 'an "8"', "9"),
    )
)
"""What a form has to render as the template does: other words, other lengths, with and without a system message."""


def _probe(render: Render) -> ChatForm | None:
    turns = (_FIRST, _REPLY, _SECOND)
    plain = _around(render(_conversation("", *turns)), turns)
    with_system = render(_conversation(_SYSTEM, *turns))
    if plain is None:
        return None
    if first := _around(with_system, (_SYSTEM, *turns)):
        return ChatForm(*plain, system=(first[0], first[1]))
    last = _around(with_system, (_FIRST, _REPLY, _SYSTEM, _SECOND))
    if last and last[2].startswith(plain[2]):
        return ChatForm(*plain, system=(last[2].removeprefix(plain[2]), last[3]), system_is_last=True)
    return None


def _around(text: str, words: Sequence[str]) -> list[str] | None:
    """What is before, between and after `words`, each of which must occur once, in this order; else None."""
    pieces = re.split("|".join(words), text)
    return pieces if re.findall("|".join(words), text) == list(words) else None


def _if(condition: str, then: str, otherwise: str = "") -> str:
    """A condition of Go's templates."""
    return f"{{{{ if {condition} }}}}{then}" + (f"{{{{ else }}}}{otherwise}" if otherwise else "") + "{{ end }}"


def _literal(text: str) -> str:
    """`text` as a part of a Go template inside of a Modelfile's triple quotes.

    A brace could begin an action, three quotes would end the text, and what is not printable Ollama leaves out: those
    are written as string constants of Go.
    """
    return re.sub(r'\{+|"{3,}|.', _constant, text, flags=re.DOTALL)


def _constant(match: re.Match[str]) -> str:
    found = match[0]
    if found == "\n" or (len(found) == 1 and found.isprintable() and found != "{"):
        return found
    return '{{ "' + "".join(f"\\U{ord(c):08x}" for c in found) + '" }}'
