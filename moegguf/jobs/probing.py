"""Influences, measured: what a known error in a group of tensors costs the running mix, in nats.

    16-bit mix ──► one group or one layer at a time in 4 bits ──► KL divergence ──► correction of its influences

What is measured, over what the survey predicts, corrects every tensor of the probe. Groups (all attn_v, all ffn_down,
…) come first, then layers, on what is left of their differences. Divergences are proportional to errors over a wide
range, so one type will do; it is coarse enough to stand out from the noise of rounding.

A probe costs a build and a run over some text of the recipe's domains, so this is for mixes that are small, or for
people who can wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGMLQuantizationType as Type

from moegguf.allocation import Survey
from moegguf.assembly import build, with_types
from moegguf.atomic import scratch_folder
from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.gguf_header import read_header
from moegguf.jobs.divergences import chunk_length, compare, sequences_of
from moegguf.quant.influence import group
from moegguf.texts import read_domains
from moegguf.watch import Progress, unheard

SMALL = 200_000_000
"""Bytes of a 16-bit mix that is probed without being asked."""
MAX_TOKENS = 2000
_COARSE = (Type.Q4_K, Type.Q4_0)
"""The first that a tensor can have."""

Names = tuple[str, ...]


def is_cheap(found: Survey) -> bool:
    """Whether the mix can be probed, and that takes seconds rather than hours."""
    recipe, mix = found.plan.recipe, found.plan.mix
    is_whole = not mix.router.is_blank and bool(mix.compaction) == bool(recipe.compact)
    return is_whole and bool(recipe.domains) and 2 * found.plan.n_weights <= SMALL


def n_probes(found: Survey) -> int:
    return sum(map(len, _probes(found)))


def corrected(found: Survey, *, threads: int, max_tokens: int = MAX_TOKENS, progress: Progress = unheard) -> Survey:
    """`found` with influences as they are in the running mix, on about `max_tokens` tokens of all domains together.

    `progress` hears of each probe.
    Raises UserError when the recipe names no text, and when the mix cannot be built in 16 bits or run.
    """
    recipe = found.plan.recipe
    if not recipe.domains:
        raise UserError(
            f"recipe {recipe.name}: names no text of its domains to probe the mix with",
            "give some with --domain NAME=FILE, or leave --probe out",
        )
    records = read_domains(recipe.domains, recipe.folder)
    with scratch_folder(found.plan.path.parent, ".moegguf-probe") as folder:
        reference, coarse = folder / "f16.gguf", folder / "coarse.gguf"
        _write(found, (), reference, threads)
        header = read_header(reference)
        of_each = max(1, max_tokens // len(records))
        texts = sequences_of(header, records, chunk=chunk_length(header), max_tokens=of_each)
        sequences = [tokens for chunks in texts.values() for tokens in chunks]

        def measure(names: Names) -> float:
            _write(found, names, coarse, threads)
            divergence = compare(reference, coarse, sequences, threads=threads)
            progress(1)
            return divergence.kld.value

        influences = dict(found.influences)
        for probes in _probes(found):
            predicted = [sum(influences[name] * _coarse_error(found, name) for name in names) for names in probes]
            for names, nats in zip(probes, predicted, strict=True):
                ratio = max(measure(names), 0.0) / nats if nats else 1.0
                influences |= {name: influences[name] * ratio for name in names}
    return replace(found, influences=influences, is_measured=True)


def _probes(found: Survey) -> tuple[Sequence[Names], Sequence[Names]]:
    """The tensors of each probe: by group, and by layer."""
    groups: dict[str, list[str]] = {}
    layers: dict[int, list[str]] = {}
    for name in found.sensitivities:
        groups.setdefault(group(name), []).append(name)
        if (layer := TensorName.parse(name).layer) is not None:
            layers.setdefault(layer, []).append(name)
    return [*map(tuple, groups.values())], [*map(tuple, layers.values())]


def _coarse_type(found: Survey, name: str) -> Type:
    return next((type for type in _COARSE if type in found.sensitivities[name].errors), Type.F16)


def _coarse_error(found: Survey, name: str) -> float:
    return found.sensitivities[name].errors.get(_coarse_type(found, name), 0.0)


def _write(found: Survey, coarse: Names, path: Path, threads: int) -> None:
    """The mix in 16 bits, some tensors of it in 4."""
    types: Mapping[str, Type] = dict.fromkeys(found.sensitivities, Type.F16) | {
        name: _coarse_type(found, name) for name in coarse
    }
    build(replace(with_types(found.plan, types, "probe"), path=path), threads=threads)
