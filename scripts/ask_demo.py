"""Build the demo family and show its answers beside the base model's: the second half of scripts/demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moegguf.cli import main as moegguf
from moegguf.demo.text import ABOUT, SAMPLE_QUESTIONS
from moegguf.runtime.chat import Conversation
from moegguf.runtime.model import open_model
from moegguf.runtime.sampling import Sampling

MIX, BASE = Path("demo-Q8_0.gguf"), Path("demo-base-Q8_0.gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    code = moegguf(["build", "demo", "--force", "-o", str(MIX)])
    if code:
        return code
    build_base = ["build", "--base", "demo:base", "--expert", "base=demo:base", "--layout", "fused"]
    sys.stdout.flush()
    code = quietly([*build_base, "--quant", "Q8_0", "--force", "-o", str(BASE)])
    if code:
        return code
    console = Console()
    console.print(answers_table())
    console.print(f"\nWhat it knows: {ABOUT}", highlight=False)
    console.print(f"\nChat with it:  .venv/bin/moegguf chat {MIX}", highlight=False)
    return 0


def quietly(argv: list[str]) -> int:
    """Run a command without its report: only its errors show."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return moegguf(argv)


def answers_table() -> Table:
    columns = {"base alone": ask_all(BASE), "the mix": ask_all(MIX)}
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
