"""`moegguf serve`: one mix or several behind OpenAI's API and a web page for chatting, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.commands.options import add_device_arguments, add_experts_used, add_memory_arguments, run_options
from moegguf.errors import UserError, one_line
from moegguf.runtime.serve.address import KEY_VARIABLE, Address

if TYPE_CHECKING:
    from moegguf.runtime.serve.front import Door
    from moegguf.runtime.serve.models import Served

HELP = """\
Serve mixes, or any GGUFs that llama.cpp runs, over HTTP: OpenAI's API (chat, completions, embeddings), a web page for
chatting, /metrics and /health. Several files are several models, each under its name. The server is llama.cpp's own,
from the xllamacpp package: pip install 'moegguf[serve]'.

Requests are answered at the same time, as many as there are slots; more wait. Answers under way are finished when the
server is stopped with Ctrl-C or SIGTERM; a second Ctrl-C breaks them off.

With --rpc, --device or --experts-used, which llama.cpp's server there lacks, a small server of moegguf's own answers:
chat and completions, one answer at a time, without web page, embeddings and adapters.
"""
EXAMPLES = """\
examples:
  moegguf serve mix.gguf                                        http://127.0.0.1:8080, for this machine alone
  moegguf serve mix.gguf code=coder.gguf --parallel 8           two models: "mix" and "code"
  moegguf serve mix.gguf --host 0.0.0.0 --api-key-file key.txt --tls-cert cert.pem --tls-key key.pem
  moegguf serve mix.gguf --rpc 192.168.1.5:50052                with the devices that `moegguf worker` lends there

  moegguf serve mix.gguf --adapter math.gguf --adapter law.gguf     routers that requests choose between
    A request takes a router with "lora": [{"id": 0, "scale": 1}] beside its "messages": id 0 is the first file, and
    all others are off. In Python: client.chat.completions.create(..., extra_body={"lora": [{"id": 0, "scale": 1}]}).
    Without "lora" it gets the file's own router.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]FILE",
        help="GGUF files (first parts of split ones); a model's name is its file's unless one is given",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]FILE",
        help="a LoRA GGUF, say a router from `moegguf route export`, that requests can switch on; NAME of its model "
        "where there are several; may be repeated",
    )  # fmt: skip

    where = parser.add_argument_group("address")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=8080, help="0 takes one that is free (default: 8080)")
    where.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate (PEM): serve https")
    where.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")

    who = parser.add_argument_group("access")
    who.add_argument(
        "--api-key", metavar="KEY",
        help="let in only those who send this key; other users see it in the list of processes, so better "
        f"${KEY_VARIABLE} or --api-key-file",
    )  # fmt: skip
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key is this file's only line")
    who.add_argument(
        "--i-know-it-is-unauthenticated", action="store_true",
        help="listen to other machines without a key",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--parallel", type=int, metavar="N",
        help="slots: requests answered at the same time (default: 4)",
    )  # fmt: skip
    machine.add_argument(
        "--ctx", type=int, metavar="N",
        help="tokens of each slot, for history and answer; memory is taken for N times --parallel "
        "(default: the model's own, at most 4096)",
    )  # fmt: skip
    machine.add_argument(
        "--batch", type=int, default=512, metavar="N",
        help="tokens evaluated at once, and the longest text to embed (default: 512)",
    )  # fmt: skip
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads of each model (default: physical cores)")
    add_experts_used(machine)
    machine.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log on stderr")
    add_device_arguments(parser)
    add_memory_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM. Raises UserError; KeyboardInterrupt while models are still being loaded."""
    from moegguf.runtime.serve.extra import check_installed

    check_installed()
    from moegguf.runtime.serve.serving import serve

    address = Address.of(args.host, args.port, args.tls_cert, args.tls_key)
    door = _door(args, address)
    models = _models(args)

    def ready(url: str) -> None:
        print("\n".join(map(one_line, _what_is_served(models, url, has_key=door.key is not None))), flush=True)

    serve(models, address, door, ready=ready, note=lambda text: print(one_line(text), file=sys.stderr, flush=True))
    return 0


def _door(args: argparse.Namespace, address: Address) -> Door:
    """Raises UserError for a bad key, and for none where other machines can come in."""
    from moegguf.runtime.serve.serving import open_door

    door = open_door(address, _api_key(args), to_all=args.i_know_it_is_unauthenticated)
    if door.names is None and door.key is not None and address.tls is None:
        print("the key travels in the clear: --tls-cert and --tls-key encrypt it", file=sys.stderr)
    return door


def _api_key(args: argparse.Namespace) -> str | None:
    """The flag's, then the file's, then the environment's."""
    if args.api_key is not None and args.api_key_file is not None:
        raise UserError("--api-key and --api-key-file are two keys", "pass one of them")
    if args.api_key is not None:
        return args.api_key
    return os.environ.get(KEY_VARIABLE) if args.api_key_file is None else _text(args.api_key_file)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error


def _models(args: argparse.Namespace) -> list[Served]:
    """Every model with its adapters, checked. Raises UserError."""
    from moegguf.runtime.serve.models import prepare

    paths = _named_paths(args.models)
    adapters = _adapters(args.adapter, list(paths))
    options = replace(run_options(args), ctx=args.ctx, batch=args.batch, verbose=args.verbose)
    return prepare(paths, options, slots=args.parallel, adapters=adapters)


def _named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """Name → file. Raises UserError for a name that occurs twice."""
    named = [_name_and_path(text) for text in texts]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise UserError(f"two models are called {twice[0]!r}", f"name one of them, say other={named[-1][1]}")
    return dict(named)


def _name_and_path(text: str) -> tuple[str, Path]:
    from moegguf.runtime.serve.models import name_of

    name, is_given, path = text.partition("=")
    if is_given and name and not Path(text).exists():
        return name, Path(path)
    return name_of(Path(text)), Path(text)


def _adapters(texts: Sequence[str], names: Sequence[str]) -> dict[str, list[Path]]:
    """Name of a model → its adapters, in the order of their ids. Raises UserError when it is not clear whose one is."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    for text in texts:
        name, _, path = text.partition("=")
        if path and name in found:
            found[name].append(Path(path))
        elif len(names) == 1:
            found[names[0]].append(Path(text))
        else:
            raise UserError(
                f"--adapter {text}: for which model?", f"say NAME={path or text}, NAME of {', '.join(names)}"
            )
    return found


def _what_is_served(models: Sequence[Served], url: str, *, has_key: bool) -> list[str]:
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    body = f'{{"model": "{models[0].settings.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return [
        *(line for served in models for line in _about(served)),
        *([f"web page         {url}"] if not models[0].only_own else []),
        f"OpenAI base URL  {url}/v1",
        f"try              curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        "Ctrl-C stops it",
    ]


def _about(served: Served) -> list[str]:
    settings, card = served.settings, served.card
    kind = f"{len(card.experts)} experts, router {card.router}" if card else "no mix, a plain model"
    if served.only_own:
        return [
            f"serving          {settings.name} ({kind}): one answer at a time, of {served.ctx} tokens with its history",
            f"                 as {' and '.join(served.only_own)} needs moegguf's own server; llama.cpp's here cannot",
        ]
    return [
        f"serving          {settings.name} ({kind}): {settings.slots} slots of {settings.ctx} tokens each",
        *(f"                 adapter {number}: {path}" for number, path in enumerate(settings.adapters)),
    ]
