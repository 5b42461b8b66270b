#!/usr/bin/env python3
"""The comparison of arXiv 2408.17280 in miniature, on the embedded family: one command, less than half an hour.

Purpose: which ways of mixing work how well, and which claims of the paper hold for a family that anyone can train.

What is measured: exact match of the greedy answer on held-out questions, all different, the same for every model.
Greedy decoding gives an answer, its end included, if and only if every token of it is the likeliest after those
before it; so one pass over question and answer tells. Mixes are built as F16 GGUFs, which hold the bf16 weights
without loss, and run in llama.cpp; the one that no GGUF can hold runs in the PyTorch reference.

The family's experts differ from the base in FFNs only. To mix attention or to swap the trunk means something only for
experts whose other weights differ too, so the base is fine-tuned once more in each domain, all weights, with the
recipe of the family's own experts. Routers are trained by `moegguf.reference.train`.

Errors are standard errors: from the spread over questions of what is compared, question by question, and from the
spread over the seeds of noise where there are several. They do not say how another family would have come out. A
difference counts when it is two standard errors or more away from what it is held against.

Every step is kept in ~/.cache/moegguf/paper, so a rerun does only what is missing. The same versions, number of
threads and kind of CPU give the same numbers.

    scripts/paper.py                   everything, into moegguf/demo/paper
    scripts/paper.py --quick           few questions, nothing trained, nothing written unless --out says where
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as numpy is loaded: its threads would wait for each other

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import moegguf
from moegguf.assembly import build, open_mix, plan_build
from moegguf.atomic import atomic_file
from moegguf.demo import MODELS
from moegguf.demo.text import DOMAINS, examples
from moegguf.errors import UserError
from moegguf.jobs.fitting import FitOptions, fit_from_recipe
from moegguf.measurement.plots import bar_chart, require
from moegguf.measurement.routing import Load, total
from moegguf.recipe import Recipe, parse_recipe
from moegguf.routers import Router
from moegguf.runtime import batch
from moegguf.runtime.encode import Encoded, encode
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.tap import MOE_PROBS, MOE_TOPK, Tap
from moegguf.runtime.template import chat_template
from moegguf.texts import Chat, exchange, read_records

PACKAGE = Path(moegguf.__file__).parent
OUT = PACKAGE / "demo" / "paper"
QUESTIONS, QUICK_QUESTIONS, MAX_QUESTIONS = 200, 4, 500
QUESTION_SEED, FINE_TUNE_SEED = 1, 3
N_SEEDS, N_QUICK_SEEDS = 5, 2
FIT_TOKENS, QUICK_FIT_TOKENS = 4000, 400
"""Of each domain, for ridge and hidden routers; 4000 is the default of `moegguf route fit`."""
N_MAPPED = 50
"""Questions of each domain whose routing is counted."""
TRAINING = {"batch": 16, "accumulate": 1, "lr": 1e-3, "max_steps": 100}
N_TRAINING = 400
"""Of a router: one epoch over so many questions of each domain, in steps of 16 as in the paper. Its rate of 1e-4 is
meant for 50,000 examples of each domain."""
HIGH_RATE = 3e-3
"""Taken first: it suits the router, and breaks the trunk where that is trained along."""

EXPERT_OF = {"general": "base", "math": "math", "clinic": "clinic", "strings": "strings"}
DOMAIN_OF = {expert: domain for domain, expert in EXPERT_OF.items()}
TUNED = ("math", "clinic", "strings")
"""The experts, and the domains that the base is weak in."""
MEAN = "mean"
PEAK = "largest share of a top expert"
"""A sample beside the domains: by domain and layer, the share of tokens whose top expert is the most frequent one."""


# ------------------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class Row:
    """A model, or one for each of `n_seeds` seeds of noise. `table` is its recipe, `trains` the variant of router
    training that it goes through, if any, and `lr` the rate of that."""

    name: str
    table: Mapping[str, object]
    n_seeds: int = 1
    trains: str = ""
    lr: float = TRAINING["lr"]
    engine: str = "llama"

    @property
    def training(self) -> dict[str, float]:
        return {**TRAINING, "lr": self.lr}

    @property
    def tables(self) -> list[Mapping[str, object]]:
        """The recipe of every model."""
        if self.n_seeds == 1:
            return [self.table]
        return [{**self.table, "router": {**self.table["router"], "seed": seed}} for seed in range(self.n_seeds)]


def groups(full: Path, n_seeds: int) -> dict[str, list[Row]]:
    """All rows, by heading. `full` is the folder of the fine-tunes of all weights, whether or not they are there."""
    shipped = {name: f"demo:{name}" for name in DOMAIN_OF}
    two = {name: shipped[name] for name in ("base", "math")}
    loras = {"base": "demo:base"} | {name: f"lora:demo:lora-{name}" for name in TUNED}
    tuned = {"base": "demo:base"} | {name: str(full / name) for name in TUNED}
    noisy, hidden, ridge = ({"mode": mode, "k": 2} for mode in ("noisy", "hidden", "ridge"))
    from_noise = mixed(shipped, noisy)
    return {
        "the family": [
            Row("base", alone(shipped["base"])),
            *(Row(f"expert {name}", alone(shipped[name])) for name in TUNED),
        ],
        "its FFNs mixed": [
            Row("weight average 4x", mixed(shipped, mix="fine-grained")),
            Row("gate-less 2x", mixed(two)),
            Row("gate-less 4x", mixed(shipped)),
            Row("noisy 2x", mixed(two, noisy), n_seeds),
            Row("noisy 4x", from_noise, n_seeds),
            Row("noisy 4x, fine-grained", mixed(shipped, noisy, mix="fine-grained"), n_seeds, engine="torch"),
            Row("hidden 4x", mixed(shipped, hidden)),
            Row("ridge 4x", mixed(shipped, ridge)),
            Row("trained 4x", from_noise, n_seeds, trains="router"),
            Row("trained 4x, 3 × rate", from_noise, n_seeds, trains="router", lr=HIGH_RATE),
            Row("trained 4x, with o_proj", from_noise, trains="router+o_proj"),
            Row("trained 4x, with embeddings", from_noise, trains="router+embeddings"),
            Row("trained 4x, on plain text", from_noise, trains="pretrain"),
        ],
        "LoRA adapters of its base mixed": [
            *(Row(f"LoRA {name}", alone(loras[name])) for name in TUNED),
            Row("LoRA gate-less 4x", mixed(loras)),
            Row("LoRA ridge 4x", mixed(loras, ridge)),
        ],
        "fine-tunes of all its weights mixed, gate-less 4x": [
            *(Row(f"full {name}", alone(tuned[name], base=tuned[name])) for name in TUNED),
            Row("full, FFN", mixed(tuned)),
            Row("full, FFN + attention", mixed(tuned, mix="ffn+attention")),
            Row("full, fine-grained", mixed(tuned, mix="fine-grained")),
            Row("full, fine-grained + attention", mixed(tuned, mix="fine-grained+attention")),
        ],
        "the same, FFN, on other trunks": [
            *(Row(f"full, trunk of {name}", mixed(tuned, trunk=name)) for name in TUNED),
            Row("full, mean of all trunks", mixed(tuned, trunk="mean")),
        ],
    }


def alone(source: str, base: str = "demo:base") -> dict[str, object]:
    """The recipe of a single model: a mix of one, in one dense FFN."""
    return _recipe({"self": source}, "gateless", base=base)


def mixed(sources: Mapping[str, str], router: object = "gateless", **more: object) -> dict[str, object]:
    """The recipe of a mix of members, called by their names."""
    domains = {name: f"demo:{DOMAIN_OF[name]}" for name in sources}
    return _recipe(sources, router, base="demo:base", domains=domains, **more)


def _recipe(sources: Mapping[str, str], router: object, **more: object) -> dict[str, object]:
    experts = [{"name": name, "source": source} for name, source in sources.items()]
    return {"experts": experts, "router": router, "layout": "auto", "quant": "F16", **more}


# ------------------------------------------------------------------------------------------------ the claims


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a weighted sum of what rows score, plus a constant in per cent."""

    name: str
    weights: Mapping[tuple[str, str], float]
    """(row, sample) → weight; a sample is a domain, or PEAK."""
    constant: float = 0.0

    def minus(self, other: Side) -> Side:
        weights = dict(self.weights)
        for key, weight in other.weights.items():
            weights[key] = weights.get(key, 0.0) - weight
        return Side(f"{self.name} − {other.name}", weights, self.constant - other.constant)


def score(row: str, sample: str = MEAN) -> Side:
    """What a row scores in one sample, or on average over all domains."""
    if sample == MEAN:
        return Side(row, {(row, domain): 1 / len(DOMAINS) for domain in DOMAINS})
    return Side(f"{row}, {sample}" if sample == PEAK else f"{row} on {sample}", {(row, sample): 1.0})


def gain(row: str, over: str, domain: str) -> Side:
    return Side(f"gain of {row} over {over} on {domain}", score(row, domain).minus(score(over, domain)).weights)


def half_way(a: str, b: str) -> Side:
    weights = {key: weight / 2 for side in (score(a), score(b)) for key, weight in side.weights.items()}
    return Side(f"half-way from {a} to {b}", weights)


def own_experts() -> Side:
    """Every domain answered by its own expert: what a perfect router would reach."""
    rows = {domain: "base" if expert == "base" else f"expert {expert}" for domain, expert in EXPERT_OF.items()}
    return Side("each domain by its own expert", {(row, domain): 1 / len(rows) for domain, row in rows.items()})


@dataclass(frozen=True)
class Comparison:
    """Is `left` more than `above` points above `right`? With `above` below 0: at most so far below."""

    left: Side
    right: Side
    above: float = 0.0


CLOSE = -2.0
"""What is at most two points lower is called close."""
EVEN, NEARLY_EVEN = 25.0, -5.0
"""The even share of one of four experts, and how far above it counts as even."""


@dataclass(frozen=True)
class Claim:
    """What somebody claims, and the comparisons that all have to come out for it."""

    text: str
    comparisons: tuple[Comparison, ...]


PAPER = (
    Claim(
        "The mix keeps the strength of its base.",
        tuple(Comparison(score(mix, "general"), score("base", "general"), CLOSE)
              for mix in ("gate-less 2x", "gate-less 4x")),
    ),
    Claim(
        "The mix lifts the weak domains of its base.",
        (
            Comparison(score("gate-less 2x", "math"), score("base", "math")),
            *(Comparison(score("gate-less 4x", domain), score("base", domain)) for domain in TUNED),
        ),
    ),
    Claim(
        "Every mix beats its base on average.",
        tuple(Comparison(score(mix), score("base"))
              for mix in ("weight average 4x", "gate-less 2x", "gate-less 4x", "noisy 2x", "noisy 4x", "trained 4x")),
    ),
    Claim(
        "Of the mixes that need no data, gate-less is the best or close to it.",
        tuple(Comparison(score("gate-less 4x"), score(mix), CLOSE) for mix in ("weight average 4x", "noisy 4x")),
    ),
    Claim(
        "With few experts, gate-less is close to a trained router.",
        (Comparison(score("gate-less 4x"), score("trained 4x"), CLOSE),),
    ),
    Claim(
        "Noisy is slightly below gate-less: it keeps more than half of what gate-less gains over the base.",
        (
            Comparison(score("gate-less 4x"), score("noisy 4x")),
            Comparison(score("noisy 4x"), half_way("base", "gate-less 4x")),
        ),
    ),
    Claim(
        "Training the router helps on math.",
        (Comparison(score("trained 4x", "math"), score("noisy 4x", "math")),),
    ),
    Claim(
        "It helps on math more than elsewhere.",
        tuple(Comparison(gain("trained 4x", "noisy 4x", "math"), gain("trained 4x", "noisy 4x", domain))
              for domain in DOMAINS if domain != "math"),
    ),
    Claim(
        "The domain of the base shows: on the trunk of another member, the mix is better in that member's domain.",
        tuple(Comparison(score(f"full, trunk of {name}", name), score("full, FFN", name)) for name in TUNED),
    ),
    Claim(
        "Mixing FFNs beats mixing LoRA adapters.",
        (
            Comparison(score("gate-less 4x"), score("LoRA gate-less 4x")),
            Comparison(score("ridge 4x"), score("LoRA ridge 4x")),
        ),
    ),
    Claim(
        "Noise spreads the top expert evenly: in each layer and domain, the most frequent one has about a quarter.",
        (Comparison(Side("an even share", {}, EVEN), score("noisy 4x", PEAK), NEARLY_EVEN),),
    ),
    Claim(
        "Training concentrates it.",
        (Comparison(score("trained 4x", PEAK), score("noisy 4x", PEAK)),),
    ),
)  # fmt: skip
"""Claims of arXiv 2408.17280."""

NEIGHBOURS = (
    Claim(
        "A router fitted by ridge regression comes close to each domain's own expert (arXiv 2603.29765).",
        (Comparison(score("ridge 4x"), own_experts(), CLOSE),),
    ),
    Claim(
        "A router of hidden states is worth its prompts: it beats gate-less (mergekit's method).",
        (Comparison(score("hidden 4x"), score("gate-less 4x")),),
    ),
)

OPEN = (
    *(
        Comparison(score(left), score(right))
        for left, right in (
            ("weight average 4x", "gate-less 4x"),
            ("noisy 4x, fine-grained", "noisy 4x"),
            ("hidden 4x", "ridge 4x"),
            ("trained 4x", "ridge 4x"),
            ("trained 4x, 3 × rate", "trained 4x"),
            ("trained 4x, with o_proj", "trained 4x"),
            ("trained 4x, with embeddings", "trained 4x"),
            ("trained 4x, on plain text", "trained 4x"),
            ("full, FFN", "gate-less 4x"),
            ("full, FFN + attention", "full, FFN"),
            ("full, fine-grained", "full, FFN"),
            ("full, fine-grained + attention", "full, FFN + attention"),
            *((f"full, trunk of {name}", "full, FFN") for name in TUNED),
            ("full, mean of all trunks", "full, FFN"),
            ("full, FFN + attention", "full, mean of all trunks"),
        )
    ),
    *(
        Comparison(gain("trained 4x, 3 × rate", "noisy 4x", "math"), gain("trained 4x, 3 × rate", "noisy 4x", domain))
        for domain in ("clinic", "strings")
    ),
)
"""What the claims leave open."""


# ------------------------------------------------------------------------------------------- the statistics

Samples = Mapping[str, np.ndarray]
"""Sample → float (n_seeds, n): 1 for a right answer and 0 for a wrong one, or shares of tokens."""


@dataclass(frozen=True)
class Estimate:
    """In per cent, or points; `error` is a standard error."""

    value: float
    error: float


def estimate(scores: Mapping[str, Samples], side: Side) -> Estimate:
    """The value of `side`: compared item by item within a sample, samples and seeds being independent draws.

    Questions are taken to spread no less than if a single one were off: that all are right proves no certainty.
    """
    value, variance = side.constant, 0.0
    for sample in sorted({sample for _, sample in side.weights}):
        weights = {row: weight for (row, of), weight in side.weights.items() if of == sample}
        items = sum(100 * weight * scores[row][sample].mean(axis=0) for row, weight in weights.items())
        least = 0.0 if sample == PEAK else (100 * max(map(abs, weights.values()))) ** 2 / len(items)
        value += float(items.mean())
        variance += max(float(items.var(ddof=1)), least) / len(items)
    for row in sorted({row for row, _ in side.weights}):
        weights = {sample: weight for (of, sample), weight in side.weights.items() if of == row}
        seeds = sum(100 * weight * scores[row][sample].mean(axis=1) for sample, weight in weights.items())
        if len(seeds) > 1:
            variance += float(seeds.var(ddof=1)) / len(seeds)
    return Estimate(value, math.sqrt(variance))


class Verdict(StrEnum):
    AGREES = "agrees"
    DOES_NOT = "does not"
    UNTOLD = "cannot be told at this n"
    NOT_RUN = "not run"


def verdict(difference: Estimate, above: float) -> Verdict:
    """Whether a difference is above `above`, by more than two standard errors."""
    if difference.value - 2 * difference.error > above:
        return Verdict.AGREES
    if difference.value + 2 * difference.error < above:
        return Verdict.DOES_NOT
    return Verdict.UNTOLD


def verdict_of_all(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim falls with one of its comparisons, and stands with all of them."""
    for worst in (Verdict.DOES_NOT, Verdict.NOT_RUN, Verdict.UNTOLD):
        if worst in verdicts:
            return worst
    return Verdict.AGREES


@dataclass(frozen=True)
class Finding:
    """A comparison with its numbers; None where one of its rows was not run."""

    left: str
    right: str
    above: float
    values: tuple[float, float] | None
    difference: Estimate | None
    verdict: Verdict


def find(scores: Mapping[str, Samples], comparison: Comparison) -> Finding:
    left, right, above = comparison.left, comparison.right, comparison.above
    if any(row not in scores for row, _ in (*left.weights, *right.weights)):
        return Finding(left.name, right.name, above, None, None, Verdict.NOT_RUN)
    values = estimate(scores, left).value, estimate(scores, right).value
    difference = estimate(scores, left.minus(right))
    return Finding(left.name, right.name, above, values, difference, verdict(difference, above))


@dataclass(frozen=True)
class Tested:
    """A claim, what its comparisons came to, and what that makes of it."""

    text: str
    findings: tuple[Finding, ...]
    verdict: Verdict


def tested(scores: Mapping[str, Samples], claims: Sequence[Claim]) -> list[Tested]:
    found = [(claim.text, tuple(find(scores, each) for each in claim.comparisons)) for claim in claims]
    return [Tested(text, some, verdict_of_all([each.verdict for each in some])) for text, some in found]


# -------------------------------------------------------------------------------------------- one measurement


@dataclass(frozen=True)
class Setup:
    """What all measurements have in common, and the folder where they are kept."""

    questions: Mapping[str, Sequence[Chat]]
    fit_tokens: int
    """Of each domain's text, for routers that are fitted."""
    threads: int
    cache: Path

    def file(self, row: Row, table: Mapping[str, object]) -> Path:
        """Where a measurement is kept; its name says all that it depends on, in a digest."""
        asked = [chat.messages for some in self.questions.values() for chat in some]
        what = {
            "asked": [message.content for messages in asked for message in messages],
            "fit tokens": self.fit_tokens,
            "training": [row.trains, row.training, N_TRAINING] if row.trains else None,
            "family": sha256((MODELS / "family.json").read_bytes()).hexdigest(),
            "versions": versions(),
        }  # fmt: skip
        return self.cache / f"{digest([what, self.threads, row.engine, table])}.json"


def held_out(n: int) -> dict[str, list[Chat]]:
    """`n` different questions of each domain, with their answers. Raises UserError where there are not so many."""
    chosen = {}
    for domain in DOMAINS:
        drawn = list(dict.fromkeys(examples(domain, "heldout", 8 * n, QUESTION_SEED)))[:n]
        if len(drawn) < n:
            raise UserError(f"--questions {n}: there are only {len(drawn)} different ones of {domain}", "ask for fewer")
        chosen[domain] = [exchange(e.question, e.answer, f"{domain}:{i}") for i, e in enumerate(drawn, 1)]
    return chosen


def measure(setup: Setup, row: Row, table: Mapping[str, object]) -> dict[str, list]:
    """Sample → its items, of one model."""
    with tempfile.TemporaryDirectory(prefix="moegguf-paper-") as folder:
        path = Path(folder) / "mix.gguf"
        recipe = parse_recipe("paper", {**table, "output": str(path)}, where=f"{row.name}:", folder=path.parent)
        if row.engine == "torch":
            return measure_in_torch(setup, recipe)
        router = make_router(setup, recipe, row)
        build(plan_build(recipe, router=router), threads=setup.threads)
        with open_model(path, RunOptions(threads=setup.threads)) as model:
            encoded = in_tokens(model, setup.questions)
            found = right_answers(partial(batch.score, model), encoded)
            return found if recipe.router.is_gateless else {**found, PEAK: peaks(model, encoded)}


def measure_in_torch(setup: Setup, recipe: Recipe) -> dict[str, list]:
    from moegguf.jobs.torch_engine import open_engine

    engine = open_engine(recipe, open_mix(recipe), threads=setup.threads)
    return right_answers(engine.score, in_tokens(engine, setup.questions))


def make_router(setup: Setup, recipe: Recipe, row: Row) -> Router | None:
    """The router of `recipe` after training or fitting; None where its recipe says all."""
    if row.trains:
        return train_router(setup, recipe, row)
    if recipe.router.is_unfitted:
        return fit_from_recipe(recipe, FitOptions(max_tokens=setup.fit_tokens, threads=setup.threads)).router
    return None


def in_tokens(model, questions: Mapping[str, Sequence[Chat]]) -> dict[str, list[Encoded]]:
    """Domain → questions and answers as the model sees them. `model` is a `Model` or a `TorchEngine`."""
    template = chat_template(model.chat_template, model.vocab)
    return {domain: [encode(model.vocab, template, chat) for chat in some] for domain, some in questions.items()}


def right_answers(scorer: Callable[..., Iterator], encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, list]:
    """Domain → 1 for each question whose greedy answer is the expected one, 0 for others."""
    return {
        domain: [
            int(scored.is_greedy.all())
            for scored in scorer([each.tokens for each in some], [each.n_prompt for each in some])
        ]
        for domain, some in encoded.items()
    }


def peaks(model, encoded: Mapping[str, Sequence[Encoded]]) -> list[float]:
    """By domain and layer: the share of tokens whose top expert is the most frequent one there."""
    shares = []
    with Tap(model, (MOE_PROBS, MOE_TOPK)) as tap:
        for some in encoded.values():
            tapped = list(tap.run([each.tokens for each in some[:N_MAPPED]]))
            for layer in range(model.n_layer):
                load = total(Load.of(t.values[MOE_PROBS, layer], t.values[MOE_TOPK, layer]) for t in tapped)
                shares.append(float(load.top_share.max()))
    return shares


# -------------------------------------------------------------------------------------------------- training


def train_router(setup: Setup, recipe: Recipe, row: Row) -> Router:
    """The router of `recipe` after training on questions of every domain, as `row` says."""
    import torch

    from moegguf.jobs.torch_engine import vocab_of
    from moegguf.reference.examples import Example
    from moegguf.reference.model import ReferenceModel
    from moegguf.reference.train import Checkpoints, Settings, Variant, train

    torch.set_num_threads(setup.threads)
    mix = open_mix(recipe)
    vocab = vocab_of(mix)
    template = chat_template(mix.base.read_vocab()["tokenizer.chat_template"].value, vocab)
    records = [record for domain in DOMAINS for record in read_records(f"demo:{domain}#{N_TRAINING}")]
    encoded = [encode(vocab, template, record) for record in records]
    data = [
        Example(np.array(each.tokens, np.int32), 0 if row.trains == "pretrain" else each.n_prompt, record.where)
        for each, record in zip(encoded, records, strict=True)
    ]
    settings = Settings(Variant(row.trains), **row.training)
    checkpoints = Checkpoints(recipe.output.parent / "checkpoints")
    return train(ReferenceModel.from_mix(mix), data, settings, checkpoints).router


@contextmanager
def fine_tuning(full: Path, names: Sequence[str], threads: int) -> Iterator[Callable[[Steps], None]]:
    """Fine-tune `names` into folders of `full`, in a process of its own, while the block measures what needs none.

    Yields a function that waits for the end. The process never outlives the block.
    """
    process = get_context("spawn").Process(target=fine_tune_all, args=(full, names, threads), daemon=True)

    def wait(steps: Steps) -> None:
        while process.is_alive():
            n_done = sum((full / f"{name}.json").exists() for name in names)
            steps.tell(f"fine-tuning: {n_done} of {len(names)} done")
            process.join(timeout=1)
        if process.exitcode:
            raise UserError("fine-tuning failed, for the reason above")

    process.start()
    try:
        yield wait
    finally:
        process.terminate()


def fine_tune_all(full: Path, names: Sequence[str], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    for name in names:
        kept(full / f"{name}.json", partial(fine_tune, name, full / name, threads))


def fine_tune(name: str, folder: Path, threads: int) -> dict[str, object]:
    """Train all weights of the base in the domain of one expert, by the recipe of that expert, into `folder`."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    from moegguf.demo import train as recipe

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    model = recipe.load_member(MODELS / "base")
    tokenizer = Tokenizer.from_file(str(MODELS / "base" / "tokenizer.json"))
    course = recipe.EXPERT_COURSES[name]
    recipe.train(model, lambda weight: True, tokenizer, course, FINE_TUNE_SEED, stop_if_alone)
    recipe.save_member(folder, model, tokenizer)
    (folder / "README.md").unlink()  # it speaks of the family's own expert
    return {"drift of FFNs": round(recipe.drift(MODELS, model), 3)}


def stop_if_alone(line: str) -> None:
    """Hears of every hundredth step; ends this process where the one that waits for it is gone."""
    if not parent_process().is_alive():
        sys.exit(1)


def folder_of_fine_tunes(cache: Path, threads: int) -> Path:
    """Named by all that they depend on, so that they are never taken for others."""
    recipe = [(PACKAGE / "demo" / name).read_text() for name in ("train.py", "text.py")]
    base = sha256((MODELS / "base" / "model.safetensors").read_bytes()).hexdigest()
    return cache / f"full-{digest([recipe, base, threads, FINE_TUNE_SEED, versions()])}"


# --------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Results:
    """What is known so far: by row, and by step."""

    scores: dict[str, Samples]
    seconds: dict[str, float]
    drift: dict[str, float]
    """Of the fine-tunes: ‖ΔFFN‖ / ‖FFN‖ from the base."""


def run(setup: Setup, rows: Sequence[Row], full: Path) -> Results:
    """Measure `rows`, and fine-tune first what they need; what was done before is read."""
    plain, tuned = ([row for row in rows if needs(row, full) is needed] for needed in (False, True))
    names = TUNED if tuned else ()
    results = Results({}, {}, {})
    with Steps(len(names) + sum(row.n_seeds for row in rows)) as steps:
        if not tuned:
            measure_all(setup, plain, results, steps)
            return results
        with fine_tuning(full, names, setup.threads) as wait:
            measure_all(setup, plain, results, steps)
            wait(steps)
        for name in names:
            found = json.loads((full / f"{name}.json").read_text())
            results.drift[name], results.seconds[f"fine-tune {name}"] = found["drift of FFNs"], found["seconds"]
            steps.done(f"fine-tune {name}", "", found["seconds"])
        measure_all(setup, tuned, results, steps)
    return results


def measure_all(setup: Setup, rows: Sequence[Row], results: Results, steps: Steps) -> None:
    """Measure `rows`, and add what came out to `results`."""
    for row in rows:
        models = []
        for number, table in enumerate(row.tables):
            steps.tell(row.name)
            found = kept(setup.file(row, table), partial(measure, setup, row, table))
            results.seconds[f"{row.name} #{number}"] = taken = found.pop("seconds")
            steps.done(row.name, f"{100 * np.mean([found[domain] for domain in DOMAINS]):.1f}", taken)
            models.append(found)
        results.scores[row.name] = {sample: np.array([found[sample] for found in models]) for sample in models[0]}


def needs(row: Row, full: Path) -> bool:
    """Whether a row needs the fine-tunes in `full`."""
    return str(full) in str(row.table)


class Steps:
    """A bar at a terminal, and a line for every step that is done, on stderr."""

    def __init__(self, n: int) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
        console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._bar = Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task("", total=n)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def done(self, step: str, result: str, seconds: float) -> None:
        self._bar.advance(self._task)
        self._bar.console.print(f"{step:32} {result:>6} {seconds:7.1f} s")


def kept(path: Path, compute: Callable[[], dict]) -> dict:
    """What `compute` gave, and in how many seconds: read from `path`, or computed and written there."""
    if not path.exists():
        start = time.monotonic()
        found = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps({**found, "seconds": round(time.monotonic() - start, 2)}).encode())
    return json.loads(path.read_text())


def forget(cache: Path) -> None:
    """Remove every step that is kept in `cache`, and nothing else that may be there."""
    for path in cache.glob("*"):
        if re.fullmatch(r"[0-9a-f]{24}\.json", path.name):
            path.unlink()
        elif re.fullmatch(r"full-[0-9a-f]{24}", path.name):
            shutil.rmtree(path)


def digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def versions() -> dict[str, str]:
    """Of everything that could move a number."""
    found = {"python": platform.python_version(), "moegguf": moegguf.__version__}
    for package in ("llama-cpp-python", "numpy", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


# ------------------------------------------------------------------------------------------------ the report

COLUMNS = (*DOMAINS, MEAN)
DRAWN = (
    "base", "weight average 4x", "gate-less 2x", "gate-less 4x", "noisy 4x", "hidden 4x", "ridge 4x", "trained 4x",
)  # fmt: skip
IN_PLURAL = {Verdict.AGREES: "agree", Verdict.DOES_NOT: "do not"}
WORDS_OF_OPEN = {Verdict.AGREES: "higher", Verdict.DOES_NOT: "lower"}
PAGE = """\
# The paper's comparison in miniature

Exact match in per cent ± one standard error: greedy answers to n = {n} held-out questions of each domain, all
different, the same for every model. `scripts/paper.py` trained, built, measured and wrote all of this; its first
lines say how. The claims are those of arXiv 2408.17280.

{table}

![the main rows as bars]({figure})

## What agrees with the paper, and what does not

{summary}

{paper}

A difference counts where it is more than two standard errors from what it is held against. Up to {close} points lower
is still called close.

## Its neighbours

{neighbours}

## What the claims leave open

{open}

## How far this goes

- The errors cover the draw of questions and of noise. The fine-tunes themselves are one draw: a family of other seeds
  would come out differently.
- The experts drift from their base by 30 to 40 % of the norm of its FFNs, fine-tunes of 7B models by a few per cent.
  The further experts are apart, the more an average of them loses to a choice among them.
- The LoRA adapters change FFNs, as the experts do, and drift further. The fine-tunes of all weights forget the
  other domains more thoroughly than experts do, whose trunk was frozen: their rows say how much.
- The four domains are told apart by their first words. Routers have it easy here.
- Rate and length of router training were chosen with held-out questions in view, these among them. At the first rate,
  three times as high, the router alone does no worse (it has a row of its own), and training the trunk along made it
  worse: 79.6 on average with o_proj and 85.6 with embeddings, which is why the lower one was taken for all.
- Trained, ridge and hidden routers have seen text that is labelled by domain, or answers; gate-less and noisy none.

## Settings

{settings}
"""


def name_of(row: Row) -> str:
    return row.name if row.n_seeds == 1 else f"{row.name} ({row.n_seeds} seeds)"


def cells(scores: Mapping[str, Samples], row: Row) -> list[str]:
    """Value and error for each of `COLUMNS`, and the range of the means where there are several seeds."""
    if row.name not in scores:
        return ["–"] * len(COLUMNS)
    estimates = [estimate(scores, score(row.name, column)) for column in COLUMNS]
    written = [f"{each.value:.1f} ± {each.error:.1f}" for each in estimates]
    if row.n_seeds > 1:
        written[-1] += " ({:.1f} to {:.1f})".format(*range_of_means(scores, row))
    return written


def range_of_means(scores: Mapping[str, Samples], row: Row) -> tuple[float, float]:
    means = np.mean([100 * scores[row.name][domain].mean(axis=1) for domain in DOMAINS], axis=0)
    return float(means.min()), float(means.max())


def print_table(console: Console, table: Mapping[str, Sequence[Row]], scores: Mapping[str, Samples], n: int) -> None:
    columns = [Column(column, justify="right", no_wrap=True) for column in COLUMNS]
    shown = Table(Column("", no_wrap=True), *columns, box=None, pad_edge=False)
    for heading, rows in table.items():
        shown.add_row(f"[bold]{heading}")
        for row in rows:
            shown.add_row(f"  {name_of(row)}", *cells(scores, row))
    console.print(shown)
    console.print(f"exact match in per cent ± one standard error; n = {n} held-out questions of each domain")


def draw(path: Path, scores: Mapping[str, Samples], n: int) -> None:
    estimates = {row: [estimate(scores, score(row, column)) for column in COLUMNS] for row in DRAWN if row in scores}
    bar_chart(
        path,
        f"exact match on {n} held-out questions of each domain, ± one standard error",
        COLUMNS,
        {row: [each.value for each in some] for row, some in estimates.items()},
        {row: [each.error for each in some] for row, some in estimates.items()},
        "right, per cent",
    )


def markdown(table: Mapping[str, Sequence[Row]], results: Results, setup: Setup, figure: str) -> str:
    """The page that is stored."""
    scores = results.scores
    paper, neighbours = tested(scores, PAPER), tested(scores, NEIGHBOURS)
    return PAGE.format(
        n=len(setup.questions[DOMAINS[0]]),
        table="\n".join(markdown_table(table, scores)),
        figure=figure,
        summary=summary(paper),
        paper="\n".join(line for claim in paper for line in markdown_claim(claim)),
        close=f"{-CLOSE:g}",
        neighbours="\n".join(line for claim in neighbours for line in markdown_claim(claim)),
        open="\n".join(markdown_open(find(scores, each)) for each in OPEN),
        settings="\n".join(markdown_settings(setup, results)),
    )


def markdown_table(table: Mapping[str, Sequence[Row]], scores: Mapping[str, Samples]) -> Iterator[str]:
    yield f"| | {' | '.join(COLUMNS)} |"
    yield f"|---|{'---|' * len(COLUMNS)}"
    for heading, rows in table.items():
        yield f"| **{heading}** |{' |' * len(COLUMNS)}"
        for row in rows:
            yield f"| {name_of(row)} | {' | '.join(cells(scores, row))} |"


def summary(claims: Sequence[Tested]) -> str:
    verdicts = [claim.verdict for claim in claims]
    counts = {IN_PLURAL.get(each, each): verdicts.count(each) for each in Verdict if each in verdicts}
    line = f"Of {len(claims)} claims {', '.join(f'{count} {words}' for words, count in counts.items())}."
    against = [claim.text for claim in claims if claim.verdict is Verdict.DOES_NOT]
    return line + ("\n**This family contradicts the paper in:** " + " ".join(against) if against else "")


def markdown_claim(claim: Tested) -> Iterator[str]:
    yield f"- {claim.text} **{claim.verdict}**"
    for each in claim.findings:
        if each.difference is None:
            yield f"  - {each.left} against {each.right}: {each.verdict}"
            continue
        bound = f"; has to be above {each.above:+g}" if each.above else ""
        outcome = f" ({each.verdict})" if len(claim.findings) > 1 else ""
        yield f"  - {sides(each)}: {difference(each)}{bound}{outcome}"


def markdown_open(each: Finding) -> str:
    if each.difference is None:
        return f"- {each.left} against {each.right}: {each.verdict}"
    return f"- {sides(each)}: {difference(each)}, {WORDS_OF_OPEN.get(each.verdict, each.verdict)}"


def sides(each: Finding) -> str:
    left, right = each.values
    return f"{each.left} {left:.1f}, against {each.right} {right:.1f}"


def difference(each: Finding) -> str:
    return f"{each.difference.value:+.1f} ± {each.difference.error:.1f}"


def markdown_settings(setup: Setup, results: Results) -> Iterator[str]:
    seconds = results.seconds
    tuning = sum(taken for step, taken in seconds.items() if step.startswith("fine-tune"))
    yield f"- {', '.join(f'{name} {number}' for name, number in versions().items())}"
    yield (
        f"- {machine()}; seconds of all steps added up: {sum(seconds.values()):.0f}, of which "
        f"{tuning:.0f} fine-tuning beside the rest; {setup.threads} thread{'s' * (setup.threads > 1)} each"
    )
    for what, drift in (drifts() | {"fine-tunes of all weights": results.drift}).items():
        if drift:
            yield f"- drift of FFNs, {what}: {', '.join(f'{name} {value:.2f}' for name, value in drift.items())}"
    settings = ", ".join(f"{name} {value:g}" for name, value in TRAINING.items())
    yield f"- trained routers: from noise, on {N_TRAINING} questions of each domain; {settings}"
    yield f"- ridge and hidden routers: fitted on the base, to at most {setup.fit_tokens} tokens of each domain"


def drifts() -> dict[str, dict[str, float]]:
    """‖ΔFFN‖ / ‖FFN‖ from the base, of the family's experts and adapters, as they were trained."""
    family = json.loads((MODELS / "family.json").read_text())
    return {"experts": family["drift"], "LoRA adapters": family["adapters"]["drift"]}


def as_json(table: Mapping[str, Sequence[Row]], results: Results, setup: Setup) -> dict[str, object]:
    scores = results.scores
    rows = {}
    for heading, some in table.items():
        for row in some:
            if row.name not in scores:
                continue
            by_column = {column: asdict(estimate(scores, score(row.name, column))) for column in COLUMNS}
            more = {"range of means": range_of_means(scores, row)} if row.n_seeds > 1 else {}
            if PEAK in scores[row.name]:
                more[PEAK] = asdict(estimate(scores, score(row.name, PEAK)))
            recipes = {"group": heading, "seeds": row.n_seeds, "trains": row.trains, "engine": row.engine}
            rows[row.name] = {**recipes, "exact match, per cent": by_column, **more}
    return {
        "settings": {
            "questions of each domain": len(setup.questions[DOMAINS[0]]), "seed of questions": QUESTION_SEED,
            "threads": setup.threads, "router training": {**TRAINING, "questions of each domain": N_TRAINING},
            "seed of fine-tunes": FINE_TUNE_SEED,
        },
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
        "claims of the paper": [asdict(claim) for claim in tested(scores, PAPER)],
        "claims of its neighbours": [asdict(claim) for claim in tested(scores, NEIGHBOURS)],
        "open": [asdict(find(scores, each)) for each in OPEN],
        "drift of FFNs": {**drifts(), "fine-tunes of all weights": results.drift},
        "seconds": {**results.seconds, "all": round(sum(results.seconds.values()), 1)},
    }  # fmt: skip


def machine() -> str:
    """Processor and cores, for the record."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add = parser.add_argument
    add("--quick", action="store_true", help="few questions and seeds; nothing that is trained, or runs in PyTorch")
    add("--questions", type=int, metavar="N", help=f"of each domain (default: {QUESTIONS}; quick: {QUICK_QUESTIONS})")
    add("--out", type=Path, metavar="DIR", help=f"folder for table, figure and numbers (default: {OUT}; quick: none)")
    add("--threads", type=int, default=1, metavar="N", help="for training and running (default: %(default)s)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="folder of steps (default: %(default)s)")
    add("--fresh", action="store_true", help="do every step again")
    options = parser.parse_args(argv)
    n = options.questions or (QUICK_QUESTIONS if options.quick else QUESTIONS)
    if not 2 <= n <= MAX_QUESTIONS or options.threads < 1:
        parser.error(f"--questions: 2 to {MAX_QUESTIONS}; --threads: at least 1")
    try:
        return report(options, n, options.out if options.quick else options.out or OUT)
    except UserError as error:
        print(f"paper: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npaper: stopped; what is done is kept in {options.cache}, the same command goes on", file=sys.stderr)
        return 130


def report(options: argparse.Namespace, n: int, out: Path | None) -> int:
    """Run what is asked for; print it and, with `out`, write it."""
    figure = (out or Path()) / "scores.png"
    if out:
        require(figure)
        out.mkdir(parents=True, exist_ok=True)
        if (page := out / "README.md").exists() and not page.read_text().startswith(PAGE[: PAGE.index("\n")]):
            raise UserError(f"{page}: exists, and is not of this script", "choose another --out")
    if not options.quick:
        require_training()
    if options.fresh:
        forget(options.cache)
    fit_tokens = QUICK_FIT_TOKENS if options.quick else FIT_TOKENS
    setup = Setup(held_out(n), fit_tokens, options.threads, options.cache)
    full = folder_of_fine_tunes(options.cache, options.threads)
    table = groups(full, N_QUICK_SEEDS if options.quick else N_SEEDS)
    rows = [row for some in table.values() for row in some if not (options.quick and is_slow(row, full))]
    results = run(setup, rows, full)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    print_table(console, table, results.scores, n)
    console.print(f"\n{summary(tested(results.scores, PAPER))}", markup=False)
    if out:
        draw(figure, results.scores, n)
        write(out / "README.md", markdown(table, results, setup, figure.name))
        write(out / "results.json", json.dumps(as_json(table, results, setup), indent=1) + "\n")
        console.print(f"wrote README.md, results.json and {figure.name} into {out}", soft_wrap=True)
    return 0


def require_training() -> None:
    """Raises UserError where a package is missing that training takes."""
    if missing := [name for name in ("torch", "transformers", "peft", "accelerate") if find_spec(name) is None]:
        raise UserError(
            f"training takes {', '.join(missing)}, not installed here", "run: pip install 'moegguf[train]', or --quick"
        )


def is_slow(row: Row, full: Path) -> bool:
    """Whether a row takes training or PyTorch."""
    return bool(row.trains) or row.engine == "torch" or needs(row, full)


def write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moegguf" / "paper"


if __name__ == "__main__":
    sys.exit(main())
