"""What the README.md of a model folder says of its licence and its languages, as GGUF keys.

The Hub's front matter: YAML between two lines of `---`. A card that cannot be read says nothing: it is written by hand,
and no weight depends on it.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from gguf import GGUFValue, GGUFValueType, Keys

from moegguf.tensor import Metadata

README = "README.md"
LICENSE_KEYS = {
    "license": Keys.General.LICENSE,
    "license_name": Keys.General.LICENSE_NAME,
    "license_link": Keys.General.LICENSE_LINK,
}
MAX_BYTES = 1 << 20


def read_model_card(folder: Path) -> Metadata:
    """`general.license*` and `general.languages` from the README.md in `folder`; empty where it says nothing."""
    front = _front_matter(folder / README)
    found: Metadata = {
        key: GGUFValue(front[name], GGUFValueType.STRING)
        for name, key in LICENSE_KEYS.items()
        if isinstance(front.get(name), str) and front[name]
    }
    languages = front.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and languages and all(isinstance(each, str) for each in languages):
        found[Keys.General.LANGUAGES] = GGUFValue(languages, GGUFValueType.ARRAY, GGUFValueType.STRING)
    return found


def _front_matter(path: Path) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(MAX_BYTES).splitlines()
        end = lines.index("---", 1) if lines[:1] == ["---"] else 0
        content = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
