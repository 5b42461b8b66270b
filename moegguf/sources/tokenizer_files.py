"""The tokenizer files of a Hugging Face folder, opened and checked.

The one place that knows their names, and that turns a broken file into a UserError. tokenizer.json is opened by the
`tokenizers` library, which checks it in full; the other files are checked where they are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moegguf.errors import UserError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

BROKEN = "copy the tokenizer files of the original model again"

_LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")
"""What transformers' Llama tokenizers take for special when the files name nothing else."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files in `folder`. One that is not there reads as empty."""

    folder: Path
    config: dict
    """config.json"""
    tokenizer_config: dict
    """tokenizer_config.json"""
    content: dict
    """tokenizer.json as the `tokenizers` library writes it, so with no key left to its default."""

    @classmethod
    def open(cls, folder: Path) -> TokenizerFiles:
        """Raises UserError when a file is broken."""
        path = folder / "tokenizer.json"
        return cls(
            folder=folder,
            config=read_json(folder / "config.json"),
            tokenizer_config=read_json(folder / "tokenizer_config.json"),
            content=json.loads(open_tokenizer(path).to_str()) if path.is_file() else {},
        )

    @property
    def roles(self) -> dict[str, str]:
        """Role (one of ROLES) → the token that tokenizer_config.json gives it."""
        return _roles(self.tokenizer_config)

    @property
    def specials(self) -> list[str]:
        """The tokens that transformers takes for special: those with a role or in a list of further ones."""
        config = self.tokenizer_config
        if "added_tokens_decoder" not in config:
            config = config | read_json(self.folder / "special_tokens_map.json")
        further = [*_entries(config.get("additional_special_tokens")), *_entries(config.get("extra_special_tokens"))]
        is_llama = str(config.get("tokenizer_class") or "Llama").startswith("Llama")
        texts = [*_roles(config).values(), *map(_text, further), *(_LLAMA_SPECIALS if is_llama else ())]
        return list(dict.fromkeys(text for text in texts if text))

    @property
    def declared_tokens(self) -> dict[int, dict]:
        """`added_tokens_decoder` of tokenizer_config.json: id → description with the token as `content`."""
        declared = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not (isinstance(declared, dict) and all(map(_is_declared_token, declared.items()))):
            where = f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder"
            raise UserError(f"{where} must map ids to descriptions of tokens", BROKEN)
        return {int(id): entry for id, entry in declared.items()}

    @property
    def chat_templates(self) -> list:
        """Objects with `name` and `template`; the one that is used by itself is called default."""
        templates = self.tokenizer_config.get("chat_template")
        if templates is None:
            templates = _template_file(self.folder)
        return [{"name": "default", "template": templates}] if isinstance(templates, str) else _entries(templates)


def open_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError when the file is no tokenizer.json."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path}: not a readable tokenizer.json: {error}", BROKEN) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty when there is no such file. Raises UserError when it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {error}", BROKEN) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, found {type(value).__name__}", BROKEN)
    return value


def _template_file(folder: Path) -> object:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return read_json(folder / "chat_template.json").get("chat_template")
    template = _read_text(path)
    further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not further:
        return template
    named = [{"name": path.stem, "template": _read_text(path)} for path in further]
    return [{"name": "default", "template": template}, *named]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", BROKEN) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the file and its permissions") from None


def _roles(config: dict) -> dict[str, str]:
    return {role: text for role in ROLES if (text := _text(config.get(f"{role}_token")))}


def _entries(listed: object) -> list:
    """The items of a list, or the values of an object."""
    if isinstance(listed, dict):
        return list(listed.values())
    return listed if isinstance(listed, list) else []


def _text(entry: object) -> str | None:
    """The text of a token that is given plainly or as an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _is_declared_token(item: tuple[str, object]) -> bool:
    id, entry = item
    return id.isdecimal() and isinstance(entry, dict) and _text(entry) is not None
