"""Outcomes on disk as they come, so that an evaluation that was stopped goes on where it was.

One JSONL file per model and settings, in a folder; its name is a digest of both, so a changed model or setting finds
another file. In it each outcome stands under a digest of its item. Old outcomes are never believed of new things, and
asking for more items, or for other tasks with the same ones, costs only what is new. Lines are appended: one that a
crash cut short is no JSON, and that item is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from moegguf.errors import UserError
from moegguf.measurement.scores import Answered, Chosen, Outcome, Weighed
from moegguf.measurement.tasks import Item, Metric, Task

_KINDS = {Metric.EXACT_MATCH: Answered, Metric.CHOICE: Chosen, Metric.PERPLEXITY: Weighed}


class Ledger:
    """The outcomes of one model. Close it, or use it as a context manager."""

    def __init__(self, folder: Path, depends_on: Mapping[str, object], *, fresh: bool = False) -> None:
        """`depends_on`: the model and the settings, in JSON's types; `fresh`: forget what was kept.

        Raises UserError when the file cannot be written.
        """
        self.path = folder / f"{_digest(dict(depends_on))}.jsonl"
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            self._kept = {} if fresh or not self.path.exists() else dict(_read(self.path))
            self._file = open(self.path, "w" if fresh else "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            if self._file.tell():
                self._file.write("\n")  # after a line that was cut short

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        with self._written():
            self._file.close()

    def outcomes(self, task: Task) -> dict[int, Outcome]:
        """Number of the item → its outcome, for those items of `task` that have one."""
        found = {i: self._outcome(task.metric, item) for i, item in enumerate(task.items)}
        return {i: outcome for i, outcome in found.items() if outcome is not None}

    def add(self, metric: Metric, item: Item, outcome: Outcome) -> None:
        """Keep an outcome, on disk too. Raises UserError."""
        with self._written():
            self._file.write(json.dumps({"item": _item_digest(metric, item), **asdict(outcome)}) + "\n")
            self._file.flush()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Within this block something is done to the file."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror})", "choose another folder with --cache"
            ) from error

    def _outcome(self, metric: Metric, item: Item) -> Outcome | None:
        fields = self._kept.get(_item_digest(metric, item))
        try:
            return None if fields is None else _KINDS[metric](**fields)
        except TypeError:
            return None


def _read(path: Path) -> Iterator[tuple[str, dict]]:
    """(digest of an item, fields of its outcome) of every line that is whole."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fields = json.loads(line)
            key = fields.pop("item")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        yield key, {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _item_digest(metric: Metric, item: Item) -> str:
    """Of what is asked, wherever it stands."""
    return _digest([metric, type(item).__name__, _without_places(asdict(item))])


def _without_places(value: object) -> object:
    match value:
        case dict():
            return {key: _without_places(each) for key, each in value.items() if key != "where"}
        case list() | tuple():
            return [_without_places(each) for each in value]
    return value


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
