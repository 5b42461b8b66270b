"""`moegguf.eval`, `measure` and `train`: what models are asked, how far they are from each other, and what they learn.

Texts and tasks are files or references such as demo:math/heldout: one, a list of them, or a mapping of names to them,
which otherwise are called like their files. So are models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moegguf.api.paths import Location, Texts, maybe_path, to_list, to_named, to_path, to_ref
from moegguf.errors import UserError
from moegguf.jobs.engines import LLAMA, by_name
from moegguf.jobs.evaluation import EvalOptions, Evaluation, plan_evaluation, run_benchmarks, run_evaluation, tasks_of
from moegguf.jobs.measuring import MAX_TOKENS, Measurement, MeasureOptions, plan_measurement, run_measurement, texts_of
from moegguf.jobs.training import (
    DEFAULT_OUTPUT,
    TrainFiles,
    Training,
    TrainOptions,
    plan_training,
    run_training,
)
from moegguf.kinds import checked
from moegguf.measurement.harness import Benchmarks
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.watch import Watch, unwatched

Models = Location | Sequence[Location] | Mapping[str, Location]


@checked
def eval(
    models: Models,
    *,
    tasks: Texts = (),
    domains: str | None = None,
    recipes: Location | None = None,
    harness: str | Sequence[str] = (),
    harness_path: Location | None = None,
    limit: int | None = None,
    engine: str = LLAMA,
    max_tokens: int | None = None,
    ctx: int | None = None,
    threads: int | None = None,
    offload: Offload = WHAT_FITS,
    cache: Location | None = None,
    fresh: bool = False,
    watch: Watch = unwatched,
) -> Evaluation:
    """How well models do on tasks, side by side, as `moegguf eval` says; `draw` of what comes back makes its chart.

    `domains` is the name of a recipe whose texts are tasks, `harness` names benchmarks of lm-evaluation-harness. With
    engine "torch", models are names of recipes in the file `recipes`. Raises UserError.
    """
    file = maybe_path("recipes", recipes)
    options = EvalOptions(engine, file, max_tokens, ctx, threads, offload, maybe_path("cache", cache), fresh)
    asked = tasks_of(to_named("tasks", tasks), domains=domains, recipes=file, limit=limit)
    names = ",".join(to_list("harness", harness))
    harness_file = maybe_path("harness_path", harness_path)
    benchmarks = Benchmarks(names, harness_file, limit) if names else None
    plan = plan_evaluation(_models(models), asked, options, benchmarks=benchmarks)
    return run_benchmarks(plan, run_evaluation(plan, watch))


@checked
def measure(
    models: Models,
    against: Location,
    *,
    text: Texts = (),
    domains: str | None = None,
    recipes: Location | None = None,
    max_tokens: int = MAX_TOKENS,
    chunk: int | None = None,
    cache: Location | None = None,
    reference_logits: Location | None = None,
    keep: bool = True,
    threads: int | None = None,
    offload: Offload = WHAT_FITS,
    watch: Watch = unwatched,
) -> Measurement:
    """How far models are from the reference `against`, as `moegguf measure` says: KL divergence, agreement, perplexity.

    The reference's logits are kept in the file `reference_logits`, or in one of the folder `cache`, for the next call;
    not `keep` runs both models at once. `domains` is the name of a recipe whose texts are taken beside those of `text`.
    Raises UserError.
    """
    options = MeasureOptions(
        chunk, max_tokens, threads, offload, maybe_path("cache", cache),
        maybe_path("reference_logits", reference_logits), keep,
    )  # fmt: skip
    texts = texts_of(to_named("text", text), domains=domains, recipes=maybe_path("recipes", recipes))
    paths = {name: Path(ref) for name, ref in _models(models).items()}
    return run_measurement(plan_measurement(paths, to_path("against", against), texts, options), watch)


@checked
def train(
    recipe: str,
    *,
    recipes: Location | None = None,
    data: Location | Sequence[Location] = (),
    seq: int | None = None,
    variant: str = TrainOptions.variant,
    start: Location | None = None,
    k: int | None = None,
    epochs: float = TrainOptions.epochs,
    max_steps: int | None = None,
    batch: int = TrainOptions.batch,
    accumulate: int = TrainOptions.accumulate,
    lr: float = TrainOptions.lr,
    schedule: str = TrainOptions.schedule,
    balance: float = TrainOptions.balance,
    seed: int = TrainOptions.seed,
    device: str = TrainOptions.device,
    dtype: str = TrainOptions.dtype,
    gradient_checkpointing: bool = False,
    threads: int | None = None,
    output: Location = DEFAULT_OUTPUT,
    curve: Location | None = None,
    checkpoints: Location | None = None,
    save_steps: int = TrainOptions.save_steps,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch = unwatched,
    should_stop: Callable[[], bool] = lambda: False,
) -> Training:
    """Learn the router of a recipe's mix from text, as `moegguf train` does, and write it to `output`.

    `data` are texts or data sets; without any, the recipe's own domains. `should_stop` is asked after every step: a run
    that stops is saved first, and the same call with `resume` goes on from there. Raises UserError.
    """
    begin = None if start is None else to_ref("start", start)
    options = TrainOptions(
        seq, variant, begin, k, epochs, max_steps, batch, accumulate, lr, schedule, balance,
        seed, device, dtype, gradient_checkpointing, threads, save_steps,
    )  # fmt: skip
    files = TrainFiles(
        to_path("output", output), maybe_path("curve", curve), maybe_path("checkpoints", checkpoints), resume, overwrite
    )
    plan = plan_training(
        to_ref("recipe", recipe), to_list("data", data), options, files, recipes=maybe_path("recipes", recipes)
    )
    return run_training(plan, watch, should_stop)


def _models(models: Models) -> dict[str, str]:
    """Name → reference of each, at least one."""
    if isinstance(models, Mapping):
        found = {str(name): to_ref("models", ref) for name, ref in models.items()}
    else:
        found = by_name(to_list("models", models))
    if not found:
        raise UserError("models: none are given", "pass at least one")
    return found
