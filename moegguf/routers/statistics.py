"""What is kept of activations, so that a router can be fitted again, or an expert added, without the old text.

For every expert a group: how many vectors it saw and their mean in each layer. A vector is a token's router input
(ridge) or a whole prompt's state (hidden, where an expert may have a second group for its negative prompts). Ridge
also needs second moments, but only in sum: `gram` is Σ over groups of XᵀX / n. So another expert is its own text
run once, and an old expert can be neither extended nor taken out: its share of `gram` is not known any more.

`gram` is symmetric, so one triangle is kept, and it is kept in float64: rounding in float32 is of the order of a
usual ridge λ, and with fewer tokens than dimensions λ is all that makes the sum invertible. That is
n_layer · n_embd² · 4 bytes: 2.1 GB for a model of 32 layers of 4096.

The file is safetensors, written piece by piece because of that size, with strings that say what it is of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import safetensors

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.recipe import FITTED, Pool, RouterMode, Tap
from moegguf.routers.safetensors_head import safetensors_head

FORMAT, VERSION = "moegguf-router-statistics", "1"
_GRAM, _MEAN, _NEGATIVE = "gram", "mean/", "negative/"
"""Names of arrays: the last two go before an expert's name."""
_MEND = "pass another --statistics file, or delete this one and fit from all texts"
_ROWS_AT_ONCE = 1024
"""Bounds the float64 copy of a batch."""


@dataclass(frozen=True)
class Subject:
    """What statistics are of. Only statistics of equal subjects can be put together."""

    mode: RouterMode
    base: str
    """Label of the base model."""
    n_layer: int
    n_embd: int
    tap: Tap
    pool: Pool | None
    """None where every token counts."""

    @property
    def gram_bytes(self) -> int:
        """Memory and disk that the second moments take."""
        return 8 * self.n_layer * _triangle(self.n_embd) if self.mode is RouterMode.RIDGE else 0


@dataclass(frozen=True)
class Group:
    """The vectors of an expert: their number and, per layer, their mean, float64 (n_layer, n_embd)."""

    count: int
    n_tokens: int
    digest: str
    """Of the tokens, to know the same text again."""
    run_on: str
    """The file that gave the activations, and a digest of its header."""
    mean: np.ndarray = field(repr=False)


@dataclass
class Statistics:
    """Groups by expert, and for ridge the packed Gram sums, float64 (n_layer, n_embd · (n_embd + 1) / 2)."""

    subject: Subject
    groups: dict[str, Group] = field(default_factory=dict)
    negatives: dict[str, Group] = field(default_factory=dict)
    gram: np.ndarray | None = None

    @classmethod
    def empty(cls, subject: Subject) -> Statistics:
        has_gram = subject.mode is RouterMode.RIDGE
        gram = np.zeros((subject.n_layer, _triangle(subject.n_embd))) if has_gram else None
        return cls(subject, gram=gram)

    def open_group(
        self, expert: str, count: int, *, n_tokens: int, digest: str, run_on: str, negative: bool = False
    ) -> Group:
        """A new group of `count` vectors, to be given to `add` in any order and any portions."""
        mean = np.zeros((self.subject.n_layer, self.subject.n_embd))
        group = Group(count, n_tokens, digest, run_on, mean)
        groups = self.negatives if negative else self.groups
        if expert in groups:
            raise ValueError(f"the text of {expert} has been added already, and cannot be taken out")
        groups[expert] = group
        return group

    def add(self, group: Group, layer: int, x: np.ndarray) -> None:
        """Some of the vectors of `group` in one layer, (n, n_embd). Raises UserError when they are not finite."""
        if not np.isfinite(x).all():
            raise UserError(
                f"layer {layer}: the activations are not finite (NaN or Inf)",
                "`moegguf inspect --check` says whether the file is damaged; else fit on a model of finer quant",
            )
        for start in range(0, len(x), _ROWS_AT_ONCE):
            rows = x[start : start + _ROWS_AT_ONCE].astype(np.float64)
            group.mean[layer] += rows.sum(axis=0) / group.count
            if self.gram is not None:
                self.gram[layer] += (rows.T @ rows)[_upper(rows.shape[1])] / group.count

    def full_gram(self, layer: int) -> np.ndarray:
        """Σ over groups of XᵀX / n in one layer, float64 (n_embd, n_embd)."""
        upper = np.zeros((self.subject.n_embd, self.subject.n_embd))
        upper[_upper(self.subject.n_embd)] = self.gram[layer]
        return upper + np.triu(upper, 1).T


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _upper(n: int) -> np.ndarray:
    """A mask of the upper triangle, diagonal included: bool (n, n)."""
    return ~np.tri(n, k=-1, dtype=bool)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write `statistics` to `path`, whole or not at all."""
    groups = {_MEAN + name: group for name, group in statistics.groups.items()}
    groups |= {_NEGATIVE + name: group for name, group in statistics.negatives.items()}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "subject": json.dumps(asdict(statistics.subject)),
        "groups": json.dumps({name: _about(group) for name, group in groups.items()}),
    }
    arrays = {name: group.mean for name, group in groups.items()}
    if statistics.gram is not None:
        arrays[_GRAM] = statistics.gram
    arrays = {name: np.ascontiguousarray(array, "<f8") for name, array in arrays.items()}
    with atomic_file(path) as file:
        file.write(safetensors_head(about, arrays))
        for array in arrays.values():
            file.write(array.data)


def _about(group: Group) -> dict[str, object]:
    return {f.name: getattr(group, f.name) for f in fields(Group) if f.name != "mean"}


def read_statistics(path: Path, subject: Subject) -> Statistics:
    """The statistics in `path`. Raises UserError when it is no such file, damaged, or not of `subject`."""
    with _opened(path) as (file, about):
        found = _parse_subject(json.loads(about["subject"]))
        if found != subject:
            raise UserError(f"{path}: statistics of {_differences(found, subject)}", _MEND)
        return _statistics(subject, json.loads(about["groups"]), file)


def experts_in(path: Path) -> tuple[str, ...]:
    """The experts that the statistics in `path` know. Raises UserError when it is no such file, or damaged."""
    with _opened(path) as (_, about):
        return tuple(name.removeprefix(_MEAN) for name in dict(json.loads(about["groups"])) if name.startswith(_MEAN))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safetensors.safe_open, dict[str, str]]]:
    """The file and its strings. Whatever is wrong with what the block reads of it becomes a UserError."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(f"{path}: is a safetensors file, but no router statistics", _MEND)
            if about.get("version") != VERSION:
                raise UserError(f"{path}: statistics format {about.get('version')}, expected {VERSION}", _MEND)
            yield file, about
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})", "check the path") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is no intact safetensors file ({error})", _MEND) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is a damaged statistics file ({error!r})", _MEND) from error


def _parse_subject(values: dict) -> Subject:
    mode, pool = RouterMode(values["mode"]), values["pool"]
    if mode not in FITTED:
        raise ValueError(f"no statistics make a {mode} router")
    return Subject(
        mode, str(values["base"]), int(values["n_layer"]), int(values["n_embd"]), Tap(values["tap"]),
        None if pool is None else Pool(pool),
    )  # fmt: skip


def _differences(found: Subject, expected: Subject) -> str:
    pairs = [(name.replace("n_embd", "hidden size").replace("n_layer", "layers"), value, asdict(expected)[name])
             for name, value in asdict(found).items()]  # fmt: skip
    return ", ".join(f"{name} {value} (here: {other})" for name, value, other in pairs if value != other)


def _statistics(subject: Subject, about: Mapping[str, dict], file) -> Statistics:
    statistics = Statistics.empty(subject)
    for name, values in about.items():
        expert, is_negative = name.partition("/")[2], name.startswith(_NEGATIVE)
        known = {"count": int(values["count"]), "n_tokens": int(values["n_tokens"])}
        texts = {"digest": str(values["digest"]), "run_on": str(values["run_on"])}
        if min(known.values()) < 1:
            raise ValueError(f"{name} counts {min(known.values())}")
        group = statistics.open_group(expert, **known, **texts, negative=is_negative)
        group.mean[:] = _array(file, name, group.mean.shape)
    if statistics.gram is not None:
        statistics.gram = _array(file, _GRAM, statistics.gram.shape)
    return statistics


def _array(file, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = file.get_tensor(name)
    if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected finite float64 {shape}")
    return array
