r"""Which of llama.cpp's pre-tokenizers splits text the way a tokenizer.json does.

A byte-level BPE first cuts text into words by regular expressions, and merges bytes only within a word. llama.cpp
has these rules built in under names (`tokenizer.ggml.pre`); tokenizer.json spells them out. `RULES` is the table
between the two, so a name is found for any vocabulary that uses a known rule: fine-tunes with added tokens and
home-made vocabularies too. (llama.cpp's converter instead looks up a hash of the ids that one text encodes to, which
only published vocabularies can match.) Where several names split alike, the table has one of them.

What a rule is here: the splits of the pre-tokenizer in order, where `Digits` is a split by \p{N} and `ByteLevel` with
`use_regex` one by GPT-2's pattern, and whether a word that is a token is taken whole (`ignore_merges`). The NFC
normalizer is let through although llama.cpp does not normalise, as its converter does; any other is an unknown rule.

The names and what they imply are in llama.cpp's src/llama-vocab.cpp; the tests hold every row against its tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from moegguf.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str) -> str:
    """Words that begin with capitals or are all capitals, each with `ending`."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    return f"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_cased('')}|\p{{N}}|{_REST_OR_PATH}"
GPT4O = rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_REST_OR_PATH}"
MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_REST}"
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = (
    f"{_CONTRACTIONS}|[^\r\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1}}"
    "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
DIGIT, DIGITS, UP_TO_3_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN, KANA_HAN = "[一-龥ࠀ-一가-퟿]+", "[一-龥぀-ゟ゠-ヿ]+"
LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ"
    "-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


@dataclass(frozen=True)
class Rule:
    """A pre-tokenizer of llama.cpp, and the splits of tokenizer.json that it stands for."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False


RULES = (
    Rule("gpt-2", (GPT2,)),  # openai-community/gpt2
    Rule("smollm", (DIGIT, GPT2)),  # HuggingFaceTB/SmolLM2-135M-Instruct, bigcode/starcoder2-3b
    Rule("llama-bpe", (LLAMA3,), ignore_merges=True),  # meta-llama/Llama-3.2-1B-Instruct
    Rule("smaug-bpe", (LLAMA3,)),  # abacusai/Smaug-Llama-3-70B-Instruct
    Rule("qwen2", (QWEN2,)),  # Qwen/Qwen3-0.6B
    Rule("qwen35", (QWEN35,)),  # Qwen/Qwen3.5-9B
    Rule("tekken", (TEKKEN,), ignore_merges=True),  # mistralai/Mistral-Nemo-Base-2407
    Rule("gpt-4o", (GPT4O,)),  # openai/gpt-oss-20b
    Rule("minicpm5", (UP_TO_3_DIGITS, MINICPM5), ignore_merges=True),  # openbmb/MiniCPM5-1B
    Rule("deepseek-llm", ("[\r\n]", rf"\s?[{LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN, DIGIT)),
    Rule("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, DIGIT)),
    Rule("deepseek-v3", (UP_TO_3_DIGITS, KANA_HAN, DEEPSEEK3)),  # deepseek-ai/DeepSeek-V3
    Rule("seed-coder", (SEED_CODER,)),  # ByteDance-Seed/Seed-Coder-8B-Base
    Rule("bailingmoe", (BAILING,)),  # inclusionAI/Ling-lite
    Rule("ufakzeka", (rf"{_WORD}|\p{{N}}|{_REST}",)),  # ufakai/ufakzeka-1
    Rule("bloom", (BLOOM,)),  # bigscience/bloom
    Rule("viking", (BLOOM, DIGIT)),  # LumiOpen/Viking-7B
    Rule("falcon", ('{"type": "Punctuation", "behavior": "Contiguous"}', GPT2, DIGITS, "[0-9][0-9][0-9]")),
)

NAMES = frozenset([
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell", "cohere2moe",
    "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3", "default", "exaone",
    "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "glm5",
    "gpt-2", "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m",
    "grok-2", "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en",
    "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna",
    "lfm2", "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2", "midm-2.0",
    "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "poro-chat", "qwen2",
    "qwen35", "refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "spark2_5",
    "stablelm2", "starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "ufakzeka", "viking",
    "whitespace", "youtu",
])  # fmt: skip
"""Every name that llama.cpp accepts as `tokenizer.ggml.pre`."""


def pre_tokenizer_name(tokenizer: dict, where: str) -> str:
    """The name of the pre-tokenizer that splits as `tokenizer`, the content of a tokenizer.json, does.

    `tokenizer` is as the `tokenizers` library writes it, so with no key left to its default. Raises UserError, which
    begins with `where`, when no rule of the table is the same.
    """
    splits = _splits(tokenizer)
    rules = [rule for rule in RULES if rule.splits == splits]
    ignore_merges = tokenizer["model"]["ignore_merges"]
    for rule in rules:
        if rule.ignore_merges == ignore_merges:
            return rule.name
    if rules and _merges_reach_every_token(tokenizer):
        return rules[0].name
    fault = f"no pre-tokenizer of llama.cpp is known to split by the rule {' then '.join(splits)}"
    if rules:
        fault += f" with ignore_merges {str(ignore_merges).lower()} ({rules[0].name} does the opposite)"
    raise UserError(f"{where}: {fault}", "if you know one that splits alike, name it with --pre NAME")


def _splits(tokenizer: dict) -> tuple[str, ...]:
    """The splits in order, as regular expressions; the JSON of a step stands for whatever is not a plain split."""
    steps = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    normalizers = [step for step in _steps(tokenizer.get("normalizer"), "normalizers") if step != {"type": "NFC"}]
    splits = [_json(step) for step in normalizers] + [split for step in steps if (split := _split(step))]
    if not any(step["type"] == "ByteLevel" for step in steps):
        splits.append("no ByteLevel")
    return tuple(splits)


def _steps(node: dict | None, members: str) -> Iterator[dict]:
    if node and node["type"] == "Sequence":
        for member in node[members]:
            yield from _steps(member, members)
    elif node:
        yield node


def _split(step: dict) -> str:
    match step:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            return regex
        case {"type": "Digits", "individual_digits": individual}:
            return DIGIT if individual else DIGITS
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2 if step.get("use_regex", True) else ""
    return _json(step)


def _json(step: dict) -> str:
    return json.dumps(step, ensure_ascii=False)


def _merges_reach_every_token(tokenizer: dict) -> bool:
    """Whether merging alone makes each token out of its own bytes: then `ignore_merges` makes no difference."""
    model = Tokenizer.from_str(json.dumps(tokenizer)).model
    model.ignore_merges = False
    added = {token["content"] for token in tokenizer["added_tokens"]}
    return all(len(model.tokenize(token)) == 1 for token in tokenizer["model"]["vocab"] if token not in added)
