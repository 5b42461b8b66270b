"""`moegguf plan`, and the flags that say where a model goes, through the front door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import build_mix, rewrite
from moegguf.cli import main
from moegguf.gguf_header import read_header, whole
from moegguf.runtime.bandwidth import device_bandwidth, memory_bandwidth
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.offload import CPU, EXPERTS


@pytest.fixture(scope="module")
def mixes(family, tmp_path_factory) -> dict[str, Path]:
    """A gate-less mix of three experts and one that picks two of them."""
    tiny, folder = family("llama3_like"), tmp_path_factory.mktemp("mixes")
    return {
        "gateless": build_mix(folder / "gateless.gguf", tiny.base, tiny.experts),
        "noisy": build_mix(folder / "noisy.gguf", tiny.base, tiny.experts, router={"mode": "noisy", "k": 2}),
    }


def plan(capsys, path: Path, *flags: str) -> dict:
    """What `plan --json` says; its exit code must agree with it."""
    code = main(["plan", str(path), "--json", "--bandwidth", "10GB", *flags])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["fits"] else 1)
    return found


def needed(found: dict) -> int:
    return sum(sum(parts.values()) for parts in found["memory"].values())


def test_a_machine_without_devices_keeps_everything_in_main_memory(mixes, capsys):
    found = plan(capsys, mixes["gateless"], "--device", "none")
    assert (found["fits"], found["flags"], list(found["memory"])) == (True, "--gpu-layers 0", [CPU])
    weights = sum(info.nbytes for info in read_header(mixes["gateless"]).tensors.values())
    parts = found["memory"][CPU]
    assert sum(n for part, n in parts.items() if part not in ("KV cache", "compute buffers")) == weights


def test_memory_of_the_cache_is_what_llama_cpp_makes(mixes, capsys):
    """2 layers, 2 key-value heads of 16, keys and values, 2 bytes each."""
    header = read_header(mixes["gateless"])
    head = header.get("llama.embedding_length") // header.get("llama.attention.head_count")
    per_token = 2 * header.get("llama.block_count") * header.get("llama.attention.head_count_kv") * head * 2
    for ctx in (256, 1024):
        assert plan(capsys, mixes["gateless"], "--ctx", str(ctx))["memory"][CPU]["KV cache"] == ctx * per_token


def test_a_described_gpu_takes_all_that_fits(mixes, capsys):
    roomy = plan(capsys, mixes["gateless"], "--vram", "8GB", "--ram", "8GB", "--vram-bandwidth", "100GB")
    assert roomy["layers"] == {"GPU0": 3} and roomy["cpu_experts"] == []
    assert set(roomy["memory"][CPU]) == {"embedding", "compute buffers"}
    experts = roomy["memory"]["GPU0"][EXPERTS]
    room = sum(roomy["memory"]["GPU0"].values()) - experts // 2
    tight = plan(
        capsys, mixes["gateless"], "--vram", str(room * 8 // 7 + 8), "--ram", "8GB", "--vram-bandwidth", "100GB"
    )
    assert tight["cpu_experts"] == [0] and tight["memory"][CPU][EXPERTS] == experts // 2
    assert tight["fits"] and tight["tokens_per_s"]["empty"] < roomy["tokens_per_s"]["empty"]


def test_speed_is_bytes_read_over_bandwidth(mixes, capsys):
    found = plan(capsys, mixes["noisy"], "--device", "none")
    bytes_read = found["bytes_per_token"]
    assert found["tokens_per_s"]["empty"] == pytest.approx(10e9 / bytes_read["empty"][CPU])
    assert bytes_read["full"][CPU] - bytes_read["empty"][CPU] == found["memory"][CPU]["KV cache"]
    one = plan(capsys, mixes["noisy"], "--device", "none", "--experts-used", "1")
    saved = bytes_read["empty"][CPU] - one["bytes_per_token"]["empty"][CPU]
    assert saved == pytest.approx(found["memory"][CPU][EXPERTS] / 3, abs=4)
    assert "--experts-used 1" in found["suggestions"][0]


def test_an_unknown_bandwidth_gives_no_speed(mixes, capsys):
    assert plan(capsys, mixes["noisy"], "--vram", "1GB")["tokens_per_s"] == {"empty": None, "full": None}
    assert main(["plan", str(mixes["noisy"]), "--vram", "1GB"]) == 0
    assert "--vram-bandwidth" in capsys.readouterr().out


def test_what_is_suggested_makes_it_fit(mixes, capsys):
    """Of a long context, half; of a small memory, what leaves room: each is checked by asking again."""
    path = mixes["gateless"]
    long = plan(capsys, path, "--ctx", "65536", "--ram", "1GB")
    ram = str(needed(long) * 2 // 3)
    found = plan(capsys, path, "--ctx", "65536", "--ram", ram)
    assert not found["fits"]
    shorter = next(line for line in found["suggestions"] if "--ctx" in line).split()[-1]
    assert plan(capsys, path, "--ctx", shorter, "--ram", ram)["fits"]
    assert any("--kv-type q8_0" in line for line in found["suggestions"])
    assert plan(capsys, path, "--ctx", "65536", "--ram", ram, "--kv-type", "q8_0")["fits"]


def test_less_memory_than_the_weights_suggests_a_smaller_file(mixes, capsys):
    small = plan(capsys, mixes["gateless"], "--ctx", "64")
    short = needed(small) - small["memory"][CPU][EXPERTS] // 2
    text = "\n".join(plan(capsys, mixes["gateless"], "--ctx", "64", "--ram", str(short))["suggestions"])
    assert "--budget" in text and "bits per weight" in text
    assert "--compact 1.5x, now 3x" in text and "prune --keep 1, now 3" in text
    routed = "\n".join(plan(capsys, mixes["noisy"], "--ctx", "64", "--ram", str(short))["suggestions"])
    assert "prune --keep 1" in routed and "--compact" not in routed


def test_layers_that_do_not_fit_a_device_suggest_those_that_do(mixes, capsys):
    found = plan(capsys, mixes["gateless"], "--vram", "300kB", "--ram", "8GB", "--gpu-layers", "all")
    assert not found["fits"] and found["suggestions"][0].startswith("what fits the devices: --gpu-layers")


def test_a_plan_for_people_says_what_goes_where(mixes, capsys):
    flags = ["--vram", "8GB", "--ram", "1kB", "--bandwidth", "10GB/s", "--vram-bandwidth", "100GB/s"]
    assert main(["plan", str(mixes["gateless"]), *flags]) == 1
    out = capsys.readouterr().out
    assert "placement  --gpu-layers 3" in out and "of 3 layers (the output is one) 3 on GPU0" in out
    assert "of main memory are lacking" in out and "GPU0 reads" in out and "to fit     " in out


def test_the_shards_of_a_split_file_count(mixes, tmp_path, capsys):
    first = rewrite(mixes["gateless"], tmp_path / "split.gguf", split_max_tensors=10)
    assert whole(read_header(first)).tensors.keys() == read_header(mixes["gateless"]).tensors.keys()
    one, many = (plan(capsys, path, "--ctx", "64")["memory"] for path in (mixes["gateless"], first))
    assert one == many


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gpu-layers", "some"], "--gpu-layers some: expected a whole number, or all"),
        (["--cpu-experts", "-1"], "--cpu-experts -1: expected a whole number"),
        (["--override-tensor", "_exps"], "--override-tensor _exps: expected PATTERN=DEVICE"),
        (["--override-tensor", "(=CPU"], "is no regular expression"),
        (["--override-tensor", "nosuch=CPU"], "nosuch: matches no tensor"),
        (["--override-tensor", "_exps=CUDA9"], "names 'CUDA9'; there is CPU"),
        (["--device", "CUDA9"], "names 'CUDA9'"),
        (["--main-gpu", "-1"], "--main-gpu -1: expected a whole number from 0"),
        (["--tensor-split", "1,x"], "--tensor-split 1,x: expected a share"),
        (["--tensor-split", "0,0"], "not all 0"),
        (["--tensor-split", "1,nan"], "expected a share"),
        (["--rpc", "nowhere"], "--rpc nowhere: expected HOST:PORT"),
        (["--rpc", "a:1,a:1"], "a worker is named twice"),
        (["--kv-type", "q8_0", "--flash-attn", "off"], "--kv-type q8_0 needs flash attention"),
        (["--vram", "8XB"], "--vram '8XB': is no size"),
        (["--ram", "1GB", "--rpc", "127.0.0.1:1"], "--vram and --ram describe another machine"),
        (["--vram", "1GB", "--override-tensor", "_exps=GPU1"], "names 'GPU1'; the devices are CPU, GPU0"),
        (["--vram", "1GB", "--tensor-split", "1,1"], "2 shares for 1 devices"),
        (["--vram", ""], "--vram '': is no size"),
        (["--ctx", "1"], "--ctx 1: expected"),
    ],
)
def test_what_no_machine_can_do_is_one_line(mixes, flags, expected, capsys):
    assert main(["plan", str(mixes["noisy"]), "--bandwidth", "1GB", *flags]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_a_quantised_cache_runs(mixes):
    from gguf import GGMLQuantizationType

    tokens = [3, 5, 8]
    options = RunOptions(ctx=64, threads=1, kv_type=GGMLQuantizationType.Q4_0)
    with open_model(mixes["gateless"], options) as model:
        model.llama.eval(tokens)
        assert model.llama.n_tokens == 3


def test_bandwidth_is_measured_in_main_memory_and_within_a_device():
    assert memory_bandwidth(1) > 1e8
    assert device_bandwidth(CPU) > 1e8
