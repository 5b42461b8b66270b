"""Running with a LoRA GGUF: one that carries a router makes of a mix the same mix with that router."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from conftest import CLOSE, TOKENS, build_mix, distance, logits, read_tensors
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.runtime import tap
from moegguf.runtime.batch import generate_greedy, score
from moegguf.runtime.context import Entry
from moegguf.runtime.model import Model, RunOptions, open_model
from moegguf.runtime.sampling import Sampling
from moegguf.runtime.tap import Tap

N_EXPERT, N_EMBD = 3, 256


def write_adapter(
    path: Path, deltas: Mapping[str, np.ndarray], *, arch: str = "llama", kind: str = "adapter", alpha: float = N_EXPERT
) -> Path:
    """A LoRA GGUF that adds `deltas` (n_out, n_in), by weight: a = delta, b = identity, so that r = n_out."""
    writer = GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, delta in deltas.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(delta, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.eye(len(delta), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def noisy(seed: int) -> dict:
    return {"mode": "noisy", "k": 2, "std": 0.05, "seed": seed}


def routers(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.values for name, tensor in read_tensors(path).items() if "ffn_gate_inp" in name}


def options(adapter: Path | None = None) -> RunOptions:
    return RunOptions(threads=1, adapter=adapter, kv_type=GGMLQuantizationType.F32)


def logits_of(model: Model) -> np.ndarray:
    with model.open_context(n_batch=len(TOKENS), n_sequences=1, n_outputs=len(TOKENS)) as context:
        context.decode([Entry(token, position, 0, True) for position, token in enumerate(TOKENS)])
        return context.logits().copy()


@pytest.fixture(scope="module")
def mixes(family, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two mixes that differ in their router alone, and an adapter that makes the second of the first."""
    folder = tmp_path_factory.mktemp("adapter")
    models = family("llama3_like", dtype="f32")
    first, second = (
        build_mix(folder / f"{seed}.gguf", models.base, models.experts, router=noisy(seed)) for seed in (1, 2)
    )
    had, wanted = routers(first), routers(second)
    return first, second, write_adapter(folder / "router.gguf", {name: wanted[name] - had[name] for name in had})


def test_a_router_in_an_adapter_is_a_router_in_the_file(mixes: tuple[Path, Path, Path]):
    first, second, adapter = mixes
    assert distance(logits(first), logits(second)) > 0.01
    with open_model(first, options(adapter)) as model:
        assert distance(logits_of(model), logits(second)) < CLOSE


def test_a_gate_less_mix_gets_its_router_from_an_adapter(mixes: tuple[Path, Path, Path], family, tmp_path: Path):
    models = family("llama3_like", dtype="f32")
    gateless = build_mix(tmp_path / "gateless.gguf", models.base, models.experts)
    routed = build_mix(tmp_path / "all.gguf", models.base, models.experts, router={**noisy(2), "k": N_EXPERT})
    adapter = write_adapter(tmp_path / "router.gguf", routers(mixes[1]))
    with open_model(gateless, options(adapter)) as model:
        assert distance(logits_of(model), logits(routed)) < CLOSE


def test_a_router_in_an_adapter_works_on_a_quantised_mix(mixes: tuple[Path, Path, Path], family, tmp_path: Path):
    models = family("llama3_like", dtype="f32")
    first, second = (
        build_mix(tmp_path / f"{seed}.gguf", models.base, models.experts, router=noisy(seed), quant="Q8_0")
        for seed in (1, 2)
    )
    with open_model(first, options(mixes[2])) as model:
        assert distance(logits_of(model), logits(second)) < CLOSE


def test_generation_scores_and_taps_all_see_the_adapter(mixes: tuple[Path, Path, Path]):
    first, second, adapter = mixes
    prompt, greedy = list(TOKENS), Sampling(temp=0)
    found = []
    for path, given in ((first, adapter), (second, None)):
        with open_model(path, options(given)) as model, Tap(model, [tap.MOE_PROBS]) as reader:
            said = list(islice(model.generate(prompt, greedy), 10))
            (tapped,) = reader.run([prompt])
            (scored,) = score(model, [prompt], [0])
            answers = dict(generate_greedy(model, [prompt], 10, lambda token: False))
            found.append((said, answers[0], scored.logprobs, tapped.values[tap.MOE_PROBS, 1]))
    (said, answer, scores, probs), (expected_said, expected_answer, expected_scores, expected_probs) = found
    assert said == answer == expected_said == expected_answer
    assert distance(scores, expected_scores) < CLOSE
    assert distance(probs, expected_probs) < CLOSE


def test_alpha_over_rank_scales_an_adapter(mixes: tuple[Path, Path, Path], tmp_path: Path):
    first, second, _ = mixes
    halves = {name: (values - routers(first)[name]) / 2 for name, values in routers(second).items()}
    adapter = write_adapter(tmp_path / "a.gguf", halves, alpha=2 * N_EXPERT)
    with open_model(first, options(adapter)) as model:
        assert distance(logits_of(model), logits(second)) < CLOSE


def test_what_is_no_adapter_of_this_model_is_refused(mixes: tuple[Path, Path, Path], tmp_path: Path):
    mix = mixes[0]
    name = "blk.0.ffn_gate_inp.weight"
    good = np.zeros((N_EXPERT, N_EMBD))
    wrong = {
        "not a LoRA adapter": mixes[1],
        "not a LoRA adapter in GGUF form": write_adapter(tmp_path / "kind.gguf", {name: good}, kind="model"),
        "an adapter of architecture 'qwen2', expected 'llama'": write_adapter(
            tmp_path / "arch.gguf", {name: good}, arch="qwen2"
        ),
        f"tensor '{name}' has incorrect shape": write_adapter(tmp_path / "shape.gguf", {name: good[:, :-1]}),
        "LoRA tensor 'blk.9.ffn_gate_inp.weight' does not exist": write_adapter(
            tmp_path / "layer.gguf", {"blk.9.ffn_gate_inp.weight": good}
        ),
        "cannot be read": tmp_path / "missing.gguf",
    }
    for says, adapter in wrong.items():
        with pytest.raises(UserError) as caught:
            open_model(mix, options(adapter))
        assert says in str(caught.value) and adapter.name in str(caught.value)


def test_chat_runs_with_an_adapter(mixes: tuple[Path, Path, Path], tmp_path: Path, capfd):
    first, second, adapter = mixes
    asked = ["--prompt", "hello there", "--temp", "0", "--max-tokens", "20", "--threads", "1"]

    def answer(path: Path, *flags: str) -> str:
        assert main(["chat", str(path), *asked, *flags]) == 0
        return capfd.readouterr().out

    assert answer(first, "--adapter", str(adapter)) == answer(second) != answer(first)
    assert main(["chat", str(first), *asked, "--adapter", str(second)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "2.gguf: not a LoRA adapter in GGUF form" in error
