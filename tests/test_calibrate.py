"""A calibration against llama.cpp's own tool, against numpy, and against itself in other forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import moegguf
from conftest import build_dense, build_mix, make_recipe
from moegguf.assembly import build, plan_build
from moegguf.cli import main
from moegguf.demo.text import DOMAINS
from moegguf.gguf_header import read_header
from moegguf.jobs.calibration import (
    CalibrationOptions,
    experts_of,
    plan_calibration,
    run_calibration,
    unreached,
)
from moegguf.mix import FFN_ROLES
from moegguf.quant.imatrix import Calibration, read_calibration, read_imatrix
from moegguf.recipe import find_recipes_file, load_recipe
from moegguf.runtime import tap
from moegguf.runtime.batch import logits as batched_logits
from moegguf.runtime.inputs import InputSquares
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.nodes import name_of
from moegguf.runtime.tap import Tap
from moegguf.runtime.vocab import open_vocab
from moegguf.squares import Squares, added
from moegguf.texts import Record, read_records
from test_architectures import ARCHITECTURES, as_architecture
from test_oracle import squeeze
from test_tap import N_EXPERT, NOISY, K, sequences

FIXTURES = Path(__file__).parent / "fixtures" / "imatrix"
TEXT = FIXTURES / "text.txt"
SMALL = {"hidden_size": 64, "intermediate_size": 96}
CHUNK = 128
EXACT = RunOptions(threads=1, kv_type=GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def models(family):
    return family("llama3_like", dtype="f32", **SMALL)


@pytest.fixture(scope="module")
def mix(models, tmp_path_factory) -> Path:
    """The F32 mix that the fixtures were made of."""
    return build_mix(tmp_path_factory.mktemp("mix") / "mix.gguf", models.base, models.experts, router=NOISY)


@pytest.fixture(scope="module")
def gateless(models, tmp_path_factory) -> dict[str, Path]:
    """One gate-less mix in every layout."""
    folder = tmp_path_factory.mktemp("gateless")
    return {
        layout: build_mix(folder / f"{layout}.gguf", models.base, models.experts, layout=layout)
        for layout in ("mixtral", "fused", "shared")
    }


def calibrate(
    model: Path, path: Path, texts: Mapping[str, Sequence[Record]] | None = None, *, chunk: int = CHUNK, **given
) -> Calibration:
    options = CalibrationOptions(chunk=chunk, threads=1, **given)
    texts = texts or {"text": read_records(str(TEXT))}
    run_calibration(plan_calibration(model, texts, path, options, datasets=["text.txt"]))
    return read_calibration(path)


def squares_of(model: Path, texts: Sequence[Sequence[int]]) -> dict[str, Squares]:
    total: dict[str, Squares] = {}
    with open_model(model, EXACT) as opened, InputSquares(opened) as inputs:
        for _, squares in inputs.run(texts):
            total = added(total, squares)
    return total


def assert_same(a: Mapping[str, Squares], b: Mapping[str, Squares], tolerance: float = 2e-5) -> None:
    """Of every column, relative to the largest: small sums are differences of large numbers in places."""
    assert a.keys() == b.keys()
    for name, one in a.items():
        assert one.counts.tolist() == b[name].counts.tolist(), name
        assert one.sums.shape == b[name].sums.shape, name
        assert np.abs(one.sums - b[name].sums).max() <= tolerance * b[name].sums.max(), name


# ------------------------------------------------------------------------------------ llama.cpp's own tool


def test_the_sums_are_those_of_llama_imatrix(mix: Path, tmp_path: Path):
    theirs = read_calibration(FIXTURES / "mix.imatrix")
    output = tmp_path / "imatrix.gguf"
    flags = ["--chunk", "128", "--max-tokens", str(128 * theirs.n_chunks), "--process-output", "--threads", "1"]
    assert main(["calibrate", str(mix), "--text", f"text={TEXT}", "-o", str(output), *flags]) == 0
    ours = read_calibration(output)
    assert (ours.n_chunks, ours.chunk_size, ours.datasets) == (theirs.n_chunks, 128, ("text.txt",))
    assert theirs.n_chunks >= 4
    assert_same(ours.squares, theirs.squares)


def test_a_file_has_the_names_shapes_and_keys_of_theirs(mix: Path, tmp_path: Path):
    calibrate(mix, tmp_path / "imatrix.gguf", output=True)
    ours, theirs = read_header(tmp_path / "imatrix.gguf"), read_header(FIXTURES / "mix.imatrix")
    assert list(ours.tensors) == list(theirs.tensors)
    for name, info in ours.tensors.items():
        assert squeeze(info.shape) == squeeze(theirs.tensors[name].shape), name
    assert [ours.value(key).type for key in theirs.fields] == [theirs.value(key).type for key in theirs.fields]


def test_their_old_format_says_the_same():
    old, new = read_imatrix(FIXTURES / "mix.dat"), read_imatrix(FIXTURES / "mix.imatrix")
    assert old.n_chunks == new.n_chunks
    assert old.entries.keys() == new.entries.keys()
    for name, values in new.entries.items():
        np.testing.assert_allclose(old.entries[name].ravel(), values.ravel(), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- numpy


def test_sums_are_those_of_the_tapped_values_and_counts_those_of_the_routing(mix: Path):
    texts = sequences(50, 30, 2)
    found = squares_of(mix, texts)
    nodes = (tap.ATTENTION_INPUT, tap.ATTENTION_OUTPUT, tap.ROUTER_INPUT, tap.MOE_TOPK, tap.MOE_SWIGLU)
    with open_model(mix, EXACT) as model, Tap(model, nodes) as reader:
        (tapped,) = reader.run(texts)
    for layer in (0, 1):
        x = {node: tapped.values[node, layer] for node in nodes}
        used = x[tap.MOE_TOPK]
        down = x[tap.MOE_SWIGLU].reshape(len(used), K, -1)
        chosen = [(used == expert) for expert in range(N_EXPERT)]
        every = {
            "attn_q": x[tap.ATTENTION_INPUT], "attn_k": x[tap.ATTENTION_INPUT], "attn_v": x[tap.ATTENTION_INPUT],
            "attn_output": x[tap.ATTENTION_OUTPUT], "ffn_gate_inp": x[tap.ROUTER_INPUT],
        }  # fmt: skip
        expected = {role: Squares(np.square(rows).sum(axis=0)[None], np.array([len(rows)]))
                    for role, rows in every.items()}  # fmt: skip
        counts = np.bincount(used.ravel(), minlength=N_EXPERT)
        for role in ("ffn_gate_exps", "ffn_up_exps"):
            reached = [x[tap.ROUTER_INPUT][some.any(axis=1)] for some in chosen]
            expected[role] = Squares(np.array([np.square(rows).sum(axis=0) for rows in reached]), counts)
        expected["ffn_down_exps"] = Squares(np.array([np.square(down[some]).sum(axis=0) for some in chosen]), counts)
        assert 0 < counts.min() < counts.max() and counts.sum() == 82 * K
        assert_same({role: found[f"blk.{layer}.{role}.weight"] for role in expected}, expected, tolerance=1e-5)
    assert len(found) == 2 * len(expected)


def test_a_sequence_longer_than_a_batch_has_the_same_sums(mix: Path, monkeypatch):
    from moegguf.runtime import watch

    texts = sequences(50, 20)
    whole = squares_of(mix, texts)
    monkeypatch.setattr(watch, "max_outputs", lambda n_vocab: 16)
    assert_same(squares_of(mix, texts), whole)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_matrix_of_every_layer_is_calibrated_in_any_architecture(arch: str, family, tmp_path: Path):
    path = as_architecture(build_dense(tmp_path / "llama.gguf", family("tied").base), arch, tmp_path / "m.gguf")
    found = squares_of(path, sequences(20))
    tensors = read_header(path).tensors
    matrices = {name for name, info in tensors.items() if len(info.shape) == 2 and name.startswith("blk.")}
    assert found.keys() == matrices
    assert len({one.sums.tobytes() for one in found.values()}) == 8  # of q, k, v and of gate, up it is one in a layer
    for name, one in found.items():
        assert one.sums.shape == (1, tensors[name].shape[1]) and one.sums.min() > 0 and one.counts == 20


def test_the_output_matrix_is_calibrated_on_request_and_is_not_computed_otherwise(mix: Path, monkeypatch):
    from moegguf.runtime import inputs

    nodes: list[bytes] = []
    monkeypatch.setattr(inputs, "name_of", lambda node: nodes.append(name_of(node)) or nodes[-1])
    found = []
    for devices, output in (((), False), (("GPU0",), False), ((), True)):
        with open_model(mix, EXACT) as model:
            model.llama.placement = replace(model.placement, devices=devices)
            with InputSquares(model, output=output) as collector:
                ((_, squares),) = collector.run(sequences(20))
        found.append(squares)
    assert found[2].pop("output.weight").counts == 20
    assert_same(found[0], found[1], tolerance=0)
    assert_same(found[0], found[2], tolerance=0)
    assert nodes.count(b"result_norm") == 2


# ----------------------------------------------------------------------------------------- layouts, experts


def test_copies_of_one_expert_are_each_calibrated_as_the_dense_model(models, tmp_path: Path):
    one = models.experts[0]
    dense = calibrate(build_dense(tmp_path / "dense.gguf", one, base=models.base), tmp_path / "1.gguf")
    for layout in ("mixtral", "fused", "shared"):
        path = build_mix(tmp_path / f"{layout}.gguf", models.base, [one] * 3, layout=layout)
        experts = experts_of(calibrate(path, tmp_path / f"i-{layout}.gguf"), read_header(path))
        assert experts.keys() == {"e0", "e1", "e2"}
        for expert in experts.values():
            assert_same(expert.squares, dense.squares)


def test_every_layout_says_the_same_of_each_expert(gateless, tmp_path: Path):
    found = {
        layout: experts_of(calibrate(path, tmp_path / f"{layout}.gguf"), read_header(path))
        for layout, path in gateless.items()
    }
    for layout in ("fused", "shared"):
        for name, expert in found["mixtral"].items():
            assert_same(found[layout][name].squares, expert.squares, tolerance=1e-4)
    down = "blk.1.ffn_down.weight"
    assert np.abs(found["fused"]["e0"].squares[down].sums - found["fused"]["e1"].squares[down].sums).max() > 1


def test_an_always_on_expert_sees_every_token_and_the_others_those_that_reach_them(models, tmp_path: Path):
    path = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=NOISY, always_on="e1")
    experts = experts_of(calibration := calibrate(path, tmp_path / "imatrix.gguf"), read_header(path))
    n_tokens = calibration.texts[0].n_tokens
    counts = {name: int(one.squares["blk.0.ffn_down.weight"].counts[0]) for name, one in experts.items()}
    assert counts["e1"] == n_tokens == counts["e0"] + counts["e2"]
    assert all(one.squares.keys() == experts["e0"].squares.keys() for one in experts.values())


def test_experts_that_no_token_reached_are_named_and_count_as_the_others_do(models, tmp_path: Path, capsys):
    router = {"mode": "noisy", "k": 1, "std": 1.0, "seed": 3}
    path = build_mix(tmp_path / "mix.gguf", models.base, (models.experts * 3)[:8], router=router)
    output = tmp_path / "imatrix.gguf"
    flags = ["--chunk", "16", "--max-tokens", "16", "--threads", "1", "-o", str(output)]
    assert main(["calibrate", str(path), "--text", f"text={TEXT}", *flags]) == 0
    printed = capsys.readouterr().out
    calibration, means = read_calibration(output), read_imatrix(output).entries
    missed = unreached(calibration, read_header(path))
    assert 0 < len(missed) <= 8
    for expert, layers in missed.items():
        assert f"no token reached expert {expert} in layer {', '.join(map(str, layers))}" in printed
        for layer in layers:
            for role in FFN_ROLES:
                name = f"blk.{layer}.{role}_exps.weight"
                squares = calibration.squares[name]
                assert squares.counts[int(expert[1:])] == 0 and squares.counts.sum() == 16
                np.testing.assert_allclose(means[name][int(expert[1:])], squares.sums.sum(axis=0) / 16, rtol=1e-5)


def test_what_a_mix_says_of_each_expert_serves_it_in_another_layout(models, gateless, tmp_path: Path, capsys):
    flags = ["--text", f"text={TEXT}", "--chunk", "128", "--threads", "1", "--split", str(tmp_path / "experts")]
    assert main(["calibrate", str(gateless["fused"]), *flags, "-o", str(tmp_path / "fused.gguf")]) == 0
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["e0.gguf", "e1.gguf", "e2.gguf"]
    experts = [
        {"source": source, "imatrix": str(tmp_path / f"experts/e{i}.gguf")} for i, source in enumerate(models.experts)
    ]
    calibrate(gateless["mixtral"], tmp_path / "mixtral.gguf")
    plan = plan_build(make_recipe(tmp_path / "mix.gguf", models.base, experts, quant="Q4_0"))
    own = plan_build(
        make_recipe(
            tmp_path / "mix.gguf", models.base, models.experts, quant="Q4_0", imatrix=str(tmp_path / "mixtral.gguf")
        )
    )
    for a, b in zip(plan.form.slots, own.form.slots, strict=True):
        for mine, other in zip(a.parts, b.parts, strict=True):
            if other.importance is not None and "ffn_gate_inp" not in a.name:
                np.testing.assert_allclose(mine.importance, other.importance, rtol=1e-3, err_msg=a.name)


def test_an_expert_alone_has_the_file_of_the_dense_model_in_the_bases_trunk(models, tmp_path: Path):
    """Apart from the rounding of the temporary model, whose rows of 96 are those of Q8_0."""
    source, base = map(str, (models.experts[0], models.base))
    output = tmp_path / "expert.gguf"
    flags = ["--text", f"text={TEXT}", "--chunk", "128", "--threads", "1", "-o", str(output)]
    assert main(["calibrate", source, "--base", base, *flags]) == 0
    dense = build_dense(tmp_path / "dense.gguf", models.experts[0], base=models.base)
    assert_same(read_calibration(output).squares, calibrate(dense, tmp_path / "i.gguf").squares, tolerance=0.03)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.gguf", "expert.gguf", "i.gguf"]


def test_python_calibrates_as_the_command_does(gateless, tmp_path: Path, capsys):
    mix = gateless["shared"]
    flags = ["--text", f"text={TEXT}", "--chunk", "64", "--max-tokens", "64", "--threads", "1"]
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    mine, theirs = (tmp_path / name / "imatrix.gguf" for name in ("1", "2"))
    split = ["--split", str(mine.parent / "experts"), "--json"]
    assert main(["calibrate", str(mix), *flags, "-o", str(mine), *split]) == 0
    report = json.loads(capsys.readouterr().out)
    done = moegguf.calibrate(
        mix, text={"text": TEXT}, chunk=64, max_tokens=64, threads=1, output=theirs, split=theirs.parent / "experts"
    )
    for path in (theirs, *done.split):
        assert path.read_bytes() == (mine.parent / path.relative_to(theirs.parent)).read_bytes()
    assert report.pop("seconds") > 0
    assert report == json.loads(json.dumps(done.as_json()).replace(str(theirs.parent), str(mine.parent)))
    assert (report["matrices"][0]["tokens"], report["notes"]) == ({"text": 64}, [])
    assert [Path(file).stem for file in report["split"]] == ["e0", "e1", "e2"]
    again = moegguf.calibrate(mix, text={"text": TEXT}, chunk=64, max_tokens=64, output=theirs)
    assert again.matrices[0].n_run == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "given",
    [
        {"model": 5},
        {"text": 5},
        {"text": {}},
        {"chunk": "large"},
        {"chunk": 1},
        {"max_tokens": 0},
        {"threads": "all"},
        {"base": "demo:base"},
        {"model": "demo:math", "base": 5},
        {"pre": "qwen2"},
    ],
)
def test_values_of_the_wrong_kind_are_users_mistakes(gateless, tmp_path: Path, given):
    call = {"model": gateless["fused"], "text": {"text": TEXT}, "output": tmp_path / "i.gguf"} | given
    with pytest.raises(moegguf.UserError):
        moegguf.calibrate(**call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("router", ["gateless", "noisy"])
def test_a_recipe_gives_a_file_for_each_expert_from_the_text_that_reaches_it(router, models, tmp_path: Path, capsys):
    texts = {name: tmp_path / f"{name}.txt" for name in ("e0", "e1")}
    for i, path in enumerate(texts.values()):
        path.write_text(TEXT.read_text(encoding="utf-8")[200 * i :], encoding="utf-8")
    recipes = tmp_path / "my.toml"
    experts = ", ".join(f'{{ name = "e{i}", source = "{models.experts[i]}" }}' for i in (0, 1))
    recipes.write_text(
        f'[mix.mine]\nbase = "{models.base}"\nexperts = [{experts}]\nrouter = "{router}"\n'
        f'output = "{tmp_path}/mix.gguf"\ndomains = {{ e0 = "e0.txt", e1 = "e1.txt" }}\n'
    )
    folder = tmp_path / "experts"
    flags = ["--chunk", "64", "--threads", "1", "-o", str(folder)]
    assert main(["calibrate", "mine", "--recipes", str(recipes), *flags]) == 0
    assert f'imatrix = "{folder}/e1.gguf"' in capsys.readouterr().out
    held = {name: [text.name for text in read_calibration(folder / f"{name}.gguf").texts] for name in texts}
    assert held == ({"e0": ["e0", "e1"], "e1": ["e0", "e1"]} if router == "gateless" else {"e0": ["e0"], "e1": ["e1"]})


# --------------------------------------------------------------------------------------- texts, going on


def records(tmp_path: Path, first: int = 0, last: int | None = None) -> list[Record]:
    """Sentences, each of which runs on its own."""
    path = tmp_path / "sentences.jsonl"
    sentences = [one for one in TEXT.read_text(encoding="utf-8").split(". ") if one.strip()]
    path.write_text("\n".join(json.dumps({"text": one}) for one in sentences), encoding="utf-8")
    return read_records(str(path))[first:last]


def test_chunks_do_not_matter_where_attention_does_not_cross_them(mix: Path, tmp_path: Path):
    texts = {"text": records(tmp_path)}
    longest = max(len(open_vocab(mix).tokenize_prompt(record.text)) for record in texts["text"])
    a = calibrate(mix, tmp_path / "a.gguf", texts, chunk=longest)
    b = calibrate(mix, tmp_path / "b.gguf", texts, chunk=longest + 50)
    assert_same(a.squares, b.squares)
    c = calibrate(mix, tmp_path / "c.gguf", texts, chunk=longest // 4)
    assert np.abs(a.squares["blk.1.attn_q.weight"].sums - c.squares["blk.1.attn_q.weight"].sums).max() > 0.1


def test_a_calibration_that_was_interrupted_goes_on_and_is_that_of_one_go(mix: Path, tmp_path: Path):
    texts = {"a": read_records(str(TEXT)), "b": records(tmp_path)}
    whole = calibrate(mix, tmp_path / "whole.gguf", texts)
    output = tmp_path / "parts.gguf"
    heard: list[int] = []

    def interrupt(n_tokens: int) -> None:
        heard.append(n_tokens)
        if len(heard) == 2:
            raise KeyboardInterrupt

    options = CalibrationOptions(chunk=CHUNK, threads=1)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(plan_calibration(mix, texts, output, options), interrupt)
    part = read_calibration(output)
    assert 0 < sum(text.n_tokens for text in part.texts) < sum(text.n_tokens for text in whole.texts)
    rest = plan_calibration(mix, texts, output, options)
    assert rest.n_tokens == sum(text.n_tokens for text in whole.texts) - sum(heard)
    run_calibration(rest)
    done = read_calibration(output)
    assert done.texts == whole.texts
    assert_same(done.squares, whole.squares, tolerance=1e-5)


def test_text_added_later_and_more_of_a_text_make_the_file_of_one_go(mix: Path, tmp_path: Path):
    texts = {"a": read_records(str(TEXT)), "b": records(tmp_path)}
    whole = calibrate(mix, tmp_path / "whole.gguf", texts)
    output = tmp_path / "parts.gguf"
    calibrate(mix, output, {"a": texts["a"]}, max_tokens=128)
    first = output.read_bytes()
    calibrate(mix, output, {"a": texts["a"]}, max_tokens=128)
    assert output.read_bytes() == first  # it is all there
    calibrate(mix, output, {"a": texts["a"]})
    later = calibrate(mix, output, {"b": texts["b"]})
    assert later.texts == whole.texts
    assert_same(later.squares, whole.squares, tolerance=1e-5)
    again = calibrate(mix, output, {"a": texts["a"]}, fresh=True)
    assert [text.name for text in again.texts] == ["a"]


# ---------------------------------------------------------------------------------------------- quality


def build_demo(path: Path, quant: str, **table) -> None:
    recipe = load_recipe("demo", find_recipes_file(), {"quant": quant, "output": str(path), **table})
    build(plan_build(recipe), threads=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    """The demo mix in F16, and its imatrix."""
    folder = tmp_path_factory.mktemp("demo")
    precise, imatrix = folder / "f16.gguf", folder / "imatrix.gguf"
    build_demo(precise, "F16")
    texts = {name: read_records(f"demo:{name}#20") for name in DOMAINS}
    calibrate(precise, imatrix, texts, chunk=256)
    return precise, imatrix


def test_an_imatrix_brings_a_build_at_two_bits_closer_to_the_original(demo, tmp_path: Path):
    precise, imatrix = demo
    tokens = [
        open_vocab(precise).tokenize(f"<|user|>{chat.messages[0].content}<|assistant|>{chat.messages[1].content}")[:60]
        for name in DOMAINS
        for chat in read_records(f"demo:{name}/heldout#6")
    ]
    build_demo(tmp_path / "without.gguf", "Q2_K")
    build_demo(tmp_path / "with.gguf", "Q2_K", imatrix=str(imatrix))
    expected = logits(precise, tokens)
    without, better = (kld(expected, logits(tmp_path / name, tokens)) for name in ("without.gguf", "with.gguf"))
    assert better < 0.85 * without


def logits(path: Path, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Of all tokens of `texts` that another one follows."""
    with open_model(path, EXACT) as model:
        return np.concatenate([batch.copy() for batch in batched_logits(model, texts)])


def kld(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over tokens, in nats, of two arrays of logits (n_tokens, n_vocab)."""
    p, q = (a - a.max(axis=1, keepdims=True) for a in (p.astype(np.float64), q.astype(np.float64)))
    p, q = (a - np.log(np.exp(a).sum(axis=1, keepdims=True)) for a in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
