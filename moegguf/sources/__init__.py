"""Where weights come from. `open_source` owns the reference grammar; nobody else takes a reference apart.

    demo:NAME              a member of the embedded family
    hf:org/name[@rev]      a model on the Hugging Face Hub; rev is a branch, a tag or a commit
    PATH                   a Hugging Face folder, or a .gguf file (any shard of a split one)

A path is relative to the folder of the recipe that names it, or to the working directory on the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moegguf.errors import UserError
from moegguf.tensor import Source

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+-]+):(?P<target>.*)", re.DOTALL)  # one letter is a drive


@dataclass(frozen=True)
class OpenOptions:
    """How to open a source: `stream` reads Hub tensors by range instead of downloading files; `pre` overrides
    the BPE pre-tokenizer; `folder` is what paths are relative to."""

    folder: Path = Path()
    stream: bool = False
    pre: str | None = None
    base: str | None = None
    """What an adapter goes over, unless its reference says otherwise."""


def open_source(ref: str, options: OpenOptions = OpenOptions()) -> Source:
    """The model that `ref` names, lazily. Raises UserError when it does not exist or cannot be used."""
    if match := _SCHEME.fullmatch(ref):
        scheme, target = match["scheme"].lower(), match["target"]
        if scheme not in _OPENERS:
            raise UserError(
                f"{ref}: unknown kind of source {scheme!r}, expected one of {', '.join(_OPENERS)} or a path",
                "write ./ in front if this is a path",
            )
        return _OPENERS[scheme](target, ref, options)
    return _open_path(ref, options)


def _open_demo(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf import demo
    from moegguf.sources.hf import open_folder

    return open_folder(demo.folder(target), ref, ref, options.pre)


def _open_hub(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf.sources.hub import open_hub

    repo, _, revision = target.partition("@")
    return open_hub(repo, revision or "main", ref, stream=options.stream, pre=options.pre)


def _open_path(ref: str, options: OpenOptions) -> Source:
    path = options.folder / os.path.expanduser(ref)  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    if path.is_dir():
        from moegguf.sources.hf import open_folder

        return open_folder(path, ref, _label(path), options.pre)
    if path.is_file():
        from moegguf.sources.gguf_file import open_gguf

        return open_gguf(path, ref, _label(path))
    is_hub_like = re.fullmatch(r"[\w.-]+/[\w.-]+", ref) is not None
    raise UserError(
        f"{ref}: no such file or folder (looked for {path})",
        f"write hf:{ref} for the model on the Hugging Face Hub" if is_hub_like else "check the path",
    )


def _label(path: Path) -> str:
    """What a mix records of a local path: its last part, so that publishing a mix tells nothing about a disk."""
    return path.resolve().name


_OPENERS: dict[str, Callable[[str, str, OpenOptions], Source]] = {"demo": _open_demo, "hf": _open_hub}
