"""Training a router by next-token loss, everything else frozen. Source: arXiv 2408.17280, whose settings are defaults.

| variant | trained | counts in the loss |
|---|---|---|
| router | router | answers of instructions |
| router+embeddings | router, token embeddings (where they are tied, the output too) | answers |
| router+o_proj | router, the output projections of attention | answers |
| pretrain | router | every token of plain text |

Method: transformers' `Trainer` with AdamW. The loss is the mean over all targets of an accumulated batch, however
they are spread over its micro-batches. What is trained is float32; with bfloat16 the frozen weights and the
arithmetic are bfloat16 (autocast), the optimiser is not.

Load balancing is off unless `balance` is given. It adds balance · N · Σ_e f_e · P_e (Switch; Mixtral's
`load_balancing_loss_func`: all layers together, f_e sums up to k), with f_e, the share of tokens that choose expert
e, and P_e, its mean probability, over the whole accumulated batch: over one sequence of one domain the term would
forbid experts to specialise (arXiv 2501.11873). f_e has no gradient, so it is counted ahead, in a forward pass of its
own over the batch, and the micro-batches' terms add up to exactly the term of the whole.

Invariants
- What is frozen is proven so: SHA-256 of its bytes before and after, and a difference is an error of ours.
- A step whose loss or gradients are not finite is not taken. Training ends there and checkpoints stay as they are.
- A run that is resumed from a checkpoint ends with the router of one that was never interrupted. A checkpoint knows
  what it is of (settings, model, start, data); with anything else it is refused.

Checkpoints are Trainer's, with the trained parameters only: `model.safetensors`, JSON, and the states of optimiser,
scheduler and random numbers, which this transformers (5.23) writes by `torch.save` and reads by
`torch.load(weights_only=True)`, so tensors and plain values are all that a file from elsewhere could bring in. Its
`training_args.bin`, a full pickle, is written and never read. `run.json` of ours is written last: a checkpoint
without it was cut short, and is passed over.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import safe_globals

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.recipe import RouterMode
from moegguf.reference.examples import IGNORED, Example, collate
from moegguf.reference.model import ReferenceModel
from moegguf.routers import Router, Site

KEPT_CHECKPOINTS = 2
SMOOTHING = 0.95
"""Weight of the past in a smoothed loss."""
_MARK = "run.json"
_TENSORS = "model.safetensors"
_CHECKPOINT = "checkpoint-"
"""What Trainer calls the folders of its checkpoints; the number of a step follows."""


class Variant(StrEnum):
    """What is trained, and on what: the rows of the table above."""

    ROUTER = "router"
    EMBEDDINGS = "router+embeddings"
    O_PROJ = "router+o_proj"
    PRETRAIN = "pretrain"


_TRUNK_ROLES = {Variant.EMBEDDINGS: "token_embd", Variant.O_PROJ: "attn_output"}
"""The role of the trunk's tensors that a variant trains along with the router."""


class Schedule(StrEnum):
    """How the learning rate goes; names of transformers."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults are those of the paper. `max_steps` of 0 leaves the length to `epochs`."""

    variant: Variant = Variant.ROUTER
    epochs: float = 1.0
    batch: int = 1
    accumulate: int = 16
    lr: float = 1e-4
    schedule: Schedule = Schedule.CONSTANT
    max_steps: int = 0
    balance: float = 0.0
    seed: int = 0
    gradient_checkpointing: bool = False
    """Keep a layer's input only and compute the layer again when its gradient is due: less memory, more time."""


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often, in steps, a run is saved, and whether to go on from the last checkpoint there."""

    folder: Path
    save_steps: int = 500
    resume: bool = False


@dataclass(frozen=True)
class Step:
    """A step that was taken. `loss` is in nats per target, with the balance term where there is one."""

    step: int
    n_steps: int
    loss: float
    smoothed: float
    """Running mean that forgets with `SMOOTHING`."""


@dataclass(frozen=True)
class Trained:
    """The outcome. `stopped_at` is the checkpoint of a run that was asked to stop before its end."""

    router: Router
    steps: tuple[Step, ...]
    stopped_at: Path | None = None


def train(
    model: ReferenceModel,
    examples: Sequence[Example],
    settings: Settings,
    checkpoints: Checkpoints,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train the router of `model` in place, on the device that it is on, in the type that its weights have.

    `examples` all have a target. `should_stop` is asked after every step; a run that stops is saved first. Raises
    UserError when the checkpoints are of another run, when a loss is not finite, and when the mix has nothing of what
    the variant trains.
    """
    trained = _choose_parameters(model, settings.variant)
    frozen = digest_of_frozen(model)
    run = _identity(model, trained, frozen, examples, settings)
    start = check_start(checkpoints)
    if start:
        _check_is_of(start, run)
    with _quiet(), _checkpointed(model, settings.gradient_checkpointing):
        trainer = _Trainer(
            model=model,
            args=_arguments(model, settings, checkpoints),
            train_dataset=examples,
            data_collator=collate,
            callbacks=[_Watch(run, on_step, should_stop)],
            balance=settings.balance,
        )
        try:
            with memory_faults():
                trainer.train(resume_from_checkpoint=start and str(start))
        except _NotFinite as error:
            raise UserError(f"step {trainer.state.global_step + 1}: {error}", _mend(checkpoints)) from None
    if digest_of_frozen(model) != frozen:
        raise RuntimeError("training has changed parameters that were frozen")
    state = trainer.state
    steps = tuple(_steps(state))
    is_complete = state.global_step >= state.max_steps
    record = {"start": str(model.router().mode)} | _record(settings, state, steps, frozen, len(examples))
    stopped_at = None if is_complete else _checkpoint_folder(checkpoints, state.global_step)
    return Trained(_router(model, trained, record), steps, stopped_at)


class Place(NamedTuple):
    """Where to train, and the type of what is frozen, which is that of the arithmetic."""

    device: torch.device
    dtype: torch.dtype

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_place(device: str, dtype: str, threads: int | None) -> Place:
    """Where to train and the type of what is frozen; `auto` is a GPU if there is one, and there bfloat16.

    All of PyTorch uses `threads` from now on, if given. Raises UserError where there is no GPU and one is asked for.
    """
    if threads:
        torch.set_num_threads(threads)
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: PyTorch finds no GPU here", "leave it out to train on the CPU")
    device = "cuda" if device != "cpu" and has_gpu else "cpu"
    dtype = dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return Place(torch.device(device), getattr(torch, dtype))


@contextmanager
def memory_faults() -> Iterator[None]:
    """Turns a GPU that is full into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the memory of the GPU is full",
            "pass --gradient-checkpointing, a smaller --batch or --seq, or --device cpu",
        ) from error


# --------------------------------------------------------------------------------------- what is trained


def check_trainable(router: Router) -> None:
    """Raises UserError for a router that the loss has no gradient for."""
    if router.is_gateless:
        raise UserError("the mix is gate-less, so it has no router to train", "start from a noisy router")
    if _n_top(router) < 2:
        always_on = f" and {router.always_on} always on" if router.always_on else ""
        raise UserError(
            f"with k {router.k}{always_on} one expert is chosen, whose share is 1 whatever the router says: it cannot "
            "learn from the loss",
            f"train with --k {router.k + 1}; a build may take fewer of the same router",
        )


def _n_top(router: Router) -> int:
    """How many of the routed experts are chosen."""
    return router.k - (router.always_on is not None)


def _choose_parameters(model: ReferenceModel, variant: Variant) -> dict[str, nn.Parameter]:
    """What `variant` trains, by name in the model, made float32; all else is frozen."""
    check_trainable(model.router())
    routers = {id(parameter) for parameter in model.routers.values()}
    role = _TRUNK_ROLES.get(variant)
    pattern = re.compile(rf"(blk\.\d+\.)?{role}\.(weight|bias)")
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in routers or bool(role and pattern.fullmatch(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained[name] = parameter
    if role and not any(pattern.fullmatch(name) for name in trained):
        raise UserError(
            f"variant {variant}: the mix has no {role} outside its experts", f"choose variant {Variant.ROUTER}"
        )
    return trained


def digest_of_frozen(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the names and bytes of all parameters that are frozen."""
    return _digest((name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad)


def _digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    total = sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _router(model: ReferenceModel, trained: Mapping[str, nn.Parameter], record: Mapping[str, str]) -> Router:
    """The trained router. Trunk tensors that an earlier training changed stay in it."""
    router = model.router()
    routers = {id(parameter) for parameter in model.routers.values()}
    trunk = {name: p.detach().cpu().numpy() for name, p in trained.items() if id(p) not in routers}
    return replace(
        router, mode=RouterMode.TRAINED, std=None, seed=None, settings=record, trunk={**router.trunk, **trunk}
    )


def _record(
    settings: Settings, state: transformers.TrainerState, steps: Sequence[Step], frozen: str, n_examples: int
) -> dict[str, str]:
    """What the router file says of its training."""
    losses = f"{steps[0].loss:.4f} → {steps[-1].smoothed:.4f}" if steps else "no step"
    return {
        "variant": str(settings.variant),
        "steps": str(state.global_step),
        "examples": str(n_examples),
        "target tokens": str(state.num_input_tokens_seen),
        "loss": losses,
        "lr": f"{settings.lr:g} {settings.schedule}",
        "batch": f"{settings.batch} × {settings.accumulate}",
        "balance": f"{settings.balance:g}",
        "seed": str(settings.seed),
        "frozen sha256": frozen,
    }


# --------------------------------------------------------------------------------------------- the loss


class _NotFinite(Exception):
    """A loss or a gradient is NaN or infinite."""


class _Trainer(transformers.Trainer):
    """Trainer with the loss above. `num_input_tokens_seen` of its state counts targets."""

    def __init__(self, *, balance: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.balance = balance
        self.model_accepts_loss_kwargs = True  # so targets are counted, and the loss is not scaled once more
        self.remove_callback(transformers.PrinterCallback)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and their targets; here they are seen together, so the load is counted."""
        batches, n_targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.state.num_input_tokens_seen += int(n_targets or 0)
        if self.balance:
            self._load, self._n_choices = self._count_load(batches)
        return batches, n_targets

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the loss of its step."""
        output = model(inputs["tokens"])
        logits, labels = output.logits.flatten(0, 1).float(), inputs["labels"].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_items_in_batch
        if self.balance:
            probs = chosen_from(output.routing, inputs["is_token"])
            loss = loss + self.balance * balance_term(probs, self._load, self._n_choices)
        if not loss.isfinite():
            raise _NotFinite(f"the loss is {loss.item()}")
        return (loss, output) if return_outputs else loss

    @torch.no_grad()
    def _count_load(self, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, int]:
        router = self.model.router()
        load, n_choices = torch.zeros(len(router.experts), device=self.args.device), 0
        for batch in map(self._prepare_inputs, batches):
            probs = chosen_from(self.model(batch["tokens"]).routing, batch["is_token"])
            load += probs.topk(_n_top(router)).indices.flatten().bincount(minlength=len(load))
            n_choices += len(probs)
        return load / max(1, n_choices), n_choices

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # of the file system, safetensors and torch
            message = f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be written"
            raise UserError(f"{message} ({error})", "check the disk, then go on with --resume") from error

    def _save(self, output_dir=None, state_dict=None):
        """Only what is trained goes into a checkpoint."""
        super()._save(output_dir, self._trained())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        tensors, trained = load_file(Path(resume_from_checkpoint) / _TENSORS), self._trained()
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in trained.items()}:
            raise _damaged(Path(resume_from_checkpoint), "other tensors")
        for name, values in tensors.items():
            trained[name].copy_(values)

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


def chosen_from(routing: Mapping[Site, Tensor], is_token: Tensor) -> Tensor:
    """The probabilities of all choices, (n_site · n_token, n_routed): of every router and every token, not padding."""
    return torch.cat([probs[is_token] for probs in routing.values()])


def balance_term(probs: Tensor, load: Tensor, n_choices: int) -> Tensor:
    """N · Σ_e f_e · P_e, or the part of it that is due to some of a batch's choices.

    `probs` (n, N) are the probabilities of these, `load` (N,) is f of the batch and `n_choices` their number in it.
    Least where the load is even: it is then the number of experts that each choice picks.
    """
    return probs.shape[-1] * (load * probs.sum(dim=0)).sum() / n_choices


@contextmanager
def _checkpointed(model: ReferenceModel, is_wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of every layer, while the block runs."""
    blocks = model.blk if is_wanted else ()
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


# ---------------------------------------------------------------------------------------- the run of Trainer


def _arguments(model: ReferenceModel, settings: Settings, checkpoints: Checkpoints) -> transformers.TrainingArguments:
    device, dtype = model.token_embd.weight.device, model.output_norm.weight.dtype
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints.folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type=str(settings.schedule),
        seed=settings.seed,
        bf16=dtype is torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=checkpoints.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    if device.type != "cpu":
        arguments._n_gpu = 1  # where there are more, Trainer would copy the model to all of them
    return arguments


class _Watch(transformers.TrainerCallback):
    """Tells of steps, refuses those that are not finite, stops when asked to, and marks finished checkpoints."""

    def __init__(
        self, run: Mapping[str, object], on_step: Callable[[Step], None], should_stop: Callable[[], bool]
    ) -> None:
        self._run, self._on_step, self._should_stop = run, on_step, should_stop

    def on_pre_optimizer_step(self, args, state, control, *, model, **_) -> None:
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise _NotFinite("the gradients are not finite, though the loss is")

    def on_log(self, args, state, control, **_) -> None:
        if "loss" in state.log_history[-1]:
            *_, step = _steps(state)
            self._on_step(step)

    def on_step_end(self, args, state, control, **_) -> None:
        if self._should_stop():
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_) -> None:
        with atomic_file(Path(args.output_dir) / f"{_CHECKPOINT}{state.global_step}" / _MARK) as file:
            file.write(json.dumps(self._run, indent=2).encode())


def _steps(state: transformers.TrainerState) -> Iterator[Step]:
    """Every step so far, those before an interruption included."""
    total = weight = 0.0
    for entry in state.log_history:
        if "loss" in entry:
            total = SMOOTHING * total + (1 - SMOOTHING) * entry["loss"]
            weight = SMOOTHING * weight + 1 - SMOOTHING
            yield Step(entry["step"], state.max_steps, entry["loss"], total / weight)


@contextmanager
def _quiet() -> Iterator[None]:
    """Whatever transformers, accelerate and torch have to remark is not for users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------- checkpoints


def _identity(
    model: ReferenceModel,
    trained: Mapping[str, nn.Parameter],
    frozen: str,
    examples: Sequence[Example],
    settings: Settings,
) -> dict[str, object]:
    """What a checkpoint must agree in with the run that goes on from it: all that changes numbers."""
    router = model.router()
    hyperparameters = asdict(settings)
    del hyperparameters["gradient_checkpointing"]
    data = sha256()
    for example in examples:
        data.update(f"{example.n_prompt} {len(example.tokens)} ".encode())
        data.update(example.tokens.data)
    return {
        **hyperparameters,
        "experts": list(router.experts),
        "k": router.k,
        "always on": router.always_on,
        "weights": frozen,
        "start": _digest((name, parameter.detach()) for name, parameter in trained.items()),
        "data": data.hexdigest(),
    }


def check_start(checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, or None to begin anew. Raises UserError where the folder does not allow it."""
    folder = checkpoints.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is no folder", "choose another --checkpoints")
    last = last_checkpoint(folder)
    if last and not checkpoints.resume:
        raise UserError(
            f"{folder}: holds checkpoints of an earlier run",
            "pass --resume to go on from them, delete them, or choose another --checkpoints",
        )
    if checkpoints.resume and not last:
        raise UserError(f"{folder}: holds no checkpoint to go on from", "leave out --resume")
    if last:
        _check_loadable(last)
    return last


def _check_is_of(start: Path, run: Mapping[str, object]) -> None:
    """Raises UserError unless the checkpoint `start` is of `run`."""
    found = json.loads((start / _MARK).read_text())
    if differing := [key for key in {**found, **run} if found.get(key) != run.get(key)]:
        raise UserError(
            f"{start}: is of another run, which differs in {', '.join(differing)}",
            "give the recipe, the data and the flags of that run, or choose another --checkpoints",
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    marks = [mark for mark in folder.glob(f"{_CHECKPOINT}*/{_MARK}") if _step_of(mark.parent) is not None]
    return max((mark.parent for mark in marks), key=_step_of, default=None)


def _step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix(_CHECKPOINT)
    return int(number) if number.isdecimal() else None


def _checkpoint_folder(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.folder / f"{_CHECKPOINT}{step}"


def _check_loadable(folder: Path) -> None:
    """Raises UserError unless all files that Trainer will load can be, read as it reads them."""
    try:
        json.loads((folder / _MARK).read_text())
        transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        load_file(folder / _TENSORS)
        with safe_globals(), _quiet():
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # of JSON, safetensors, zip or the unpickler: there is no common class
        raise _damaged(folder, type(error).__name__) from error


def _damaged(folder: Path, how: str) -> UserError:
    return UserError(f"{folder}: is a damaged checkpoint ({how})", "delete that folder; an earlier one may do")


def _mend(checkpoints: Checkpoints) -> str:
    last = last_checkpoint(checkpoints.folder)
    kept = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is {last}"
    return f"lower --lr, or look for faulty data; {kept}"
