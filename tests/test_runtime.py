"""Opening a GGUF and generating from it, and what is said of the machine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType

from ctrl_c import pressing_ctrl_c
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.runtime import footprint, machine
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.offload import Placement, n_layers
from moegguf.runtime.placing import _bytes_per_token, _context_params, _laid_out
from moegguf.runtime.sampling import Sampling, suggested_by_file
from tiny_gguf import END, HEAD, WORD, babbling, card, repeating, saying, write_gguf

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
ONE_THREAD = RunOptions(threads=1)
GREEDY = Sampling(temp=0)
GATELESS = card(router="gateless", k=3, names=("a", "b", "c"))


def failure(path: Path, options: RunOptions = ONE_THREAD) -> str:
    with pytest.raises(UserError) as caught:
        open_model(path, options).close()
    return str(caught.value)


def test_the_tokens_follow_the_weights_in_the_file(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", saying("xyz")), ONE_THREAD) as model:
        tokens = list(islice(model.generate(model.vocab.tokenize_prompt("<|user|>q<|assistant|>"), GREEDY), 4))
        assert b"".join(map(model.vocab.piece, tokens)) == b"xyz"
        assert tokens[-1] == END
        assert [model.vocab.ends_answer(token) for token in tokens] == [False, False, False, True]


def test_a_truncated_file_is_refused_before_llama_cpp_sees_it(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", saying("a")).read_bytes()
    for size in (0, 10, 3000, len(whole) - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        assert "cut.gguf" in failure(cut)


def test_what_is_no_gguf_says_so(tmp_path):
    text = tmp_path / "m.gguf"
    text.write_text("not a model at all, just some text")
    assert "not a GGUF file" in failure(text)
    assert "cannot be read" in failure(tmp_path / "missing.gguf")
    assert "cannot be read" in failure(tmp_path)


def test_the_reason_of_a_failed_load_is_llama_cpps_own(tmp_path, capfd):
    message = failure(write_gguf(tmp_path / "m.gguf", saying("a"), arch="nosucharch"))
    assert "unknown model architecture: 'nosucharch'" in message
    assert capfd.readouterr() == ("", "")


@linux
def test_a_context_that_no_memory_holds_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**28, limits[1]))
    try:
        assert "smaller --ctx" in failure(path, RunOptions(ctx=2**20))  # 1.25 GB of keys and values
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_context_beyond_all_memory_is_refused_at_once_with_one_that_fits(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    for ctx in (2**31 - 1, 50_000_000):
        message = failure(path, RunOptions(ctx=ctx))
        assert f"a context of {ctx} tokens takes" in message and "are free" in message
        fitting = int(re.search(r"--ctx (\d+) fits", message)[1])
        header, on_cpu = read_header(path), Placement(n_layers(read_header(path)))
        assert 0 < _laid_out(header, RunOptions(ctx=fitting), on_cpu).total() < machine.memory().total


def test_what_a_long_context_takes_is_what_llama_cpp_would_lay_out(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    header, on_cpu, options = read_header(path), Placement(n_layers(read_header(path))), RunOptions(ctx=3 << 20)
    really = footprint._laid_out(path, on_cpu, _context_params(header, options, on_cpu))
    assert _laid_out(header, options, on_cpu) == really
    assert _bytes_per_token(header, options.kv_type) * options.ctx == really.kv_cache


@pytest.mark.parametrize(
    ("name", "value", "n_values"),
    [("head_count_kv", [3], 3 * 2 * HEAD), ("head_count_kv", 2, 2 * 2 * HEAD), ("key_length", 24, 24 + HEAD)],
)
def test_a_cache_has_the_heads_and_widths_that_the_header_says(name, value, n_values, tmp_path):
    """Layers may differ: then there is a number for each, here for the only one."""
    kind = (GGUFValueType.ARRAY, GGUFValueType.UINT32) if isinstance(value, list) else (GGUFValueType.UINT32, None)
    extra = {f"llama.attention.{name}": GGUFValue(value, *kind)}
    header = read_header(write_gguf(tmp_path / "m.gguf", saying("a"), extra=extra))
    n_head = 1 if name == "head_count_kv" else header.get("llama.attention.head_count")
    assert _bytes_per_token(header, GGMLQuantizationType.F16) == n_head * n_values * 2
    assert _bytes_per_token(header, GGMLQuantizationType.Q8_0) == n_head * n_values * 34 // 32


def test_the_log_is_shown_only_when_asked_for(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    open_model(path).close()
    assert capfd.readouterr() == ("", "")
    open_model(path, RunOptions(verbose=True)).close()
    assert "llama_context: n_ctx" in capfd.readouterr().err


def test_a_gate_less_mix_is_not_run_with_fewer_experts(tmp_path):
    path = write_gguf(tmp_path / "mix.gguf", saying("a"), card=GATELESS)
    assert "gate-less mix runs all its 3 experts, not 2" in failure(path, RunOptions(experts_used=2))
    open_model(path, RunOptions(experts_used=3)).close()


def test_a_gate_less_mix_that_was_set_to_fewer_experts_is_refused(tmp_path):
    path = write_gguf(tmp_path / "mix.gguf", saying("a"), card=GATELESS, used=1)
    assert "changed after it was built" in failure(path)


def test_a_noisy_mix_runs_with_any_number_of_its_experts(tmp_path):
    noisy = card(router="noisy", k=2, names=("a", "b", "c"))
    path = write_gguf(tmp_path / "mix.gguf", saying("a"), card=noisy)
    for used in (1, 2, 3):
        open_model(path, RunOptions(experts_used=used)).close()
    assert "expected 1 to 3" in failure(path, RunOptions(experts_used=4))


def test_a_file_without_a_router_takes_no_number_of_experts(tmp_path):
    fused = card(router="gateless", k=2, names=("a", "b"), layout="fused")
    path = write_gguf(tmp_path / "mix.gguf", saying("a"), card=fused)
    assert "has no router" in failure(path, RunOptions(experts_used=1))
    open_model(path).close()


def test_a_chat_template_that_does_not_compile_is_the_files_fault(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"), template="{% if %}")
    assert "chat template is broken" in failure(path)


def test_a_header_value_of_the_wrong_type_is_refused(tmp_path):
    text = {"llama.expert_count": GGUFValue("many", GGUFValueType.STRING)}
    path = write_gguf(tmp_path / "m.gguf", saying("a"), extra=text)
    assert "expert_count is 'many'" in failure(path)


def test_the_context_is_the_models_own_unless_asked_otherwise(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"), ctx=256)
    long = write_gguf(tmp_path / "long.gguf", saying("a"), ctx=100_000)
    for file, asked, expected in ((path, None, 256), (path, 64, 64), (long, None, 4096), (long, 5000, 5000)):
        with open_model(file, RunOptions(ctx=asked)) as model:
            assert model.n_ctx == expected


def test_a_piece_longer_than_the_bindings_buffer_is_whole(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", saying("a"), word="w" * 100)) as model:
        assert model.vocab.piece(WORD) == b"w" * 100
        assert model.vocab.piece(END) == b""


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", babbling()), ONE_THREAD) as model:

        def say(seed: int) -> list[int]:
            return list(islice(model.generate(model.vocab.tokenize("hello"), Sampling(temp=1, seed=seed)), 30))

        assert say(1) == say(1)
        assert say(1) != say(2)
        assert say(0) == say(0)


def test_greedy_needs_no_seed(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", babbling()), ONE_THREAD) as model:
        first, second = (list(islice(model.generate(model.vocab.tokenize("hi"), GREEDY), 20)) for _ in range(2))
        assert first == second


def test_ctrl_c_stops_a_long_prompt_in_the_midst_of_its_batch(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("yes"))
    with open_model(path, RunOptions(ctx=40_000, batch=40_000)) as model:
        prompt = model.vocab.tokenize("a b " * 9_000)
        with pressing_ctrl_c():
            next(model.generate(prompt, GREEDY))
        assert model.llama.n_tokens == 0, "the batch was not cut short"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        after = list(islice(model.generate(model.vocab.tokenize("<|assistant|>"), GREEDY), 3))
        assert b"".join(map(model.vocab.piece, after)) == b"yes"


def test_a_prompt_that_nobody_wants_any_more_is_not_evaluated_to_its_end(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", saying("yes")), ONE_THREAD) as model:
        prompt, asked = model.vocab.tokenize("a b a b"), iter([False, False, True])
        with pytest.raises(RuntimeError):
            next(model.generate(prompt, GREEDY, is_unwanted=lambda: next(asked, True)))
        assert model.llama.n_tokens == 0
        after = list(islice(model.generate(model.vocab.tokenize("<|assistant|>"), GREEDY), 3))
        assert b"".join(map(model.vocab.piece, after)) == b"yes"


def test_only_what_is_new_in_a_prompt_is_evaluated(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", repeating("ab")), ONE_THREAD) as model:
        prompt = model.vocab.tokenize("one two three")
        assert model.n_cached(prompt) == 0
        said = list(islice(model.generate(prompt, GREEDY), 4))
        assert model.n_cached(prompt) == len(prompt) - 1, "the last token is always evaluated, for its logits"
        assert model.n_cached([*prompt, *said[:3], 7, 7]) == len(prompt) + 3


@pytest.mark.parametrize(
    ("name", "text"),
    [("temp", "-1"), ("temp", "nan"), ("top_p", "1.5"), ("top_k", "many"), ("seed", "-1"), ("foo", "1")],
)
def test_a_setting_out_of_range_is_refused_by_name(name, text):
    with pytest.raises(UserError, match=name):
        Sampling().with_text(name, text)


def test_the_file_suggests_settings_and_the_user_overrides_them():
    suggested = suggested_by_file({"general.sampling.temp": 0.25, "general.sampling.top_k": 7}.get)
    assert suggested == replace(Sampling(), temp=0.25, top_k=7)
    assert suggested.merged({"temp": "0.5", "top_k": None}) == replace(Sampling(), temp=0.5, top_k=7)


def test_a_bad_suggestion_of_the_file_is_the_files_fault():
    with pytest.raises(UserError, match="the file's general"):
        suggested_by_file({"general.sampling.top_p": float("inf")}.get)


@linux
def test_threads_never_exceed_what_the_process_may_use():
    assert 1 <= machine.physical_cores() <= len(os.sched_getaffinity(0))


def test_a_cpu_quota_counts(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "_cgroups", lambda controller: iter([tmp_path]))
    assert machine._cpu_quota() == 1.5


def test_a_memory_limit_counts_and_the_page_cache_does_not(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 400000\nactive_file 200000\n")
    monkeypatch.setattr(machine, "_cgroups", lambda controller: iter([tmp_path]))
    assert machine.memory() == machine.Memory(total=1_000_000, available=900_000)


def test_doctor_reports_in_words_and_in_json(capsys):
    assert main(["doctor"]) == 0
    assert "llama.cpp  ggml" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cores"]["usable"] >= 1
    assert report["packages"]["gguf"]
    assert all(isinstance(line, str) for line in report["advice"])


def test_the_report_knows_llama_cpp_and_advice_names_what_is_missing(tmp_path):
    seen = machine.inspect_machine(tmp_path)
    assert [device.kind for device in seen.runtime.devices].count("CPU") == 1
    assert seen.runtime.ggml_version
    assert seen.is_complete
    broken = replace(seen, runtime=None, runtime_error="libgomp.so.1: not found", packages=dict.fromkeys(seen.packages))
    assert not broken.is_complete
    text = "\n".join(broken.advice)
    assert "libgomp.so.1" in text and "pip install gguf" in text
