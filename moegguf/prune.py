"""A finished mix without some of its experts: a copy of the file, less their slices and their rows of the router.

Nothing is decoded or quantised again: every byte of what stays is copied, so the tensors are those of a fresh build
without these experts, where its preset chooses the same types (llama.cpp's rules for attn_v, attn_k, attn_output and
ffn_down ask whether there are four experts, or eight). A router loses rows and is not fitted again.

What a build has folded into the down projections sets the limits. Gate-less experts of equal shares carry no factor, so
the mean of those that stay is exact; given shares are folded in, and so is the number k of a mix with an always-on
expert: such files are refused where that would change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from gguf import GGUFValue, GGUFValueType, size_label

from moegguf.build import base_models, check_target
from moegguf.edit import FinishedMix, router_of
from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.metadata import PREFIX, SPARE, Card
from moegguf.recipe import Layout, RouterMode
from moegguf.sources.gguf_file import open_gguf
from moegguf.tensor import Metadata, Part, Planned, Slot, Tensor
from moegguf.writer import header_bytes, write_gguf


@dataclass(frozen=True)
class Pruned:
    """A mix without some experts, decided but not written."""

    card: Card
    header: bytes
    planned: tuple[Planned, ...]

    @property
    def n_bytes(self) -> int:
        """Of tensor data."""
        return sum(tensor.nbytes for tensor in self.planned)


def plan_prune(mix: FinishedMix, drop: Sequence[str], output: Path, *, overwrite: bool = False) -> Pruned:
    """`mix` without the experts `drop`, to be written to `output`. Reads no weight.

    Raises UserError, with every fault that is found, where these cannot be dropped from this file.
    """
    if faults := [*_unknown(mix, drop), *_layout_faults(mix)]:
        raise UserError.of(faults)
    check_target(output, overwrite)
    if output.exists() and output.samefile(mix.path):
        raise UserError(f"{output}: is the mix itself", "choose another -o")
    card = _card(mix, drop)
    if fault := _folded_fault(mix, card):
        raise fault
    rows = [i for i, name in enumerate(routed(mix.card)) if name not in drop]
    source = open_gguf(mix.path, str(mix.path), mix.path.name)
    order = sorted(mix.header.tensors.values(), key=lambda info: info.offset)
    planned = tuple(_without(source.tensors[info.name], rows) for info in order)
    metadata = _metadata(mix, card, planned)
    return Pruned(card, header_bytes(mix.header.get("general.architecture"), metadata, planned), planned)


def write_pruned(
    pruned: Pruned, output: Path, *, threads: int = 1, progress: Callable[[int], None] = lambda n_bytes: None
) -> int:
    """Write it to `output`, whole or not at all; returns the size of the file in bytes."""
    return write_gguf(output, pruned.header, pruned.planned, threads, progress).n_bytes


def routed(card: Card) -> list[str]:
    """The experts behind the router, in order."""
    return [expert.name for expert in card.experts if expert.name != card.always_on]


def _unknown(mix: FinishedMix, drop: Sequence[str]) -> Iterator[UserError]:
    names = routed(mix.card)
    for name in drop:
        if name == mix.card.always_on:
            yield UserError(f"{mix.path}: {name} is always on, so it cannot be dropped", "build the mix without it")
        elif name not in names:
            yield UserError(f"{mix.path}: has no expert {name!r}, only {', '.join(names)}", "name one of these")
    if not set(names) - set(drop):
        yield UserError(f"{mix.path}: no expert would be left of {', '.join(names)}", "keep at least one")


def _layout_faults(mix: FinishedMix) -> Iterator[UserError]:
    card = mix.card
    if card.is_gateless and card.layout != Layout.MIXTRAL:
        yield UserError(
            f"{mix.path}: layout {card.layout} has folded the number of experts into its weights",
            "build it without that expert, or prune one of layout mixtral",
        )
    elif len({expert.weight for expert in card.experts}) > 1:
        yield UserError(
            f"{mix.path}: its experts have weights, which are folded into them for just these experts",
            "build it without that expert",
        )


def _card(mix: FinishedMix, drop: Sequence[str]) -> Card:
    card = mix.card
    experts = [expert for expert in card.experts if expert.name not in drop]
    n = len(experts)
    pruned = replace(
        card, k=min(card.k, n), experts=tuple(replace(expert, weight=1 / n) for expert in experts)
    )  # fmt: skip
    if card.is_gateless:
        return pruned
    router = router_of(mix)
    rows = [i for i, name in enumerate(router.experts) if name not in drop]
    router = replace(router, matrices={site: matrix[rows] for site, matrix in router.matrices.items()})
    if card.router == RouterMode.NOISY:
        if rows == list(range(len(rows))):  # the stream of a seed begins alike, however many rows it has
            return pruned
        settings = {"noise": f"std {card.std:.6g}, seed {card.seed}, without the rows of {', '.join(drop)}"}
        pruned = replace(pruned, router=RouterMode.TRAINED, std=None, seed=None, settings=settings)
    return replace(pruned, router_digest=router.digest)


def _folded_fault(mix: FinishedMix, card: Card) -> UserError | None:
    if mix.card.always_on and card.k != mix.card.k:
        return UserError(
            f"{mix.path}: k is {mix.card.k} by its weights, {len(card.experts)} experts would be left",
            "build it without that expert, with a smaller k",
        )
    return None


def _without(tensor: Tensor, rows: Sequence[int]) -> Planned:
    """`tensor` with only the slices, or rows of a router, that `rows` names; as it is where it holds no experts."""
    role = TensorName.parse(tensor.name).role
    if not role.endswith(("_exps", "gate_inp")):
        return Planned(Slot(tensor.name, tensor.shape, ((Part(tensor),),)), tensor.type)
    n_rows = prod(tensor.shape[1:-1])
    bands = tuple((Part(_rows(tensor, row * n_rows, n_rows)),) for row in rows)
    return Planned(Slot(tensor.name, (len(rows), *tensor.shape[1:]), bands), tensor.type)


def _rows(tensor: Tensor, first: int, n: int) -> Tensor:
    return replace(
        tensor,
        shape=(n, tensor.n_cols),
        read_rows=lambda start, stop: tensor.read_rows(first + start, first + stop),
    )


def _metadata(mix: FinishedMix, card: Card, planned: Sequence[Planned]) -> Metadata:
    """The keys of the file, with those that count or name experts changed."""
    arch, u32 = mix.header.get("general.architecture"), GGUFValueType.UINT32
    stock = {key: mix.header.value(key) for key in mix.header.fields if not key.startswith(PREFIX)}
    n_routed = len(routed(card))
    stock[f"{arch}.expert_count"] = GGUFValue(n_routed, u32)
    stock[f"{arch}.expert_used_count"] = GGUFValue(card.k - 1 if card.always_on else card.k, u32)
    stock["general.size_label"] = GGUFValue(_size_label(card, planned), GGUFValueType.STRING)
    stock = {key: value for key, value in stock.items() if not key.startswith("general.base_model.")}
    spare = {SPARE: mix.header.value(SPARE)} if SPARE in mix.header.fields else {}
    return stock | base_models([card.base, *(expert.source for expert in card.experts)]) | card.to_metadata() | spare


def _size_label(card: Card, planned: Sequence[Planned]) -> str:
    n = len(card.experts)
    in_experts = sum(tensor.slot.n_weights for tensor in planned if "_exps." in tensor.name or "_shexp." in tensor.name)
    total = sum(tensor.slot.n_weights for tensor in planned)
    return size_label(total, total - in_experts, in_experts // n, n)
