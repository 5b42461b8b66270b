"""A dense model to run text through while there is no mix: the base of a recipe, or experts on the trunk of its mix.

What enters the FFNs there is close to what will enter them in the mix. It is written as Q8_0 beside what is being made,
and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from moegguf.assembly import build, plan_build
from moegguf.atomic import scratch_folder
from moegguf.gguf_header import is_gguf
from moegguf.recipe import TRUNK_OF_BASE, TRUNK_OF_MEAN, ExpertSpec, Layout, QuantSpec, Recipe, RouterMode, RouterSpec
from moegguf.texts import resolve
from moegguf.watch import Watch, unwatched

PRESET = "Q8_0"


@dataclass(frozen=True)
class DenseOptions:
    """How the model is built; as in any build."""

    threads: int | None = None
    folder: Path | None = None
    """Where it is written for the time being; default: beside the recipe's output."""
    pre: str | None = None
    stream: bool = False


@contextmanager
def dense_model(recipe: Recipe, options: DenseOptions = DenseOptions(), watch: Watch = unwatched) -> Iterator[Path]:
    """A GGUF of the base of `recipe`: the base itself where it is one.

    Where the trunk is not the base's, it is the gate-less mix of all experts on that trunk.
    """
    path = resolve(recipe.base, recipe.folder)
    is_base = recipe.trunk == TRUNK_OF_BASE
    if is_base and path.is_file() and is_gguf(path):
        yield path
        return
    experts = (ExpertSpec("base", recipe.base, 1.0, PRESET),) if is_base else recipe.experts
    with _mean_of(recipe, experts, options, watch) as path:
        yield path


def dense_expert(
    recipe: Recipe, expert: ExpertSpec, options: DenseOptions, watch: Watch = unwatched
) -> AbstractContextManager[Path]:
    """A GGUF of one expert of `recipe` on the mix's trunk, or on its own where that is the mean of all."""
    if recipe.trunk not in (TRUNK_OF_BASE, TRUNK_OF_MEAN):
        source = next(other.source for other in recipe.experts if other.name == recipe.trunk)
        recipe = replace(recipe, base=source, trunk=TRUNK_OF_BASE)
    return _mean_of(recipe, [expert], options, watch)


@contextmanager
def _mean_of(recipe: Recipe, experts: Sequence[ExpertSpec], options: DenseOptions, watch: Watch) -> Iterator[Path]:
    """The mean of `experts`, all alike, on the trunk of `recipe`."""
    alike = tuple(ExpertSpec(expert.name, expert.source, 1 / len(experts), PRESET) for expert in experts)
    with scratch_folder(options.folder or recipe.output.parent, ".moegguf-dense") as folder:
        dense = Recipe(
            recipe.name, recipe.base, alike, RouterSpec(RouterMode.GATELESS, len(alike)), Layout.FUSED,
            QuantSpec(PRESET), folder / "dense.gguf", recipe.folder, trunk=recipe.trunk,
        )  # fmt: skip
        plan = plan_build(dense, pre=options.pre, stream=options.stream)
        with watch("writing a model to run", "bytes") as step:
            step.has(plan.n_bytes_to_do)
            build(plan, threads=options.threads, progress=step.did)
        yield plan.path
