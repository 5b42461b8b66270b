"""`moegguf export ollama`: a Modelfile, and the model that Ollama makes of it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from moegguf.atomic import atomic_file, new_folder
from moegguf.commands.options import check_range, print_json
from moegguf.errors import UserError, one_line
from moegguf.exporting.chat_form import recognise
from moegguf.exporting.ollama import Modelfile, check_whole, licence_text, parameters, stop_sequences
from moegguf.gguf_header import Header, read_header
from moegguf.metadata import read_card
from moegguf.runtime.template import template_of
from moegguf.runtime.vocab import Vocab, open_vocab
from moegguf.sources.ollama import parse_name

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

TEMPLATE_KEY = "tokenizer.chat_template"
TODAY = "strftime_now"
"""What a template calls to write today's date, which would stay today's for ever."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a GGUF file")
    parser.add_argument("--name", help="what Ollama calls it (default: the file's name)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of the Modelfile (default: the mix's)")
    parser.add_argument("--force", action="store_true", help="replace a Modelfile that is there")
    parser.add_argument("--no-create", action="store_true", help="only write the Modelfile")
    parser.add_argument("--json", action="store_true", help="print JSON")
    says = parser.add_argument_group("what it says")
    says.add_argument("--ctx", type=int, metavar="N", help="context in tokens (default: the model's, at most 4096)")
    says.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    says.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a further stop sequence")
    says.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of Ollama, such as temperature=0.3"
    )


def run(args: argparse.Namespace) -> int:
    check_range("--ctx", args.ctx, 1)
    check_whole(args.file)
    name = args.name or args.file.stem
    parse_name(name, "--name", "take letters, digits, '.', '_' and '-', and perhaps :TAG")
    header = read_header(args.file)
    modelfile = _modelfile(args, header, open_vocab(args.file))
    path = _write(modelfile, args)
    created = not args.no_create and _create(name, path, quiet=args.json)
    if args.json:
        print_json(_as_json(name, path, modelfile, created=created))
        return 0
    print(f"wrote {path}")
    print(f"template: {_about_template(header, modelfile)}")
    print(f"stop: {'  '.join(map(one_line, modelfile.stops)) or 'none but the tokens that the file marks as ends'}")
    print(f"created {name}; try: ollama run {name}" if created else f"to create it: ollama create {name} -f {path}")
    return 0


def _modelfile(args: argparse.Namespace, header: Header, vocab: Vocab) -> Modelfile:
    template = template_of(header, vocab)
    form = None if TODAY in str(header.get(TEMPLATE_KEY, "")) else recognise(template.prompt)
    added = vocab.name(next(iter(vocab.tokenize_prompt("")), None))
    after = form.question if form else template.after_answer
    controls = [vocab.name(token) for token in vocab.tokenize(after) if vocab.is_control(token) and token != vocab.bos]
    given = dict(pair.partition("=")[::2] for pair in args.parameter)
    return Modelfile(
        weights=args.file,
        template=form.without(added).to_go() if form else None,
        stops=(*stop_sequences(after, controls), *args.stop),
        parameters=parameters(header, args.ctx, given),
        system=args.system,
        licence=licence_text(header, read_card(header)),
    )


def _write(modelfile: Modelfile, args: argparse.Namespace) -> Path:
    folder = args.output or args.file.parent
    path, text = folder / "Modelfile", modelfile.text(folder)
    if path.exists() and not args.force:
        raise UserError(f"{path}: exists already", "choose another -o, or pass --force to replace it")
    with new_folder(folder), atomic_file(path) as file:
        file.write(text.encode())
    return path


def _create(name: str, path: Path, *, quiet: bool) -> bool:
    """Let Ollama create the model; whether there is an Ollama to do it. Raises UserError when it fails."""
    program = shutil.which("ollama")
    if program is None:
        return False
    done = subprocess.run([program, "create", name, "-f", str(path)], stdout=sys.stderr if quiet else None, check=False)
    if done.returncode:
        raise UserError(
            f"`ollama create {name} -f {path}` failed with code {done.returncode}",
            "start Ollama and run it again; the Modelfile is written",
        )
    return True


def _about_template(header: Header, modelfile: Modelfile) -> str:
    if modelfile.template is None:
        return "left out: the file's chat template cannot be told in Ollama's form; Ollama may read it itself"
    if TEMPLATE_KEY not in header.fields:
        return "the file has none: what is said is given as it is, to be gone on with"
    return "the file's chat template in Ollama's form; both render the same conversations alike"


def _as_json(name: str, path: Path, modelfile: Modelfile, *, created: bool) -> dict[str, object]:
    return {
        "name": name,
        "modelfile": str(path),
        "created": created,
        "template": modelfile.template,
        "stop": modelfile.stops,
        "parameters": dict(modelfile.parameters),
    }
