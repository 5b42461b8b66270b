"""`moegguf build`: a recipe or flags in, one GGUF out."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Column, Table

from moegguf.allocation import Allocation
from moegguf.assembly import Built
from moegguf.checks import check_threads
from moegguf.commands.options import add_json, add_recipes, named_refs, pairs, print_json
from moegguf.commands.output import console, describe_requantised, facts, in_shell
from moegguf.commands.progress import shown
from moegguf.errors import UserError, one_line
from moegguf.estimate import Fit, parse_fit, with_budget_of
from moegguf.jobs.build_report import BuildReport, counted, describe, finish, has_precisions, shares
from moegguf.jobs.preparation import BuildOptions, prepare
from moegguf.recipe import (
    TRUNK_OF_BASE,
    Layout,
    Mixed,
    Recipe,
    Rounding,
    Splitting,
    load_recipe,
    parse_recipe,
)
from moegguf.sizes import show_size
from moegguf.texts import from_here

HELP = "Mix fine-tunes of one model into a Mixture of Experts and write it as one quantised GGUF."
EXAMPLES = """\
examples:
  moegguf build demo                                   a recipe of models.toml
  moegguf build mymix --recipes my.toml --quant Q6_K   your own recipe file, another quant
  moegguf build --base ./base --expert math=./math --expert code=hf:org/code -o mix.gguf
  moegguf build --base ./base --expert math=lora:./math-adapter --expert code=lora:hf:org/code-adapter -o mix.gguf
  moegguf build demo --compact 1.5x                    merged until it is 1.5 times one model; says what that costs
  moegguf build mymix --dry-run                        sizes and memory; reads no weights

sources: a Hugging Face folder, a .gguf file, hf:org/name[@revision], lora:ADAPTER[::SOURCE], demo:NAME,
ollama:NAME[:TAG], lmstudio:PUBLISHER/MODEL[/FILE]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", help="name of a [mix.NAME] in the recipes file; or use --base and --expert"
    )
    add_recipes(parser)
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
    mix.add_argument("--k", type=int, metavar="N", help="experts that run for each token, unless gateless (default: 2)")
    mix.add_argument("--std", type=float, help="noisy: standard deviation of the noise (default: 0.02)")
    mix.add_argument("--seed", type=int, help="noisy: seed of the noise (default: 0)")
    mix.add_argument("--shared-router", action="store_true", default=None, help="one router for all layers")
    mix.add_argument("--always-on", metavar="NAME", help="not gateless: an expert that runs for every token")
    mix.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="text of an expert's domain (.txt, .jsonl): ridge and hidden routers are fitted, merges judged by it",
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
        "--compact",
        metavar="SIZE|kld=MAX",
        help="gateless: merge neurons whose copies are alike, to 1.5x one model's FFNs, or as far as a KLD of MAX from "
        "the whole mix, measured on --domain texts, allows",
    )
    mix.add_argument(
        "--layout",
        choices=[*map(str, Layout), "auto"],
        help="how it is stored (default: mixtral, or shared for two precisions); auto: the fastest that is exact, and "
        "with a budget see --split",
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
        "--budget", metavar="SIZE", help="size of the file, such as 12GB: the type of every tensor is chosen to fit"
    )
    output.add_argument("--bpw", type=float, help="likewise, as bits per weight on average, such as 4.25")
    output.add_argument(
        "--fit", metavar="RAM=SIZE[,VRAM=SIZE]", help="likewise, so that file, KV cache and buffers fit into memory"
    )
    output.add_argument("--ctx", type=int, metavar="N", help="--fit: context in tokens (default: 4096)")
    output.add_argument(
        "--split",
        choices=[*map(str, Splitting)],
        help="gateless, with a budget and an imatrix: some neurons, or experts, of each layer have finer types than "
        "the others (default: with --layout auto, neurons where that is predicted to lose less; else none)",
    )
    output.add_argument("--plan", metavar="FILE", help="types that --save-plan wrote, perhaps edited")
    output.add_argument("--save-plan", type=Path, metavar="FILE", help="write the types that were chosen for a budget")
    output.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="with a budget: measure on --domain texts what errors cost (default: for mixes below 200 MB in 16 bits)",
    )
    output.add_argument(
        "--round-types", choices=[*map(str, Rounding)], help="experts of more precisions than a layer holds share them"
    )
    output.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance matrix, from `moegguf calibrate` or llama-imatrix; presets below 3 bits need one",
    )
    output.add_argument("-o", "--output", metavar="FILE", help="file to write (default: NAME-QUANT.gguf here)")
    output.add_argument("--force", action="store_true", help="replace the files to write if they exist")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan and its sizes; read no weights (a budget: a sample of them), write nothing",
    )
    how.add_argument(
        "--stream", action="store_true", help="read Hub models by range; keep nothing of them on this disk"
    )
    how.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the BPE pre-tokenizer, where it is not recognised"
    )
    how.add_argument("--threads", type=int, metavar="N", help="threads that quantise (default: all usable cores)")
    add_json(how)


def run(args: argparse.Namespace) -> int:
    check_threads(args.threads)
    recipe = _recipe(args)
    options = _options(args)
    report = describe(prepare(recipe, options, shown), options)
    out = console(args)
    with contextlib.suppress(BrokenPipeError):  # the file is what was asked for, whoever still reads
        _print_plan(out, report)
    if not options.is_dry:
        report = finish(report, options, shown)
    if args.json:
        print_json(report.as_json())
    elif report.built:
        _print_built(out, report.built)
    else:
        out.print("dry run: nothing was written")
    return 0


def _options(args: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        threads=args.threads,
        stream=args.stream,
        pre=args.pre,
        overwrite=args.force,
        fit=_fit(args),
        probe=args.probe,
        save_plan=args.save_plan,
        is_dry=args.dry_run,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    overrides = _overrides(args)
    if args.recipe is not None:
        return load_recipe(args.recipe, args.recipes, overrides)
    if args.base is None and not args.expert:
        raise UserError("nothing to build", "name a recipe (see `moegguf recipes`), or give --base and --expert")
    name = Path(args.output).stem if args.output else "mix"
    return parse_recipe(name, overrides, where="command line:", folder=Path())


def _print_plan(out: Console, report: BuildReport) -> None:
    if report.allocation:
        _print_allocation(out, report.allocation)
    out.print(f"mix {report.plan.recipe.name}")
    out.print(facts(_plan_facts(report)))
    if has_precisions(report.plan):
        for name, precision in report.precisions.items():
            error = "" if precision.error is None else f", weighted error {precision.error:.2%}"
            types = _types(precision.types)
            out.print(f"expert {name}: {types}, {precision.bits_per_weight:.2f} bits per weight{error}")
    if report.drift:
        each = ", ".join(f"{name} {share:.1%}" for name, share in report.drift.by_expert.items())
        out.print(f"drift of the experts from their mean: {each}")
    for note in report.notes:
        out.print(f"note: {one_line(note)}")


def _print_allocation(out: Console, allocation: Allocation) -> None:
    """By group of tensors: types, bits per weight, and share of the predicted loss."""
    how = "measured influences" if allocation.survey.is_measured else "influences by rule"
    out.print(f"types for {allocation.plan.recipe.quant.label}: predicted loss {allocation.loss:.2g} nats ({how})")
    table = Table(
        "tensors", "types", Column("bits per weight", justify="right"), Column("size", justify="right"),
        Column("share of loss", justify="right"), box=None, pad_edge=False,
    )  # fmt: skip
    for share in shares(allocation):
        size, loss = show_size(share.n_bytes), f"{share.loss:.1%}"
        table.add_row(share.name, _types(share.types), f"{share.bits_per_weight:.2f}", size, loss)
    out.print(table)


def _types(types: Mapping[GGMLQuantizationType, int]) -> str:
    return ", ".join(f"{n} × {name}" for name, n in counted(types).items())


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    """The recipe table that the flags stand for."""
    flags = {
        "base": from_here(args.base),
        "experts": _experts(args),
        "mix": args.mix,
        "layers": args.layers and args.layers.split(","),
        "trunk": args.trunk,
        "router": _router(args),
        "domains": _domains(args),
        "compact": _compact(args),
        "always_on": args.always_on,
        "layout": args.layout,
        "quant": _quant(args),
        "round_types": args.round_types,
        "imatrix": from_here(args.imatrix),
        "output": args.output,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _experts(args: argparse.Namespace) -> list[dict] | None:
    if not args.expert:
        if args.weight:
            raise UserError("--weight goes with --expert", "write the weights into the recipe instead")
        return None
    sources = pairs("--expert", args.expert, "NAME=SOURCE", "math=./math-model")
    weights = dict(pairs("--weight", args.weight, "NAME=SHARE", "math=0.5"))
    names = [name for name, _ in sources]
    if unknown := [name for name in weights if name not in names]:
        raise UserError(f"--weight {unknown[0]}: no expert has that name", f"use one of {', '.join(names)}")
    return [
        {"name": name, "source": from_here(source)}
        | ({"weight": _number("--weight", weights[name])} if name in weights else {})
        for name, source in sources
    ]


def _router(args: argparse.Namespace) -> dict | None:
    is_file = args.router and args.router.endswith(".safetensors")
    router = {"file": from_here(args.router)} if is_file else {"mode": args.router}
    keys = {**router, "k": args.k, "std": args.std, "seed": args.seed, "shared": args.shared_router}
    return {key: value for key, value in keys.items() if value is not None} or None


def _domains(args: argparse.Namespace) -> dict[str, list[str]] | None:
    domains = named_refs("--domain", args.domain)
    return {name: [from_here(ref) for ref in refs] for name, refs in domains.items()} or None


def _compact(args: argparse.Namespace) -> dict | None:
    if args.compact is None:
        return None
    key, is_kld, value = args.compact.partition("=")
    return {"max_kld" if key == "kld" else key: _number("--compact", value)} if is_kld else {"size": key}


def _quant(args: argparse.Namespace) -> dict | str | None:
    roles = dict(pairs("--quant-role", args.quant_role, "ROLE=TYPE", "attn=Q8_0"))
    by_name = pairs("--quant-tensor", args.quant_tensor, "REGEX=TYPE", "'blk\\.0\\..*=Q6_K'", at_last=True)
    targets = {"preset": args.quant, "budget": args.budget, "bpw": args.bpw, "plan": from_here(args.plan)}
    quant = {key: value for key, value in {**targets, "split": args.split}.items() if value is not None}
    quant |= roles | ({"tensors": dict(by_name)} if by_name else {})
    fit = _fit(args)
    return (with_budget_of(fit, quant) if fit else quant) or None


def _fit(args: argparse.Namespace) -> Fit | None:
    if args.fit:
        return parse_fit(args.fit, args.ctx)
    if args.ctx is not None:
        raise UserError("--ctx goes with --fit: it says for how many tokens there is to be room", "leave it out")
    return None


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} {text}: is no number", "write it like 0.25") from None


def _plan_facts(report: BuildReport) -> Iterator[tuple[str, str]]:
    plan, card = report.plan, report.plan.card
    yield "base", card.base
    for expert in card.experts:
        share = f"  weight {expert.weight:.3g}" if card.is_gateless else ""
        yield f"expert {expert.name}", f"{expert.source}  {expert.quant}{share}"
    yield "router", card.describe_router()
    if (card.mixed, card.layers, card.trunk) != (Mixed.FFN, None, TRUNK_OF_BASE):
        yield "mixed", card.describe_mixed()
    if card.compact:
        yield "compacted", card.describe_compact()
    if card.split:
        yield "split", card.describe_split()
    yield "layout", f"{card.layout} (architecture {plan.form.arch})"
    yield "quant", f"{card.quant}, {plan.bits_per_weight:.2f} bits per weight"
    yield "size", f"{show_size(plan.n_bytes)}, {plan.n_weights / 1e6:.1f} M weights, {len(plan.planned)} tensors"
    memory = report.memory
    yield "to run", f"about {show_size(memory.total)} of memory with a context of {memory.n_ctx} tokens"
    yield "output", str(plan.path)


def _print_built(out: Console, built: Built) -> None:
    if cost := describe_requantised(built.requantised):
        out.print(cost)
    path = built.plan.path
    chat = f"moegguf chat {in_shell(path)}"
    out.print(f"wrote {path} ({show_size(built.n_bytes)}) in {built.seconds:.2f} s; try: {chat}")
