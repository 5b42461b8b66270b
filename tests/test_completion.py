"""Completion, asked for by a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moegguf.cli import COMMANDS, main

SCRIPT = """
eval "$(moegguf completion bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete moegguf
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completions(line: str) -> set[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", line],
        capture_output=True, text=True, check=True, env=os.environ | {"PATH": path},
    )  # fmt: skip
    assert not shell.stderr
    return {word.strip() for word in shell.stdout.splitlines()}


@pytest.mark.skipif(not shutil.which("bash"), reason="asks bash")
@pytest.mark.parametrize(("line", "expected"), [
    ("moegguf ", {*COMMANDS, "-h", "--help", "--version"}),
    ("moegguf bui", {"build"}),
    ("moegguf build --lay", {"--layers", "--layout"}),
    ("moegguf build --layout ", {"mixtral", "fused", "shared", "auto"}),
    ("moegguf route ex", {"export"}),
    ("moegguf nonsense --x", {""}),
])  # fmt: skip
def test_tab_offers_commands_flags_and_choices(line: str, expected: set[str]):
    assert completions(line) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_every_shell_gets_its_own_code(shell: str, capsys):
    assert main(["completion", shell]) == 0
    assert "moegguf" in capsys.readouterr().out
