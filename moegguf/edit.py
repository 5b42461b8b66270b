"""Changes to a finished mix, in seconds: nothing is quantised again and no tensor moves.

A router is a few float32 matrices and some keys, so replacing it rewrites the header, into the room that the build
kept free in it, and those matrices; everything goes through a journal. `read_mix` gives what is needed to judge a
file; `set_router` changes it; the router it had can be set again, which restores every byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedRandom
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.gguf_header import Header, TensorInfo, read_header
from moegguf.journal import Patch, apply, locked
from moegguf.metadata import PREFIX, SPARE, Card, read_card, spare_bytes
from moegguf.recipe import Layout, RouterMode, RouterSpec
from moegguf.routers import FFN, Router, Site, fit_into, make_router
from moegguf.routers.file import read_router
from moegguf.tensor import Metadata, Part, Planned, Slot, constant
from moegguf.writer import header_bytes, unpadded_header_bytes, write_gguf


@dataclass(frozen=True)
class FinishedMix:
    """A mix as a file. `sites` are the tensors that hold its router."""

    header: Header
    card: Card
    sites: Mapping[Site, TensorInfo]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.card.experts)

    @property
    def widths(self) -> dict[Site, int]:
        """The size of what each router sees."""
        return {site: info.shape[-1] for site, info in self.sites.items()}


def read_mix(path: Path) -> FinishedMix:
    """The finished mix at `path`. Raises UserError when it is no mix of ours, or has no router in it."""
    header = read_header(path)
    card = read_card(header)
    if card is None:
        raise UserError(f"{path}: was not made by moegguf, so its experts are unknown", "pass a mix that it built")
    names = {name: TensorName.parse(name) for name in header.tensors}
    routers = {name: parsed.layer for name, parsed in names.items() if parsed.role == "ffn_gate_inp"}
    sites = {(layer or 0, FFN): header.tensors[name] for name, layer in routers.items()}
    if not sites:
        raise UserError(
            f"{path}: has no router in it: layout {card.layout} holds one FFN for all experts",
            "build the mix with layout mixtral",
        )
    if wrong := [info for info in sites.values() if info.type.name != "F32" or len(info.shape) != 2]:
        raise UserError(f"{path}: {wrong[0].name} is {wrong[0].type.name}, expected an F32 matrix", "build it again")
    return FinishedMix(header, card, dict(sorted(sites.items())))


def router_of(mix: FinishedMix) -> Router:
    """The router that is in the file."""
    card = mix.card
    matrices = {}
    with open(mix.path, "rb") as file:
        for site, info in mix.sites.items():
            file.seek(info.offset)
            matrices[site] = np.frombuffer(file.read(info.nbytes), "<f4").reshape(info.shape)
    routed = tuple(name for name in mix.expert_names if name != card.always_on)
    if card.is_gateless:
        routed = mix.expert_names
    return Router(
        RouterMode(card.router), routed, card.k, matrices, card.always_on, card.shared, card.std, card.seed,
        card.settings,
    )  # fmt: skip


def named_router(mix: FinishedMix, name: str, k: int | None = None, std: float | None = None) -> Router:
    """The router that a user names: a file, gateless, noisy or noisy:SEED, with `k` and `std` in place of its own.

    Raises UserError when there is no such router, or when it cannot be one of `mix`.
    """
    always_on, n = mix.card.always_on, len(mix.expert_names)
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
    if not 1 <= spec.k <= n:
        raise UserError(f"--k {spec.k}: expected 1 to {n}", "the mix has that many experts")
    if not 0 < spec.std <= 10:
        raise UserError(f"--std {std}: expected more than 0 and at most 10", "the paper's noise is small")
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
    if card.layout == Layout.SHARED and card.is_gateless:
        return UserError(f"{mix.path}: its shared group always runs, so no router can choose", "build it as mixtral")
    if router.is_gateless and card.layout == Layout.SHARED:
        return UserError(f"{mix.path}: {card.always_on} is always on in it, gate-less has no such", "build it again")
    if len({expert.weight for expert in card.experts}) > 1 and not router.is_gateless:
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
        apply(mix.path, file, [Patch(0, _with_router(mix, file, router)), *matrices])


def _with_router(mix: FinishedMix, file: BufferedRandom, router: Router) -> bytes:
    """The header of the file with the keys of another router, as long as it was."""
    metadata = {key: mix.header.value(key) for key in mix.header.fields}
    old = _header(mix, metadata)
    file.seek(0)
    if file.read(len(old)) != old or SPARE not in metadata:
        raise UserError(f"{mix.path}: its header was changed by another program", "build the mix again")
    changed = _rerouted(mix, router, metadata)
    n_spare = len(metadata[SPARE].value) + len(old) - len(_header(mix, changed))
    if n_spare < 1:
        raise UserError(f"{mix.path}: its header has no room for this router's settings", "build the mix again")
    return _header(mix, changed | spare_bytes(n_spare))


def _rerouted(mix: FinishedMix, router: Router, metadata: Metadata) -> Metadata:
    """`metadata` with the keys of `router`, in the order that a build writes."""
    card = replace(
        mix.card,
        router=router.mode,
        k=router.k,
        std=router.std,
        seed=router.seed,
        shared=router.shared,
        settings=router.settings,
        router_digest=router.digest if router.is_stored else "",
    )
    stock = {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}
    used = GGUFValue(router.k - 1 if router.always_on else router.k, GGUFValueType.UINT32)
    stock[f"{mix.header.get('general.architecture')}.expert_used_count"] = used
    return stock | card.to_metadata() | {SPARE: metadata[SPARE]}


def _header(mix: FinishedMix, metadata: Metadata) -> bytes:
    tensors = sorted(mix.header.tensors.values(), key=lambda info: info.offset)
    return unpadded_header_bytes(mix.header.get("general.architecture"), metadata, tensors)


def write_adapter(mix: FinishedMix, router: Router, output: Path) -> None:
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
    if output.exists() and output.samefile(mix.path):
        raise UserError(f"{output}: is the mix itself", "choose another -o")
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
    arch, string = mix.header.get("general.architecture"), GGUFValueType.STRING
    metadata = {
        "general.type": GGUFValue("adapter", string),
        "general.name": GGUFValue(f"{mix.card.name}, {router.mode} router", string),
        "adapter.type": GGUFValue("lora", string),
        "adapter.lora.alpha": GGUFValue(float(len(router.experts)), GGUFValueType.FLOAT32),
    }
    write_gguf(output, header_bytes(arch, metadata, planned), planned, 1, lambda n_bytes: None)
