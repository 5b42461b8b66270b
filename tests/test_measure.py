"""`moegguf measure`: figures are those of the logits, kept logits say the same, and errors are of chunks."""

from __future__ import annotations

import json
import os
import re
import signal
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType

import moegguf
from conftest import TOKENS, Heard, build_dense, build_mix, logits, rewrite
from moegguf.cli import main
from moegguf.demo import MEMBERS, folder
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.jobs.divergences import KeptReference, chunk_length, compare, keep_reference, sequences_of
from moegguf.measurement import divergence
from moegguf.measurement.divergence import (
    TOKEN,
    Divergence,
    pack,
    packed_type,
    reference_of,
    row_blocks,
    token_values,
    unpack,
)
from moegguf.measurement.results import Z, wilson
from moegguf.runtime import batch
from moegguf.runtime.offload import WHAT_FITS
from moegguf.runtime.vocab import open_vocab
from moegguf.sizes import show_size
from moegguf.texts import Text, read_records
from tiny_gguf import babbling, write_gguf

SEQUENCES = [TOKENS, tuple(range(7, 300, 9)), (5, 6)]


@pytest.fixture(scope="module")
def tiny(family, tmp_path_factory) -> dict[str, Path]:
    """A dense model in several types."""
    models, output = family("llama3_like", dtype="f32"), tmp_path_factory.mktemp("tiny")
    return {quant: build_dense(output / f"{quant}.gguf", models.base, quant=quant) for quant in ("F32", "Q8_0", "Q4_0")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict[str, Path]:
    """The mix of the embedded family in several types."""
    output, experts = tmp_path_factory.mktemp("demo"), [folder(name) for name in MEMBERS]
    return {
        quant: build_mix(output / f"{quant}.gguf", folder("base"), experts, layout="fused", quant=quant)
        for quant in ("F32", "Q8_0", "Q4_K_M", "Q2_K")
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("chain") / "chain.gguf", babbling())


@pytest.fixture
def measure(tmp_path, capsys) -> Callable[..., dict]:
    """`measure(*argv)`: run the command with a cache of its own; the JSON that it prints."""

    def run(*argv: object) -> dict:
        keeps = {"--no-cache", "--reference-logits"} & set(map(str, argv))
        flags = ("--json", "--threads", 1, *(() if keeps else ("--cache", tmp_path / "cache")))
        assert main(["measure", *map(str, (*argv, *flags))]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def log_softmax(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


def random_logits(n: int, n_vocab: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a reference and of a model that differs by `shift` nats, and what follows."""
    random = np.random.default_rng(seed)
    reference = 4 * random.normal(size=(n, n_vocab))
    model = reference + shift * random.normal(size=reference.shape)
    return reference.astype(np.float32), model.astype(np.float32), random.integers(0, n_vocab, n)


def through_file(reference: np.ndarray, model: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The values that come of logits that were packed."""
    return token_values(unpack(pack(reference, following)), model, following)


# --- figures ---


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_figures_are_those_of_the_logits(tiny, quant: str):
    found = compare(tiny["F32"], tiny[quant], SEQUENCES, threads=1)
    log_p, log_q = (
        np.concatenate([log_softmax(logits(tiny[each], tokens)[:-1]) for tokens in SEQUENCES])
        for each in ("F32", quant)
    )
    following = np.concatenate([tokens[1:] for tokens in SEQUENCES])
    rows, top = np.arange(len(following)), log_p.argmax(axis=1)
    kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert found.n_tokens == len(following) and found.lengths.tolist() == [13, 32, 1]
    assert kld.mean() > 1e-5
    assert found.kld.value == pytest.approx(kld.mean(), abs=1e-6)
    percents = (50, 99, 100)
    assert list(map(found.kld_percentile, percents)) == pytest.approx(np.percentile(kld, percents), abs=1e-6)
    assert found.top1.value == np.mean(top == log_q.argmax(axis=1))
    change = np.exp(log_q[rows, top]) - np.exp(log_p[rows, top])
    assert found.p_change.value == pytest.approx(np.abs(change).mean(), abs=1e-6)
    assert found.perplexity.value == pytest.approx(np.exp(-log_q[rows, following].mean()), rel=1e-6)
    assert found.perplexity_reference.value == pytest.approx(np.exp(-log_p[rows, following].mean()), rel=1e-6)


def test_a_model_does_not_diverge_from_itself(tiny, tmp_path):
    found = compare(tiny["F32"], tiny["F32"], SEQUENCES, threads=1)
    assert np.abs(found.tokens["kld"]).max() < 1e-12
    assert found.top1.value == 1 and found.p_change.value == 0
    assert found.perplexity == found.perplexity_reference
    kept = keep_reference(tiny["F32"], SEQUENCES, tmp_path, threads=1)
    assert np.abs(kept.compare(tiny["F32"], threads=1).tokens["kld"]).max() < 1e-8


def test_fewer_bits_diverge_more_and_kept_logits_say_so_too(demo, measure):
    text = ("--text", "demo:math/heldout#8", "demo:clinic/heldout#8")
    models = [demo[quant] for quant in ("Q8_0", "Q4_K_M", "Q2_K")]
    kept = measure(*models, "--against", demo["F32"], *text)
    lockstep = measure(*models, "--against", demo["F32"], *text, "--no-cache")
    means = [model["overall"]["kld"]["mean"] for model in lockstep["models"]]
    assert 1e-5 < means[0] < means[1] / 4 < means[2] / 16
    for a, b in zip(kept["models"], lockstep["models"], strict=True):
        assert set(a["texts"]) == {"math", "clinic"}
        for text in a["texts"]:
            n, exact = a["texts"][text]["tokens"], b["texts"][text]["kld"]["mean"]
            assert abs(a["texts"][text]["kld"]["mean"] - exact) < 1e-8 + 3e-5 * np.sqrt(exact / n)
            for figure in ("perplexity", "perplexity_reference"):
                assert a["texts"][text][figure] == pytest.approx(b["texts"][text][figure])
        parts = a["texts"].values()
        assert a["overall"]["tokens"] == sum(part["tokens"] for part in parts)
        pooled = sum(part["tokens"] * part["kld"]["mean"] for part in parts) / a["overall"]["tokens"]
        assert a["overall"]["kld"]["mean"] == pytest.approx(pooled)


def test_the_size_of_batches_and_blocks_does_not_matter(tiny, monkeypatch):
    expected = compare(tiny["F32"], tiny["Q4_0"], SEQUENCES, threads=1)
    monkeypatch.setattr(batch, "MAX_BATCH", 16)
    monkeypatch.setattr(batch, "_MAX_LOGITS", 5 * 410)
    monkeypatch.setattr(divergence, "BLOCK", 3 * 410)
    found = compare(tiny["F32"], tiny["Q4_0"], SEQUENCES, threads=1)
    assert found.tokens["kld"] == pytest.approx(expected.tokens["kld"], abs=1e-6)
    assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-6)


def test_logits_of_any_size_give_finite_figures():
    reference, model = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    reference[0], model[1] = (3e38, -3e38, 0, 0), (1e4, 0, 0, 0)
    found = Divergence.of(reference, model, [0, 1])
    assert found.tokens["kld"] == pytest.approx([np.log(4), 7500 - np.log(4)])
    reference[0, 1] = model[0, 1] = -np.inf
    assert Divergence.of(reference, model, [0, 1]).tokens["kld"][0] == pytest.approx(np.log(3))


def test_a_large_vocabulary_takes_a_few_megabytes_at_a_time():
    reference, model, following = random_logits(40, 128_256, 0.1)
    assert reference.nbytes > 20e6
    tracemalloc.start()
    Divergence.of(reference, model, following)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 < 4 * reference.astype(np.float64).nbytes
    assert all((rows.stop - rows.start) * 128_256 <= divergence.BLOCK for rows in row_blocks(40, 128_256))


# --- errors ---


def of_klds(chunks: list[np.ndarray], field: str = "kld") -> Divergence:
    tokens = np.zeros(sum(map(len, chunks)), TOKEN)
    tokens[field] = np.concatenate(chunks)
    return Divergence(tokens, np.array(list(map(len, chunks))))


def test_adding_puts_chunks_side_by_side_and_splitting_undoes_it():
    parts = [Divergence.of(*random_logits(n, 50, 0.3, seed=n)) for n in (5, 1, 9)]
    total = parts[0] + parts[1] + parts[2]
    assert total.lengths.tolist() == [5, 1, 9]
    assert total.kld.value == pytest.approx(np.concatenate([part.tokens["kld"] for part in parts]).mean())
    first, rest = total.split([1, 2])
    assert (first.tokens == parts[0].tokens).all() and (rest.tokens == (parts[1] + parts[2]).tokens).all()


def test_tokens_that_repeat_each_other_do_not_make_it_surer():
    klds = np.random.default_rng(3).exponential(size=20)
    once, often = of_klds([klds[[i]] for i in range(20)]), of_klds([np.repeat(klds[i], 30) for i in range(20)])
    assert once.kld == pytest.approx(often.kld)
    assert once.kld.error == pytest.approx(klds.std(ddof=1) / np.sqrt(20))
    assert of_klds([klds]).kld.error is None and of_klds([klds]).top1_interval is None


def test_an_error_covers_the_truth_as_often_as_it_says():
    """Chunks of unequal lengths, whose tokens share a part of what they are."""
    random = np.random.default_rng(1)
    hits = []
    for _ in range(400):
        lengths = random.integers(5, 40, 30)
        mean, error = of_klds([random.exponential(size=n) + random.exponential() for n in lengths]).kld
        hits.append(abs(mean - 2) < Z * error)
    assert 0.90 < np.mean(hits) < 0.98


def test_the_interval_of_agreement_is_wilsons_and_wider_where_tokens_agree_together():
    random = np.random.default_rng(2)
    apart = of_klds([random.random(25) < 0.9 for _ in range(40)], "is_same_top")
    together = of_klds([np.repeat(random.random() < 0.9, 25) for _ in range(40)], "is_same_top")
    low, high = apart.top1_interval
    assert (low, high) == pytest.approx(wilson(apart.top1.value, 1000), abs=0.02)
    assert together.top1_interval == pytest.approx(wilson(together.top1.value, 39), abs=1e-6)
    always = of_klds([np.ones(50, bool)] * 4, "is_same_top")
    assert always.top1_interval == wilson(1.0, 200)


# --- kept logits ---


@pytest.mark.parametrize("n_vocab", [40, 1024, 32_000])
@pytest.mark.parametrize("shift", [0, 1e-3, 0.03, 0.5])
def test_packing_moves_a_divergence_by_less_than_is_said(n_vocab: int, shift: float):
    n = min(2000, 2**22 // n_vocab)
    reference, model, following = random_logits(n, n_vocab, shift)
    exact = Divergence.of(reference, model, following).tokens
    found = np.concatenate(
        [through_file(reference[rows], model[rows], following[rows]) for rows in row_blocks(n, n_vocab)]
    )
    kld = exact["kld"].mean(dtype=np.float64)
    off = found["kld"].astype(np.float64) - exact["kld"]
    assert abs(off.mean()) < 1e-8 + 3e-5 * np.sqrt(kld / n)
    assert off.std() < 1e-8 + 1e-5 * np.sqrt(kld) * 3
    if kld > 1e-3:
        assert off.mean() == pytest.approx(0, abs=1e-5 * kld)
    assert (found["is_same_top"] == exact["is_same_top"]).mean() > 0.999
    assert found["nll_reference"] == pytest.approx(exact["nll_reference"])


def test_packed_logits_take_two_bytes_a_token_of_the_vocabulary():
    assert packed_type(128_256).itemsize == 2 * 128_256 + 4


def test_the_likeliest_token_is_kept_and_what_is_all_but_impossible_too():
    logits = np.array([[0, 10, 10 + 1e-5, -200], [1, 1, 1, 1]], np.float32)
    following = np.array([3, 0])
    found = unpack(pack(logits, following))
    assert found.log_p.argmax(axis=1).tolist() == [2, 0]
    assert found.nll == pytest.approx(reference_of(logits, following).nll, rel=1e-6)
    assert np.exp(found.log_p).sum(axis=1) == pytest.approx(1)


def test_what_is_kept_is_not_run_again_and_a_cut_file_is(tiny, tmp_path):
    kept = keep_reference(tiny["F32"], SEQUENCES, tmp_path, threads=1)
    (path,) = tmp_path.iterdir()
    whole, written = path.read_bytes(), path.stat().st_mtime_ns
    assert len(whole) == kept.nbytes
    assert keep_reference(tiny["F32"], SEQUENCES, tmp_path, threads=1).path == kept.path == path
    assert path.stat().st_mtime_ns == written
    for n_left in (len(whole) - 1, 60, 5, 0):
        path.write_bytes(whole[:n_left])
        assert not kept.is_there
        keep_reference(tiny["F32"], SEQUENCES, tmp_path, threads=1)
        assert path.read_bytes() == whole


def test_another_file_text_or_device_is_kept_elsewhere(tiny, tmp_path):
    kept = [
        keep_reference(tiny[quant], sequences, tmp_path, threads=1).path
        for quant in ("F32", "Q8_0")
        for sequences in (SEQUENCES, SEQUENCES[:1])
    ]
    os.utime(tiny["Q8_0"])
    kept.append(keep_reference(tiny["Q8_0"], SEQUENCES, tmp_path, threads=1).path)
    assert len(set(kept)) == 5
    patient = replace(WHAT_FITS, patience=5)  # which changes no figure
    assert keep_reference(tiny["F32"], SEQUENCES, tmp_path, offload=patient).path == kept[0]


def test_ctrl_c_leaves_no_half_file(chain, tmp_path):
    target = tmp_path / "kept.logits"
    kept = KeptReference(target, read_header(chain), [list(b"abcdefgh" * 20)] * 20)
    with pytest.raises(KeyboardInterrupt):
        kept.write(threads=1, progress=lambda n: signal.raise_signal(signal.SIGINT))
    assert list(tmp_path.iterdir()) == []
    kept.write(threads=1)
    assert kept.is_there


def test_a_named_file_is_used_again_and_never_for_anything_else(demo, measure, tmp_path, capsys):
    target, text = tmp_path / "kept" / "f32.logits", ("--text", "demo:math/heldout#2")
    argv = (demo["Q8_0"], "--against", demo["F32"], "--reference-logits", target)
    first = measure(*argv, *text)
    written = target.stat().st_mtime_ns
    assert measure(*argv, *text) == first
    assert target.stat().st_mtime_ns == written
    assert main(["measure", *map(str, argv), "--text", "demo:clinic/heldout#2"]) == 2
    assert "other text" in capsys.readouterr().err
    target.write_text("my notes")
    assert main(["measure", *map(str, argv), *text]) == 2
    assert "something else" in capsys.readouterr().err and target.read_text() == "my notes"


# --- texts ---


@pytest.mark.parametrize("kind", ["llama3_like", "demo"])
def test_every_token_counts_once_but_the_first(kind: str, tiny, demo):
    """With a BOS, that is the first one of each chunk; without, each chunk begins with the token before it."""
    header = read_header({"llama3_like": tiny, "demo": demo}[kind]["F32"])
    vocab, text = open_vocab(header.path), "The quick brown fox jumps over the lazy dog. " * 40
    tokens = vocab.tokenize_prompt(text)
    chunks = sequences_of(header, {"fox": [Text(text, "")]}, chunk=50, max_tokens=10**6)["fox"]
    assert len(chunks) > 2 and max(map(len, chunks)) == 50
    assert [token for chunk in chunks for token in chunk[1:]] == tokens[1:]
    begins_with_bos = kind == "llama3_like"
    assert (vocab.tokenize_prompt("") == [vocab.bos]) == begins_with_bos
    heads = [vocab.bos] * len(chunks) if begins_with_bos else [tokens[0], *(chunk[-1] for chunk in chunks[:-1])]
    assert [chunk[0] for chunk in chunks] == heads


def test_of_each_text_the_first_tokens_are_taken(demo):
    header = read_header(demo["F32"])
    texts = {"math": read_records("demo:math/heldout#30"), "plain": [Text("Hello there. " * 10_000, "")]}
    everything = sequences_of(header, texts, chunk=64, max_tokens=10**6)
    some = sequences_of(header, texts, chunk=64, max_tokens=300)
    for name in texts:
        assert sum(len(chunk) - 1 for chunk in some[name]) == 300
        assert some[name][:-1] == everything[name][: len(some[name]) - 1]


def test_chunks_fit_what_the_reference_was_made_for(tiny, demo):
    assert chunk_length(read_header(tiny["F32"])) == 512
    assert chunk_length(read_header(demo["F32"])) == 256
    assert chunk_length(read_header(demo["F32"]), 100) == 100


# --- the command ---


def test_the_table_has_a_line_a_model_under_each_text(demo, tmp_path, capsys):
    argv = [demo["Q8_0"], demo["Q2_K"], "--against", demo["F32"], "--threads", 1, "--cache", tmp_path]
    assert main(["measure", *map(str, argv), "--text", "demo:math/heldout#4", "own=demo:strings#4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.partition(":")[0] for line in lines if " tokens in " in line and ":" in line]
    assert heads == ["math", "own", "all texts"]
    assert [line.split()[0] for line in lines if line.startswith("Q")] == ["Q8_0", "Q2_K"] * 3
    size = next(line for line in lines if "will be kept" in line)
    (kept,) = tmp_path.iterdir()
    assert str(kept) in size and show_size(kept.stat().st_size) in size


def test_domains_of_a_recipe_are_texts(demo, measure, tmp_path):
    recipes = tmp_path / "models.toml"
    recipes.write_text(
        '[mix.own]\nbase = "demo:base"\nexperts = [{ name = "math", source = "demo:math" }]\n'
        'domains = { math = "demo:math#3" }\n'
    )
    argv = (demo["Q8_0"], "--against", demo["F32"])
    by_recipe = measure(*argv, "--domains", "own", "--recipes", recipes)
    assert by_recipe == measure(*argv, "--text", "math=demo:math#3")


def test_python_gives_what_the_command_gives(demo, measure, tmp_path):
    text = ("--text", "math=demo:math/heldout#2", "demo:clinic/heldout#2")
    expected = measure(demo["Q8_0"], demo["Q2_K"], "--against", demo["F32"], *text)
    texts = {"math": "demo:math/heldout#2", "clinic": ["demo:clinic/heldout#2"]}
    how = {"cache": tmp_path / "cache", "threads": 1, "watch": (heard := Heard())}
    found = moegguf.measure([demo["Q8_0"], demo["Q2_K"]], demo["F32"], text=texts, **how)
    assert json.loads(json.dumps(found.as_json())) == expected
    n_tokens = 2 * found.models[0].overall.n_tokens
    assert heard.parts == {"F32.gguf": [n_tokens, n_tokens]}


def test_mistakes_in_python_are_user_errors(demo, tmp_path):
    for how, says in (
        ({"text": 5}, "text 5: expected a path"),
        ({"text": ()}, "nothing to measure on"),
        ({"chunk": "long"}, "chunk 'long': expected int"),
        ({"max_tokens": 1.5}, "max_tokens 1.5: expected int"),
        ({"keep": False, "cache": tmp_path}, "--cache, --reference-logits and --no-cache exclude each other"),
        ({"against": None}, "against None: expected a path"),
    ):
        with pytest.raises(UserError, match=says):
            moegguf.measure(demo["Q8_0"], **{"against": demo["F32"], "text": "demo:math#1"} | how)


def test_logits_that_cannot_be_kept_are_one_line_with_the_file(chain, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.logits").mkdir()
    (tmp_path / "text.txt").write_text("a few words")
    for flag, path, why in (
        ("--cache", tmp_path / "file", r"/file/\w+\.logits: cannot be read \(Not a directory\)"),
        ("--reference-logits", tmp_path / "folder.logits", r"/folder\.logits: cannot be read \(Is a directory\)"),
    ):
        argv = ["measure", chain, "--against", chain, "--text", tmp_path / "text.txt", "--threads", 1, flag, path]
        assert main([*map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(why, line)


BAD = {
    "another vocabulary": (["{demo}", "--against", "{tiny}", "--text", "{text}"], "reference with another vocabulary"),
    "another token": (["{word}", "--against", "{chain}", "--text", "{text}"], "token 261 is 'ab', expected 'th'"),
    "no model": (["{here}/no.gguf", "--against", "{demo}", "--text", "{text}"], "no.gguf: cannot be read"),
    "no reference": (["{demo}", "--against", "{here}/no.gguf", "--text", "{text}"], "no.gguf: cannot be read"),
    "no text": (["{demo}", "--against", "{demo}"], "nothing to measure on"),
    "a text that is missing": (["{demo}", "--against", "{demo}", "--text", "{here}/no.txt"], "no.txt: cannot be read"),
    "one token": (["{chain}", "--against", "{chain}", "--text", "{letter}"], "text letter: has fewer than two tokens"),
    "NaN": (["{nan}", "--against", "{chain}", "--text", "{text}"], "nan.gguf: says NaN"),
    "NaN in the reference": (["{chain}", "--against", "{nan}", "--text", "{text}"], "nan.gguf: says NaN"),
    "a chunk of one": (["{demo}", "--against", "{demo}", "--text", "{text}", "--chunk", "1"], "--chunk 1: expected 2"),
    "a chunk too long": (["{demo}", "--against", "{demo}", "--text", "{text}", "--chunk", "257"], "2 to 256"),
    "no tokens": (["{demo}", "--against", "{demo}", "--text", "{text}", "--max-tokens", "0"], "--max-tokens 0"),
    "layers in words": (["{demo}", "--against", "{demo}", "--text", "{text}", "--gpu-layers", "two"], "two: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_refused_in_one_line(case, demo, tiny, chain, tmp_path, capsys):
    text, letter = tmp_path / "text.txt", tmp_path / "letter.txt"
    text.write_text("a few words")
    letter.write_text("a")
    broken = babbling()
    broken[7, 7] = np.nan
    places = {
        "demo": demo["F32"], "tiny": tiny["F32"], "chain": chain, "text": text, "letter": letter, "here": tmp_path,
        "nan": write_gguf(tmp_path / "nan.gguf", broken),
        "word": write_gguf(tmp_path / "word.gguf", babbling(), word="ab"),
    }  # fmt: skip
    argv, said = BAD[case]
    flags = ["--threads", "1", "--cache", str(tmp_path / "cache")]
    assert main(["measure", *(each.format(**places) for each in argv), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("moegguf: error: ")
    assert len(list(tmp_path.glob("cache/*"))) == (case == "NaN")  # those of a sound reference


def test_a_file_without_a_tokenizer_is_refused(chain, tmp_path, capsys):
    none = {"tokenizer.ggml.model": GGUFValue("no_vocab", GGUFValueType.STRING)}
    path = write_gguf(tmp_path / "bare.gguf", babbling())
    bare = rewrite(path, tmp_path / "none.gguf", keep=lambda key: not key.startswith("tokenizer."), keys=none)
    (tmp_path / "t.txt").write_text("words")
    for pair in ((bare, chain), (chain, bare)):
        argv = [str(pair[0]), "--against", str(pair[1]), "--text", str(tmp_path / "t.txt"), "--threads", "1"]
        assert main(["measure", *argv, "--cache", str(tmp_path / "cache")]) == 2
        assert "none.gguf: has no vocabulary" in capsys.readouterr().err
