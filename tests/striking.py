"""The command line in a process of its own, which sends itself a signal when it calls a given function for the n-th
time: so it is hit at a known point."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

_STRIKE = """
import importlib, itertools, os, signal, sys
from moegguf import atomic, cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

number, place, nth, nameless, *argv = sys.argv[1:]
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
original, calls = getattr(module, name), itertools.count()

def strike(*args, **kwargs):
    if next(calls) == int(nth):
        os.kill(os.getpid(), int(number))
    return original(*args, **kwargs)

setattr(module, name, strike)
if nameless == "False":
    atomic._open_nameless = lambda folder: None  # as on a file system without O_TMPFILE
sys.exit(cli.main(argv))
"""
CHUNK = "moegguf.quant.ggml.is_valid"
"""Called once for every finished chunk of rows."""
NEVER = (CHUNK, -1)


def strike(
    number: int, point: tuple[str, int], argv: Sequence[object], *, nameless: bool = True, **options
) -> subprocess.CompletedProcess:
    """Run `argv`; signal `number` comes at `point`: the name of a function, and the how many-th call of it."""
    place, nth = point
    arguments = [str(int(number)), place, str(nth), str(nameless), *map(str, argv)]
    return subprocess.run(
        [sys.executable, "-c", _STRIKE, *arguments], capture_output=True, text=True, timeout=60, **options
    )
