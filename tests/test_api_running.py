"""`moegguf.plan`, `bench`, `doctor`, `serve` and `worker` from Python: what the commands say and do."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import moegguf
from conftest import Heard
from moegguf.cli import main
from moegguf.runtime.offload import ALL
from test_workers import free_port
from tiny_gguf import saying, write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("api") / "model.gguf", saying("yes"))


def said(capsys, *argv: object) -> dict:
    main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_plan_is_that_of_the_command(model, capsys):
    flags = ["--vram", "8GB,1GB", "--ram", "4GB", "--bandwidth", "10GB", "--vram-bandwidth", "100GB", "--ctx", "512"]
    found = moegguf.plan(
        str(model), vram=["8GB", 10**9], ram="4GB", bandwidth="10GB/s", vram_bandwidth=10**11,
        options=moegguf.RunOptions(ctx=512),
    )  # fmt: skip
    assert json.loads(json.dumps(found.as_json())) == said(capsys, "plan", model, *flags)
    assert found.fits and set(found.room) == {"CPU", "GPU0", "GPU1"}


def test_a_benchmark_runs_the_lengths_that_the_command_runs(model, capsys):
    heard = Heard()
    options = moegguf.RunOptions(threads=1)
    found = moegguf.bench(model, compare=model, prompt=5, generate=[2, 3], repeat=2, options=options, watch=heard)
    flags = ["--compare", model, "--prompt", 5, "--generate", "2,3", "--repeat", 2, "--threads", 1]
    expected = said(capsys, "bench", model, *flags)

    def shape(speeds: dict) -> list:
        return [
            (each["file"], each["touched_bytes_per_token"], [rate["tokens"] for rate in each["generations"]])
            for each in speeds["models"]
        ]

    assert shape(found.as_json()) == shape(expected) and expected.keys() == found.as_json().keys()
    n_tokens = 2 * (5 + 2 + 3) + 5 + 1  # and those of the warm-up
    assert heard.parts == {"model.gguf": [n_tokens, n_tokens]}


def test_the_doctor_says_what_the_command_says(capsys):
    found, expected = moegguf.doctor(), said(capsys, "doctor")
    for name in ("system", "python", "cores", "packages", "runtime"):
        assert json.loads(json.dumps(asdict(found)[name])) == expected[name]
    assert found.advice == expected["advice"]


def test_a_server_answers_within_its_block_and_is_gone_after_it(model):
    openai = pytest.importorskip("openai", reason="the client is not installed")
    pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
    options = moegguf.RunOptions(threads=1, ctx=256)
    with moegguf.serve({"m": model}, port=0, api_key="k", parallel=1, options=options) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=20)
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="m", messages=messages, temperature=0)
        assert answer.choices[0].message.content == "yes"
    assert server.notes == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port))


def test_a_worker_lends_within_its_block_and_is_gone_after_it(model):
    with moegguf.worker(f"127.0.0.1:{free_port()}", threads=1) as address:
        offload = moegguf.Offload(layers=ALL, workers=(address,))
        with moegguf.open(model, temp=0, options=moegguf.RunOptions(threads=1, offload=offload)) as chat:
            assert chat.model.placement.n_gpu_layers > 0
            assert chat.chat("hi") == "yes"
    host, _, port = address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


MISTAKES = {
    "plan(5)": lambda model: moegguf.plan(5),
    "a size": lambda model: moegguf.plan(model, ram="8XB"),
    "no size": lambda model: moegguf.plan(model, vram=-1),
    "bench(5)": lambda model: moegguf.bench(5),
    "a length": lambda model: moegguf.bench(model, prompt="long"),
    "no lengths": lambda model: moegguf.bench(model, prompt=0, generate=0),
    "a context that its lengths exceed": lambda model: moegguf.bench(model, options=moegguf.RunOptions(ctx=16)),
    "open(5)": lambda model: moegguf.open(5),
    "a system text": lambda model: moegguf.open(model, system=5),
    "options": lambda model: moegguf.open(model, options={"ctx": 512}),
    "chat(5)": lambda model: moegguf.open(model).chat(5),
    "a short context": lambda model: moegguf.RunOptions(ctx=1),
    "a cache type": lambda model: moegguf.RunOptions(kv_type="q8_0"),
    "one worker": lambda model: moegguf.Offload(workers="127.0.0.1:1"),
    "no worker": lambda model: moegguf.open(model, options=moegguf.RunOptions(offload=moegguf.Offload(workers=("x",)))),
    "no such device": lambda model: moegguf.Offload(main_gpu=-1),
    "shares of nothing": lambda model: moegguf.Offload(tensor_split=(0, float("nan"))),
    "half a pattern": lambda model: moegguf.Override("(", "CPU"),
    "no models": lambda model: moegguf.serve({}).__enter__(),
    "serve(5)": lambda model: moegguf.serve(5).__enter__(),
    "a host": lambda model: moegguf.serve(model, host=5).__enter__(),
    "a port": lambda model: moegguf.serve(model, port="http").__enter__(),
    "a key": lambda model: moegguf.serve(model, port=0, api_key=5).__enter__(),
    "adapters of nobody": lambda model: moegguf.serve(model, adapters={"x": model}).__enter__(),
    "open to others": lambda model: moegguf.serve(model, host="0.0.0.0").__enter__(),
    "worker(5)": lambda model: moegguf.worker(5).__enter__(),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_a_user_error(model, what):
    with pytest.raises(moegguf.UserError):
        MISTAKES[what](model)
