"""What a compact mix merges, end to end: texts → activations of the whole mix → merge paths → widths → measured cost.

The whole gate-less mix is written once, as precisely as memory allows, and run on texts of its domains. One half of
their chunks gives the activations that merges are judged by (`moegguf.quant.neurons`); on the others the divergence
of compacted mixes from the whole one is measured. Both files are of one type, so it is the cost of merging alone. For a
size, the cheapest merges of all layers together are taken; for a largest KLD, as many as can be, by a search that takes
the KLD as proportional to the sum of relative errors until bisection does better.

A mix that memory does not hold is judged by activations of its base, and what merging costs is then not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moegguf.assembly import Plan, build, plan_build
from moegguf.atomic import scratch_folder
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.jobs.dense import DenseOptions, dense_model
from moegguf.jobs.divergences import KeptReference, keep_reference
from moegguf.jobs.saliency import halves
from moegguf.measurement.divergence import Divergence
from moegguf.mix import FFN_ROLES, Mix
from moegguf.quant.neurons import Compaction, Ffns, Merges, find_paths, grid, separate, together, width
from moegguf.recipe import CompactSpec, QuantSpec, Recipe
from moegguf.runtime import tap as taps
from moegguf.runtime.machine import memory
from moegguf.runtime.model import open_model
from moegguf.runtime.run_options import RunOptions
from moegguf.texts import Record, read_domains

LAYER_OUTPUT = "l_out"
"""The hidden state that a layer leaves."""
MAX_VALUES = 1 << 26
"""Activations of all layers that are kept: 256 MiB. The tokens are thinned out evenly to that."""
PRECISE_BYTES = 2e9
"""A mix that takes no more in F32 is judged in F32."""
MAX_PROBES = 8
N_SECANTS = 3
"""Probes that trust proportionality; those after them bisect."""
SLACK = 0.01
"""A search ends when it could save no more than this share of what could be saved at most."""

Tokens = Sequence[int]
Texts = Mapping[str, Sequence[Record]]

Hear = Callable[[str], None]
"""Hears what is being done."""


@dataclass(frozen=True)
class CompactOptions:
    max_tokens: int = 8192
    """Of all texts together; half of them judge merges, on the others their cost is measured."""
    threads: int | None = None
    pre: str | None = None
    stream: bool = False


@dataclass(frozen=True)
class Chosen:
    """What to merge, and how far that moves the mix (None where it was not measured)."""

    compaction: Compaction
    divergence: Divergence | None


def choose_merges(recipe: Recipe, options: CompactOptions = CompactOptions(), hear: Hear = lambda _: None) -> Chosen:
    """What the compact mix of `recipe` merges.

    Raises UserError where there is no text to judge by, and where memory is too small to measure what must be.
    """
    plan = plan_build(_whole(recipe, "F16"), stream=options.stream, pre=options.pre, overwrite=True)
    if not any(recipe.domains.values()):
        return _without_text(recipe, plan.mix)
    records = read_domains(recipe.domains, recipe.folder)
    max_tokens = max(2, options.max_tokens // len(records))
    with scratch_folder(recipe.output.parent, ".moegguf-compact") as folder:
        if (preset := _preset_that_fits(plan)) is None:
            return _by_base(recipe, plan.mix, records, max_tokens, options, hear)
        bench = _Bench(_whole(recipe, preset), folder, options, hear)
        to_judge, to_measure = halves(read_header(bench.whole), records, max_tokens)
        merges = _judged(bench.mix, bench.whole, to_judge, options, hear)
        return _search(bench, merges, to_measure, recipe.compact)


def _without_text(recipe: Recipe, mix: Mix) -> Chosen:
    """Nothing or everything can be merged unjudged."""
    n, spec = len(mix.experts), recipe.compact
    if spec.size not in (1, n):
        names = " ".join(f"--domain {name}=FILE" for name in recipe.expert_names[:2])
        raise UserError(
            f"recipe {recipe.name}: compact = {_show(spec)} takes text to judge merges by, and there is none",
            f"pass {names} …, or name texts under domains in the recipe",
        )
    grouping = separate if spec.size == n else together
    n_ff = int(mix.base.hparam("feed_forward_length"))
    return Chosen(Compaction({layer: grouping(n, n_ff) for layer in mix.layers}), None)


def _whole(recipe: Recipe, preset: str) -> Recipe:
    """The mix before anything is merged, all of it in one precision."""
    experts = tuple(replace(expert, quant=preset, imatrix="") for expert in recipe.experts)
    return replace(recipe, experts=experts, quant=QuantSpec(preset), imatrix="", compact=None)


def _show(spec: CompactSpec) -> str:
    return f"{spec.size:g}x" if spec.size else f"{{ max_kld = {spec.max_kld:g} }}"


def _preset_that_fits(plan: Plan) -> str | None:
    """The most precise preset in which memory holds the whole mix; None where it holds it in none."""
    bytes_in = {"F32": 4 * plan.n_weights, "F16": 2 * plan.n_weights, "Q8_0": 34 / 32 * plan.n_weights}
    room = memory().largest_file
    if bytes_in["F32"] <= min(room, PRECISE_BYTES):
        return "F32"
    return next((preset for preset in ("F16", "Q8_0") if bytes_in[preset] <= room), None)


def _by_base(recipe: Recipe, mix: Mix, records: Texts, max_tokens: int, options: CompactOptions, hear: Hear) -> Chosen:
    """For a size, judged by what the base alone does."""
    if recipe.compact.max_kld:
        raise UserError(
            f"recipe {recipe.name}: memory does not hold the whole mix, so what merging costs cannot be measured",
            "choose compact = { size = … }, or a larger machine",
        )
    how = DenseOptions(threads=options.threads, pre=options.pre, stream=options.stream)
    with dense_model(_whole(recipe, "Q8_0"), how) as base:
        to_judge, _ = halves(read_header(base), records, max_tokens)
        merges = _judged(mix, base, to_judge, options, hear)
    return Chosen(Compaction(merges.after(_n_blocks(merges, mix, recipe.compact.size))), None)


# -------------------------------------------------------------------------------------------------- judging


def _judged(mix: Mix, model: Path, chunks: Sequence[Tokens], options: CompactOptions, hear: Hear) -> Merges:
    """All merges of `mix`, judged by what `model` does on `chunks`."""
    activations = _activations(model, mix.layers, chunks, options)
    paths = {}
    for layer, (x, norms) in activations.items():
        hear(f"judging merges, layer {layer} of {mix.n_layer}")
        ffns = Ffns(*([e.ffn(layer, role) for e in mix.experts] for role in FFN_ROLES), [e.weight for e in mix.experts])
        paths[layer] = find_paths(x, norms, ffns)
    return Merges(paths)


def _activations(
    model: Path, layers: Sequence[int], chunks: Sequence[Tokens], options: CompactOptions
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Layer → what enters its FFN, float32 (n, n_embd), and the length of what the layer leaves, (n,)."""
    n_tokens, seen = sum(map(len, chunks)), 0
    kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in layers}
    run = RunOptions(ctx=max(map(len, chunks)), threads=options.threads)
    with open_model(model, run) as opened, taps.Tap(opened, [taps.FFN_INPUT, LAYER_OUTPUT], layers) as tap:
        for tapped in tap.run(chunks):
            n_embd = tapped.values[taps.FFN_INPUT, layers[0]].shape[1]
            stride = -(-n_tokens * len(layers) * n_embd // MAX_VALUES)
            rows = slice(-seen % stride, None, stride)
            for layer in layers:
                x, output = (tapped.values[node, layer][rows] for node in (taps.FFN_INPUT, LAYER_OUTPUT))
                kept[layer].append((x, np.linalg.norm(output, axis=1)))
            seen += sum(tapped.lengths)
    return {layer: tuple(map(np.concatenate, zip(*parts, strict=True))) for layer, parts in kept.items()}


# ------------------------------------------------------------------------------------------------ measuring


class _Bench:
    """The whole mix as a file, and what compacted ones cost against it."""

    def __init__(self, recipe: Recipe, folder: Path, options: CompactOptions, hear: Hear) -> None:
        self._recipe = replace(recipe, output=folder / "whole.gguf")
        self._options, self._hear = options, hear
        hear(f"writing the whole mix as {recipe.quant.preset}")
        plan = self._build(None)
        self.mix, self.whole = plan.mix, plan.path
        self._kept: KeptReference | None = None

    def _build(self, compaction: Compaction | None) -> Plan:
        options, recipe = self._options, self._recipe
        if compaction:
            recipe = replace(recipe, compact=CompactSpec(), output=recipe.output.with_name("compact.gguf"))
        plan = plan_build(recipe, compaction=compaction, stream=options.stream, pre=options.pre, overwrite=True)
        return build(plan, threads=options.threads).plan

    def measure(self, groupings: Mapping[int, np.ndarray], chunks: Sequence[Tokens]) -> Divergence:
        """How far merging moves the mix on `chunks`, which are always the same."""
        threads = self._options.threads
        if self._kept is None:
            self._hear("running the whole mix")
            self._kept = keep_reference(self.whole, chunks, self.whole.parent, threads=threads)
        self._hear(f"measuring {_size(groupings.values()):.3g}x")
        return self._kept.compare(self._build(Compaction(groupings)).path, threads=threads)


def _size(groupings: Iterable[np.ndarray]) -> float:
    """Neurons left, as a multiple of one model's."""
    groupings = list(groupings)
    return sum(map(width, groupings)) / sum(grouping.shape[1] for grouping in groupings)


def _n_blocks(merges: Merges, mix: Mix, size: float) -> int:
    """How many blocks to save to come to `size`."""
    n, n_ff = len(mix.experts), int(mix.base.hparam("feed_forward_length"))
    return min(merges.n_blocks, round((n - size) * n_ff * len(mix.layers) / grid(n_ff)))


def _search(bench: _Bench, merges: Merges, chunks: Sequence[Tokens], spec: CompactSpec) -> Chosen:
    """The groupings that `spec` asks for, measured on `chunks`."""

    def measured(n_blocks: int) -> Chosen:
        groupings = merges.after(n_blocks)
        divergence = bench.measure(groupings, chunks)
        return Chosen(Compaction(groupings, divergence.kld.value, divergence.n_tokens), divergence)

    if spec.size is not None:
        return measured(_n_blocks(merges, bench.mix, spec.size))
    best, low, high, guess = None, 0, merges.n_blocks + 1, merges.n_blocks
    for probe in range(MAX_PROBES):
        chosen = measured(guess)
        kld = chosen.compaction.kld
        if kld <= spec.max_kld:
            best, low = chosen, guess
        else:
            high = guess
        if high - low <= max(1, SLACK * merges.n_blocks):
            break
        target = merges.errors[guess] * spec.max_kld / max(kld, 1e-12)
        guess = int(np.searchsorted(merges.errors, target, "right")) - 1 if probe < N_SECANTS else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return best or measured(0)
