#!/usr/bin/env python3
"""Writes Hugging Face model folders of any shape: inputs for measurements, where only sizes matter.

A base, and fine-tunes of it that differ in their FFNs alone. Weights are bf16, normal with standard deviation 0.02,
all cut from one pool of random numbers that is used over and over, so that writing is as fast as the disk. Its length
is a prime: no two tensors hold the same numbers at the same places. An expert's FFNs are cut at the base's places
from the base's pool plus a tenth of noise. The same arguments give the same bytes.

The tokenizer is one of the tests' fixtures, padded to the wanted size by `vocab_size`; what these models say means
nothing.

    scripts/generate_models.py FOLDER --shape 1.1B --experts 4
    scripts/generate_models.py FOLDER --shape 1.1B,layers=6,vocab=8192
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tokenizers" / "spm_both"
POOL_WEIGHTS = 16_777_213  # the largest prime below 2^24
STD, DRIFT = 0.02, 0.1


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model with untied embeddings."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def n_weights(self) -> int:
        return sum(prod(shape) for shape in tensor_shapes(self).values())


SHAPES = {
    "tiny": Shape(hidden=256, ffn=512, layers=2, heads=4, kv_heads=2, vocab=512),
    "0.1B": Shape(hidden=768, ffn=2048, layers=12, heads=12, kv_heads=4, vocab=8192),
    "0.3B": Shape(hidden=1024, ffn=2816, layers=20, heads=16, kv_heads=4, vocab=32000),
    "1.1B": Shape(hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4, vocab=32000),  # TinyLlama
    "7B": Shape(hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocab=32000),  # Mistral
}

SHAPE_HELP = f"one of {', '.join(SHAPES)}, and sizes that differ from it: 1.1B,layers=6,ffn=4096"


def parse_shape(text: str) -> Shape:
    """`NAME[,SIZE=NUMBER …]`, for argparse."""
    name, *changes = text.split(",")
    try:
        shape = replace(SHAPES[name], **{key: int(value) for key, value in (change.split("=") for change in changes)})
    except (KeyError, TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {SHAPE_HELP}") from None
    if min(asdict(shape).values()) < 1 or shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: hidden must be a multiple of 2·heads, heads one of kv_heads")
    return shape


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """HF tensor name → shape (rows, columns)."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": dims for name, dims in {
            "input_layernorm": (shape.hidden,),
            "self_attn.q_proj": (shape.hidden, shape.hidden),
            "self_attn.k_proj": (kv, shape.hidden),
            "self_attn.v_proj": (kv, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.hidden),
            "post_attention_layernorm": (shape.hidden,),
            "mlp.gate_proj": (shape.ffn, shape.hidden),
            "mlp.up_proj": (shape.ffn, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.ffn),
        }.items()}  # fmt: skip
    return shapes | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def generate(folder: Path, shape: Shape, n_experts: int) -> None:
    """Writes folder/base and folder/expert1 … folder/expertN."""
    import numpy as np

    random = np.random.default_rng(0)
    base = random.standard_normal(POOL_WEIGHTS, np.float32) * np.float32(STD)
    for i in range(n_experts + 1):
        noise = random.standard_normal(POOL_WEIGHTS, np.float32) * np.float32(STD * DRIFT) if i else np.float32(0)
        model = folder / (f"expert{i}" if i else "base")
        shutil.copytree(TOKENIZER, model, dirs_exist_ok=True)
        (model / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
        _write_weights(model / "model.safetensors", shape, _bf16(base), _bf16(base + noise))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _bf16(values):
    """float32 → uint16, rounded to nearest even."""
    bits = values.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_weights(path: Path, shape: Shape, trunk, ffn) -> None:
    """A safetensors file with norms of one, FFNs cut from the pool `ffn` and all else from the pool `trunk`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensor_shapes(shape).items():
        start, end = end, end + 2 * prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    position = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in tensor_shapes(shape).items():
            if len(dims) == 1:
                file.write(b"\x80\x3f" * dims[0])
                continue
            for piece in _cut(ffn if ".mlp." in name else trunk, position, prod(dims)):
                file.write(piece)
            position += prod(dims)


def _cut(pool, position: int, n: int) -> Iterator[memoryview]:
    """`n` weights from `position` of the endless repetition of `pool`."""
    while n:
        start = position % len(pool)
        piece = pool[start : start + n]
        yield piece.data
        position, n = position + len(piece), n - len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to put base, expert1, expert2 … into")
    parser.add_argument("--shape", type=parse_shape, default="1.1B", help=f"{SHAPE_HELP} (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=4, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    generate(options.folder, options.shape, options.experts)


if __name__ == "__main__":
    main()
