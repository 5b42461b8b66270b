"""The command table, and the one place where a user error becomes a line on stderr and exit code 2.

Each command is a module of `moegguf.commands` with `HELP`, `add_arguments(parser)` and `run(args) -> int`, or a package
with `HELP` and a table `COMMANDS` of its own. Only the one that was asked for is imported, so `--help` needs neither
numpy nor llama.cpp.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, TextIO

from moegguf import __version__
from moegguf.errors import UserError, one_line
from moegguf.interrupt import Terminated, terminable

COMMANDS = {
    "build": "mix fine-tunes of one model into a single quantised MoE GGUF",
    "chat": "talk to a mix, or to any GGUF",
    "serve": "offer mixes over HTTP: OpenAI's API, and a web page for chatting",
    "inspect": "show what is in a mix, and check that it is sound",
    "route": "fit a router, put it into a mix, export it, draw what it does",
    "swap": "put another model in the place of an expert of a finished mix",
    "add": "put more experts into a finished mix",
    "drop": "leave experts out of a finished mix",
    "prune": "find the experts that matter least, leave them out, and say what that costs",
    "set": "change a mix's name, licence or template, or how many experts run",
    "split": "cut a GGUF file into parts of a given size",
    "merge": "put the parts of a split GGUF file together",
    "export": "hand a mix to Ollama, to LM Studio, or to the Hugging Face Hub",
    "train": "learn a router from text in PyTorch, all else frozen",
    "calibrate": "importance matrices from text, for builds at few bits",
    "eval": "measure models side by side on tasks, or by standard benchmarks",
    "measure": "say how far models are from a reference, in KL divergence",
    "plan": "say where a model would go on this machine or another, and how fast it runs",
    "worker": "lend this machine's GPUs or CPU to another one",
    "bench": "measure how fast a file runs here",
    "recipes": "list the mixes that models.toml offers",
    "doctor": "say what this machine can run",
    "completion": "complete commands and flags in your shell",
}

DESCRIPTION = """\
Mix fine-tunes of one model into a Mixture of Experts: one GGUF file that stock llama.cpp, Ollama and LM Studio load.

  moegguf build demo                       build the embedded demo family
  moegguf chat demo-Q8_0.gguf              talk to it
  moegguf build --base hf:org/base --expert math=hf:org/math --expert code=./code-model -o mix.gguf
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 a check failed, 2 a mistake to mend; 130 at Ctrl-C, 143 at
    SIGTERM, 141 where the reader of stdout left early, as in `| head -1`."""
    is_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?
    try:
        return _answer(argv)
    except BrokenPipeError:
        return 141
    finally:
        _drop_unwritten()
        if is_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, Ctrl-C ends it, without a traceback


def _answer(argv: Sequence[str]) -> int:
    """Run one command, and say on stderr what it ended in. Raises BrokenPipeError."""
    try:
        with terminable():
            return _run(argv)
    except UserError as error:
        _print_faults(*map(str, error.faults))
        return 2
    except Terminated:
        print("moegguf: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("moegguf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:  # a path or a device that fails where nobody could know in advance
        _print_faults(f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk")
        return 2


def _run(argv: Sequence[str]) -> int:
    parser = _parser(argv)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    code = args.run(args)
    sys.stdout.flush()
    return code


def _drop_unwritten() -> None:
    """What stdout does not take any more goes nowhere, so that Python says nothing of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Where the shell closed stdin, stdout or stderr (`>&-`) nothing is read or shown, and no file gets its number."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 (for good)


def _complete() -> NoReturn:
    """Tell the shell what may follow the line so far, which argcomplete's variables hold."""
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    words = argcomplete.split_line(line, point)[3]
    argcomplete.autocomplete(_parser(words[1:]))
    raise AssertionError("argcomplete ends the process")


def _print_faults(*faults: str) -> None:
    for fault in faults:
        print(f"moegguf: error: {one_line(fault)}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse, with a wrong flag reported like any other mistake, by the command that it was given to, and
    help that cannot be written like any other output."""

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see `{self.prog} --help`")

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        print(message, end="", file=file, flush=True)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="moegguf", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"moegguf {__version__}")
    _add_commands(parser, "moegguf.commands", COMMANDS, argv)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, package: str, commands: Mapping[str, str], argv: Sequence[str]
) -> None:
    """One subparser for each command; the one that `argv` asks for is imported and adds its flags."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    for name, summary in commands.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[at : at + 1] == [name]:
            command = importlib.import_module(f"{package}.{name}")
            subparser.description = command.HELP
            subparser.epilog = getattr(command, "EXAMPLES", None)
            if hasattr(command, "COMMANDS"):
                _add_commands(subparser, command.__name__, command.COMMANDS, argv[at + 1 :])
            else:
                command.add_arguments(subparser)
                subparser.set_defaults(run=command.run)
