"""What a benchmark counts, not how fast anything is."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType

from conftest import build_mix, rewrite
from moegguf.cli import main
from moegguf.gguf_header import read_header
from moegguf.runtime.bench import Lengths, bench
from moegguf.runtime.model import RunOptions

FLAGS = ("--threads", "1", "--prompt", "7,40", "--generate", "5", "--repeat", "3")


@pytest.fixture(scope="module")
def mixes(family, tmp_path_factory) -> dict[str, Path]:
    """The same three experts as one dense FFN, and as a stack of which two run for a token."""
    tiny, folder = family("llama3_like"), tmp_path_factory.mktemp("bench")
    router = {"mode": "noisy", "k": 2}
    return {
        "fused": build_mix(folder / "fused.gguf", tiny.base, tiny.experts, layout="fused"),
        "noisy": build_mix(folder / "noisy.gguf", tiny.base, tiny.experts, router=router),
    }


def run(capsys, *argv: object) -> dict:
    assert main(["bench", *map(str, argv), *FLAGS, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_speeds_are_tokens_over_seconds_of_every_run(mixes, capsys):
    found = run(capsys, mixes["fused"], "--compare", mixes["noisy"])
    assert [each["file"] for each in found["models"]] == [str(mixes["fused"]), str(mixes["noisy"])]
    assert found["stream_bytes_per_s"] > 1e8
    for each in found["models"]:
        assert [rate["tokens"] for rate in each["prompts"]] == [7, 40]
        assert [rate["tokens"] for rate in each["generations"]] == [5]
        for rate in each["prompts"] + each["generations"]:
            speeds = [rate["tokens"] / seconds for seconds in rate["seconds"]]
            assert len(speeds) == 3
            assert rate["tokens_per_s"] == pytest.approx(statistics.fmean(speeds))
            assert rate["stdev"] == pytest.approx(statistics.stdev(speeds))
        assert each["first_token_seconds"]["40"] == pytest.approx(40 / each["prompts"][1]["tokens_per_s"])
        assert each["load_seconds"] > 0 and each["resident_bytes"] > 0


def test_a_token_reads_all_but_the_embedding_and_of_a_stack_the_experts_that_run(mixes, capsys):
    for name, share in (("fused", 1), ("noisy", 2 / 3)):
        tensors = read_header(mixes[name]).tensors.values()
        rest = sum(info.nbytes for info in tensors if "_exps" not in info.name and info.name != "token_embd.weight")
        stacked = sum(info.nbytes for info in tensors if "_exps" in info.name)
        row = next(info.nbytes // info.shape[0] for info in tensors if info.name == "token_embd.weight")
        (found,) = run(capsys, mixes[name])["models"]
        assert found["touched_bytes_per_token"] == pytest.approx(rest + stacked * share, abs=row + 8)
        assert found["bytes_per_s"] == pytest.approx(
            found["touched_bytes_per_token"] * found["generations"][0]["tokens_per_s"]
        )


def test_progress_counts_every_token_the_warm_up_included(mixes):
    heard: list[int] = []
    lengths = Lengths(prompts=(600, 3), generations=(2,), repeat=2)
    bench(mixes["fused"], RunOptions(threads=1, ctx=640), lengths, heard.append)
    assert sum(heard) == lengths.n_tokens == 2 * 605 + 600 + 1
    assert max(heard) == 512


def test_the_table_names_files_and_ratios(mixes, capsys):
    assert main(["bench", str(mixes["fused"]), "--compare", str(mixes["noisy"]), *FLAGS]) == 0
    said = capsys.readouterr().out
    for words in ("fused.gguf", "noisy.gguf", "ratio", "prompt of 40", "generation of 5", "% of the machine's"):
        assert words in said


def test_lengths_that_nobody_asked_for_fit_into_the_smallest_context(mixes, tmp_path, capsys):
    length = {"llama.context_length": GGUFValue(48, GGUFValueType.UINT32)}
    short = rewrite(mixes["fused"], tmp_path / "short.gguf", keys=length)
    flags = ("--threads", "1", "--repeat", "1", "--json")
    assert main(["bench", str(mixes["noisy"]), "--compare", str(short), *flags]) == 0
    for each in json.loads(capsys.readouterr().out)["models"]:
        assert [rate["tokens"] for rate in each["prompts"]] == [48]
        assert [rate["tokens"] for rate in each["generations"]] == [32, 48]


def test_what_is_saved_is_what_is_printed_and_is_replaced_by_word_only(mixes, tmp_path, capsys):
    saved = tmp_path / "speeds.json"
    found = run(capsys, mixes["fused"], "--save", saved)
    assert json.loads(saved.read_text()) == found
    before = saved.read_bytes()
    assert main(["bench", str(mixes["fused"]), *FLAGS, "--save", str(saved)]) == 2
    assert "exists already" in capsys.readouterr().err and saved.read_bytes() == before
    assert run(capsys, mixes["fused"], "--save", saved, "--force") == json.loads(saved.read_text()) != found


@pytest.mark.parametrize(
    ("argv", "read"),
    [
        ("bench MIX", "MIX"),
        ("bench TEXT --compare MIX", "MIX"),
        ("eval MIX --tasks TEXT", "MIX"),
        ("eval MIX --tasks facts=TEXT", "TEXT"),
        ("route map MIX --text facts=TEXT", "MIX"),
        ("route map MIX --text facts=TEXT", "TEXT"),
    ],
)
def test_results_never_take_the_place_of_what_is_read(argv, read, mixes, tmp_path, capsys):
    files = {"MIX": tmp_path / "mix.gguf", "TEXT": tmp_path / "text.txt"}
    files["MIX"].write_bytes(mixes["noisy"].read_bytes())
    files["TEXT"].write_text("One and one is two. " * 20)
    before = files[read].read_bytes()
    for name, path in files.items():
        argv = argv.replace(name, str(path))
    assert main([*argv.split(), "--save", str(files[read]), "--force"]) == 2
    assert "is one of the files to read" in capsys.readouterr().err and files[read].read_bytes() == before


def test_results_are_kept_whoever_reads_them_leaves(mixes, tmp_path, monkeypatch):
    def leave(_):
        raise BrokenPipeError

    saved = tmp_path / "speeds.json"
    monkeypatch.setattr("sys.stdout.write", leave)
    assert main(["bench", str(mixes["fused"]), *FLAGS, "--save", str(saved), "--json"]) == 141
    assert json.loads(saved.read_text())["models"]
