"""The mix itself: the trunk of the base and the FFNs of the experts, before anything is laid out.

Opens every source and checks that the experts are fine-tunes of the base: same graph, same widths, same
number of layers. Vocabularies may differ (fine-tunes add tokens), because FFNs never see a token. All
mismatches are reported at once, with both values side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moegguf.errors import UserError
from moegguf.families import MOE_ARCHITECTURES, TensorName
from moegguf.recipe import ExpertSpec, Layout, Recipe, RouterSpec
from moegguf.tensor import Source, Tensor

FFN_ROLES = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Expert:
    """A fine-tune whose FFNs take part. `weight` is its share in a gate-less mix."""

    spec: ExpertSpec
    source: Source

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def weight(self) -> float:
        return self.spec.weight

    def ffn(self, layer: int, role: str, kind: str = "weight") -> Tensor:
        return self.source.tensors[str(TensorName(layer, role, kind))]


@dataclass(frozen=True)
class Mix:
    """`trunk` holds every tensor of the base that is not an FFN projection, in the base's order."""

    base: Source
    experts: tuple[Expert, ...]
    router: RouterSpec
    trunk: Mapping[str, Tensor]
    has_ffn_bias: bool

    @property
    def n_layer(self) -> int:
        return self.base.n_layer

    @property
    def n_embd(self) -> int:
        return int(self.base.hparam("embedding_length"))


def make_mix(recipe: Recipe, open_source: Callable[[str], Source]) -> Mix:
    """Open the sources of a recipe, each once, and check that they fit together.

    Raises one UserError with every source that cannot be opened and every mismatch.
    """
    sources = _open_all(recipe, open_source)
    base = sources[recipe.base]
    experts = tuple(Expert(spec, sources[spec.source]) for spec in recipe.experts)
    faults = _base_faults(base, recipe.layout)
    if not faults:
        faults = [fault for expert in experts for fault in _expert_faults(base, expert)]
    if faults:
        raise UserError.of(faults)
    trunk = {name: tensor for name, tensor in base.tensors.items() if TensorName.parse(name).role not in FFN_ROLES}
    return Mix(base, experts, recipe.router, trunk, str(TensorName(0, "ffn_down", "bias")) in base.tensors)


def _open_all(recipe: Recipe, open_source: Callable[[str], Source]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    faults: list[UserError] = []
    for ref in dict.fromkeys((recipe.base, *(expert.source for expert in recipe.experts))):
        try:
            sources[ref] = open_source(ref)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return sources


def _base_faults(base: Source, layout: Layout) -> list[UserError]:
    names = {TensorName.parse(name).role for name in base.tensors}
    if names & {"ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps"}:
        return [UserError(f"{base.ref}: is a Mixture of Experts already", "mix dense fine-tunes")]
    if missing := [role for role in FFN_ROLES if role not in names]:
        return [
            UserError(
                f"{base.ref}: architecture {base.arch!r} has no {missing[0]} tensors, so no gated FFN to mix",
                "mix models with gate, up and down projections (Llama, Mistral, Qwen, Gemma, …)",
            )
        ]
    faults = []
    if layout is not Layout.FUSED and base.arch not in MOE_ARCHITECTURES:
        faults.append(
            UserError(
                f"{base.ref}: architecture {base.arch!r} has no stock MoE graph for layout {layout}, expected "
                f"one of {', '.join(sorted(MOE_ARCHITECTURES))}",
                "use router gateless with layout fused, which keeps the architecture as it is",
            )
        )
    if layout is not Layout.FUSED and str(TensorName(0, "ffn_down", "bias")) in base.tensors:
        faults.append(
            UserError(f"{base.ref}: its FFNs have biases, which layout {layout} cannot hold", "use layout fused")
        )
    return faults


_HPARAMS = {
    "embedding_length": "hidden size",
    "block_count": "layers",
    "feed_forward_length": "FFN width",
}


def _expert_faults(base: Source, expert: Expert) -> list[UserError]:
    """Why the FFNs of `expert` do not fit into `base`."""
    source = expert.source
    if source is base:
        return []
    where = f"expert {expert.name} ({source.ref})"
    if source.arch != base.arch:
        return [
            UserError(
                f"{where}: architecture {source.arch!r}, the base {base.ref} has {base.arch!r}",
                "mix fine-tunes of one base model",
            )
        ]
    faults = [
        UserError(
            f"{where}: {name} {source.hparam(key)}, the base {base.ref} has {base.hparam(key)}",
            "mix fine-tunes of one base model",
        )
        for key, name in _HPARAMS.items()
        if source.hparam(key) != base.hparam(key)
    ]
    return faults or _ffn_faults(base, source, where)


def _ffn_faults(base: Source, source: Source, where: str) -> list[UserError]:
    """FFN tensors that the base has and the expert lacks, or that have another shape."""
    faults = []
    for name, tensor in base.tensors.items():
        if TensorName.parse(name).role not in FFN_ROLES:
            continue
        found = source.tensors[name].shape if name in source.tensors else "nothing"
        if found != tensor.shape:
            faults.append(
                UserError(f"{where}: {name} is {found}, the base has {tensor.shape}", "check that it is a fine-tune")
            )
    return faults
