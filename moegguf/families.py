"""What is known of each model family, as data.

One row per Hugging Face architecture that can be read from safetensors: the GGUF architecture it becomes,
the values that its config leaves out, and where each tensor goes. Origin of the names and of the q/k permutation:
llama.cpp, gguf-py/gguf/tensor_mapping.py and conversion/llama.py. From GGUF files any dense architecture
with a gated FFN can be fused, so those need no row here; `MOE_ARCHITECTURES` says which graphs of stock
llama.cpp can route between experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moegguf.gguf_header import TensorInfo


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture. `defaults` are the config values that its configuration class fills in."""

    hf_architecture: str
    arch: str
    defaults: Mapping[str, object]
    rotated: frozenset[str] = field(default=frozenset({"attn_q", "attn_k"}))
    """GGUF tensors whose rows are stored in ggml's order of rotary pairs."""


_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8}

FAMILIES = {
    family.hf_architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", _LLAMA_DEFAULTS),
        Family("LLaMAForCausalLM", "llama", _LLAMA_DEFAULTS),
        Family("MistralForCausalLM", "llama", _MISTRAL_DEFAULTS),
    )
}

MOE_ARCHITECTURES = frozenset({"llama"})
"""GGUF architectures whose dense graph has an MoE twin with the same attention (llama → llama, granitemoe)."""

PER_LAYER_WIDTHS = {"llama": "deci"}
"""GGUF architecture → its twin with the same graph whose layers may have FFN widths of their own."""

# HF module name → GGUF name. `{}` is the layer.
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_DERIVED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Buffers of old checkpoints that are recomputed from the config."""

_HF_NAME = re.compile(r"(?P<head>.*?\.layers\.)(?P<layer>\d{1,9})(?P<tail>\..+)")
_GGUF_NAME = re.compile(r"blk\.(?P<layer>\d{1,9})\.(?P<role>[^.]+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class TensorName:
    """A GGUF tensor name, taken apart: layer (None outside the blocks), role such as `ffn_up`, weight or bias."""

    layer: int | None
    role: str
    kind: str

    def __str__(self) -> str:
        prefix = "" if self.layer is None else f"blk.{self.layer}."
        return f"{prefix}{self.role}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> TensorName:
        """Take a GGUF name apart; every GGUF name parses."""
        if match := _GGUF_NAME.fullmatch(name):
            return cls(int(match["layer"]), match["role"], match["kind"])
        role, _, kind = name.partition(".")
        return cls(None, role, kind)


def stacked(info: TensorInfo) -> TensorInfo:
    """`info` with its number of experts in front, which llama-quantize, and so Ollama, leaves out where it is 1."""
    role = TensorName.parse(info.name).role
    n_dims = 3 if role.endswith("_exps") else 2 if role == "ffn_gate_inp" else 1
    return replace(info, shape=(1,) * (n_dims - len(info.shape)) + info.shape)


def gguf_name(hf_name: str) -> TensorName | None:
    """The GGUF name of a tensor of an HF checkpoint, or None for derived buffers. Raises KeyError when unknown."""
    if hf_name.endswith(_DERIVED):
        return None
    module, _, kind = hf_name.rpartition(".")
    layer = None
    if match := _HF_NAME.fullmatch(module):
        layer = int(match["layer"])
        module = match["head"] + "{}" + match["tail"]
    return TensorName(layer, _MODULES[module].removeprefix("blk.{}."), kind)
