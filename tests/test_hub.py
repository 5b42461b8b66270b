"""hf:org/name against a Hub that is ours (hub_server.py), spoken to by the real huggingface_hub.

huggingface_hub reads its environment when it is imported, so the client side runs in a process of its own that was
started with HF_ENDPOINT, HF_HOME and HF_TOKEN set; errors go through the command line. Every test has its own repos,
because that process has one cache.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hub_server import TOKEN, HubServer
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.metadata import read_card
from moegguf.sources import OpenOptions, open_source
from moegguf.sources.blob import LocalFile
from moegguf.sources.safetensors_file import Entry, read_entries

ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "COLUMNS": "500"}
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The Hub, free of faults and with an empty record."""
    server.requests.clear()
    yield server
    server.faults.clear()
    server.gated.clear()
    server.ignores_ranges, server.has_store, server.retry_after = False, True, "0"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def client(server: HubServer, home: Path) -> Iterator[Callable]:
    """`client(function, *args)`: the result of a function of this file, called where `server` is the Hub."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}).items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def moegguf(*argv: object) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in argv])
    return code, err.getvalue()


OPENED = {}
"""Sources that stay open from one call of the client to the next."""


def open_streamed(ref: str) -> str:
    return open_one(ref, True)


def open_one(ref: str, stream: bool) -> str:
    """Opens a source and returns the label that a mix would record."""
    OPENED[ref] = open_source(ref, OpenOptions(stream=stream))
    return OPENED[ref].label


def read_opened(ref: str, name: str) -> bytes | str:
    """A whole tensor, or the message of the UserError that reading it raised."""
    tensor = OPENED[ref].tensors[name]
    try:
        return tensor.read_rows(0, tensor.n_rows).tobytes()
    except UserError as error:
        return str(error)


def read_by_many_threads(ref: str, name: str) -> bytes:
    """The tensor row by row, with 8 reads on their way at any time."""
    tensor = OPENED[ref].tensors[name]
    with ThreadPoolExecutor(8) as pool:
        return np.concatenate(list(pool.map(lambda i: tensor.read_rows(i, i + 1), range(tensor.n_rows)))).tobytes()


def run_cli(argv: list[object], **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of `moegguf`, with an environment of its own and no token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "moegguf", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=inherited | ENVIRONMENT | environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def tensors(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    infos = read_header(path).tensors.items()
    return {name: content[info.offset : info.offset + info.nbytes] for name, info in infos}


def stored(folder: Path, name: str) -> bytes:
    """The bytes of a tensor of a local checkpoint in one file, under its HF name."""
    entry = entries(folder / WEIGHTS)[name]
    return (folder / WEIGHTS).read_bytes()[entry.start : entry.start + entry.nbytes]


def entries(path: Path) -> dict[str, Entry]:
    return dict(read_entries(LocalFile(path)))


def copied(folder: Path, to: Path, *, without: str = "") -> Path:
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns(without))


def mix(base: object, *experts: object, output: Path) -> list[object]:
    flags = [flag for i, expert in enumerate(experts) for flag in ("--expert", f"e{i}={expert}")]
    return ["build", "--base", base, *flags, "--quant", "BF16", "-o", output]


def weight_files(home: Path, repo: str) -> set[str]:
    """Names of the weight files of any kind that the cache holds for a repo."""
    cache = home / "hub" / f"models--{repo.replace('/', '--')}"
    assert cache.is_dir()
    return {path.name for path in cache.rglob("*") if path.suffix in (".safetensors", ".bin", ".gguf", ".pth")}


def large_blobs(home: Path, repo: str) -> list[Path]:
    cache = home / "hub" / f"models--{repo.replace('/', '--')}"
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


# ---- the same model, wherever it comes from ----


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hub_build_equals_the_folder_build(hub, client, family, tmp_path, shards):
    models = family("llama3_like", shards=shards)
    base, expert = hub.push(f"a/base{shards}", models.base), hub.push(f"a/expert{shards}", models.experts[0])
    local, remote, streamed = tmp_path / "local.gguf", tmp_path / "remote.gguf", tmp_path / "streamed.gguf"
    refs = f"hf:a/base{shards}", f"hf:a/expert{shards}"

    assert client(moegguf, *mix(models.base, models.experts[0], output=local)) == (0, "")
    assert client(moegguf, *mix(*refs, output=streamed), "--stream") == (0, "")
    assert client(moegguf, *mix(*refs, output=remote)) == (0, "")

    assert tensors(remote) == tensors(local)
    assert tensors(streamed) == tensors(local)
    for path in (remote, streamed):
        card = read_card(read_header(path))
        assert card.base == f"hf:a/base{shards}@{base}"
        assert card.experts[0].source == f"hf:a/expert{shards}@{expert}"


def test_streaming_fetches_every_needed_tensor_once_and_nothing_else(hub, client, family, home, tmp_path):
    models = family("llama3_like")
    hub.push("b/base", models.base)
    hub.push("b/expert", models.experts[0])

    client(moegguf, *mix("hf:b/base", "hf:b/expert", output=tmp_path / "mix.gguf"), "--stream")

    assert ranges(hub, "b/base") == needed(models.base, lambda name: ".mlp." not in name)
    assert ranges(hub, "b/expert") == needed(models.experts[0], lambda name: ".mlp." in name)
    for repo in ("b/base", "b/expert"):
        assert weight_files(home, repo) == set()
        assert large_blobs(home, repo) == []


def ranges(hub: HubServer, repo: str) -> list[tuple[int, int]]:
    """First and last byte of every read of the weights of `repo`, in the order of the file."""
    reads = [request for request in hub.large_reads() if f"/{repo}/" in request.path]
    assert all(request.status == 206 and request.sent == request.range[1] + 1 - request.range[0] for request in reads)
    return sorted(request.range for request in reads)


def needed(folder: Path, is_needed: Callable[[str], bool]) -> list[tuple[int, int]]:
    found = entries(folder / WEIGHTS)
    header = [(0, 7), (8, min(entry.start for entry in found.values()) - 1)]
    return header + sorted((e.start, e.start + e.nbytes - 1) for e in found.values() if is_needed(e.name))


def test_a_download_takes_safetensors_and_the_small_files_only(hub, client, family, home, tmp_path):
    model = copied(family("llama3_like").base, tmp_path / "model")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model-q4.gguf", "original/consolidated.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"no weights that anyone should read")
    hub.push("c/all", model)

    for flags in (["--stream"], []):
        argv = mix("hf:c/all", "hf:c/all", output=tmp_path / f"mix{len(flags)}.gguf")
        assert client(moegguf, *argv, *flags) == (0, "")
    assert weight_files(home, "c/all") == {WEIGHTS}
    assert {request.file for request in hub.large_reads()} == {WEIGHTS}


def test_streaming_reads_what_the_cache_holds_from_there(hub, client, family, tmp_path):
    hub.push("d/cached", family("llama3_like").base)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    client(moegguf, *mix("hf:d/cached", "hf:d/cached", output=first))
    hub.requests.clear()

    assert client(moegguf, *mix("hf:d/cached", "hf:d/cached", output=second), "--stream") == (0, "")
    assert tensors(second) == tensors(first)
    assert hub.large_reads() == []


def test_an_unusable_config_is_refused_before_any_weight_is_fetched(hub, client, family, home, tmp_path):
    hub.push("e/wrong", wrong := copied(family("llama3_like").base, tmp_path / "wrong"))
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(config.replace("LlamaForCausalLM", "MambaForCausalLM"))

    code, err = client(moegguf, *mix("hf:e/wrong", "hf:e/wrong", output=tmp_path / "mix.gguf"))
    assert code == 2
    assert err.startswith("moegguf: error: hf:e/wrong: architecture 'MambaForCausalLM' cannot be read")
    assert hub.large_reads() == []


# ---- revisions ----


@pytest.mark.parametrize("stream", [True, False])
def test_branch_pull_request_and_commit_each_name_their_version(hub, client, family, stream):
    models = family("llama3_like")
    repo = f"f/model{stream}"
    old = hub.push(repo, models.base)
    new = hub.push(repo, models.experts[0])
    side = hub.push(repo, models.experts[1], branch="refs/pr/1")

    versions = {"": (new, models.experts[0]), "@main": (new, models.experts[0]), f"@{old}": (old, models.base),
                "@refs/pr/1": (side, models.experts[1])}  # fmt: skip
    for revision, (commit, folder) in versions.items():
        assert client(open_one, f"hf:{repo}{revision}", stream) == f"hf:{repo}@{commit}"
        up = client(read_opened, f"hf:{repo}{revision}", "blk.0.ffn_up.weight")
        assert up == stored(folder, "model.layers.0.mlp.up_proj.weight")


def test_a_push_does_not_change_a_source_that_is_open(hub, client, family):
    models = family("llama3_like")
    hub.push("g/model", models.base)
    client(open_streamed, "hf:g/model")
    hub.push("g/model", models.experts[0])
    hub.expire_addresses()

    up = client(read_opened, "hf:g/model", "blk.0.ffn_up.weight")
    assert up == stored(models.base, "model.layers.0.mlp.up_proj.weight")


def test_a_model_without_an_organisation_can_be_named(hub, client, family):
    commit = hub.push("tiny", family("llama3_like").base)
    assert client(open_streamed, "hf:tiny") == f"hf:tiny@{commit}"


# ---- a server that misbehaves ----


def test_passing_faults_are_ridden_out(hub, client, family):
    base = family("llama3_like").base
    hub.push("h/model", base)
    hub.faults.extend(["drop", "503"])  # while the header is read
    client(open_streamed, "hf:h/model")
    hub.faults.extend(["short", "503"])
    up = client(read_opened, "hf:h/model", "blk.0.ffn_up.weight")

    assert not hub.faults
    assert up == stored(base, "model.layers.0.mlp.up_proj.weight")


def test_a_lasting_fault_is_an_error_after_a_few_tries(hub, client, family):
    hub.push("i/model", family("llama3_like").base)
    client(open_streamed, "hf:i/model")
    hub.requests.clear()
    hub.faults.extend(["503"] * 100)

    message = client(read_opened, "hf:i/model", "blk.0.ffn_up.weight")
    assert message == (
        f"hf:i/model: {hub.url} answered 503 Service Unavailable. overloaded; "
        "try again later; if it is about your token, set HF_TOKEN or run `hf auth login`"
    )
    assert len(hub.large_reads()) == 5


def test_an_expired_address_is_renewed(hub, client, family):
    base = family("llama3_like").base
    hub.push("j/model", base)
    client(open_streamed, "hf:j/model")
    hub.expire_addresses()
    hub.requests.clear()

    up = client(read_opened, "hf:j/model", "blk.0.ffn_up.weight")
    assert up == stored(base, "model.layers.0.mlp.up_proj.weight")
    assert [(request.server, request.status) for request in hub.requests] == [
        ("store", 403), ("hub", 302), ("store", 206)]  # fmt: skip


def test_content_that_changes_under_a_commit_is_refused(hub, client, family, tmp_path):
    models = family("llama3_like")
    hub.push("k/model", model := copied(models.base, tmp_path / "model"))
    client(open_streamed, "hf:k/model")
    shutil.copyfile(models.experts[0] / WEIGHTS, model / WEIGHTS)
    hub.expire_addresses()

    message = client(read_opened, "hf:k/model", "blk.0.ffn_up.weight")
    assert message == "hf:k/model/model.safetensors: changed on the server during the build; build again"


def test_a_server_without_ranges_is_refused_unread(hub, client, family, tmp_path):
    hub.push("l/model", family("llama3_like").base)
    hub.ignores_ranges = True

    code, err = client(moegguf, *mix("hf:l/model", "hf:l/model", output=tmp_path / "mix.gguf"), "--stream")
    assert code == 2
    assert err.count("\n") == 1
    assert "the server does not serve byte ranges as asked: expected status 206 with bytes 0-7/" in err
    assert err.endswith("found 200 with None; leave out --stream to download the whole file\n")


def test_many_threads_may_read_one_file(hub, client, family):
    base = family("llama3_like").base
    hub.push("m/model", base)
    client(open_streamed, "hf:m/model")
    hub.faults.extend(["short", "503", "drop"] * 3)

    down = client(read_by_many_threads, "hf:m/model", "blk.1.ffn_down.weight")
    assert down == stored(base, "model.layers.1.mlp.down_proj.weight")


# ---- access ----


@pytest.mark.parametrize("has_store", [True, False])
def test_the_token_goes_to_the_hub_and_nowhere_else(hub, client, family, has_store):
    repo = f"n/gated{has_store}"
    base = family("llama3_like").base
    hub.push(repo, base)
    hub.gated.add(repo)
    hub.has_store = has_store

    client(open_streamed, f"hf:{repo}")
    up = client(read_opened, f"hf:{repo}", "blk.0.ffn_up.weight")
    assert up == stored(base, "model.layers.0.mlp.up_proj.weight")
    assert {(request.server, request.authorization) for request in hub.requests} == (
        {("hub", f"Bearer {TOKEN}")} | ({("store", None)} if has_store else set()))  # fmt: skip


def test_everything_that_is_wrong_with_the_names_is_told_at_once(hub, family, tmp_path):
    base = family("llama3_like").base
    for repo in ("o/good", "o/gated"):
        hub.push(repo, base)
    hub.gated.add("o/gated")
    hub.push("o/pickled", pickled := copied(base, tmp_path / "pickled", without=WEIGHTS))
    (pickled / "pytorch_model.bin").write_bytes(b"PK")
    hub.push("o/gguf", ggufs := tmp_path / "ggufs")
    ggufs.mkdir()
    (ggufs / "m-Q4_0.gguf").write_bytes(b"GGUF")
    (ggufs / "config.json").write_text("{}")
    refs = ["hf:o/missing", "hf:o/good@v9", f"hf:o/good@{'0' * 40}", "hf:o/good/x", "hf:", "hf:o/gated", "hf:o/pickled",
            "hf:o/gguf"]  # fmt: skip

    code, lines = run_cli(mix("hf:o/good", *refs, output=tmp_path / "mix.gguf"), HF_ENDPOINT=hub.url, HF_HOME=tmp_path)
    assert code == 2
    token = "set HF_TOKEN or run `hf auth login`"
    assert lines == [
        f"moegguf: error: hf:{line}" for line in (
            f"o/missing: {hub.url} has no model of that name, or it is private; "
            f"check the name; for a private model {token}",
            f"o/good@v9: the model has no revision 'v9'; choose one of {hub.url}/o/good/tree/main",
            f"o/good@{'0' * 40}: the model has no revision '{'0' * 40}'; choose one of {hub.url}/o/good/tree/main",
            "o/good/x: 'o/good/x' is no name of a Hub model; write hf:org/name or hf:org/name@revision",
            ": '' is no name of a Hub model; write hf:org/name or hf:org/name@revision",
            f"o/gated: is gated: its licence has to be accepted before it can be read; "
            f"accept it at {hub.url}/o/gated, then {token}",
            "o/pickled: has only pickled weights (pytorch_model.bin), which can run code when they are read; "
            "convert it once, on a machine you can afford to lose: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)",
            "o/gguf: holds GGUF files and no safetensors; "
            "run `hf download o/gguf m-Q4_0.gguf` and give the path that it prints",
        )
    ]  # fmt: skip
    assert not any(request.file == "pytorch_model.bin" for request in hub.requests)


def test_a_token_without_access_is_told_how_to_get_it(hub, family, tmp_path):
    hub.push("p/gated", family("llama3_like").base)
    hub.gated.add("p/gated")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_wrong"}

    code, lines = run_cli(mix("hf:p/gated", "hf:p/gated", output=tmp_path / "mix.gguf"), **environment)
    assert code == 2
    assert [line.split(";")[1] for line in lines] == [
        f" accept it at {hub.url}/p/gated, then set HF_TOKEN or run `hf auth login`"]  # fmt: skip


@pytest.mark.parametrize("endpoint, why", [
    ("http://127.0.0.1:9", "refused"),
    ("http://hub.invalid", ""),  # the words are the resolver's
])  # fmt: skip
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, endpoint, why):
    argv = mix("hf:q/model", "hf:q/model", output=tmp_path / "mix.gguf")
    code, lines = run_cli(argv, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"moegguf: error: hf:q/model: the connection to {endpoint} failed (")
    assert why in lines[0]
    assert lines[0].endswith("); check the network, the proxy and HF_ENDPOINT")


def test_offline_the_cache_is_enough_and_its_lack_is_told(hub, client, family, home, tmp_path):
    hub.push("r/cached", family("llama3_like").base)
    hub.push("r/streamed", family("llama3_like").base)
    online, offline = tmp_path / "online.gguf", tmp_path / "offline.gguf"
    client(moegguf, *mix("hf:r/cached", "hf:r/cached", output=online))
    client(open_streamed, "hf:r/streamed")
    hub.requests.clear()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    assert run_cli(mix("hf:r/cached", "hf:r/cached", output=offline), **environment) == (0, [])
    assert tensors(offline) == tensors(online)
    code, lines = run_cli(mix("hf:r/streamed", "hf:r/none", output=tmp_path / "no.gguf"), **environment)
    assert code == 2
    assert [line.split(";")[0] for line in lines] == [
        f"moegguf: error: hf:r/{name}: is not in the cache, and HF_HUB_OFFLINE forbids fetching it"
        for name in ("streamed", "none")
    ]
    assert hub.requests == []
