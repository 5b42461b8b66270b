#!/usr/bin/env python3
"""Loads `moegguf serve` with many clients at once, checks every answer, and sets it beside llama_cpp.server.

Each client asks one question after the other, greedily, over /v1/chat/completions, and waits for each answer. Before
the clock starts questions are asked alone of `moegguf serve`, and those are kept whose answers are beyond doubt: no
other question has the same, and every token led the next by a margin of --margin nats, far more than sums in another
order, as batches of other sizes make them, can move. Under load an answer then is

    right       word for word what the same server said to the question alone
    mixed up    anything else: another question's answer, a part of one, or wrong words
    lost        none: an error, a broken connection, or nothing within --timeout

Both servers get the same file, questions, clients and threads, one after the other. `moegguf serve` has a slot for
each client; llama_cpp.server, of llama-cpp-python, answers one request at a time. It needs packages that moegguf does
not; where --peer, a Python that has llama_cpp, lacks them, it is left out:

    python -m venv peer
    peer/bin/pip install 'llama-cpp-python[server]==0.3.36'

A table for people, then one line of JSON. Latency is from sending a question to having the whole answer. The exit code
is 1 if `moegguf serve` lost or mixed up anything.

    scripts/bench_serve.py --peer peer/bin/python                       32 clients, two minutes each, on the demo mix
    scripts/bench_serve.py mix.gguf --clients 8 --seconds 20
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench_build import ROOT, Step, machine, run_step

sys.path.insert(0, str(ROOT))  # the moegguf of this checkout

from moegguf.demo.text import DOMAINS, examples

N_QUESTIONS = 64
"""Kept at most; `CANDIDATES` of each domain are asked alone."""
CANDIDATES = 40
MAX_TOKENS = 64
START_SECONDS = 120
PEER_MODULES = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")


@dataclass
class Load:
    """What came of one server: counts, tokens of right answers, and seconds that each answer took."""

    server: str
    seconds: float = 0
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, object]:
        answered = sorted(self.latencies) or [math.nan]
        return {
            "server": self.server,
            "requests": self.ends.total(),
            "lost": self.ends["lost"],
            "mixed_up": self.ends["mixed up"],
            "tokens_per_s": self.tokens / self.seconds,
            "p50_s": answered[len(answered) // 2],
            "p99_s": answered[int(0.99 * (len(answered) - 1))],
            "errors": dict(self.errors),
        }


class Client:
    """One connection, opened again when it broke."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def ask(self, question: str, **settings: object) -> dict:
        """The answer in OpenAI's form. Raises OSError, http.client.HTTPException and ValueError when there is none."""
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **settings}
        try:
            self._connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {content[:200].decode(errors='replace')}")
        return json.loads(content)


def known_answers(url: str, margin: float, timeout: float) -> dict[str, str]:
    """Question → answer of those that are beyond doubt, by what the server says to each alone."""
    client, found = Client(url, timeout), {}
    for question in (each.question for domain in DOMAINS for each in examples(domain, "heldout", CANDIDATES, seed=0)):
        (choice,) = client.ask(question, logprobs=True, top_logprobs=2)["choices"]
        tokens = choice["logprobs"]["content"]
        margins = (first["logprob"] - second["logprob"] for first, second in (each["top_logprobs"] for each in tokens))
        if choice["finish_reason"] == "stop" and min(margins) >= margin:
            found[question] = choice["message"]["content"]
    times = Counter(found.values())
    unique = [(question, answer) for question, answer in found.items() if times[answer] == 1]
    return dict(unique[:N_QUESTIONS])


def said_alone(url: str, questions: Iterable[str], timeout: float) -> dict[str, str]:
    client = Client(url, timeout)
    return {question: client.ask(question)["choices"][0]["message"]["content"] for question in questions}


def load(server: str, url: str, answers: Mapping[str, str], options: argparse.Namespace) -> Load:
    """Let all clients ask for so many seconds; what is under way then is waited for."""
    result, lock = Load(server), threading.Lock()
    questions = list(answers)
    begin = time.perf_counter()

    def work(number: int) -> None:
        client = Client(url, options.timeout)
        for i in range(number * 7, sys.maxsize):
            if time.perf_counter() - begin > options.seconds:
                return
            question = questions[i % len(questions)]
            start = time.perf_counter()
            try:
                answer = client.ask(question)
                said, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
                end, error = ("right" if said == answers[question] else "mixed up"), ""
            except (OSError, http.client.HTTPException, ValueError) as failure:
                end, tokens, error = "lost", 0, str(failure) or type(failure).__name__
            with lock:
                result.ends[end] += 1
                result.tokens += tokens
                result.errors.update([error] if error else [])
                result.latencies += [time.perf_counter() - start] if end != "lost" else []

    clients = [threading.Thread(target=work, args=(number,)) for number in range(options.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    result.seconds = time.perf_counter() - begin
    return result


@contextmanager
def ours(model: Path, options: argparse.Namespace) -> Iterator[str]:
    command = [sys.executable, "-m", "moegguf", "serve", model, "--port", "0", "--parallel", str(options.clients)]
    command += ["--ctx", str(options.ctx), *(["--threads", str(options.threads)] if options.threads else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Ctrl-C"):
                    break
            else:
                sys.exit("moegguf serve did not start")
            yield next(line.split()[-1] for line in lines if line.startswith("OpenAI")).removesuffix("/v1")
        finally:
            process.terminate()


@contextmanager
def theirs(model: Path, options: argparse.Namespace) -> Iterator[str]:
    port, threads = options.peer_port, str(options.threads or machine()["cores"])
    command = [options.peer, "-m", "llama_cpp.server", "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", str(options.ctx), "--n_threads", threads, "--n_threads_batch", threads]
    command += ["--verbose", "false", "--interrupt_requests", "false"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process)
            yield url
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            Client(url, START_SECONDS).ask("hello", max_tokens=1)
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("llama_cpp.server did not start")


def missing_modules(python: str) -> list[str]:
    """Those of PEER_MODULES that an interpreter lacks."""
    test = f"import importlib.util as u; print(*[m for m in {PEER_MODULES!r} if not u.find_spec(m)])"
    return subprocess.run([python, "-c", test], capture_output=True, text=True, check=True).stdout.split()


def print_table(loads: Sequence[Load]) -> None:
    print(f"\n{'server':<18}{'requests':>9}{'lost':>6}{'mixed up':>10}{'tokens/s':>10}{'p50 s':>8}{'p99 s':>8}")
    for row in (load.row() for load in loads):
        print(
            f"{row['server']:<18}{row['requests']:>9}{row['lost']:>6}{row['mixed_up']:>10}"
            f"{row['tokens_per_s']:>10.1f}{row['p50_s']:>8.3f}{row['p99_s']:>8.3f}"
        )
        for error, count in row["errors"].items():
            print(f"    {count} × {error}")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", type=Path, help="a GGUF with a chat template (default: the demo mix, gate-less, Q8_0)")
    add("--clients", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--seconds", type=float, default=120, metavar="S", help="for each server (default: %(default)s)")
    add("--ctx", type=int, default=256, metavar="N", help="tokens of each slot (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="default: physical cores")
    add("--margin", type=float, default=0.5, metavar="NATS", help="default: %(default)s")
    add("--timeout", type=float, default=60, metavar="S", help="after which an answer is lost (default: %(default)s)")
    add(
        "--peer", default=sys.executable, metavar="PYTHON", help="one that can run llama_cpp.server (default: this one)"
    )
    add("--peer-port", type=int, default=18099, metavar="P", help="a free port for it (default: %(default)s)")
    options = parser.parse_args()
    options.threads = options.threads or machine()["cores"]
    with tempfile.TemporaryDirectory(prefix="bench_serve-") as folder:
        model = options.model or _demo_mix(Path(folder))
        return run(model.absolute(), options)


def run(model: Path, options: argparse.Namespace) -> int:
    with ours(model, options) as url:
        answers = known_answers(url, options.margin, options.timeout)
        if len(answers) < options.clients:
            sys.exit(f"only {len(answers)} questions have answers beyond doubt; lower --margin or --clients")
        loads = [load("moegguf serve", url, answers, options)]
    missing = missing_modules(options.peer)
    if missing:
        print(f"llama_cpp.server is left out: {options.peer} lacks {', '.join(missing)}; see --help", file=sys.stderr)
    else:
        with theirs(model, options) as url:
            alone = said_alone(url, answers, options.timeout)
            loads.append(load("llama_cpp.server", url, alone, options))
    print_table(loads)
    rows = [each.row() for each in loads]
    ratio = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"] if len(rows) == 2 else None
    if ratio:
        print(f"moegguf serve / llama_cpp.server, tokens per second: {ratio:.2f} ×\n")
    settings = {name: getattr(options, name) for name in ("clients", "seconds", "ctx", "threads", "margin")}
    print(
        json.dumps(
            {"bench": "serve", **machine(), **settings, "questions": len(answers), "ratio": ratio, "results": rows}
        )
    )
    return 1 if rows[0]["lost"] or rows[0]["mixed_up"] else 0


def _demo_mix(folder: Path) -> Path:
    output = folder / "demo.gguf"
    run_step(Step([sys.executable, "-m", "moegguf", "build", "demo", "-o", output, "--force"]), folder / "log")
    return output


if __name__ == "__main__":
    sys.exit(main())
