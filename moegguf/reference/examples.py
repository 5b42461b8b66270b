"""What a router is trained on: texts as token sequences of bounded length, with what counts of each marked.

Where a text comes from does not matter here: `Example`s are made from records of `moegguf.texts` by whoever has a
tokenizer. The loss counts what follows `n_prompt`: the answer of an instruction, all of a plain text.

    datasets:ORG/NAME[/CONFIG][:SPLIT][?FIELD=COLUMN,…][#N]

is a data set of the Hugging Face Hub, read as a stream: N records (default 50,000, the number that arXiv 2408.17280
takes of each set) of a split (default train), with columns as in `texts.SHAPES` or renamed to them, such as
`datasets:meta-math/MetaMathQA?question=query,answer=response`. No code of a repository is ever run: data sets are
read by the package `datasets` alone, which knows plain formats only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

import numpy as np
import torch

from moegguf.errors import UserError
from moegguf.texts import Record, record_of

IGNORED = -100
"""Label of a position whose next token does not count."""
DATASET = "datasets:"
DATASET_RECORDS = 50_000
_DATASET = re.compile(
    r"datasets:(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?"
    r"(?:\?(?P<columns>\w+=[^=,#]+(?:,\w+=[^=,#]+)*))?(?:#(?P<n>[1-9]\d{0,8}))?"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A text in tokens, int32 (n,). The first `n_prompt` are given; those after them count, but never the first."""

    tokens: np.ndarray
    n_prompt: int
    where: str

    @property
    def n_targets(self) -> int:
        return max(0, len(self.tokens) - max(1, self.n_prompt))


def fit_length(examples: Iterable[Example], n_seq: int) -> Iterator[Example]:
    """`examples` in at most `n_seq` tokens: plain texts in several pieces, instructions cut at their end.

    What has no target left comes too, so that it can be counted and named.
    """
    for example in examples:
        if example.n_prompt:
            yield replace(example, tokens=example.tokens[:n_seq])
        else:
            starts = range(0, max(1, len(example.tokens) - 1), n_seq - 1)  # a piece's last token is the next's first
            yield from (replace(example, tokens=example.tokens[start : start + n_seq]) for start in starts)


def equal_parts(sets: Sequence[Sequence[Example]], seed: int) -> list[Example]:
    """As many of each set as the smallest has, drawn without replacement."""
    n, rng = min(map(len, sets)), Random(seed)
    return [example for examples in sets for example in rng.sample(examples, n)]


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch: `tokens`, `labels` (the next token, or `IGNORED`) and `is_token` (no padding), all (batch, length)."""
    length = max(len(example.tokens) for example in examples) - 1
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    is_token = torch.zeros_like(tokens, dtype=torch.bool)
    for i, example in enumerate(examples):
        values = torch.from_numpy(example.tokens.astype(np.int64))
        n, first = len(values) - 1, max(0, example.n_prompt - 1)
        tokens[i, :n], labels[i, first:n], is_token[i, :n] = values[:-1], values[first + 1 :], True
    return {"tokens": tokens, "labels": labels, "is_token": is_token}


def read_dataset(ref: str) -> Iterator[Record]:
    """The records of a data set of the Hub. Raises UserError: unknown, unreachable, no such split or columns."""
    match = _DATASET.fullmatch(ref)
    if not match:
        raise UserError(
            f"{ref}: is no data set, expected datasets:ORG/NAME[/CONFIG][:SPLIT][?FIELD=COLUMN,…][#N]",
            "for example datasets:meta-math/MetaMathQA:train?question=query,answer=response#50000",
        )
    columns = dict(pair.split("=") for pair in (match["columns"] or "").split(",") if pair)
    rows = islice(
        _rows(ref, match["id"], match["config"], match["split"] or "train"), int(match["n"] or DATASET_RECORDS)
    )
    n = 0
    for n, row in enumerate(rows, 1):
        yield record_of(_renamed(row, columns, ref), f"{ref}:{n}")
    if not n:
        raise UserError(f"{ref}: is empty", "choose another split")


def _rows(ref: str, name: str, config: str | None, split: str) -> Iterator[Mapping[str, object]]:
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{ref}: takes the package datasets", "run: pip install 'moegguf[train]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # of the network, the Hub, or a reader of some format: there is no common class
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"{ref}: cannot be read ({reason})", "check the id, the configuration, the split and the network"
        ) from error


def _renamed(row: Mapping[str, object], columns: Mapping[str, str], ref: str) -> dict[str, object]:
    """`row` with the columns that were named in `ref` under the names of fields."""
    if missing := [column for column in columns.values() if column not in row]:
        raise UserError(f"{ref}: has no column {missing[0]}, only {', '.join(row)}", "name one of these")
    return {**row, **{field: row[column] for field, column in columns.items()}}
