"""`moegguf.calibrate`: importance matrices from text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moegguf.api.paths import NO_FILES, Location, Locations, maybe_path, to_ref, to_refs
from moegguf.errors import UserError
from moegguf.jobs.calibration import MAX_TOKENS, CalibrationOptions
from moegguf.jobs.imatrices import (
    FOLDER,
    OUTPUT,
    Calibrated,
    Kind,
    calibrate_model,
    calibrate_recipe,
    calibrate_source,
    kind_of,
    refs_with,
)
from moegguf.kinds import checked
from moegguf.recipe import load_recipe
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.watch import Watch, unwatched


@checked
def calibrate(
    model: Location,
    *,
    base: Location | None = None,
    recipes: Location | None = None,
    text: Locations = NO_FILES,
    domains: str | None = None,
    max_tokens: int = MAX_TOKENS,
    chunk: int | None = None,
    output: Location | None = None,
    split: Location | None = None,
    fresh: bool = False,
    process_output: bool = False,
    threads: int | None = None,
    pre: str | None = None,
    offload: Offload = WHAT_FITS,
    watch: Watch = unwatched,
) -> Calibrated:
    """Importance matrices of a .gguf file, of an expert's source, or of the experts of a recipe, by its name.

    As `moegguf calibrate` makes them: a file that is there is extended, unless `fresh`; `output` is a folder for a
    recipe. `domains` is the name of a recipe whose texts are taken beside those of `text`. Raises UserError.
    """
    name, refs, recipes = to_ref("model", model), to_refs("text", text), maybe_path("recipes", recipes)
    options = CalibrationOptions(chunk, max_tokens, fresh, process_output, threads, offload)
    kind, target, parts = kind_of(name), maybe_path("output", output), maybe_path("split", split)
    trunk = None if base is None else to_ref("base", base)
    _check(name, kind, {"--split": split, "--base": base, "--pre": pre, "--domains": domains})
    if kind is Kind.RECIPE:
        recipe = load_recipe(name, recipes)
        return calibrate_recipe(recipe, refs, target or FOLDER, options, pre=pre, watch=watch)
    refs = refs_with(refs, domains, recipes)
    if kind is Kind.MODEL:
        return calibrate_model(Path(name), refs, target or OUTPUT, options, split=parts, watch=watch)
    return calibrate_source(name, refs, target or OUTPUT, options, base=trunk, pre=pre, watch=watch)


_GO_WITH = {
    "--split": [Kind.MODEL],
    "--base": [Kind.EXPERT],
    "--pre": [Kind.EXPERT, Kind.RECIPE],
    "--domains": [Kind.MODEL, Kind.EXPERT],
}


def _check(name: str, kind: Kind, flags: Mapping[str, object]) -> None:
    """Raises UserError for a flag that means nothing where a `kind` is calibrated."""
    for flag, value in flags.items():
        if value is not None and kind not in _GO_WITH[flag]:
            raise UserError(f"{flag}: goes with {' or '.join(_GO_WITH[flag])}, and {name} is {kind}", "leave it out")
