"""What Ollama keeps beside a model of how it is talked to, as the chat template of a GGUF.

That is a template of Go's, a system prompt, and messages that every conversation begins with. Ollama takes the template
before the GGUF's own, unless that can do more (tools, thoughts); so does this, and where Go's cannot be translated the
GGUF's own stays. System prompt and messages are written into the template, in front of what is said; the system prompt
only where a conversation does not begin with one.

Source: ollama, server/images.go (which template counts) and server/routes.go (what goes in front).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moegguf.sources.go_template import GoTemplateError, names, parse
from moegguf.sources.go_to_jinja import quoted, to_jinja

Message = Mapping[str, str]
"""`role` and `content`."""
_PROBE = "moegguf-probe"
_SKILLS = {"tools": "Tools", "thinking": "Thinking", "insert": "Suffix"}
"""What a template can be good for → the field by which Ollama sees that one of Go's is."""
_TOOL_ANSWER = re.compile(
    r"tool_response|tool_results|ipython|role(?:'\]|\"\]) == ['\"]tool['\"]|message\.role == ['\"]tool['\"]"
)


@dataclass(frozen=True)
class Told:
    """What Ollama keeps of it: `template` is Go's; `renderer` names code of Ollama's own that takes its place."""

    template: str = ""
    system: str = ""
    examples: tuple[Message, ...] = ()
    renderer: str = ""


@dataclass(frozen=True)
class Chat:
    """A chat template of Jinja's, None where there is none, and what is to be said of it."""

    template: str | None
    notes: tuple[str, ...]


def chat_of(told: Told, own: str | None, bos: str = "") -> Chat:
    """The chat template of a model whose GGUF has the template `own`, and a vocabulary that adds the token `bos`."""
    template, notes = _template(told, own, bos)
    system = told.system if template is not None and takes_system(template) else ""
    examples = told.examples if template is not None else ()
    if left := _named(told.system != system, told.examples if told.examples != examples else ()):
        notes += (f"the chat template has no place for its {left}: left out",)
    if kept := _named(bool(system), examples):
        template = with_beginning(template, system, examples)
        notes += (f"the chat template says its {kept} by itself",)
    return Chat(template, notes)


def _template(told: Told, own: str | None, bos: str) -> tuple[str | None, tuple[str, ...]]:
    rest = "the mix has none" if own is None else "the mix has the GGUF's own"
    if told.renderer:
        return own, (f"Ollama writes its prompts by a program, {told.renderer}, and not by a chat template: {rest}",)
    if not told.template:
        return own, ()
    try:
        if own is not None and prefers_own(own, told.template):
            return own, ("the chat template is the GGUF's own, which Ollama too takes before the one beside it",)
        template = to_jinja(told.template, bos)
        _compiled(template)
        return template, ("the chat template is Ollama's, translated from Go",)
    except GoTemplateError as error:
        why = str(error)
    except (RecursionError, SyntaxError):  # Python has such limits, and Jinja compiles to Python
        why = "it is nested too deeply"
    return own, (f"the chat template that Ollama has beside it cannot be translated from Go, {why}: {rest}",)


def _named(has_system: bool, examples: Sequence[Message]) -> str:
    return " and ".join([*["system prompt"] * has_system, *[f"{len(examples)} first messages"] * bool(examples)])


def with_beginning(template: str, system: str, examples: Sequence[Message] = ()) -> str:
    """A chat template of Jinja's that puts a system prompt, where there is none, and `examples` before all messages."""
    shown = ", ".join(_message(message["role"], message["content"]) for message in examples)
    default = f"([] if messages and messages[0]['role'] == 'system' else [{_message('system', system)}])"
    parts = [*([default] if system else []), *([f"[{shown}]"] if shown else []), "messages"]
    return f"{{%- set messages = {' + '.join(parts)} -%}}\n{template}"


def takes_system(template: str) -> bool:
    """Whether a chat template of Jinja's shows a system message. It is foreign code, and run in a sandbox."""

    def fail(message: str) -> None:
        raise ValueError(message)

    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hello"}]
    given = {"bos_token": "", "eos_token": "", "raise_exception": fail, "strftime_now": lambda form: form}
    try:
        return _PROBE in _compiled(template).render(messages=messages, add_generation_prompt=True, **given)
    except Exception:  # foreign code may raise anything
        return False


def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(template)


def prefers_own(own: str, go: str) -> bool:
    """Whether Ollama takes the GGUF's template `own` and not `go` beside it: where it is seen to do more."""
    fields = set(names(parse(go)))
    in_go = {skill for skill, name in _SKILLS.items() if name in fields}
    in_own = {"tools"} if "tools" in own or "tool_call" in own else set()
    if _thinks(own):
        in_own.add("thinking")
    go_answers = {"Tools", "ToolCalls"} <= fields and re.search('eq .Role "tool"|tool_response|TOOL_RESULTS', go)
    own_answers = "tools" in in_own and re.search("tool_calls|assistant_tool_call", own) and _TOOL_ANSWER.search(own)
    if len(in_own) > len(in_go):
        return not go_answers or bool(own_answers)
    return in_own == in_go and "tools" in in_go and bool(own_answers) and not go_answers


def _thinks(own: str) -> bool:
    if "<think>" in own and "</think>" in own:
        return True
    splits = re.search(r"""content\.split\((['"])</think>\1\)""", own)
    return bool(splits) and "reasoning_content" not in own and "<SPECIAL_12>" not in own


def _message(role: str, content: str) -> str:
    return f"{{'role': {quoted(role)}, 'content': {quoted(content)}}}"
