"""Figures of measurements: grouped bars, heat maps, curves, written as PNG, SVG or PDF.

Each function draws one figure from plain numbers and writes it whole or not at all. Colours are those of Okabe and
Ito ("Color Universal Design", 2008), and `cividis` (Nuñez, Anderton, Renslow 2018) for heat: both can be told apart
with any colour vision, and in grey. A file holds neither a date nor a version, so equal numbers give equal bytes
under one matplotlib.

matplotlib is an extra (`plot`), imported when a figure is drawn, and only its object interface: no window, no
backend to choose, nothing global left changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np

from moegguf.atomic import atomic_file
from moegguf.errors import UserError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
HATCHES = ("", "///", "...")
DASHES = ("-", "--", ":")
"""Beyond eight series the colours come again, with another hatch or dash."""

MAX_ANNOTATED = 200
"""Cells of a panel up to which each cell shows its number."""
MAX_TICKS = 20
PANELS_PER_ROW = 4

_METADATA = {
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""The formats, and what each must leave out to be the same every time."""

_STYLE = {
    "text.parse_math": False,  # names of models and files may hold dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "moegguf",
}


def bar_chart(
    path: Path,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float] | Sequence[Sequence[float]]] | None = None,
    y_label: str = "",
) -> None:
    """Write a chart with one cluster of bars per group and one colour per series.

    `series` maps a name to one value a group; NaN leaves its place empty. `errors` maps a name to half-widths, one a
    group, or to a pair of lists: how far the bar reaches down, and up. Raises UserError.
    """
    errors = errors or {}
    inches = min(max(5.0, 1.2 + 0.28 * len(groups) * (len(series) + 1)), 16.0)
    with _figure(path, title, (inches, 3.4)) as figure:
        axes = figure.subplots()
        centres, width = np.arange(len(groups)), 0.84 / max(1, len(series))
        for i, (name, (hatch, colour)) in enumerate(zip(series, _repeated(HATCHES, len(series)), strict=True)):
            axes.bar(
                centres + (i - (len(series) - 1) / 2) * width, series[name], 0.92 * width, label=name,
                color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                yerr=np.asarray(errors[name]) if name in errors else None,
                error_kw={"ecolor": "#333333", "elinewidth": 0.9, "capsize": min(3.0, 8 * width)},
            )  # fmt: skip
        axes.set_xticks(centres, groups)
        _slant_if_crowded(axes, groups, inches)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if len(series) > 1:
            _legend_outside(axes)


def heat_map(
    path: Path,
    title: str,
    panels: Mapping[str, np.ndarray],
    columns: Sequence[str],
    rows: Sequence[str] | None = None,
    *,
    value_label: str = "share of tokens",
    y_label: str = "layer",
    x_label: str = "expert",
    across: int = PANELS_PER_ROW,
) -> None:
    """Write one panel per entry of `panels`, at most `across` side by side, all on one colour scale from 0 to 1.

    `panels` maps a name to an array (n_rows, n_columns), row 0 on top; `rows` are the names of the rows, by default
    their numbers. Small panels show their numbers. Raises UserError.
    """
    n_rows, n_columns = next(iter(panels.values())).shape
    rows = [str(i) for i in range(n_rows)] if rows is None else rows
    across = min(len(panels), across)
    down = ceil(len(panels) / across)
    is_annotated = n_rows * n_columns <= MAX_ANNOTATED
    panel_width = min(max(1.8, (0.42 if is_annotated else 0.2) * n_columns), 6.0)
    panel_height = min(max(1.4, (0.26 if is_annotated else 0.13) * n_rows), 7.0)
    size = (1.6 + across * (panel_width + 0.35), 0.5 + down * (panel_height + 0.9))
    with _figure(path, title, size) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes, (name, values) in zip(grid.flat, panels.items(), strict=False):
            image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_title(name)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            if is_annotated:
                _annotate(axes, values)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        axes = grid[0, 0]
        axes.set_xticks(*_thinned(columns))
        axes.set_yticks(*_thinned(rows))
        for axes in grid.flat[: len(panels)][-across:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(x_label)
            _slant_if_crowded(axes, columns[:: _step(len(columns))], panel_width)
        for axes in grid[:, 0]:
            axes.set_ylabel(y_label)
        figure.colorbar(image, ax=grid, label=value_label, fraction=0.05, pad=0.02).outline.set_visible(False)


def curves(
    path: Path,
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
) -> None:
    """Write lines: `series` maps a name to its xs and ys. NaN interrupts a line. Raises UserError."""
    with _figure(path, title, (6.0, 3.6)) as figure:
        axes = figure.subplots()
        for name, (dash, colour) in zip(series, _repeated(DASHES, len(series)), strict=True):
            xs, ys = series[name]
            axes.plot(xs, ys, dash, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) == 1 else None)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        if len(series) > 1:
            _legend_outside(axes)


def require(path: Path) -> None:
    """Raises UserError when no figure can be written to a file of that name here; ask before a long measurement."""
    if Path(path).suffix.lower() not in _METADATA:
        raise UserError(f"{path}: not a name for a figure", f"end it in {', '.join(_METADATA)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path}: figures are drawn with matplotlib, which is not installed here",
            "run: pip install 'moegguf[plot]'",
        ) from error


@contextmanager
def _figure(path: Path, title: str, inches: tuple[float, float]):
    """An empty figure that is written to `path` when the block ends well."""
    require(path)
    import matplotlib
    from matplotlib.figure import Figure

    suffix = Path(path).suffix.lower()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        figure.suptitle(title)
        yield figure
        with atomic_file(Path(path)) as file:
            figure.savefig(file, format=suffix[1:], dpi=200, metadata=_METADATA[suffix])


def _repeated(marks: Sequence[str], n: int) -> list[tuple[str, str]]:
    """`n` pairs of a mark and a colour, as different as there are; the first eight share the first mark."""
    pairs = list(product(marks, COLOURS))
    return [pairs[i % len(pairs)] for i in range(n)]


def _legend_outside(axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _slant_if_crowded(axes, labels: Sequence[str], inches: float) -> None:
    """Turn the labels of the x axis where side by side they would overlap."""
    inches_a_character = 0.085
    if labels and max(map(len, labels)) * inches_a_character > inches / len(labels):
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def _step(n: int) -> int:
    return ceil(n / MAX_TICKS)


def _thinned(labels: Sequence[str]) -> tuple[range, Sequence[str]]:
    """Positions and texts of at most MAX_TICKS ticks."""
    step = _step(len(labels))
    return range(0, len(labels), step), labels[::step]


def _annotate(axes, values: np.ndarray) -> None:
    """Write each cell's value in per cent, light on dark and dark on light."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color="white" if value < 0.55 else "black",
            )  # fmt: skip
