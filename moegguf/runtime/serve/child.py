"""What every model's server does as a process of its own; `process` is its parent's side.

It reads its settings as a line from stdin, writes a line of JSON to stdout, and serves until stdin ends, which it also
does when the parent is killed. The line is the port, or message and mend of a UserError. Secrets so are in no process
list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

from moegguf.errors import UserError


def run(start: Callable[[str], tuple[int, object]]) -> None:
    """`start` is given the settings; it returns the port and a server, which works in threads of its own until it is
    forgotten."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp writes to stdout as well
    try:
        answer, _server = start(sys.stdin.readline())
    except UserError as error:
        answer = [error.message, error.mend]
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    sys.stdin.read()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)  # at once: llama.cpp's own way out now and then waits for itself, without end
