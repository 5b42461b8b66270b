"""The embedded family: a tiny base model and three experts of it, shipped as ordinary Hugging Face folders.

Purpose: `demo:name` sources, the tests and the quality figures work offline on real fine-tunes. `text` makes
the family's questions, `train` made its weights (and is not needed to use them); `models/family.json` says
with which settings and how well each member answers.
"""

from __future__ import annotations

from pathlib import Path

from moegguf.errors import UserError

MEMBERS = ("base", "math", "clinic", "strings")
MODELS = Path(__file__).parent / "models"


def folder(name: str) -> Path:
    """The Hugging Face folder of one of `MEMBERS`. Raises UserError for any other name."""
    if name not in MEMBERS:
        raise UserError(f"the demo family has no member {name!r}", f"choose one of {', '.join(MEMBERS)}")
    return MODELS / name
