"""A finished mix, taken apart: where in its file each expert lies, and which factor its down projection carries.

The file's layout is asked, with a mix whose experts have shapes and no weights: so what a layout does is written
down once, in the layout. What holds more than its experts' own weights, or those in another order, cannot be taken
apart and is refused: merged or split neurons, means of attention or of the trunk, fine-grained mixes. No weights are
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue, GGUFValueType

from moegguf.edit.finished import FinishedMix
from moegguf.edit.router import router_of
from moegguf.errors import UserError
from moegguf.families import PER_LAYER_WIDTHS, TensorName, stacked
from moegguf.layouts import lay_out
from moegguf.layouts.shared import ARCH as SHARED_ARCH
from moegguf.metadata import Card
from moegguf.mix import FFN_ROLES, Expert, Mix
from moegguf.quant.presets import preset_names
from moegguf.recipe import DEFAULT_QUANT, TRUNK_OF_MEAN, ExpertSpec, Layout, Mixed, parse_recipe
from moegguf.sources.gguf_file import open_gguf
from moegguf.tensor import Form, Metadata, Part, Slot, Source, Tensor, row_bytes

_BUILD = "build the mix again"
_DENSE_ARCH = {SHARED_ARCH: "llama"} | {twin: arch for arch, twin in PER_LAYER_WIDTHS.items()}
"""Architecture of a mix → that of its experts, where they differ."""
_STACKED = ("_exps", "_shexp", "_gate_inp")
"""How the roles end that no dense model has."""


@dataclass(frozen=True)
class Apart:
    """A finished mix as a mix to be laid out. Its trunk is read from the file; the FFNs of its experts are stand-ins
    that have a shape only, and `stored` says where each is: a part of the file, and the factor that it carries."""

    file: FinishedMix
    mix: Mix
    form: Form
    stored: Mapping[Tensor, Part]


class Place(NamedTuple):
    """A part, and where it begins in the tensor of a slot."""

    slot: Slot
    part: Part
    row: int
    col: int


def take_apart(file: FinishedMix) -> Apart:
    """`file` as a mix. Raises UserError, with every reason, where it cannot be taken apart."""
    if faults := list(_merged(file)):
        raise UserError.of(faults)
    card, source = file.card, open_gguf(file.path, str(file.path), file.path.name)
    layers = tuple(range(_n_layer(file))) if card.layers is None else card.layers
    trunk = {info.name: source.tensors[info.name] for info in file.tensors if not _is_mixed(info.name, layers)}
    base = replace(source, label=card.base, metadata=_dense_metadata(file, layers), tensors=trunk)
    base = replace(base, tensors=trunk | _stand_ins(base, layers, ""))
    specs = specs_of(file, card)
    experts = tuple(Expert(spec, replace(base, tensors=_stand_ins(base, layers, spec.name))) for spec in specs)
    mix = Mix(base, experts, router_of(file), trunk, has_ffn_bias=False, layers=layers)
    form = lay_out(mix, Layout(card.layout))
    if fault := _contradiction(file, form):
        raise fault
    stored = {}
    for place in places(form):
        if place.slot.preset:
            stored[place.part.tensor] = replace(place.part, tensor=_cut(source.tensors[place.slot.name], place))
    return Apart(file, mix, form, stored)


def _merged(file: FinishedMix) -> Iterator[UserError]:
    """What of a mix belongs to no single expert."""
    card = file.card
    has_biases = any(TensorName.parse(name) == TensorName(0, "ffn_down", "bias") for name in file.header.tensors)
    reasons = {
        f"its layout {card.layout!r} is unknown": card.layout not in set(Layout),
        "it is compact, neurons of its experts are merged": card.compact is not None,
        "its neurons are split into two groups": card.split is not None,
        "it is fine-grained, its experts are averaged into one": card.is_dense,
        "its attention is the mean of all experts'": card.mixed == Mixed.FFN_ATTENTION,
        "its trunk is the mean of all experts'": card.trunk == TRUNK_OF_MEAN,
        "the biases of its FFNs are added up": has_biases,
        "its keys do not agree with its tensors": not _has_its_layers(file),
    }
    for reason, is_so in reasons.items():
        if is_so:
            yield UserError(f"{file.path}: {reason}, so no expert can be taken out of it or put into it", _BUILD)


def _n_layer(file: FinishedMix) -> int:
    return file.header.get(f"{file.arch}.block_count", 0)


def _has_its_layers(file: FinishedMix) -> bool:
    """Whether the keys that a layout asks for are there, and every layer has tensors."""
    names = ("block_count", "embedding_length", "feed_forward_length")
    layers = {TensorName.parse(name).layer for name in file.header.tensors} - {None}
    mixed = file.card.layers or layers
    has_keys = all(file.header.get(f"{file.arch}.{name}") for name in names)
    return has_keys and layers == set(range(_n_layer(file))) and layers.issuperset(mixed)


def _is_mixed(name: str, layers: Sequence[int]) -> bool:
    """Whether a tensor of the file holds experts, or their router."""
    parsed = TensorName.parse(name)
    return parsed.role.endswith(_STACKED) or (parsed.role in FFN_ROLES and parsed.layer in layers)


def _dense_metadata(file: FinishedMix, layers: Sequence[int]) -> Metadata:
    """The architecture's keys of the dense models that the file was made from."""
    arch = file.arch
    dense = arch if arch == "deci" and file.card.layers is None else _DENSE_ARCH.get(arch, arch)
    keys = {key.removeprefix(f"{arch}."): value for key, value in file.metadata.items() if key.startswith(f"{arch}.")}
    keys = {key: value for key, value in keys.items() if not key.startswith("expert_")}
    if file.card.layout == Layout.FUSED:
        keys["feed_forward_length"] = _narrowed(keys["feed_forward_length"], file, layers)
    string = GGUFValue(dense, GGUFValueType.STRING)
    return {"general.architecture": string} | {f"{dense}.{key}": value for key, value in keys.items()}


def _narrowed(value: GGUFValue, file: FinishedMix, layers: Sequence[int]) -> GGUFValue:
    """The FFN widths of a fused file as those of one expert."""
    n = len(file.card.experts)
    if not isinstance(value.value, list):
        return GGUFValue(value.value // n, value.type)
    widths = [width // n if layer in layers else width for layer, width in enumerate(value.value)]
    if file.card.layers is not None and len(set(widths)) == 1:
        return GGUFValue(widths[0], value.sub_type)
    return GGUFValue(widths, value.type, value.sub_type)


def _stand_ins(base: Source, layers: Sequence[int], expert: str) -> dict[str, Tensor]:
    n_embd, n_ff = base.hparam("embedding_length"), base.hparam("feed_forward_length")
    stand_ins = {}
    for layer in layers:
        width = n_ff[layer] if isinstance(n_ff, list) else n_ff
        for role in FFN_ROLES:
            name = str(TensorName(layer, role, "weight"))
            shape = (n_embd, width) if role == "ffn_down" else (width, n_embd)
            stand_ins[name] = Tensor(name, shape, GGMLQuantizationType.F32, _unread, expert)
    return stand_ins


def _unread(start: int, stop: int) -> np.ndarray:
    raise AssertionError("a stand-in has no weights")


def _contradiction(file: FinishedMix, form: Form) -> UserError | None:
    """Where the file is not what its card says."""
    expected = {slot.name: slot.shape for slot in form.slots}
    found = {info.name: stacked(info).shape for info in file.tensors}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            shapes = f"is {found.get(name, 'missing')}, by its keys {expected.get(name, 'not there')}"
            return UserError(f"{file.path}: {name} {shapes}", _BUILD)
    for place in places(form):
        info = file.header.tensors[place.slot.name]
        block = GGML_QUANT_SIZES[info.type][0]
        if place.part.tensor.n_cols != place.slot.n_cols and (place.part.tensor.n_cols % block or place.col % block):
            message = f"{info.name}: experts of {place.part.tensor.n_cols} columns share blocks of {block}"
            return UserError(f"{file.path}: {message} ({info.type.name})", "build it as mixtral, or as Q8_0 or F16")
    return None


def places(form: Form) -> Iterator[Place]:
    """Every part of a form."""
    for slot in form.slots:
        row = 0
        for band in slot.bands:
            col = 0
            for part in band:
                yield Place(slot, part, row, col)
                col += part.tensor.n_cols
            row += band[0].tensor.n_rows


def _cut(whole: Tensor, place: Place) -> Tensor:
    """The part at `place` as a tensor read from `whole`, which has it."""
    n_cols, first = place.part.tensor.n_cols, row_bytes(whole.type, place.col)
    last = first + row_bytes(whole.type, n_cols)

    def read_rows(start: int, stop: int) -> np.ndarray:
        return whole.read_rows(place.row + start, place.row + stop)[:, first:last]

    return Tensor(place.part.tensor.name, place.part.tensor.shape, whole.type, read_rows, whole.origin)


# ------------------------------------------------------------------------------------------- what a card says


def specs_of(file: FinishedMix, card: Card) -> tuple[ExpertSpec, ...]:
    """The experts that `card` names, as those of a recipe. Raises UserError where no recipe may have them."""
    experts = [
        {"name": expert.name, "source": expert.source, "quant": preset_of(expert.quant)}
        | ({"weight": exact(expert.weight)} if card.is_weighted else {})
        for expert in card.experts
    ]
    table = {"base": card.base, "experts": experts}
    return parse_recipe(card.name, table, where=f"{file.path}:", folder=file.path.parent).experts


def exact(value: float) -> float:
    """The number that a recipe had, from the float32 in a file."""
    return float(str(np.float32(value)))


def preset_of(quant: str) -> str:
    """The preset that chose the types of an expert, where a file may name a budget or a plan."""
    return quant if quant in preset_names() else DEFAULT_QUANT
