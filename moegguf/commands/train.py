"""`moegguf train`: learn a mix's router from text."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from moegguf.commands.options import add_json, add_recipes, print_json
from moegguf.commands.output import console, in_shell
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.jobs.training import (
    CHOICES,
    DEFAULT_OUTPUT,
    DEFAULT_SEQ,
    TrainFiles,
    Training,
    TrainingPlan,
    TrainOptions,
    plan_training,
    run_training,
)
from moegguf.recipe import Layout, Mixed, Recipe, load_recipe
from moegguf.watch import Step

HELP = """\
Train the router of a recipe's mix by next-token loss, everything else frozen; takes PyTorch (pip install
'moegguf[train]'). The defaults are the settings of the paper (arXiv 2408.17280).

The result is a small router file for `moegguf build --router`. Ctrl-C saves a checkpoint after the running step;
the same command with --resume goes on from there.
"""
EXAMPLES = """\
examples:
  moegguf train demo --lr 3e-3 --max-steps 250 --curve curve.png      on the recipe's own domains
  moegguf train mymix --data sums.jsonl talk.jsonl --variant router+o_proj
  moegguf train mymix --data 'datasets:meta-math/MetaMathQA?question=query,answer=response#50000'
  moegguf train mymix --variant pretrain --data wiki.txt --seq 1024
  moegguf train mymix --start router.safetensors --data more.jsonl    go on from a fitted or trained router

data: .jsonl of {"question", "answer"}, {"messages"}, {"prompt", "completion"} or {"text"}; .txt; demo:DOMAIN[#N];
datasets:ORG/NAME[/CONFIG][:SPLIT][?FIELD=COLUMN,…][#N] from the Hugging Face Hub (default: train, 50000 records)
"""

_DEFAULTS = TrainOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a [mix.NAME] in the recipes file")
    add_recipes(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="REF",
        help="what to train on, all of it (default: the recipe's domains, in equal parts)",
    )  # fmt: skip
    data.add_argument(
        "--seq",
        type=int,
        metavar="N",
        help=f"tokens of an example (default: the base's context, at most {DEFAULT_SEQ})",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--variant", choices=CHOICES["variant"], default=_DEFAULTS.variant,
        help="the router (default), also the embeddings or the attention's output projections; or, by every token of "
        "plain text, the router (pretrain)",
    )  # fmt: skip
    what.add_argument(
        "--start", metavar="START",
        help="noisy: small white noise; zeros, with k of all experts; or FILE.safetensors "
        "(default: the recipe's router, noisy where it has none)",
    )  # fmt: skip
    what.add_argument(
        "--k", type=int, metavar="N", help="experts that run for each token (default: the recipe's, or 2)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--epochs", type=float, default=_DEFAULTS.epochs, metavar="N", help="passes over the data (default: 1)"
    )
    how.add_argument("--max-steps", type=int, metavar="N", help="steps, in place of --epochs")
    how.add_argument(
        "--batch", type=int, default=_DEFAULTS.batch, metavar="N", help="examples computed together (default: 1)"
    )
    how.add_argument(
        "--accumulate", type=int, default=_DEFAULTS.accumulate, metavar="N",
        help="such batches that make a step (default: 16)",
    )  # fmt: skip
    how.add_argument("--lr", type=float, default=_DEFAULTS.lr, metavar="RATE", help="learning rate (default: 1e-4)")
    how.add_argument(
        "--schedule", choices=CHOICES["schedule"], default=_DEFAULTS.schedule, help="of the rate (default: constant)"
    )
    how.add_argument(
        "--balance", type=float, default=_DEFAULTS.balance, metavar="WEIGHT",
        help="of a term that spreads the load over the experts; the Switch Transformer's was 0.01 (default: 0, none)",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="of the order of the data (default: 0)")
    how.add_argument(
        "--device", choices=CHOICES["device"], default=_DEFAULTS.device, help="(default: a GPU if there is one)"
    )
    how.add_argument(
        "--dtype", choices=CHOICES["dtype"], default=_DEFAULTS.dtype,
        help="of what is frozen, and of the arithmetic (default: bfloat16 on a GPU, else float32)",
    )  # fmt: skip
    how.add_argument("--gradient-checkpointing", action="store_true", help="take less memory and more time")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice; tiny models: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE",
                        help=f"router to write (default: {DEFAULT_OUTPUT})")  # fmt: skip
    output.add_argument(
        "--curve", type=Path, metavar="FILE", help="draw the loss (.png, .svg, .pdf), with its numbers in a .json"
    )
    output.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER",
        help="keep checkpoints here (default: beside the output, until it is written)",
    )  # fmt: skip
    output.add_argument(
        "--save-steps", type=int, default=_DEFAULTS.save_steps, metavar="N", help="steps between them (default: 500)"
    )
    output.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    output.add_argument("--force", action="store_true", help="replace the router, and the curve, if they exist")
    add_json(output)


def run(args: argparse.Namespace) -> int:
    options = TrainOptions(**{each.name: getattr(args, each.name) for each in fields(TrainOptions)})
    files = TrainFiles(args.output, args.curve, args.checkpoints, args.resume, args.force)
    plan = plan_training(args.recipe, args.data, options, files, recipes=args.recipes)
    out = console(args)
    _print_plan(out, plan)
    with _stop_on_interrupt() as should_stop:
        trained = run_training(plan, _told, should_stop)
    if args.json:
        print_json(trained.as_json())
    else:
        _print_outcome(out, args, trained)
    return 130 if trained.stopped_at else 0


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


# --- what is shown ---


class _Lines:
    """Steps as lines on stderr: ten of them in all."""

    def __init__(self) -> None:
        self._n_steps = self._n_done = 0

    def has(self, n_parts: int) -> None:
        self._n_steps = n_parts

    def did(self, n_parts: int) -> None:
        self._n_done += n_parts

    def says(self, what: str) -> None:
        if self._n_done % max(1, self._n_steps // 10) == 0:
            print(f"step {self._n_done} of {self._n_steps}: {what}", file=sys.stderr)


@contextlib.contextmanager
def _told(what: str, unit: str) -> Iterator[Step]:
    """A bar at a terminal, else a line now and then: hours may go by."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with shown(what, unit) as bar:
        yield bar


def _print_plan(out: Console, plan: TrainingPlan) -> None:
    for note in plan.notes:
        out.print(f"note: {one_line(note)}")
    parts = ", ".join(f"{name} {n}" for name, n in plan.parts.items())
    equal = f" (equal parts of {one_line(parts)})" if parts else ""
    out.print(f"{len(plan.examples)} examples{equal}: {plan.n_tokens} tokens, {plan.n_targets} of them count")
    router = plan.mix.router
    out.print(
        f"a router of {len(router.experts)} experts (k {router.k}), from {router.mode}; on {plan.place.device} in "
        f"{plan.place.type_name}"
    )


def _print_outcome(out: Console, args: argparse.Namespace, trained: Training) -> None:
    if trained.stopped_at:
        out.print(f"stopped; saved {trained.stopped_at}; to go on, give the same command with --resume")
        return
    settings = trained.router.settings
    changed = ", ".join(["the router", *trained.router.trunk])
    out.print(
        f"loss {settings['loss']} in {settings['steps']} steps, {trained.seconds:.0f} s; changed: {changed}; all else "
        f"is unchanged (SHA-256 {settings['frozen sha256'][:16]}…)"
    )
    out.print(f"wrote {args.output}; try: {_next_command(args, trained.plan.recipe)}")


def _next_command(args: argparse.Namespace, recipe: Recipe) -> str:
    recipes = f" --recipes {in_shell(args.recipes)}" if args.recipes else ""
    if recipe.mixed is not Mixed.FFN or recipe.layers is not None:
        router = f'router = "{args.output.absolute()}"'
        chat = f"moegguf chat {recipe.name}{recipes} --engine torch"
        return f"{chat} with {router} in the recipe (no GGUF holds this mix)"
    plain = load_recipe(args.recipe, args.recipes)
    layout = "" if plain.layout is Layout.MIXTRAL or not plain.router.is_gateless else " --layout auto"
    return f"moegguf build {recipe.name}{recipes} --router {in_shell(args.output)}{layout}"
