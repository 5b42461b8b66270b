"""Ollama's chat templates, which are Go's, as chat templates of Jinja's, which a GGUF holds.

A template is translated statement by statement, and renders what Ollama renders: messages of one role after another are
one, system messages are also told all together, and a template without `.Messages` is rendered once for each question
with its answer, the last time up to `.Response`. What is read of messages and tools has other names in Jinja
(`_FIELDS`). What has no counterpart raises GoTemplateError: nothing is translated halfway.

Ollama only ever asks for an answer, while a chat template must also end after one (`add_generation_prompt` false).
There the translation leaves out what follows the loop over the messages, and takes no message for the last one.

The result has no text outside of strings, so that no rule about blanks and line ends can change it, and keeps to what
Transformers, llama.cpp and Hugging Face's JavaScript have of Jinja. The token that begins a text Ollama leaves to the
tokenizer; the template writes it where the vocabulary adds it, which runtimes take for the same one.

Not the same: JSON is spaced as Jinja's `tojson` does, and Ollama takes old thoughts out of the answers of some models
before it renders them.

Source: ollama, template/template.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from moegguf.sources.go_template import (
    Action,
    Block,
    Function,
    GoTemplateError,
    Jump,
    Literal,
    Node,
    Operand,
    Path,
    Pipe,
    Text,
    names,
    parse,
)


class Value(NamedTuple):
    """An expression of Jinja, what kind of thing it is, and whether it counts as true where that is known."""

    code: str
    kind: str
    is_true: bool | None = None


_NOTHING, _ABSENT = Value("none", "nothing", False), Value("", "nothing")
_TRUE, _FALSE = Value("true", "bool", True), Value("false", "bool", False)
_ROOT, _MESSAGES = Value("true", "root", True), Value("ns.messages", "messages", True)
_FIELDS = {
    "message": {
        "Role": ("role", "text"), "Content": ("content", "text"), "Thinking": ("reasoning_content", "text"),
        "ToolCalls": ("tool_calls", "calls"), "ToolName": ("name", "text"), "ToolCallID": ("tool_call_id", "text"),
    },
    "call": {"ID": ("id", "text"), "Function": ("function", "called")},
    "called": {"Name": ("name", "text"), "Arguments": ("arguments", "arguments")},
    "tool": {"Type": ("type", "text"), "Function": ("function", "function")},
    "function": {
        "Name": ("name", "text"), "Description": ("description", "text"), "Parameters": ("parameters", "parameters")
    },
    "parameters": {
        "Type": ("type", "text"), "Required": ("required", "texts"), "Properties": ("properties", "properties")
    },
    "property": {"Type": ("type", "text"), "Description": ("description", "text"), "Enum": ("enum", "texts")},
}  # fmt: skip
"""Kind → field in Go → key in Jinja, and what is there. As OpenAI, Transformers and llama.cpp name them."""
_ELEMENTS = {
    "messages": "message", "rest": "message", "tools": "tool", "calls": "call", "texts": "text",
    "properties": "property",
}  # fmt: skip
"""What a list or map is made of. `rest` is the messages from the one on that a loop is at."""
_JSON = ("tools", "tool", "function", "parameters", "properties", "property", "called", "call")
_NUMBERS = ("number", "index")
_COMPARISONS = {"ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MAX_CODE = 2 << 10
"""Characters of an expression. What is taken twice, by `eq` or `with`, is written twice, and so on within it."""


def to_jinja(go: str, bos: str = "") -> str:
    """The chat template that renders what Ollama renders with the template `go`.

    `bos` is the name of the token that the vocabulary puts before a text; empty where it adds none. Raises
    GoTemplateError.
    """
    nodes = parse(go)
    fields = set(names(nodes))
    translation = _Translation(by_message="Messages" in fields, thinks="Thinking" in fields)
    if not {"Messages", "Response"} & fields:
        nodes = (*nodes, Action(Pipe(((Path(".", ("Response",)),),))))
    body = translation.render(nodes)
    begin = ["{{- bos_token -}}"] if bos and bos not in go else []
    return "\n".join([*begin, _collated(sorted(translation.kept)), body])


def _collated(kept: Iterable[str]) -> str:
    """Jinja that makes of the messages what Ollama hands to a template: `ns.messages` and `ns.system`."""

    def others(message: str) -> str:
        return "".join(f", '{key}': {message}['{key}']" for key in kept)

    return _COLLATED.replace("<of this>", others("message")).replace("<of the last>", others("ns.messages[-1]"))


_COLLATED = r"""{%- set ns = namespace(messages=[], systems=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] or '' -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.systems = ns.systems + [content] -%}
  {%- endif -%}
  {%- if ns.messages and ns.messages[-1]['role'] == message['role'] and message['role'] != 'tool' -%}
    {%- set content = ns.messages[-1]['content'] + '\n\n' + content -%}
    {%- set ns.messages = ns.messages[:-1] + [{'role': message['role'], 'content': content<of the last>}] -%}
  {%- else -%}
    {%- set ns.messages = ns.messages + [{'role': message['role'], 'content': content<of this>}] -%}
  {%- endif -%}
{%- endfor -%}
{%- set ns.system = ns.systems | join('\n\n') -%}"""

_EXCHANGES = """{%- set ns.exchanges = [] -%}
{%- set ns.now = {'system': '', 'prompt': '', 'response': ''} -%}
{%- for message in ns.messages -%}
  {%- set role = message['role'] -%}
  {%- if role == 'system' and (ns.now['prompt'] or ns.now['response']) or role == 'user' and ns.now['response'] -%}
    {%- set ns.exchanges = ns.exchanges + [ns.now] -%}
    {%- set ns.now = {'system': '', 'prompt': '', 'response': ''} -%}
  {%- endif -%}
  {%- set ns.now = {
    'system': message['content'] if role == 'system' else ns.now['system'],
    'prompt': message['content'] if role == 'user' else ns.now['prompt'],
    'response': message['content'] if role == 'assistant' else ns.now['response']
  } -%}
{%- endfor -%}
{%- for exchange in ns.exchanges + [ns.now] -%}
{%- set asks = loop.last and add_generation_prompt -%}"""
"""Jinja that begins the loop over questions with their answers. The last one asks for an answer."""


@dataclass
class _Translation:
    """A template on its way to Jinja. `by_message` is whether it sees the messages, or questions with their answers."""

    by_message: bool
    thinks: bool
    lines: list[str] = field(default_factory=list)
    scopes: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    used: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    """Keys of messages beside role and content that it reads."""
    loops: list[str] = field(default_factory=list)
    """Of each loop around what is translated, what tells that a turn of it was left: Jinja's own `continue` is not
    everywhere, and llama.cpp's forgets what the turn has written."""
    is_cut: bool = False
    """Whether `.Response` was written: what follows is not for the answer that is asked for."""

    def render(self, nodes: Sequence[Node]) -> str:
        if not self.by_message:
            self.lines.append(_EXCHANGES)
        self._list(nodes, _ROOT)
        if not self.by_message:
            self.lines.append("{%- endfor -%}")
        return "\n".join(self.lines)

    def _tag(self, code: str) -> None:
        self.lines.append(f"{{%- {code} -%}}")

    def _list(self, nodes: Sequence[Node], dot: Value) -> None:
        """Nodes one after another, and on what condition those come that follow a loop, a jump or the answer."""
        nodes = tuple(self._live(nodes, dot))
        loops = [i for i, node in enumerate(nodes) if not self.loops and _is_loop_over_messages(node)]
        for i, node in enumerate(nodes):
            was_cut = self.is_cut
            self._node(node, dot)
            rest, condition = nodes[i + 1 :], ""
            if isinstance(node, Jump) or not rest:
                return
            if loops and i == loops[-1]:
                condition = "add_generation_prompt"
            elif self.is_cut and not was_cut:
                condition = "not asks"
            elif _jumps(node):
                condition = f"not {self.loops[-1]}"
            if condition:
                self._tag(f"if {condition}")
                self._list(rest, dot)
                self._tag("endif")
                return

    def _live(self, nodes: Sequence[Node], dot: Value) -> Iterator[Node]:
        """The nodes, with those of a condition in its place where it is known how it comes out."""
        for node in nodes:
            is_true = self._outcome(node, dot)
            if is_true is None:
                yield node
            else:
                yield from self._live(node.then if is_true else node.otherwise, dot)

    def _outcome(self, node: Node, dot: Value) -> bool | None:
        """Whether a condition is met, where that is known; what it asks for may not be there yet."""
        if not isinstance(node, Block) or node.word == "range" or node.pipe.variables:
            return None
        try:
            is_true = self._pipe(node.pipe, dot).is_true
        except GoTemplateError:
            return None
        return None if is_true and node.word == "with" else is_true

    def _node(self, node: Node, dot: Value) -> None:
        match node:
            case Text(text):
                self.lines.append(f"{{{{- {quoted(text)} -}}}}")
            case Action(pipe) if pipe.variables:
                self._set(pipe, dot)
            case Action(pipe):
                self.lines.append(f"{{{{- {_shown(self._pipe(pipe, dot))} -}}}}")
                self.is_cut |= not self.by_message and "Response" in names((node,))
            case Jump(word):
                if not self.loops:
                    raise GoTemplateError(f"it has {word!r} outside of a loop")
                self._tag(f"set {self.loops[-1]} = true")
                if word == "break":
                    self._tag(f"set {self.loops[-1]}_for_good = true")
            case Block("range"):
                self._range(node, dot)
            case Block():
                self._branch(node, dot)

    def _branch(self, block: Block, dot: Value) -> None:
        with self._scope():
            value = self._set(block.pipe, dot) if block.pipe.variables else self._pipe(block.pipe, dot)
            self._tag(f"if {value.code}")
            self._list(block.then, value if block.word == "with" else dot)
            if block.otherwise:
                self._tag("else")
                self._list(block.otherwise, dot)
            self._tag("endif")

    def _range(self, block: Block, dot: Value) -> None:
        items = self._pipe(block.pipe, dot)
        if block.pipe.assigns or items.kind not in _ELEMENTS:
            raise GoTemplateError(f"it loops over {_words(block.pipe)}")
        is_left = f"ns.{self._name('$left')}" if any(map(_jumps, block.then)) else ""
        if is_left:
            self._tag(f"set {is_left}_for_good = false")
        with self._scope() as scope:
            item = self._open_loop(items, block.pipe.variables, scope)
            self.loops.append(is_left)
            self._turn(block.then, item, is_left)
            self.loops.pop()
        if block.otherwise:
            self._tag("else")
            self._list(block.otherwise, dot)
        self._tag("endfor")

    def _open_loop(self, items: Value, variables: tuple[str, ...], scope: dict[str, Value]) -> Value:
        """Write the head of a loop, and declare its variables in `scope`. Returns what it is at."""
        kind = _ELEMENTS[items.kind]
        index, element = ("$_", "$_", *variables)[-2:]
        name = self._name(element if element != "$_" else "$" + kind)
        key = self._name(index) if index != "$_" else "_"
        number = "index" if items.code == _MESSAGES.code else "number"
        if items.kind == "properties":
            self._tag(f"for {key}, {name} in ({items.code} or {{}}) | dictsort(true)")
            number = "text"
        else:
            self._tag(f"for {name} in {items.code}")
            if index != "$_":
                self._tag(f"set {key} = loop.index0")
        scope |= {index: Value(key, number), element: Value(name, kind)}
        return Value(name, kind, True if kind in _FIELDS else None)

    def _turn(self, nodes: Sequence[Node], item: Value, is_left: str) -> None:
        if is_left:
            self._tag(f"if not {is_left}_for_good")
            self._tag(f"set {is_left} = false")
        self._list(nodes, item)
        if is_left:
            self._tag("endif")

    def _set(self, pipe: Pipe, dot: Value) -> Value:
        """Give a variable its value. All are in a namespace: Jinja's own end with the loop that they are set in."""
        value, name = self._pipe(pipe, dot), pipe.variables[0]
        if value.kind in ("nothing", "root") or len(pipe.variables) > 1:
            raise GoTemplateError(f"it keeps {_words(pipe)} in {name}")
        if not pipe.assigns:
            kept = Value(f"ns.{self._name(name)}", value.kind)
            self.scopes[-1][name] = kept
        else:
            kept = self._variable(name)
            is_same = kept.kind == value.kind or {kept.kind, value.kind} <= {*_NUMBERS}
            if not is_same or not kept.code.startswith("ns."):
                raise GoTemplateError(f"it makes something else of {name}")
        self._tag(f"set {kept.code} = {value.code}")
        return kept

    @contextmanager
    def _scope(self) -> Iterator[dict[str, Value]]:
        self.scopes.append({})
        yield self.scopes[-1]
        self.scopes.pop()

    def _name(self, variable: str) -> str:
        """A name in Jinja for a variable of Go's, used for nothing else."""
        name = "v_" + re.sub(r"[^0-9A-Za-z_]", "", variable[1:])
        name = f"v{len(self.used)}{name[1:]}" if name in self.used else name
        self.used.add(name)
        return name

    def _variable(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise GoTemplateError(f"it does not say what {name} is")

    def _pipe(self, pipe: Pipe, dot: Value) -> Value:
        value: Value | None = None
        for command in pipe.commands:
            value = self._command(command, dot, [] if value is None else [value])
        return value

    def _command(self, command: Sequence[Operand], dot: Value, piped: list[Value]) -> Value:
        head, *rest = command
        if not isinstance(head, Function):
            if rest or piped:
                raise GoTemplateError("it calls what is no function")
            return self._operand(head, dot)
        arguments = [self._operand(operand, dot) for operand in rest] + piped
        if head.name not in _FUNCTIONS:
            raise GoTemplateError(f"it calls {head.name!r}")
        try:
            value = _FUNCTIONS[head.name](*arguments)
        except TypeError:
            raise GoTemplateError(f"it calls {head.name!r} with {len(arguments)} values") from None
        if len(value.code) > _MAX_CODE:
            raise GoTemplateError(f"what it makes with {head.name!r} is too long")
        return value

    def _operand(self, operand: Operand, dot: Value) -> Value:
        match operand:
            case Literal(value):
                return _constant(value)
            case Function():
                return self._command((operand,), dot, [])
            case Path(Pipe() as pipe, fields):
                value = self._pipe(pipe, dot)
            case Path(".", fields):
                value = dot
            case Path("$", fields):
                value = _ROOT
            case Path(variable, fields):
                value = self._variable(variable)
        for name in fields:
            value = self._field(value, name)
        return value

    def _field(self, holder: Value, name: str) -> Value:
        if holder.kind == "root":
            return self._of_root(name)
        if holder.kind == "message" and name == "Images":
            return _NOTHING
        if name not in _FIELDS.get(holder.kind, ()):
            raise GoTemplateError(f"it asks for .{name}")
        key, kind = _FIELDS[holder.kind][name]
        if holder.kind == "message" and key not in ("role", "content"):
            self.kept.add(key)
        return Value(f"{holder.code}['{key}']", kind)

    def _of_root(self, name: str) -> Value:
        """A field of what Ollama executes a template with."""
        if name in ("Think", "IsThinkSet"):  # Ollama asks models for thoughts that can have some
            asked = Value("(enable_thinking is not defined or enable_thinking)", "bool")
            return (_TRUE if name == "IsThinkSet" else asked) if self.thinks else _FALSE
        by_message = {"Messages": _MESSAGES, "System": Value("ns.system", "text"),
                      "Tools": Value("(tools or [])", "tools"), "Response": Value("''", "text", False)}  # fmt: skip
        by_exchange = {key.title(): Value(f"exchange['{key}']", "text") for key in ("system", "prompt", "response")}
        known = by_message if self.by_message else by_exchange
        if name not in known and name not in ("Prompt", "Suffix", "Tools"):
            raise GoTemplateError(f"it asks for .{name}")
        return known.get(name, _NOTHING)


def _is_loop_over_messages(node: Node) -> bool:
    if not isinstance(node, Block):
        return False
    is_loop = node.word == "range" and "Messages" in names((Action(node.pipe),))
    return is_loop or any(map(_is_loop_over_messages, (*node.then, *node.otherwise)))


def _jumps(node: Node) -> bool:
    """Whether a node may leave the loop that it is in."""
    if isinstance(node, Block) and node.word != "range":
        return any(map(_jumps, (*node.then, *node.otherwise)))
    return isinstance(node, Jump)


def _constant(value: str | int | bool | None) -> Value:
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    return Value(str(value), "number") if isinstance(value, int) else Value(quoted(value), "text", bool(value))


def _and(first: Value, *others: Value) -> Value:
    return _joined("and", (first, *others), ends=False)


def _or(first: Value, *others: Value) -> Value:
    return _joined("or", (first, *others), ends=True)


def _joined(word: str, values: Sequence[Value], *, ends: bool) -> Value:
    """`and`, which ends where something is false, or `or`, which ends where something is true."""
    kept: list[Value] = []
    for value in values:
        if value.is_true is None or value.is_true is ends or value is values[-1]:
            kept.append(value)
        if value.is_true is ends:
            break
    if len(kept) == 1:
        return kept[0]
    kinds = {value.kind for value in kept}
    code = f" {word} ".join(value.code for value in kept)
    return Value(f"({code})", kinds.pop() if len(kinds) == 1 else "mixed", ends if kept[-1].is_true is ends else None)


def _not(value: Value) -> Value:
    if value.is_true is not None:
        return _FALSE if value.is_true else _TRUE
    return Value(f"(not {value.code})", "bool")


def _eq(first: Value, second: Value, *others: Value) -> Value:
    return Value(f"({' or '.join(f'{first.code} == {other.code}' for other in (second, *others))})", "bool")


def _comparison(sign: str) -> Callable[[Value, Value], Value]:
    return lambda a, b: Value(f"({a.code} {sign} {b.code})", "bool")


def _len(value: Value) -> Value:
    if value.kind not in _ELEMENTS:
        raise GoTemplateError("it counts the bytes of a text")
    more = " + (0 if add_generation_prompt else 1)" if value.kind == "rest" else ""
    return Value(f"({value.code} | length{more})", "number")


def _index(items: Value, *keys: Value) -> Value:
    for key in keys:
        if items.kind not in _ELEMENTS:
            raise GoTemplateError("it takes a byte of a text")
        items = Value(f"{items.code}[{key.code}]", _ELEMENTS[items.kind])
    return items


def _slice(items: Value, start: Value = _ABSENT, stop: Value = _ABSENT) -> Value:
    if items.kind not in _ELEMENTS or items.kind == "properties":
        raise GoTemplateError("it takes some bytes of a text")
    is_rest = items.code == _MESSAGES.code and start.kind == "index" and not stop.code
    return Value(f"{items.code}[{start.code}:{stop.code}]", "rest" if is_rest else items.kind)


def _print(*values: Value) -> Value:
    if any(value.kind != "text" for value in values):  # Go puts blanks between others
        raise GoTemplateError("it prints what is no text")
    return Value(f"({' ~ '.join(value.code for value in values)})", "text")


def _printf(form: Value, *values: Value) -> Value:
    text = _unquoted(form.code) if form.code.startswith("'") else "%"
    pieces = re.split(r"%([sv])", text.replace("%%", "\0"))
    if "%" in "".join(pieces[::2]) or len(pieces) // 2 != len(values):
        raise GoTemplateError("it prints in a form other than %s")
    parts = [quoted(pieces[0].replace("\0", "%"))]
    for value, piece in zip(values, pieces[2::2], strict=True):
        parts += [_shown(value), quoted(piece.replace("\0", "%"))]
    return Value(f"({' ~ '.join(part for part in parts if part != quoted('')) or quoted('')})", "text")


def _json(value: Value) -> Value:
    return Value(f"({value.code} | tojson)", "text")


def _date(form: Value = _NOTHING) -> Value:
    return Value("strftime_now('%Y-%m-%d')", "text")


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "and": _and, "or": _or, "not": _not, "eq": _eq, "len": _len, "index": _index, "slice": _slice, "print": _print,
    "printf": _printf, "json": _json, "currentDate": _date,
    **{name: _comparison(sign) for name, sign in _COMPARISONS.items()},
}  # fmt: skip
"""Functions of Go's templates and of Ollama's, as far as Jinja can do the same."""


def _shown(value: Value) -> str:
    """The expression that writes a value as Go does."""
    if value.kind in ("text", *_NUMBERS):
        return value.code
    if value.kind == "bool":
        return f"('true' if {value.code} else 'false')"
    if value.kind == "arguments":  # a text in OpenAI's form, an object in Transformers'
        return f"({value.code} if {value.code} is string else {value.code} | tojson)"
    if value.kind in _JSON:
        return f"({value.code} | tojson)"
    raise GoTemplateError(f"it writes out what is no text ({value.kind})")


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def quoted(text: str) -> str:
    """`text` as a string of Jinja's, with no escapes but those that every implementation has."""
    return "'" + "".join(_ESCAPES.get(char, char) for char in text) + "'"


def _unquoted(code: str) -> str:
    back = {escape: char for char, escape in _ESCAPES.items()}
    return re.sub(r"\\.", lambda match: back[match[0]], code[1:-1])


def _words(pipe: Pipe) -> str:
    """What a pipeline is of, for messages."""
    return ", ".join(f".{name}" for name in names((Action(pipe),))) or "a value"
