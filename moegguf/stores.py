"""Where other programs keep models on this machine: the Hugging Face cache, Ollama, LM Studio. And where we do.

Only looks; what is in a store is for those who open it. What a program's settings say comes first, then the places
where it keeps models by default, whether they exist or not.

Sources: ollama, envconfig/config.go; lmstudio.js, packages/lms-common-server/src/findLMStudioHome.ts; lms,
src/subcommands/importCmd.ts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Store:
    """A place where another program keeps models."""

    name: str
    path: str
    models: int


def stores() -> Iterator[Store]:
    """The model stores that are on this machine, and how many models are in each."""
    places = [("Hugging Face cache", hub_cache(), "models--*")]
    places += [("Ollama", folder, "manifests/*/*/*/*") for folder in ollama_folders()]
    places += [("LM Studio", folder, "*/*/*.gguf") for folder in lmstudio_folders()]
    for name, path, pattern in places:
        if is_folder(path):
            yield Store(name, str(path), sum(1 for _ in path.glob(pattern)))


def hub_cache() -> Path:
    """Where huggingface_hub keeps models."""
    env = os.environ
    hf_home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(env.get("HF_HUB_CACHE") or hf_home / "hub")


def ollama_folders() -> list[Path]:
    """Where Ollama may keep models: only OLLAMA_MODELS where that is set; else this user's, then Linux's service's."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [Path(named)]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def lmstudio_home() -> Path:
    """The folder in which LM Studio keeps everything: what its pointer file names, else the old place, else the new."""
    try:
        if pointed := (Path.home() / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip():
            return Path(pointed)
    except (OSError, ValueError):
        pass
    old = Path.home() / ".cache" / "lm-studio"
    return old if is_folder(old) else Path.home() / ".lmstudio"


def lmstudio_folder() -> Path:
    """The models folder of LM Studio: `downloadsFolder` of its settings, else `models` in its home."""
    home = lmstudio_home()
    try:
        settings = json.loads((home / "settings.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        settings = None
    named = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return Path(named) if isinstance(named, str) and named else home / "models"


def lmstudio_folders() -> list[Path]:
    """Where LM Studio may keep models: the folder of its settings, then where older and newer versions had them."""
    defaults = [lmstudio_home(), Path.home() / ".lmstudio", Path.home() / ".cache" / "lm-studio"]
    return list(dict.fromkeys([lmstudio_folder(), *(home / "models" for home in defaults)]))


def cache_folder(command: str) -> Path:
    """Where a command of ours keeps what it can work out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moegguf" / command


def is_folder(path: Path) -> bool:
    """Whether it is a folder that we may look at. Never raises, as pathlib does for what is not ours to see."""
    return os.path.isdir(path)  # noqa: PTH112
