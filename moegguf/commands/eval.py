"""`moegguf eval`: how well models do on tasks, side by side.

Every outcome is kept on disk as it comes, so an evaluation that was stopped goes on where it was, and one that is
asked for again costs nothing. Standard benchmarks run through lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf import __version__
from moegguf.commands.options import (
    add_device_arguments,
    add_json_arguments,
    cache_folder,
    check_range,
    check_threads,
    device_options,
    report_json,
)
from moegguf.commands.progress import counted
from moegguf.errors import UserError, one_line
from moegguf.gguf_header import file_identity, read_header
from moegguf.measurement.harness import HarnessRun, check_harness, run_harness
from moegguf.measurement.ledger import Ledger
from moegguf.measurement.results import Figure, Interval, Mean, figure, mean
from moegguf.measurement.scores import Engine, Outcome, outcomes
from moegguf.measurement.tasks import Metric, Task, domain_tasks, limited, read_tasks
from moegguf.recipe import Recipe, find_recipes_file, load_recipe
from moegguf.runtime.batch import Scored, generate_greedy, score
from moegguf.runtime.completions import CompletionServer
from moegguf.runtime.encode import Encoded, encode
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.offload import WHAT_FITS
from moegguf.runtime.run_options import MIN_CTX, RunOptions
from moegguf.runtime.template import chat_template, end_of_turn
from moegguf.texts import Chat, Completion, Record, read_domains
from moegguf.torch_engine import identity, open_checked, open_engine

if TYPE_CHECKING:
    from moegguf.reference.engine import TorchEngine

HELP = "Measure models side by side: exact match, multiple choice and perplexity on your tasks, or standard benchmarks."
EXAMPLES = """\
examples:
  moegguf eval mix.gguf base.gguf --tasks math.jsonl law.jsonl --chart scores.png
  moegguf eval mix.gguf --tasks demo:math/heldout demo:clinic/heldout#100
  moegguf eval mix.gguf --domains my-mix --save scores.json
  moegguf eval my-mix other-mix --engine torch --tasks math.jsonl
  moegguf eval mix.gguf --harness arc_easy,gsm8k --limit 200

a line of a task file (.jsonl), one kind a file:
  {"question": "…", "answer": "…"}                          the greedy answer must be just that
  {"question": "…", "choices": ["…", "…"], "answer": 0}     the likeliest choice, counted from 0
  {"text": "…"}                                             perplexity; so is a .txt file
  with "prompt" in place of "question" the text is given as it is, without the chat template
"""

BAR_WIDTH = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="GGUF files: mixes, their base, their experts")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--tasks", nargs="+", default=[], metavar="FILE", help="tasks: FILE, NAME=FILE, or demo:DOMAIN/heldout#N"
    )
    what.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe as tasks")
    what.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    what.add_argument(
        "--harness", metavar="TASKS", help="benchmarks by their names in lm-evaluation-harness, commas between"
    )
    what.add_argument("--harness-path", type=Path, metavar="DIR", help="folder of harness tasks of your own (YAML)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    out = parser.add_argument_group("results")
    add_json_arguments(out)
    out.add_argument("--details", action="store_true", help="with --json or --save: what each model did on each item")
    out.add_argument("--chart", type=Path, metavar="FILE", help="draw them as bars (.png, .svg, .pdf)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--engine",
        choices=tuple(_ENGINES),
        default="llama",
        help="torch: MODELs are recipes, run in PyTorch (default: llama)",
    )
    how.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer (default: as the tasks need)")
    how.add_argument("--ctx", type=int, metavar="N", help="context in tokens (default: the model's, at most 4096)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    how.add_argument(
        "--cache", type=Path, metavar="DIR", help="where outcomes are kept (default: ~/.cache/moegguf/eval)"
    )
    how.add_argument("--fresh", action="store_true", help="ask everything again, whatever is kept")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Ask every model every task that it was not asked before; print, draw and write what came out."""
    options = _run_options(args)
    if not (args.tasks or args.domains or args.harness):
        raise UserError("nothing to measure", "give --tasks FILE, --domains RECIPE or --harness TASKS")
    if args.engine == "torch" and (args.harness or options.offload != WHAT_FITS):
        raise UserError("--harness and device flags are for GGUF files only", "leave --engine out")
    if args.details and not (args.json or args.save):
        raise UserError("--details is part of the JSON", "pass --json, or --save FILE")
    if args.chart and not (args.tasks or args.domains):
        raise UserError("--chart draws --tasks and --domains, not benchmarks", "leave it out, or give it tasks")
    if args.harness:
        check_harness()
        if args.harness_path and not args.harness_path.is_dir():
            raise UserError(f"--harness-path {args.harness_path}: is no folder", "name the one that holds your tasks")
    tasks = limited(_tasks(args), args.limit)
    reports = _reports(args)
    width = None if sys.stdout.isatty() else 10_000
    console = Console(markup=False, highlight=False, width=width, quiet=args.json)
    if tasks:
        _measure(args, options, tasks, reports)
        _print(console, tasks, reports)
    if args.harness:
        for report in reports:
            report.harness = _harness(args, options, report)
            console.print(f"{one_line(report.name)}, by lm-evaluation-harness:\n{report.harness.table}", soft_wrap=True)
    if args.chart and tasks:
        for path in _draw(args.chart, tasks, reports):
            console.print(f"drew {path}", soft_wrap=True)
    report_json(args, _as_json(tasks, reports, _settings(args, options), with_details=args.details))
    if args.save:
        console.print(f"wrote {args.save}", soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------- what was asked for


@dataclass
class _Report:
    """What is known of one model so far."""

    name: str
    ref: str
    identity: Mapping[str, object]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    harness: HarnessRun | None = None

    @property
    def mean(self) -> Mean | None:
        return mean(list(self.figures.values()))


def _run_options(args: argparse.Namespace) -> RunOptions:
    check_range("--ctx", args.ctx, MIN_CTX)
    check_threads(args.threads)
    check_range("--limit", args.limit, 1)
    check_range("--max-tokens", args.max_tokens, 1)
    return RunOptions(ctx=args.ctx, threads=args.threads, offload=device_options(args))


def _tasks(args: argparse.Namespace) -> list[Task]:
    tasks = read_tasks(args.tasks)
    if args.domains:
        recipe = _recipe(args.domains, args)
        if not recipe.domains:
            raise UserError(f"recipe {recipe.name} names no domains", 'give it domains = { NAME = "file.jsonl" }')
        tasks += domain_tasks(read_domains(recipe.domains, recipe.folder))
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two tasks are called {', '.join(sorted(twice))}", "name one: --tasks NAME=FILE")
    return tasks


def _named(models: Sequence[str]) -> dict[str, str]:
    """Name → model, in order: the file's stem, or the whole of it where two share a stem."""
    stems = [Path(model).stem for model in models]
    return {stem if stems.count(stem) == 1 else model: model for stem, model in zip(stems, models, strict=True)}


def _settings(args: argparse.Namespace, options: RunOptions) -> dict[str, object]:
    """All that outcomes depend on, beside the model and the task."""
    versions = [__version__, version("llama-cpp-python")]
    return {"engine": args.engine, "ctx": options.ctx, "max_tokens": args.max_tokens, "versions": versions}


# ----------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class _EngineKind:
    """How a model is found, before anything is loaded, and opened. `identity` tells one model from another; it raises
    UserError where there is none."""

    identity: Callable[[str, argparse.Namespace], Mapping[str, object]]
    open: Callable[[str, argparse.Namespace, RunOptions], AbstractContextManager[Engine]]


class _Asked:
    """A model as `moegguf.measurement.scores` asks it; `score` and `generate_greedy` are `runtime.batch`'s, for it."""

    def __init__(self, model: Model | TorchEngine, score: Callable, generate_greedy: Callable) -> None:
        self._model, self._score, self._generate_greedy = model, score, generate_greedy
        self._template = chat_template(model.chat_template, model.vocab)
        self._end_of_turn = end_of_turn(self._template, model.vocab)
        self.n_ctx = model.n_ctx
        self.bos = next(iter(model.vocab.tokenize_prompt("")), None)

    def encode(self, record: Record) -> Encoded:
        """The record in tokens. A completion ends with its text: whether the model would stop there is not asked."""
        encoded = encode(self._model.vocab, self._template, record)
        if isinstance(record, Completion) and encoded.tokens[-1] == self._model.vocab.eos:
            return Encoded(encoded.tokens[:-1], encoded.n_prompt)
        return encoded

    def encode_prompt(self, record: Chat | Completion) -> list[int]:
        """The prompt alone: which token would span its end, were the answer behind it, is not the model's to know."""
        if isinstance(record, Completion):
            return self._model.vocab.tokenize_prompt(record.prompt)
        return self._model.vocab.tokenize_prompt(self._template.prompt([asdict(each) for each in record.messages[:-1]]))

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[Scored]:
        return self._score(sequences, starts)

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[int, str]]:
        vocab = self._model.vocab
        for i, tokens in self._generate_greedy(prompts, max_tokens, self._ends):
            yield i, b"".join(map(vocab.piece, tokens)).decode("utf-8", errors="replace")

    def _ends(self, token: int) -> bool:
        return token == self._end_of_turn or self._model.vocab.ends_answer(token)


@contextmanager
def _open_llama(ref: str, args: argparse.Namespace, options: RunOptions) -> Iterator[Engine]:
    with open_model(ref, options) as model:
        yield _Asked(model, partial(score, model), partial(generate_greedy, model))


@contextmanager
def _open_torch(ref: str, args: argparse.Namespace, options: RunOptions) -> Iterator[Engine]:
    recipe = _recipe(ref, args)
    engine = open_engine(recipe, open_checked(recipe), ctx=options.ctx, threads=options.threads)
    yield _Asked(engine, engine.score, engine.generate_greedy)


def _identify_recipe(ref: str, args: argparse.Namespace) -> dict[str, object]:
    recipe = _recipe(ref, args)
    return identity(recipe, open_checked(recipe))


def _recipe(name: str, args: argparse.Namespace) -> Recipe:
    return load_recipe(name, args.recipes or find_recipes_file(), {})


def _identify_gguf(ref: str, args: argparse.Namespace) -> dict[str, object]:
    return file_identity(read_header(Path(ref)))


_ENGINES = {
    "llama": _EngineKind(_identify_gguf, _open_llama),
    "torch": _EngineKind(_identify_recipe, _open_torch),
}


def _reports(args: argparse.Namespace) -> list[_Report]:
    """One for each model. Raises one UserError for all that are none, before the first is loaded."""
    reports: list[_Report] = []
    faults: list[UserError] = []
    for name, ref in _named(args.models).items():
        try:
            reports.append(_Report(name, ref, _ENGINES[args.engine].identity(ref, args)))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return reports


# ------------------------------------------------------------------------------------------------ asking


def _measure(args: argparse.Namespace, options: RunOptions, tasks: Sequence[Task], reports: Sequence[_Report]) -> None:
    """Fill the figures of `reports`. What is kept already is not asked again."""
    folder = args.cache or cache_folder("eval")
    n_total = len(reports) * sum(len(task.items) for task in tasks)
    n_known = 0
    try:
        with counted("", n_total, "items") as bar:
            for report in reports:
                for task, n_more in _ask(args, options, report, tasks, folder):
                    n_known += n_more
                    bar.says(f"{report.name}  {task.name}")
                    bar.did(n_more)
    except KeyboardInterrupt:
        print(f"{n_known} of {n_total} outcomes are kept in {folder}: the same command goes on there", file=sys.stderr)
        raise


def _ask(
    args: argparse.Namespace, options: RunOptions, report: _Report, tasks: Sequence[Task], folder: Path
) -> Iterator[tuple[Task, int]]:
    """(task, how many more of its outcomes are known), as they come; fills `report` task by task."""
    depends_on = {"model": dict(report.identity), **_settings(args, options)}
    with Ledger(folder, depends_on, fresh=args.fresh) as ledger, ExitStack() as stack:
        engine: Engine | None = None
        for task in tasks:
            known = ledger.outcomes(task)
            yield task, len(known)
            if todo := [i for i in range(len(task.items)) if i not in known]:
                engine = engine or stack.enter_context(_ENGINES[args.engine].open(report.ref, args, options))
                for i, outcome in outcomes(engine, task, todo, args.max_tokens):
                    ledger.add(task.metric, task.items[i], outcome)
                    known[i] = outcome
                    yield task, 1
            report.outcomes[task.name] = [known[i] for i in range(len(task.items))]
            report.figures[task.name] = figure(task.metric, report.outcomes[task.name])


def _harness(args: argparse.Namespace, options: RunOptions, report: _Report) -> HarnessRun:
    with open_model(report.ref, options) as model, CompletionServer(model) as server:
        return run_harness(
            server.url, args.harness, model.n_ctx, name=report.name, folder=args.harness_path, limit=args.limit,
            show_progress=sys.stderr.isatty(),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------- results


def _print(console: Console, tasks: Sequence[Task], reports: Sequence[_Report]) -> None:
    heads = [f"{one_line(task.name)}\n{task.metric}\n{_count(task, reports)}" for task in tasks]
    if reports[0].mean:
        heads.append("mean")
    columns = [Column(head, justify="right", no_wrap=True) for head in heads]
    table = Table(Column("model", overflow="fold"), *columns, box=None, pad_edge=False)
    between = "\n" if sys.stdout.isatty() else " "  # in a pipe a model is a line
    for report in reports:
        cells = [_cell(report.figures[task.name]) for task in tasks]
        if report.mean:
            cells.append([f"{100 * report.mean.value:.1f}", _limits(report.mean.interval, 100)])
        table.add_row(one_line(report.name), *(between.join(filter(None, cell)) for cell in cells))
    console.print(table)
    console.print("accuracies in per cent; in brackets: 95 % confidence intervals")
    is_fine = sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower()
    for line in _bars(tasks, reports, _fine_bar if is_fine else _plain_bar):
        console.print(line)


def _count(task: Task, reports: Sequence[_Report]) -> str:
    if task.metric.is_accuracy:
        return f"n={len(task.items)}"
    return f"{reports[0].figures[task.name].n} tokens"


def _cell(figure: Figure) -> list[str]:
    if not figure.metric.is_accuracy:
        return [f"{figure.value:.4g}", _limits(figure.interval, 1, ".4g")]
    by_length = "" if figure.value_by_length is None else f"by length {100 * figure.value_by_length:.1f}"
    return [f"{100 * figure.value:.1f}", _limits(figure.interval, 100), by_length]


def _limits(interval: Interval | None, scale: float, form: str = ".1f") -> str:
    return "" if interval is None else "[" + ", ".join(format(scale * limit, form) for limit in interval) + "]"


def _bars(tasks: Sequence[Task], reports: Sequence[_Report], bar: Callable[[float], str]) -> Iterator[str]:
    """The accuracies as horizontal bars, one group per task."""
    width = max(len(one_line(report.name)) for report in reports)
    for task in tasks:
        if task.metric.is_accuracy:
            yield f"\n{one_line(task.name)}"
            for report in reports:
                share = report.figures[task.name].value
                yield f"  {one_line(report.name):<{width}}  {bar(share):<{BAR_WIDTH}} {100 * share:5.1f}"


def _fine_bar(share: float) -> str:
    eighths = round(8 * BAR_WIDTH * share)
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]


def _plain_bar(share: float) -> str:
    return "#" * round(BAR_WIDTH * share)


def _draw(path: Path, tasks: Sequence[Task], reports: Sequence[_Report]) -> list[Path]:
    """Bars of the accuracies, and of the perplexities in a figure of their own where there are both."""
    accuracies = [task.name for task in tasks if task.metric.is_accuracy]
    perplexities = [task.name for task in tasks if not task.metric.is_accuracy]
    second = path.with_stem(f"{path.stem}-perplexity") if accuracies else path
    if accuracies:
        _draw_bars(path, "right, per cent", accuracies, reports, 100)
    if perplexities:
        _draw_bars(second, "perplexity", perplexities, reports, 1)
    return [path] * bool(accuracies) + [second] * bool(perplexities)


def _draw_bars(path: Path, label: str, names: Sequence[str], reports: Sequence[_Report], scale: int) -> None:
    from moegguf.measurement.plots import bar_chart

    figures: dict[str, list[Figure | Mean]] = {
        report.name: [report.figures[name] for name in names] for report in reports
    }
    for report in reports:
        if report.mean and label != "perplexity":
            figures[report.name].append(report.mean)
    bar_chart(
        path,
        "",
        [*names, *["mean"] * (len(figures[reports[0].name]) - len(names))],
        {name: [scale * each.value for each in row] for name, row in figures.items()},
        {name: _reach(row, scale) for name, row in figures.items()},
        label,
    )


def _reach(figures: Sequence[Figure | Mean], scale: float) -> tuple[list[float], list[float]]:
    """How far the interval of each figure reaches down and up; nothing where there is none."""
    ends = [(each.value, *(each.interval or (each.value, each.value))) for each in figures]
    return [scale * (value - low) for value, low, _ in ends], [scale * (high - value) for value, _, high in ends]


def _as_json(
    tasks: Sequence[Task], reports: Sequence[_Report], settings: Mapping[str, object], *, with_details: bool
) -> dict:
    models = []
    for report in reports:
        model: dict[str, object] = {"name": report.name, **report.identity}
        model["tasks"] = {name: _figure_as_json(each) for name, each in report.figures.items()}
        if report.mean:
            model["mean"] = {"value": report.mean.value, "ci": report.mean.interval}
        if with_details:
            model["items"] = {
                task.name: [
                    {"where": item.where, **asdict(outcome)}
                    for item, outcome in zip(task.items, report.outcomes[task.name], strict=True)
                ]
                for task in tasks
            }
        if report.harness:
            model["harness"] = report.harness.results
        models.append(model)
    return {"settings": dict(settings), "models": models}


def _figure_as_json(each: Figure) -> dict:
    fields = {"metric": each.metric, "value": each.value, "n": each.n, "ci": each.interval}
    return fields | ({"value_by_length": each.value_by_length} if each.metric is Metric.CHOICE else {})
