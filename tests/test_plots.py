"""Figures: they are written whole, equal numbers give equal bytes, and every value is where it belongs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moegguf.errors import UserError
from moegguf.measurement import plots

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

SHARES = np.array([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]])


def bars(path: Path) -> None:
    plots.bar_chart(
        path,
        "Accuracy",
        ["math", "text"],
        {"base": [0.2, 0.4], "mix": [0.6, float("nan")]},
        {"mix": [0.1, 0.1]},
        "share",
    )


def heat(path: Path) -> None:
    plots.heat_map(path, "Top expert", {"math": SHARES, "text": SHARES[::-1]}, ["e0", "e1"])


def lines(path: Path) -> None:
    plots.curves(path, "Loss", {"router": ([0, 1, 2], [3.0, 2.0, 1.0]), "one": ([1], [2.0])}, "step", "nats")


FIGURES = pytest.mark.parametrize("draw", [bars, heat, lines])


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> Callable[[Callable[[Path], None]], Figure]:
    """`drawn(draw)`: the figure that `draw` would write, laid out, as matplotlib holds it."""

    def capture(draw) -> Figure:
        figures = []
        monkeypatch.setattr(
            Figure, "savefig", lambda self, *args, **kw: (figures.append(self), self.draw_without_rendering())
        )
        draw(tmp_path / "captured.png")
        return figures[0]

    return capture


@FIGURES
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_numbers_give_equal_bytes(tmp_path, draw, suffix):
    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    draw(first)
    draw(second)
    assert first.read_bytes() == second.read_bytes()


@FIGURES
def test_a_figure_is_a_picture_that_shows_something_and_leaves_nothing_beside_it(tmp_path, draw):
    draw(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_a_bar_stands_for_its_value(drawn):
    axes = drawn(bars).axes[0]
    heights = [[bar.get_height() for bar in cluster] for cluster in axes.containers if hasattr(cluster, "patches")]
    assert np.allclose(heights, [[0.2, 0.4], [0.6, np.nan]], equal_nan=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["math", "text"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "mix"]


def test_bars_of_many_series_do_not_touch_the_next_cluster_and_all_look_different(drawn):
    n = 20
    draw = lambda path: plots.bar_chart(path, "", ["a", "b"], {f"s{i}": [1, 1] for i in range(n)})  # noqa: E731
    patches = drawn(draw).axes[0].patches
    lefts, rights = zip(*sorted((p.get_x(), p.get_x() + p.get_width()) for p in patches), strict=True)
    assert all(right <= left for right, left in zip(rights, lefts[1:], strict=False))
    assert len({(p.get_facecolor(), p.get_hatch()) for p in patches}) == n


def test_a_cell_shows_its_share_on_a_scale_from_0_to_1(drawn):
    figure = drawn(heat)
    math, text = figure.axes[:2]
    assert np.array_equal(math.images[0].get_array(), SHARES)
    assert np.array_equal(text.images[0].get_array(), SHARES[::-1])
    assert all(axes.images[0].get_clim() == (0, 1) for axes in (math, text))
    assert [cell.get_text() for cell in math.texts] == ["10", "90", "50", "50", "100", "0"]
    assert [label.get_text() for label in math.get_yticklabels()] == ["0", "1", "2"]


def test_large_maps_thin_out_their_labels_and_numbers(drawn):
    draw = lambda path: plots.heat_map(path, "", {"d": np.zeros((60, 128))}, [str(i) for i in range(128)])  # noqa: E731
    axes = drawn(draw).axes[0]
    assert not axes.texts
    assert len(axes.get_xticks()) <= plots.MAX_TICKS >= len(axes.get_yticks())
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(t) for t in axes.get_yticks()]


@pytest.mark.parametrize("n_panels", [1, 4, 5, 7])
def test_every_panel_of_a_map_is_shown_with_its_name(drawn, n_panels):
    names = [f"d{i}" for i in range(n_panels)]
    draw = lambda path: plots.heat_map(path, "", dict.fromkeys(names, SHARES), ["e0", "e1"])  # noqa: E731
    panels = [axes for axes in drawn(draw).axes if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in panels] == names


def test_a_name_with_dollar_signs_is_no_formula(drawn):
    figure = drawn(lambda path: plots.curves(path, "a $\\frac$ b", {"$x$": ([0, 1], [0, 1])}, "$", "$"))
    assert figure.get_suptitle() == "a $\\frac$ b"


def test_another_suffix_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match=r"figure\.xyz.*\.png, \.svg, \.pdf"):
        bars(tmp_path / "figure.xyz")


def test_without_matplotlib_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'moegguf\[plot\]'"):
        bars(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        bars(tmp_path / "missing" / "figure.png")


def test_drawing_changes_no_setting_of_matplotlib_and_opens_no_window(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = matplotlib.rcParams.copy()
    heat(tmp_path / "figure.png")
    assert matplotlib.rcParams.copy() == before
