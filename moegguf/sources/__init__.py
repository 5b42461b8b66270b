"""Where weights come from. `open_source` owns the reference grammar; nobody else takes a reference apart.

    demo:NAME              a member of the embedded family
    hf:org/name[@rev]      a model on the Hugging Face Hub; rev is a branch, a tag or a commit
    lora:ADAPTER[::SOURCE] a PEFT adapter (PATH, hf:org/name[@rev] or demo:NAME) merged into SOURCE, which is any other
                           reference; into the recipe's base without one
    ollama:NAME[:TAG]      a model of the local Ollama store
    lmstudio:PUBLISHER/MODEL[/FILE]  a model of LM Studio
    PATH                   a Hugging Face folder, or a .gguf file (any shard of a split one)

A path is relative to the folder of the recipe that names it, or to the working directory on the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.errors import UserError
from moegguf.tensor import Source

if TYPE_CHECKING:
    from moegguf.sources.hf import Checkpoint

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

    if target in demo.ADAPTERS:
        return _open_lora(f"demo:{target}::demo:base", ref, options)
    return open_folder(demo.folder(target), ref, ref, options.pre)


def _open_hub(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf.sources.hub import open_hub

    repo, _, revision = target.partition("@")
    return open_hub(repo, revision or "main", ref, stream=options.stream, pre=options.pre)


def _open_lora(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf.sources.lora import open_lora

    adapter, _, over = target.partition("::")
    if not over and options.base is None:
        raise UserError(f"{ref}: names no model that the adapter goes over", f"write lora:{adapter}::SOURCE")
    below = open_source(over, options) if over else open_source(options.base, replace(options, base=None))
    return open_lora(_adapter(adapter, ref, options), below)


def _open_ollama(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf.sources.ollama import open_ollama

    return open_ollama(target, ref)


def _open_lmstudio(target: str, ref: str, options: OpenOptions) -> Source:
    from moegguf.sources.lmstudio import open_lmstudio

    return open_lmstudio(target, ref)


def _adapter(adapter: str, ref: str, options: OpenOptions) -> Checkpoint:
    """The files that the ADAPTER of a reference names."""
    from moegguf import demo
    from moegguf.sources import lora

    scheme, _, target = adapter.partition(":")
    scheme = scheme.lower()
    if scheme == "hf":
        from moegguf.sources.hub import hub_checkpoint

        repo, _, revision = target.partition("@")
        return hub_checkpoint(repo, revision or "main", ref, stream=options.stream, small_files=lora.SMALL_FILES)
    if scheme == "demo":
        return lora.local_adapter(demo.adapter_folder(target), ref, adapter)
    path = options.folder / os.path.expanduser(adapter)  # noqa: PTH111 (as in _open_path)
    if not adapter or not path.is_dir():
        is_hub_like = re.fullmatch(r"[\w.-]+/[\w.-]+", adapter) is not None
        raise UserError(
            f"{ref}: no such folder (looked for {path}), expected a PEFT adapter",
            f"write lora:hf:{adapter} for the adapter on the Hugging Face Hub" if is_hub_like else "check the path",
        )
    return lora.local_adapter(path, ref, _label(path))


def _open_path(ref: str, options: OpenOptions) -> Source:
    path = options.folder / os.path.expanduser(ref)  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    if path.is_dir():
        from moegguf.sources.hf import open_folder

        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{ref}: is a PEFT adapter and no whole model", f"write lora:{ref}")
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


_OPENERS: dict[str, Callable[[str, str, OpenOptions], Source]] = {
    "demo": _open_demo,
    "hf": _open_hub,
    "lora": _open_lora,
    "ollama": _open_ollama,
    "lmstudio": _open_lmstudio,
}
