"""Build the demo family two ways and set both beside the base model: the second half of scripts/demo.

Gate-less and ridge-routed: one question per domain, then how many of some held-out questions each answers right.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moegguf.cli import main as moegguf
from moegguf.demo.text import ABOUT, DOMAINS, SAMPLE_QUESTIONS
from moegguf.runtime.chat import Conversation
from moegguf.runtime.model import open_model
from moegguf.runtime.sampling import Sampling

GATELESS, RIDGE, BASE = Path("demo-Q8_0.gguf"), Path("demo-ridge-Q8_0.gguf"), Path("demo-base-Q8_0.gguf")
N_HELDOUT = 50
"""Held-out questions of each domain. With so few, a difference of 10 points may be chance."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    base = ["--base", "demo:base", "--expert", "base=demo:base", "--layout", "fused", "--quant", "Q8_0"]
    run(["build", "demo", "--force", "-o", str(GATELESS)])
    run(["build", "demo-ridge", "--force", "-o", str(RIDGE)], quietly=True)
    run(["build", *base, "--force", "-o", str(BASE)], quietly=True)
    console = Console()
    console.print(answers_table())
    heldout = [f"{domain}=demo:{domain}/heldout#{N_HELDOUT}" for domain in DOMAINS]
    console.print(f"\nexact match on {N_HELDOUT} held-out questions of each domain (moegguf eval)")
    run(["eval", str(BASE), str(GATELESS), str(RIDGE), "--tasks", *heldout])
    console.print(f"\nWhat it knows: {ABOUT}", highlight=False)
    console.print(f"\nChat with it:  .venv/bin/moegguf chat {RIDGE}", highlight=False)
    return 0


def run(argv: list[str], *, quietly: bool = False) -> None:
    """Run a command; `quietly` shows only its errors. Ends this script where it fails."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(io.StringIO() if quietly else sys.stdout):
        code = moegguf(argv)
    if code:
        sys.exit(code)


def answers_table() -> Table:
    columns = {"base alone": ask_all(BASE), "gate-less": ask_all(GATELESS), "ridge-routed": ask_all(RIDGE)}
    table = Table("domain", "question", *columns, title="\none question per domain", title_justify="left")
    for i, (domain, question) in enumerate(SAMPLE_QUESTIONS.items()):
        table.add_row(domain, question, *(answers[i] for answers in columns.values()))
    return table


def ask_all(path: Path) -> list[str]:
    """The greedy answer of a model to every sample question, each in a fresh conversation."""
    with open_model(path) as model:
        return [
            "".join(Conversation(model, sampling=Sampling(temp=0.0, max_tokens=64)).answer(question))
            for question in SAMPLE_QUESTIONS.values()
        ]


if __name__ == "__main__":
    sys.exit(main())
