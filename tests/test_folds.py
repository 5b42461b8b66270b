"""What collapses into weights: attention, fine-grained mixes, trunks and layers, against transformers' own models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny_models
from conftest import CLOSE, KINDS, TOKENS, Family, build_mix, distance, logits, read_metadata, read_tensors
from moegguf.cli import main
from moegguf.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_reference import checkpoint  # noqa: E402

FFN, ATTENTION = ".mlp.", ".self_attn."
UNEQUAL = (0.5, 0.3, 0.2)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def mean(states: list[dict[str, torch.Tensor]], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    return {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}


def pick(state: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    return {name: values for name, values in state.items() if any(part in name for part in parts)}


class Sum(torch.nn.Module):
    """Σ a_e f_e(x) of whole FFNs."""

    def __init__(self, ffns: list[torch.nn.Module], weights: tuple[float, ...]) -> None:
        super().__init__()
        self.ffns, self.weights = torch.nn.ModuleList(ffns), weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(weight * ffn(x) for weight, ffn in zip(self.weights, self.ffns, strict=True))


def dense(models: Family, state: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """transformers' model of the base's config with these weights."""
    config = transformers.AutoConfig.from_pretrained(models.base)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def mixture(models: Family, state: dict, weights: tuple[float, ...], layers: tuple[int, ...] | None = None):
    """The trunk `state` with a gate-less mixture of the experts' FFNs in `layers`, or in all."""
    model = dense(models, state)
    experts = [dense(models, checkpoint(folder)) for folder in models.experts]
    for i, layer in enumerate(model.model.layers):
        if layers is None or i in layers:
            layer.mlp = Sum([expert.model.layers[i].mlp for expert in experts], weights)
    return model


@torch.inference_mode()
def run(model: transformers.PreTrainedModel) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.fixture(scope="module")
def tuned(family, tmp_path_factory):
    """`tuned(kind)`: a base and three fine-tunes that differ from it in every tensor."""

    def write(kind: str, **config) -> Family:
        models = family(kind, **config)
        folder = tmp_path_factory.mktemp("tuned")
        experts = tuple(tiny_models.write_expert(folder / f"t{i}", models.base, i, tuned="") for i in (1, 2, 3))
        return Family(models.base, experts)

    return write


def weighted(experts, weights) -> list[dict]:
    return [{"source": expert, "weight": weight} for expert, weight in zip(experts, weights, strict=True)]


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_gateless_attention_is_the_mean_of_the_attention_weights(kind: str, layout: str, tuned, tmp_path: Path):
    models = tuned(kind)
    states = [checkpoint(folder) for folder in models.experts]
    state = checkpoint(models.base) | pick(mean(states, UNEQUAL), ATTENTION)
    mix = build_mix(
        tmp_path / "mix.gguf", models.base, weighted(models.experts, UNEQUAL), mix="ffn+attention", layout=layout
    )
    assert distance(logits(mix), run(mixture(models, state, UNEQUAL))) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_gateless_finegrained_mix_is_the_dense_model_of_mean_ffns(kind: str, tuned, tmp_path: Path):
    models = tuned(kind)
    states = [checkpoint(folder) for folder in models.experts]
    state = checkpoint(models.base) | pick(mean(states, UNEQUAL), FFN)
    mix = build_mix(tmp_path / "mix.gguf", models.base, weighted(models.experts, UNEQUAL), mix="fine-grained")
    assert distance(logits(mix), run(dense(models, state))) < CLOSE


def test_a_finegrained_mix_with_attention_is_the_dense_model_of_both_means(tuned, tmp_path: Path):
    models = tuned("llama3_like")
    states = [checkpoint(folder) for folder in models.experts]
    state = checkpoint(models.base) | pick(mean(states, UNEQUAL), FFN, ATTENTION)
    experts = weighted(models.experts, UNEQUAL)
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, mix="fine-grained+attention")
    assert distance(logits(mix), run(dense(models, state))) < CLOSE


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_trunk_is_the_mean_of_the_experts_trunks(kind: str, layout: str, tuned, tmp_path: Path):
    models, equal = tuned(kind), (1 / 3,) * 3
    state = mean([checkpoint(folder) for folder in models.experts], equal)
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, trunk="mean", layout=layout)
    assert distance(logits(mix), run(mixture(models, state, equal))) < CLOSE


def test_the_trunk_of_an_expert_is_that_expert_as_the_base(tuned, tmp_path: Path):
    models = tuned("llama3_like")
    named = build_mix(tmp_path / "named.gguf", models.base, models.experts, trunk="e1")
    as_base = build_mix(tmp_path / "as_base.gguf", models.experts[1], models.experts)
    assert read_tensors(named) == read_tensors(as_base)
    assert read_metadata(named, "moegguf.trunk") == {"moegguf.trunk": "e1"}


@pytest.mark.parametrize(("layers", "mixed"), [([0], (0,)), (["1-2"], (1, 2)), ([0, "1-2"], (0, 1, 2))])
def test_only_the_named_layers_are_mixed(layers, mixed, tuned, tmp_path: Path):
    models = tuned("mistral_like")
    mix = build_mix(tmp_path / "mix.gguf", models.base, weighted(models.experts, UNEQUAL), layers=layers)
    reference = mixture(models, checkpoint(models.base), UNEQUAL, mixed)
    assert distance(logits(mix), run(reference)) < CLOSE
    arch, n_ff = ("llama", 3 * 352) if len(mixed) == 3 else ("deci", [3 * 352 if i in mixed else 352 for i in range(3)])
    assert read_metadata(mix)[f"{arch}.feed_forward_length"] == n_ff


def test_attention_is_mixed_in_the_named_layers_only(tuned, tmp_path: Path):
    models = tuned("mistral_like")
    states = [checkpoint(folder) for folder in models.experts]
    state = checkpoint(models.base) | pick(mean(states, UNEQUAL), ".layers.1.self_attn.")
    experts = weighted(models.experts, UNEQUAL)
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, mix="ffn+attention", layers=[1])
    assert distance(logits(mix), run(mixture(models, state, UNEQUAL, (1,)))) < CLOSE


def test_means_are_taken_of_decoded_weights_where_sources_are_quantised(tuned, tmp_path: Path):
    """Q8_0 experts decode to what the mean is taken of: the same model as from those decoded values in F32."""
    models = tuned("llama3_like")
    quantised = [
        build_mix(tmp_path / f"q{i}.gguf", expert, [expert], layout="fused", quant="Q8_0")
        for i, expert in enumerate(models.experts)
    ]
    mix = build_mix(tmp_path / "mix.gguf", models.base, quantised, mix="ffn+attention")
    name = "blk.1.attn_k.weight"
    expected = np.mean([read_tensors(path)[name].values for path in quantised], axis=0)
    assert distance(read_tensors(mix)[name].values, expected) < 1e-6


def test_a_sound_mix_of_each_kind_passes_its_check(tuned, tmp_path: Path, capsys):
    models = tuned("mistral_like")
    for i, table in enumerate(
        (
            {"mix": "fine-grained"},
            {"layers": [0, 2]},
            {"mix": "ffn+attention"},
            {"trunk": "mean", "mix": "fine-grained"},
        )
    ):
        mix = build_mix(tmp_path / f"mix{i}.gguf", models.base, models.experts, **table)
        assert main(["inspect", "--check", str(mix)]) == 0, capsys.readouterr().out
        assert "check: sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"mix": "ffn+attention"}, "mix = 'ffn+attention' with a noisy router has no graph in stock llama.cpp"),
        ({"mix": "fine-grained"}, "mix = 'fine-grained' with a noisy router has no graph"),
        ({"layers": [0]}, "layers with a noisy router has no graph"),
    ],
)
def test_what_no_graph_computes_is_refused_with_what_to_choose_instead(table, says, tuned, tmp_path: Path):
    models = tuned("tied")
    with pytest.raises(UserError, match=r"router = 'gateless'.*--engine torch") as refused:
        build_mix(tmp_path / "mix.gguf", models.base, models.experts, router="noisy", **table)
    assert says in str(refused.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"layers": [0, 7]}, "has no layer 7, its layers are 0 to 1"),
        ({"layers": ["3-1"]}, "layers: found '3-1'"),
        ({"layers": []}, "at least one layer"),
        ({"mix": "attention"}, "mix: found 'attention', allowed ffn, ffn+attention, fine-grained"),
        ({"trunk": "median"}, "trunk: found 'median', allowed base, mean, e0, e1, e2"),
        ({"mix": "fine-grained", "layout": "mixtral"}, "layout: found 'mixtral', allowed fused"),
    ],
)
def test_a_mistake_in_what_is_mixed_is_named(table, says, tuned, tmp_path: Path):
    models = tuned("tied")
    with pytest.raises(UserError) as refused:
        build_mix(tmp_path / "mix.gguf", models.base, models.experts, **table)
    assert says in str(refused.value)


def test_embeddings_of_other_vocabularies_are_never_averaged(family, tmp_path: Path):
    models, larger = family("tied"), family("tied", vocab_size=394)
    with pytest.raises(UserError, match=r"token_embd.weight is \(394, 64\), in the base \(392, 64\).*trunk = 'base'"):
        build_mix(tmp_path / "mix.gguf", models.base, [models.experts[0], larger.experts[0]], trunk="mean")
