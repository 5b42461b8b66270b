"""A model card for the Hub: README.md with the metadata that the Hub reads, and what people want to know.

Everything comes from the header of the file: its experts and their licences, the recipe, the router. Licences of all
models that are in a mix hold for the whole; `moegguf.licences` says what that comes to, and the card repeats what it
warns of. Metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moegguf.assembly import TAGS
from moegguf.atomic import atomic_file
from moegguf.edit.change import check_copy
from moegguf.errors import UserError, one_line
from moegguf.exporting.recipe_toml import recipe_toml
from moegguf.exporting.results import Table, results_table
from moegguf.gguf_header import Header, read_header, shards, whole
from moegguf.licences import OTHER, UNKNOWN, asks, combine
from moegguf.metadata import Card, read_card
from moegguf.sizes import show_size

HUB = "https://huggingface.co/"
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class ModelCard:
    """`text` is the README.md; `warnings` is what it says of licences."""

    text: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class WrittenCard:
    """A card that was written to `path`, and what it says of licences."""

    path: Path
    n_bytes: int
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {"file": str(self.path), "bytes": self.n_bytes, "notes": list(self.warnings)}


@dataclass(frozen=True)
class _Mix:
    """What a card is made of."""

    header: Header
    card: Card
    licence: str
    warnings: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.header.path

    def text(self, key: str) -> str:
        value = self.header.get(key, "")
        return value if isinstance(value, str) else ""


def model_card(header: Header, results: Sequence[Table] = (), repo: str = "") -> ModelCard:
    """The card of a mix; `repo` is where on the Hub it will be. Raises UserError for a file that is no mix of ours."""
    card = read_card(header)
    if card is None:
        raise UserError(
            f"{header.path}: was not made by moegguf, so its experts are unknown", "pass a mix that it built"
        )
    if repo and not _REPO.fullmatch(repo):
        raise UserError(f"--repo {repo}: is no name of a model on the Hub", "write it as ORG/NAME")
    mix = _Mix(whole(header), card, *_licence(header, card))
    front = yaml.safe_dump(_front_matter(mix), sort_keys=False, allow_unicode=True)
    sections = [f"---\n{front}---", *_about(mix), *_licences(mix), *_recipe(mix), *_measured(results)]
    return ModelCard("\n\n".join([*sections, *_how_to_run(mix, repo)]) + "\n", mix.warnings)


def write_card(
    path: Path, output: Path | None, results: Sequence[Path] = (), repo: str = "", *, overwrite: bool
) -> WrittenCard:
    """Write the card of the mix at `path` to `output`, by default to README.md beside it.

    `results` are files that `moegguf eval --json` or `moegguf measure --json` wrote. Raises UserError.
    """
    header = read_header(shards(path)[0])
    target = output or path.parent / "README.md"
    check_copy(header.path, target, overwrite=overwrite)
    card = model_card(header, [results_table(file) for file in results], repo)
    content = card.text.encode()
    with atomic_file(target) as file:
        file.write(content)
    return WrittenCard(target, len(content), card.warnings)


def _licence(header: Header, card: Card) -> tuple[str, tuple[str, ...]]:
    """The licence of the whole and what is to be said of it.

    Where its parts leave it open, the file's word counts, unless it is only what the base says of itself.
    """
    declared = str(header.get("general.license", ""))
    combined = combine(card.licences)
    if not declared or declared == combined.licence:
        return combined.licence, combined.warnings
    if combined.licence in (OTHER, UNKNOWN):
        return combined.licence if declared == card.base_licence else declared, combined.warnings
    warning = f"the file says {declared}, but what is in it comes to {combined.licence}"
    return combined.licence, (*combined.warnings, warning)


def _front_matter(mix: _Mix) -> dict[str, object]:
    licence: dict[str, object] = {"license": mix.licence}
    if mix.licence != UNKNOWN and asks(mix.licence) is None:
        name = mix.text("general.license.name") or ("mixed" if mix.licence == OTHER else mix.licence)
        licence = {"license": OTHER, "license_name": name}
        if link := mix.text("general.license.link"):
            licence["license_link"] = link
    bases = _hub_models(mix)
    languages = mix.header.get("general.languages")
    return {
        **licence,
        **({"language": languages} if isinstance(languages, list) and languages else {}),
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", *TAGS],
    }


def _hub_models(mix: _Mix) -> list[str]:
    """Every model of the Hub that is in the mix, adapters and what they go over included, each once."""
    urls = [mix.text(key) for key in mix.header.fields if re.fullmatch(r"general\.base_model\.\d+\.repo_url", key)]
    named = [url.removeprefix(HUB) for url in urls if url.startswith(HUB)]
    for source in mix.card.licences:
        named += re.findall(r"\bhf:([\w.-]+/[\w.-]+)", source)
    return [repo for repo in dict.fromkeys(named) if _REPO.fullmatch(repo)]


def _about(mix: _Mix) -> Iterator[str]:
    card = mix.card
    yield f"# {_plain(card.name)}"
    if description := mix.text("general.description"):
        yield _plain(description)
    yield (
        f"A Mixture of Experts, {len(card.experts)} fine-tunes of one model in one GGUF file of "
        f"{show_size(mix.header.file_size)} ({_plain(card.quant)}), for llama.cpp, Ollama and LM Studio as they are. "
        f"Made with moegguf {_plain(card.tool_version)}."
    )
    yield f"Router: {_plain(card.describe_router())}. Layout: {_plain(card.layout)}. Base: {_link(card.base)}."
    head = ["expert", "source", "weight", "quant", "licence"]
    rows = [
        [_plain(expert.name), _link(expert.source), f"{expert.weight:.4g}" if card.is_gateless else "by router",
         _plain(expert.quant), _plain(expert.licence) or "not named"]
        for expert in card.experts
    ]  # fmt: skip
    yield _markdown([head, *rows])


def _licences(mix: _Mix) -> Iterator[str]:
    yield "## Licences"
    yield "A mix is under the licences of all models in it. By what these say of themselves, which is no legal advice:"
    named = {source: _plain(licence) or "not named" for source, licence in mix.card.licences.items()}
    yield "\n".join(f"- {_link(source)}: {licence}" for source, licence in named.items())
    yield "\n".join(f"- **{_plain(warning)}**" for warning in mix.warnings) or "Nothing in them excludes anything else."


def _recipe(mix: _Mix) -> Iterator[str]:
    yield "## Recipe"
    toml = recipe_toml(mix.card, mix.text("general.description"), mix.text("general.license"))
    yield f"{_code(f'moegguf build {mix.card.name} --recipes models.toml')}, with this in models.toml:"
    yield f"```toml\n{toml}```"


def _measured(results: Sequence[Table]) -> Iterator[str]:
    if results:
        yield "## Measured"
        yield "Accuracies in per cent, 95 % confidence intervals in brackets; ±: standard error."
    for head, *rows in results:
        yield _markdown([[*map(_plain, head)], *([*map(_plain, row)] for row in rows)])


def _how_to_run(mix: _Mix, repo: str) -> Iterator[str]:
    file, name = (shlex.quote(one_line(text)) for text in (shards(mix.path)[0].name, mix.path.stem))
    hub = [f"llama-server -hf {repo}", f"ollama run hf.co/{repo}"] if repo else []
    yield "## Run it"
    yield "\n".join([
        "```", *(f"{line:<48} # straight from the Hub" for line in hub),
        f"{f'llama-cli -m {file}':<48} # llama.cpp",
        f"{f'moegguf chat {file}':<48} # moegguf",
        f"{f'moegguf export ollama {file} --name {name}':<48} # Ollama: ollama run {name}",
        f"{f'moegguf export lmstudio {file}':<48} # LM Studio", "```",
    ])  # fmt: skip


def _link(source: str) -> str:
    """A source, linked where it is one model of the Hub."""
    repo, _, revision = source.removeprefix("hf:").partition("@")
    if not source.startswith("hf:") or not _REPO.fullmatch(repo):
        return _code(source)
    return f"[{repo}]({HUB}{repo})" + (f" at {_code(revision[:12])}" if revision else "")


def _code(text: str) -> str:
    """Text of a file as code, in a table too."""
    return "`" + one_line(text).replace("`", "'").replace("|", r"\|") + "`"


def _plain(text: str) -> str:
    """Text of a file as one line that is no markup."""
    return re.sub(r"([|<>`*\[\]])", r"\\\1", one_line(text))


def _markdown(table: Table) -> str:
    head, *rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
