"""Figures of models as bars: accuracies in per cent with their mean, and perplexities in a chart of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moegguf.measurement.results import Figure, Mean, mean

_BARS = {True: ("right, per cent", 100), False: ("perplexity", 1)}
"""Of accuracies, and of what is none: the label, and what figures are multiplied with."""

Figures = Mapping[str, Figure]
"""By task."""


def chart_files(path: Path, are_accuracies: Iterable[bool]) -> dict[bool, Path]:
    """Where accuracies go, and where what is none: into `path`, where there are both into a second file beside it."""
    kinds = sorted(set(are_accuracies), reverse=True)
    return dict(zip(kinds, (path, path.with_stem(f"{path.stem}-perplexity")), strict=False))


def draw(path: Path, scores: Mapping[str, Figures]) -> list[Path]:
    """Draw the figures of models by name, all of the same tasks; the files. Raises UserError."""
    is_accuracy = {task: figure.metric.is_accuracy for task, figure in next(iter(scores.values())).items()}
    files = chart_files(path, is_accuracy.values())
    for kind, file in files.items():
        _draw_bars(file, kind, [task for task in is_accuracy if is_accuracy[task] is kind], scores)
    return list(files.values())


def _draw_bars(path: Path, is_accuracy: bool, tasks: Sequence[str], scores: Mapping[str, Figures]) -> None:
    from moegguf.measurement.plots import bar_chart

    label, scale = _BARS[is_accuracy]
    rows: dict[str, list[Figure | Mean]] = {model: [each[task] for task in tasks] for model, each in scores.items()}
    has_mean = is_accuracy and len(tasks) > 1
    if has_mean:
        rows = {model: [*row, mean(row)] for model, row in rows.items()}
    bar_chart(
        path,
        "",
        [*tasks, *["mean"] * has_mean],
        {model: [scale * each.value for each in row] for model, row in rows.items()},
        {model: _reach(row, scale) for model, row in rows.items()},
        label,
    )


def _reach(figures: Sequence[Figure | Mean], scale: float) -> tuple[list[float], list[float]]:
    """How far the interval of each figure reaches down and up; nothing where there is none."""
    ends = [(each.value, *(each.interval or (each.value, each.value))) for each in figures]
    return [scale * (value - low) for value, low, _ in ends], [scale * (high - value) for value, _, high in ends]
