"""Templates of Go's text/template, read into a tree.

Syntax only: what names mean is for whoever walks the tree. Read are texts and trimming, comments, variables, pipelines,
`if`, `with`, `range`, `break` and `continue`; templates that define or include others are refused. Nothing is executed.

Source: Go's documentation of text/template, and its text/template/parse.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    | (?P<string>"(?:[^"\\\n]|\\.)*") | (?P<raw>`[^`]*`)
    | (?P<number>[+-]?[0-9]{1,18}(?!\w))
    | (?P<field>\.[^\W\d]\w*) | (?P<dot>\.)
    | (?P<variable>\$\w*) | (?P<word>[^\W\d]\w*)
    | (?P<mark>:=|=|\||,|\(|\))""",
    re.VERBOSE,
)
_COMMENT_BEGINS = re.compile(r"[ \t\r\n]*/\*")
_COMMENT = re.compile(r"[ \t\r\n]*/\*.*?\*/([ \t\r\n]+-)?\}\}", re.DOTALL)
_WORDS = {"true": True, "false": False, "nil": None}
_BYTE = re.compile(r"(?<!\\)(?:\\\\)*\\(?:x[89a-fA-F]|[23])")
"""An escape for one byte of a character, which Go has and Python has not."""
_MAX_DEPTH = 100
_MAX_LENGTH = 64 << 10  # characters; the longest that Ollama ships has 10 thousand


class GoTemplateError(Exception):
    """A template that cannot be read or put into other words; its text says why, as the end of a sentence."""


@dataclass(frozen=True)
class Literal:
    value: str | int | bool | None


@dataclass(frozen=True)
class Path:
    """`.A.B` (start "."), `$x.A` (start "$x"), or a pipeline in parentheses and what is taken of it."""

    start: str | Pipe
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    name: str


Operand = Literal | Path | Function
Command = tuple[Operand, ...]


@dataclass(frozen=True)
class Pipe:
    """`$a, $b := x | y z`. `assigns` is whether it is `=`: the variables are there already."""

    commands: tuple[Command, ...]
    variables: tuple[str, ...] = ()
    assigns: bool = False


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Action:
    pipe: Pipe


@dataclass(frozen=True)
class Jump:
    """`break` or `continue`."""

    word: str


@dataclass(frozen=True)
class Block:
    """`if`, `with` or `range`."""

    word: str
    pipe: Pipe
    then: tuple[Node, ...]
    otherwise: tuple[Node, ...] = ()


Node = Text | Action | Jump | Block
Token = tuple[str, str]
"""Kind and text, as `_TOKEN` has them."""


def parse(source: str) -> tuple[Node, ...]:
    """The nodes of a template. Raises GoTemplateError for one that Go would not read either, and for inclusions."""
    if len(source) > _MAX_LENGTH:
        raise GoTemplateError(f"it has {len(source)} characters, more than {_MAX_LENGTH}")
    nodes, end = _nodes(_pieces(source), depth=0)
    if end is not None:
        raise GoTemplateError(f"it has {end[0][1]!r} without a beginning")
    return nodes


def names(nodes: tuple[Node, ...]) -> Iterator[str]:
    """The fields that a template asks for, as often as it does."""
    for node in nodes:
        match node:
            case Action(pipe):
                yield from _names(pipe)
            case Block(_, pipe, then, otherwise):
                yield from _names(pipe)
                yield from names((*then, *otherwise))


def _names(pipe: Pipe) -> Iterator[str]:
    for command in pipe.commands:
        for operand in command:
            if isinstance(operand, Path):
                yield from operand.fields
                if isinstance(operand.start, Pipe):
                    yield from _names(operand.start)


def _pieces(source: str) -> Iterator[str | list[Token]]:
    """Texts, trimmed, and the tokens of actions; comments are gone."""
    position, trims = 0, False
    while (start := source.find("{{", position)) >= 0:
        text = source[position:start].lstrip(_SPACE) if trims else source[position:start]
        position = start + 2
        if re.match(r"-[ \t\r\n]", source[position : position + 2]):
            text, position = text.rstrip(_SPACE), position + 1
        if text:
            yield text
        if _COMMENT_BEGINS.match(source, position):
            match = _COMMENT.match(source, position)
            if match is None:
                raise GoTemplateError("a comment in it does not close")
            position, trims = match.end(), match[1] is not None
            continue
        tokens, position, trims = _action(source, position)
        yield tokens
    text = source[position:].lstrip(_SPACE) if trims else source[position:]
    if text:
        yield text


def _action(source: str, position: int) -> tuple[list[Token], int, bool]:
    """The tokens of an action, where it ends, and whether it trims the text after it."""
    tokens: list[Token] = []
    while True:
        if source.startswith("}}", position):
            return _without_edges(tokens), position + 2, False
        if source.startswith("-}}", position) and tokens and tokens[-1][0] == "space":
            return _without_edges(tokens), position + 3, True
        match = _TOKEN.match(source, position)
        if match is None:
            what = f"has {source[position : position + 10]!r}" if source[position:] else "does not close"
            raise GoTemplateError(f"an action in it {what}")
        tokens.append((match.lastgroup, match[0]))
        position = match.end()


def _without_edges(tokens: list[Token]) -> list[Token]:
    while tokens and tokens[0][0] == "space":
        tokens.pop(0)
    while tokens and tokens[-1][0] == "space":
        tokens.pop()
    if not tokens:
        raise GoTemplateError("an action in it is empty")
    return tokens


def _nodes(pieces: Iterator[str | list[Token]], depth: int) -> tuple[tuple[Node, ...], list[Token] | None]:
    """Nodes up to the `end` or `else` that closes them, and that; None at the end of the template."""
    if depth > _MAX_DEPTH:
        raise GoTemplateError("its blocks are nested too deeply")
    nodes: list[Node] = []
    for piece in pieces:
        if isinstance(piece, str):
            nodes.append(Text(piece))
            continue
        kind, word = piece[0]
        if kind == "word" and word in ("end", "else"):
            return tuple(nodes), piece
        nodes.append(_node(piece, pieces, depth))
    return tuple(nodes), None


def _node(tokens: list[Token], pieces: Iterator[str | list[Token]], depth: int) -> Node:
    kind, word = tokens[0]
    if kind != "word" or (word in _WORDS and len(tokens) == 1):
        return Action(_pipe(tokens))
    if word in ("if", "with", "range"):
        return _block(tokens, pieces, depth)
    if word in ("break", "continue") and len(tokens) == 1:
        return Jump(word)
    if word in ("define", "template", "block"):
        raise GoTemplateError(f"it uses {word!r}")
    return Action(_pipe(tokens))


def _block(tokens: list[Token], pieces: Iterator[str | list[Token]], depth: int) -> Block:
    """The block that `tokens`, a word and its pipeline, open; with `else if` in it, one in its `otherwise`."""
    block = Block(tokens[0][1], _pipe(_without_edges(tokens[1:])), ())
    then, end = _nodes(pieces, depth + 1)
    block = replace(block, then=then)
    if end is None:
        raise GoTemplateError(f"its {block.word!r} does not end")
    if end[0][1] == "end":
        return block
    if rest := [token for token in end[1:] if token[0] != "space"]:
        if rest[0] != ("word", block.word) or block.word == "range":
            raise GoTemplateError(f"it has 'else {rest[0][1]}' after {block.word!r}")
        return replace(block, otherwise=(_block(_without_edges(end[1:]), pieces, depth + 1),))
    otherwise, end = _nodes(pieces, depth + 1)
    if end is None or end[0][1] != "end":
        raise GoTemplateError(f"its {block.word!r} does not end")
    return replace(block, otherwise=otherwise)


def _pipe(tokens: list[Token], depth: int = 0) -> Pipe:
    """The pipeline that `tokens`, all of them, are."""
    variables, assigns, rest = _declared(tokens)
    commands: list[Command] = []
    for part in _split(rest):
        command = tuple(_operands(part, depth))
        if not command:
            raise GoTemplateError("a pipeline in it has nothing before or after '|'")
        commands.append(command)
    return Pipe(tuple(commands), variables, assigns)


def _declared(tokens: list[Token]) -> tuple[tuple[str, ...], bool, list[Token]]:
    """The variables that a pipeline sets, whether they are there already, and the rest of it."""
    for i, (kind, text) in enumerate(tokens):
        if (kind, text) in (("mark", ":="), ("mark", "=")):
            heads = [token for token in tokens[:i] if token[0] != "space"]
            if [token[0] for token in heads[::2]] != ["variable"] * len(heads[::2]) or len(heads) not in (1, 3):
                raise GoTemplateError(f"it sets {''.join(text for _, text in tokens[:i])}")
            return tuple(text for _, text in heads[::2]), text == "=", tokens[i + 1 :]
        if kind not in ("variable", "space") and (kind, text) != ("mark", ","):
            break
    return (), False, tokens


def _split(tokens: list[Token]) -> Iterator[list[Token]]:
    """The commands of a pipeline: what stands between bars that are in no parentheses."""
    depth, part = 0, []
    for kind, text in tokens:
        depth += (text == "(") - (text == ")") if kind == "mark" else 0
        if (kind, text) == ("mark", "|") and not depth:
            yield part
            part = []
        else:
            part.append((kind, text))
    yield part


def _operands(tokens: list[Token], depth: int) -> Iterator[Operand]:
    """The function and arguments of a command. Fields belong to what they touch."""
    if depth > _MAX_DEPTH:
        raise GoTemplateError("its parentheses are nested too deeply")
    i = 0
    while i < len(tokens):
        kind, text = tokens[i]
        i += 1
        if kind == "space":
            continue
        if kind == "mark" and text == "(":
            end = _closing(tokens, i)
            start: str | Pipe = _pipe(_without_edges(tokens[i:end]), depth + 1)
            i = end + 1
        elif kind in ("dot", "field", "variable"):
            start = text if kind == "variable" else "."
            i -= kind == "field"
        else:
            yield _plain(kind, text)
            continue
        fields = []
        while i < len(tokens) and tokens[i][0] == "field":
            fields.append(tokens[i][1][1:])
            i += 1
        yield Path(start, tuple(fields))


def _closing(tokens: list[Token], start: int) -> int:
    """Where the parenthesis that opened before `start` closes."""
    depth = 1
    for i in range(start, len(tokens)):
        kind, text = tokens[i]
        depth += (text == "(") - (text == ")") if kind == "mark" else 0
        if not depth:
            return i
    raise GoTemplateError("a parenthesis in it does not close")


def _plain(kind: str, text: str) -> Operand:
    if kind == "number":
        return Literal(int(text))
    if kind == "raw":
        return Literal(text[1:-1].replace("\r", ""))
    if kind == "string":
        return Literal(_unquoted(text))
    if kind == "word":
        return Literal(_WORDS[text]) if text in _WORDS else Function(text)
    raise GoTemplateError(f"it has {text!r} where a value should be")


def _unquoted(text: str) -> str:
    """The string that a quoted one means: its escapes are Python's too, but for bytes."""
    if _BYTE.search(text):
        raise GoTemplateError(f"it writes bytes as {text}")
    try:
        value = ast.literal_eval(text)
        value.encode()  # not for half a character, which Go refuses too
    except (SyntaxError, ValueError) as error:
        raise GoTemplateError(f"it has the broken string {text:.100}") from error
    return value
