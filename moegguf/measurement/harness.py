"""Standard benchmarks through EleutherAI's lm-evaluation-harness, an extra (`harness`).

The harness runs in a process of its own, with its model type `local-completions` and the tokenizer of the model that
answers at a URL. What it prints and what it finds is its own; nothing of a benchmark is written here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moegguf.errors import UserError

BATCH_SIZE = 32
ANSWER_TOKENS = 256  # lm_eval's own default
_GRACE_S = 10


@dataclass(frozen=True)
class Benchmarks:
    """`names` of tasks, with commas between; `folder` holds tasks of one's own, as YAML; `limit` is items per task."""

    names: str
    folder: Path | None = None
    limit: int | None = None

    def check(self) -> None:
        """Raises UserError where lm_eval is not installed, or the folder is none."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "benchmarks are run by lm-evaluation-harness, which is not installed here",
                "run: pip install 'moegguf[harness]'",
            )
        if self.folder and not self.folder.is_dir():
            raise UserError(f"--harness-path {self.folder}: is no folder", "name the one that holds your tasks")


@dataclass(frozen=True)
class HarnessRun:
    """`table` is what lm_eval prints; `results` maps a task to its metrics, as lm_eval writes them."""

    table: str
    results: dict[str, dict[str, object]]


def run_harness(url: str, benchmarks: Benchmarks, n_ctx: int, *, name: str, show_progress: bool = False) -> HarnessRun:
    """Run `benchmarks` against the model `name` at `url`, whose context holds `n_ctx` tokens.

    Raises UserError with what the harness says when it fails; ends it when interrupted.
    """
    arguments = {
        "model": name.replace(",", "_").replace("=", "_"),
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": n_ctx - 1,  # room for a BOS
        "max_gen_toks": min(ANSWER_TOKENS, n_ctx // 4),
        "timeout": 24 * 3600,
        "max_retries": 1,
    }
    with tempfile.TemporaryDirectory(prefix="moegguf-harness-") as scratch:
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
            "--tasks", benchmarks.names, "--batch_size", str(BATCH_SIZE), "--output_path", scratch,
            *(("--include_path", str(benchmarks.folder)) if benchmarks.folder else ()),
            *(("--limit", str(benchmarks.limit)) if benchmarks.limit else ()),
        ]  # fmt: skip
        table = _run(command, Path(scratch) / "log", show_progress)
        return HarnessRun(table, _results(Path(scratch)))


def _run(command: list[str], log: Path, show_progress: bool) -> str:
    """What the command prints on stdout. Its stderr goes to the file `log`, or to our own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=None if show_progress else errors, env=environment
        )
        try:
            out, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise UserError(
            f"lm-evaluation-harness failed: {_last_line(log) or f'exit code {process.returncode}'}",
            "check the names of the tasks (`lm-eval ls tasks`) and --harness-path",
        )
    return out.decode("utf-8", errors="replace").strip()


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _results(folder: Path) -> dict[str, dict[str, object]]:
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise UserError("lm-evaluation-harness wrote no results", "run it again at a terminal to see what it says")
    return json.loads(files[-1].read_text(encoding="utf-8"))["results"]
