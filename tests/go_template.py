"""As much of Go's text/template as our Modelfiles use, and Ollama's parser of Modelfiles: anything else is an error.

Written from Go's documentation and from ollama's parser/parser.go and template/template.go, not from what we write.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

Message = dict[str, str]


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(command or parameter, value) in order; a value ends with its line, or where a line ends with its quotes."""
    commands, rest = [], text
    while rest:
        match = re.match(r"(FROM|TEMPLATE|SYSTEM|LICENSE|PARAMETER (\w+)) ", rest)
        assert match, f"no command: {rest[:40]!r}"
        rest = rest[match.end() :]
        if rest.startswith('"""'):
            value, end, rest = rest[3:].partition('"""\n')
            assert end, "quotes that do not close"
        else:
            value, _, rest = rest.partition("\n")
        assert all(c.isprintable() or c in "\n\t" for c in value), "what Ollama would leave out"
        commands.append((match[2] or match[1], value))
    return commands


def render(template: str, messages: Sequence[Message]) -> str:
    """What Ollama gives a model of `messages`: `.System` is what system messages say."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    root = {"System": system, "Messages": list(messages)}
    return "".join(_run(_parse(iter(_tokens(template))), root, {"$": root}))


def _tokens(template: str) -> Iterator[tuple[str, str]]:
    for i, piece in enumerate(re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)):
        assert i % 2 or "{{" not in piece, "an action that does not close"
        yield ("action" if i % 2 else "text"), piece


def _parse(tokens: Iterator[tuple[str, str]]) -> list:
    """Texts, actions, and (head, then, otherwise) of blocks, up to the `end` or `else` that closes this one."""
    nodes: list = []
    for kind, piece in tokens:
        if kind == "text":
            nodes.append(("text", piece))
        elif piece in ("end", "else"):
            return [*nodes, (piece,)]
        elif piece.startswith(("if ", "range ")):
            then = _parse(tokens)
            otherwise = _parse(tokens) if then.pop() == ("else",) else [("end",)]
            assert otherwise.pop() == ("end",)
            nodes.append((piece, then, otherwise))
        else:
            nodes.append(("action", piece))
    return nodes


def _run(nodes: list, dot: dict, names: dict) -> Iterator[str]:
    for head, *rest in nodes:
        if head == "text":
            yield rest[0]
        elif head == "action":
            yield from _act(rest[0], dot, names)
        elif head.startswith("if "):
            yield from _run(rest[0] if _value(head[3:], dot, names) else rest[1], dot, names)
        else:
            index, element, items = re.fullmatch(r"range (\$\w+), (\$\w+) := (\S+)", head).groups()
            for i, item in enumerate(_value(items, dot, names)):
                names |= {index: i, element: item}
                yield from _run(rest[0], {"Role": item["role"], "Content": item["content"]}, names)


def _act(action: str, dot: dict, names: dict) -> Iterator[str]:
    if match := re.fullmatch(r"(\$\w+) (:?=) (.+)", action):
        assert (match[1] in names) == (match[2] == "="), f"{action}: declared twice, or not at all"
        names[match[1]] = _value(match[3], dot, names)
    else:
        yield str(_value(action, dot, names))


_FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "len": len,
    "slice": lambda items, start: items[start:],
}


def _value(text: str, dot: dict, names: dict):
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)
    value, rest = _call(words, dot, names)
    assert not rest, f"{text}: goes on after its end"
    return value


def _call(words: list[str], dot: dict, names: dict):
    """The value of the words up to a closing parenthesis, and what is left of them."""
    if words[0] not in _FUNCTIONS:
        return _operand(words, dot, names)
    function, arguments, rest = _FUNCTIONS[words[0]], [], words[1:]
    while rest and rest[0] != ")":
        argument, rest = _operand(rest, dot, names)
        arguments.append(argument)
    return function(*arguments), rest


def _operand(words: list[str], dot: dict, names: dict):
    first, rest = words[0], words[1:]
    if first == "(":
        value, rest = _call(rest, dot, names)
        assert rest[0] == ")"
        return value, rest[1:]
    if first in ("true", "false") or first.isdecimal():
        return ast.literal_eval(first.title()), rest
    if first.startswith('"'):
        return ast.literal_eval(first), rest
    variable, _, key = first.rpartition(".")
    holder = names[variable] if variable else dot
    return (holder[key] if "." in first else names[first]), rest
