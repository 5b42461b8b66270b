"""`moegguf export ollama`: a Modelfile, and the model that Ollama makes of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console
from moegguf.errors import one_line

HELP = """\
Write a Modelfile for a GGUF, and run `ollama create` where Ollama is installed.

Ollama's templates are Go's. The file's chat template is translated where it does no more than to put texts around
messages, as those of ChatML, Llama, Mistral, Gemma, Phi, Zephyr and Alpaca do; the translation is checked by rendering
conversations both ways. Any other is left to Ollama, which reads the one in the file. Ollama's store is written by
Ollama only.
"""
EXAMPLES = """\
examples:
  moegguf export ollama mix.gguf --name my-mix
  moegguf export ollama mix.gguf --name my-mix --system "Answer briefly." --parameter temperature=0.3 --ctx 8192
  moegguf export ollama mix.gguf --no-create -o modelfiles/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a GGUF file")
    parser.add_argument("--name", help="what Ollama calls it (default: the file's name)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of the Modelfile (default: the mix's)")
    parser.add_argument("--force", action="store_true", help="replace the Modelfile if it exists")
    parser.add_argument("--no-create", action="store_true", help="only write the Modelfile")
    add_json(parser)
    says = parser.add_argument_group("what it says")
    says.add_argument("--ctx", type=int, metavar="N", help="context in tokens (default: the model's, at most 4096)")
    says.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    says.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a further stop sequence")
    says.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of Ollama, such as temperature=0.3"
    )


def run(args: argparse.Namespace) -> int:
    from moegguf.api import export

    made = export.ollama(
        args.file, name=args.name, output=args.output, ctx=args.ctx, system=args.system, stop=args.stop,
        parameters=dict(pair.partition("=")[::2] for pair in args.parameter), create=not args.no_create,
        overwrite=args.force, quiet=args.json,
    )  # fmt: skip
    if args.json:
        print_json(made.as_json())
    out, stops = console(args), made.modelfile.stops
    out.print(f"wrote {made.path}")
    out.print(f"template: {made.about_template}")
    out.print(f"stop: {'  '.join(map(one_line, stops)) or 'none but the tokens that the file marks as ends'}")
    out.print(
        f"created {made.name}; try: ollama run {made.name}"
        if made.is_created
        else f"to create it: ollama create {made.name} -f {made.path}"
    )
    return 0
