"""A mix for Ollama: the Modelfile that `ollama create` takes.

It names the GGUF and says what Ollama keeps beside it: template, stop sequences, parameters, system prompt, licence.
Nothing goes into Ollama's store but by Ollama itself. A Modelfile has no escapes: a text stands between triple quotes,
so it cannot hold any. Source of the format: ollama, parser/parser.go.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moegguf.checks import check_range
from moegguf.errors import UserError
from moegguf.gguf_header import SHARD, Header
from moegguf.metadata import Card
from moegguf.sources.ollama import SAMPLING
from moegguf.tensor import largest

DEFAULT_CTX = 4096
NO_PENALTY = {"repeat_penalty": 1.0}
"""As llama.cpp has it. Ollama's own default was 1.1 up to its version 0.24, with which answers differ."""
PARAMETERS: dict[str, type[int] | type[float]] = {
    "num_ctx": int, "num_predict": int, "num_keep": int, "num_batch": int, "num_gpu": int, "num_thread": int,
    "seed": int, "top_k": int, "repeat_last_n": int, "mirostat": int,
    "temperature": float, "top_p": float, "min_p": float, "typical_p": float, "repeat_penalty": float,
    "presence_penalty": float, "frequency_penalty": float, "mirostat_tau": float, "mirostat_eta": float,
}  # fmt: skip
"""What Ollama lets a Modelfile set, but for stop sequences."""
_QUOTES = '"""'


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told of a model. Without a `template` it goes by the GGUF's own chat template, where it can."""

    weights: Path
    template: str | None = None
    stops: tuple[str, ...] = ()
    parameters: Mapping[str, int | float] = field(default_factory=dict)
    system: str = ""
    licence: str = ""

    def text(self, folder: Path) -> str:
        """The file, to be written into `folder`. Raises UserError where a Modelfile cannot hold something."""
        lines = [f"FROM {_path(self.weights, folder)}"]
        if self.template is not None:
            lines.append(f"TEMPLATE {_quoted('the template', self.template)}")
        if "" in self.stops:
            raise UserError("an empty stop sequence ends every answer at once", "leave it out")
        lines += [f"PARAMETER stop {_quoted('a stop sequence', stop)}" for stop in self.stops]
        lines += [f"PARAMETER {name} {_number(value)}" for name, value in self.parameters.items()]
        if self.system:
            lines.append(f"SYSTEM {_quoted('the system prompt', self.system)}")
        if self.licence:
            lines.append(f"LICENSE {_quoted('the licence', self.licence)}")
        return "\n".join(lines) + "\n"


def check_whole(path: Path) -> None:
    """Raises UserError for a shard of a split file: Ollama takes one file."""
    if match := SHARD.fullmatch(path.name):
        count = int(match["count"])
        raise UserError(f"{path}: is one of {count} shards, and Ollama takes one file", "run `moegguf merge` first")


def parameters(header: Header, ctx: int | None, given: Mapping[str, object]) -> dict[str, int | float]:
    """A context and the file's sampling settings, with what is `given` on top. Raises UserError for a bad one."""
    check_range("--ctx", ctx, 1)
    n_ctx = largest(header.get(f"{header.get('general.architecture')}.context_length", DEFAULT_CTX))
    found = {name: header.get(key) for name, (key, _) in SAMPLING.items()}
    values = {"num_ctx": ctx or min(n_ctx, DEFAULT_CTX)} | NO_PENALTY
    values |= {name: value for name, value in found.items() if isinstance(value, int | float)}
    return values | {name: _parameter(name, str(value)) for name, value in given.items()}


def _parameter(name: str, text: str) -> int | float:
    if name not in PARAMETERS:
        raise UserError(f"--parameter {name}: Ollama has none of that name", f"it has {', '.join(PARAMETERS)}")
    kind = PARAMETERS[name]
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--parameter {name}={text}: expected {what}", "mend it, or leave it out")
    return value


def stop_sequences(after_answer: str, controls: Sequence[str]) -> tuple[str, ...]:
    """What ends an answer: the names of the control tokens that the template writes after one, of which `controls` are
    those in `after_answer`; where there are none, the first line of words there."""
    words = [line.strip() for line in after_answer.splitlines() if line.strip()]
    return tuple(dict.fromkeys(controls)) or tuple(words[:1])


def licence_text(header: Header, card: Card | None) -> str:
    """The licence that the file names, and that of everything in it."""
    whole = str(header.get("general.license", ""))
    parts = {source: licence for source, licence in card.licences.items() if licence} if card else {}
    if not set(parts.values()) - {whole}:
        return whole
    return "\n".join(filter(None, [whole, *(f"{source}: {licence}" for source, licence in parts.items())]))


def _path(weights: Path, folder: Path) -> str:
    """How a Modelfile in `folder` names the file: relative when it lies there too."""
    path, folder = Path(os.path.abspath(weights)), Path(os.path.abspath(folder))  # noqa: PTH100 (links stay links)
    text = f"./{path.name}" if path.parent == folder else str(path)
    if not text.isprintable() or text != text.strip():
        raise UserError(f"{text!r}: a Modelfile cannot hold this path", "rename the file or its folder")
    return text


def _number(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _quoted(what: str, text: str) -> str:
    if _QUOTES in text:
        raise UserError(f"{what} holds three quotes in a row, which a Modelfile cannot", "leave them out")
    return f"{_QUOTES}{text}{_QUOTES}"
