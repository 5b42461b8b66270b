"""The walk of a build, in order: recipe → sources → mix → layout → types → file. Read this file first.

`plan_build` opens and checks everything and reads no weight, so a dry run, every size and every error that can be
known in advance come before the first byte is written. `build` then writes the plan in one pass.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValue,
    GGUFValueType,
    LlamaFileType,
    size_label,
)

from moegguf import __version__
from moegguf.assign import assign_types
from moegguf.atomic import check_space, check_writable
from moegguf.errors import UserError
from moegguf.families import PER_LAYER_WIDTHS
from moegguf.layouts import lay_out
from moegguf.metadata import SPARE_BYTES, Card, CompactCard, ExpertCard, SplitCard, check_name, spare_bytes
from moegguf.mix import Mix, base_faults, make_mix, with_imatrices, with_imatrix
from moegguf.quant.imatrix import Imatrix, read_imatrix, with_importance, with_trunk_importance
from moegguf.quant.neurons import Compaction, width
from moegguf.quant.presets import preset, presets
from moegguf.quant.split import Split, fine_sizes, split_neurons
from moegguf.quant.type_plan import SplitRule, read_type_plan
from moegguf.recipe import ExpertSpec, Layout, Mixed, QuantSpec, Recipe, Splitting
from moegguf.routers import Router
from moegguf.routers.file import read_router
from moegguf.sources import OpenOptions, open_source
from moegguf.sources.blob import sha256_of
from moegguf.tensor import Expected, Form, Metadata, Planned
from moegguf.watch import Progress, unheard
from moegguf.writer import Requantised, data_bytes, header_bytes, write_gguf

TAGS = ("moe", "merge", "moegguf")


@dataclass(frozen=True)
class Plan:
    """A whole output file, decided but not written."""

    recipe: Recipe
    path: Path
    mix: Mix = field(repr=False)
    card: Card
    form: Form = field(repr=False)
    imatrix: Imatrix | None = field(repr=False)
    planned: tuple[Planned, ...] = field(repr=False)
    header: bytes = field(repr=False)

    @property
    def n_bytes(self) -> int:
        return len(self.header) + data_bytes(self.planned)

    @property
    def to_verify(self) -> tuple[Expected, ...]:
        """The files of its sources whose digests are known, each once."""
        sources = (self.mix.base, *(expert.source for expert in self.mix.experts))
        return tuple(dict.fromkeys(file for source in sources for file in source.expected))

    @property
    def n_bytes_to_do(self) -> int:
        """What `build` tells its progress in all: bytes to verify, and bytes of tensor data to write."""
        return sum(file.n_bytes for file in self.to_verify) + sum(tensor.nbytes for tensor in self.planned)

    @property
    def n_weights(self) -> int:
        return sum(tensor.slot.n_weights for tensor in self.planned)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.nbytes for tensor in self.planned) / self.n_weights


@dataclass(frozen=True)
class Built:
    """A finished build. `seconds` is wall time, from the first read to the rename."""

    plan: Plan
    n_bytes: int
    seconds: float
    requantised: Requantised


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_build(
    recipe: Recipe,
    *,
    router: Router | None = None,
    compaction: Compaction | None = None,
    stream: bool = False,
    pre: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Open the sources of `recipe`, check that they fit, and decide every byte count. Reads no weight.

    `router` is one that was just fitted, in place of a file; `compaction` is what a compact mix merges, without which
    the plan is that of the whole mix; `stream` reads Hub models by range instead of
    downloading them; `pre` overrides the BPE pre-tokenizer.
    Raises UserError, with all faults that were found, before anything is written.
    """
    _check_expressible(recipe)
    check_writable(recipe.output, overwrite)
    mix = open_mix(recipe, router=router, stream=stream, pre=pre)
    check_name(recipe.name, mix.base.metadata)
    mix = with_imatrices(mix, lambda ref: read_imatrix(recipe.folder / ref))
    if recipe.compact:
        _check_compactable(mix)
        mix = replace(mix, compaction=compaction)
    _check_target_is_no_source(recipe.output, mix)
    imatrix = read_imatrix(recipe.folder / recipe.imatrix) if recipe.imatrix else None
    mix, form = _laid_out(recipe, mix, imatrix)
    plan = _typed(_splittable(recipe, mix), mix, form, imatrix)
    if not recipe.quant.plan:
        return plan
    found = read_type_plan(recipe.folder / recipe.quant.plan)
    if found.split:
        plan = with_split(plan, _split_again(found.path, found.split, mix))
    return with_types(plan, found.types_for(plan.planned), found.chosen_for)


def _laid_out(recipe: Recipe, mix: Mix, imatrix: Imatrix | None) -> tuple[Mix, Form]:
    """`mix` and its form, with what is known of their inputs."""
    if imatrix is None:
        of_experts = [expert.imatrix for expert in mix.experts if expert.imatrix]
        return mix, with_trunk_importance(lay_out(mix, recipe.layout), of_experts)
    mix, rest = with_imatrix(mix, imatrix)
    return mix, with_importance(lay_out(mix, recipe.layout), rest)


def with_split(plan: Plan, split: Split) -> Plan:
    """`plan` with the neurons of its gate-less mix in two groups; the types are those of its preset."""
    recipe = replace(plan.recipe, layout=Layout.SHARED)
    mix, form = _laid_out(recipe, replace(plan.mix, split=split), plan.imatrix)
    return _typed(recipe, mix, form, plan.imatrix)


def _splittable(recipe: Recipe, mix: Mix) -> Recipe:
    """`recipe`, not to be split where that was not asked for and cannot be. Raises UserError where it was."""
    quant = recipe.quant
    if quant.split is Splitting.NONE or (fault := _split_fault(mix, quant.split)) is None:
        return recipe
    if quant.split is not Splitting.AUTO:
        raise fault
    return replace(recipe, quant=replace(quant, split=Splitting.NONE))


def _split_fault(mix: Mix, by: Splitting) -> UserError | None:
    """Why the neurons of a gate-less mix cannot be split."""
    if faults := base_faults(mix.base, Layout.SHARED):
        return faults[0]
    n, n_ff = len(mix.experts), int(mix.base.hparam("feed_forward_length"))
    if not fine_sizes(n, n_ff, by):
        return UserError(
            f"{mix.base.ref}: {n} × {n_ff} neurons a layer are too few to split by {by}", "choose split = 'none'"
        )
    if mix.energies is None:
        return UserError(
            "a split goes by what enters ffn_down, and no importance matrix says that of all experts",
            "pass --imatrix FILE (see `moegguf calibrate`), or choose split = 'none'",
        )
    return None


def _split_again(path: Path, rule: SplitRule, mix: Mix) -> Split:
    """The split that a plan of types was made with."""
    if not mix.router.is_gateless or mix.compaction or len(mix.layers) < mix.n_layer or mix.is_dense:
        raise UserError(f"{path}: splits a gate-less mix of whole FFNs, which this is not", "make a plan for this mix")
    if fault := _split_fault(mix, rule.by):
        raise UserError(f"{path}: {fault.message}", fault.mend)
    split = split_neurons(mix.energies, rule.by, rule.fine)
    if split.digest != rule.digest:
        raise UserError(
            f"{path}: was made with another imatrix or for another mix: other neurons are fine by this one",
            "pass the imatrix that it was made with, or make it again",
        )
    return split


def with_types(plan: Plan, types: Mapping[str, GGMLQuantizationType], chosen_for: str) -> Plan:
    """`plan` with these types for the tensors that they name, which were chosen for a budget.

    Raises UserError, with all faults, when a tensor cannot have its type.
    """
    quant = replace(plan.recipe.quant, types=types, chosen_for=chosen_for)
    return _typed(replace(plan.recipe, quant=quant), plan.mix, plan.form, plan.imatrix)


def _typed(recipe: Recipe, mix: Mix, form: Form, imatrix: Imatrix | None) -> Plan:
    has_imatrix = bool(imatrix) or any(expert.imatrix for expert in mix.experts)
    planned = tuple(assign_types(form, recipe.quant, has_imatrix=has_imatrix))
    card = _card(recipe, mix)
    metadata = _metadata(recipe, mix, form, imatrix)
    metadata["general.file_type"] = GGUFValue(int(_file_type(recipe.quant, planned)), GGUFValueType.UINT32)
    metadata |= card.to_metadata() | spare_bytes(SPARE_BYTES)  # last, as an edit of the card writes them again
    header = header_bytes(form.arch, metadata, planned)
    return Plan(recipe, recipe.output, mix, card, form, imatrix, planned, header)


def open_mix(recipe: Recipe, *, router: Router | None = None, stream: bool = False, pre: str | None = None) -> Mix:
    """The mix of `recipe`, its sources open and checked, whether or not a GGUF can hold it."""
    options = OpenOptions(recipe.folder, stream, pre, recipe.base)

    def router_of(recipe: Recipe) -> Router | None:
        return read_router(recipe.folder / recipe.router.file) if recipe.router.file and router is None else router

    return make_mix(recipe, lambda ref: open_source(ref, options), router_of)


def build(plan: Plan, *, threads: int | None = None, progress: Progress = unheard) -> Built:
    """Write a plan. `progress` hears the bytes as they are verified and written, `plan.n_bytes_to_do` in all.

    Raises UserError for weights that cannot be used and when the disk is too small; then no file is left.
    """
    if plan.mix.router.is_blank:
        raise UserError(
            f"recipe {plan.recipe.name}: its {plan.card.router} router has not been fitted yet",
            "run `moegguf route fit`, and give the file that it writes as the router",
        )
    if plan.recipe.compact and not plan.mix.compaction:
        raise UserError(
            f"recipe {plan.recipe.name}: what a compact mix merges has not been chosen yet", "run `moegguf build`"
        )
    mend = "free some space, choose another -o, or a smaller --quant"
    check_space(plan.path.parent, plan.n_bytes, "the mix", mend)
    start = time.monotonic()
    verify(plan.to_verify, progress)
    written = write_gguf(plan.path, plan.header, plan.planned, threads or usable_cores(), progress)
    return Built(plan, written.n_bytes, time.monotonic() - start, written.requantised)


def verify(files: Iterable[Expected], progress: Progress) -> None:
    """Raises UserError where a file is not what the store that it comes from says."""
    for file in files:
        if (found := sha256_of(file.path, progress)) != file.sha256:
            raise UserError(
                f"{file.path}: its SHA-256 is {found[:12]}…, expected {file.sha256[:12]}…: the file is damaged",
                "fetch the model again",
            )


def _check_expressible(recipe: Recipe) -> None:
    """Refuse what no graph of stock llama.cpp computes."""
    if recipe.router.is_gateless:
        return
    mends = {
        f"mix = {recipe.mixed.value!r}": recipe.mixed is not Mixed.FFN,
        "layers": recipe.layers is not None,
    }
    faults = [
        UserError(
            f"recipe {recipe.name}: {key} with a {recipe.router.mode} router has no graph in stock llama.cpp, so no "
            "GGUF can hold it",
            "choose router = 'gateless', which is exact, or leave that key out; the reference in PyTorch runs it: "
            "`moegguf chat --engine torch`, `moegguf eval --engine torch`",
        )
        for key, is_set in mends.items()
        if is_set
    ]
    if faults:
        raise UserError.of(faults)


def _check_compactable(mix: Mix) -> None:
    if mix.base.arch not in PER_LAYER_WIDTHS or mix.has_ffn_bias:
        what = "has FFNs with biases" if mix.has_ffn_bias else f"is of architecture {mix.base.arch!r}"
        raise UserError(
            f"{mix.base.ref}: {what}, which cannot be compacted, only {', '.join(PER_LAYER_WIDTHS)} without can",
            "leave compact out; mix = 'fine-grained' is one model's size",
        )


def _check_target_is_no_source(path: Path, mix: Mix) -> None:
    if not path.exists():
        return
    for source in (mix.base, *(expert.source for expert in mix.experts)):
        if any(file.exists() and file.samefile(path) for file in source.files):
            raise UserError(f"{path}: is also a source ({source.ref}) of this mix", "choose another -o")


def _metadata(recipe: Recipe, mix: Mix, form: Form, imatrix: Imatrix | None) -> Metadata:
    """What stock runtimes read: `general.*`, the architecture, the tokenizer of the base."""
    metadata = _general(recipe, mix, form) | form.metadata | mix.base.read_vocab()
    if imatrix:  # the keys that llama-quantize leaves
        metadata["quantize.imatrix.file"] = GGUFValue(imatrix.path.name, GGUFValueType.STRING)
        metadata["quantize.imatrix.entries_count"] = GGUFValue(len(imatrix.entries), GGUFValueType.UINT32)
        metadata["quantize.imatrix.chunks_count"] = GGUFValue(imatrix.n_chunks, GGUFValueType.UINT32)
    return metadata


def _file_type(quant: QuantSpec, planned: Sequence[Planned]) -> LlamaFileType:
    """The preset's; of types that were chosen one by one, that of the type which most weights have."""
    if not quant.types:
        return preset(quant.preset).file_type
    n_weights: Counter[GGMLQuantizationType] = Counter()
    for tensor in planned:
        n_weights[tensor.type] += tensor.slot.n_weights
    return next((p.file_type for p in presets() if p.type is max(n_weights, key=n_weights.get)), LlamaFileType.GUESSED)


_KEPT_FROM_BASE = ("general.license", "general.languages", "general.sampling.")


def _general(recipe: Recipe, mix: Mix, form: Form) -> Metadata:
    string = GGUFValueType.STRING
    general = {key: value for key, value in mix.base.metadata.items() if key.startswith(_KEPT_FROM_BASE)}
    general |= {
        "general.architecture": GGUFValue(form.arch, string),
        "general.type": GGUFValue("model", string),
        "general.name": GGUFValue(recipe.name, string),
        "general.size_label": GGUFValue(size_label_of(form, len(mix.experts)), string),
        "general.tags": GGUFValue(list(TAGS), GGUFValueType.ARRAY, string),
        "general.quantization_version": GGUFValue(GGML_QUANT_VERSION, GGUFValueType.UINT32),
    }
    if recipe.description:
        general["general.description"] = GGUFValue(recipe.description, string)
    if recipe.license:
        general = {key: value for key, value in general.items() if not key.startswith("general.license")}
        general["general.license"] = GGUFValue(recipe.license, string)
    return general | base_models([mix.base.label, *(expert.source.label for expert in mix.experts)])


def base_models(labels: Sequence[str]) -> Metadata:
    """The keys that name the models which another was made from."""
    parents = list(dict.fromkeys(labels))
    metadata = {"general.base_model.count": GGUFValue(len(parents), GGUFValueType.UINT32)}
    for i, label in enumerate(parents):
        for key, value in _parent(label).items():
            metadata[f"general.base_model.{i}.{key}"] = GGUFValue(value, GGUFValueType.STRING)
    return metadata


def _parent(label: str) -> dict[str, str]:
    """How the Hub names a model that another was made from (gguf's general.base_model.* keys)."""
    if not label.startswith("hf:"):
        return {"name": label}
    repo = label.removeprefix("hf:").partition("@")[0]
    organization, _, name = repo.rpartition("/")
    return {"name": name, "organization": organization, "repo_url": f"https://huggingface.co/{repo}"}


def size_label_of(form: Form, n_experts: int) -> str:
    """4x7B and the like, as gguf makes it from the weights outside and inside the experts."""
    expert = sum(slot.n_weights for slot in form.slots if slot.preset) // n_experts
    rest = sum(slot.n_weights for slot in form.slots if not slot.preset)
    return size_label(rest + expert * n_experts, rest, expert, n_experts)


def _card(recipe: Recipe, mix: Mix) -> Card:
    router = mix.router
    return Card(
        name=recipe.name,
        tool_version=__version__,
        layout=recipe.layout,
        router=router.mode,
        k=router.k,
        base=mix.base.label,
        quant=recipe.quant.label,
        experts=tuple(
            ExpertCard(e.name, e.source.label, e.weight, quant_of(recipe, e.spec), e.source.licence)
            for e in mix.experts
        ),
        std=router.std,
        seed=router.seed,
        always_on=router.always_on,
        shared=router.shared,
        settings=router.settings,
        router_digest=router.digest if router.is_stored else "",
        mixed=recipe.mixed,
        trunk=recipe.trunk,
        layers=recipe.layers,
        compact=_compact_card(mix),
        split=SplitCard(mix.split.by, mix.split.n_fine, mix.split.n_neurons, mix.split.digest) if mix.split else None,
        base_licence=mix.base.licence,
    )


def quant_of(recipe: Recipe, expert: ExpertSpec) -> str:
    """The precision of an expert: its own preset, or what the whole mix has."""
    return recipe.quant.label if expert.quant == recipe.quant.preset else expert.quant


def _compact_card(mix: Mix) -> CompactCard | None:
    if mix.compaction is None:
        return None
    n_ff = int(mix.base.hparam("feed_forward_length"))
    whole = n_ff * len(mix.experts)
    widths = tuple(width(mix.groupings[layer]) if layer in mix.groupings else whole for layer in mix.layers)
    return CompactCard(widths, n_ff, mix.compaction.kld, mix.compaction.n_tokens)
