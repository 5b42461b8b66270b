"""Tasks: what a model is asked, and what would be right.

A task is one file, or one reference of `moegguf.texts`, and has one metric. Which, the fields of its lines say:

| line | metric |
|---|---|
| `{"question", "answer"}`, `{"messages"}` ending in an answer | exact match of the greedy answer, with chat template |
| `{"prompt", "answer"}`, `{"prompt", "completion"}` | exact match of a greedy continuation, no template |
| `{"question", "choices", "answer"}`, or with `"prompt"` | the likeliest choice; `answer` is its text or number |
| `{"text"}`, or a `.txt` or `.md` file | perplexity |

Numbers of choices count from 0. A file that mixes metrics is refused, as no one number could sum it up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moegguf.errors import UserError
from moegguf.texts import (
    Chat,
    Completion,
    Fields,
    Record,
    Text,
    exchange,
    read_lines,
    read_records,
    record_of,
    resolve,
    shape,
    string,
)


class Metric(StrEnum):
    EXACT_MATCH = "exact match"
    CHOICE = "multiple choice"
    PERPLEXITY = "perplexity"

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right items: the more the better, and a mean over tasks means something."""
        return self is not Metric.PERPLEXITY


@dataclass(frozen=True, slots=True)
class Choice:
    """Possible answers to one question, `texts[right]` the right one. `options` are question and answer together."""

    options: tuple[Chat | Completion, ...]
    texts: tuple[str, ...]
    right: int
    where: str


Item = Record | Choice


@dataclass(frozen=True)
class Task:
    """`items` are of the kind that `metric` needs: Chat or Completion, Choice, or any Record for perplexity."""

    name: str
    metric: Metric
    items: tuple[Item, ...]


def read_tasks(refs: Iterable[tuple[str, str]]) -> list[Task]:
    """The tasks of (name, reference): a file, or `demo:DOMAIN/heldout`. Raises one UserError with the faults of all."""
    tasks: dict[str, Task] = {}
    faults: list[UserError] = []
    for name, ref in refs:
        try:
            if name in tasks:
                raise UserError(f"{ref}: there is a task {name} already", "name it: NAME=FILE")
            tasks[name] = _task(name, ref)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return list(tasks.values())


def domain_tasks(domains: Mapping[str, Sequence[Record]]) -> list[Task]:
    """Tasks of the domains of a recipe: `NAME` asks the questions of a domain that has nothing else, `NAME text` is the
    perplexity of its text; of a conversation, that of the last answer."""
    tasks = []
    for name, records in domains.items():
        if not any(isinstance(record, Text) for record in records):
            tasks.append(Task(name, Metric.EXACT_MATCH, tuple(records)))
        tasks.append(Task(f"{name} text", Metric.PERPLEXITY, tuple(records)))
    return tasks


def answer_of(record: Chat | Completion) -> str:
    """What is to be said."""
    return record.completion if isinstance(record, Completion) else record.messages[-1].content


def _task(name: str, ref: str) -> Task:
    path = resolve(ref, Path())
    has_lines = path.suffix == ".jsonl" and not ref.startswith("demo:")
    return _of_one_metric(name, read_lines(path, _item) if has_lines else read_records(ref))


def _of_one_metric(name: str, items: Sequence[Item]) -> Task:
    metric = _metric(items[0])
    for item in items:
        if _metric(item) is not metric:
            raise UserError(
                f"{item.where}: is an item of {_metric(item)}, those before it are of {metric}",
                "put different kinds into files of their own",
            )
    return Task(name, metric, tuple(items))


def _metric(item: Item) -> Metric:
    match item:
        case Text():
            return Metric.PERPLEXITY
        case Choice():
            return Metric.CHOICE
        case _:
            return Metric.EXACT_MATCH


_FORMS = (
    ("question", "answer"), ("messages",), ("prompt", "answer"), ("question", "choices", "answer"),
    ("prompt", "choices", "answer"), ("text",),
)  # fmt: skip


def _item(fields: Fields, where: str) -> Item:
    if "choices" in fields:
        return _choice(fields, where)
    if "prompt" in fields and "answer" in fields:
        return Completion(string(fields, "prompt", where), string(fields, "answer", where), where)
    if not any(all(name in fields for name in form) for form in (*_FORMS, ("prompt", "completion"))):
        forms = ", ".join(map(shape, _FORMS))
        raise UserError(f"{where}: found {shape(fields)}, expected one of {forms}", "rename or add the fields")
    record = record_of(fields, where)
    if isinstance(record, Chat) and (len(record.messages) < 2 or record.messages[-1].role != "assistant"):
        raise UserError(f"{where}: messages do not end in an answer of the assistant", "end them with the right one")
    return record


def _choice(fields: Fields, where: str) -> Choice:
    texts = fields["choices"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError(f"{where}: choices is no list of two or more", "list the possible answers")
    texts = tuple(string({"choices": text}, "choices", where) for text in texts)
    right = _right(fields.get("answer"), texts, where)
    if "question" in fields:
        question = string(fields, "question", where)
        return Choice(tuple(exchange(question, text, where) for text in texts), texts, right, where)
    if "prompt" not in fields:
        raise UserError(f"{where}: choices without a question or a prompt", "add the field question")
    prompt = string(fields, "prompt", where)
    return Choice(tuple(Completion(prompt, text, where) for text in texts), texts, right, where)


def _right(answer: object, texts: Sequence[str], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(texts):
            return answer
        raise UserError(f"{where}: answer is {answer}, expected 0 to {len(texts) - 1}", "numbers of choices start at 0")
    if isinstance(answer, str) and answer in texts:
        return texts.index(answer)
    found = "missing" if answer is None else "none of the choices"
    raise UserError(f"{where}: answer is {found}", "write the number of the right choice, counted from 0, or its text")


def limited(tasks: Iterable[Task], n: int | None) -> list[Task]:
    """The tasks, each with its first `n` items."""
    return [Task(task.name, task.metric, task.items[:n]) for task in tasks]
