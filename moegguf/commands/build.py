"""`moegguf build`: a recipe or flags in, one GGUF out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from moegguf.build import Built, Plan, build, plan_build, usable_cores
from moegguf.errors import UserError, one_line
from moegguf.estimate import memory_to_run
from moegguf.families import TensorName
from moegguf.mix import ATTENTION_ROLES, FFN_ROLES, Expert
from moegguf.recipe import (
    TRUNK_OF_BASE,
    TRUNK_OF_MEAN,
    Layout,
    Mixed,
    Recipe,
    find_recipes_file,
    load_recipe,
    parse_recipe,
)
from moegguf.routers import Router

HELP = "Mix fine-tunes of one model into a Mixture of Experts and write it as one quantised GGUF."
MAX_THREADS = 512
EXAMPLES = """\
examples:
  moegguf build demo                                   a recipe of models.toml
  moegguf build mymix --recipes my.toml --quant Q6_K   your own recipe file, another quant
  moegguf build --base ./base --expert math=./math --expert code=hf:org/code -o mix.gguf
  moegguf build --base ./base --expert math=lora:./math-adapter --expert code=lora:hf:org/code-adapter -o mix.gguf
  moegguf build mymix --dry-run                        sizes and memory; reads no weights

sources: a Hugging Face folder, a .gguf file, hf:org/name[@revision], lora:ADAPTER[::SOURCE], demo:NAME
"""

STREAMING_THREADS = 16
"""Reads of a streamed model wait for the network, not for a core."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", help="name of a [mix.NAME] in the recipes file; or use --base and --expert"
    )
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    mix = parser.add_argument_group("the mix (each flag overrides the recipe's key)")
    mix.add_argument("--base", metavar="SOURCE", help="model that gives everything but the experts' FFNs")
    mix.add_argument(
        "--expert", action="append", default=[], metavar="NAME=SOURCE", help="a fine-tune of the base; once for each"
    )
    mix.add_argument(
        "--weight", action="append", default=[], metavar="NAME=SHARE", help="gate-less: its share; all add up to 1"
    )
    mix.add_argument(
        "--router",
        metavar="MODE|FILE",
        help="gateless: average all experts (default); noisy: white noise picks k; ridge, hidden: fitted to --domain "
        "texts first; FILE.safetensors: one that `moegguf route fit` or `train` wrote",
    )
    mix.add_argument("--k", type=int, help="experts that run for each token, unless gateless (default: 2)")
    mix.add_argument("--std", type=float, help="noisy: standard deviation of the noise (default: 0.02)")
    mix.add_argument("--seed", type=int, help="noisy: seed of the noise (default: 0)")
    mix.add_argument("--shared-router", action="store_true", default=None, help="one router for all layers")
    mix.add_argument("--always-on", metavar="NAME", help="not gateless: an expert that runs for every token")
    mix.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="text of an expert's domain (.txt, .jsonl), which a ridge or hidden router is fitted to",
    )
    mix.add_argument(
        "--mix",
        choices=[*map(str, Mixed)],
        help="what is mixed: ffn (default), attention too, or gate, up and down each on its own",
    )
    mix.add_argument("--layers", metavar="LIST", help="gateless: mix these layers only, such as 0,4-7 (default: all)")
    mix.add_argument(
        "--trunk", metavar="WHICH", help="what is not mixed comes from: base (default), mean of all experts, or NAME"
    )
    mix.add_argument(
        "--layout",
        choices=[*map(str, Layout), "auto"],
        help="how it is stored (default: mixtral, or shared for two precisions); auto: the fastest that is exact",
    )
    output = parser.add_argument_group("the file")
    output.add_argument(
        "--quant", metavar="PRESET", help="preset of llama.cpp, such as Q4_K_M, Q8_0, F16 (default: Q4_K_M)"
    )
    output.add_argument(
        "--quant-role", action="append", default=[], metavar="ROLE=TYPE", help="type of embed, output, attn or experts"
    )
    output.add_argument(
        "--quant-tensor", action="append", default=[], metavar="REGEX=TYPE", help="type of the tensors that match"
    )
    output.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix of llama-imatrix (GGUF); presets below 3 bits need one"
    )
    output.add_argument("-o", "--output", metavar="FILE", help="file to write (default: NAME-QUANT.gguf here)")
    output.add_argument("--force", action="store_true", help="replace the output file if it exists")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dry-run", action="store_true", help="show the plan and its sizes; read no weights, write nothing"
    )
    how.add_argument(
        "--stream", action="store_true", help="read Hub models by range; keep nothing of them on this disk"
    )
    how.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the BPE pre-tokenizer, where it is not recognised"
    )
    how.add_argument("--threads", type=int, metavar="N", help="threads that quantise (default: all usable cores)")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise UserError(f"--threads {args.threads}: expected 1 to {MAX_THREADS}", "leave it out to use all cores")
    recipe = _recipe(args)
    stream = args.stream or args.dry_run  # a dry run downloads no weights
    console = Console(markup=False)
    plan = plan_build(recipe, stream=stream, pre=args.pre, overwrite=args.force)
    if recipe.router.is_unfitted and not args.dry_run:  # everything else that can be wrong is known by now
        router = _fitted(console, recipe, args)
        plan = plan_build(recipe, router=router, stream=stream, pre=args.pre, overwrite=args.force)
    console.print(_plan_table(plan))
    _print_notes(console, plan)
    if args.dry_run:
        console.print("dry run: nothing was written")
        return 0
    threads = args.threads or max(usable_cores(), STREAMING_THREADS if args.stream else 1)
    built = _build_with_progress(plan, threads)
    _print_built(console, built)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    overrides = _overrides(args)
    if args.recipe is not None:
        return load_recipe(args.recipe, args.recipes or find_recipes_file(), overrides)
    if args.base is None and not args.expert:
        raise UserError("nothing to build", "name a recipe (see `moegguf recipes`), or give --base and --expert")
    name = Path(args.output).stem if args.output else "mix"
    return parse_recipe(name, overrides, where="command line:", folder=Path())


def _fitted(console: Console, recipe: Recipe, args: argparse.Namespace) -> Router:
    """The router of a recipe that says how to fit it, fitted on the base alone before there is a mix."""
    from moegguf.fitting import FitOptions, FitPlan, fit_from_recipe

    options = FitOptions(threads=args.threads, pre=args.pre, stream=args.stream)
    with _bar("fitting the router", MofNCompleteColumn(), TextColumn("tokens")) as bar:
        task = bar.add_task("", total=None)

        def on_plan(plan: FitPlan) -> None:
            bar.update(task, total=plan.n_tokens)

        fitted = fit_from_recipe(recipe, options, on_plan=on_plan, progress=lambda n: bar.advance(task, n))
    for warning in fitted.warnings:
        console.print(f"warning: {one_line(warning)}", highlight=False)
    return fitted.router


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    """The recipe table that the flags stand for."""
    flags = {
        "base": _from_here(args.base),
        "experts": _experts(args),
        "mix": args.mix,
        "layers": args.layers and args.layers.split(","),
        "trunk": args.trunk,
        "router": _router(args),
        "domains": _domains(args),
        "always_on": args.always_on,
        "layout": args.layout,
        "quant": _quant(args),
        "imatrix": _from_here(args.imatrix),
        "output": args.output,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _from_here(ref: str | None) -> str | None:
    """A path on the command line is relative to the working directory, whatever recipe it goes into."""
    path = Path(os.path.expanduser(ref or ""))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    return str(path.absolute()) if ref and path.exists() else ref


def _experts(args: argparse.Namespace) -> list[dict] | None:
    if not args.expert:
        if args.weight:
            raise UserError("--weight goes with --expert", "write the weights into the recipe instead")
        return None
    sources = _pairs("--expert", args.expert, "NAME=SOURCE")
    weights = dict(_pairs("--weight", args.weight, "NAME=SHARE"))
    names = [name for name, _ in sources]
    if unknown := [name for name in weights if name not in names]:
        raise UserError(f"--weight {unknown[0]}: no expert has that name", f"use one of {', '.join(names)}")
    return [
        {"name": name, "source": _from_here(source)}
        | ({"weight": _number("--weight", weights[name])} if name in weights else {})
        for name, source in sources
    ]


def _router(args: argparse.Namespace) -> dict | None:
    is_file = args.router and args.router.endswith(".safetensors")
    router = {"file": _from_here(args.router)} if is_file else {"mode": args.router}
    keys = {**router, "k": args.k, "std": args.std, "seed": args.seed, "shared": args.shared_router}
    return {key: value for key, value in keys.items() if value is not None} or None


def _domains(args: argparse.Namespace) -> dict[str, list[str]] | None:
    domains: dict[str, list[str]] = {}
    for name, ref in _pairs("--domain", args.domain, "NAME=TEXT"):
        domains.setdefault(name, []).append(_from_here(ref))
    return domains or None


def _quant(args: argparse.Namespace) -> dict | str | None:
    roles = dict(_pairs("--quant-role", args.quant_role, "ROLE=TYPE"))
    tensors = dict(_pairs("--quant-tensor", args.quant_tensor, "REGEX=TYPE"))
    if not roles and not tensors:
        return args.quant
    return ({"preset": args.quant} if args.quant else {}) | roles | ({"tensors": tensors} if tensors else {})


def _pairs(flag: str, values: list[str], form: str) -> list[tuple[str, str]]:
    pairs = [value.partition("=")[::2] if flag != "--quant-tensor" else tuple(value.rsplit("=", 1)) for value in values]
    if wrong := [value for value, pair in zip(values, pairs, strict=True) if len(pair) != 2 or not all(pair)]:
        raise UserError(f"{flag} {wrong[0]}: expected {form}", f"for example {flag} {_EXAMPLE[flag]}")
    return pairs


_EXAMPLE = {
    "--expert": "math=./math-model",
    "--weight": "math=0.5",
    "--domain": "math=sums.jsonl",
    "--quant-role": "attn=Q8_0",
    "--quant-tensor": "'blk\\.0\\..*=Q6_K'",
}


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} {text}: is no number", "write it like 0.25") from None


def _plan_table(plan: Plan) -> Table:
    recipe, mix = plan.recipe, plan.mix
    columns = Column(no_wrap=True), Column(overflow="fold")
    table = Table(
        *columns, title=f"mix {recipe.name}", title_justify="left", show_header=False, box=None, pad_edge=False
    )
    table.add_row("base", mix.base.label)
    for expert in mix.experts:
        share = f"  weight {expert.weight:.3g}" if plan.card.is_gateless else ""
        table.add_row(f"expert {expert.name}", f"{expert.source.label}  {expert.spec.quant}{share}")
    table.add_row("router", plan.card.describe_router())
    if recipe.mixed is not Mixed.FFN or recipe.layers is not None:
        table.add_row("mixed", f"{recipe.mixed} in {len(mix.layers)} of {mix.n_layer} layers")
    if recipe.trunk != TRUNK_OF_BASE:
        table.add_row("trunk", "the mean of all experts" if recipe.trunk == TRUNK_OF_MEAN else recipe.trunk)
    table.add_row("layout", f"{recipe.layout} (architecture {plan.form.arch})")
    table.add_row("quant", f"{recipe.quant.preset}, {plan.bits_per_weight:.2f} bits per weight")
    table.add_row("size", f"{_size(plan.n_bytes)}, {plan.n_weights / 1e6:.1f} M weights, {len(plan.planned)} tensors")
    memory = memory_to_run(plan)
    table.add_row("to run", f"about {_size(memory.total)} of memory with a context of {memory.n_ctx} tokens")
    table.add_row("output", str(plan.path))
    return table


def _print_notes(console: Console, plan: Plan) -> None:
    recipe = plan.recipe
    if plan.card.is_gateless and recipe.layout is Layout.MIXTRAL and len(recipe.experts) > 1:
        console.print(
            "note: --layout fused gives the same numbers from one dense FFN: prompts run some 1.5 to 1.8 times as fast "
            "on a CPU (scripts/bench_run.py), but experts can no longer be told apart, routed or swapped",
            highlight=False,
        )
    for expert in plan.mix.experts:
        if unused := _unused_targets(plan, expert):
            console.print(
                f"note: the adapter of {expert.name} also changes {', '.join(unused)}, which this mix takes from its "
                "trunk; a gate-less mix with --mix ffn+attention averages the attention of all experts",
                highlight=False,
            )
    requantised = {part.tensor.type.name for t in plan.planned for part in t.slot.parts
                   if part.tensor.is_quantised and part.tensor.type != t.type}  # fmt: skip
    if requantised:
        console.print(
            f"note: some sources are quantised already ({', '.join(sorted(requantised))}) and are quantised again, "
            "which costs quality; sources in bf16 or f16 avoid that",
            highlight=False,
        )


def _unused_targets(plan: Plan, expert: Expert) -> list[str]:
    """What an adapter changes and the mix does not take from it, as roles such as attn_q."""
    lora = expert.source.lora
    mixed = {*FFN_ROLES, *(ATTENTION_ROLES if plan.recipe.mixed.attention else ())}
    if lora is None or plan.recipe.trunk in (TRUNK_OF_MEAN, expert.name):
        return []
    return sorted({TensorName.parse(name).role for name in lora.deltas} - mixed)


def _build_with_progress(plan: Plan, threads: int) -> Built:
    total = sum(tensor.nbytes for tensor in plan.planned)
    with _bar("writing", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        return build(plan, threads=threads, progress=lambda n_bytes: bar.advance(task, n_bytes))


def _bar(what: str, *columns: ProgressColumn) -> Progress:
    """A progress bar on stderr; none in a pipe."""
    console = Console(stderr=True)
    return Progress(
        TextColumn(what), BarColumn(), *columns, console=console, disable=not sys.stderr.isatty(), transient=True
    )


def _print_built(console: Console, built: Built) -> None:
    cost = built.requantised
    if cost.n_weights:
        types = ", ".join(f"{source} → {target}" for source, target in sorted(cost.types))
        console.print(
            f"requantised {cost.n_weights / 1e6:.1f} M weights ({types}): relative error {cost.relative_error:.2%}",
            highlight=False,
        )
    console.print(
        f"wrote {built.plan.path} ({_size(built.n_bytes)}) in {built.seconds:.2f} s; "
        f"try: moegguf chat {built.plan.path}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"
