"""`moegguf.export`: finished mixes handed to Ollama, to LM Studio, and to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from moegguf.api.paths import Location, maybe_path, to_list, to_path
from moegguf.exporting.card import WrittenCard, write_card
from moegguf.exporting.lmstudio import PUBLISHER, Placed, export
from moegguf.jobs.modelfiles import OllamaExport, Wishes, create_model, write_modelfile
from moegguf.kinds import checked
from moegguf.watch import Watch, unwatched

NO_PARAMETERS: Mapping[str, float | str] = MappingProxyType({})


@checked
def ollama(
    path: Location,
    *,
    name: str | None = None,
    output: Location | None = None,
    ctx: int | None = None,
    system: str = "",
    stop: Sequence[str] = (),
    parameters: Mapping[str, float | str] = NO_PARAMETERS,
    create: bool = True,
    overwrite: bool = False,
    quiet: bool = True,
) -> OllamaExport:
    """Write a Modelfile for a GGUF into the folder `output`, by default the file's, and let Ollama create the model.

    That happens where Ollama is installed, and not without `create`; what it says is shown unless `quiet`. The
    model is called `name`, by default as the file is. `stop` are further stop sequences, and `parameters` Ollama's:
    {"temperature": 0.3}. Raises UserError.
    """
    file, folder = to_path("path", path), maybe_path("output", output)
    wishes = Wishes(ctx, system, tuple(stop), parameters)
    made = write_modelfile(file, name or file.stem, folder or file.parent, wishes, overwrite=overwrite)
    return create_model(made, quiet=quiet) if create else made


@checked
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
    what LM Studio loads the model with. Raises UserError.
    """
    file, folder = to_path("path", path), maybe_path("output", output)
    return export(file, folder, publisher, name, overwrite=overwrite, watch=watch)


@checked
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
    the Hub, as ORG/NAME. Raises UserError.
    """
    files = [to_path("results", file) for file in to_list("results", results)]
    return write_card(to_path("path", path), maybe_path("output", output), files, repo, overwrite=overwrite)
