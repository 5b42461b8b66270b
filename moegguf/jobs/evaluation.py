"""An evaluation, end to end: tasks and models, found without loading them → outcomes, kept as they come → figures.

A model is loaded when it is first asked something that its ledger does not know, so an evaluation that was stopped goes
on where it was, and one that is asked for again costs nothing. Standard benchmarks run through lm-evaluation-harness
against a server on the loopback; nothing of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from moegguf import __version__
from moegguf.atomic import check_writable
from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError
from moegguf.jobs.domains import texts_of_recipe
from moegguf.jobs.engines import ENGINES, LLAMA
from moegguf.measurement import plots
from moegguf.measurement.harness import Benchmarks, HarnessRun, run_harness
from moegguf.measurement.ledger import Ledger
from moegguf.measurement.results import Figure, Mean, figure, mean
from moegguf.measurement.score_charts import chart_files, draw
from moegguf.measurement.scores import Engine, Outcome, outcomes
from moegguf.measurement.tasks import Task, domain_tasks, limited, read_tasks
from moegguf.runtime.completions import CompletionServer
from moegguf.runtime.model import open_model
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.runtime.run_options import MIN_CTX, RunOptions
from moegguf.stores import cache_folder
from moegguf.watch import Watch, unwatched


@dataclass(frozen=True)
class EvalOptions:
    """How models are asked. None leaves the choice to the tasks, the model and the machine."""

    engine: str = LLAMA
    """A name of `moegguf.jobs.engines.ENGINES`: whether models are files or recipes."""
    recipes: Path | None = None
    """The file that recipes are in; default: moegguf's own."""
    max_tokens: int | None = None
    """Of an answer; default: as many as the tasks need."""
    ctx: int | None = None
    threads: int | None = None
    offload: Offload = WHAT_FITS
    cache: Path | None = None
    """The folder of the ledgers; default: `eval` in the user's cache."""
    fresh: bool = False
    """Whether to ask everything again, whatever is kept."""

    def __post_init__(self) -> None:
        check_range("--ctx", self.ctx, MIN_CTX)
        check_threads(self.threads)
        check_range("--max-tokens", self.max_tokens, 1)
        if self.engine not in ENGINES:
            raise UserError(f"--engine {self.engine}: is none", f"the engines are {', '.join(ENGINES)}")

    @property
    def run(self) -> RunOptions:
        return RunOptions(ctx=self.ctx, threads=self.threads, offload=self.offload)

    @property
    def folder(self) -> Path:
        return self.cache or cache_folder("eval")

    @property
    def settings(self) -> dict[str, object]:
        """All that outcomes depend on, beside the model and the task."""
        versions = [__version__, version("llama-cpp-python")]
        return {"engine": self.engine, "ctx": self.ctx, "max_tokens": self.max_tokens, "versions": versions}


@dataclass(frozen=True)
class Scores:
    """What is known of one model: its outcomes and figures by task, and what benchmarks found."""

    name: str
    ref: str
    identity: Mapping[str, object]
    outcomes: Mapping[str, Sequence[Outcome]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    harness: HarnessRun | None = None

    @property
    def mean(self) -> Mean | None:
        return mean(list(self.figures.values()))


@dataclass(frozen=True)
class EvaluationPlan:
    """All that is known before the first model is loaded. Of `models` only who they are."""

    models: tuple[Scores, ...]
    tasks: tuple[Task, ...]
    benchmarks: Benchmarks | None
    options: EvalOptions


@dataclass(frozen=True)
class Evaluation:
    """What models did on tasks, side by side."""

    tasks: tuple[Task, ...]
    models: tuple[Scores, ...]
    settings: Mapping[str, object]

    def draw(self, path: Path, *, overwrite: bool = False) -> list[Path]:
        """Draw the figures of the tasks, at least one, as bars; the files. Raises UserError."""
        check_chart(path, self.tasks, overwrite)
        return draw(path, {model.name: model.figures for model in self.models})

    def as_json(self, *, details: bool = False) -> dict[str, object]:
        """All of it, as the command reports it; `details` are the outcomes of every item."""
        return {"settings": dict(self.settings), "models": [self._model_as_json(each, details) for each in self.models]}

    def _model_as_json(self, model: Scores, details: bool) -> dict[str, object]:
        content: dict[str, object] = {"name": model.name, **model.identity}
        content["tasks"] = {name: each.as_json() for name, each in model.figures.items()}
        if model.mean:
            content["mean"] = {"value": model.mean.value, "ci": model.mean.interval}
        if details:
            content["items"] = {
                task.name: [
                    {"where": item.where, **asdict(outcome)}
                    for item, outcome in zip(task.items, model.outcomes[task.name], strict=True)
                ]
                for task in self.tasks
            }
        if model.harness:
            content["harness"] = model.harness.results
        return content


def check_chart(path: Path, tasks: Sequence[Task], overwrite: bool) -> None:
    """Raises UserError where `Evaluation.draw` of such tasks could not write to `path`."""
    plots.require(path)
    for file in chart_files(path, (task.metric.is_accuracy for task in tasks)).values():
        check_writable(file, overwrite)


# ------------------------------------------------------------------------------------- what is asked for


def tasks_of(
    refs: Iterable[tuple[str, str]],
    *,
    domains: str | None = None,
    recipes: Path | None = None,
    limit: int | None = None,
) -> list[Task]:
    """The tasks of (name, reference), and those of the domains of a recipe; of each the first `limit` items.

    Raises UserError with the faults of all files.
    """
    check_range("--limit", limit, 1)
    tasks = read_tasks(refs)
    if domains is not None:
        tasks += domain_tasks(texts_of_recipe(domains, recipes))
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two tasks are called {', '.join(sorted(twice))}", "name one: --tasks NAME=FILE")
    return limited(tasks, limit)


def plan_evaluation(
    models: Mapping[str, str],
    tasks: Sequence[Task],
    options: EvalOptions = EvalOptions(),
    *,
    benchmarks: Benchmarks | None = None,
) -> EvaluationPlan:
    """`models` are references by name. Raises one UserError for all that are none, before the first is loaded."""
    if not (tasks or benchmarks):
        raise UserError("nothing to measure", "give --tasks FILE, --domains RECIPE or --harness TASKS")
    if options.engine != LLAMA and (benchmarks or options.offload != WHAT_FITS):
        raise UserError("--harness and device flags are for GGUF files only", "leave --engine out")
    if benchmarks:
        benchmarks.check()
    found: list[Scores] = []
    faults: list[UserError] = []
    for name, ref in models.items():
        try:
            found.append(Scores(name, ref, ENGINES[options.engine].identity(ref, options.recipes)))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return EvaluationPlan(tuple(found), tuple(tasks), benchmarks, options)


# ------------------------------------------------------------------------------------------------ asking

_Hear = Callable[[str, int], None]
"""Is told what is asked now, and how many more outcomes are known."""


def run_evaluation(plan: EvaluationPlan, watch: Watch = unwatched) -> Evaluation:
    """Ask every model every task that it was not asked before. Raises UserError.

    KeyboardInterrupt, at Ctrl-C, has a note that says what is kept.
    """
    n_total = len(plan.models) * sum(len(task.items) for task in plan.tasks)
    n_known = 0
    try:
        with watch("asking", "items") as step:
            step.has(n_total)

            def hear(what: str, n_more: int) -> None:
                nonlocal n_known
                n_known += n_more
                step.says(what)
                step.did(n_more)

            models = tuple(_asked(plan, model, hear) for model in plan.models) if plan.tasks else plan.models
    except KeyboardInterrupt as interrupt:
        folder = plan.options.folder
        interrupt.add_note(f"{n_known} of {n_total} outcomes are kept in {folder}: the same again goes on there")
        raise
    return Evaluation(plan.tasks, models, plan.options.settings)


def _asked(plan: EvaluationPlan, model: Scores, hear: _Hear) -> Scores:
    """`model` with its outcomes and figures."""
    options, found, figures = plan.options, {}, {}
    depends_on = {"model": dict(model.identity), **options.settings}
    with Ledger(options.folder, depends_on, fresh=options.fresh) as ledger, ExitStack() as stack:
        engine: Engine | None = None
        for task in plan.tasks:
            what, known = f"{model.name}  {task.name}", ledger.outcomes(task)
            hear(what, len(known))
            if todo := [i for i in range(len(task.items)) if i not in known]:
                opened = ENGINES[options.engine].open
                engine = engine or stack.enter_context(opened(model.ref, options.recipes, options.run))
                for i, outcome in outcomes(engine, task, todo, options.max_tokens):
                    ledger.add(task.metric, task.items[i], outcome)
                    known[i] = outcome
                    hear(what, 1)
            found[task.name] = [known[i] for i in range(len(task.items))]
            figures[task.name] = figure(task.metric, found[task.name])
    return replace(model, outcomes=found, figures=figures)


def run_benchmarks(plan: EvaluationPlan, found: Evaluation, *, show_progress: bool = False) -> Evaluation:
    """`found` with what the benchmarks of the plan say of every model, if it has any. Raises UserError.

    `show_progress` lets lm-evaluation-harness write to stderr.
    """

    def measured(model: Scores) -> Scores:
        with open_model(model.ref, plan.options.run) as opened, CompletionServer(opened) as server:
            run = run_harness(server.url, plan.benchmarks, opened.n_ctx, name=model.name, show_progress=show_progress)
        return replace(model, harness=run)

    return replace(found, models=tuple(map(measured, found.models))) if plan.benchmarks else found
