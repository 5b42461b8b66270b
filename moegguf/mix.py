"""The mix itself: the trunk and the experts, before anything is laid out.

Opens every source and checks that the experts are fine-tunes of the base: same graph, same widths, same
number of layers. Vocabularies may differ (fine-tunes add tokens), because FFNs never see a token. All
mismatches are reported at once, with both values side by side.

Whatever of a mix is linear in its weights is folded here: gate-less attention is the mean of the experts' q, k, v
and o, because the mean of their outputs is the output of their mean; a trunk may be the mean of the experts'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from moegguf.errors import UserError
from moegguf.families import MOE_ARCHITECTURES, PER_LAYER_WIDTHS, TensorName
from moegguf.quant.imatrix import Imatrix, taken_apart
from moegguf.quant.neurons import Compaction
from moegguf.quant.split import Energies, Split
from moegguf.quant.sums import weighted_sum
from moegguf.recipe import TRUNK_OF_BASE, TRUNK_OF_MEAN, ExpertSpec, Layout, Mixed, Recipe
from moegguf.routers import FFN, Router, Site, fit_into, make_router
from moegguf.tensor import Source, Tensor, constant

FFN_ROLES = ("ffn_gate", "ffn_up", "ffn_down")
ATTENTION_ROLES = ("attn_q", "attn_k", "attn_v", "attn_output")


@dataclass(frozen=True)
class Expert:
    """A fine-tune whose FFNs take part. `weight` is its share in a gate-less mix."""

    spec: ExpertSpec
    source: Source
    imatrix: Imatrix | None = None
    """What is known of the inputs of its FFNs alone."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def weight(self) -> float:
        return self.spec.weight

    def ffn(self, layer: int, role: str, kind: str = "weight") -> Tensor:
        return self.source.tensors[str(TensorName(layer, role, kind))]

    def importance(self, layer: int, role: str) -> np.ndarray | None:
        """Of the columns of one of its projections, float32 (n_cols,); None where it is not known."""
        entry = self.imatrix.entries.get(str(TensorName(layer, role, "weight"))) if self.imatrix else None
        return None if entry is None else entry[0]


@dataclass(frozen=True)
class Mix:
    """`base` gives the tokenizer and the architecture, `trunk` every tensor that is not mixed, in the base's order.

    In a gate-less mix with attention the trunk holds the means of the experts' attention projections.
    """

    base: Source
    experts: tuple[Expert, ...]
    router: Router
    trunk: Mapping[str, Tensor]
    has_ffn_bias: bool
    mixed: Mixed = Mixed.FFN
    layers: tuple[int, ...] = ()
    """The layers whose FFNs are mixed; in the others the trunk has one of its own."""
    compaction: Compaction | None = None
    split: Split | None = None

    @property
    def energies(self) -> Energies | None:
        """share² · E[h²] of every neuron, with h what enters its down column; None where that is not all known."""
        squares = {layer: [e.importance(layer, "ffn_down") for e in self.experts] for layer in self.layers}
        if any(one is None for some in squares.values() for one in some):
            return None
        shares = np.array([[expert.weight] for expert in self.experts])
        return {layer: shares**2 * np.stack(some) for layer, some in squares.items()}

    @property
    def groupings(self) -> Mapping[int, np.ndarray]:
        """Layer → which copies of its neurons are merged; layers in which none are may be missing."""
        return self.compaction.groupings if self.compaction else {}

    @property
    def is_dense(self) -> bool:
        """Whether the mix collapses into the shape of a single model: gate-less and fine-grained."""
        return self.mixed.fine_grained and self.router.is_gateless

    @property
    def n_layer(self) -> int:
        return self.base.n_layer

    @property
    def n_embd(self) -> int:
        return int(self.base.hparam("embedding_length"))


def make_mix(
    recipe: Recipe, open_source: Callable[[str], Source], router_of: Callable[[Recipe], Router | None] = lambda _: None
) -> Mix:
    """Open the sources of a recipe, each once, and check that they fit together.

    `router_of` finds a router that was fitted or trained. Raises one UserError with every source that cannot be
    opened and every mismatch.
    """
    sources = _open_all(recipe, open_source)
    experts = tuple(Expert(spec, sources[spec.source]) for spec in recipe.experts)
    base = next((e.source for e in experts if e.name == recipe.trunk), sources[recipe.base])
    faults = base_faults(base, recipe.layout)
    if not faults:
        faults = [fault for expert in experts for fault in expert_faults(base, expert)]
        faults += _layer_faults(base, recipe) + _trunk_faults(base, experts, recipe)
    if faults:
        raise UserError.of(faults)
    layers = tuple(range(base.n_layer)) if recipe.layers is None else recipe.layers
    router = _router(recipe, router_of(recipe), _widths(base, recipe.mixed, layers))
    trunk = dict(_trunk(base, experts, recipe, layers, is_gateless=router.is_gateless))
    trunk |= _trained_trunk(router, trunk)
    has_ffn_bias = str(TensorName(0, "ffn_down", "bias")) in base.tensors
    return Mix(base, experts, router, trunk, has_ffn_bias, recipe.mixed, layers)


def with_imatrices(mix: Mix, read: Callable[[str], Imatrix]) -> Mix:
    """`mix`, its experts with the importance matrices that the recipe names for them.

    Raises one UserError with every file that cannot be read, and that does not fit the FFNs of its expert.
    """
    experts, faults = [], []
    for expert in mix.experts:
        try:
            imatrix = read(expert.spec.imatrix) if expert.spec.imatrix else None
        except UserError as error:
            faults.append(error)
            continue
        experts.append(replace(expert, imatrix=imatrix))
        faults += _imatrix_faults(mix, expert, imatrix) if imatrix else []
    if faults:
        raise UserError.of(faults)
    return replace(mix, experts=tuple(experts))


def with_imatrix(mix: Mix, imatrix: Imatrix) -> tuple[Mix, Imatrix]:
    """`mix`, its experts with what `imatrix` says of them, and what it says of all else.

    If it was measured on this mix, that is more than an expert's own imatrix says; if on a dense model, less.
    """
    ffns = [mix.experts[0].ffn(layer, role) for layer in mix.layers for role in FFN_ROLES]
    widths = {tensor.name: tensor.n_cols for tensor in ffns}
    found, rest = taken_apart(imatrix, len(mix.experts), widths)
    dense = {name: entry for name, entry in rest.entries.items() if entry.size == widths.get(name)}
    experts = []
    for expert, own in zip(mix.experts, found, strict=True):
        entries = {**dense, **(expert.imatrix.entries if expert.imatrix else {}), **own.entries}
        experts.append(replace(expert, imatrix=replace(imatrix, entries=entries) if entries else None))
    return replace(mix, experts=tuple(experts)), rest


def _imatrix_faults(mix: Mix, expert: Expert, imatrix: Imatrix) -> list[UserError]:
    names = [str(TensorName(layer, role, "weight")) for layer in mix.layers for role in FFN_ROLES]
    shapes = {name: (1, expert.source.tensors[name].n_cols) for name in names}
    found = {name: imatrix.entries[name].shape if name in imatrix.entries else "missing" for name in names}
    wrong = [name for name in names if found[name] != shapes[name]]
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [
        UserError(
            f"{imatrix.path}, imatrix of expert {expert.name}: {wrong[0]}{more} is {found[wrong[0]]}, expected "
            f"{shapes[wrong[0]]}; it has {', '.join(list(imatrix.entries)[:2])} and others",
            "calibrate this expert on its own: `moegguf calibrate`; that of a whole mix goes with the recipe",
        )
    ]


def _widths(base: Source, mixed: Mixed, layers: tuple[int, ...]) -> dict[Site, int]:
    """Every place that has a router, and the width of what it sees."""
    roles = FFN_ROLES if mixed.fine_grained else ()
    roles += ATTENTION_ROLES if mixed.attention else ()
    widths = {}
    for layer in layers:
        if not mixed.fine_grained:
            widths[layer, FFN] = int(base.hparam("embedding_length"))
        widths |= {(layer, role): base.tensors[str(TensorName(layer, role, "weight"))].n_cols for role in roles}
    return widths


def _router(recipe: Recipe, found: Router | None, widths: Mapping[Site, int]) -> Router:
    if found is None:
        return make_router(recipe.router, recipe.expert_names, widths)
    where = recipe.router.file or f"the {found.mode} router"
    return fit_into(found, recipe.router, recipe.expert_names, widths, where)


def _trunk(
    base: Source, experts: tuple[Expert, ...], recipe: Recipe, layers: tuple[int, ...], *, is_gateless: bool
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is not mixed; what is mixed by its weights alone as the sum of the experts' weights."""
    n = len(experts)
    for name, tensor in base.tensors.items():
        parsed = TensorName.parse(name)
        if parsed.role in FFN_ROLES and parsed.layer in layers:
            continue
        if recipe.mixed.attention and is_gateless and parsed.role in ATTENTION_ROLES and parsed.layer in layers:
            tensor = weighted_sum(name, [e.source.tensors[name] for e in experts], [e.weight for e in experts])
        elif recipe.trunk == TRUNK_OF_MEAN:
            tensor = weighted_sum(name, [e.source.tensors[name] for e in experts], [1 / n] * n)
        yield name, tensor


def _trained_trunk(router: Router, trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk tensors that were trained along with a router. Raises UserError where they are of another model."""
    for name, values in router.trunk.items():
        found = trunk[name].shape if name in trunk else "missing"
        if found != values.shape:
            raise UserError(
                f"the router was trained with {name} of shape {values.shape}, in this mix it is {found}",
                "build the mix that it was trained on",
            )
    return {name: constant(name, values) for name, values in router.trunk.items()}


def _layer_faults(base: Source, recipe: Recipe) -> list[UserError]:
    if recipe.layers is None:
        return []
    if beyond := [layer for layer in recipe.layers if layer >= base.n_layer]:
        message = f"{base.ref}: has no layer {beyond[0]}, its layers are 0 to {base.n_layer - 1}"
        return [UserError(message, "mend layers in the recipe")]
    has_widths = base.arch in PER_LAYER_WIDTHS or isinstance(base.hparam("feed_forward_length"), list)
    if has_widths or len(recipe.layers) == base.n_layer or recipe.mixed.fine_grained:
        return []
    message = f"{base.ref}: architecture {base.arch!r} has one FFN width for all layers, so it cannot mix some of them"
    return [UserError(message, "leave layers out")]


def _trunk_faults(base: Source, experts: tuple[Expert, ...], recipe: Recipe) -> list[UserError]:
    """Tensors to average that an expert lacks or has in another shape: embeddings of other vocabularies above all."""
    names = [
        name
        for name in base.tensors
        if recipe.trunk == TRUNK_OF_MEAN or (recipe.mixed.attention and TensorName.parse(name).role in ATTENTION_ROLES)
    ]
    faults = []
    for expert in experts:
        tensors = expert.source.tensors
        wrong = [name for name in names if name not in tensors or tensors[name].shape != base.tensors[name].shape]
        if wrong:
            found = tensors[wrong[0]].shape if wrong[0] in tensors else "missing"
            faults.append(
                UserError(
                    f"expert {expert.name} ({expert.source.ref}): {wrong[0]} is {found}, in the base "
                    f"{base.tensors[wrong[0]].shape}, so no mean can be taken",
                    f"choose trunk = {TRUNK_OF_BASE!r}" if recipe.trunk == TRUNK_OF_MEAN else "choose mix = 'ffn'",
                )
            )
    return faults


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


def base_faults(base: Source, layout: Layout) -> list[UserError]:
    """Why `base` cannot be mixed, or not in `layout`."""
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


def expert_faults(base: Source, expert: Expert) -> list[UserError]:
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


def unused_targets(expert: Expert, mixed: Mixed, trunk: str) -> list[str]:
    """What an adapter changes and a mix does not take from it, as roles such as attn_q."""
    lora = expert.source.lora
    used = {*FFN_ROLES, *(ATTENTION_ROLES if mixed.attention else ())}
    if lora is None or trunk in (TRUNK_OF_MEAN, expert.name):
        return []
    return sorted({TensorName.parse(name).role for name in lora.deltas} - used)


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
