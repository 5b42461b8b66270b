"""`moegguf build`: a recipe or flags in, one GGUF out."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Column, Table

from moegguf.allocation import Allocation, expert_errors, precisions
from moegguf.assembly import Built, Plan, build, quant_of
from moegguf.commands.options import check_threads, from_here
from moegguf.commands.progress import bytes_done, shown
from moegguf.drift import measure_drift
from moegguf.errors import UserError, one_line
from moegguf.estimate import DEFAULT_CONTEXT, Fit, memory_to_run
from moegguf.families import PER_LAYER_WIDTHS, TensorName
from moegguf.mix import unused_targets
from moegguf.preparation import BuildOptions, prepare
from moegguf.quant.imatrix import importance_notes
from moegguf.quant.influence import group
from moegguf.quant.sensitivity import Sensitivity
from moegguf.quant.type_plan import write_type_plan
from moegguf.recipe import (
    TRUNK_OF_BASE,
    TRUNK_OF_MEAN,
    Layout,
    Mixed,
    Recipe,
    Rounding,
    Splitting,
    find_recipes_file,
    load_recipe,
    parse_recipe,
)
from moegguf.sizes import parse_size
from moegguf.sizes import show_size as _size
from moegguf.tensor import Planned

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
    output.add_argument("--force", action="store_true", help="replace the output file if it exists")
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


def run(args: argparse.Namespace) -> int:
    check_threads(args.threads)
    recipe = _recipe(args)
    options = _options(args)
    console = Console(markup=False)
    prepared = prepare(recipe, options, shown)
    plan, allocation = prepared.plan, prepared.allocation
    for note in prepared.notes:
        console.print(one_line(note), highlight=False)
    if allocation:
        console.print(_allocation_table(allocation))
    console.print(_plan_table(plan))
    is_at_hand = not (options.stream or options.is_dry)
    if allocation or recipe.quant.types or len({expert.quant for expert in recipe.experts}) > 1:
        errors = expert_errors(plan, threads=options.n_threads) if allocation or is_at_hand else {}
        _print_precisions(console, plan, errors)
    _print_notes(console, plan)
    if is_at_hand:
        _print_drift(console, plan)
    if allocation and args.save_plan:
        quant, split = recipe.quant.label, plan.mix.split
        write_type_plan(args.save_plan, recipe.name, quant, allocation.loss, plan.planned, split)
        console.print(f"saved the types to {args.save_plan}; use them again with --plan", highlight=False)
    if options.is_dry:
        if recipe.compact:
            console.print("note: these are the sizes of the whole mix; what is merged is chosen by a build")
        console.print("dry run: nothing was written")
        return 0
    built = _build_with_progress(plan, options.n_threads)
    _print_built(console, built)
    return 0


def _options(args: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        threads=args.threads,
        stream=args.stream,
        pre=args.pre,
        overwrite=args.force,
        fit=_fit(args) if args.fit else None,
        probe=args.probe,
        is_dry=args.dry_run,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    overrides = _overrides(args)
    if args.recipe is not None:
        return load_recipe(args.recipe, args.recipes or find_recipes_file(), overrides)
    if args.base is None and not args.expert:
        raise UserError("nothing to build", "name a recipe (see `moegguf recipes`), or give --base and --expert")
    name = Path(args.output).stem if args.output else "mix"
    return parse_recipe(name, overrides, where="command line:", folder=Path())


def _allocation_table(allocation: Allocation) -> Table:
    """By group of tensors: types, bits per weight, and share of the predicted loss."""
    how = "measured influences" if allocation.survey.is_measured else "influences by rule"
    table = Table(
        "tensors", "types", Column("bits per weight", justify="right"), Column("size", justify="right"),
        Column("share of loss", justify="right"),
        title=f"types for {allocation.plan.recipe.quant.label}: predicted loss {allocation.loss:.2g} nats ({how})",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    groups: dict[str, list[Planned]] = {}
    for tensor in allocation.plan.planned:
        if tensor.name in allocation.losses:
            groups.setdefault(_kind(tensor.name, allocation.plan), []).append(tensor)
    for name, tensors in groups.items():
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        share = sum(allocation.losses[tensor.name] for tensor in tensors) / (allocation.loss or 1)
        types = Counter(tensor.type for tensor in tensors)
        bits = 8 * n_bytes / sum(tensor.slot.n_weights for tensor in tensors)
        table.add_row(name, _types(types), f"{bits:.2f}", _size(n_bytes), f"{share:.1%}")
    return table


def _kind(name: str, plan: Plan) -> str:
    """A projection; of a mix whose neurons are split, with the group."""
    role = group(name)
    in_group = {f"{role}_shexp": ", fine", f"{role}_exps": ", others"} if plan.mix.split else {}
    return role + in_group.get(TensorName.parse(name).role, "")


def _types(types: Mapping[GGMLQuantizationType, int]) -> str:
    return ", ".join(f"{n} × {type.name}" for type, n in sorted(types.items(), key=lambda item: -item[1]))


def _print_precisions(console: Console, plan: Plan, sensitivities: Mapping[str, Sensitivity]) -> None:
    """What each expert is stored in, and what that loses where it was measured."""
    for name, precision in precisions(plan, sensitivities).items():
        error = "" if precision.error is None else f", weighted error {precision.error:.2%}"
        console.print(
            f"expert {name}: {_types(precision.types)}, {precision.bits_per_weight:.2f} bits per weight{error}",
            highlight=False,
        )


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
    sources = _pairs("--expert", args.expert, "NAME=SOURCE")
    weights = dict(_pairs("--weight", args.weight, "NAME=SHARE"))
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
    domains: dict[str, list[str]] = {}
    for name, ref in _pairs("--domain", args.domain, "NAME=TEXT"):
        domains.setdefault(name, []).append(from_here(ref))
    return domains or None


def _compact(args: argparse.Namespace) -> dict | None:
    if args.compact is None:
        return None
    key, is_kld, value = args.compact.partition("=")
    return {"max_kld" if key == "kld" else key: _number("--compact", value)} if is_kld else {"size": key}


def _quant(args: argparse.Namespace) -> dict | str | None:
    roles = dict(_pairs("--quant-role", args.quant_role, "ROLE=TYPE"))
    tensors = dict(_pairs("--quant-tensor", args.quant_tensor, "REGEX=TYPE"))
    budget = args.budget
    if args.fit:
        if budget:
            raise UserError("--fit and --budget: both set the size of the file", "leave one of them out")
        budget = f"{(_fit(args).ram + _fit(args).vram) / 1e9:.6g}GB"
    elif args.ctx is not None:
        raise UserError("--ctx goes with --fit: it says for how many tokens there is to be room", "leave it out")
    if args.save_plan and not (budget or args.bpw):
        raise UserError("--save-plan goes with --budget, --bpw or --fit", "leave it out")
    if args.save_plan and not args.save_plan.parent.is_dir():
        raise UserError(f"{args.save_plan.parent}: no such folder to write a plan to", "create it")
    targets = {"preset": args.quant, "budget": budget, "bpw": args.bpw, "plan": from_here(args.plan)}
    quant = {key: value for key, value in {**targets, "split": args.split}.items() if value is not None}
    return (quant | roles | ({"tensors": tensors} if tensors else {})) or None


def _fit(args: argparse.Namespace) -> Fit:
    """What --fit and --ctx say."""
    pairs = dict(_pairs("--fit", args.fit.split(","), "RAM=SIZE[,VRAM=SIZE]"))
    sizes = {name.strip().upper(): size for name, size in pairs.items()}
    if "RAM" not in sizes or not set(sizes) <= {"RAM", "VRAM"}:
        raise UserError(f"--fit {args.fit}: expected RAM=SIZE[,VRAM=SIZE]", f"for example --fit {_EXAMPLE['--fit']}")
    n_ctx = DEFAULT_CONTEXT if args.ctx is None else args.ctx
    if n_ctx < 1:
        raise UserError(f"--ctx {n_ctx}: expected at least 1 token", "4096 is the default")
    return Fit(parse_size(sizes["RAM"]), parse_size(sizes["VRAM"]) if "VRAM" in sizes else 0, n_ctx)


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
    "--fit": "RAM=16GB,VRAM=8GB",
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
        table.add_row(f"expert {expert.name}", f"{expert.source.label}  {quant_of(recipe, expert.spec)}{share}")
    table.add_row("router", plan.card.describe_router())
    if recipe.mixed is not Mixed.FFN or recipe.layers is not None:
        table.add_row("mixed", f"{recipe.mixed} in {len(mix.layers)} of {mix.n_layer} layers")
    if recipe.trunk != TRUNK_OF_BASE:
        table.add_row("trunk", "the mean of all experts" if recipe.trunk == TRUNK_OF_MEAN else recipe.trunk)
    if plan.card.compact:
        table.add_row("compacted", plan.card.describe_compact())
    if plan.card.split:
        table.add_row("split", plan.card.describe_split())
    table.add_row("layout", f"{recipe.layout} (architecture {plan.form.arch})")
    table.add_row("quant", f"{recipe.quant.label}, {plan.bits_per_weight:.2f} bits per weight")
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
        if unused := unused_targets(expert, plan.recipe.mixed, plan.recipe.trunk):
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
    for note in (*plan.mix.base.notes, *importance_notes(plan.planned)):
        console.print(f"note: {one_line(note)}", highlight=False)


def _print_drift(console: Console, plan: Plan) -> None:
    """How far the experts of a gate-less mix are apart, and what one dense FFN in their place would save and cost."""
    if not plan.card.is_gateless or plan.card.is_dense or len(plan.mix.experts) < 2:
        return
    drift = measure_drift(plan.mix)
    each = ", ".join(f"{name} {share:.1%}" for name, share in drift.by_expert.items())
    console.print(f"drift of the experts from their mean: {each}", highlight=False)
    if plan.mix.compaction or plan.mix.base.arch not in PER_LAYER_WIDTHS:
        return
    n = len(plan.mix.experts)
    saved = sum(tensor.nbytes for tensor in plan.planned if tensor.slot.preset) * (n - 1) / n
    console.print(
        f"note: --compact 1x would save {_size(int(saved))} at a KLD of some {drift.estimated_kld:.0e} nats (an "
        "estimate by the fourth power of drift); --compact kld=0.001 finds and measures what is between",
        highlight=False,
    )


def _build_with_progress(plan: Plan, threads: int) -> Built:
    with bytes_done("writing", plan.n_bytes_to_do) as bar:
        return build(plan, threads=threads, progress=bar.did)


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
