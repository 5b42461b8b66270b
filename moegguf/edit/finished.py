"""A mix as a file: its header, its card, and which tensors hold its router. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moegguf.errors import UserError
from moegguf.families import TensorName, stacked
from moegguf.gguf_header import Header, TensorInfo, read_header
from moegguf.metadata import Card, read_card
from moegguf.routers import FFN, Site
from moegguf.tensor import Metadata


@dataclass(frozen=True)
class FinishedMix:
    """A mix as a file. `sites` are the tensors that hold its router; layout fused has none."""

    header: Header
    card: Card
    sites: Mapping[Site, TensorInfo]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def arch(self) -> str:
        return self.header.get("general.architecture")

    @cached_property
    def metadata(self) -> Metadata:
        """All keys, in the file's order."""
        return {key: self.header.value(key) for key in self.header.fields}

    @property
    def tensors(self) -> list[TensorInfo]:
        """In the file's order."""
        return sorted(self.header.tensors.values(), key=lambda info: info.offset)

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.card.experts)

    @property
    def routed_names(self) -> tuple[str, ...]:
        """The experts behind the router, in the order of its rows."""
        return tuple(name for name in self.expert_names if name != self.card.always_on)

    @property
    def widths(self) -> dict[Site, int]:
        """The size of what each router sees."""
        return {site: info.shape[-1] for site, info in self.sites.items()}


def read_mix(path: Path) -> FinishedMix:
    """The finished mix at `path`. Raises UserError when it is no mix of ours, or one of the parts of a split one."""
    header = read_header(path)
    if header.get("split.count", 1) > 1:
        raise UserError(f"{path}: is one part of a split file", "put it together first: `moegguf merge`")
    card = read_card(header)
    if card is None:
        raise UserError(f"{path}: was not made by moegguf, so its experts are unknown", "pass a mix that it built")
    names = {name: TensorName.parse(name) for name in header.tensors}
    routers = {name: parsed.layer for name, parsed in names.items() if parsed.role == "ffn_gate_inp"}
    sites = {(layer or 0, FFN): stacked(header.tensors[name]) for name, layer in routers.items()}
    if wrong := [info for info in sites.values() if info.type.name != "F32" or len(info.shape) != 2]:
        raise UserError(f"{path}: {wrong[0].name} is {wrong[0].type.name}, expected an F32 matrix", "build it again")
    return FinishedMix(header, card, dict(sorted(sites.items())))


def read_routed_mix(path: Path) -> FinishedMix:
    """The finished mix at `path`. Raises UserError when it has no router in it, either."""
    mix = read_mix(path)
    if not mix.sites:
        raise UserError(
            f"{path}: has no router in it: layout {mix.card.layout} holds one FFN for all experts",
            "build the mix with layout mixtral",
        )
    return mix
