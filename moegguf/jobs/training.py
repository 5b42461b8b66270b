"""A training, end to end: a recipe and texts → its mix, and tokens that it is to predict → a router in a file.

Data, tokenizer and network meet here; `moegguf.reference.train` trains. Whatever can be wrong with a recipe, a text, a
number or a checkpoint is found by the plan, before weights are read. PyTorch and its companions are an extra (`train`),
imported when a training is planned.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.atomic import atomic_file, check_writable
from moegguf.errors import UserError
from moegguf.measurement import plots
from moegguf.recipe import Recipe, RouterMode, load_recipe
from moegguf.routers import Router
from moegguf.routers.file import check_target, write_router
from moegguf.watch import Watch, unwatched

if TYPE_CHECKING:
    from moegguf.mix import Mix
    from moegguf.reference.examples import Example
    from moegguf.reference.train import Checkpoints, Place, Settings, Step
    from moegguf.texts import Record

DEFAULT_OUTPUT = Path("router.safetensors")
DEFAULT_SEQ = 2048
ZEROS = "zeros"
CHOICES = {
    "variant": ("router", "router+embeddings", "router+o_proj", "pretrain"),
    "schedule": ("constant", "linear", "cosine"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
}
"""What some of `TrainOptions` can be."""
STARTS = (str(RouterMode.NOISY), ZEROS)
_RANGES = {
    "k": (int, 1, 10_000),
    "epochs": (float, 1e-6, 1e6),
    "batch": (int, 1, 10_000),
    "accumulate": (int, 1, 100_000),
    "lr": (float, 1e-9, 1.0),
    "max_steps": (int, 1, 10**8),
    "seq": (int, 2, 10**7),
    "balance": (float, 0.0, 1e3),
    "seed": (int, 0, 2**32 - 1),
    "save_steps": (int, 1, 10**8),
    "threads": (int, 1, 512),
}


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the defaults are the settings of the paper (arXiv 2408.17280)."""

    seq: int | None = None
    """Tokens of an example; default: the base's context, at most 2048."""
    variant: str = CHOICES["variant"][0]
    """What is trained, and on what; see `moegguf.reference.train`."""
    start: str | None = None
    """Of `STARTS`, or a router file; default: the recipe's router, noisy where it has none."""
    k: int | None = None
    """Experts that run for each token; default: the recipe's, or 2."""
    epochs: float = 1
    max_steps: int | None = None
    """In place of `epochs`."""
    batch: int = 1
    """Examples computed together."""
    accumulate: int = 16
    """Such batches that make a step."""
    lr: float = 1e-4
    schedule: str = CHOICES["schedule"][0]
    balance: float = 0
    """Weight of the term that spreads the load over the experts."""
    seed: int = 0
    """Of the order of the data."""
    device: str = "auto"
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    threads: int | None = None
    save_steps: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Raises UserError with all values that cannot be."""
        faults = [
            UserError(f"{_flag(name)} {value}: expected {low:g} to {high:g}", "see `moegguf train --help`")
            for name, (kind, low, high) in _RANGES.items()
            if ((value := getattr(self, name)) is not None or getattr(TrainOptions, name) is not None)
            and not (isinstance(value, kind | int) and low <= value <= high)
        ]
        faults += [
            UserError(f"{_flag(name)} {value}: expected {', '.join(known)}", "pick one of these")
            for name, known in CHOICES.items()
            if (value := getattr(self, name)) not in known
        ]
        if faults:
            raise UserError.of(faults)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class TrainFiles:
    """What a training writes. `resume` goes on from the last of its checkpoints."""

    output: Path = DEFAULT_OUTPUT
    curve: Path | None = None
    """A drawing of the loss, with its numbers beside it in a .json."""
    checkpoints: Path | None = None
    """The folder to keep them in; default: one beside the output, until that is written."""
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raises UserError where something cannot be written: before hours go into it."""
        check_target(self.output, self.overwrite)
        if self.curve:
            plots.require(self.curve)
            for path in (self.curve, self.numbers):
                check_writable(path, self.overwrite or self.resume)  # a run that stopped has drawn its curve so far

    @property
    def numbers(self) -> Path:
        """Those of the curve."""
        return self.curve.with_suffix(".json")

    @property
    def folder(self) -> Path:
        return self.checkpoints or self.output.with_name(f"{self.output.name}.checkpoints")


@dataclass(frozen=True)
class TrainingPlan:
    """All that is known before weights are read."""

    recipe: Recipe
    mix: Mix
    """With the router that training starts from."""
    examples: Sequence[Example]
    parts: Mapping[str, int]
    """Domain → the examples that it has, where equal parts of the recipe's domains are taken; else empty."""
    settings: Settings
    checkpoints: Checkpoints
    files: TrainFiles
    place: Place
    notes: tuple[str, ...]
    """Worth a user's knowing."""

    @property
    def n_tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    @property
    def n_targets(self) -> int:
        """The tokens that count."""
        return sum(example.n_targets for example in self.examples)


@dataclass(frozen=True)
class Training:
    """The outcome. `stopped_at` is the checkpoint of a run that was asked to stop: no router is written then."""

    plan: TrainingPlan
    router: Router
    steps: tuple[Step, ...]
    stopped_at: Path | None
    seconds: float

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        plan, settings = self.plan, self.router.settings
        return {
            "file": None if self.stopped_at else str(plan.files.output),
            "recipe": plan.recipe.name,
            "experts": list(self.router.experts),
            "k": self.router.k,
            "start": str(plan.mix.router.mode),
            "variant": str(plan.settings.variant),
            "changed": ["router", *self.router.trunk],
            "frozen_sha256": settings["frozen sha256"],
            "examples": len(plan.examples),
            "tokens": plan.n_tokens,
            "target_tokens": plan.n_targets,
            "steps": len(self.steps),
            "loss": {"first": self.steps[0].loss, "last": self.steps[-1].smoothed} if self.steps else None,
            "device": str(plan.place.device),
            "dtype": plan.place.type_name,
            "curve": plan.files.curve and str(plan.files.curve),
            "checkpoint": self.stopped_at and str(self.stopped_at),
            "seconds": round(self.seconds, 3),
            "notes": list(plan.notes),
        }


# ------------------------------------------------------------------------------------------------- plan


def plan_training(
    recipe: str,
    data: Sequence[str] = (),
    options: TrainOptions = TrainOptions(),
    files: TrainFiles = TrainFiles(),
    *,
    recipes: Path | None = None,
) -> TrainingPlan:
    """A training of the router of `recipe`, of the file `recipes`, on all of `data`: references of texts, or of data
    sets; without any, on equal parts of the recipe's domains.

    Raises UserError for all of it that cannot be. PyTorch uses `options.threads` from here on.
    """
    files.check()
    started = _with_start(recipe, recipes, options)
    _require_extra()
    from moegguf.reference.examples import equal_parts
    from moegguf.reference.train import Checkpoints, check_start, check_trainable, choose_place

    place = choose_place(options.device, options.dtype, options.threads)
    checkpoints = Checkpoints(files.folder, options.save_steps, files.resume)
    check_start(checkpoints)
    mix = _open(started, options.start)
    check_trainable(mix.router)
    notes: list[str] = []
    sets = _read(started, data, mix, options, notes)
    return TrainingPlan(
        recipe=started,
        mix=mix,
        examples=[e for each in sets.values() for e in each] if data else equal_parts([*sets.values()], options.seed),
        parts={} if data else {name: len(each) for name, each in sets.items()},
        settings=_settings(options),
        checkpoints=checkpoints,
        files=files,
        place=place,
        notes=tuple(notes),
    )


def _with_start(name: str, file: Path | None, options: TrainOptions) -> Recipe:
    """The recipe with a router to start from."""
    plain = load_recipe(name, file)
    router = _start(options.start, plain) | ({} if options.k is None else {"k": options.k})
    overrides: dict[str, object] = {"router": router} if router else {}
    if plain.router.is_gateless:
        overrides["layout"] = "auto"
    return load_recipe(name, file, overrides)


def _start(start: str | None, recipe: Recipe) -> dict[str, object]:
    """What the start changes in the table of the recipe's router."""
    if start is None:
        return {"mode": RouterMode.NOISY} if recipe.router.is_gateless else {}
    if start.endswith(".safetensors"):
        return {"file": str(Path(start).absolute())}
    if start not in STARTS:
        raise UserError(f"--start {start}: expected {', '.join(STARTS)} or FILE.safetensors", "pick one of these")
    return {"mode": RouterMode.NOISY}


def _require_extra() -> None:
    for package in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"training takes the package {package}, which is not installed here",
                "run: pip install 'moegguf[train]'",
            )


def _settings(options: TrainOptions) -> Settings:
    from moegguf.reference.train import Schedule, Settings, Variant

    return Settings(
        Variant(options.variant), options.epochs, options.batch, options.accumulate, options.lr,
        Schedule(options.schedule), options.max_steps or 0, options.balance, options.seed,
        options.gradient_checkpointing,
    )  # fmt: skip


def _open(recipe: Recipe, start: str | None) -> Mix:
    """The mix with the router that training starts from."""
    from moegguf.assembly import open_mix

    mix = open_mix(recipe, router=_fitted(recipe) if recipe.router.is_unfitted else None)
    if start != ZEROS:
        return mix
    n_routed, always_on = len(mix.router.experts), mix.router.always_on
    if mix.router.k < n_routed + (always_on is not None):
        raise UserError(
            f"--start zeros: with k {mix.router.k} of {len(mix.experts)} experts, zeros always pick the same ones",
            f"choose --start noisy, or --k {len(mix.experts)}",
        )
    return replace(mix, router=replace(mix.router, matrices={s: 0 * m for s, m in mix.router.matrices.items()}))


def _fitted(recipe: Recipe) -> Router:
    """The router of a recipe that says how to fit it."""
    from moegguf.jobs.fitting import fit_from_recipe

    return fit_from_recipe(recipe).router


# ------------------------------------------------------------------------------------------------- data


def encoder_of(mix: Mix, *, counts_all: bool) -> Callable[[Record], Example]:
    """Text to tokens, as the finished mix will see it."""
    import numpy as np

    from moegguf.jobs.torch_engine import vocab_of
    from moegguf.reference.examples import Example
    from moegguf.runtime.encode import encode
    from moegguf.runtime.template import chat_template

    vocab = vocab_of(mix)
    stored = mix.base.read_vocab().get("tokenizer.chat_template")
    template = chat_template(stored.value if stored else None, vocab)

    def example(record: Record) -> Example:
        encoded = encode(vocab, template, record)
        return Example(np.array(encoded.tokens, np.int32), 0 if counts_all else encoded.n_prompt, record.where)

    return example


def _read(
    recipe: Recipe, data: Sequence[str], mix: Mix, options: TrainOptions, notes: list[str]
) -> dict[str, list[Example]]:
    """Set of texts → its examples. Raises UserError with all faults of all texts."""
    n_seq = _n_seq(options.seq, mix)
    encode = encoder_of(mix, counts_all=options.variant == "pretrain")
    sets: dict[str, list[Example]] = {}
    faults: list[UserError] = []
    for name, refs, folder in _sources(recipe, data):
        try:
            sets[name] = [example for ref in refs for example in _usable(ref, folder, encode, n_seq, notes)]
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return sets


def _sources(recipe: Recipe, data: Sequence[str]) -> list[tuple[str, Sequence[str], Path]]:
    """Sets of texts: name, references, and what these are relative to."""
    if data:
        return [(ref, (ref,), Path()) for ref in dict.fromkeys(data)]
    if not recipe.domains:
        raise UserError(f"recipe {recipe.name}: names no domains to train on", "pass --data, or add domains to it")
    return [(name, refs, recipe.folder) for name, refs in recipe.domains.items()]


def _n_seq(asked: int | None, mix: Mix) -> int:
    context = int(mix.base.hparam("context_length", DEFAULT_SEQ))
    if asked and asked > context:
        raise UserError(f"--seq {asked}: the base's context is {context} tokens", "choose a smaller one")
    return asked or min(context, DEFAULT_SEQ)


def _usable(
    ref: str, folder: Path, encode: Callable[[Record], Example], n_seq: int, notes: list[str]
) -> Iterable[Example]:
    """The examples of `ref`. Those with no target within `n_seq` are passed over; raises UserError if all are."""
    from moegguf.reference.examples import DATASET, fit_length, read_dataset
    from moegguf.texts import read_records

    records = read_dataset(ref) if ref.startswith(DATASET) else read_records(ref, folder)
    usable, cut = [], []
    for example in fit_length(map(encode, records), n_seq):
        (usable if example.n_targets else cut).append(example)
    if not usable:
        raise UserError(
            f"{cut[0].where}: nothing to train on is left within {n_seq} tokens, nor in the rest of {ref}",
            "pass a larger --seq, or other data",
        )
    if cut:
        notes.append(f"{len(cut)} examples of {ref} have no answer within {n_seq} tokens, such as {cut[0].where}")
    return usable


# -------------------------------------------------------------------------------------------------- run


def run_training(
    plan: TrainingPlan, watch: Watch = unwatched, should_stop: Callable[[], bool] = lambda: False
) -> Training:
    """Train, and write the router, the curve and checkpoints.

    `should_stop` is asked after every step; a run that stops is saved first. Raises UserError.
    """
    from moegguf.reference.model import ReferenceModel
    from moegguf.reference.train import memory_faults, train

    with memory_faults():
        model = ReferenceModel.from_mix(plan.mix, dtype=plan.place.dtype, device=plan.place.device)
    start, n_seen, files = time.monotonic(), 0, plan.files
    with _no_empty_folder(files.folder), watch("training", "steps") as seen:

        def hear(step: Step) -> None:
            nonlocal n_seen
            seen.has(step.n_steps)
            seen.did(step.step - n_seen)
            seen.says(f"loss {step.smoothed:.4f}")
            n_seen = step.step

        trained = train(model, plan.examples, plan.settings, plan.checkpoints, on_step=hear, should_stop=should_stop)
    if files.curve:
        _write_curve(files, plan.recipe.name, trained.steps)
    if not trained.stopped_at:
        write_router(files.output, trained.router)
        if not files.checkpoints:
            _remove_checkpoints(files.folder)
    return Training(plan, trained.router, trained.steps, trained.stopped_at, time.monotonic() - start)


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Trainer makes its folder before there is anything to put into it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_curve(files: TrainFiles, name: str, steps: Sequence[Step]) -> None:
    """The loss of every step: a picture (Figures 3 and 4 of the paper), and its numbers beside it."""
    numbers = [step.step for step in steps]
    plots.curves(
        files.curve,
        f"training the router of {name}",
        {"loss": (numbers, [step.loss for step in steps]), "smoothed": (numbers, [step.smoothed for step in steps])},
        "step",
        "loss (nats per token)",
    )
    points = [{"step": step.step, "loss": step.loss, "smoothed": step.smoothed} for step in steps]
    with atomic_file(files.numbers) as file:
        file.write(json.dumps({"recipe": name, "steps": points}, indent=1).encode())
