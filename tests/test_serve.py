"""`moegguf serve`: real servers of llama.cpp on loopback, asked by the real `openai` client and by bare sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType

from moegguf.cli import main
from moegguf.demo.text import SAMPLE_QUESTIONS
from moegguf.recipe import find_recipes_file
from moegguf.runtime.devices import function
from moegguf.runtime.sampling import DEFAULTS, Sampling
from moegguf.runtime.serve import extra, wire
from test_workers import free_port, start, wait_until_listening
from tiny_gguf import card, repeating, saying, write_gguf

pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the client is not installed")

KEY = "right-key"
TLS = Path(__file__).parent / "fixtures/tls"
LAYOUTS = ("mixtral", "fused", "shared")
CAPITALS = tuple(f"What is the capital of {land}?" for land in ("Italy", "Kenya", "Peru", "Iran"))
SECONDS = 20


@dataclass
class Server:
    """A running `moegguf serve`."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return next(line.split()[-1] for line in self.lines if line.startswith("OpenAI base URL")).removesuffix("/v1")

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname, parts.port), timeout=SECONDS)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        return self.request("GET", path, None, headers)

    def request(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Authorization": f"Bearer {KEY}"} | headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def serving(*arguments: object, key: str | None = KEY) -> Iterator[Server]:
    """`moegguf serve` on a free port, with KEY in its environment, until the block ends."""
    environment = {name: value for name, value in os.environ.items() if name != "MOEGGUF_API_KEY"}
    command = [sys.executable, "-m", "moegguf", "serve", "--port", "0", "--threads", "1", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment | ({"MOEGGUF_API_KEY": key} if key else {}),
    )  # fmt: skip
    server = Server(process)
    with process:
        try:
            for line in process.stdout:
                server.lines.append(line)
                if line.startswith("Ctrl-C"):
                    break
            else:
                pytest.fail(f"it did not start: {process.stderr.read()}")
            yield server
        finally:
            process.kill()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Mixes of the demo family: every layout, two with routers of noise, and an adapter from the first to the second.

    In F32, as the wheel's llama.cpp and ours round quantised products differently, and close tokens may change places.
    """
    folder = tmp_path_factory.mktemp("serve")
    recipes = find_recipes_file()

    def build(name: str, *flags: str) -> Path:
        path = folder / f"{name}.gguf"
        assert main(["build", "demo", "--recipes", str(recipes), "--quant", "F32", "-o", str(path), *flags]) == 0
        return path

    found = {layout: build(layout, "--layout", layout) for layout in LAYOUTS}
    found |= {f"noisy{seed}": build(f"noisy{seed}", "--router", "noisy", "--seed", seed) for seed in "12"}
    found["adapter"] = folder / "router.gguf"
    route = ["route", "export", str(found["noisy1"]), "--router", "noisy:2", "-o", str(found["adapter"])]
    assert main(route) == 0
    return found


@pytest.fixture(scope="module")
def server(files: dict[str, Path]) -> Iterator[Server]:
    models = [f"{name}={files[name]}" for name in (*LAYOUTS, "noisy1")]
    exact = ["--kv-type", "f32", "--flash-attn", "off"]
    with serving(*models, "--adapter", f"noisy1={files['adapter']}", "--parallel", "8", *exact) as running:
        yield running


def ask(server: Server, model: str, question: str, **extra: object) -> str:
    """The likeliest answer."""
    messages = [{"role": "user", "content": question}]
    answer = server.client().chat.completions.create(model=model, messages=messages, temperature=0, extra_body=extra)
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def said_by_chat(files: dict[str, Path]) -> dict[tuple[str, str], str]:
    """(file, question) → what our own runner answers."""
    from moegguf.runtime.chat import Conversation
    from moegguf.runtime.model import RunOptions, open_model

    found = {}
    for name in (*LAYOUTS, "noisy1", "noisy2"):
        with open_model(files[name], RunOptions(threads=1, kv_type=GGMLQuantizationType.F32)) as model:
            for question in (*SAMPLE_QUESTIONS.values(), *CAPITALS):
                conversation = Conversation(model, sampling=Sampling(temp=0))
                found[name, question] = "".join(conversation.answer(question))
    return found


# --- what is answered ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_server_says_what_chat_says(server: Server, said_by_chat, layout: str):
    for question in SAMPLE_QUESTIONS.values():
        assert ask(server, layout, question) == said_by_chat[layout, question]


def test_clients_at_the_same_time_get_their_own_answers(server: Server, said_by_chat):
    asked = [(layout, question) for question in CAPITALS for layout in ("mixtral", "fused")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: ask(server, *each), asked))
    assert answers == [said_by_chat[each] for each in asked]
    assert len(set(answers)) == 4


def test_a_stream_says_the_same_piece_by_piece(server: Server, said_by_chat):
    question = SAMPLE_QUESTIONS["math"]
    messages = [{"role": "user", "content": question}]
    pieces = server.client().chat.completions.create(model="fused", messages=messages, temperature=0, stream=True)
    said = [piece.choices[0].delta.content for piece in pieces if piece.choices and piece.choices[0].delta.content]
    assert len(said) > 5 and "".join(said) == said_by_chat["fused", question]


def test_plain_completions_go_on_with_the_text(server: Server, said_by_chat):
    question = SAMPLE_QUESTIONS["general"]
    answer = server.client().completions.create(
        model="mixtral", prompt=f"<|user|>{question}<|assistant|>", temperature=0
    )
    assert answer.choices[0].text == said_by_chat["mixtral", question]


def test_embeddings_are_unit_vectors_that_tell_texts_apart(server: Server):
    texts = ["What is the capital of Italy?", "What is the capital of Peru?", "Sort the letters of stone."]
    data = server.client().embeddings.create(model="mixtral", input=texts).data
    italy, peru, stone = [each.embedding for each in data]
    assert sum(x * x for x in italy) == pytest.approx(1, abs=1e-3)
    assert sum(x * y for x, y in zip(italy, peru, strict=True)) > sum(x * y for x, y in zip(italy, stone, strict=True))


def test_every_model_is_listed_and_counted(server: Server):
    assert [model.id for model in server.client().models.list()] == [*LAYOUTS, "noisy1"]
    _, metrics = server.get("/metrics")
    samples = [line for line in metrics.decode().splitlines() if line.startswith("llamacpp:tokens_predicted_total{")]
    assert [sample.split('"')[1] for sample in samples] == [*LAYOUTS, "noisy1"]
    assert metrics.count(b"# TYPE llamacpp:tokens_predicted_total ") == 1


def test_the_web_page_needs_no_key_and_offers_all_models(server: Server):
    status, page = server.get("/", **{"Authorization": "", "Accept-Encoding": "gzip"})
    assert status == 200 and page.startswith(b"\x1f\x8b")
    assert json.loads(server.get("/props")[1])["role"] == "router"
    assert json.loads(server.get("/props?model=fused")[1])["model_alias"] == "fused"


def test_a_request_chooses_its_router(server: Server, said_by_chat):
    """And leaves nothing behind: llama.cpp reuses the state of the last prompt, whichever adapter it was made with."""
    on = [{"id": 0, "scale": 1}]
    for question in SAMPLE_QUESTIONS.values():
        for _ in range(2):
            assert ask(server, "noisy1", question, lora=on) == said_by_chat["noisy2", question]
            assert ask(server, "noisy1", question) == said_by_chat["noisy1", question]
    answers = {
        name: [said_by_chat[name, question] for question in SAMPLE_QUESTIONS.values()] for name in ("noisy1", "noisy2")
    }
    assert answers["noisy1"] != answers["noisy2"]


# --- what is refused ---


def test_a_wrong_key_opens_nothing(server: Server):
    stranger = server.client("wrong")
    for knock in (
        stranger.models.list,
        lambda: stranger.completions.create(model="mixtral", prompt="hello"),
        lambda: stranger.embeddings.create(model="mixtral", input="hello"),
    ):
        with pytest.raises(openai.AuthenticationError):
            knock()
    assert server.get("/metrics", Authorization="Bearer wrong")[0] == 401
    assert server.get("/metrics", Authorization=f"bearer {KEY}")[0] == 200
    assert server.get("/health", Authorization="")[0] == 200
    assert ask(server, "mixtral", "What is 6 times 7?")


def test_keys_are_in_no_process_list(server: Server):
    here = psutil.Process(server.process.pid)
    for process in (here, *here.children()):
        assert "moegguf" in " ".join(process.cmdline()) and KEY not in " ".join(process.cmdline())


REFUSED = {
    "broken JSON": ("POST", "/v1/chat/completions", b'{"messages": [', 400, "not JSON"),
    "deep JSON": ("POST", "/v1/chat/completions", b"[" * 200_000, 400, "not JSON"),
    "no messages": ("POST", "/v1/chat/completions", b"{}", 400, "messages"),
    "wrong type": ("POST", "/v1/chat/completions", b'{"messages": 7}', 400, "messages"),
    "unknown model": ("POST", "/v1/completions", b'{"model": "x", "prompt": ""}', 404, "there are: mixtral, fused"),
    "unknown path": ("GET", "/v2/nothing", None, 404, ""),
    "too long a target": ("GET", "/" + "a" * 9000, None, 414, "longer than"),
    "unknown method": ("BREW", "/v1/models", None, 501, "BREW"),
    "too long a prompt": ("POST", "/v1/completions", json.dumps({"prompt": "a" * 9999}).encode(), 400, "context"),
    "unknown adapter": ("POST", "/v1/completions?model=noisy1", b'{"lora": [{"id": 1, "scale": 1}]}', 400, "adapters"),
    "no adapters": ("POST", "/v1/completions?model=fused", b'{"lora": [{"id": 0, "scale": 1}]}', 400, "0 adapters"),
    "adapters for all": ("POST", "/lora-adapters?model=noisy1", b'[{"id": 0, "scale": 1}]', 501, "each request"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_get_http_errors(server: Server, what: str):
    method, path, body, expected, says = REFUSED[what]
    status, answer = server.request(method, path, body, {"Content-Type": "application/json"})
    assert status == expected
    assert says in json.loads(answer)["error"]["message"]


RAW = {
    "no HTTP": (b"hello there\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "an endless head": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (2 * wire.HEAD_BYTES), 431),
    "a broken target": (b"GET //[?model=%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 401),
    "a broken origin": (b"GET / HTTP/1.1\r\nHost: x\r\nOrigin: http://[\r\n\r\n", 403),
    "a negative length": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "a foreign page": (b"GET /props HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://evil.example\r\n\r\n", 403),
    "an announced flood": (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {wire.BODY_BYTES + 1}\r\n\r\n".encode(),
        413,
    ),
}


@pytest.mark.parametrize("what", RAW)
def test_what_is_no_proper_request_is_answered_and_cut(server: Server, what: str):
    sent, status = RAW[what]
    with server.connect() as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in answer


def test_a_body_that_grows_too_long_is_cut(server: Server):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(wire.BODY_BYTES // 0x100000 + 2):
            connection.sendall(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_slow_clients_do_not_keep_others_waiting(server: Server, said_by_chat):
    question = SAMPLE_QUESTIONS["general"]
    with contextlib.ExitStack() as stack:
        for beginning in (b"", b"GET /v1/mod", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le") * 20:
            stack.enter_context(server.connect()).sendall(beginning)
        assert ask(server, "mixtral", question) == said_by_chat["mixtral", question]


# --- moegguf's own server, over a worker ---


@contextlib.contextmanager
def working() -> Iterator[tuple[str, subprocess.Popen]]:
    """A worker on loopback, by its address."""
    process = start(port := free_port())
    with process:
        try:
            wait_until_listening(process)
            yield f"127.0.0.1:{port}", process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def over_rpc(files: dict[str, Path]) -> Iterator[Server]:
    with working() as (worker, _):
        flags = ["--rpc", worker, "--gpu-layers", "all", "--kv-type", "f32"]
        with serving(f"mixtral={files['mixtral']}", *flags) as server:
            yield server


def test_over_a_worker_it_says_what_chat_says_whole_and_in_pieces(over_rpc: Server, said_by_chat):
    client = over_rpc.client()
    for question in SAMPLE_QUESTIONS.values():
        expected = said_by_chat["mixtral", question]
        messages = [{"role": "user", "content": question}]
        whole = client.chat.completions.create(model="mixtral", messages=messages, temperature=0)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "stop")
        plain = client.completions.create(model="mixtral", prompt=f"<|user|>{question}<|assistant|>", temperature=0)
        assert (plain.choices[0].text, plain.usage) == (expected, whole.usage)
        *pieces, last, usage = client.chat.completions.create(
            model="mixtral", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        assert "".join(piece.choices[0].delta.content for piece in pieces) == expected and len(pieces) > 1
        assert (last.choices[0].finish_reason, usage.usage) == ("stop", whole.usage)


def test_over_a_worker_stops_and_limits_hold(over_rpc: Server, said_by_chat):
    question = CAPITALS[0]
    expected = said_by_chat["mixtral", question]
    stop = expected[3:6]
    asked = {"model": "mixtral", "messages": [{"role": "user", "content": question}], "temperature": 0}
    create = over_rpc.client().chat.completions.create
    cut = create(**asked, stop=["never said", stop])
    assert cut.choices[0].message.content == expected[: expected.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = list(create(**asked, stop=stop, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[: expected.index(stop)]
    short = create(**asked, max_completion_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    assert expected.startswith(short.choices[0].message.content)
    hot = asked | {"temperature": 100, "top_p": 1, "max_tokens": 20, "extra_body": {"min_p": 0}}
    seven, again, eight = [create(**hot, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert seven == again != eight


def test_over_a_worker_clients_take_turns_and_get_their_own_answers(over_rpc: Server, said_by_chat):
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda question: ask(over_rpc, "mixtral", question), CAPITALS[:3]))
    assert answers == [said_by_chat["mixtral", question] for question in CAPITALS[:3]]
    assert "one answer at a time" in over_rpc.lines[0] and "--rpc" in over_rpc.lines[1]
    assert not any(line.startswith("web page") for line in over_rpc.lines)


REFUSED_BY_OWN = {
    "embeddings": ("/v1/embeddings", {"input": "x"}, 501, "llama.cpp's server has them"),
    "an unknown path": ("/v2/nothing", {}, 501, "there are /v1/chat/completions"),
    "tools": ("/v1/chat/completions", {"messages": [], "tools": [{}]}, 501, "`tools`"),
    "adapters": ("/v1/completions", {"prompt": "x", "lora": [{"id": 0, "scale": 1}]}, 400, "0 adapters"),
    "several prompts": ("/v1/completions", {"prompt": ["a", "b"]}, 501, "several prompts"),
    "no messages": ("/v1/chat/completions", {}, 400, "`messages`"),
    "an image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "no text"),
    "half a character": ("/v1/completions", {"prompt": "\ud800"}, 400, "half a character"),
    "a foreign token": ("/v1/completions", {"prompt": [10**6]}, 400, "vocabulary"),
    "a bad setting": ("/v1/completions", {"prompt": "x", "top_p": 7}, 400, "top_p is 7"),
    "too long a prompt": ("/v1/completions", {"prompt": "a" * 9999}, 400, "context"),
}


@pytest.mark.parametrize("what", REFUSED_BY_OWN)
def test_over_a_worker_what_is_missing_is_named(over_rpc: Server, what: str):
    path, content, expected, says = REFUSED_BY_OWN[what]
    status, answer = over_rpc.request("POST", path, json.dumps(content).encode(), {})
    assert status == expected
    assert says in json.loads(answer)["error"]["message"]


def test_over_a_worker_there_are_models_and_a_word_for_browsers(over_rpc: Server):
    assert [model.id for model in over_rpc.client().models.list()] == ["mixtral"]
    assert over_rpc.get("/")[1].startswith(b"moegguf serve: OpenAI's API is at /v1")
    assert over_rpc.get("/metrics")[0] == 404
    assert over_rpc.request("DELETE", "/v1/models", None, {})[0] == 501
    with pytest.raises(openai.AuthenticationError):
        over_rpc.client("wrong").models.list()


def test_a_client_that_leaves_passes_its_turn_and_a_lost_worker_is_an_end_with_a_reason(endless: Path):
    with (
        working() as (worker, process),
        serving(endless, "--ctx", "100000", "--rpc", worker, "--gpu-layers", "all", key=None) as server,
    ):
        with server.connect() as leaves:
            leaves.sendall(completion(99_000))  # far longer than anybody here waits
            leaves.recv(4096)
        with server.connect() as stays:
            stays.sendall(completion(99_000))
            said = stays.recv(4096)
            process.kill()
            said += rest(stays)
        assert said.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in said
        assert server.process.wait(SECONDS) == 2
        ended, error = server.process.stderr.read().splitlines()
        assert ended.startswith(f"endless: moegguf's own server ended by itself (worker {worker}: lost the connection")
        assert error.startswith(f"moegguf: error: worker {worker}: cannot be reached")


def test_what_moegguf_s_own_server_cannot_do_is_one_line(model: Path, capsys):
    rpc = ["--rpc", "127.0.0.1:5"]
    assert "one answer at a time" in fault(capsys, model, "--parallel", "2", *rpc)
    assert "cannot choose adapters" in fault(capsys, model, "--adapter", model, *rpc)
    assert "not 2 models" in fault(capsys, model, f"other={model}", *rpc)
    assert "the file has no router" in fault(capsys, model, "--experts-used", "1")
    assert "worker 127.0.0.1:5: cannot be reached" in fault(capsys, model, *rpc)
    function("ggml_set_abort_callback")(None)  # a command with --rpc has this process end when a worker is lost


# --- beginning and end ---


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A model that talks until it is stopped, and suggests a temperature."""
    temp = {"general.sampling.temp": GGUFValue(0.25, GGUFValueType.FLOAT32)}
    return write_gguf(tmp_path_factory.mktemp("serve") / "endless.gguf", repeating("abc "), ctx=8192, extra=temp)


def completion(n_tokens: int) -> bytes:
    """A request for a stream."""
    settings = {"prompt": "a", "temperature": 0, "stream": True, "max_tokens": n_tokens}
    body = json.dumps(settings).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_answer_under_way_is_finished_before_the_end(endless: Path, number: int):
    with serving(endless, "--ctx", "4096", "--parallel", "1", key=None) as server:
        with server.connect() as connection:
            connection.sendall(completion(1500))
            said = connection.recv(4096)
            server.process.send_signal(number)
            said += rest(connection)
        assert said.count(b'"text":"') >= 1500 and b"data: [DONE]" in said
        assert server.process.wait(SECONDS) == 0
        assert server.process.stderr.read() == ""
        assert is_free(urlsplit(server.url).port)


def test_a_second_ctrl_c_does_not_wait_and_a_client_that_leaves_frees_its_slot(endless: Path):
    with serving(endless, "--ctx", "8000", "--parallel", "1", key=None) as server:
        with server.connect() as leaves:
            leaves.sendall(completion(7900))
            leaves.recv(4096)
        with server.connect() as stays:
            stays.sendall(completion(7900))
            said = stays.recv(4096)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            server.process.send_signal(signal.SIGINT)
            said += rest(stays)
        assert server.process.wait(SECONDS) == 0
        assert said.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in said


def test_a_models_server_is_started_again_when_it_dies_and_dies_with_its_parent(endless: Path):
    with serving(endless, "--ctx", "8000", "--parallel", "1", key=None) as server:
        (child,) = psutil.Process(server.process.pid).children()
        with server.connect() as connection:
            connection.sendall(completion(7900))
            said = connection.recv(4096)
            child.kill()
            said += rest(connection)
        assert b"[DONE]" not in said
        ended = server.process.stderr.readline()
        assert "endless: llama.cpp's server ended by itself (it was ended by SIGKILL); starting again" in ended
        until = time.monotonic() + SECONDS
        while server.get("/health")[0] != 200 and time.monotonic() < until:
            time.sleep(0.05)
        with server.connect() as connection:
            connection.sendall(completion(40).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            assert b"[DONE]" in rest(connection)
        (child,) = psutil.Process(server.process.pid).children()
        server.process.kill()
        child.wait(SECONDS)  # it ends with its parent, however that ended


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else can limit a process that runs")
def test_connections_for_which_there_is_no_file_wait_and_it_is_said_once(endless: Path):
    with serving(endless, "--ctx", "256", "--parallel", "1", key=None) as server:
        psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (40, 40))
        for connection in [server.connect() for _ in range(80)]:
            connection.close()
        assert server.get("/health")[0] == 200
        assert server.stop() == 0
        assert server.process.stderr.read() == (
            "too many files are open: more connections wait; `ulimit -n` allows more\n"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else can limit a process that runs")
def test_connections_that_wait_for_files_when_all_ends_are_not_spoken_of(endless: Path):
    """asyncio means to take them a second later, hundreds of times, on a socket that is closed by then."""
    with serving(endless, "--ctx", "8000", "--parallel", "1", key=None) as server, contextlib.ExitStack() as stack:
        stays = stack.enter_context(server.connect())
        stays.sendall(completion(7900))
        stays.recv(4096)
        psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (40, 40))
        for _ in range(80):
            stack.enter_context(server.connect())
        assert "too many files" in server.process.stderr.readline()
        server.process.send_signal(signal.SIGINT)
        time.sleep(1.3)
        assert server.stop() == 0
        assert server.process.stderr.read() == ""


def test_https_with_a_key_from_a_file(endless: Path, tmp_path: Path):
    (tmp_path / "key").write_text("from-file\n", encoding="utf-8")
    flags = ["--tls-cert", TLS / "cert.pem", "--tls-key", TLS / "key.pem", "--api-key-file", tmp_path / "key"]
    with serving(endless, *flags, key="from-environment") as server:
        parts = urlsplit(server.url)
        assert parts.scheme == "https"
        with server.connect() as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(4096).startswith(b"HTTP")
        trusting = ssl.create_default_context(cafile=TLS / "cert.pem")
        for key, status in (("from-file", 200), ("from-environment", 401)):
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=trusting, timeout=SECONDS)
            with contextlib.closing(connection):
                connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert connection.getresponse().status == status
        assert server.stop() == 0
        assert server.process.stderr.read() == ""


def test_without_a_key_it_is_called_by_its_own_name_only_and_samples_as_the_file_suggests(endless: Path):
    """A page whose host name was made to lead here (DNS rebinding) has the right origin, but the wrong host."""
    with serving(endless, key=None) as server:
        for host, status in (("localhost:80", 200), ("127.0.0.1", 200), ("evil.example", 403)):
            assert server.get("/v1/models", Host=host)[0] == status
        asked_of_nothing = json.loads(server.get("/props")[1])["default_generation_settings"]["params"]
        suggested, ours = asked_of_nothing["temperature"], asked_of_nothing["top_p"]
        assert (suggested, ours) == (0.25, pytest.approx(DEFAULTS.top_p))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", saying("Helo"))


def fault(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which `moegguf serve` ends."""
    assert main(["serve", "--port", "0", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_port_in_use_is_one_line(model: Path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: the port is in use" in fault(capsys, model, "--port", port)


def test_other_machines_are_let_in_by_key_or_by_word_only(model: Path, capsys):
    assert "without a key" in fault(capsys, model, "--host", "0.0.0.0")
    assert "unknown host" in fault(capsys, model, "--host", "nowhere.invalid")
    assert "no such address" in fault(capsys, model, "--host", "203.0.113.7", "--i-know-it-is-unauthenticated")


def test_bad_keys_and_certificates_are_one_line(model: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").write_text("", encoding="utf-8")
    assert "an API key is one line" in fault(capsys, model, "--api-key-file", tmp_path / "empty")
    assert "nothere: cannot be read" in fault(capsys, model, "--api-key-file", tmp_path / "nothere")
    assert "two keys" in fault(capsys, model, "--api-key-file", tmp_path / "empty", "--api-key", "x")
    assert "belong together" in fault(capsys, model, "--tls-cert", TLS / "cert.pem")
    assert "no certificate" in fault(capsys, model, "--tls-cert", TLS / "key.pem", "--tls-key", TLS / "cert.pem")
    assert "no such file" in fault(capsys, model, "--tls-cert", tmp_path / "nothere", "--tls-key", TLS / "key.pem")


def test_bad_models_and_adapters_are_one_line(model: Path, tmp_path: Path, capsys):
    (tmp_path / "text.gguf").write_text("no model", encoding="utf-8")
    other = write_gguf(tmp_path / "other.gguf", saying("Helo"), arch="unheard-of")
    assert "bytes are too few" in fault(capsys, tmp_path / "text.gguf")
    assert "unknown model architecture: 'unheard-of'" in fault(capsys, other)
    assert "two models are called 'model'" in fault(capsys, model, model)
    assert "for which model?" in fault(capsys, model, other, "--adapter", "x.gguf")
    assert "not a LoRA adapter" in fault(capsys, model, "--adapter", other)
    assert "unknown device; xllamacpp knows CPU" in fault(capsys, model, "--override-tensor", "a=CUDA7")
    no_gpu = fault(capsys, model, "--gpu-layers", "all", "--main-gpu", "3", "--tensor-split", "1,2")
    assert "xllamacpp sees no GPU here: leave --gpu-layers and --main-gpu and --tensor-split out" in no_gpu
    assert "--device names 'CUDA7'" in fault(capsys, model, "--device", "CUDA7")


def test_slots_that_no_memory_holds_are_refused_with_a_context_that_fits(model: Path, capsys):
    assert "4 contexts, 100000000 tokens in each, take" in fault(capsys, model, "--ctx", "100000000")
    two = fault(capsys, model, f"other={model}", "--ctx", "9000000", "--parallel", "9")
    assert "18 contexts, 9000000 tokens in each, take" in two and re.search(r"--ctx \d+ fits", two)


def test_a_mix_that_may_not_run_is_not_served(tmp_path: Path, capsys):
    gateless = card(router="gateless", k=2, names=("a", "b"))
    path = write_gguf(tmp_path / "mix.gguf", saying("Helo"), card=gateless, used=1)
    assert "a gate-less mix runs all its 2 experts" in fault(capsys, path)


def test_without_the_extra_it_says_how_to_get_it(model: Path, capsys, monkeypatch):
    monkeypatch.setattr(extra, "EXTRA", ("a-package-that-nobody-has",))
    assert "pip install 'moegguf[serve]'" in fault(capsys, model)
