"""Real workers on loopback: a model that is spread over them computes the same, and every way they fail is one line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from conftest import CLOSE, TOKENS, build_mix, distance
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.runtime import workers
from moegguf.runtime.batch import logits
from moegguf.runtime.devices import function
from moegguf.runtime.log import llama_log
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.offload import ALL, WEIGHTS, Offload, Override
from moegguf.runtime.placing import plan_model
from test_chat import Terminal
from tiny_gguf import repeating, write_gguf

ROOT = Path(__file__).parent.parent
ON_CPU = Offload(devices=())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port: int, run: tuple[str, ...] = ("-m", "moegguf")) -> subprocess.Popen:
    command = [sys.executable, *run, "worker", "--listen", f"127.0.0.1:{port}", "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_until_listening(process: subprocess.Popen) -> str:
    """What it said until then."""
    said = ""
    while "listening" not in said:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    return said


@pytest.fixture(autouse=True)
def llama_cpp_aborts_as_ever() -> Iterator[None]:
    """A command with --rpc has this process end when a worker is lost: take that back after each test."""
    yield
    function("ggml_set_abort_callback")(None)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[str, str]]:
    """Two workers for as long as this file's tests run."""
    ports = free_port(), free_port()
    processes = [start(port) for port in ports]
    for process in processes:
        wait_until_listening(process)
    yield tuple(f"127.0.0.1:{port}" for port in ports)
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def mix(family, tmp_path_factory) -> Path:
    tiny = family("llama3_like")
    return build_mix(tmp_path_factory.mktemp("mix") / "m.gguf", tiny.base, tiny.experts)


def computed(path: Path, offload: Offload) -> np.ndarray:
    """float32 (n_tokens - 1, n_vocab), with a cache of F32."""
    options = RunOptions(ctx=64, threads=1, kv_type=GGMLQuantizationType.F32, offload=offload)
    with open_model(path, options) as model:
        return np.concatenate([block.copy() for block in logits(model, [TOKENS])])


PLACEMENTS: dict[str, Callable[[tuple[str, str]], Offload]] = {
    "what fits": lambda pair: Offload(workers=pair),
    "split over two": lambda pair: Offload(layers=ALL, tensor_split=(1, 1), workers=pair),
    "one layer": lambda pair: Offload(layers=1, workers=pair[:1]),
    "experts at home": lambda pair: Offload(layers=ALL, cpu_experts=ALL, workers=pair[:1]),
    "only experts away": lambda pair: Offload(layers=0, overrides=(Override("_exps", pair[1]),), workers=pair),
    "experts on the other": lambda pair: Offload(
        layers=ALL, tensor_split=(1,), overrides=(Override(r"blk\.0\..*_exps", pair[1]),), workers=pair
    ),
}


@pytest.mark.parametrize("offload", PLACEMENTS.values(), ids=PLACEMENTS)
def test_the_logits_are_those_of_the_cpu_wherever_the_tensors_lie(pair, mix, offload):
    found = computed(mix, offload(pair))
    assert np.isfinite(found).all()
    assert distance(found, computed(mix, ON_CPU)) < CLOSE


def test_an_output_that_is_the_embedding_is_counted_where_it_is_needed_a_second_time(pair, family, tmp_path):
    tied = family("tied")
    path = build_mix(tmp_path / "m.gguf", tied.base, tied.experts)
    assert "output.weight" not in read_header(path).tensors
    test_llama_cpp_puts_as_many_bytes_on_each_device_as_was_planned(pair, path, PLACEMENTS["split over two"])


@pytest.mark.parametrize("offload", PLACEMENTS.values(), ids=PLACEMENTS)
def test_llama_cpp_puts_as_many_bytes_on_each_device_as_was_planned(pair, mix, offload):
    options = RunOptions(ctx=64, threads=1, offload=offload(pair), mmap=False)
    with llama_log().heard() as said, open_model(mix, options) as model:
        placement = model.placement
        plan = plan_model(read_header(mix), options)
    assert plan.placement == placement
    for worker, device in zip(options.offload.workers, placement.devices, strict=True):
        loaded = re.findall(rf"RPC\d+\[{worker}\] model buffer size = +([0-9.]+) MiB", "".join(said))
        planned = sum(plan.memory[device][part] for part in WEIGHTS) / 2**20
        assert float(loaded[-1]) == pytest.approx(planned, abs=0.02) if planned else not loaded


def test_compute_buffers_are_no_larger_than_was_laid_out_and_not_much_smaller(pair, mix):
    options = RunOptions(ctx=64, threads=1, offload=Offload(layers=ALL, tensor_split=(1, 1), workers=pair))
    plan = plan_model(read_header(mix), options)
    with llama_log().heard() as said, open_model(mix, options):
        pass
    allocated = [float(size) for size in re.findall(r"RPC.* compute buffer size = +([0-9.]+) MiB", "".join(said))]
    laid_out = [plan.compute[device] / 2**20 for device in plan.placement.devices]
    assert len(allocated) == len(laid_out) == 2
    for real, planned in zip(allocated, laid_out, strict=True):
        assert 0.75 * planned < real <= planned + 0.01


def test_a_plan_counts_on_the_devices_of_workers(pair, mix, capsys):
    assert main(["plan", str(mix), "--rpc", ",".join(pair), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert len(set(re.findall(r"RPC\d+", out))) == 2 and "tokens/s" in out


# --- what goes wrong ---


def failure(pair: tuple[str, str], mix: Path, **asked) -> str:
    with pytest.raises(UserError) as caught:
        open_model(mix, RunOptions(threads=1, offload=Offload(workers=pair, **asked)))
    return str(caught.value)


def test_a_device_that_is_not_there_names_those_that_are(pair, mix):
    for asked in ({"devices": ("CUDA7",)}, {"overrides": (Override("_exps", "CUDA7"),)}):
        message = failure(pair, mix, **asked)
        assert "'CUDA7'" in message and re.search(r"RPC\d+", message) and pair[1] in message
    assert "--main-gpu 2" in failure(pair, mix, main_gpu=2)
    assert "3 shares" in failure(pair, mix, tensor_split=(1, 1, 1))


@contextmanager
def answering(reply: bytes, *, hold: bool = False) -> Iterator[str]:
    """Something on a port that sends `reply` to whoever comes, and then hangs up unless it is to `hold`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError):  # whoever came has left
                    connection.sendall(reply)
                    if not hold:
                        connection.shutdown(socket.SHUT_WR)
                held.append(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def hello(major: int, minor: int) -> bytes:
    return (28).to_bytes(8, "little") + bytes([major, minor, 0, 0]) + bytes(24)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (hello(6, 0), "speaks version 6.0 of llama.cpp's RPC, expected 7.0"),
        (hello(7, 1), "speaks version 7.1"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 40, "is no worker, or one of another llama.cpp"),
        (b"", "is no worker"),
        (hello(7, 0)[:20], "is no worker"),
    ],
    ids=["older", "newer", "a web server", "nothing said", "broken off"],
)
def test_what_is_no_worker_of_this_version_is_refused_before_ggml_sees_it(reply, expected):
    with answering(reply) as worker, pytest.raises(UserError, match=re.escape(expected)):
        workers.check(worker)


def test_a_worker_of_an_older_minor_version_will_do():
    with answering(hello(*workers.PROTOCOL)) as worker:
        workers.check(worker)


def test_a_worker_that_does_not_answer_is_waited_for_no_longer_than_a_while():
    with (
        answering(b"", hold=True) as worker,
        pytest.raises(UserError, match=r"no answer within 0\.2 s; it may be busy"),
    ):
        workers.ask(worker, seconds=0.2)


def test_a_worker_is_asked_for_the_version_of_this_llama_cpp(pair):
    assert workers.ask(pair[0]) == workers.PROTOCOL


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "cannot be reached (Connection refused); start `moegguf worker`"),
        ("no.invalid", "no machine is called so"),
    ],
)
def test_where_nobody_listens_it_says_what_to_do(host, expected, mix, capsys):
    assert main(["chat", str(mix), "--prompt", "hi", "--rpc", f"{host}:{free_port()}"]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_worker_that_dies_in_the_midst_of_an_answer_ends_it_with_one_line(endless):
    ports = free_port(), free_port()
    doomed, other = (start(port) for port in ports)
    for process in (doomed, other):
        wait_until_listening(process)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    chat = subprocess.Popen(
        [sys.executable, "-m", "moegguf", "chat", endless, "--ctx", "30000", "--rpc", addresses, "--prompt", "x",
         "--tensor-split", "1,1", "--temp", "0", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    try:
        assert chat.stdout.read(4) == "abab"
        doomed.kill()
        _, err = chat.communicate(timeout=20)
    finally:
        for process in (doomed, other, chat):
            process.kill()
            process.wait()
    assert chat.returncode == 2
    assert re.fullmatch(rf"moegguf: error: worker 127.0.0.1:{ports[0]}: lost the connection; .*\n", err)


def test_the_line_is_seen_while_a_model_is_loaded():
    """llama-cpp-python turns stderr to nowhere for that long."""
    program = """if True:
        from llama_cpp._utils import suppress_stdout_stderr
        from moegguf.leaving import leave
        with suppress_stdout_stderr(disable=False):
            leave("gone", 2)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "gone\n")


# --- one that says nothing ---


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A model that talks until it is stopped."""
    return write_gguf(tmp_path_factory.mktemp("endless") / "endless.gguf", repeating("ab"), ctx=30_000)


@contextmanager
def frozen(process: subprocess.Popen) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[str, subprocess.Popen]]:
    """One that may be frozen."""
    process = start(port := free_port())
    wait_until_listening(process)
    yield f"127.0.0.1:{port}", process
    process.kill()
    process.wait()


FROZEN = pytest.mark.skipif(sys.platform != "linux", reason="freezes with a signal, and asks for TCP's state")


@FROZEN
@pytest.mark.parametrize(
    ("number", "flags", "code", "says"),
    [
        (signal.SIGINT, [], 130, "moegguf: interrupted(, while worker {} did not answer)?\n"),
        (None, ["--rpc-timeout", "1"], 2, "moegguf: error: worker {}: no answer for 1 s; .*--rpc-timeout\n"),
    ],
    ids=["Ctrl-C", "silence"],
)
def test_a_frozen_worker_is_left_at_a_signal_and_after_long_silence(worker, endless, number, flags, code, says):
    address, process = worker
    chat = subprocess.Popen(
        [sys.executable, "-m", "moegguf", "chat", endless, "--ctx", "30000", "--rpc", address, "--gpu-layers", "all",
         "--prompt", "x", "--temp", "0", "--threads", "1", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert chat.stdout.read(4) == "abab"
    with chat, frozen(process):
        if number:
            time.sleep(0.2)  # until it waits for an answer; where Python code runs instead, it hears of it by itself
            chat.send_signal(number)
        _, err = chat.communicate(timeout=20)
    assert chat.returncode == code
    assert re.fullmatch(says.format(address), err)


@FROZEN
def test_a_session_is_left_at_the_second_press_only(worker, endless):
    address, process = worker
    terminal = Terminal(endless, "--ctx", "30000", "--rpc", address, "--gpu-layers", "all", "--temp", "0")
    with contextlib.closing(terminal):
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("abab")
        with frozen(process):
            time.sleep(0.3)  # until it waits for an answer
            terminal.type("\x03")
            terminal.until(f"worker {address} has not answered yet; Ctrl-C again leaves")
            terminal.type("\x03")
            assert terminal.exit_code() == 130


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_too_little_memory_on_a_worker_is_one_line_with_a_placement_to_try(mix, capsys):
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, (500 << 20, 500 << 20));"
        "sys.argv = ['moegguf', *sys.argv[1:]]; runpy.run_module('moegguf', run_name='__main__')"
    )
    process = start(port := free_port(), run=("-c", limited))
    try:
        wait_until_listening(process)
        flags = ["--ctx", "4000000", "--rpc", f"127.0.0.1:{port}", "--gpu-layers", "all", "--threads", "1"]
        assert main(["chat", str(mix), "--prompt", "hi", *flags]) == 2
    finally:
        process.kill()
        process.wait()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "failed to allocate RPC" in err and "--gpu-layers" in err


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the sockets of a process")
def test_a_machine_that_vanishes_is_noticed_by_keep_alive(pair, mix):
    with open_model(mix, RunOptions(threads=1, offload=Offload(layers=ALL, workers=pair[:1]))):
        host, _, port = pair[0].rpartition(":")
        watched = []
        for link in [link for link in Path("/proc/self/fd").iterdir() if link.is_socket()]:
            with socket.socket(fileno=os.dup(int(link.name))) as connection, contextlib.suppress(OSError):
                if connection.getpeername() == (host, int(port)):
                    watched.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        assert watched == [1]


# --- being one ---


def test_ctrl_c_ends_a_worker_which_is_no_failure():
    process = start(port := free_port())
    said = wait_until_listening(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert re.search(r"lending +CPU \(.+\), .+ free of", said) and f"--rpc 127.0.0.1:{port}" in said


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("0.0.0.0:50052", "other machines reach this address"),
        ("nonsense", "expected HOST:PORT"),
        ("127.0.0.1:0", "a port from 1 to 65535"),
        ("127.0.0.1:99999", "a port from 1 to 65535"),
        ("nosuchhost.invalid:50052", "no IPv4 address is called 'nosuchhost.invalid'"),
        ("::1:50052", "expected HOST:PORT"),
    ],
)
def test_an_address_that_is_wrong_or_open_to_others_is_refused(listen, expected, capsys):
    assert main(["worker", "--listen", listen]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_a_port_in_use_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["worker", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"]) == 2
    assert "the port is in use" in capsys.readouterr().err


def test_a_device_to_lend_that_is_not_there_is_refused(capsys):
    assert main(["worker", "--listen", f"127.0.0.1:{free_port()}", "--device", "CUDA7"]) == 2
    assert "'CUDA7'" in capsys.readouterr().err
