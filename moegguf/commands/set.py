"""`moegguf set`: what a finished mix says of itself, its template, and how many experts run."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.commands.changes import add_common, add_output, carry_out, open_mix, quiet_for_json
from moegguf.commands.options import print_json
from moegguf.edit.keys import TEMPLATE, TEXTS, plan_set
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.journal import recover

HELP = """\
Change what a mix says of itself, its chat template, and how many experts run for a token: in place and in a moment, as
far as its header has room (a build leaves 1 kB); with -o a copy is written, which has all the room again.

An empty text, as in --author "", takes it out.
"""
EXAMPLES = """\
examples:
  moegguf set mix.gguf --name my-mix --license apache-2.0
  moegguf set mix.gguf --k 1                                a mix with a router; gate-less ones run all experts
  moegguf set mix.gguf --template chatml.jinja -o other.gguf
  moegguf set mix.gguf --recover                            undo a change that was interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix to change")
    for flag, (_, what) in TEXTS.items():
        parser.add_argument(f"--{flag}", metavar="TEXT", help=what)
    parser.add_argument("--template", type=Path, metavar="FILE", help="chat template, in jinja2")
    parser.add_argument("--k", type=int, metavar="N", help="experts that run for a token")
    parser.add_argument("--recover", action="store_true", help="put back what an interrupted change left half written")
    add_output(parser, required=False, what="write a copy, and leave MIX as it is")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    texts = {key: text for flag, (key, _) in TEXTS.items() if (text := getattr(args, flag)) is not None}
    if args.template:
        texts[TEMPLATE] = _template(args.template)
    if texts or args.k is not None:
        what = [key.rpartition(".")[2] for key in texts] + ["k"] * (args.k is not None)
        return carry_out(args, plan_set(open_mix(args), texts, args.k), f"{', '.join(what)} set")
    if not args.recover or args.output:
        raise UserError("nothing to set", "see `moegguf set --help`")
    is_undone = recover(args.file)
    read_header(args.file)
    if args.json:
        print_json({"file": str(args.file), "undone": is_undone})
    state = "an interrupted change of it was undone" if is_undone else "no change of it was interrupted"
    quiet_for_json(args).print(f"{args.file}: {state}")
    return 0


def _template(path: Path) -> str:
    """The text of a template that works. Raises UserError for any other."""
    from moegguf.runtime.template import ChatTemplate

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8", "convert it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path given to --template") from error
    try:
        ChatTemplate(text, "<bos>", "<eos>").prompt([{"role": "user", "content": "hello"}])
    except UserError as error:
        raise UserError(f"--template {path}: {error.message}", "mend it, and try again") from error
    if not text:
        raise UserError(f"{path}: is empty", "name a file with a template")
    return text
