"""`moegguf.route`: routers of mixes are fitted, set, drawn, and handed to a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moegguf.api.paths import NO_FILES, Location, Locations, maybe_path, to_named, to_path, to_ref, to_refs
from moegguf.atomic import check_writable
from moegguf.edit.router import Adapter, ChangedRouter, change_router, export_router, kept_router
from moegguf.errors import UserError
from moegguf.jobs.fit_targets import fit_target
from moegguf.jobs.fitting import FitOptions, FitPlan, Fitted, fit_from_recipe
from moegguf.jobs.mapping import DEFAULT_SEGMENT, DEFAULT_TOKENS, MapOptions, RoutingMap, map_texts, plan_map, run_map
from moegguf.kinds import checked
from moegguf.measurement import plots
from moegguf.routers.file import check_target, write_router
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.texts import from_here
from moegguf.watch import Watch, unwatched


@checked
def fit(
    recipe: str | None = None,
    *,
    recipes: Location | None = None,
    mix: Location | None = None,
    base_gguf: Location | None = None,
    text: Locations = NO_FILES,
    positive: Locations = NO_FILES,
    negative: Locations = NO_FILES,
    max_tokens: int = 4000,
    holdout: float = 0.2,
    mode: str | None = None,
    k: int | None = None,
    ridge_lambda: float | None = None,
    temperature: float | None = None,
    tap: str | None = None,
    pool: str | None = None,
    shared: bool | None = None,
    always_on: str | None = None,
    output: Location = "router.safetensors",
    statistics: Location | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_plan: Callable[[FitPlan], None] = lambda plan: None,
    watch: Watch = unwatched,
) -> Fitted:
    """Compute a router from text of each expert's domain and write it to `output`, as `moegguf route fit` does.

    It is that of `recipe` in the file `recipes`, of the finished `mix`, or of a mix of `base_gguf` with an expert for
    each name in `text`; what is not given is the recipe's or the mix's. `on_plan` hears what is about to be run.
    Raises UserError.
    """
    target = to_path("output", output)
    check_target(target, overwrite)
    kept = maybe_path("statistics", statistics)
    if kept and kept.absolute() == target.absolute():
        raise UserError(f"{target}: is to be both router and statistics", "choose another -o, or other --statistics")
    if kept:
        check_writable(kept, overwrite=True)
    options = FitOptions(
        to_refs("positive", positive), to_refs("negative", negative), max_tokens, holdout, kept, threads,
        folder=target.parent,
    )  # fmt: skip
    router = {
        "mode": mode, "k": k, "lambda": ridge_lambda, "temperature": temperature, "tap": tap, "pool": pool,
        "shared": shared,
    }  # fmt: skip
    domains = {name: [from_here(ref) for ref in refs] for name, refs in to_refs("text", text).items()}
    given = {"router": _given(router), "always_on": always_on, "domains": domains or None}
    wanted = fit_target(
        _given(given), options, recipe=recipe, recipes=maybe_path("recipes", recipes), mix=maybe_path("mix", mix),
        base_gguf=maybe_path("base_gguf", base_gguf),
    )  # fmt: skip
    fitted = fit_from_recipe(wanted.recipe, options, model=wanted.model, on_plan=on_plan, watch=watch)
    write_router(target, fitted.router)
    return replace(fitted, warnings=(*wanted.notes, *fitted.warnings))


def _given(keys: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in keys.items() if value is not None}


@checked
def set(
    path: Location,
    router: Location | None = None,
    *,
    undo: bool = False,
    k: int | None = None,
    std: float | None = None,
) -> ChangedRouter:
    """Replace the router inside the mix at `path`, in place, as `moegguf route set` does.

    `router` is FILE.safetensors, "gateless", "noisy" or "noisy:SEED"; with `undo` the one that the last change
    replaced, which restores every byte. Raises UserError.
    """
    mix = to_path("path", path)
    if undo == (router is not None):
        raise UserError("expected a router, or undo=True", "pass one of them")
    return change_router(mix, str(kept_router(mix)) if undo else to_ref("router", router), k=k, std=std)


@checked
def export(path: Location, router: Location, *, output: Location, overwrite: bool = False) -> Adapter:
    """Write `router` as an adapter that llama.cpp switches on for a request, as `moegguf route export` does.

    It fits the mix at `path` only. `router` is FILE.safetensors, "noisy" or "noisy:SEED". Raises UserError.
    """
    mix, target = to_path("path", path), to_path("output", output)
    return export_router(mix, to_ref("router", router), target, overwrite=overwrite)


@checked
def map(
    path: Location,
    *,
    text: Locations = NO_FILES,
    domains: str | None = None,
    recipes: Location | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    segment: int = DEFAULT_SEGMENT,
    cache: int | Sequence[int] = (),
    output: Location | None = None,
    overwrite: bool = False,
    ctx: int | None = None,
    threads: int | None = None,
    offload: Offload = WHAT_FITS,
    watch: Watch = unwatched,
) -> RoutingMap:
    """Which experts the model at `path` uses for which text, as `moegguf route map` finds.

    It is drawn to `output` where one is given. `domains` is the name of a recipe, in the file `recipes`, whose texts
    are taken beside those of `text`. Raises UserError.
    """
    caches = (cache,) if isinstance(cache, int) else tuple(cache)
    options = MapOptions(max_tokens, segment, caches, ctx, threads, offload)
    plan, target = plan_map(to_path("path", path), options), maybe_path("output", output)
    if target:
        plots.require(target)
        check_writable(target, overwrite)
    texts = map_texts(to_named("text", text), domains=domains, recipes=maybe_path("recipes", recipes))
    found = run_map(plan, texts, watch)
    if target:
        found.draw(target)
    return found
