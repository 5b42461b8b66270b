"""The embedded family: a tiny base model, three experts and three LoRA adapters of it, as Hugging Face folders.

Purpose: `demo:name` sources, the tests and the quality figures work offline on real fine-tunes. `text` makes
the family's questions, `train` made its weights (and is not needed to use them); `models/family.json` says
with which settings and how well each member answers.
"""

from __future__ import annotations

from pathlib import Path

from moegguf.errors import UserError

MEMBERS = ("base", "math", "clinic", "strings")
ADAPTERS = ("lora-math", "lora-clinic", "lora-strings")
MODELS = Path(__file__).parent / "models"


def folder(name: str) -> Path:
    """The Hugging Face folder of one of `MEMBERS`. Raises UserError for any other name."""
    return _one_of(MEMBERS, name, "member")


def adapter_folder(name: str) -> Path:
    """The PEFT folder of one of `ADAPTERS`. Raises UserError for any other name."""
    return _one_of(ADAPTERS, name, "adapter")


def _one_of(names: tuple[str, ...], name: str, kind: str) -> Path:
    if name not in names:
        raise UserError(f"the demo family has no {kind} {name!r}", f"choose one of {', '.join(names)}")
    return MODELS / name
