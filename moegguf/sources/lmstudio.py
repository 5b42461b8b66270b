"""A model of LM Studio as a Source: `lmstudio:PUBLISHER/MODEL[/FILE]`.

LM Studio keeps models as plain GGUF files, `PUBLISHER/MODEL/FILE.gguf` under a folder that its settings name. FILE may
be left out where the model is one file (or one that is split into shards), and its ending always. Vision projectors,
`mmproj-*`, do not count. Nothing there is ever written.

Source of the layout: lmstudio.ai/docs/app/basics/import-model.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from moegguf.errors import UserError
from moegguf.gguf_header import SHARD
from moegguf.sources.gguf_file import open_gguf
from moegguf.stores import is_folder, lmstudio_folders
from moegguf.tensor import Source

_PART = re.compile(r"(?!\.)[^/\\:\0]+")


def open_lmstudio(target: str, ref: str) -> Source:
    """The model `target`. Raises UserError when there is no such file, or more than one that it could be."""
    path = _find(target, ref)
    return open_gguf(path, ref, f"lmstudio:{'/'.join(path.parts[-3:])}")


def _find(target: str, ref: str) -> Path:
    parts = target.split("/")
    if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
        raise UserError(
            f"{ref}: {target!r} is no name of a model in LM Studio", "write lmstudio:PUBLISHER/MODEL or …/MODEL/FILE"
        )
    folders = [folder for folder in lmstudio_folders() if is_folder(folder)]
    if not folders:
        looked = " and ".join(map(str, lmstudio_folders()))
        raise UserError(
            f"{ref}: LM Studio has no models folder here (looked for {looked})", "give the path of the file"
        )
    for folder in folders:
        if is_folder(folder / parts[0] / parts[1]):
            return _pick(folder / parts[0] / parts[1], parts[2:], ref)
    known = [path.relative_to(folder).as_posix() for folder in folders for path in sorted(folder.glob("*/*/"))]
    message = f"{ref}: there is no {parts[0]}/{parts[1]} in {' and '.join(map(str, folders))}"
    if like := difflib.get_close_matches("/".join(parts[:2]), known, n=5, cutoff=0.4):
        raise UserError(f"{message}, but {', '.join(like)}", "name one of these")
    raise UserError(message, "download it in LM Studio, or give the path of a file")


def _pick(folder: Path, file: list[str], ref: str) -> Path:
    """The GGUF file in `folder`, of which several shards are one."""
    models = {path.name.removesuffix(".gguf"): path for path in sorted(folder.glob("*.gguf")) if _is_model(path)}
    names = ", ".join(models) or "none"
    if file:
        name = file[0].removesuffix(".gguf")
        if name not in models:
            raise UserError(f"{ref}: {folder} has no {name}.gguf; its models are: {names}", "name one of these")
        return models[name]
    if len(models) != 1:
        mend = "add the file's name, as in lmstudio:PUBLISHER/MODEL/FILE" if models else "download it in LM Studio"
        raise UserError(f"{ref}: expected one GGUF in {folder}, found {len(models)}: {names}", mend)
    return next(iter(models.values()))


def _is_model(path: Path) -> bool:
    shard = SHARD.fullmatch(path.name)
    return not path.name.startswith("mmproj") and (shard is None or int(shard["number"]) == 1)
