"""Importance matrices of what a user names: a GGUF, the source of an expert, or all experts of a recipe.

A GGUF is run as it is; of a mix, what its matrix says of each expert can be written beside it. A source is run on its
own trunk or on that of another model, and each expert of a recipe on the trunk of its mix: then it sees the text of its
domain and, where it runs for every token (gate-less, always on), the text of all domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from moegguf.atomic import new_folder
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.jobs.calibration import (
    CalibrationOptions,
    CalibrationPlan,
    card_of_mix,
    check_target,
    experts_of,
    extended,
    plan_calibration,
    run_calibration,
    unreached,
)
from moegguf.jobs.dense import DenseOptions, dense_expert
from moegguf.quant.imatrix import Calibration, write_calibration
from moegguf.recipe import ExpertSpec, Recipe, load_recipe, parse_recipe
from moegguf.texts import Record, from_here, read_domains, resolve
from moegguf.watch import Watch, unwatched

OUTPUT, FOLDER = Path("imatrix.gguf"), Path("imatrix")
"""Where they go, of a model and of a recipe, unless told otherwise."""

Refs = Mapping[str, Sequence[str]]
"""Domain → references of texts."""


class Kind(StrEnum):
    """What a matrix is of."""

    MODEL = "a GGUF"
    EXPERT = "the source of an expert"
    RECIPE = "a recipe"


def kind_of(name: str) -> Kind:
    """What `name` names."""
    path = Path(name)
    if path.is_file() or path.suffix == ".gguf":
        return Kind.MODEL
    return Kind.EXPERT if path.is_dir() or ":" in name else Kind.RECIPE


@dataclass(frozen=True)
class Matrix:
    """A file with what it holds. `expert` is its name in the recipe, where there is one."""

    path: Path
    calibration: Calibration
    n_run: int
    """Tokens that were run for it now; none where it held all of the text already."""
    expert: str | None = None


@dataclass(frozen=True)
class Calibrated:
    """What was calibrated. `path` is the file, or the folder of a recipe's `matrices`."""

    kind: Kind
    path: Path
    matrices: tuple[Matrix, ...]
    split: tuple[Path, ...] = ()
    """A matrix for each expert of a mix, where they were asked for."""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """All but the sums, as the command reports it."""
        return {
            "file": str(self.path),
            "matrices": [
                {
                    "file": str(matrix.path),
                    "expert": matrix.expert,
                    "weights": len(matrix.calibration.squares),
                    "tokens": {text.name: text.n_tokens for text in matrix.calibration.texts},
                    "tokens_run": matrix.n_run,
                }
                for matrix in self.matrices
            ],
            "split": [str(path) for path in self.split],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Texts:
    """The texts of domains, and where they are from."""

    refs: Refs
    records: Mapping[str, Sequence[Record]]

    @classmethod
    def read(cls, refs: Refs) -> Texts:
        """Raises one UserError with all faults."""
        return cls(refs, read_domains(refs))

    def only(self, domains: Iterable[str]) -> Texts:
        names = list(domains)
        return Texts({name: self.refs[name] for name in names}, {name: self.records[name] for name in names})

    @property
    def labels(self) -> list[str]:
        """What a matrix says of where its texts are from: nothing about a disk."""
        refs = [ref for some in self.refs.values() for ref in some]
        return [ref if ref.startswith("demo:") else Path(ref).name for ref in refs]


def calibrate_model(
    model: Path,
    refs: Refs,
    output: Path,
    options: CalibrationOptions,
    *,
    split: Path | None = None,
    watch: Watch = unwatched,
) -> Calibrated:
    """The matrix of the GGUF `model`, and in the folder `split` those of the experts that it mixes."""
    experts = [expert.name for expert in card_of_mix(read_header(model)).experts] if split else []
    with new_folder(split) if split else nullcontext():
        plan = _planned(model, Texts.read(refs), output, options)
        parts = {name: split / f"{name}.gguf" for name in experts}
        for path in parts.values():
            extended(path, options, plan.known)  # or fail now
        matrix = _run(plan, watch)
        of_experts = experts_of(matrix.calibration, plan.header) if split else {}
        for name, path in parts.items():
            write_calibration(path, of_experts[name])
    notes = tuple(
        f"no token reached expert {expert} in layer {', '.join(map(str, layers))}: there, what is known of the other"
        " experts stands for it; more text may reach it"
        for expert, layers in unreached(matrix.calibration, plan.header).items()
    )
    return Calibrated(Kind.MODEL, output, (matrix,), tuple(parts.values()), notes)


def calibrate_source(
    ref: str,
    refs: Refs,
    output: Path,
    options: CalibrationOptions,
    *,
    base: str | None = None,
    pre: str | None = None,
    watch: Watch = unwatched,
) -> Calibrated:
    """The matrix of the model `ref`, on the trunk of `base` where one is given, for it to be an expert."""
    table = {"base": from_here(base or ref), "experts": [{"name": "expert", "source": from_here(ref)}]}
    recipe = parse_recipe("expert", table, where="calibrate:", folder=Path())
    matrix = _run_alone(recipe, recipe.experts[0], Texts.read(refs), output, options, pre, watch)
    return Calibrated(Kind.EXPERT, output, (replace(matrix, expert=None),))


def calibrate_recipe(
    recipe: Recipe,
    refs: Refs,
    folder: Path,
    options: CalibrationOptions,
    *,
    pre: str | None = None,
    watch: Watch = unwatched,
) -> Calibrated:
    """A matrix for each expert of `recipe`, in `folder`; `refs` replace the texts of its domains."""
    texts = _texts_by_expert(recipe, refs)
    with new_folder(folder):
        matrices = tuple(
            _run_alone(recipe, expert, texts[expert.name], folder / f"{expert.name}.gguf", options, pre, watch)
            for expert in recipe.experts
        )
    return Calibrated(Kind.RECIPE, folder, matrices)


def refs_of(recipe: Recipe) -> dict[str, list[str]]:
    """The texts of a recipe's domains, to be read from any folder."""
    return {
        name: [ref if ref.startswith("demo:") else str(resolve(ref, recipe.folder)) for ref in refs]
        for name, refs in recipe.domains.items()
    }


def refs_with(refs: Refs, recipe: str | None = None, recipes: Path | None = None) -> Refs:
    """The domains of the recipe of that name in the file `recipes`, where one is named, and `refs` besides.

    Raises UserError where there are none.
    """
    of_recipe = {} if recipe is None else refs_of(load_recipe(recipe, recipes))
    merged = {name: [*of_recipe.get(name, ()), *refs.get(name, ())] for name in [*of_recipe, *refs]}
    if not merged:
        raise UserError("no text to calibrate with", "pass --text NAME=FILE, or --domains RECIPE for those of a recipe")
    return merged


def _texts_by_expert(recipe: Recipe, given: Refs) -> dict[str, Texts]:
    """What reaches each expert: the text of its domain, or of all domains where it runs for every token."""
    texts = Texts.read(refs_of(recipe) | dict(given))
    if unknown := [name for name in given if name not in recipe.expert_names]:
        raise UserError(
            f"--text {unknown[0]}: no expert of recipe {recipe.name} has that name",
            f"use one of {', '.join(recipe.expert_names)}",
        )
    if missing := [name for name in recipe.expert_names if name not in texts.refs]:
        raise UserError(
            f"recipe {recipe.name}: no text for expert {', '.join(missing)}",
            f"pass {' '.join(f'--text {name}=FILE' for name in missing)}, or name them under domains in the recipe",
        )
    router = recipe.router
    return {
        name: texts if router.is_gateless or name == router.always_on else texts.only([name])
        for name in recipe.expert_names
    }


def _run_alone(
    recipe: Recipe,
    expert: ExpertSpec,
    texts: Texts,
    output: Path,
    options: CalibrationOptions,
    pre: str | None,
    watch: Watch,
) -> Matrix:
    """One expert of `recipe`, on the trunk of its mix."""
    check_target(output)
    how = DenseOptions(threads=options.threads, folder=output.parent, pre=pre)
    with dense_expert(recipe, expert, how, watch) as model:
        return _run(_planned(model, texts, output, options), watch, expert.name)


def _planned(model: Path, texts: Texts, output: Path, options: CalibrationOptions) -> CalibrationPlan:
    return plan_calibration(model, texts.records, output, options, datasets=texts.labels)


def _run(plan: CalibrationPlan, watch: Watch, expert: str | None = None) -> Matrix:
    with watch("calibrating", "tokens") as step:
        step.has(plan.n_tokens)
        return Matrix(plan.output, run_calibration(plan, step.did), plan.n_tokens, expert)
