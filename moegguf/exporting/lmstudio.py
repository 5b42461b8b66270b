"""A mix for LM Studio: the file where LM Studio looks for models, and the number of experts it is to run.

Models are `PUBLISHER/NAME/FILE.gguf` under its models folder. A hard link costs nothing and is the same file, so that a
later change in place (`moegguf swap --in-place`, `route set`) reaches both names; on another disk it is a copy.

What a model is loaded with unless something else is asked for lies in LM Studio's home, in a JSON file under
`.internal/user-concrete-model-default-config` that has the path of the model's file and `.json` behind it.

Where this is from. The models folder: lmstudio.ai/docs/app/basics/import-model. That such settings are lists
`load.fields` of keys and values: lmstudio.ai/docs/app/modelyaml. The key: lmstudio.js,
packages/lms-kv-config/src/schema.ts, `llm.load.numExperts`, 0 for the model's own number. The place and form of the
file are not documented; they are those of files that people keep of it (for one, `PUBLISHER/NAME/FILE.gguf.json` in
published configurations of Nix's home-manager), and have not been tried on LM Studio itself. Whatever else is in such a
file stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moegguf.atomic import atomic_file, check_space, new_folder
from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header, shards
from moegguf.journal import held
from moegguf.stores import is_folder, lmstudio_folder, lmstudio_home
from moegguf.tensor import largest
from moegguf.watch import Progress, Watch

PUBLISHER = "moegguf"
DEFAULTS = Path(".internal") / "user-concrete-model-default-config"
NUM_EXPERTS = "llm.load.numExperts"
_NAME = re.compile(r"[\w][\w. +-]{0,95}")
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Place:
    """Where a model goes: `PUBLISHER/NAME` of a models folder."""

    models: Path
    publisher: str
    name: str

    @property
    def folder(self) -> Path:
        return self.models / self.publisher / self.name


@dataclass(frozen=True)
class Placed:
    """What LM Studio was given: files → "linked", "copied" or "there already".

    `settings` is where the number of experts that run for a token, `n_experts`, was written; None where LM Studio has
    no home here, or the model no experts.
    """

    place: Place
    files: Mapping[Path, str]
    n_bytes: int
    n_experts: int | None
    settings: Path | None

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "file": str(next(iter(self.files))),
            "files": {str(target): how for target, how in self.files.items()},
            "bytes": self.n_bytes,
            "name": f"{self.place.publisher}/{self.place.name}",
            "k": self.n_experts,
            "settings": self.settings and str(self.settings),
            "notes": [],
        }


def export(
    path: Path, models: Path | None, publisher: str, name: str | None, *, overwrite: bool, watch: Watch
) -> Placed:
    """Put the GGUF at `path` where LM Studio finds it, and its number of experts into LM Studio's settings.

    `models` is LM Studio's models folder, by default that of its settings; the model's name is by default the file's.
    Raises UserError before anything is written.
    """
    first = shards(path)[0]
    place = make_place(models or lmstudio_folder(), publisher, name or first.stem)
    n_experts = experts_used(read_header(first))
    settings = defaults_of(lmstudio_home(), place, first.name)
    has_settings = n_experts is not None and is_folder(lmstudio_home())
    defaults = read_defaults(settings) if has_settings else {}
    n_bytes = sum(shard.stat().st_size for shard in shards(first))
    with watch("copying", "bytes") as step:
        step.has(n_bytes)
        files = put(first, place, overwrite=overwrite, progress=step.did)
    if has_settings:
        set_experts(settings, defaults, n_experts)
    return Placed(place, files, n_bytes, n_experts, settings if has_settings else None)


def make_place(models: Path, publisher: str, name: str) -> Place:
    """Raises UserError where the models folder is not there, or LM Studio would not take the names."""
    for flag, value in (("--publisher", publisher), ("--name", name)):
        if not _NAME.fullmatch(value):
            raise UserError(f"{flag} {value!r}: expected letters, digits, blanks and . _ + -", "choose another one")
    if not models.is_dir():
        raise UserError(
            f"{models}: LM Studio's models folder is not there", "start LM Studio once, or name its folder with -o"
        )
    return Place(models, publisher, name)


def put(path: Path, place: Place, *, overwrite: bool, progress: Progress) -> dict[Path, str]:
    """Link or copy the file, all shards of a split one, to `place`: target → "linked", "copied" or "there already".

    `progress` hears bytes as they are copied. Raises UserError where another file has the name, unless `overwrite`.
    """
    files = {shard: place.folder / shard.name for shard in shards(path)}
    for source, target in files.items():
        if target.exists() and not target.samefile(source) and not overwrite:
            raise UserError(f"{target}: is another file", "choose another --name, or pass --force to replace it")
    with new_folder(place.folder.parent), new_folder(place.folder):
        return {target: _put(source, target, progress) for source, target in files.items()}


def _put(source: Path, target: Path, progress: Progress) -> str:
    if target.exists() and target.samefile(source):
        return "there already"
    if _link(source, target):
        return "linked"
    check_space(target.parent, source.stat().st_size, "the copy")
    with held(source), open(source, "rb") as file, atomic_file(target) as copy:
        while chunk := file.read(_CHUNK_BYTES):
            copy.write(chunk)
            progress(len(chunk))
    return "copied"


def _link(source: Path, target: Path) -> bool:
    """Make `target` a hard link, in the place of whatever it was; False where the file system cannot."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.link(source, temporary)
    except OSError:
        return False
    os.replace(temporary, target)
    return True


def experts_used(header: Header) -> int | None:
    """The experts in stacks that run for a token; None for a model that has none."""
    arch = header.get("general.architecture")
    if not header.get(f"{arch}.expert_count", 0):
        return None
    return largest(header.get(f"{arch}.expert_used_count", 0)) or None


def defaults_of(home: Path, place: Place, file: str) -> Path:
    """Where LM Studio keeps what the file is loaded with."""
    return home / DEFAULTS / place.publisher / place.name / f"{file}.json"


def read_defaults(path: Path) -> dict:
    """What is there, or what LM Studio begins with. Raises UserError for another form."""
    try:
        defaults = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {"preset": "", "operation": {"fields": []}, "load": {"fields": []}}
    except (ValueError, RecursionError):
        defaults = None
    load = defaults.get("load") if isinstance(defaults, dict) else None
    fields = load.get("fields") if isinstance(load, dict) else None
    if not isinstance(fields, list) or not all(isinstance(field, dict) for field in fields):
        raise UserError(f"{path}: is not of the form that LM Studio writes", "move it away, or set the number there")
    return defaults


def set_experts(path: Path, defaults: dict, n: int) -> None:
    """Write `n` experts into `defaults`, which `read_defaults` found at `path`, and leave all else there."""
    fields = [field for field in defaults["load"]["fields"] if field.get("key") != NUM_EXPERTS]
    defaults["load"]["fields"] = [*fields, {"key": NUM_EXPERTS, "value": n}]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(defaults, indent=2).encode())
