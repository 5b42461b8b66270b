"""What `moegguf eval` and `moegguf measure` wrote, as tables of Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moegguf.errors import UserError
from moegguf.sizes import show_size

Table = list[list[str]]
"""Rows of cells, the head first."""


def results_table(path: Path) -> Table:
    """The results in a file that `eval --json` or `measure --json` wrote. Raises UserError for any other."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    except (ValueError, RecursionError):
        content = None
    try:
        return _divergences(content) if "reference" in content else _scores(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        mend = "pass what `moegguf eval --json` or `moegguf measure --json` wrote"
        raise UserError(f"{path}: holds no results of moegguf", mend) from None


def _scores(content: dict) -> Table:
    """A row a model, a column a task: accuracies in per cent, perplexities as they are."""
    models = content["models"]
    tasks = {name: figure["metric"] for name, figure in models[0]["tasks"].items()}
    has_mean = "mean" in models[0]
    head = ["model", *(f"{name} ({metric})" for name, metric in tasks.items()), *["mean"] * has_mean]
    rows = [
        [model["name"], *(_score(model["tasks"][name]) for name in tasks)]
        + ([_number(model["mean"]["value"], model["mean"]["ci"], 100)] if has_mean else [])
        for model in models
    ]
    return [head, *rows]


def _score(figure: dict) -> str:
    return _number(figure["value"], figure["ci"], 1 if figure["metric"] == "perplexity" else 100)


def _divergences(content: dict) -> Table:
    head = ["model", "size", f"KLD from {Path(content['reference']).name}, nats", "same likeliest token", "perplexity"]
    rows = []
    for model in content["models"]:
        overall = model["overall"]
        kld, top1, perplexity = overall["kld"], overall["top1"], overall["perplexity"]
        error = "" if kld["error"] is None else f" ± {kld['error']:.1g}"
        rows.append([
            model["name"], show_size(model["bytes"]),
            f"{kld['mean']:.3g}{error}", f"{top1['share']:.2%}", f"{perplexity['value']:.4g}",
        ])  # fmt: skip
    return [head, *rows]


def _number(value: float, interval: Sequence[float] | None, scale: int) -> str:
    """A figure with its 95 % confidence interval."""
    limits = "" if interval is None else " ({:.4g} to {:.4g})".format(*(scale * limit for limit in interval))
    return f"{scale * value:.4g}{limits}"
