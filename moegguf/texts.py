"""Texts by name: what routers are fitted to, trained on and measured with.

| reference | records |
|---|---|
| `demo:DOMAIN`, `demo:DOMAIN/heldout` | 200 `Chat`s of the embedded family: train or held-out questions |
| `demo:DOMAIN#N`, `demo:DOMAIN/heldout#N` | `N` of them |
| `PATH.txt`, `PATH.md` | the whole file as one `Text` |
| `PATH.jsonl` | one record a line; its fields say which, see `SHAPES` |

What is read is data: it is never executed and never rendered here. A record knows where it comes from, so that
whoever finds fault with it can name the line. Every file is checked whole before any of it is used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moegguf.errors import UserError

ROLES = ("system", "user", "assistant")
DEMO_EXAMPLES = 200
DEMO_SEED = 11
MAX_FAULTS = 5
"""Of one file. Whoever has mended these knows what to look for."""

Parsed = TypeVar("Parsed")

Fields = Mapping[str, object]
"""One line of a JSONL file, unchecked."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, as in pre-training."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, joined as they are: no template, nothing in between."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for a model's chat template."""

    messages: tuple[Message, ...]
    where: str


Record = Text | Completion | Chat


def read_records(ref: str, folder: Path = Path()) -> list[Record]:
    """All records of the reference `ref`, at least one; a relative path is relative to `folder`.

    Raises UserError, naming the line, for a file that is missing, holds no text, or has faulty lines.
    """
    if ref.startswith("demo:"):
        return list(_demo(ref))
    path = resolve(ref, folder)
    if path.suffix in (".txt", ".md"):
        return [Text(require_text(path, read_text(path)), f"{path}:1")]
    if path.suffix == ".jsonl":
        return read_lines(path, record_of)
    raise UserError(f"{ref}: is no text, expected demo:DOMAIN or a .txt, .md or .jsonl file", "convert or rename it")


def read_domains(domains: Mapping[str, Sequence[str]], folder: Path = Path()) -> dict[str, list[Record]]:
    """The records of every domain, its references one after the other. Raises one UserError with all faults."""
    read: dict[str, list[Record]] = {}
    faults: list[UserError] = []
    for domain, refs in domains.items():
        if not refs:
            faults.append(UserError(f"domain {domain}: has no text", "name a file, or leave the domain out"))
        for ref in refs:
            try:
                read.setdefault(domain, []).extend(read_records(ref, folder))
            except UserError as error:
                faults.append(error)
    if faults:
        raise UserError.of(faults)
    return read


# ---------------------------------------------------------------------------------------- lines of JSONL


def read_lines(path: Path, parse: Callable[[Fields, str], Parsed]) -> list[Parsed]:
    """`parse(fields, where)` of every line of a JSONL file that is not blank, at least one.

    Raises UserError with the first `MAX_FAULTS` faults: lines that are no JSON object, and what `parse` raises.
    """
    parsed: list[Parsed] = []
    faults: list[UserError] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed.append(parse(_fields(line, f"{path}:{number}"), f"{path}:{number}"))
        except UserError as error:
            faults.append(error)
            if len(faults) == MAX_FAULTS:
                break
    if faults:
        raise UserError.of(faults)
    if not parsed:
        raise UserError(f"{path}: is empty", "write one JSON object a line into it")
    return parsed


def _fields(line: str, where: str) -> Fields:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is no valid JSON ({error.msg} at column {error.colno})", "mend that line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON that can be read ({error})", "mend that line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {_short(value)}, expected a JSON object", "write one {…} a line")
    return value


def record_of(fields: Fields, where: str) -> Record:
    """The record that one line holds, by the fields it has. Raises UserError when it has none of `SHAPES`."""
    for names, make in SHAPES.items():
        if all(name in fields for name in names):
            return make(fields, where)
    shapes = ", ".join(shape(names) for names in SHAPES)
    raise UserError(f"{where}: found {shape(fields)}, expected one of {shapes}", "rename or add the fields")


def string(fields: Fields, name: str, where: str, *, empty: bool = False) -> str:
    """The field `name`, checked to be text that a model can be given; not blank unless `empty`."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {_short(value)}, expected a string", "mend that line")
    if not empty and not value.strip():
        raise UserError(f"{where}: {name} is empty", "fill it in, or delete that line")
    if not is_unicode(value):
        raise UserError(f"{where}: {name} holds half a character (a lone surrogate)", "mend that line")
    return value


def messages(fields: Fields, where: str) -> tuple[Message, ...]:
    """The field `messages`, checked: a list of {"role", "content"} with known roles, at least one."""
    value = fields.get("messages")
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: messages is {_short(value)}, expected a list of {shape(('role', 'content'))}",
                        "mend that line")  # fmt: skip
    for i, item in enumerate(value):
        if item.get("role") not in ROLES:
            raise UserError(
                f"{where}: messages[{i}] has role {_short(item.get('role'))}, expected {', '.join(ROLES)}",
                "mend that line",
            )
    return tuple(Message(item["role"], string(item, "content", f"{where}: messages[{i}]"))
                 for i, item in enumerate(value))  # fmt: skip


def shape(names: Sequence[str] | Fields) -> str:
    """Field names as they look in a file: `{"question", "answer"}`."""
    return "{" + ", ".join(f'"{name}"' for name in names) + "}"


SHAPES: Mapping[tuple[str, ...], Callable[[Fields, str], Record]] = {
    ("messages",): lambda fields, where: Chat(messages(fields, where), where),
    ("prompt", "completion"): lambda fields, where: Completion(
        string(fields, "prompt", where, empty=True), string(fields, "completion", where), where
    ),
    ("question", "answer"): lambda fields, where: exchange(
        string(fields, "question", where), string(fields, "answer", where), where
    ),
    ("text",): lambda fields, where: Text(string(fields, "text", where), where),
}
"""Fields → record, the first that fit. `prompt` and `completion` are TRL's convention, `messages` OpenAI's."""


def exchange(question: str, answer: str, where: str) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)), where)


# ------------------------------------------------------------------------------------------------ files


def resolve(ref: str, folder: Path) -> Path:
    """The path that `ref` means to someone who is in `folder`; `~` is their home."""
    return folder / os.path.expanduser(ref)  # noqa: PTH111 (pathlib raises for a ~user that there is not)


def from_here(ref: str | None) -> str | None:
    """`ref` for a recipe in whatever folder: a path that is there when seen from the working directory is that one."""
    path = resolve(ref or "", Path())
    return str(path.absolute()) if ref and path.exists() else ref


def named_ref(spec: str) -> tuple[str, str]:
    """(name, reference) of `NAME=REF` or `REF`, which has the name of its file, or of its demo domain."""
    name, equals, ref = spec.partition("=")
    if equals and not resolve(spec, Path()).exists():
        return name, ref
    if spec.startswith("demo:"):
        return spec.removeprefix("demo:").partition("#")[0].removesuffix("/heldout"), spec
    return Path(spec).stem, spec


def read_text(path: Path) -> str:
    """The file as UTF-8, without a byte order mark. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", "convert it to UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: is no path ({error})", "check the path") from error


def require_text(path: Path, text: str) -> str:
    if not text.strip():
        raise UserError(f"{path}: is empty", "it takes some text")
    return text


def _demo(ref: str) -> Iterator[Chat]:
    from moegguf.demo.text import DOMAINS, examples

    match = re.fullmatch(rf"demo:({'|'.join(DOMAINS)})(/heldout)?(?:#([1-9]\d{{0,4}}))?", ref)
    if not match:
        raise UserError(
            f"{ref}: is no text of the demo family, expected demo:DOMAIN, demo:DOMAIN/heldout or demo:DOMAIN#N",
            f"DOMAIN is one of {', '.join(DOMAINS)}; N is at most 99999",
        )
    domain, heldout, n = match.groups()
    drawn = examples(domain, "heldout" if heldout else "train", int(n or DEMO_EXAMPLES), DEMO_SEED)
    for i, example in enumerate(drawn, 1):
        yield exchange(example.question, example.answer, f"{ref}:{i}")


def is_unicode(text: str) -> bool:
    """Whether `text` holds no lone surrogates, as Python makes of undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    """A value of a file, for a message: JSON, cut."""
    text = json.dumps(value, ensure_ascii=True)
    return "nothing" if value is None else text if len(text) <= 40 else f"{text[:40]}…"
