"""A recipe made ready to be written: what has to be fitted, chosen or measured before its plan is whole.

    recipe → plan → a router fitted → neurons merged → types chosen → the plan that a build writes

The first plan finds everything that can be wrong before a step takes minutes. What no recipe asks for is left out, and
what it needs is not imported: most builds do without llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moegguf.allocation import Allocation, allocate, n_surveyed, survey
from moegguf.assembly import Plan, plan_build, usable_cores
from moegguf.atomic import check_writable
from moegguf.errors import UserError
from moegguf.estimate import Fit, largest_file, memory_to_run
from moegguf.quant.neurons import Compaction
from moegguf.quant.type_plan import write_type_plan
from moegguf.recipe import Budget, Recipe
from moegguf.routers import Router
from moegguf.sizes import show_size
from moegguf.splitting import allocate_split, fine_widths
from moegguf.watch import Watch, unwatched

STREAMING_THREADS = 16
"""When weights come over the network, threads mostly wait for them."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build, whatever the recipe. `pre` names a BPE pre-tokenizer that is not recognised."""

    threads: int | None = None
    stream: bool = False
    """Read Hub models by range and keep nothing of them."""
    pre: str | None = None
    overwrite: bool = False
    fit: Fit | None = None
    """The memory that it is to run in, where that limits the file."""
    probe: bool | None = None
    """Correct a budget by measurements; None where that takes about a minute at most."""
    save_plan: Path | None = None
    """A file for the types that are chosen for a budget."""
    is_dry: bool = False
    """Nothing is to be written: no weights are downloaded, no router is fitted and nothing merged."""

    @property
    def n_threads(self) -> int:
        return self.threads or max(usable_cores(), STREAMING_THREADS if self.stream else 1)


@dataclass(frozen=True)
class Prepared:
    """What is to be built. `allocation` is there where there was a budget; `notes` are worth a user's knowing."""

    plan: Plan
    allocation: Allocation | None = None
    notes: tuple[str, ...] = ()


def prepare(recipe: Recipe, options: BuildOptions = BuildOptions(), watch: Watch = unwatched) -> Prepared:
    """Raises UserError with every fault that is known before it starts, then for the step that fails."""
    notes: list[str] = []

    def planned(**chosen) -> Plan:
        stream = options.stream or options.is_dry
        overwrite = options.overwrite or options.is_dry
        return plan_build(recipe, stream=stream, pre=options.pre, overwrite=overwrite, **chosen)

    if options.save_plan:
        _check_to_save(options.save_plan, recipe, options.overwrite)
    plan = planned()
    if recipe.router.is_unfitted and not options.is_dry:
        plan = planned(router=_fitted(recipe, options, watch, notes))
    if recipe.compact and not options.is_dry:
        plan = planned(compaction=_merged(recipe, options, watch, notes))
    if not recipe.quant.budget:
        return Prepared(plan, notes=tuple(notes))
    limit = recipe.quant.budget
    if options.fit:
        limit, note = _limit_of_memory(plan, options.fit)
        notes.append(note)
    allocation, about_split = _allocated(plan, limit, options, watch)
    notes += about_split
    if options.save_plan:
        _save_types(options.save_plan, allocation)
        notes.append(f"saved the types to {options.save_plan}; use them again with --plan")
    return Prepared(allocation.plan, allocation, tuple(notes))


def _fitted(recipe: Recipe, options: BuildOptions, watch: Watch, notes: list[str]) -> Router:
    """The router of a recipe that says how to fit it, fitted on the base alone before there is a mix."""
    from moegguf.jobs.fitting import FitOptions, fit_from_recipe

    how = FitOptions(threads=options.threads, pre=options.pre, stream=options.stream)
    fitted = fit_from_recipe(recipe, how, watch=watch)
    notes += fitted.warnings
    return fitted.router


def _merged(recipe: Recipe, options: BuildOptions, watch: Watch, notes: list[str]) -> Compaction:
    """What a compact mix merges, chosen on its texts."""
    from moegguf.jobs.compaction import CompactOptions, choose_merges

    how = CompactOptions(threads=options.threads, pre=options.pre, stream=options.stream)
    with watch("compacting", "") as step:
        chosen = choose_merges(recipe, how, hear=step.says)
    if (cost := chosen.divergence) is not None:
        error = "" if cost.kld.error is None else f" ± {cost.kld.error:.1g}"
        notes.append(
            f"merged: KLD {cost.kld.value:.2g}{error} nats from the whole mix, which finds the same token likeliest "
            f"{cost.top1.value:.1%} of the time ({cost.n_tokens} held-out tokens)"
        )
    return chosen.compaction


def _allocated(plan: Plan, limit: Budget, options: BuildOptions, watch: Watch) -> tuple[Allocation, list[str]]:
    """`plan` with the types that `limit` allows, and what is to be said of a split."""
    from moegguf.jobs import probing

    with watch("measuring errors", "tensors") as step:
        step.has(n_surveyed(plan))
        found = survey(plan, threads=options.n_threads, progress=step.did)
    allocate(found, limit)  # says now if it cannot be
    if options.probe or (options.probe is None and probing.is_cheap(found)):
        with watch("probing the mix", "probes") as step:
            step.has(probing.n_probes(found))
            found = probing.corrected(found, threads=options.n_threads, progress=step.did)
    allocation = allocate(found, limit)
    if not (widths := fine_widths(plan)):
        return allocation, []
    with watch("splitting neurons", "ways") as step:
        step.has(len(widths))
        best = allocate_split(found, limit, threads=options.n_threads, progress=step.did)
    if not (card := best.plan.card.split):
        return best, ["neurons are not split: no split is predicted to lose less"]
    return best, [f"split by {card.by}: predicted loss {best.loss:.2g} nats, {allocation.loss:.2g} without"]


def _check_to_save(path: Path, recipe: Recipe, overwrite: bool) -> None:
    if not recipe.quant.budget:
        raise UserError("--save-plan goes with --budget, --bpw or --fit", "leave it out")
    check_writable(path, overwrite)
    if path.absolute() == recipe.output.absolute():
        raise UserError(f"{path}: is to be both plan and mix", "choose another --save-plan")


def _save_types(path: Path, allocation: Allocation) -> None:
    plan = allocation.plan
    write_type_plan(path, plan.recipe.name, plan.recipe.quant.label, allocation.loss, plan.planned, plan.mix.split)


def _limit_of_memory(plan: Plan, fit: Fit) -> tuple[Budget, str]:
    """What memory leaves for the file, and how that comes."""
    from moegguf.runtime.footprint import compute_bytes

    memory = memory_to_run(plan, fit.n_ctx)
    compute = compute_bytes(plan.header, plan.n_bytes, memory.n_ctx, plan.path.parent)
    n_bytes = largest_file(plan, fit, compute)
    room = f"{show_size(fit.ram)} of RAM" + (f" and {show_size(fit.vram)} of VRAM" if fit.vram else "")
    needs = (
        f"{show_size(memory.kv_cache)} for the KV cache of {memory.n_ctx} tokens and {show_size(compute)} of buffers"
    )
    if n_bytes <= 0:
        raise UserError(f"--fit: {room} leaves nothing for the file, after {needs}", "take a smaller --ctx")
    note = f"{room}: {needs} leave {show_size(n_bytes)} for the file"
    return replace(plan.recipe.quant.budget, n_bytes=n_bytes), note
