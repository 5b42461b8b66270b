"""`moegguf chat`: talk to a GGUF in the terminal, or ask it one question in a pipe.

With `--engine torch` it is a recipe instead of a file, computed by the reference in PyTorch: mixes that no GGUF holds
can be talked to as well.

At a terminal: a header that says what the file is, then questions and streamed answers; a line that starts with
`/` is a command. Ctrl-C stops an answer, Ctrl-D leaves. With `--prompt`, or with something else than a terminal
on stdin, stdout gets the answer and nothing but the answer. What a model or a file says is stripped of control
characters before it reaches a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegguf.commands.options import add_device_arguments, add_experts_used, add_memory_arguments, run_options
from moegguf.errors import UserError
from moegguf.interrupt import Terminated
from moegguf.runtime.sampling import DEFAULTS, SETTINGS, suggested_by_file

if TYPE_CHECKING:
    from moegguf.runtime.chat import Conversation, Engine, Stats
    from moegguf.runtime.model import Model
    from moegguf.runtime.run_options import RunOptions

HELP = "Talk to a mix, or to any GGUF that llama.cpp runs."
EXAMPLES = """\
examples:
  moegguf chat mix.gguf                                    at the terminal; /help there lists the commands
  moegguf chat mix.gguf --prompt "What is 6 times 7?"      one answer on stdout
  git diff | moegguf chat mix.gguf --system "Review this." a prompt from a pipe
  moegguf chat mix.gguf --temp 0                           the likeliest words, the same each time
  moegguf chat mix.gguf --rpc 127.0.0.1:50052              with the devices that `moegguf worker` lends there
  moegguf chat mymix --engine torch --recipes my.toml      a recipe that no GGUF holds, in PyTorch
"""

_END_NOTES = {
    "context": "the context is full, so the answer is cut short: a larger --ctx gives it room",
    "length": "stopped at max_tokens",
    "interrupted": "stopped; what was said stays in the history",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, help="the GGUF file (first part of a split one); for --engine torch a recipe"
    )
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="answer this one prompt on stdout and leave; - reads it from stdin"
    )
    parser.add_argument("--stats", action="store_true", help="with --prompt: tokens and speed, on stderr")
    parser.add_argument("-s", "--system", metavar="TEXT", default="", help="how the model is to behave, in words")

    parser.add_argument(
        "--engine",
        choices=tuple(_OPENERS),
        default="llama",
        help="torch: compute a recipe in PyTorch, from its sources, even one that no GGUF holds (default: llama)",
    )
    parser.add_argument(
        "--recipes", type=Path, metavar="FILE", help="for --engine torch: recipes file (default: moegguf's models.toml)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--ctx", type=int, metavar="N",
        help="tokens that history and answer may take (default: the model's own, at most 4096)",
    )  # fmt: skip
    machine.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: physical cores; more is rarely faster)"
    )
    add_experts_used(machine)
    machine.add_argument(
        "--adapter", metavar="FILE", type=Path, help="run with this LoRA GGUF, say a router from `moegguf route export`"
    )
    machine.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log on stderr")
    add_device_arguments(parser)
    add_memory_arguments(parser)

    sampling = parser.add_argument_group(
        "sampling", "Defaults come from the file's general.sampling.* keys where it has them."
    )
    for setting in SETTINGS.values():
        default = getattr(DEFAULTS, setting.name)
        shown = "" if default is None else f" (default: {default})"
        sampling.add_argument(setting.flag, metavar="X", help=setting.help + shown)


def run(args: argparse.Namespace) -> int:
    """Chat, or answer one prompt. Raises UserError; KeyboardInterrupt leaves through it where no chat is going on."""
    prompt = _prompt(args.prompt)

    from moegguf.runtime.chat import Conversation

    with _OPENERS[args.engine](args) as opened:
        sampling = suggested_by_file(opened.value).merged(vars(args))
        conversation = Conversation(opened.engine, system=args.system, sampling=sampling)
        if prompt is None:
            if args.rpc:
                _press_twice_to_leave()
            _Session(conversation, opened.about).run()
        else:
            _answer_once(conversation, prompt, show_stats=args.stats)
    return 0


@dataclass(frozen=True)
class _Opened:
    """A model to talk to: `value` gives that of a metadata key or None, `about` says what it is."""

    engine: Engine
    value: Callable[[str], Any]
    about: list[str]


@contextlib.contextmanager
def _open_gguf(args: argparse.Namespace) -> Iterator[_Opened]:
    if args.recipes:
        raise UserError("--recipes is for --engine torch only", "leave it out")
    options = _run_options(args)
    _warn_without_gpu(options)

    from moegguf.runtime.model import open_model

    with open_model(args.model, options) as model:
        yield _Opened(model, model.header.get, _what_it_is(model))


@contextlib.contextmanager
def _open_recipe(args: argparse.Namespace) -> Iterator[_Opened]:
    from moegguf.jobs.torch_engine import open_checked, open_engine
    from moegguf.recipe import load_recipe
    from moegguf.runtime.run_options import RunOptions

    options = _run_options(args)
    if options != RunOptions(ctx=options.ctx, threads=options.threads):
        raise UserError("--engine torch takes only --ctx and --threads of the machine flags", "leave the others out")
    recipe = load_recipe(str(args.model), args.recipes)
    mix = open_checked(recipe)
    engine = open_engine(recipe, mix, ctx=options.ctx, threads=options.threads)
    metadata = {key: value.value for key, value in mix.base.metadata.items()}
    about = [
        f"{recipe.name}: {len(mix.experts)} experts ({', '.join(recipe.expert_names)}) on {mix.base.label}",
        f"router {mix.router.mode}, mix {mix.mixed}, computed in PyTorch, context {engine.n_ctx} tokens",
    ]
    yield _Opened(engine, metadata.get, about)


_OPENERS = {"llama": _open_gguf, "torch": _open_recipe}


def _prompt(flag: str | None) -> str | None:
    """The one prompt to answer; None to chat. Raises UserError when it is empty or no text."""
    if flag is None and sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read() if flag in (None, "-") else flag
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not valid UTF-8 text ({error.reason})", "convert it to UTF-8") from error
    if not text.strip():
        where = "stdin" if flag in (None, "-") else "--prompt"
        raise UserError(f"the prompt is empty ({where})", "say something, or leave --prompt out to chat at a terminal")
    return text


def _run_options(args: argparse.Namespace) -> RunOptions:
    return replace(run_options(args), ctx=args.ctx, adapter=args.adapter, verbose=args.verbose)


def _press_twice_to_leave() -> None:
    """A session is worth more than one answer: Ctrl-C does not end it because a worker is slow to stop."""
    from moegguf.runtime.lost import leave_at_second_press

    leave_at_second_press(lambda text: print(f"\n{text}", file=sys.stderr))


def _warn_without_gpu(options: RunOptions) -> None:
    from moegguf.runtime.machine import has_gpu

    if options.offload.layers and not (options.offload.workers or has_gpu()):
        print("--gpu-layers has no effect: llama.cpp sees no GPU here; `moegguf doctor` says more", file=sys.stderr)


# --- one prompt ---


def _answer_once(conversation: Conversation, prompt: str, *, show_stats: bool) -> None:
    if not conversation.has_template:
        print("no chat template in this file: it continues the prompt as plain text", file=sys.stderr)
    _stream(conversation, prompt)
    if conversation.stats.end == "context":
        print(_END_NOTES["context"], file=sys.stderr)
    if show_stats:
        print("\n".join(_stats_lines(conversation.stats)), file=sys.stderr)


def _stream(conversation: Conversation, question: str) -> None:
    """Print the answer as it comes."""
    show = _visible if sys.stdout.isatty() else str
    with contextlib.closing(conversation.answer(question)) as pieces:
        for piece in pieces:
            print(show(piece), end="", flush=True)
    print(flush=True)


def _stats_lines(stats: Stats) -> list[str]:
    fresh = stats.prompt_tokens - stats.cached_tokens
    return [
        f"prompt      {stats.prompt_tokens} tokens ({fresh} new at {stats.prompt_tokens_per_s:.1f} tok/s)",
        f"first token {stats.seconds_to_first_token:.3f} s",
        f"answer      {stats.generated_tokens} tokens at {stats.generated_tokens_per_s:.1f} tok/s, end: {stats.end}",
        f"context     {stats.ctx_used} of {stats.ctx} tokens",
    ]


def _visible(text: str) -> str:
    """`text` without what could steer a terminal: control characters other than line breaks and tabs."""
    return text.translate(_CONTROL_CHARACTERS)


_CONTROL_CHARACTERS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


# --- a session ---


@dataclass(frozen=True)
class _Command:
    usage: str
    help: str
    run: Callable[[_Session, str], None]


class _Session:
    """The loop at the terminal: read a question or a command, answer, say what it took."""

    def __init__(self, conversation: Conversation, about: list[str]) -> None:
        from rich.console import Console

        self._conversation = conversation
        self._about = about
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._hidden_before = 0
        self._known: set[Path] = set()  # files of this conversation, that /save may replace

    def run(self) -> None:
        """Talk until Ctrl-D or /exit."""
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  input() then edits lines and recalls earlier ones
        sys.stdin.reconfigure(errors="replace")
        self._header()
        with contextlib.suppress(EOFError):
            while True:
                try:
                    self._exchange()
                except UserError as error:
                    self._note(str(error))
                except Terminated:
                    raise
                except KeyboardInterrupt:
                    self._console.print()
                    self._note("Ctrl-D leaves, /help helps")
        self._console.print()

    def _exchange(self) -> None:
        line = input("> ")
        if line.startswith("/"):
            self._command(line)
        elif (question := _rest_of_question(line)).strip():
            self._answer(question)

    def _answer(self, question: str) -> None:
        try:
            _stream(self._conversation, question)
        except Terminated:
            raise
        except KeyboardInterrupt:
            self._console.print()
        stats = self._conversation.stats
        if stats is None:
            return
        if stats.end in _END_NOTES:
            self._note(_END_NOTES[stats.end])
        if stats.turns_hidden > self._hidden_before:
            self._note(f"the context is full: the model no longer sees the oldest {stats.turns_hidden} turns")
        self._hidden_before = stats.turns_hidden
        if self._console.is_terminal:
            self._note(
                f"{stats.generated_tokens} tokens, {stats.generated_tokens_per_s:.1f} tok/s, first after"
                f" {stats.seconds_to_first_token:.2f} s, context {stats.ctx_used}/{stats.ctx}"
            )

    def _header(self) -> None:
        if self._console.is_terminal:
            self._console.rule(_visible(self._conversation.model.name))
        for line in self._about:
            self._console.print(_visible(line), soft_wrap=True)
        if not self._conversation.has_template:
            self._note("no chat template in this file: it continues your text instead of answering it")
        self._note("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves")

    def _note(self, text: str) -> None:
        self._console.print(_visible(text), style="dim", soft_wrap=True)

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name not in _COMMANDS:
            raise UserError(f"there is no command {name}", "/help lists them; with a blank in front it is a question")
        _COMMANDS[name].run(self, argument.strip())

    def help(self, _: str) -> None:
        for command in _COMMANDS.values():
            self._console.print(f"{command.usage:<20} {command.help}", soft_wrap=True)
        self._console.print(
            f'{"several lines":<20} end each but the last with \\, or put them between lines of """', soft_wrap=True
        )

    def reset(self, _: str) -> None:
        self._conversation.reset()
        self._note("forgotten")

    def system(self, text: str) -> None:
        if text:
            self._conversation.system = "" if text == "-" else text
        self._note(f"system: {self._conversation.system or '(none)'}")

    def set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            self._conversation.sampling = self._conversation.sampling.with_text(name, value.strip())
        for name, value in asdict(self._conversation.sampling).items():
            shown = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            self._console.print(f"{name:<15} {shown:<10} {SETTINGS[name].help}", soft_wrap=True)

    def stats(self, _: str) -> None:
        stats = self._conversation.stats
        for line in _stats_lines(stats) if stats else ["nothing has been answered yet"]:
            self._console.print(line)

    def save(self, argument: str) -> None:
        from moegguf.runtime.chat import save

        path = _path(argument)
        if path.exists() and path not in self._known:
            raise UserError(f"{path}: exists already", "name another file")
        save(self._conversation, path)
        self._known.add(path)
        self._note(f"saved {len(self._conversation.turns)} turns to {path}")

    def load(self, argument: str) -> None:
        from moegguf.runtime.chat import load

        path = _path(argument)
        load(self._conversation, path)
        self._known.add(path)
        self._note(f"loaded {len(self._conversation.turns)} turns from {path}")

    def exit(self, _: str) -> None:
        raise EOFError


_COMMANDS = {
    "/help": _Command("/help", "this list", _Session.help),
    "/reset": _Command("/reset", "forget the conversation; system text and settings stay", _Session.reset),
    "/system": _Command("/system [TEXT]", "say how to behave, from the next answer on; - for none", _Session.system),
    "/set": _Command("/set [NAME VALUE]", "change a sampling setting; alone, list them", _Session.set),
    "/stats": _Command("/stats", "what the last answer took", _Session.stats),
    "/save": _Command("/save FILE", "write the conversation to a new .json or .md file", _Session.save),
    "/load": _Command("/load FILE", "go on with a conversation saved as .json", _Session.load),
    "/exit": _Command("/exit", "leave, as Ctrl-D does", _Session.exit),
}


def _rest_of_question(line: str) -> str:
    """The question that begins with `line`, read on where it says so. Raises EOFError at Ctrl-D."""
    if line.strip() == '"""':
        return "\n".join(iter(lambda: input(". "), '"""'))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def _path(argument: str) -> Path:
    if not argument:
        raise UserError("which file?", "name it after the command")
    return Path(argument).expanduser()


def _what_it_is(model: Model) -> list[str]:
    return [*_who_it_is(model), *([model.placement.in_words()] if model.placement.n_gpu_layers else [])]


def _who_it_is(model: Model) -> list[str]:
    arch = model.header.get("general.architecture")
    if model.card is None:
        return [f"not a mix: running it as a plain model ({arch}, {model.header.get('general.name', 'unnamed')})"]
    card = model.card
    names = ", ".join(expert.name for expert in card.experts)
    return [
        f"{card.name}: {len(card.experts)} experts ({names}) on {card.base}",
        f"router {card.router}, layout {card.layout}, context {model.n_ctx} tokens",
    ]
