"""Ids of the special tokens, and which of them are added around a text.

A role (bos, eos, ...) gets its token from tokenizer_config.json, then from the post-processor of tokenizer.json; the
token gets its id from tokenizer.json's added tokens, and failing that the role gets it from config.json. Whether a
token is added follows the post-processor, then tokenizer_config.json. So llama.cpp's converter does it (`SpecialVocab`
in its gguf-py/gguf/vocab.py); the published gguf package is older and differs in the flags.

Post-processors are read for what they put first, last and between two texts, not run.
"""

from __future__ import annotations

from gguf import GGUFValue, GGUFValueType, Keys

from moegguf.sources.tokenizer_files import TokenizerFiles
from moegguf.tensor import Metadata

IDS = {
    "bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID, "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID, "pad": Keys.Tokenizer.PAD_ID, "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
}  # fmt: skip
FLAGS = {"bos": Keys.Tokenizer.ADD_BOS, "eos": Keys.Tokenizer.ADD_EOS, "sep": Keys.Tokenizer.ADD_SEP}

CODE_LLAMA_VOCAB_SIZE, CODE_LLAMA_EOT = 32016, 32010
GRANITE_VOCAB_SIZE = 49152
"""Models that are known by these sizes: their files leave out the EOT id, and that no BOS is added."""

Roles = dict[str, str]
Adds = dict[str, bool]


def special_keys(files: TokenizerFiles, vocab_size: int) -> Metadata:
    """The keys `tokenizer.ggml.*_token_id` and `tokenizer.ggml.add_*_token`; ids past `vocab_size` are left out."""
    roles, adds = _roles_and_adds(files)
    id_of = {token["content"]: token["id"] for token in files.content.get("added_tokens", ())}
    ids = {key: id_of.get(roles.get(role), files.config.get(f"{role}_token_id")) for role, key in IDS.items()}
    if vocab_size == CODE_LLAMA_VOCAB_SIZE:
        ids[Keys.Tokenizer.EOT_ID] = CODE_LLAMA_EOT
    if vocab_size == GRANITE_VOCAB_SIZE:
        adds["bos"] = False
    return {
        key: GGUFValue(id, GGUFValueType.UINT32)
        for key, id in ids.items()
        if isinstance(id, int) and 0 <= id < vocab_size
    } | {FLAGS[role]: GGUFValue(add, GGUFValueType.BOOL) for role, add in adds.items()}


def _roles_and_adds(files: TokenizerFiles) -> tuple[Roles, Adds]:
    roles = files.roles
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if stand_in in roles:
            roles.setdefault(role, roles[stand_in])
    adds: Adds = {}
    post_processor = files.content.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor]):
        match step.get("type"):
            case "ByteLevel":
                adds = {"bos": False, "eos": False} | adds
            case "RobertaProcessing":
                adds |= {"bos": True, "eos": True, "sep": True}
                roles = {"cls": step["cls"][0], "sep": step["sep"][0]} | roles
            case "TemplateProcessing":
                _read_template(step["single"], step["pair"], roles, adds)
    for role in FLAGS:
        declared = files.tokenizer_config.get(f"add_{role}_token")
        if isinstance(declared, bool):
            adds.setdefault(role, declared)
    return roles, adds


def _read_template(single: list[dict], pair: list[dict], roles: Roles, adds: Adds) -> None:
    """Adds to `roles` and `adds` what a template puts first, last and between: `single` is one text's, `pair` two's."""
    first, last = (_special(single[0]), _special(single[-1])) if len(single) > 1 else (None, None)
    if first:
        adds["bos"] = first in (roles.setdefault("bos", first), roles.setdefault("cls", first))
    if last:
        if roles.get("eos", last) != last:
            roles["eot"] = roles["eos"]
        roles["eos"] = last
        adds["eos"] = True
    if first and pair and _special(pair[0]) == first:
        pair = pair[1:]
    if last and pair and _special(pair[-1]) == last:
        pair = pair[:-1]
    if len(pair) > 2 and (_text(pair[0]), _text(pair[-1])) == ("A", "B"):
        ends = (roles.get("sep"), roles.get("eos"))
        between = [_special(piece) in ends for piece in pair[1:-1]]
        adds["sep"] = (between[0] and not last) or between[1:] == [True]
        if adds["sep"] and "eos" in roles:
            roles.setdefault("sep", roles["eos"])


def _special(piece: dict) -> str | None:
    return piece.get("SpecialToken", {}).get("id")


def _text(piece: dict) -> str | None:
    return piece.get("Sequence", {}).get("id")
