"""Tiny Hugging Face model folders, written from seeds: the real inputs of the tests.

`write_model` writes config.json, safetensors (single or sharded) and tokenizer files of one kind, and
`write_expert` a fine-tune of it. The same arguments give the same bytes, on every machine. Weights are
random but scaled like a trained network's, so that every tensor moves the logits. Only numpy is needed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"

DEFAULTS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_cache": True,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0}


@dataclass(frozen=True)
class Kind:
    """What sets a kind of model apart: its changes to `DEFAULTS` and its folder in fixtures/tokenizers."""

    tokenizer: str
    config: Mapping[str, object]


KINDS = {
    "llama3_like": Kind(
        "llama3",
        {
            "vocab_size": 410,
            "bos_token_id": 404,
            "eos_token_id": [405, 409],
            "rope_theta": 500000.0,
            "max_position_embeddings": 1024,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral_like": Kind(
        "spm_fast",
        MISTRAL
        | {
            "vocab_size": 462,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sliding_window": None,
            "hidden_size": 128,
            "head_dim": 64,
            "intermediate_size": 352,
            "num_hidden_layers": 3,
        },
    ),
    "mistral_v1": Kind(
        "spm_both",
        MISTRAL
        | {
            "vocab_size": 460,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sliding_window": 256,
            "rope_theta": 10000.0,
            "num_key_value_heads": 4,
        },
    ),
    "tied": Kind(
        "qwen2",
        {
            "vocab_size": 392,
            "bos_token_id": 380,
            "eos_token_id": 382,
            "tie_word_embeddings": True,
            "hidden_size": 64,
            "intermediate_size": 96,
        },
    ),
    "sentencepiece": Kind(
        "spm",
        {
            "vocab_size": 466,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "num_attention_heads": 2,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rms_norm_eps": 1e-6,
        },
    ),
    "yarn": Kind(
        "tekken",
        {
            "vocab_size": 390,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 2048,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
}

Weights = dict[str, np.ndarray]
"""HF tensor name → float32 values."""


def write_model(
    folder: Path, kind: str, *, seed: int = 0, dtype: str = "bf16", shards: int = 1, **config_overrides: object
) -> Path:
    """Writes a model of `kind` (a key of KINDS) into `folder` and returns it.

    `dtype` is bf16, f16 or f32; with `shards` > 1 an index file is written. A config override of None
    writes null.
    """
    config = DEFAULTS | KINDS[kind].config | {"torch_dtype": TORCH_DTYPES[dtype]} | config_overrides
    shutil.copytree(FIXTURES / "tokenizers" / KINDS[kind].tokenizer, folder, dirs_exist_ok=True)
    write_json(folder / "config.json", config)
    write_weights(folder, random_weights(config, seed), dtype=dtype, shards=shards)
    return folder


def write_expert(folder: Path, base: Path, seed: int, *, drift: float = 0.1, tuned: str = ".mlp.") -> Path:
    """Writes a fine-tune of `base` into `folder`: the weights with `tuned` in their name, and only those, moved by
    `drift` of their norm.

    Data type and sharding are those of the base. Returns `folder`.
    """
    shutil.copytree(base, folder, dirs_exist_ok=True)
    random = np.random.RandomState(seed)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        for name, (dtype, values) in tensors.items():
            if tuned in name:
                tensors[name] = dtype, values + np.float32(drift) * _draw(random, values.shape)
        write_safetensors(path, {name: (dtype, encode(values, dtype)) for name, (dtype, values) in tensors.items()})
    return folder


def random_weights(config: Mapping[str, object], seed: int) -> Weights:
    """Float32 weights for every tensor that the config calls for."""
    random = np.random.RandomState(seed)
    return {name: _draw(random, shape) for name, shape in tensor_shapes(config).items()}


def tensor_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """HF tensor name → shape (rows, columns), in the order of the layers."""
    n_embd, n_ff, n_head = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or n_embd // n_head
    q_rows, kv_rows = head_dim * n_head, head_dim * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], n_embd)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (q_rows, n_embd),
                "self_attn.k_proj": (kv_rows, n_embd),
                "self_attn.v_proj": (kv_rows, n_embd),
                "self_attn.o_proj": (n_embd, q_rows),
                "mlp.gate_proj": (n_ff, n_embd),
                "mlp.up_proj": (n_ff, n_embd),
                "mlp.down_proj": (n_embd, n_ff),
                "input_layernorm": (n_embd,),
                "post_attention_layernorm": (n_embd,),
            }.items()
        }
    shapes["model.norm.weight"] = (n_embd,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], n_embd)
    return shapes


def _draw(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    noise = random.standard_normal(shape)
    values = noise / math.sqrt(shape[-1]) if len(shape) == 2 else 1 + 0.1 * noise
    return values.astype(np.float32)


def write_weights(folder: Path, weights: Weights, *, dtype: str = "bf16", shards: int = 1) -> None:
    """Writes model.safetensors, or `shards` files of about equally many tensors with their index."""
    stored = {name: (DTYPES[dtype], encode(values, DTYPES[dtype])) for name, values in weights.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return
    names = list(stored)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        write_safetensors(folder / file, {name: stored[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(values.nbytes for _, values in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
NUMPY_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as safetensors stores `dtype`; BF16 is rounded to nearest even, as uint16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.ascontiguousarray(values, dtype=NUMPY_DTYPES[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of what `encode` returns."""
    return (stored.astype("<u4") << 16).view("<f4") if dtype == "BF16" else stored.astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Writes name → (safetensors dtype, stored values)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(values.tobytes())


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name → (safetensors dtype, float32 values) of a file that `write_safetensors` wrote."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
            stored = np.frombuffer(data[start + begin : start + end], NUMPY_DTYPES[dtype])
            tensors[name] = dtype, decode(stored, dtype).reshape(entry["shape"])
    return tensors


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
