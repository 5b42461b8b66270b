"""`moegguf eval`: how well models do on tasks, side by side.

Every outcome is kept on disk as it comes, so an evaluation that was stopped goes on where it was, and one that is
asked for again costs nothing. Standard benchmarks run through lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import (
    add_device_arguments,
    add_json_and_save,
    add_recipes,
    add_threads,
    check_save,
    device_options,
    report_json,
)
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import UserError, one_line
from moegguf.jobs.engines import ENGINES, LLAMA, by_name
from moegguf.jobs.evaluation import (
    EvalOptions,
    Evaluation,
    EvaluationPlan,
    check_chart,
    plan_evaluation,
    run_benchmarks,
    run_evaluation,
    tasks_of,
)
from moegguf.measurement.harness import Benchmarks
from moegguf.measurement.results import Figure, Interval
from moegguf.measurement.tasks import Task
from moegguf.texts import named_ref

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
        "--tasks", nargs="+", action="extend", default=[], metavar="FILE",
        help="tasks: FILE, NAME=FILE, or demo:DOMAIN/heldout#N",
    )  # fmt: skip
    what.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe as tasks")
    add_recipes(what)
    what.add_argument(
        "--harness", metavar="TASKS", help="benchmarks by their names in lm-evaluation-harness, commas between"
    )
    what.add_argument("--harness-path", type=Path, metavar="FOLDER", help="folder of harness tasks of your own (YAML)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    out = parser.add_argument_group("results")
    add_json_and_save(out)
    out.add_argument("--details", action="store_true", help="with --json or --save: what each model did on each item")
    out.add_argument("--chart", type=Path, metavar="FILE", help="draw them as bars (.png, .svg, .pdf)")
    out.add_argument("--force", action="store_true", help="replace what --save and --chart name if it exists")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default=LLAMA,
        help="torch: MODELs are recipes, run in PyTorch (default: llama)",
    )
    how.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer (default: as the tasks need)")
    how.add_argument("--ctx", type=int, metavar="N", help="context in tokens (default: the model's, at most 4096)")
    add_threads(how)
    how.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="where outcomes are kept (default: ~/.cache/moegguf/eval)"
    )
    how.add_argument("--fresh", action="store_true", help="ask everything again, whatever is kept")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Ask every model every task that it was not asked before; print, draw and write what came out."""
    plan = _plan(args)
    out = console(args)
    found = run_benchmarks(plan, _ask(plan), show_progress=sys.stderr.isatty())
    report_json(args, found.as_json(details=args.details))  # kept before a reader of the tables may leave
    if plan.tasks:
        _print(out, found)
    for model in found.models if plan.benchmarks else ():
        out.print(f"{one_line(model.name)}, by lm-evaluation-harness:\n{model.harness.table}")
    for path in found.draw(args.chart, overwrite=args.force) if args.chart else ():
        out.print(f"drew {path}")
    if args.save:
        out.print(f"wrote {args.save}")
    return 0


def _plan(args: argparse.Namespace) -> EvaluationPlan:
    """What is asked for. Raises UserError for all that can be known before it starts."""
    options = EvalOptions(
        engine=args.engine, recipes=args.recipes, max_tokens=args.max_tokens, ctx=args.ctx, threads=args.threads,
        offload=device_options(args), cache=args.cache, fresh=args.fresh,
    )  # fmt: skip
    if args.details and not (args.json or args.save):
        raise UserError("--details is part of the JSON", "pass --json, or --save FILE")
    if args.chart and not (args.tasks or args.domains):
        raise UserError("--chart draws --tasks and --domains, not benchmarks", "leave it out, or give it tasks")
    refs = [named_ref(task) for task in args.tasks]
    tasks = tasks_of(refs, domains=args.domains, recipes=args.recipes, limit=args.limit)
    benchmarks = Benchmarks(args.harness, args.harness_path, args.limit) if args.harness else None
    plan = plan_evaluation(by_name(args.models), tasks, options, benchmarks=benchmarks)
    check_save(args, [*args.models, *(ref for _, ref in refs)])
    if args.chart:
        check_chart(args.chart, tasks, args.force)
    return plan


def _ask(plan: EvaluationPlan) -> Evaluation:
    try:
        return run_evaluation(plan, shown)
    except KeyboardInterrupt as interrupt:
        print(*getattr(interrupt, "__notes__", ()), sep="\n", file=sys.stderr)
        raise


def _print(out: Console, found: Evaluation) -> None:
    models, tasks = found.models, found.tasks
    heads = [f"{one_line(task.name)}\n{task.metric}\n{_count(task, found)}" for task in tasks]
    if models[0].mean:
        heads.append("mean")
    columns = [Column(head, justify="right", no_wrap=True) for head in heads]
    table = Table(Column("model", overflow="fold"), *columns, box=None, pad_edge=False)
    between = "\n" if sys.stdout.isatty() else " "  # in a pipe a model is a line
    for model in models:
        cells = [_cell(model.figures[task.name]) for task in tasks]
        if model.mean:
            cells.append([f"{100 * model.mean.value:.1f}", _limits(model.mean.interval, 100)])
        table.add_row(one_line(model.name), *(between.join(filter(None, cell)) for cell in cells))
    out.print(table)
    has_accuracies = any(task.metric.is_accuracy for task in tasks)
    out.print(f"{'accuracies in per cent; ' * has_accuracies}in brackets: 95 % confidence intervals")
    is_fine = sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower()
    for line in _bars(found, _fine_bar if is_fine else _plain_bar):
        out.print(line)


def _count(task: Task, found: Evaluation) -> str:
    if task.metric.is_accuracy:
        return f"n={len(task.items)}"
    return f"{found.models[0].figures[task.name].n} tokens"


def _cell(figure: Figure) -> list[str]:
    if not figure.metric.is_accuracy:
        return [f"{figure.value:.4g}", _limits(figure.interval, 1, ".4g")]
    by_length = "" if figure.value_by_length is None else f"by length {100 * figure.value_by_length:.1f}"
    return [f"{100 * figure.value:.1f}", _limits(figure.interval, 100), by_length]


def _limits(interval: Interval | None, scale: float, form: str = ".1f") -> str:
    return "" if interval is None else "[" + ", ".join(format(scale * limit, form) for limit in interval) + "]"


def _bars(found: Evaluation, bar: Callable[[float], str]) -> Iterator[str]:
    """The accuracies as horizontal bars, one group per task."""
    width = max(len(one_line(model.name)) for model in found.models)
    for task in found.tasks:
        if task.metric.is_accuracy:
            yield f"\n{one_line(task.name)}"
            for model in found.models:
                share = model.figures[task.name].value
                yield f"  {one_line(model.name):<{width}}  {bar(share):<{BAR_WIDTH}} {100 * share:5.1f}"


def _fine_bar(share: float) -> str:
    eighths = round(8 * BAR_WIDTH * share)
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]


def _plain_bar(share: float) -> str:
    return "#" * round(BAR_WIDTH * share)
