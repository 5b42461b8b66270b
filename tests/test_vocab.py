"""Tokenizers: the keys are the converter's, and stock llama.cpp tokenises with them as the original library does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import llama_cpp
import pytest
from gguf import GGUFWriter
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import converter_fixtures
from moegguf.errors import UserError
from moegguf.sources import pretokenizer
from moegguf.sources.pretokenizer import DIGIT, DIGITS, GPT2, NAMES, RULES, Rule
from moegguf.sources.vocab import read_vocab
from moegguf.tensor import Metadata
from tiny_models import FIXTURES, KINDS, write_json

TEXTS = (
    "Hello world",
    "I've been told he's there, 'RE you sure? 'M not sure I'll make it. We'Ve a'lL",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nthe end   ",
    "🚀 (normal) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 3.3 3..3 3...3",
    "HTTPServer camelCase ABCdef a1b2c3 12ab 1,234,567.89 $100 50% #tag @user http://x.y/z?a=b&c=d",
    "我们在这里学习中文和数学。日本語のテスト、漢字かな交じり。한국어 테스트입니다.",
    "x = {'a': 1}\r\nif x:\r\n\tpass  # done\n",
    "Der Fluss fließt über die Brücke; Le café était fermé. Мы живём здесь. αβγ ½ ² Ⅷ ①",
    "def add(first, second):\n    return first + second\n\n",
    "a   123    4  l'dessus 'rest; a += b == c; x <= y && z || w",
    "नमस्ते हिन्दी, مرحبا بالعالم, สวัสดี",
    "measure zebra MoE qxjv a zebra measures",
    " \n",
    "...!!!???",
    "  leading,   inner and trailing   ",
)


def tokenizer_folder(name: str) -> Path:
    return FIXTURES / "tokenizers" / name


def read_tiny_vocab(kind: str) -> Metadata:
    return read_vocab(tokenizer_folder(KINDS[kind].tokenizer), KINDS[kind].config["vocab_size"])


def load(path: Path, vocab: Metadata) -> llama_cpp.Llama:
    """Stock llama.cpp with a file of nothing but `vocab`."""
    writer = GGUFWriter(path, "llama")
    for key, value in vocab.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def encode(model: llama_cpp.Llama, text: str, **options: bool) -> list[int]:
    return model.tokenize(text.encode(), **{"add_bos": False, **options})


# The keys


@pytest.mark.parametrize("model", converter_fixtures.MODELS)
def test_every_key_and_type_is_the_converters(model, tmp_path):
    expected = converter_fixtures.converter_fixture(model, "bf16").metadata
    folder = converter_fixtures.write_source(tmp_path, model)
    vocab = converter_fixtures.stored(read_vocab(folder, expected["llama.vocab_size"].value))
    assert vocab == {key: value for key, value in expected.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize(
    ("vocab_size", "key", "value"),
    [(32016, "eot_token_id", 32010), (49152, "add_bos_token", False)],
)
def test_code_llama_and_granite_are_known_by_their_vocabulary_size(vocab_size, key, value):
    assert read_vocab(tokenizer_folder("llama3"), vocab_size)[f"tokenizer.ggml.{key}"].value == value


def edited(tmp_path: Path, name: str, file: str, **changes: object) -> Path:
    """A copy of a tokenizer folder with top-level entries of one JSON file changed; None removes an entry."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder(name), folder, dirs_exist_ok=True)
    path = folder / file
    content = (json.loads(path.read_text("utf-8")) if path.exists() else {}) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})
    return folder


def test_named_chat_templates_get_keys_of_their_own(tmp_path):
    templates = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
    vocab = read_vocab(edited(tmp_path, "llama3", "tokenizer_config.json", chat_template=templates), 410)
    assert vocab["tokenizer.chat_template"].value == "D"
    assert vocab["tokenizer.chat_template.tool_use"].value == "T"
    assert vocab["tokenizer.chat_templates"].value == ["tool_use"]


def test_a_post_processor_that_ends_with_a_token_makes_it_eos_and_the_old_one_eot(tmp_path):
    special, text = {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [text, special],
        "pair": [text, special, {"Sequence": {"id": "B", "type_id": 1}}, special],
        "special_tokens": {"<|end_of_text|>": {"id": "<|end_of_text|>", "ids": [405], "tokens": ["<|end_of_text|>"]}},
    }
    vocab = read_vocab(edited(tmp_path, "llama3", "tokenizer.json", post_processor=template), 410)
    flags = {key: vocab[f"tokenizer.ggml.{key}"].value for key in ("eos_token_id", "eot_token_id", "add_eos_token")}
    assert flags == {"eos_token_id": 405, "eot_token_id": 409, "add_eos_token": True}
    assert "tokenizer.ggml.add_bos_token" not in vocab


def test_tokens_declared_in_tokenizer_config_alone_are_in_the_vocabulary(tmp_path):
    declared = {"384": {"content": "<|new|>", "special": False}, "385": {"content": "plain", "special": False}}
    vocab = read_vocab(edited(tmp_path, "qwen2", "tokenizer_config.json", added_tokens_decoder=declared), 386)
    tokens, types = (vocab[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    assert list(zip(tokens, types, strict=True))[-2:] == [("<|new|>", 3), ("plain", 4)]


# What the keys do in llama.cpp


@pytest.mark.parametrize("kind", ["llama3_like", "tied", "yarn"])
def test_bpe_tokenises_as_the_tokenizers_library(kind, tmp_path):
    original = Tokenizer.from_file(str(tokenizer_folder(KINDS[kind].tokenizer) / "tokenizer.json"))
    model = load(tmp_path / "v.gguf", read_tiny_vocab(kind))
    special = " and ".join(token.content for token in original.get_added_tokens_decoder().values())
    for text in (*TEXTS, special):
        expected = original.encode(text).ids
        assert encode(model, text, add_bos=True, special=True) == expected, text


@pytest.mark.parametrize("kind", ["mistral_v1", "sentencepiece"])
def test_sentencepiece_tokenises_as_the_sentencepiece_library(kind, tmp_path):
    path = tokenizer_folder(KINDS[kind].tokenizer) / "tokenizer.model"
    original = SentencePieceProcessor(model_file=str(path))
    model = load(tmp_path / "v.gguf", read_tiny_vocab(kind))
    for text in TEXTS:
        assert encode(model, text) == original.EncodeAsIds(text), text
    assert encode(model, TEXTS[0], add_bos=True) == [1, *original.EncodeAsIds(TEXTS[0])]


def test_added_tokens_of_a_sentencepiece_vocabulary_are_found_in_text(tmp_path):
    model = load(tmp_path / "v.gguf", read_tiny_vocab("sentencepiece"))
    assert encode(model, "<|im_start|><note> two words<|im_end|>", special=True)[-4:] == [460, 462, 463, 461]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_llama_cpp_knows_every_name_that_pre_accepts(name, tmp_path):
    vocab = read_vocab(tokenizer_folder("llama3"), 410, pre=name)
    assert vocab["tokenizer.ggml.pre"].value == name
    load(tmp_path / "v.gguf", vocab).close()


# The splitting rules


SAME_WORDS_ONLY = ("deepseek-llm", "falcon")
"""These differ from llama.cpp in cuts that no token spans in a vocabulary trained under the rule."""

BY_ASCII_CASE = ("tekken", "gpt-4o")
"""llama.cpp tells capitals from small letters in ASCII only."""


UNREACHABLE = "zqxv"
"""A token that no merge makes: it is found only where merges are ignored for words that are tokens."""


def pre_tokenizer_of(rule: Rule) -> dict:
    """The rule as tokenizer.json has it."""
    steps = [step for split in rule.splits for step in _steps_of(split)]
    if GPT2 not in rule.splits:
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": steps}


def _steps_of(split: str) -> list[dict]:
    if split == GPT2:
        return [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    if split in (DIGIT, DIGITS):
        return [{"type": "Digits", "individual_digits": split == DIGIT}]
    if split.startswith("{"):
        return [json.loads(split)]
    return [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}]


def train(pre_tokenizer: dict | None, texts: tuple[str, ...]) -> dict:
    """tokenizer.json of a byte-level BPE; without a pre-tokenizer its tokens span words, so that every cut shows."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = json.loads(Tokenizer(models.BPE()).to_str())
    tokenizer = Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": pre_tokenizer or byte_level}))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, max_token_length=8, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_splitting_rule_gets_the_pre_tokenizer_that_cuts_alike(rule, tmp_path):
    texts = [text for text in TEXTS if text.isascii() or rule.name not in BY_ASCII_CASE]
    pre_tokenizer = pre_tokenizer_of(rule)
    content = train(pre_tokenizer if rule.name in SAME_WORDS_ONLY else None, (*TEXTS, *TEXTS))
    content |= {"pre_tokenizer": pre_tokenizer}
    content["model"]["ignore_merges"] = rule.ignore_merges
    content["model"]["vocab"][UNREACHABLE] = len(content["model"]["vocab"])
    write_json(tmp_path / "tokenizer.json", content)
    vocab = read_vocab(tmp_path, len(content["model"]["vocab"]))
    assert vocab["tokenizer.ggml.pre"].value == rule.name
    original, model = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load(tmp_path / "v.gguf", vocab)
    for text in (UNREACHABLE, *texts, *map("".join, zip(texts, reversed(texts), strict=True))):
        assert encode(model, text) == original.encode(text).ids, text


def with_split(**changes: object) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pretokenizer.QWEN2}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split | changes, byte_level]}


def test_a_rule_is_recognised_in_its_other_spellings(tmp_path):
    nested = {"type": "Sequence", "pretokenizers": [with_split(behavior="Removed", invert=True)]}
    folder = edited(tmp_path, "qwen2", "tokenizer.json", pre_tokenizer=nested, normalizer=None)
    assert read_vocab(folder, 392)["tokenizer.ggml.pre"].value == "qwen2"


def test_ignore_merges_does_not_matter_when_merges_reach_every_token(tmp_path):
    model = json.loads((tokenizer_folder("qwen2") / "tokenizer.json").read_text("utf-8"))["model"]
    folder = edited(tmp_path, "qwen2", "tokenizer.json", model=model | {"ignore_merges": True})
    assert read_vocab(folder, 392)["tokenizer.ggml.pre"].value == "qwen2"
    model["vocab"]["qxjv"] = 380
    folder = edited(tmp_path, "qwen2", "tokenizer.json", model=model | {"ignore_merges": True}, added_tokens=[])
    with pytest.raises(UserError, match=r"ignore_merges true .qwen2 does the opposite.*--pre NAME"):
        read_vocab(folder, 392)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre_tokenizer": with_split(pattern={"Regex": r"\w+"})}, r"the rule \w+"),
        ({"pre_tokenizer": with_split(behavior="MergedWithNext")}, '"behavior": "MergedWithNext"'),
        ({"pre_tokenizer": with_split()["pretokenizers"][0]}, "no ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, '{"type": "Lowercase"}'),
    ],
)
def test_an_unknown_rule_is_named_and_pre_is_the_way_out(changes, named, tmp_path):
    folder = edited(tmp_path, "qwen2", "tokenizer.json", **changes)
    with pytest.raises(UserError) as error:
        read_vocab(folder, 392)
    assert named in error.value.message
    assert "--pre NAME" in error.value.mend
    assert read_vocab(folder, 392, pre="qwen2")["tokenizer.ggml.pre"].value == "qwen2"


# Bad input


def test_an_unknown_pre_tokenizer_name_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match=r"--pre qwen-2: .* qwen2, qwen35,"):
        read_vocab(tokenizer_folder("qwen2"), 392, pre="qwen-2")


@pytest.mark.parametrize("name", ["spm", "spm_fast"])
def test_a_pre_tokenizer_for_sentencepiece_is_refused(name):
    with pytest.raises(UserError, match=r"--pre qwen2: .* SentencePiece"):
        read_vocab(tokenizer_folder(name), 470, pre="qwen2")


def word_piece() -> dict:
    return json.loads(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str())


def unigram() -> dict:
    return json.loads(Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0)).to_str())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model is there"),
        ({"tekken.json": "{}"}, "tekken.json alone is not read"),
        ({"vocab.json": "{}"}, "vocab.json alone is not read"),
        ({"tokenizer.json": json.dumps(word_piece())}, "tokenizer.json: llama.cpp has no WordPiece"),
        ({"tokenizer.json": json.dumps(unigram())}, "tokenizer.json: llama.cpp has no Unigram"),
        ({"tokenizer.json": '{"version": '}, "tokenizer.json: not a readable tokenizer.json: EOF .* line 1 column 12"),
        ({"tokenizer.json": "[1]"}, "tokenizer.json: not a readable tokenizer.json"),
        ({"tokenizer_config.json": '{\n "a": ]'}, "tokenizer_config.json: broken JSON: .* line 2 column 7"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: a JSON object was expected, found list"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json: not UTF-8 at byte 0"),
        ({"tokenizer.model": b"no model"}, "tokenizer.model: not a readable SentencePiece model"),
        ({"tokenizer.model": b""}, "tokenizer.model: not a readable SentencePiece model"),
    ],
    ids=str,
)
def test_files_that_make_no_tokenizer_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_vocab(tmp_path, 400)


@pytest.mark.parametrize("declared", [["a"], {"x": {"content": "a"}}, {"1": "a"}, {"1": {"content": 5}}], ids=str)
def test_declared_tokens_of_the_wrong_form_are_refused(declared, tmp_path):
    folder = edited(tmp_path, "spm", "tokenizer_config.json", added_tokens_decoder=declared)
    with pytest.raises(UserError, match="added_tokens_decoder must map ids to descriptions"):
        read_vocab(folder, 466)


@pytest.mark.parametrize("name", ["llama3", "spm_fast"])
def test_tokens_without_an_embedding_row_are_refused(name):
    with pytest.raises(UserError, match=r"has id .*, but the model has 300 embedding rows"):
        read_vocab(tokenizer_folder(name), 300)


def test_a_token_with_two_ids_is_refused_because_llama_cpp_would_abort(tmp_path):
    declared = {"464": {"content": "<note>", "special": False}}
    folder = edited(tmp_path, "spm", "tokenizer_config.json", added_tokens_decoder=declared)
    with pytest.raises(UserError, match="token '<note>' has two ids, 462 and 464"):
        read_vocab(folder, 466)
