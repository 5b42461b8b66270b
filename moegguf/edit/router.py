"""Another router for a finished mix: in place, in a moment.

A router is a few float32 matrices and some keys, so replacing it rewrites the header and those matrices. The router
that the file had is kept beside it and can be set again, which restores every byte.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.atomic import atomic_file, check_writable
from moegguf.checks import check_range
from moegguf.edit.change import check_ending, refitted_header, with_card
from moegguf.edit.finished import FinishedMix, read_routed_mix
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.journal import UNDONE, Patch, apply, locked, recover
from moegguf.metadata import Card
from moegguf.recipe import Layout, RouterMode, RouterSpec
from moegguf.routers import Router, fit_into, make_router
from moegguf.routers.file import read_router, router_bytes
from moegguf.tensor import Metadata, Part, Planned, Slot, constant
from moegguf.watch import unheard
from moegguf.writer import Written, header_bytes, write_gguf


@dataclass(frozen=True)
class ChangedRouter:
    """A mix whose router was replaced by that of `card`. The `old` one is kept in the file `kept`."""

    path: Path
    card: Card
    old: Router
    kept: Path
    seconds: float
    is_undone: bool
    """Whether an interrupted change of the mix was undone first."""

    def as_json(self) -> dict[str, object]:
        """As the command reports it."""
        return {
            "file": str(self.path),
            "in_place": True,
            "experts": [{"name": expert.name, "source": expert.source} for expert in self.card.experts],
            "router": self.card.describe_router(),
            "old_router": {"mode": self.old.mode, "file": str(self.kept)},
            "seconds": round(self.seconds, 3),
            "notes": notes_on(self.path, self.is_undone),
        }


@dataclass(frozen=True)
class Adapter:
    """A file that turns the router of `mix` into `router`."""

    path: Path
    mix: Path
    router: Router
    n_bytes: int
    is_undone: bool
    """Whether an interrupted change of the mix was undone first."""

    def as_json(self) -> dict[str, object]:
        """As the command reports it."""
        return {
            "file": str(self.path),
            "mix": str(self.mix),
            "bytes": self.n_bytes,
            "mode": self.router.mode,
            "experts": list(self.router.experts),
            "k": self.router.k,
            "notes": notes_on(self.mix, self.is_undone),
        }


def notes_on(mix: Path, is_undone: bool) -> list[str]:
    """What whoever opened `mix` should know."""
    return [f"{mix}: {UNDONE}"] if is_undone else []


def open_routed_mix(path: Path) -> tuple[FinishedMix, bool]:
    """The finished mix at `path`, and whether an interrupted change of it was undone first.

    Raises UserError as `read_routed_mix` does.
    """
    is_undone = recover(path)
    return read_routed_mix(path), is_undone


def kept_router(path: Path) -> Path:
    """Where the router is kept that the last change of the mix at `path` replaced."""
    path = path.resolve()  # one mix, whatever links lead to it
    return path.with_name(f"{path.name}.old-router.safetensors")


def change_router(path: Path, name: str, *, k: int | None = None, std: float | None = None) -> ChangedRouter:
    """Set the router that a user names, see `named_router`, in the mix at `path`, and keep the one that it had.

    Raises UserError where it cannot be set; then the mix, and what was kept before, stay as they are.
    """
    start = time.monotonic()
    mix, is_undone = open_routed_mix(path)
    router, old, kept = named_router(mix, name, k, std), router_of(mix), kept_router(path)
    with atomic_file(kept) as file:
        file.write(router_bytes(old))
        set_router(mix, router)
    return ChangedRouter(path, read_routed_mix(path).card, old, kept, time.monotonic() - start, is_undone)


def export_router(path: Path, name: str, output: Path, *, overwrite: bool = False) -> Adapter:
    """Write the router that a user names, see `named_router`, as an adapter for the mix at `path`.

    Raises UserError as `write_adapter` does.
    """
    mix, is_undone = open_routed_mix(path)
    router = named_router(mix, name, mix.card.k if name.startswith(RouterMode.NOISY) else None)
    written = write_adapter(mix, router, output, overwrite=overwrite)
    return Adapter(output, path, router, written.n_bytes, is_undone)


def router_of(mix: FinishedMix) -> Router:
    """The router that is in the file."""
    card = mix.card
    matrices = {}
    with open(mix.path, "rb") as file:
        for site, info in mix.sites.items():
            file.seek(info.offset)
            matrices[site] = np.frombuffer(file.read(info.nbytes), "<f4").reshape(info.shape)
    return Router(
        RouterMode(card.router), mix.routed_names, card.k, matrices, card.always_on, card.shared, card.std, card.seed,
        card.settings,
    )  # fmt: skip


def named_router(mix: FinishedMix, name: str, k: int | None = None, std: float | None = None) -> Router:
    """The router that a user names: a file, gateless, noisy or noisy:SEED, with `k` and `std` in place of its own.

    Raises UserError when there is no such router, or when it cannot be one of `mix`.
    """
    always_on, n = mix.card.always_on, len(mix.expert_names)
    check_range("--k", k, 1, n)
    if std is not None and not (isinstance(std, int | float) and 0 < std <= 10):
        raise UserError(f"--std {std}: expected more than 0 and at most 10", "the paper's noise is small")
    if name.endswith(".safetensors"):
        if std is not None:
            raise UserError(f"--std {std}: goes with --router noisy", "leave it out")
        return accept(mix, read_router(Path(name)), RouterSpec(RouterMode.TRAINED, k or 0, always_on=always_on), name)
    if name == RouterMode.GATELESS:
        if k not in (None, n) or std is not None:
            raise UserError("--k and --std go with --router noisy: a gate-less mix runs all experts", "leave them out")
        spec = RouterSpec(RouterMode.GATELESS, n)
    else:
        spec = RouterSpec(RouterMode.NOISY, k or min(2, n), std or RouterSpec.std, _seed(name), always_on)
    return accept(mix, make_router(spec, mix.expert_names, mix.widths), spec, f"--router {name}")


def _seed(name: str) -> int:
    """The seed of noisy:SEED; 0 without one."""
    mode, _, seed = name.partition(":")
    if mode == RouterMode.NOISY and (not seed or (seed.isdecimal() and int(seed) < 2**32)):
        return int(seed or 0)
    raise UserError(
        f"--router {name}: expected a .safetensors file, gateless, noisy or noisy:SEED",
        "fit one with `moegguf route fit`",
    )


def accept(mix: FinishedMix, router: Router, spec: RouterSpec, where: str) -> Router:
    """`router`, that came from `where`, as one for `mix`. Raises UserError with every reason why it cannot be one."""
    if router.trunk:
        raise UserError(
            f"{where}: was trained together with {', '.join(router.trunk)}, which this file does not have",
            f"build the mix with it: moegguf build … --router {where}",
        )
    accepted = fit_into(router, replace(spec, always_on=mix.card.always_on), mix.expert_names, mix.widths, where)
    if fault := _layout_fault(mix, accepted):
        raise fault
    return accepted


def _layout_fault(mix: FinishedMix, router: Router) -> UserError | None:
    """Factors that a build folds into the down projections bind a file to routers of their kind."""
    card = mix.card
    if not mix.sites and not router.is_gateless:
        return UserError(f"{mix.path}: has no router in it: layout {card.layout}", "build it as mixtral")
    if card.layout == Layout.SHARED and card.is_gateless:
        return UserError(f"{mix.path}: its shared group always runs, so no router can choose", "build it as mixtral")
    if router.is_gateless and card.layout == Layout.SHARED:
        return UserError(f"{mix.path}: {card.always_on} is always on in it, gate-less has no such", "build it again")
    if card.is_weighted and not router.is_gateless:
        return UserError(
            f"{mix.path}: its experts have weights, which are folded into them: no router can take their place",
            "build it without weights",
        )
    if card.layout == Layout.SHARED and router.k != card.k:
        return UserError(f"{mix.path}: k is {card.k} by its weights, the router has {router.k}", f"pass --k {card.k}")
    return None


def set_router(mix: FinishedMix, router: Router) -> None:
    """Write `router`, which `accept` gave, into the file of `mix`: in place, and whole or not at all.

    Raises UserError when the header has no room for what it must say.
    """
    matrices = [
        Patch(info.offset, np.ascontiguousarray(router.matrices[site], "<f4").tobytes())
        for site, info in mix.sites.items()
    ]
    with locked(mix.path) as file:
        header = refitted_header(mix, file, _rerouted(mix, router))
        apply(mix.path, file, [header, *matrices])


def _rerouted(mix: FinishedMix, router: Router) -> Metadata:
    """The keys of the file with those of `router`."""
    used = GGUFValue(router.k - 1 if router.always_on else router.k, GGUFValueType.UINT32)
    return with_card(mix.metadata | {f"{mix.arch}.expert_used_count": used}, card_with(mix.card, router))


def card_with(card: Card, router: Router) -> Card:
    """`card` with what it says of the router."""
    return replace(
        card,
        router=router.mode,
        k=router.k,
        std=router.std,
        seed=router.seed,
        shared=router.shared,
        settings=router.settings,
        router_digest=router.digest if router.is_stored else "",
    )


def write_adapter(mix: FinishedMix, router: Router, output: Path, *, overwrite: bool = False) -> Written:
    """Write what turns the router in the file into `router`, as a LoRA adapter of llama.cpp, to `output`.

    ΔW = B A, with A = ΔW (n_expert, n_embd) and B the identity, alpha = rank: llama.cpp scales by alpha / rank
    (src/llama-adapter.cpp). An adapter cannot change how many experts run.
    Raises UserError when the file runs another number of experts, or `output` cannot be written.
    """
    if router.k != mix.card.k:
        raise UserError(
            f"{mix.path}: runs {mix.card.k} experts a token, the router {router.k}, and no adapter can change that",
            f"set it in the file with `moegguf route set`, or fit it with --k {mix.card.k}",
        )
    _check_adapter_target(output, overwrite)
    old = router_of(mix)
    tensors = [
        constant(f"{info.name}.{part}", values)
        for site, info in mix.sites.items()
        for part, values in (
            ("lora_a", router.matrices[site] - old.matrices[site]),
            ("lora_b", np.eye(info.shape[0], dtype=np.float32)),
        )
    ]
    planned = [Planned(Slot(tensor.name, tensor.shape, ((Part(tensor),),)), tensor.type) for tensor in tensors]
    string = GGUFValueType.STRING
    metadata = {
        "general.type": GGUFValue("adapter", string),
        "general.name": GGUFValue(f"{mix.card.name}, {router.mode} router", string),
        "adapter.type": GGUFValue("lora", string),
        "adapter.lora.alpha": GGUFValue(float(len(router.experts)), GGUFValueType.FLOAT32),
    }
    header = header_bytes(mix.arch, metadata, planned)
    return write_gguf(output, header, planned, 1, unheard)


def _check_adapter_target(output: Path, overwrite: bool) -> None:
    """Raises UserError where no adapter can be written. What is there and no adapter is never overwritten."""
    check_ending(output)
    if output.is_file() and read_header(output).get("general.type") != "adapter":
        raise UserError(f"{output}: is there already, and no adapter", "choose another -o")
    check_writable(output, overwrite)
