"""Tiny GGUF files whose answers are known: real files for the real runtime, each in a few milliseconds.

Embeddings are one-hot and attention and FFNs add nothing, so the next token depends on the last one alone,
through the output matrix: a Markov chain that the test writes. The vocabulary is every byte, a few control
tokens and one word, so that a character of several bytes spans several tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFWriter, TokenType

from moegguf.metadata import Card, ExpertCard

CONTROL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|turn|>"]
N_BYTES = 256
N_VOCAB = N_BYTES + len(CONTROL) + 1
END = N_BYTES
ASSISTANT = N_BYTES + CONTROL.index("<|assistant|>")
WORD = N_VOCAB - 1
TURN = N_BYTES + CONTROL.index("<|turn|>")
N_EMBD, N_FF, HEAD = 320, 32, 64

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def saying(text: str, end: int = END) -> np.ndarray:
    """A chain that answers `text` and ends. Its bytes must all differ, as one token leads to one other."""
    tokens = list(text.encode())
    assert len(set(tokens)) == len(tokens)
    return _chain(zip([ASSISTANT, *tokens], [*tokens, end], strict=True))


def repeating(text: str) -> np.ndarray:
    """A chain that says `text` over and over, without end."""
    tokens = list(text.encode())
    return _chain([(ASSISTANT, tokens[0]), *zip(tokens, tokens[1:] + tokens[:1], strict=True)])


def babbling() -> np.ndarray:
    """A chain that picks among many letters, without end."""
    logits = np.full((N_VOCAB, N_VOCAB), -4.0, dtype=np.float32)
    logits[ord("a") : ord("z") + 1] = np.random.default_rng(0).normal(0, 0.05, (26, N_VOCAB))
    return logits


def card(*, router: str, k: int, names: tuple[str, ...], layout: str = "mixtral") -> Card:
    """The card of a mix of experts with these names."""
    experts = tuple(ExpertCard(name, f"hf:org/{name}", 1 / len(names), "F32") for name in names)
    return Card("tiny", "0.1.0", layout, router, k, "hf:org/base", "F32", experts)


def write_gguf(
    path: Path,
    chain: np.ndarray,
    *,
    template: str | None = TEMPLATE,
    arch: str = "llama",
    ctx: int = 256,
    card: Card | None = None,
    used: int | None = None,
    word: str = "th",
    extra: dict[str, GGUFValue] | None = None,
) -> Path:
    """Write a model of one layer that follows `chain`; with a card, as many stacked experts as it names."""
    writer = GGUFWriter(path, arch)
    writer.add_context_length(ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_EMBD // HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    _add_vocab(writer, word)
    if template is not None:
        writer.add_chat_template(template)
    n_expert = len(card.experts) if card and card.layout != "fused" else 0
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(card.k if used is None else used)
    for key, value in ((card.to_metadata() if card else {}) | (extra or {})).items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    for name, values in _tensors(chain, n_expert).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _chain(links) -> np.ndarray:
    """Output weights (next, last): each token leads to its link, all others to the end."""
    logits = np.zeros((N_VOCAB, N_VOCAB), dtype=np.float32)
    logits[END] = 1
    for last, following in links:
        logits[:, last] = 0
        logits[following, last] = 1
    return logits


def _tensors(chain: np.ndarray, n_expert: int) -> dict[str, np.ndarray]:
    """All weights. Normed one-hot embeddings have length sqrt(N_EMBD) = 18, so a link of 1 is all but certain."""
    noise = np.random.default_rng(1)
    square = (N_EMBD, N_EMBD)
    output = np.zeros((N_VOCAB, N_EMBD))
    output[:, :N_VOCAB] = chain
    stack, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
    tensors = {
        "token_embd.weight": np.eye(N_VOCAB, N_EMBD),
        "output_norm.weight": np.ones(N_EMBD),
        "output.weight": output,
        "blk.0.attn_norm.weight": np.ones(N_EMBD),
        "blk.0.ffn_norm.weight": np.ones(N_EMBD),
        "blk.0.attn_q.weight": noise.normal(size=square),
        "blk.0.attn_k.weight": noise.normal(size=square),
        "blk.0.attn_v.weight": noise.normal(size=square),
        "blk.0.attn_output.weight": np.zeros(square),
        f"blk.0.ffn_gate{suffix}.weight": noise.normal(size=(*stack, N_FF, N_EMBD)),
        f"blk.0.ffn_up{suffix}.weight": noise.normal(size=(*stack, N_FF, N_EMBD)),
        f"blk.0.ffn_down{suffix}.weight": np.zeros((*stack, N_EMBD, N_FF)),
    }
    return tensors | ({"blk.0.ffn_gate_inp.weight": np.zeros((n_expert, N_EMBD))} if n_expert else {})


def _add_vocab(writer: GGUFWriter, word: str) -> None:
    tokens = [*_byte_names(), *CONTROL, word]
    types = [TokenType.NORMAL] * N_BYTES + [TokenType.CONTROL] * len(CONTROL) + [TokenType.NORMAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)


def _byte_names() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
