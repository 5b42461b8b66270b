"""The mix itself: the trunk of the base and the FFNs of the experts, before anything is laid out.

Opens every source and checks that the experts are fine-tunes of the base: same graph, same widths, same
number of layers. Vocabularies may differ (fine-tunes add tokens), because FFNs never see a token. All
mismatches are reported at once, with both values side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

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
    if fault := _incomplete(base):
        return [fault]
    faults = []
    if layout is not Layout.FUSED and isinstance(base.hparam("feed_forward_length"), list):
        faults.append(
            UserError(
                f"{base.ref}: its layers have FFN widths of their own, which layout {layout} cannot hold",
                "use layout fused",
            )
        )
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


def _incomplete(base: Source) -> UserError | None:
    """The first thing that a dense model with gated FFNs has and `base` lacks."""
    mend = "use a complete and undamaged dense model with a gated FFN in every layer"
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        counts = base.hparam(key, 0)
        if not any(counts if isinstance(counts, list) else [counts]):
            return UserError(f"{base.ref}: {base.arch}.{key} is missing or 0", mend)
    if "token_embd.weight" not in base.tensors:
        return UserError(f"{base.ref}: token_embd.weight is missing", mend)
    layers_of_trunk = {name.layer for name in map(TensorName.parse, base.tensors) if name.role not in FFN_ROLES}
    for layer, name, expected in _expected_ffns(base):
        found = base.tensors[name].shape if name in base.tensors else "missing"
        if found != expected:
            return UserError(f"{base.ref}: {name} is {found}, expected {expected}", mend)
        if layer not in layers_of_trunk:
            return UserError(f"{base.ref}: layer {layer} has an FFN and nothing else", mend)
    return None


def _expected_ffns(base: Source) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Layer, name and shape of every FFN tensor that the metadata of `base` promises."""
    n_embd, n_ff = base.hparam("embedding_length"), base.hparam("feed_forward_length")
    has_bias = str(TensorName(0, "ffn_down", "bias")) in base.tensors
    for layer, width in enumerate(n_ff if isinstance(n_ff, list) else repeat(n_ff, base.n_layer)):
        for role in FFN_ROLES:
            rows, cols = (n_embd, width) if role == "ffn_down" else (width, n_embd)
            yield layer, str(TensorName(layer, role, "weight")), (rows, cols)
            if has_bias:
                yield layer, str(TensorName(layer, role, "bias")), (rows,)


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
            f"{where}: {name} {source.hparam(key, 0)}, the base {base.ref} has {base.hparam(key)}",
            "mix fine-tunes of one base model",
        )
        for key, name in _HPARAMS.items()
        if source.hparam(key, 0) != base.hparam(key)
    ]
    return faults or _ffn_faults(base, source, where)


def _ffn_faults(base: Source, source: Source, where: str) -> list[UserError]:
    """The first FFN tensor that only one of the two has, or that has another shape in each, and how many more."""
    names = [name for name in {**base.tensors, **source.tensors} if TensorName.parse(name).role in FFN_ROLES]
    shapes = [
        (name, *(model.tensors[name].shape if name in model.tensors else "missing" for model in (source, base)))
        for name in names
    ]
    different = [shape for shape in shapes if shape[1] != shape[2]]
    if not different:
        return []
    name, found, expected = different[0]
    more = f", and {len(different) - 1} more tensors differ" if len(different) > 1 else ""
    return [UserError(f"{where}: {name} is {found}, in the base {expected}{more}", "check that it is a fine-tune")]
