"""Other experts in a finished mix: swapped, added, dropped. The bytes of those that stay are copied.

Method: the mix is laid out twice, without weights. Once as it is, which tells where in the file each expert lies and
what factor its down projection carries; once as it is to be. An expert that stays is read from where it lies, times
the ratio of its two factors; a new one is read from its source and quantised to the types that the file has. So nothing
here knows a layout (`moegguf.edit.apart`).

Where no ratio differs from 1 the file is, to the byte, that of a fresh build with these experts, as far as its preset
would choose the same types: some of llama.cpp's rules ask whether there are four experts, or eight. Ratios differ from
1 where a layout folds in how many experts there are: fused, shared, and given weights. They go into the block scales,
so that nothing is quantised twice. Noise is that of a fresh build; a router that was fitted or trained loses rows, and
gains none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType

from moegguf.assembly import base_models, size_label_of
from moegguf.edit.apart import Apart, exact, places, preset_of, specs_of, take_apart
from moegguf.edit.change import Change, Replaced, with_card
from moegguf.edit.finished import FinishedMix
from moegguf.edit.router import card_with, named_router
from moegguf.errors import UserError
from moegguf.layouts import lay_out
from moegguf.metadata import Card, ExpertCard
from moegguf.mix import Expert, expert_faults, unused_targets
from moegguf.quant import ggml
from moegguf.quant.imatrix import read_imatrix, with_importance
from moegguf.quant.presets import preset, preset_names, requires_imatrix
from moegguf.recipe import TRUNK_OF_BASE, TRUNK_OF_MEAN, Layout, Mixed, RouterMode, RouterSpec
from moegguf.routers import Router, make_router
from moegguf.sources import OpenOptions, open_source
from moegguf.tensor import Form, Metadata, Part, Planned, Slot, Source, row_bytes

_BUILD = "build the mix again"
_IMATRIX = "quantize.imatrix.file"
_PARENTS = "general.base_model."


# ------------------------------------------------------------------------------------------- what is asked for


def plan_swap(
    mix: FinishedMix, refs: Mapping[str, str], *, imatrix: Path | None = None, stream: bool = False
) -> Change:
    """`mix` with other weights for the experts that `refs` names: name → reference of a source.

    `imatrix` is that of this mix, of its base or of the new experts; `stream` reads Hub models by range instead of
    downloading them. Reads no weights. Raises UserError with every reason why this cannot be done.
    """
    apart = take_apart(mix)
    if faults := [*_unknown(mix, refs), *_trunk_faults(mix, refs)]:
        raise UserError.of(faults)
    sources = _open(mix, refs, stream=stream)
    experts = tuple(replace(each, source=sources.get(each.name, each.source)) for each in apart.mix.experts)
    cards = tuple(_sourced(each, sources.get(each.name)) for each in mix.card.experts)
    card = replace(mix.card, experts=cards)
    change = _change(apart, experts, apart.mix.router, card, sources, imatrix)
    return replace(change, notes=(*change.notes, *_router_notes(mix.card, refs)))


def plan_add(
    mix: FinishedMix, refs: Mapping[str, str], *, router: str | None = None, imatrix: Path | None = None,
    stream: bool = False,
) -> Change:  # fmt: skip
    """`mix` with the experts of `refs` behind its own: name → reference of a source.

    `router` names one for all of them (`named_router`); noise and gate-less grow by themselves. Raises as `plan_swap`.
    """
    if mix.card.is_weighted:
        raise UserError(f"{mix.path}: its experts have weights, and no share is left for more", _BUILD)
    apart = take_apart(mix)
    grown = replace(mix, card=_grown(mix.card, refs))
    specs, chosen = specs_of(mix, grown.card), _grown_router(grown, router)
    sources = _open(mix, refs, stream=stream)  # what can be known without has been checked
    known = {expert.name: expert.source for expert in apart.mix.experts} | sources
    experts = tuple(Expert(spec, known[spec.name]) for spec in specs)
    cards = tuple(_sourced(each, sources.get(each.name)) for each in grown.card.experts)
    return _change(apart, experts, chosen, card_with(replace(grown.card, experts=cards), chosen), sources, imatrix)


def plan_drop(mix: FinishedMix, names: Sequence[str]) -> Change:
    """`mix` without the experts `names`; given weights keep their proportions. Raises as `plan_swap`."""
    if faults := [*_unknown(mix, names), *_drop_faults(mix, names), *_trunk_faults(mix, names)]:
        raise UserError.of(faults)
    apart = take_apart(mix)
    left = [expert for expert in mix.card.experts if expert.name not in names]
    total = sum(exact(expert.weight) for expert in left)
    cards = tuple(replace(expert, weight=exact(expert.weight) / total) for expert in left)
    shrunk = replace(mix, card=replace(mix.card, experts=cards, k=min(mix.card.k, len(left))))
    kept = [expert for expert in apart.mix.experts if expert.name not in names]
    experts = tuple(replace(each, spec=spec) for each, spec in zip(kept, specs_of(mix, shrunk.card), strict=True))
    router = _shrunk_router(shrunk, apart.mix.router)
    return _change(apart, experts, router, card_with(shrunk.card, router), {})


def _grown(card: Card, refs: Mapping[str, str]) -> Card:
    """`card` with more experts, of the coarsest precision that it names; `refs` stand for their sources."""
    n = len(card.experts) + len(refs)
    coarsest = max((expert.quant for expert in card.experts), key=lambda quant: preset_names().index(preset_of(quant)))
    experts = [replace(expert, weight=1 / n) for expert in card.experts]
    experts += [ExpertCard(name, ref, 1 / n, coarsest) for name, ref in refs.items()]
    return replace(card, experts=tuple(experts), k=n if card.is_gateless else card.k)


def _sourced(expert: ExpertCard, source: Source | None) -> ExpertCard:
    """`expert`, from `source` if there is one."""
    return replace(expert, source=source.label, licence=source.licence) if source else expert


def _unknown(mix: FinishedMix, names: Sequence[str] | Mapping[str, str]) -> Iterator[UserError]:
    known = ", ".join(mix.expert_names)
    for name in names:
        if name not in mix.expert_names:
            yield UserError(f"{mix.path}: has no expert {name!r}, only {known}", "name one of these")


def _drop_faults(mix: FinishedMix, names: Sequence[str]) -> Iterator[UserError]:
    always_on = mix.card.always_on
    if always_on in names:
        yield UserError(f"{mix.path}: {always_on} is always on, so it cannot be dropped", "build the mix without it")
    elif not set(mix.routed_names) - set(names):
        yield UserError(f"{mix.path}: no expert would be left of {', '.join(mix.routed_names)}", "keep at least one")


def _trunk_faults(mix: FinishedMix, names: Sequence[str] | Mapping[str, str]) -> Iterator[UserError]:
    if (trunk := mix.card.trunk) in names and trunk not in (TRUNK_OF_BASE, TRUNK_OF_MEAN):
        yield UserError(f"{mix.path}: its trunk is that of {trunk}, all other tensors are {trunk}'s too", _BUILD)


def _open(mix: FinishedMix, refs: Mapping[str, str], *, stream: bool) -> dict[str, Source]:
    """Expert → its source. Raises one UserError with every one that cannot be opened, or is the file itself."""
    sources, faults = {}, []
    for name, ref in refs.items():
        try:
            source = open_source(ref, OpenOptions(stream=stream))
            if any(file.samefile(mix.path) for file in source.files if file.exists()):
                raise UserError(f"expert {name} ({ref}): is the mix itself", "name a fine-tune of its base")
            sources[name] = source
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return sources


def _router_notes(card: Card, names: Mapping[str, str]) -> Iterator[str]:
    if card.router not in (RouterMode.GATELESS, RouterMode.NOISY):
        yield (
            f"the {card.router} router stays as it is: it was made for the old {', '.join(names)}; "
            "`moegguf route fit --mix` makes one for the new"
        )


# ------------------------------------------------------------------------------------------------- routers


def _grown_router(mix: FinishedMix, asked: str | None) -> Router:
    """The router of a mix whose card names more experts than its file has."""
    card = mix.card
    if asked:
        keeps_k = asked.startswith(RouterMode.NOISY) and not card.is_gateless
        return named_router(mix, asked, card.k if keeps_k else None)
    if router := _computed_router(mix):
        return router
    raise UserError(
        f"{mix.path}: its {card.router} router has no row for another expert",
        "pass --router: a file that `moegguf route fit` or `train` wrote for all of them, noisy or gateless",
    )


def _shrunk_router(mix: FinishedMix, router: Router) -> Router:
    """`router` for a mix whose card names fewer experts."""
    if computed := _computed_router(mix):
        return computed
    rows = [router.experts.index(name) for name in mix.routed_names]
    matrices = {site: matrix[rows] for site, matrix in router.matrices.items()}
    return replace(router, experts=mix.routed_names, k=mix.card.k, matrices=matrices)


def _computed_router(mix: FinishedMix) -> Router | None:
    """That of a build with the card's experts, where it needs no more than a seed."""
    card = mix.card
    if card.is_gateless:
        return make_router(RouterSpec(RouterMode.GATELESS, card.k), mix.expert_names, mix.widths)
    if card.router != RouterMode.NOISY:
        return None
    spec = RouterSpec(RouterMode.NOISY, card.k, exact(card.std), card.seed, card.always_on, card.shared)
    return make_router(spec, mix.expert_names, mix.widths)


# ------------------------------------------------------------------------------------------------ put together


def _change(
    apart: Apart, experts: tuple[Expert, ...], router: Router, card: Card, new: Mapping[str, Source],
    imatrix: Path | None = None,
) -> Change:  # fmt: skip
    """The file of `apart` with these experts, this router and this card; `new` are the sources that are not in it."""
    opened = [expert for expert in experts if expert.name in new]
    if faults := [fault for expert in opened for fault in expert_faults(apart.mix.base, expert)]:
        raise UserError.of(faults)
    form = lay_out(replace(apart.mix, experts=experts, router=router), Layout(card.layout))
    if imatrix:
        form = with_importance(form, read_imatrix(imatrix))
    if faults := list(_type_faults(apart, form)):
        raise UserError.of(faults[:1])
    planned = {slot.name: _planned(apart, slot) for slot in form.slots}
    replaced = tuple(
        Replaced(planned[slot.name], part, row, row_bytes(planned[slot.name].type, col))
        for slot, part, row, col in places(form)
        if slot.preset and part.tensor not in apart.stored
    )
    metadata = with_card(_metadata(apart, form, card), card)
    notes = [*_scale_notes(apart, form), *_source_notes(apart.file, opened, has_imatrix=imatrix is not None)]
    return Change(apart.file, card, metadata, tuple(planned.values()), replaced, tuple(new.values()), tuple(notes))


def _planned(apart: Apart, slot: Slot) -> Planned:
    """`slot` in the type that the file has, what is in the file already read from there."""
    bands = tuple(tuple(_from_file(apart, part) for part in band) for band in slot.bands)
    return Planned(replace(slot, bands=bands), apart.file.header.tensors[slot.name].type)


def _from_file(apart: Apart, part: Part) -> Part:
    if part.tensor not in apart.stored:
        return part
    return replace(part, tensor=apart.stored[part.tensor].tensor, scale=_ratio(apart, part))


def _ratio(apart: Apart, part: Part) -> float:
    """The factor that `part` is to carry over the one that it carries in the file."""
    ratio = part.scale / apart.stored[part.tensor].scale
    return 1.0 if np.float32(ratio) == 1 else ratio


def _type_faults(apart: Apart, form: Form) -> Iterator[UserError]:
    """What cannot have the type of the file: experts that change places, and new ones without an imatrix."""
    path, infos = apart.file.path, apart.file.header.tensors
    for slot, part, _, _ in places(form):
        if slot.name not in infos:
            yield UserError(f"{path}: has no {slot.name}, as there would be then", _BUILD)
            continue
        stored, type = apart.stored.get(part.tensor), infos[slot.name].type
        if stored and stored.tensor.type != type:
            types = f"{stored.tensor.type.name}, and {type.name} for {slot.name}"
            yield UserError(f"{path}: {part.tensor.origin} would have to be quantised again: it is {types}", _BUILD)
        elif slot.preset and not stored and part.importance is None and _needs_importance(slot, part, type):
            yield UserError(f"{slot.name}: {type.name} needs an importance matrix", "pass --imatrix FILE")


def _needs_importance(slot: Slot, part: Part, type: GGMLQuantizationType) -> bool:
    if part.tensor.type == type:
        return False
    return ggml.requires_importance(type) or requires_imatrix(slot.name, type, preset(slot.preset))


def _metadata(apart: Apart, form: Form, card: Card) -> Metadata:
    """The keys of the file with those that count experts, or name them and what they were made from, changed."""
    counts = {key: value for key, value in form.metadata.items() if apart.form.metadata.get(key) != value}
    label = GGUFValue(size_label_of(form, len(card.experts)), GGUFValueType.STRING)
    metadata = apart.file.metadata | counts | {"general.size_label": label}
    parents = base_models([card.base, *(expert.source for expert in card.experts)])
    at = next((i for i, key in enumerate(metadata) if key.startswith(_PARENTS)), len(metadata))
    before = dict(islice(metadata.items(), at))
    after = {key: value for key, value in islice(metadata.items(), at, None) if not key.startswith(_PARENTS)}
    return before | parents | after


def _scale_notes(apart: Apart, form: Form) -> Iterator[str]:
    ratios = {_ratio(apart, part) for slot, part, _, _ in places(form) if part.tensor in apart.stored} - {1.0}
    if ratios:
        by = " and ".join(f"{ratio:.4g}" for ratio in sorted(ratios))
        yield (
            f"layout {apart.file.card.layout} folds shares into the down projections: those that stay are multiplied "
            f"by {by}, in their block scales, which rounds those"
        )


def _source_notes(file: FinishedMix, new: Sequence[Expert], *, has_imatrix: bool) -> Iterator[str]:
    licence = file.header.get("general.license", "")
    for expert in new:
        if expert.source.licence not in ("", licence):
            yield f"the licence of {expert.name} is {expert.source.licence}, that of the mix {licence or 'not set'}"
        if unused := unused_targets(expert, Mixed(file.card.mixed), file.card.trunk):
            yield f"the adapter of {expert.name} also changes {', '.join(unused)}, which is the trunk's in this mix"
    if new and not has_imatrix and (used := file.header.get(_IMATRIX)):
        yield f"the file was quantised with the importance matrix {used}, this without: --imatrix gives one"
