"""`moegguf.export`: finished mixes handed to Ollama, to LM Studio, and to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from moegguf.api.paths import Location, maybe_path, to_list, to_path
from moegguf.errors import UserError
from moegguf.exporting.card import WrittenCard, write_card
from moegguf.exporting.lmstudio import PUBLISHER, Placed, export
from moegguf.jobs.modelfiles import OllamaExport, Wishes, create_model, write_modelfile
from moegguf.watch import Watch, unwatched

NO_PARAMETERS: Mapping[str, float] = MappingProxyType({})


def ollama(
    path: Location,
    *,
    name: str | None = None,
    output: Location | None = None,
    ctx: int | None = None,
    system: str = "",
    stop: Sequence[str] = (),
    parameters: Mapping[str, float] = NO_PARAMETERS,
    create: bool = True,
    overwrite: bool = False,
    quiet: bool = True,
) -> OllamaExport:
    """Write a Modelfile for a GGUF into the folder `output`, by default the file's, and let Ollama create the model.

    That happens where Ollama is installed, and not without `create`; what it says is shown unless `quiet`. The
    model is called `name`, by default as the file is. `stop` are further stop sequences, and `parameters` Ollama's:
    {"temperature": 0.3}.
    """
    file, folder = to_path("path", path), maybe_path("output", output)
    if not isinstance(stop, list | tuple) or not isinstance(parameters, Mapping):
        raise UserError("stop, parameters: expected a list of texts, and a mapping", "see help(moegguf.export.ollama)")
    _check_texts(name=name or "", system=system, **{f"stop[{i}]": text for i, text in enumerate(stop)})
    wishes = Wishes(ctx, system, tuple(stop), parameters)
    made = write_modelfile(file, name or file.stem, folder or file.parent, wishes, overwrite=overwrite)
    return create_model(made, quiet=quiet) if create else made


def lmstudio(
    path: Location,
    *,
    publisher: str = PUBLISHER,
    name: str | None = None,
    output: Location | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Placed:
    """Put a GGUF, all shards of a split one, into the folder `output`, by default LM Studio's models folder.

    It is PUBLISHER/NAME there, a hard link where that can be, and the number of experts that run for a token goes into
    what LM Studio loads the model with.
    """
    file, folder = to_path("path", path), maybe_path("output", output)
    _check_texts(publisher=publisher, name=name or "")
    return export(file, folder, publisher, name, overwrite=overwrite, watch=watch)


def card(
    path: Location,
    *,
    results: Location | Sequence[Location] = (),
    repo: str = "",
    output: Location | None = None,
    overwrite: bool = False,
) -> WrittenCard:
    """Write a README.md for the Hub to `output`, by default beside the mix; its `warnings` are about licences.

    `results` are files that `moegguf eval --json` or `moegguf measure --json` wrote; `repo` is where the mix will be on
    the Hub, as ORG/NAME.
    """
    files = [to_path("results", file) for file in to_list("results", results)]
    _check_texts(repo=repo)
    return write_card(to_path("path", path), maybe_path("output", output), files, repo, overwrite=overwrite)


def _check_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{name} {value!r}: expected a text", "pass a string")
