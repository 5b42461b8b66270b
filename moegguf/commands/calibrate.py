"""`moegguf calibrate`: importance matrices from text, of a finished model or of single experts before a mix."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from moegguf.atomic import new_folder
from moegguf.commands.options import (
    add_device_arguments,
    check_range,
    check_threads,
    device_options,
    from_here,
    named_refs,
)
from moegguf.commands.progress import counted
from moegguf.errors import UserError, one_line
from moegguf.gguf_header import read_header
from moegguf.quant.imatrix import Calibration, write_calibration
from moegguf.recipe import ExpertSpec, Recipe, find_recipes_file, load_recipe, parse_recipe
from moegguf.texts import Record, read_domains

if TYPE_CHECKING:
    from moegguf.calibration import CalibrationOptions, CalibrationPlan
    from moegguf.fitting import FitOptions

HELP = """\
Run text through a model and write how much each column of each weight matters: an importance matrix, in llama.cpp's own
format. A build at few bits per weight is much closer to the original with one, and below 3 bits it needs one.

A GGUF: the matrix of that file; of a mix, each expert from the tokens that reach it. With --split also one matrix for
each expert, which any mix of it can use.
An expert's source, or a recipe: one matrix for each expert, before there is a mix. The text of its domain goes through
it, and where it runs for every token (gateless, always on) the text of all domains.

A run that was stopped goes on where it was, and more text is added to a file that is there.
"""
EXAMPLES = """\
examples:
  moegguf calibrate mix.gguf --text general=talk.txt --text math=sums.jsonl      writes imatrix.gguf
  moegguf calibrate mix.gguf --domains mymix --split experts/                     the domains of a recipe
  moegguf calibrate demo:math --text math=demo:math -o math.imatrix.gguf         an expert alone, on its own trunk
  moegguf calibrate mymix --recipes my.toml -o experts/                          all experts of a recipe
  moegguf build mymix --recipes my.toml --quant IQ2_M --imatrix imatrix.gguf

use: build --imatrix FILE, or imatrix = "FILE" in a recipe, for the whole mix or for an expert
text: .txt and .md files, .jsonl of {"text"}, {"prompt", "completion"}, {"messages"} or {"question", "answer"},
demo:DOMAIN
"""

OUTPUT, FOLDER = Path("imatrix.gguf"), Path("imatrix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .gguf file, the source of an expert, or the name of a recipe")
    parser.add_argument("--base", metavar="SOURCE", help="of an expert's source: run it on this model's trunk")
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="text of a domain; once for each file. Of a recipe, NAME is an expert, and it replaces its domain's text",
    )  # fmt: skip
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    text.add_argument("--max-tokens", type=int, metavar="N", help="tokens of each text (default: 51200)")
    text.add_argument("--chunk", type=int, metavar="N", help="tokens that run as one (default: 512, or the context)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"file to write or to extend (default: {OUTPUT}); of a recipe, a folder (default: {FOLDER})",
    )  # fmt: skip
    output.add_argument("--split", type=Path, metavar="FOLDER", help="of a mix: also write a matrix for each expert")
    output.add_argument("--fresh", action="store_true", help="begin anew where the file is there already")
    output.add_argument(
        "--process-output", action="store_true", help="calibrate output.weight too, which llama.cpp advises against"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    machine.add_argument("--pre", metavar="NAME", help="of sources: llama.cpp's name of the BPE pre-tokenizer")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    model = Path(args.model)
    if model.is_file() or model.suffix == ".gguf":
        _calibrate_file(console, args, options, model)
    elif model.is_dir() or ":" in args.model:
        _calibrate_source(console, args, options)
    else:
        _calibrate_recipe(console, args, options)
    return 0


# --- what is asked for ---


@dataclass(frozen=True)
class _Text:
    """Records of one name, and where they are from."""

    records: Sequence[Record]
    refs: Sequence[str]

    def __add__(self, other: _Text) -> _Text:
        return _Text([*self.records, *other.records], [*self.refs, *other.refs])


_Texts = Mapping[str, _Text]


def _options(args: argparse.Namespace) -> CalibrationOptions:
    from moegguf.calibration import MAX_TOKENS, CalibrationOptions

    check_range("--max-tokens", args.max_tokens, 1)
    check_threads(args.threads)
    return CalibrationOptions(
        chunk=args.chunk,
        max_tokens=args.max_tokens or MAX_TOKENS,
        fresh=args.fresh,
        output=args.process_output,
        threads=args.threads,
        offload=device_options(args),
    )


def _given_texts(args: argparse.Namespace) -> dict[str, _Text]:
    refs = named_refs("--text", args.text)
    return {name: _Text(records, refs[name]) for name, records in read_domains(refs).items()}


def _texts_of(recipe: Recipe) -> dict[str, _Text]:
    records = read_domains(recipe.domains, recipe.folder)
    return {name: _Text(records[name], refs) for name, refs in recipe.domains.items()}


def _texts(args: argparse.Namespace) -> dict[str, _Text]:
    """What is to run through one model: the domains of a recipe, and what is given besides."""
    texts = _given_texts(args)
    if args.domains is not None:
        of_recipe = _texts_of(load_recipe(args.domains, args.recipes or find_recipes_file(), {}))
        texts = {**of_recipe, **{name: of_recipe[name] + text if name in of_recipe else text
                                 for name, text in texts.items()}}  # fmt: skip
    if not texts:
        raise UserError("no text to calibrate with", "pass --text NAME=FILE, or --domains RECIPE for those of a recipe")
    return texts


def _texts_by_expert(args: argparse.Namespace, recipe: Recipe) -> dict[str, _Texts]:
    """What reaches each expert: the text of its domain, or of all domains where it runs for every token."""
    texts = _texts_of(recipe) | (given := _given_texts(args))
    if unknown := [name for name in given if name not in recipe.expert_names]:
        raise UserError(
            f"--text {unknown[0]}: no expert of recipe {recipe.name} has that name",
            f"use one of {', '.join(recipe.expert_names)}",
        )
    if missing := [name for name in recipe.expert_names if name not in texts]:
        raise UserError(
            f"recipe {recipe.name}: no text for expert {', '.join(missing)}",
            f"pass {' '.join(f'--text {name}=FILE' for name in missing)}, or name them under domains in the recipe",
        )
    router = recipe.router
    return {
        name: texts if router.is_gateless or name == router.always_on else {name: texts[name]}
        for name in recipe.expert_names
    }


def _recipe_of_source(args: argparse.Namespace) -> Recipe:
    """The recipe of a mix of nothing but this expert."""
    expert = {"name": "expert", "source": from_here(args.model)}
    table = {"base": from_here(args.base or args.model), "experts": [expert]}
    return parse_recipe("expert", table, where="command line:", folder=Path())


def _build_options(args: argparse.Namespace, folder: Path) -> FitOptions:
    from moegguf.fitting import FitOptions

    return FitOptions(threads=args.threads, folder=folder, pre=args.pre)


# --- what is done ---


def _calibrate_file(console: Console, args: argparse.Namespace, options: CalibrationOptions, model: Path) -> None:
    from moegguf.calibration import card_of_mix, experts_of, unreached

    if args.split:
        card_of_mix(read_header(model))
    plan, calibration = _calibrate(console, model, _texts(args), args.output or OUTPUT, options)
    for expert, layers in unreached(calibration, plan.header).items():
        console.print(
            f"warning: no token reached expert {one_line(expert)} in layer {', '.join(map(str, layers))}: there, what"
            " is known of the other experts stands for it; more text may reach it"
        )
    if args.split:
        with new_folder(args.split):
            for name, one in experts_of(calibration, plan.header).items():
                write_calibration(args.split / f"{name}.gguf", one)
        console.print(f"wrote {args.split}: a matrix for each expert, for any mix of it")
    console.print(f"use: moegguf build … --imatrix {plan.output}")


def _calibrate_source(console: Console, args: argparse.Namespace, options: CalibrationOptions) -> None:
    _refuse_split(args)
    texts, recipe, output = _texts(args), _recipe_of_source(args), args.output or OUTPUT
    _calibrate_expert(console, args, options, recipe, recipe.experts[0], texts, output)
    console.print(f'use: imatrix = "{output}" with this expert in a recipe')


def _calibrate_recipe(console: Console, args: argparse.Namespace, options: CalibrationOptions) -> None:
    _refuse_split(args)
    recipe = load_recipe(args.model, args.recipes or find_recipes_file(), {})
    texts, folder = _texts_by_expert(args, recipe), args.output or FOLDER
    with new_folder(folder):
        for expert in recipe.experts:
            output = folder / f"{expert.name}.gguf"
            _calibrate_expert(console, args, options, recipe, expert, texts[expert.name], output)
    console.print("use, in the recipe:")
    for name in recipe.expert_names:
        console.print(f'  {{ name = "{name}", …, imatrix = "{folder / name}.gguf" }}')


def _calibrate_expert(
    console: Console, args: argparse.Namespace, options: CalibrationOptions, recipe: Recipe, expert: ExpertSpec,
    texts: _Texts, output: Path,
) -> None:  # fmt: skip
    from moegguf.calibration import check_target, dense_expert

    check_target(output)
    with dense_expert(recipe, expert, _build_options(args, output.parent)) as model:
        _calibrate(console, model, texts, output, options)


def _calibrate(
    console: Console, model: Path, texts: _Texts, output: Path, options: CalibrationOptions
) -> tuple[CalibrationPlan, Calibration]:
    from moegguf.calibration import plan_calibration, run_calibration

    labels = [ref if ref.startswith("demo:") else Path(ref).name for text in texts.values() for ref in text.refs]
    plan = plan_calibration(
        model, {name: text.records for name, text in texts.items()}, output, options, datasets=labels
    )
    with counted("calibrating", plan.n_tokens, "tokens") as bar:
        calibration = run_calibration(plan, bar.did)
    held = ", ".join(f"{one_line(text.name)} {text.n_tokens}" for text in calibration.texts)
    if plan.n_tokens:
        console.print(f"wrote {output}: {len(calibration.squares)} weights; tokens: {held}")
    else:
        console.print(f"{output} holds all of this text already; tokens: {held}")
    return plan, calibration


def _refuse_split(args: argparse.Namespace) -> None:
    if args.split:
        raise UserError("--split: goes with a mix, what is made here is of one expert already", "leave it out")
