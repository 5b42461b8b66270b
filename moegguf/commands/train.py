"""`moegguf train`: learn a mix's router from text. Data, tokenizer and network meet here, `reference` trains.

Everything that a flag, a text or a checkpoint can be wrong in is found before weights are read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.recipe import Layout, Mixed, Recipe, RouterMode, find_recipes_file, load_recipe
from moegguf.routers.file import check_target, write_router

if TYPE_CHECKING:
    from moegguf.mix import Mix
    from moegguf.reference.examples import Example
    from moegguf.reference.train import Step, Trained
    from moegguf.texts import Record

HELP = """\
Train the router of a recipe's mix by next-token loss, everything else frozen; takes PyTorch (pip install
'moegguf[train]'). The defaults are the settings of the paper (arXiv 2408.17280).

The result is a small router file for `moegguf build --router`. Ctrl-C saves a checkpoint after the running step;
the same command with --resume goes on from there.
"""
EXAMPLES = """\
examples:
  moegguf train demo --lr 3e-3 --max-steps 250 --curve curve.png      on the recipe's own domains
  moegguf train mymix --data sums.jsonl --data talk.jsonl --variant router+o_proj
  moegguf train mymix --data 'datasets:meta-math/MetaMathQA?question=query,answer=response#50000'
  moegguf train mymix --variant pretrain --data wiki.txt --seq 1024
  moegguf train mymix --start router.safetensors --data more.jsonl    go on from a fitted or trained router

data: .jsonl of {"question", "answer"}, {"messages"}, {"prompt", "completion"} or {"text"}; .txt; demo:DOMAIN[#N];
datasets:ORG/NAME[/CONFIG][:SPLIT][?FIELD=COLUMN,…][#N] from the Hugging Face Hub (default: train, 50000 records)
"""

DEFAULT_OUTPUT = Path("router.safetensors")
DEFAULT_SEQ = 2048
VARIANTS = ("router", "router+embeddings", "router+o_proj", "pretrain")
SCHEDULES = ("constant", "linear", "cosine")
STARTS = ("noisy", "zeros")
_RANGES = {
    "k": (1, 10_000),
    "epochs": (1e-6, 1e6),
    "batch": (1, 10_000),
    "accumulate": (1, 100_000),
    "lr": (1e-9, 1.0),
    "max_steps": (1, 10**8),
    "seq": (2, 10**7),
    "balance": (0.0, 1e3),
    "seed": (0, 2**32 - 1),
    "save_steps": (1, 10**8),
    "threads": (1, 512),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a [mix.NAME] in the recipes file")
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", action="append", default=[], metavar="REF",
        help="what to train on, all of it; once for each (default: the recipe's domains, in equal parts)",
    )  # fmt: skip
    data.add_argument(
        "--seq",
        type=int,
        metavar="N",
        help=f"tokens of an example (default: the base's context, at most {DEFAULT_SEQ})",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--variant", choices=VARIANTS, default="router",
        help="the router (default), also the embeddings or the attention's output projections; or, by every token of "
        "plain text, the router (pretrain)",
    )  # fmt: skip
    what.add_argument(
        "--start", metavar="START",
        help="noisy: small white noise; zeros, with k of all experts; or FILE.safetensors "
        "(default: the recipe's router, noisy where it has none)",
    )  # fmt: skip
    what.add_argument("--k", type=int, help="experts that run for each token (default: the recipe's, or 2)")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=float, default=1, metavar="N", help="passes over the data (default: 1)")
    how.add_argument("--max-steps", type=int, metavar="N", help="steps, in place of --epochs")
    how.add_argument("--batch", type=int, default=1, metavar="N", help="examples computed together (default: 1)")
    how.add_argument(
        "--accumulate", type=int, default=16, metavar="N", help="such batches that make a step (default: 16)"
    )
    how.add_argument("--lr", type=float, default=1e-4, metavar="RATE", help="learning rate (default: 1e-4)")
    how.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of the rate (default: constant)")
    how.add_argument(
        "--balance", type=float, default=0, metavar="WEIGHT",
        help="of a term that spreads the load over the experts; the Switch Transformer's was 0.01 (default: 0, none)",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of the order of the data (default: 0)")
    how.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)"
    )
    how.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of what is frozen, and of the arithmetic (default: bfloat16 on a GPU, else float32)",
    )  # fmt: skip
    how.add_argument("--gradient-checkpointing", action="store_true", help="take less memory and more time")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice; tiny models: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE",
                        help=f"router to write (default: {DEFAULT_OUTPUT})")  # fmt: skip
    output.add_argument("--curve", type=Path, metavar="FILE.png", help="draw the loss, with its numbers in a .json")
    output.add_argument(
        "--checkpoints", type=Path, metavar="DIR",
        help="keep checkpoints here (default: beside the output, until it is written)",
    )  # fmt: skip
    output.add_argument("--save-steps", type=int, default=500, metavar="N", help="steps between them (default: 500)")
    output.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    _check_output(args)
    recipe = _recipe(args)
    _require_extra()

    from moegguf.reference.train import (
        Checkpoints,
        Schedule,
        Settings,
        Variant,
        check_start,
        check_trainable,
        choose_device,
        train,
    )

    device, dtype = choose_device(args.device, args.dtype, args.threads)

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    folder = args.checkpoints or args.output.with_name(f"{args.output.name}.checkpoints")
    checkpoints = Checkpoints(folder, args.save_steps, args.resume)
    check_start(checkpoints)
    settings = Settings(
        Variant(args.variant), args.epochs, args.batch, args.accumulate, args.lr, Schedule(args.schedule),
        args.max_steps or 0, args.balance, args.seed, args.gradient_checkpointing,
    )  # fmt: skip
    mix = _mix(args, recipe)
    check_trainable(mix.router)
    examples = _examples(args, recipe, mix, console)
    model = _model(mix, device, dtype, console)
    start = time.monotonic()
    with _no_empty_folder(folder), _stop_on_interrupt() as should_stop, _Progress() as progress:
        trained = train(model, examples, settings, checkpoints, on_step=progress.show, should_stop=should_stop)
    if args.curve:
        _write_curve(args.curve, recipe, trained)
    if trained.stopped_at:
        console.print(f"stopped; saved {trained.stopped_at}; to go on, give the same command with --resume")
        return 130
    write_router(args.output, trained.router)
    if not args.checkpoints:
        _remove_checkpoints(folder)
    _print_result(console, args, recipe, trained, time.monotonic() - start)
    return 0


# --- what is asked for ---


def _check_numbers(args: argparse.Namespace) -> None:
    faults = [
        UserError(f"--{name.replace('_', '-')} {value}: expected {low:g} to {high:g}", "see `moegguf train --help`")
        for name, (low, high) in _RANGES.items()
        if (value := getattr(args, name)) is not None and not low <= value <= high
    ]
    if faults:
        raise UserError.of(faults)


def _check_output(args: argparse.Namespace) -> None:
    """Before hours go into what cannot be written."""
    check_target(args.output)
    if args.curve and not args.curve.parent.is_dir():
        raise UserError(
            f"{args.curve.parent}: no such folder to write {args.curve.name} to", "create it, or name another"
        )
    if args.curve and args.curve.suffix != ".png":
        raise UserError(f"{args.curve}: expected a name that ends in .png", "choose another --curve")
    if args.curve and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--curve: takes matplotlib, which is not installed here", "run: pip install 'moegguf[plot]'")


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with a router to start from."""
    file = args.recipes or find_recipes_file()
    plain = load_recipe(args.recipe, file, {})
    router = _start(args.start, plain) | ({} if args.k is None else {"k": args.k})
    overrides = {"router": router} if router else {}
    if plain.router.is_gateless:
        overrides["layout"] = "auto"
    return load_recipe(args.recipe, file, overrides)


def _start(start: str | None, recipe: Recipe) -> dict[str, object]:
    """What the start changes in the table of the recipe's router."""
    if start is None:
        return {"mode": RouterMode.NOISY} if recipe.router.is_gateless else {}
    if start.endswith(".safetensors"):
        return {"file": str(Path(start).absolute())}
    if start not in STARTS:
        raise UserError(f"--start {start}: expected {', '.join(STARTS)} or FILE.safetensors", "pick one of these")
    return {"mode": RouterMode.NOISY}


def _require_extra() -> None:
    for package in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"training takes the package {package}, which is not installed here",
                "run: pip install 'moegguf[train]'",
            )


def _mix(args: argparse.Namespace, recipe: Recipe) -> Mix:
    """The mix with the router that training starts from."""
    from dataclasses import replace

    from moegguf.assembly import open_mix

    mix = open_mix(recipe, router=_fitted(recipe) if recipe.router.is_unfitted else None)
    if args.start != "zeros":
        return mix
    n_routed, always_on = len(mix.router.experts), mix.router.always_on
    if mix.router.k < n_routed + (always_on is not None):
        raise UserError(
            f"--start zeros: with k {mix.router.k} of {len(mix.experts)} experts, zeros always pick the same ones",
            f"choose --start noisy, or --k {len(mix.experts)}",
        )
    return replace(mix, router=replace(mix.router, matrices={s: 0 * m for s, m in mix.router.matrices.items()}))


def _fitted(recipe: Recipe):
    """The router of a recipe that says how to fit it."""
    from moegguf.fitting import fit_from_recipe

    return fit_from_recipe(recipe).router


# --- the data ---


def _examples(args: argparse.Namespace, recipe: Recipe, mix: Mix, console: Console) -> list[Example]:
    """What is trained on, in tokens. Raises UserError with all faults of all texts."""
    from moegguf.reference.examples import equal_parts

    n_seq = _n_seq(args.seq, mix)
    encode = encoder_of(mix, counts_all=args.variant == "pretrain")
    sets: dict[str, list[Example]] = {}
    faults: list[UserError] = []
    for name, refs, folder in _sources(args, recipe):
        try:
            sets[name] = [example for ref in refs for example in _usable(ref, folder, encode, n_seq, console)]
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    examples = [e for each in sets.values() for e in each] if args.data else equal_parts(list(sets.values()), args.seed)
    parts = ", ".join(f"{name} {len(each)}" for name, each in sets.items())
    n_tokens, n_targets = (sum(n) for n in zip(*((len(e.tokens), e.n_targets) for e in examples), strict=True))
    equal = "" if args.data else f" (equal parts of {parts})"
    console.print(f"{len(examples)} examples{equal}: {n_tokens} tokens, {n_targets} of them count")
    return examples


def _sources(args: argparse.Namespace, recipe: Recipe) -> list[tuple[str, Sequence[str], Path]]:
    """Sets of texts: name, references, and what these are relative to."""
    if args.data:
        return [(ref, (ref,), Path()) for ref in dict.fromkeys(args.data)]
    if not recipe.domains:
        raise UserError(f"recipe {recipe.name}: names no domains to train on", "pass --data, or add domains to it")
    return [(name, refs, recipe.folder) for name, refs in recipe.domains.items()]


def _n_seq(asked: int | None, mix: Mix) -> int:
    context = int(mix.base.hparam("context_length", DEFAULT_SEQ))
    if asked and asked > context:
        raise UserError(f"--seq {asked}: the base's context is {context} tokens", "choose a smaller one")
    return asked or min(context, DEFAULT_SEQ)


def encoder_of(mix: Mix, *, counts_all: bool) -> Callable[[Record], Example]:
    """Text to tokens, as the finished mix will see it."""
    import numpy as np

    from moegguf.reference.examples import Example
    from moegguf.runtime.encode import encode
    from moegguf.runtime.template import chat_template
    from moegguf.torch_engine import vocab_of

    vocab = vocab_of(mix)
    stored = mix.base.read_vocab().get("tokenizer.chat_template")
    template = chat_template(stored.value if stored else None, vocab)

    def example(record: Record) -> Example:
        encoded = encode(vocab, template, record)
        return Example(np.array(encoded.tokens, np.int32), 0 if counts_all else encoded.n_prompt, record.where)

    return example


def _usable(
    ref: str, folder: Path, encode: Callable[[Record], Example], n_seq: int, console: Console
) -> Iterable[Example]:
    """The examples of `ref`. Those with no target within `n_seq` are passed over; raises UserError if all are."""
    from moegguf.reference.examples import DATASET, fit_length, read_dataset
    from moegguf.texts import read_records

    records = read_dataset(ref) if ref.startswith(DATASET) else read_records(ref, folder)
    usable, cut = [], []
    for example in fit_length(map(encode, records), n_seq):
        (usable if example.n_targets else cut).append(example)
    if not usable:
        raise UserError(
            f"{cut[0].where}: nothing to train on is left within {n_seq} tokens, nor in the rest of {ref}",
            "pass a larger --seq, or other data",
        )
    if cut:
        console.print(
            f"note: {len(cut)} examples of {ref} have no answer within {n_seq} tokens, such as {cut[0].where}"
        )
    return usable


# --- the run ---


def _model(mix: Mix, device, dtype, console: Console):
    from moegguf.reference.model import ReferenceModel
    from moegguf.reference.train import memory_faults

    router = mix.router
    console.print(
        f"a router of {len(router.experts)} experts (k {router.k}), from {router.mode}; on {device} in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    with memory_faults():
        return ReferenceModel.from_mix(mix, dtype=dtype, device=device)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """While the block runs, a first Ctrl-C is remembered; a second one ends the program."""
    is_asked = False

    def remember(number: int, frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, previous)
        print("\nmoegguf: stopping after this step; once more to stop at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: is_asked
    finally:
        signal.signal(signal.SIGINT, previous)


class _Progress:
    """Steps and loss on stderr: a bar at a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, loss=float("nan"))

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: Step) -> None:
        self._bar.update(self._task, completed=step.step, total=step.n_steps, loss=step.smoothed)
        if self._bar.disable and step.step % max(1, step.n_steps // 10) == 0:
            print(f"step {step.step} of {step.n_steps}: loss {step.smoothed:.4f}", file=sys.stderr)


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Trainer makes its folder before there is anything to put into it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


# --- what is written ---


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_curve(path: Path, recipe: Recipe, trained: Trained) -> None:
    """The loss of every step: a picture (Figures 3 and 4 of the paper), and its numbers beside it."""
    from moegguf.measurement.plots import curves

    steps = [step.step for step in trained.steps]
    curves(
        path,
        f"training the router of {recipe.name}",
        {
            "loss": (steps, [step.loss for step in trained.steps]),
            "smoothed": (steps, [step.smoothed for step in trained.steps]),
        },
        "step",
        "loss (nats per token)",
    )
    points = [{"step": step.step, "loss": step.loss, "smoothed": step.smoothed} for step in trained.steps]
    with atomic_file(path.with_suffix(".json")) as file:
        file.write(json.dumps({"recipe": recipe.name, "steps": points}, indent=1).encode())


def _print_result(console: Console, args: argparse.Namespace, recipe: Recipe, trained: Trained, seconds: float) -> None:
    settings = trained.router.settings
    changed = ", ".join(["the router", *trained.router.trunk])
    console.print(
        f"loss {settings['loss']} in {settings['steps']} steps, {seconds:.0f} s; changed: {changed}; all else is "
        f"unchanged (SHA-256 {settings['frozen sha256'][:16]}…)"
    )
    console.print(f"wrote {args.output}; try: {_next_command(args, recipe)}")


def _next_command(args: argparse.Namespace, recipe: Recipe) -> str:
    recipes = f" --recipes {args.recipes}" if args.recipes else ""
    if recipe.mixed is not Mixed.FFN or recipe.layers is not None:
        router = f'router = "{args.output.absolute()}"'
        chat = f"moegguf chat {recipe.name}{recipes} --engine torch"
        return f"{chat} with {router} in the recipe (no GGUF holds this mix)"
    plain = load_recipe(args.recipe, args.recipes or find_recipes_file(), {})
    layout = "" if plain.layout is Layout.MIXTRAL or not plain.router.is_gateless else " --layout auto"
    return f"moegguf build {recipe.name}{recipes} --router {args.output}{layout}"
