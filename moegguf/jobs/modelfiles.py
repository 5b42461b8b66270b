"""A mix handed to Ollama: what its Modelfile says, and the model that Ollama makes of it.

Ollama's templates are Go's. The file's chat template is translated where its form can be told from outside
(`exporting.chat_form`), and what it writes after an answer is what ends one; both need the file's vocabulary, which
llama.cpp reads. A template that cannot be translated, or that writes today's date, which would stay today's for ever,
is left to Ollama, which reads the one in the file. Ollama's store is written by Ollama only.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moegguf.atomic import atomic_file, new_folder
from moegguf.edit.change import check_copy
from moegguf.errors import UserError
from moegguf.exporting.chat_form import recognise
from moegguf.exporting.ollama import Modelfile, check_whole, licence_text, parameters, stop_sequences
from moegguf.gguf_header import Header, read_header
from moegguf.metadata import read_card
from moegguf.runtime.template import template_of
from moegguf.runtime.vocab import Vocab, open_vocab
from moegguf.sources.ollama import TEMPLATE, parse_name
from moegguf.texts import is_unicode

TODAY = "strftime_now"
"""What a template calls to write today's date."""


@dataclass(frozen=True)
class Wishes:
    """What a Modelfile is to say beside what the file says. Without `ctx` the model's context is taken, up to 4096."""

    ctx: int | None = None
    system: str = ""
    stops: Sequence[str] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class OllamaExport:
    """A Modelfile that was written to `path`, for a model called `name`, and whether Ollama has created that."""

    path: Path
    name: str
    modelfile: Modelfile
    has_own_template: bool
    """Whether the GGUF has a chat template."""
    is_created: bool = False

    @property
    def about_template(self) -> str:
        if self.modelfile.template is None:
            return "left out: the file's chat template cannot be told in Ollama's form; Ollama may read it itself"
        if not self.has_own_template:
            return "the file has none: what is said is given as it is, to be gone on with"
        return "the file's chat template in Ollama's form; both render the same conversations alike"

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "file": str(self.path),
            "name": self.name,
            "created": self.is_created,
            "template": self.modelfile.template,
            "stop": self.modelfile.stops,
            "parameters": dict(self.modelfile.parameters),
            "notes": [f"template: {self.about_template}"],
        }


def write_modelfile(path: Path, name: str, folder: Path, wishes: Wishes, *, overwrite: bool) -> OllamaExport:
    """Write `folder`/Modelfile for the GGUF at `path`. Raises UserError for what Ollama would not take."""
    check_whole(path)
    parse_name(name, "--name", "take letters, digits, '.', '_' and '-', and perhaps :TAG")
    target = folder / "Modelfile"
    if folder.is_dir():
        check_copy(path, target, overwrite=overwrite)
    elif not folder.parent.is_dir():
        raise UserError(f"{folder.parent}: no such folder to make {folder.name} in", "create it, or choose another -o")
    header = read_header(path)
    modelfile = _modelfile(header, open_vocab(path), wishes)
    text = modelfile.text(folder)
    if not is_unicode(text):
        raise UserError(f"{target}: would hold bytes that are no text in UTF-8", "write --system and --stop in UTF-8")
    with new_folder(folder), atomic_file(target) as file:
        file.write(text.encode())
    return OllamaExport(target, name, modelfile, TEMPLATE in header.fields)


def create_model(export: OllamaExport, *, quiet: bool) -> OllamaExport:
    """Let Ollama create the model, where it is installed; `quiet` keeps what it says to itself.

    Raises UserError when Ollama fails.
    """
    program = shutil.which("ollama")
    if program is None:
        return export
    command = ["create", export.name, "-f", str(export.path)]
    done = subprocess.run([program, *command], capture_output=quiet, check=False)
    if done.returncode:
        said = (done.stderr or b"").decode("utf-8", errors="replace").split("\n")
        why = next((f": {line.strip()}" for line in reversed(said) if line.strip()), "")
        raise UserError(
            f"`ollama {' '.join(command)}` failed with code {done.returncode}{why}",
            "start Ollama if it is not running, and try again; the Modelfile is written",
        )
    return replace(export, is_created=True)


def _modelfile(header: Header, vocab: Vocab, wishes: Wishes) -> Modelfile:
    template = template_of(header, vocab)
    form = None if TODAY in str(header.get(TEMPLATE, "")) else recognise(template.prompt)
    added = vocab.name(next(iter(vocab.tokenize_prompt("")), None))
    after = form.question if form else template.after_answer
    controls = [vocab.name(token) for token in vocab.tokenize(after) if vocab.is_control(token) and token != vocab.bos]
    return Modelfile(
        weights=header.path,
        template=form.without(added).to_go() if form else None,
        stops=(*stop_sequences(after, controls), *wishes.stops),
        parameters=parameters(header, wishes.ctx, wishes.parameters),
        system=wishes.system,
        licence=licence_text(header, read_card(header)),
    )
