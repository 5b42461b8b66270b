"""The tokenizer of a Hugging Face folder as `tokenizer.*` keys.

The keys, values and value types are those of llama.cpp's converter for Llama and Mistral models (conversion/base.py,
conversion/llama.py; `LlamaHfVocab` of its gguf package), read with `sentencepiece` and `tokenizers` alone. As there,
the first of these that the folder holds decides:

1. tokenizer.model: a SentencePiece vocabulary with its scores;
2. tokenizer.json with byte fallback: a SentencePiece vocabulary whose scores are lost (all -1000);
3. tokenizer.json with byte-level BPE: tokens and merges. Its pre-tokenizer comes from the splitting rule
   (pretokenizer.py) instead of the converter's table of hashes.

The token list has as many entries as the model has embedding rows, and no token twice: llama.cpp loads no other file.
Chat templates are copied, never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits

from gguf import GGUFValue, GGUFValueType, Keys, TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer

from moegguf.errors import UserError
from moegguf.sources.pretokenizer import NAMES, pre_tokenizer_name
from moegguf.sources.special_tokens import special_keys
from moegguf.sources.tokenizer_files import BROKEN, TokenizerFiles, open_tokenizer, read_json
from moegguf.tensor import Metadata


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary. Only SentencePiece vocabularies use the score."""

    text: str
    type: TokenType
    score: float = -1000.0


def read_vocab(folder: Path, vocab_size: int, pre: str | None = None) -> Metadata:
    """All `tokenizer.*` keys for the tokenizer files in `folder`.

    `vocab_size` is the number of embedding rows; `pre` names the pre-tokenizer of a byte-level BPE in place of the one
    that its splitting rule tells. Raises UserError when files are missing or broken, the kind of tokenizer has no
    counterpart in llama.cpp, the splitting rule is unknown, or tokens have no embedding row.
    """
    if pre is not None and pre not in NAMES:
        raise UserError(f"--pre {pre}: llama.cpp has no such pre-tokenizer", f"it has {', '.join(sorted(NAMES))}")
    files = TokenizerFiles.open(folder)
    keys = _vocabulary(files, vocab_size, pre) | special_keys(files, vocab_size) | _chat_templates(files)
    space_prefix = files.tokenizer_config.get("add_prefix_space")
    if space_prefix is not None:
        keys[Keys.Tokenizer.ADD_PREFIX] = GGUFValue(bool(space_prefix), GGUFValueType.BOOL)
    return keys


def _vocabulary(files: TokenizerFiles, vocab_size: int, pre: str | None) -> Metadata:
    if (files.folder / "tokenizer.model").is_file():
        return _sentencepiece_keys(files, _sentencepiece_tokens(files, vocab_size), pre)
    if not files.content:
        raise _no_tokenizer(files.folder)
    model, decoder = files.content["model"], files.content["decoder"] or {}
    if model["type"] != "BPE":
        raise UserError(
            f"{files.folder / 'tokenizer.json'}: llama.cpp has no {model['type']} tokenizer for Llama models",
            "give the folder the model's tokenizer.model, or a tokenizer.json of type BPE",
        )
    if model["byte_fallback"] and decoder.get("type") == "Sequence":
        return _sentencepiece_keys(files, _byte_fallback_tokens(files, vocab_size), pre)
    return _bpe_keys(files, _bpe_tokens(files, vocab_size), pre)


def _no_tokenizer(folder: Path) -> UserError:
    mend = "copy the tokenizer files of the original model into the folder"
    if (folder / "tekken.json").is_file():
        mend = "a tekken.json alone is not read: take the tokenizer.json of the model's Hugging Face form"
    elif (folder / "vocab.json").is_file():
        mend = "vocab.json alone is not read: save the tokenizer again with save_pretrained of a recent transformers"
    return UserError(f"{folder}: neither tokenizer.json nor tokenizer.model is there", mend)


def _sentencepiece_keys(files: TokenizerFiles, tokens: list[Token], pre: str | None) -> Metadata:
    if pre is not None:
        raise UserError(
            f"--pre {pre}: the tokenizer in {files.folder} is a SentencePiece one, which has no pre-tokenizer",
            "leave --pre out",
        )
    scores = _array([token.score for token in tokens], GGUFValueType.FLOAT32)
    return _token_keys(files, "llama", "default", tokens) | {Keys.Tokenizer.SCORES: scores}


def _bpe_keys(files: TokenizerFiles, tokens: list[Token], pre: str | None) -> Metadata:
    where = str(files.folder / "tokenizer.json")
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in files.content["model"]["merges"]]
    if not merges:
        raise UserError(f"{where}: the BPE has no merges", BROKEN)
    keys = _token_keys(files, "gpt2", pre or pre_tokenizer_name(files.content, where), tokens)
    return keys | {Keys.Tokenizer.MERGES: _array(merges, GGUFValueType.STRING)}


def _token_keys(files: TokenizerFiles, model: str, pre: str, tokens: list[Token]) -> Metadata:
    ids: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if ids.setdefault(token.text, id) != id:
            raise UserError(
                f"{files.folder}: token {token.text!r} has two ids, {ids[token.text]} and {id}, and "
                "llama.cpp loads no such vocabulary",
                "remove one of them from the tokenizer files",
            )
    return {
        Keys.Tokenizer.MODEL: GGUFValue(model, GGUFValueType.STRING),
        Keys.Tokenizer.PRE: GGUFValue(pre, GGUFValueType.STRING),
        Keys.Tokenizer.LIST: _array([token.text for token in tokens], GGUFValueType.STRING),
        Keys.Tokenizer.TOKEN_TYPE: _array([int(token.type) for token in tokens], GGUFValueType.INT32),
    }


def _sentencepiece_tokens(files: TokenizerFiles, vocab_size: int) -> list[Token]:
    """tokenizer.model, overlaid by added_tokens.json and then by tokenizer_config.json, as far as there are rows."""
    tokens = dict(enumerate(_pieces(files.folder / "tokenizer.model")))
    for text, id in read_json(files.folder / "added_tokens.json").items():
        if isinstance(id, int):
            tokens[id] = Token(text, TokenType.USER_DEFINED)
    for id, entry in files.declared_tokens.items():
        tokens[id] = _added(entry["content"], bool(entry.get("special")))
    return _padded(tokens, vocab_size)


def _pieces(path: Path) -> list[Token]:
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a readable SentencePiece model: {error}", BROKEN) from None
    kinds = (
        (model.IsUnknown, TokenType.UNKNOWN),
        (model.IsControl, TokenType.CONTROL),
        (model.IsUnused, TokenType.UNUSED),
        (model.IsByte, TokenType.BYTE),
    )

    def kind(id: int) -> TokenType:
        return next((type for is_kind, type in kinds if is_kind(id)), TokenType.NORMAL)

    return [Token(model.IdToPiece(id), kind(id), model.GetScore(id)) for id in range(model.GetPieceSize())]


def _byte_fallback_tokens(files: TokenizerFiles, vocab_size: int) -> list[Token]:
    """tokenizer.json with byte fallback. A token is special by its role, whatever flag it has."""
    tokenizer, specials = _as_transformers_opens(files), set(files.specials)
    n_base = tokenizer.get_vocab_size(with_added_tokens=False)

    def kind(text: str, id: int) -> TokenType:
        if text in specials:
            return TokenType.CONTROL
        if id >= n_base:
            return TokenType.USER_DEFINED
        return TokenType.BYTE if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) else TokenType.NORMAL

    tokens = {id: Token(text, kind(text, id)) for text, id in tokenizer.get_vocab().items()}
    return _padded(_within_rows(files, tokens, vocab_size), vocab_size)


def _bpe_tokens(files: TokenizerFiles, vocab_size: int) -> list[Token]:
    """tokenizer.json with byte-level BPE. A token that the normalizer leaves alone is stored as it decodes."""
    tokenizer = _as_transformers_opens(files)
    tokens = {id: Token(text, TokenType.NORMAL) for text, id in tokenizer.get_vocab().items()}
    for id, added in tokenizer.get_added_tokens_decoder().items():
        text = added.content
        if not added.normalized:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            text = tokenizer.decode(ids, skip_special_tokens=False)
        tokens[id] = _added(text, added.special)
    return _padded(_within_rows(files, tokens, vocab_size), vocab_size)


def _as_transformers_opens(files: TokenizerFiles) -> Tokenizer:
    """tokenizer.json with the tokens that tokenizer_config.json declares, and with special tokens flagged so."""
    tokenizer, specials = open_tokenizer(files.folder / "tokenizer.json"), files.specials
    for _, entry in sorted(files.declared_tokens.items()):
        flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
        special = bool(entry.get("special")) or entry["content"] in specials
        tokenizer.add_tokens([AddedToken(entry["content"], special=special, **flags)])
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([text for text in tokenizer.get_vocab() if text in specials and text not in added])
    return tokenizer


def _added(text: str, special: bool) -> Token:
    """An added token. Its spaces are real ones, unless it is a control token."""
    if special or _looks_special(text):
        return Token(text, TokenType.CONTROL)
    return Token(text.replace("▁", " "), TokenType.USER_DEFINED)


def _looks_special(text: str) -> bool:
    """Whether a token is a control token although nothing marks it so; the cases are llama.cpp's."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _within_rows(files: TokenizerFiles, tokens: dict[int, Token], vocab_size: int) -> dict[int, Token]:
    if (last := max(tokens, default=0)) >= vocab_size:
        raise UserError(
            f"{files.folder}: token {tokens[last].text!r} has id {last}, but the model has {vocab_size} embedding rows",
            "use the tokenizer files that belong to these weights",
        )
    return tokens


def _padded(tokens: dict[int, Token], vocab_size: int) -> list[Token]:
    """One token for each embedding row: a placeholder where there is none, and none past the last row."""
    return [tokens.get(id) or Token(f"[PAD{id}]", TokenType.UNUSED, -10000.0) for id in range(vocab_size)]


def _chat_templates(files: TokenizerFiles) -> Metadata:
    """`tokenizer.chat_template`, and further ones under their names."""
    by_name = {}
    for entry in files.chat_templates:
        match entry:
            case {"name": str(name), "template": str(template)}:
                by_name[_plain(name)] = GGUFValue(template, GGUFValueType.STRING)
    keys = {Keys.Tokenizer.CHAT_TEMPLATE: by_name.pop("default")} if "default" in by_name else {}
    if by_name:
        keys[Keys.Tokenizer.CHAT_TEMPLATES] = _array(sorted(by_name), GGUFValueType.STRING)
    return keys | {Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): value for name, value in by_name.items()}


def _plain(name: str) -> str:
    return "".join(c if c in ascii_letters + digits else "_" for c in name)


def _array(values: list, type: GGUFValueType) -> GGUFValue:
    return GGUFValue(values, GGUFValueType.ARRAY, type)
