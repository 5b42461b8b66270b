"""The activation tap against transformers' own hidden states, against numpy, and against itself."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from conftest import CLOSE, TOKENS, build_dense, build_mix, distance, read_tensors
from ctrl_c import pressing_ctrl_c
from moegguf.errors import UserError
from moegguf.runtime import tap, watch
from moegguf.runtime.model import Model, RunOptions, open_model
from moegguf.runtime.sampling import Sampling
from moegguf.runtime.tap import Tap, Tapped, available
from test_architectures import ARCHITECTURES, as_architecture
from tiny_gguf import saying, write_gguf

N_EXPERT, K = 3, 2
NOISY = {"mode": "noisy", "k": K, "std": 0.05, "seed": 11}
ONE_THREAD = RunOptions(threads=1)
EXACT = RunOptions(threads=1, kv_type=GGMLQuantizationType.F32)
ROUTING = (tap.ROUTER_INPUT, tap.MOE_LOGITS, tap.MOE_PROBS, tap.MOE_TOPK, tap.MOE_WEIGHTS)


def sequences(*lengths: int, n_vocab: int = 300) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, n_vocab, length).tolist() for length in lengths]


def tapped(model: Model, nodes: Sequence[str], texts: Sequence[Sequence[int]], **given) -> Tapped:
    """One `Tapped` of all texts, which fit one batch."""
    with Tap(model, nodes, **given) as reader:
        (only,) = reader.run(texts)
    return only


@pytest.fixture(scope="module")
def mix(family, tmp_path_factory) -> Path:
    """An F32 mix of three experts with a router of noise."""
    models = family("llama3_like", dtype="f32")
    return build_mix(tmp_path_factory.mktemp("tap") / "mix.gguf", models.base, models.experts, router=NOISY)


@pytest.mark.parametrize("kind", ["llama3_like", "mistral_like", "tied"])
def test_hidden_states_are_those_of_transformers(kind: str, family, tmp_path: Path):
    pytest.importorskip("transformers")
    from test_reference import mixtral, noise, sizes, torch

    models = family(kind)
    n_layer, n_embd = sizes(models)
    reference = mixtral(models, {layer: noise(layer, N_EXPERT, n_embd) for layer in range(n_layer)}, K)
    expected: dict[tuple[str, int], np.ndarray] = {}

    def keep(node: str, layer: int, values: torch.Tensor) -> None:
        expected[node, layer] = values[0].numpy()

    for number, layer in enumerate(reference.model.layers):
        layer.input_layernorm.register_forward_hook(
            lambda _, given, result, number=number: (
                keep(tap.LAYER_INPUT, number, given[0]), keep(tap.ATTENTION_INPUT, number, result), None)[-1]
        )  # fmt: skip
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, given, result, number=number: keep(tap.ROUTER_INPUT, number, result)
        )
        layer.self_attn.o_proj.register_forward_hook(
            lambda _, given, result, number=number: keep(tap.ATTENTION_OUTPUT, number, given[0])
        )
    with torch.inference_mode():
        reference(torch.tensor([TOKENS]))
    path = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=NOISY)
    nodes = (tap.LAYER_INPUT, tap.ATTENTION_INPUT, tap.ATTENTION_OUTPUT, tap.ROUTER_INPUT)
    with open_model(path, EXACT) as model:
        values = tapped(model, nodes, [TOKENS]).values
    assert values.keys() == expected.keys() == {(node, layer) for node in nodes for layer in range(n_layer)}
    for site, hidden in expected.items():
        assert distance(values[site], hidden) < CLOSE, site


def test_routing_is_a_softmax_of_the_router_on_its_input(mix: Path):
    stored = read_tensors(mix)
    with open_model(mix, EXACT) as model:
        values = tapped(model, ROUTING, sequences(40)).values
        layers = range(model.n_layer)
    for layer in layers:
        logits = values[tap.ROUTER_INPUT, layer] @ stored[f"blk.{layer}.ffn_gate_inp.weight"].values.T
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        order = np.argsort(-probs, axis=1)[:, :K]
        weights = np.take_along_axis(probs, order, axis=1)
        assert distance(values[tap.MOE_LOGITS, layer], logits) < CLOSE
        assert distance(values[tap.MOE_PROBS, layer], probs) < 1e-5
        assert values[tap.MOE_TOPK, layer].dtype == np.int32
        assert values[tap.MOE_TOPK, layer].tolist() == order.tolist()
        assert distance(values[tap.MOE_WEIGHTS, layer], weights / weights.sum(axis=1, keepdims=True)) < 1e-5


def swiglu(stored, layer: int, suffix: str, x: np.ndarray) -> np.ndarray:
    gate, up = (
        x @ np.swapaxes(stored[f"blk.{layer}.ffn_{role}{suffix}.weight"].values, -1, -2) for role in ("gate", "up")
    )
    return gate / (1 + np.exp(-gate)) * up


def test_what_enters_down_is_the_gated_product_of_every_used_expert(mix: Path):
    stored = read_tensors(mix)
    with open_model(mix, EXACT) as model:
        values = tapped(model, (tap.ROUTER_INPUT, tap.MOE_TOPK, tap.MOE_SWIGLU), sequences(9)).values
    for layer in (0, 1):
        every = swiglu(stored, layer, "_exps", values[tap.ROUTER_INPUT, layer])  # (n_expert, n_tokens, n_ff)
        used = values[tap.MOE_TOPK, layer]
        expected = [[every[expert, token] for expert in experts] for token, experts in enumerate(used)]
        assert distance(values[tap.MOE_SWIGLU, layer].reshape(9, K, -1), np.array(expected)) < CLOSE


def test_what_enters_down_of_a_dense_model_is_its_gated_product(family, tmp_path: Path):
    path = build_dense(tmp_path / "dense.gguf", family("llama3_like").base)
    stored = read_tensors(path)
    with open_model(path, EXACT) as model:
        values = tapped(model, (tap.FFN_INPUT, tap.SWIGLU), sequences(9)).values
    for layer in (0, 1):
        assert distance(values[tap.SWIGLU, layer], swiglu(stored, layer, "", values[tap.FFN_INPUT, layer])) < CLOSE


def rms_norm(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weights


@pytest.mark.parametrize("arch", ["llama", *ARCHITECTURES])
def test_names_mean_the_same_in_every_architecture(arch: str, family, tmp_path: Path):
    """A layer's input normed is its attention's input, its FFN's input times gate is what the FFN computes."""
    path = build_dense(tmp_path / "llama.gguf", family("tied", attention_bias=False).base)
    if arch != "llama":
        path = as_architecture(path, arch, tmp_path / "other.gguf")
    stored = read_tensors(path)
    with open_model(path, EXACT) as model:
        nodes = [tap.LAYER_INPUT, tap.ATTENTION_INPUT, tap.FFN_INPUT, "ffn_gate"]
        values = tapped(model, nodes, [TOKENS]).values
    embeddings = stored["token_embd.weight"].values[list(TOKENS)]
    scale = embeddings.shape[1] ** 0.5 if arch.startswith("gemma") else 1
    assert distance(values[tap.LAYER_INPUT, 0], embeddings * scale) < CLOSE
    for layer in (0, 1):
        normed = rms_norm(values[tap.LAYER_INPUT, layer], stored[f"blk.{layer}.attn_norm.weight"].values)
        assert distance(values[tap.ATTENTION_INPUT, layer], normed) < CLOSE
        gate = values[tap.FFN_INPUT, layer] @ stored[f"blk.{layer}.ffn_gate.weight"].values.T
        assert distance(values["ffn_gate", layer], gate) < CLOSE


def test_many_sequences_at_once_are_each_alone(mix: Path):
    texts = sequences(5, 1, 17, 3, 64)
    with open_model(mix, EXACT) as model:
        together = tapped(model, ROUTING, texts)
        alone = [tapped(model, ROUTING, [text]) for text in texts]
    assert together.lengths == (5, 1, 17, 3, 64)
    for node, layer in together.values:
        for mine, own in zip(together.split(node, layer), alone, strict=True):
            assert distance(mine, own.values[node, layer]) < CLOSE


def test_a_sequence_longer_than_a_batch_is_evaluated_as_one(mix: Path, monkeypatch):
    texts = sequences(50, 3, 2)
    with open_model(mix, EXACT) as model:
        whole = tapped(model, ROUTING, texts)
        monkeypatch.setattr(watch, "max_outputs", lambda n_vocab: 16)
        with Tap(model, ROUTING) as reader:
            first, second = reader.run(texts)
    assert (first.lengths, second.lengths) == ((50,), (3, 2))
    for site in whole.values:
        assert distance(whole.values[site], np.concatenate([first.values[site], second.values[site]])) < CLOSE


def test_ending_the_graph_early_changes_nothing_and_saves_the_rest(mix: Path, monkeypatch):
    texts = sequences(20, 30)
    values, n_asked = [], []
    with open_model(mix, EXACT) as model:
        for devices in ((), ("GPU0",)):
            model.llama.placement = replace(model.placement, devices=devices)
            with Tap(model, [tap.ROUTER_INPUT, tap.MOE_TOPK], [0]) as reader:
                asked, own = [], reader._watch
                wants = own._wants
                monkeypatch.setattr(own, "_wants", lambda tensor, w=wants, a=asked: (a.append(tensor), w(tensor))[1])
                list(reader.run(texts))
                (again,) = reader.run(texts)
            values.append(again.values)
            n_asked.append(len(asked))
    assert n_asked[0] < n_asked[1] / 1.5
    for site in values[0]:
        np.testing.assert_array_equal(values[0][site], values[1][site])


def test_the_same_text_gives_the_same_values_again(mix: Path):
    texts = sequences(20, 30)
    with open_model(mix, EXACT) as model, Tap(model, ROUTING) as reader:
        (first,), (second,) = reader.run(texts), reader.run(texts)
    for site in first.values:
        np.testing.assert_array_equal(first.values[site], second.values[site])


def test_a_tap_does_not_disturb_the_conversation_of_its_model(mix: Path):
    prompt, greedy = sequences(8)[0], Sampling(temp=0)
    with open_model(mix, EXACT) as model:
        before = list(itertools.islice(model.generate(prompt, greedy), 8))
        stream = model.generate(prompt, greedy)
        said = list(itertools.islice(stream, 4))
        tapped(model, ROUTING, sequences(33))
        assert said + list(itertools.islice(stream, 4)) == before


def test_only_the_asked_layers_are_read(mix: Path):
    with open_model(mix, EXACT) as model:
        values = tapped(model, [tap.ROUTER_INPUT, tap.LAYER_INPUT], sequences(4), layers=[1]).values
    assert values.keys() == {(tap.ROUTER_INPUT, 1), (tap.LAYER_INPUT, 1)}


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
def test_a_quantised_file_is_read_too(quant: str, mix: Path, family, tmp_path: Path):
    models = family("llama3_like", dtype="f32")
    path = build_mix(tmp_path / "q.gguf", models.base, models.experts, router=NOISY, quant=quant)
    with open_model(mix, EXACT) as exact, open_model(path, EXACT) as quantised:
        expected, found = (tapped(model, ROUTING, sequences(30)).values for model in (exact, quantised))
    for layer in (0, 1):
        a, b = expected[tap.ROUTER_INPUT, layer].ravel(), found[tap.ROUTER_INPUT, layer].ravel()
        assert 0.9 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-9


def test_the_shared_layout_has_a_router_and_an_always_on_expert(family, tmp_path: Path):
    models = family("llama3_like")
    path = build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout="shared", router=NOISY, always_on="e0")
    with open_model(path, EXACT) as model:
        values = tapped(model, [*ROUTING, tap.SWIGLU, tap.MOE_SWIGLU, tap.LAYER_INPUT], sequences(6)).values
    assert values[tap.MOE_PROBS, 1].shape == (6, 2)
    assert values[tap.MOE_SWIGLU, 1].shape == values[tap.SWIGLU, 1].shape == (6, 512)


def test_what_a_graph_has_is_listed_with_its_layers(mix: Path, family, tmp_path: Path):
    with open_model(mix, EXACT) as model:
        nodes = available(model)
    everywhere = (tap.LAYER_INPUT, tap.ATTENTION_INPUT, tap.ATTENTION_OUTPUT, *ROUTING, tap.MOE_SWIGLU)
    assert {nodes[node] for node in everywhere} == {(0, 1)}
    assert tap.SWIGLU not in nodes
    with open_model(build_dense(tmp_path / "dense.gguf", family("llama3_like").base), EXACT) as model:
        nodes = available(model)
    assert nodes[tap.SWIGLU] == nodes[tap.FFN_INPUT] == nodes[tap.LAYER_INPUT] == (0, 1)
    assert tap.MOE_PROBS not in nodes


def test_a_node_that_the_graph_lacks_is_refused_by_name(family, tmp_path: Path):
    path = build_dense(tmp_path / "dense.gguf", family("llama3_like").base)
    with open_model(path, EXACT) as model:
        with pytest.raises(UserError, match="no node 'ffn_moe_topk-0'; pass a mix with a router"):
            Tap(model, [tap.MOE_TOPK])
        with pytest.raises(UserError, match="no node 'ffn_norm-2'"):
            Tap(model, [tap.ROUTER_INPUT], [2])


def test_a_sequence_longer_than_the_context_is_refused(mix: Path):
    options = RunOptions(threads=1, ctx=32)
    with open_model(mix, options) as model, Tap(model, ROUTING) as reader:
        with pytest.raises(UserError, match="takes 33 tokens, the context holds 32"):
            list(reader.run(sequences(3, 33)))
        (left,) = reader.run(sequences(32))
        assert left.lengths == (32,)


def test_an_exception_inside_the_callback_is_raised(mix: Path, monkeypatch):
    def fail(tensor: int) -> np.ndarray:
        raise ZeroDivisionError("inside")

    with open_model(mix, EXACT) as model, Tap(model, ROUTING) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(tap, "values_of", fail)
            with pytest.raises(ZeroDivisionError, match="inside"):
                list(reader.run(sequences(5)))
        (after,) = reader.run(sequences(5))
        assert after.lengths == (5,)


def test_ctrl_c_ends_it_and_leaves_the_tap_usable(tmp_path: Path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", saying("yes"))
    with open_model(path, ONE_THREAD) as model, Tap(model, [tap.SWIGLU]) as reader:
        with pressing_ctrl_c():
            for _ in reader.run(itertools.repeat([7] * 200)):
                pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        (after,) = reader.run(sequences(5, n_vocab=250))
        assert after.values[tap.SWIGLU, 0].shape == (5, 32)
