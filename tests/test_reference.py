"""A mix must equal an independent computation: PyTorch, and transformers' Mixtral where it has the router's form.

The reference reads the Hugging Face files itself, in their own order of rows, so it shares neither the renaming
nor the reordering of q and k with the build; routers are written down here again from their definition.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from conftest import CLOSE, KINDS, TOKENS, Family, build_mix, distance, logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEED, STD = 11, 0.05
ROLES = ("gate_proj", "up_proj", "down_proj")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    tensors = tiny_models.read_safetensors(folder / "model.safetensors")
    return {name: torch.from_numpy(np.array(values)) for name, (_, values) in tensors.items()}


def noise(layer: int, n_expert: int, n_embd: int) -> torch.Tensor:
    """White noise as METHODS define it: float32 (n_expert, n_embd), fixed by seed and layer."""
    values = np.random.RandomState([SEED, layer]).standard_normal((n_expert, n_embd)) * STD
    return torch.from_numpy(values.astype(np.float32))


def mixtral(models: Family, router: dict[int, torch.Tensor], k: int) -> transformers.MixtralForCausalLM:
    """transformers' Mixtral with the base's trunk, the experts' FFNs and these routers."""
    table = read_config(models)
    table.setdefault("head_dim", table["hidden_size"] // table["num_attention_heads"])
    for key in ("architectures", "model_type", "torch_dtype"):
        del table[key]
    config = transformers.MixtralConfig(**table, num_local_experts=len(models.experts), num_experts_per_tok=k)
    base = checkpoint(models.base)
    experts = [checkpoint(folder) for folder in models.experts]
    state = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer, rows in router.items():
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (torch.stack([e[f"{prefix}.{role}.weight"] for e in experts]) for role in ROLES)
        state |= {
            f"{prefix}.gate.weight": rows,
            f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], dim=1),
            f"{prefix}.experts.down_proj": down,
        }
    model = transformers.MixtralForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model


@torch.inference_mode()
def run(model: transformers.MixtralForCausalLM) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def read_config(models: Family) -> dict:
    return json.loads((models.base / "config.json").read_text())


def sizes(models: Family) -> tuple[int, int]:
    """Layers and hidden size."""
    config = read_config(models)
    return config["num_hidden_layers"], config["hidden_size"]


@pytest.mark.parametrize("kind", KINDS)
def test_gateless_is_mixtral_with_a_zero_router(kind: str, family, tmp_path: Path):
    models = family(kind)
    n_layer, n_embd = sizes(models)
    reference = mixtral(models, {layer: torch.zeros(3, n_embd) for layer in range(n_layer)}, k=3)
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts)
    assert distance(logits(mix), run(reference)) < CLOSE


@pytest.mark.parametrize(("kind", "k"), [*((kind, 2) for kind in KINDS), ("llama3_like", 1), ("llama3_like", 3)])
def test_noisy_is_mixtral_with_white_noise_for_a_router(kind: str, k: int, family, tmp_path: Path):
    models = family(kind)
    n_layer, n_embd = sizes(models)
    reference = mixtral(models, {layer: noise(layer, 3, n_embd) for layer in range(n_layer)}, k)
    router = {"mode": "noisy", "k": k, "std": STD, "seed": SEED}
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=router)
    assert distance(logits(mix), run(reference)) < CLOSE


class AlwaysOn(torch.nn.Module):
    """y = f_a / k + (k − 1) / k · Σ p_e f_e over the top k − 1 of the others, p renormalised over the chosen."""

    def __init__(self, always_on: dict, others: list[dict], prefix: str, rows: torch.Tensor, k: int) -> None:
        super().__init__()
        self.always_on, self.others, self.prefix, self.rows, self.k = always_on, others, prefix, rows, k

    def expert(self, weights: dict, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (weights[f"{self.prefix}.{role}.weight"] for role in ROLES)
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, places = torch.softmax(x @ self.rows.T, dim=-1).topk(self.k - 1)
        shares = torch.zeros(*x.shape[:-1], len(self.others)).scatter(-1, places, chosen / chosen.sum(-1, keepdim=True))
        routed = sum(shares[..., i, None] * self.expert(weights, x) for i, weights in enumerate(self.others))
        return self.expert(self.always_on, x) / self.k + (self.k - 1) / self.k * routed


@pytest.mark.parametrize("k", [2, 3])
def test_always_on_is_its_definition(k: int, family, tmp_path: Path):
    models = family("llama3_like")
    n_layer, n_embd = sizes(models)
    router = {layer: noise(layer, 2, n_embd) for layer in range(n_layer)}
    reference = mixtral(models, {layer: torch.zeros(3, n_embd) for layer in range(n_layer)}, k=3)
    always_on, *others = (checkpoint(folder) for folder in models.experts)
    for layer, rows in router.items():
        reference.model.layers[layer].mlp = AlwaysOn(always_on, others, f"model.layers.{layer}.mlp", rows, k)
    noisy = {"mode": "noisy", "k": k, "std": STD, "seed": SEED}
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=noisy, always_on="e0")
    assert distance(logits(mix), run(reference)) < CLOSE


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
def test_weights_are_shares_of_the_output(layout: str, family, tmp_path: Path):
    """Σ a_e f_e, as a plain weighted sum in every layer."""
    models, shares = family("tied"), (0.6, 0.1, 0.3)
    n_layer, n_embd = sizes(models)
    reference = mixtral(models, {layer: torch.zeros(3, n_embd) for layer in range(n_layer)}, k=3)
    for layer in reference.model.layers:
        for expert, share in enumerate(shares):
            layer.mlp.experts.down_proj.data[expert] *= 3 * share
    experts = [{"source": path, "weight": share} for path, share in zip(models.experts, shares, strict=True)]
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, layout=layout)
    assert distance(logits(mix), run(reference)) < CLOSE
