#!/usr/bin/env python3
"""Size of the file against what it costs: llama.cpp's presets, budgets, per-expert groups, compact mixes.

Purpose: whether choosing types and merging neurons is worth it, at equal file size, and by how much. The cost is the
mean KL divergence, in nats, from the same mix in F16, on held-out text of the embedded family; importance matrices are
calibrated on its training text, which shares no question with that.

    presets    as `build` makes them: byte for byte the tensors that llama_model_quantize makes of the mix in F32 with
               the same imatrix (tests/test_oracle.py)
    budget     types chosen for exactly the size of a preset's file, by the built-in rule: nothing is probed
    split      budgets of the same sizes in layout auto, where the neurons of a layer may be in two groups
    groups     layout shared: half of the experts in one preset, half in another, against a budget of that size
    compact    neurons merged until a size is left, on the family as it is and on copies of it that drifted less: base +
               s · (expert - base) of the FFNs; against the whole mix in Q6_K

The mixes are gate-less. One is the embedded family's, trained, 4.2 M weights. The other is made of random numbers
(`generate_models.py`) and larger. Random layers are not trained ones: such a model says whether a result hangs on the
family, not what a trained model would do.

Errors are standard errors over chunks of text; those of ratios are of the same chunks in both.

Every step is kept in a work folder, so a rerun does only what is missing; after a change of how files are made, name
another. The same versions, number of threads and kind of CPU give the same numbers. A table for people, then one line
of JSON.

    scripts/bench_quant.py             everything, into moegguf/demo/bits
    scripts/bench_quant.py --quick     few presets and tokens, no generated model, nothing stored unless --out is given
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from generate_models import generate, parse_shape

import moegguf
from moegguf.allocation import Survey, allocate, survey
from moegguf.assembly import Plan, build, open_mix, plan_build
from moegguf.atomic import atomic_file
from moegguf.demo import MEMBERS, MODELS
from moegguf.demo.text import DOMAINS
from moegguf.drift import measure_drift
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.jobs.calibration import CalibrationOptions, experts_of, plan_calibration, run_calibration
from moegguf.jobs.compaction import CompactOptions, choose_merges
from moegguf.jobs.divergences import KeptReference, chunk_length, keep_reference, sequences_of
from moegguf.measurement.plots import curves, require
from moegguf.quant.imatrix import write_calibration
from moegguf.quant.neurons import Compaction
from moegguf.recipe import Budget, Recipe, parse_recipe
from moegguf.splitting import allocate_split
from moegguf.texts import Record, read_domains

OUT = Path(moegguf.__file__).parent / "demo" / "bits"
PRESETS = ("IQ2_M", "Q2_K", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""Those whose sizes budgets are given, and that are measured without imatrix as well."""
RIVALS = ("IQ2_S", "IQ3_XXS", "Q3_K_S", "IQ3_M", "Q3_K_L", "IQ4_NL", "Q4_K_S", "Q5_K_S")
"""Others that a budget of the embedded family is held against."""
QUICK_PRESETS = ("Q2_K", "Q4_K_M", "Q6_K")
NEED_IMATRIX = ("IQ2_M",)
LEAST_BPW, MOST_BPW = 2.5, 6.0
"""The range of the target for budgets."""
TARGET_RATIO, TARGET_SHARE = 0.8, 0.8
TARGET_SIZE = 0.6
"""Of the Q6_K file of the whole mix."""
FINE, COARSE = "Q6_K", ("Q3_K_M", "Q4_K_M")
COMPACT_SIZES, QUICK_SIZES = (1.0, 1.25, 1.5, 2.0, 3.0), (1.0, 2.0)
COMPACT_QUANTS = ("Q8_0", "Q6_K")
SCALES, QUICK_SCALES = (1.0, 0.5, 0.25, 0.125), (1.0, 0.25)
SMALL_DRIFT = 0.1
"""Of an expert from the mean, and so that of fine-tunes of 7B models: a few per cent."""
SHAPE = "0.1B,hidden=512,ffn=512,layers=4,heads=8,kv_heads=4,vocab=1024"
GENERATED_PRESETS = ("Q2_K", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
N_CALIBRATION, N_GENERATED_CALIBRATION, N_HELD_OUT = 400, 50, 250
"""Exchanges of each of the four domains."""
TOKENS = {"demo": 2000, "generated": 400}
"""Held-out tokens of each domain."""
QUICK_TOKENS = 200
FOLDER = Path("~/.cache/moegguf/bench_quant").expanduser()


# ------------------------------------------------------------------------------------------------ the mixes


@dataclass(frozen=True)
class Family:
    """A base and experts whose gate-less mix is quantised."""

    name: str
    base: str
    experts: Mapping[str, str]

    @property
    def halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = tuple(self.experts)
        return names[: len(names) // 2], names[len(names) // 2 :]


def demo_family(folder: Path, scale: float = 1.0) -> Family:
    """The embedded family, its experts' FFNs moved towards the base's until `scale` of their differences is left."""
    experts = {name: f"demo:{name}" for name in MEMBERS}
    if scale == 1:
        return Family("demo", "demo:base", experts)
    for name in MEMBERS[1:]:
        target = folder / f"scaled-{scale:g}" / name
        if not (target / "model.safetensors").exists():
            write_scaled(name, scale, target)
        experts[name] = str(target)
    return Family(f"demo, drift × {scale:g}", "demo:base", experts)


def write_scaled(name: str, scale: float, target: Path) -> None:
    """In F16, which holds the differences of a quarter eight times as well as bf16."""
    from safetensors.torch import load_file, save_file

    base, expert = (load_file(MODELS / member / "model.safetensors") for member in ("base", name))
    for key in expert:
        if ".mlp." in key:
            expert[key] = (base[key].float() + scale * (expert[key].float() - base[key].float())).half()
    target.mkdir(parents=True, exist_ok=True)
    for file in (MODELS / name).glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    partly = target / "model.safetensors.part"
    save_file(expert, partly, metadata={"format": "pt"})
    partly.rename(target / "model.safetensors")


def generated_family(folder: Path) -> Family:
    models = folder / f"generated-{digest(SHAPE)}"
    if not models.exists():
        partly = models.with_suffix(".part")
        generate(partly, parse_shape(SHAPE), 4)
        partly.rename(models)
    return Family("generated", str(models / "base"), {f"e{i}": str(models / f"expert{i}") for i in (1, 2, 3, 4)})


# --------------------------------------------------------------------------------------------- the measuring


@dataclass(frozen=True)
class Measured:
    """A file and how far it is from the mix in F16. `chunks` are the sums of KLD over each chunk, in nats."""

    name: str
    n_bytes: int
    bpw: float
    kld: float
    error: float
    top1: float
    chunks: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    value: float
    error: float

    def __str__(self) -> str:
        digits = 2 if self.error >= 0.005 else 3
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def ratio(a: Measured, b: Measured) -> Ratio:
    """KLD of `a` / KLD of `b`, on the same chunks: a ratio estimate, and its standard error."""
    sums_a, sums_b = np.array(a.chunks), np.array(b.chunks)
    value = sums_a.sum() / sums_b.sum()
    n = len(sums_a)
    return Ratio(float(value), float((n / (n - 1) * np.square(sums_a - value * sums_b).sum()) ** 0.5 / sums_b.sum()))


@dataclass(frozen=True)
class Bench:
    """A family's mix in F16, what calibration says of it, and its logits on held-out text: made once, then kept."""

    family: Family
    folder: Path
    n_tokens: int
    threads: int
    n_calibration: int = N_CALIBRATION

    @property
    def f16(self) -> Path:
        return self._own / "f16.gguf"

    @property
    def imatrix(self) -> Path:
        return self._own / "imatrix.gguf"

    def prepare(self) -> None:
        """Write what is missing of the above."""
        self._own.mkdir(parents=True, exist_ok=True)
        if not self.f16.exists():
            self._write(plan_build(self.recipe("F16", output=self.f16), overwrite=True))
        if not self.imatrix.exists():
            texts = read_domains({name: [f"demo:{name}#{self.n_calibration}"] for name in DOMAINS})
            options = CalibrationOptions(threads=self.threads)
            plan = plan_calibration(self.f16, texts, self.imatrix.with_name("unfinished.gguf"), options)
            calibration = run_calibration(plan)
            for name, one in experts_of(calibration, plan.header).items():
                write_calibration(self._own / f"{name}.imatrix.gguf", one)
            plan.output.rename(self.imatrix)

    def recipe(self, quant: object, output: Path | None = None, of_experts: Mapping[str, str] = {}, **table) -> Recipe:
        experts = [
            {"name": name, "source": source} | ({"quant": of_experts[name]} if name in of_experts else {})
            for name, source in self.family.experts.items()
        ]
        table = {"base": self.family.base, "experts": experts, "quant": quant, **table}
        table["output"] = str(output or self._own / "unused.gguf")
        return parse_recipe("mix", table, where="bench_quant:", folder=Path())

    def with_own_imatrices(self, recipe: Recipe) -> Recipe:
        """What the mix's imatrix says, expert by expert: for other layouts."""
        experts = [replace(e, imatrix=str(self._own / f"{e.name}.imatrix.gguf")) for e in recipe.experts]
        return replace(recipe, experts=tuple(experts))

    @cached_property
    def reference(self) -> KeptReference:
        header = read_header(self.f16)
        records = held_out()
        chunks = sequences_of(header, records, chunk=chunk_length(header), max_tokens=self.n_tokens)
        sequences = [tokens for some in chunks.values() for tokens in some]
        return keep_reference(self.f16, sequences, self._own, threads=self.threads)

    def measure(self, name: str, plan_of: Callable[[], Plan]) -> Measured:
        """Build, compare, and remove the file again; or read what came out the last time."""

        def compute() -> dict[str, object]:
            with tempfile.TemporaryDirectory(dir=self._own) as folder:
                plan = replace(plan_of(), path=Path(folder) / "mix.gguf")
                self._write(plan)
                found = self.reference.compare(plan.path, threads=self.threads)
                size = plan.path.stat().st_size
            starts = np.cumsum([0, *found.lengths[:-1]])
            chunks = np.add.reduceat(found.tokens["kld"].astype(np.float64), starts)
            return {
                "n_bytes": size, "bpw": plan.bits_per_weight, "kld": found.kld.value, "error": found.kld.error,
                "top1": found.top1.value, "chunks": [float(f"{chunk:.9g}") for chunk in chunks],
            }  # fmt: skip

        key = digest([self._key, self.n_tokens, name])
        found = kept(self._own / f"{key}.json", compute)
        seconds = found.pop("seconds")
        SECONDS[f"{self.family.name}: {name}"] = seconds
        measured = Measured(name, **{**found, "chunks": tuple(found["chunks"])})
        tell(f"{self.family.name}: {name}", f"{measured.n_bytes / 1e6:8.3f} MB  KLD {measured.kld:.3g}", seconds)
        return measured

    @property
    def n_measured_tokens(self) -> int:
        return sum(len(tokens) - 1 for tokens in self.reference.sequences)

    @property
    def _key(self) -> list[object]:
        return [self.family.base, dict(self.family.experts), self.n_calibration, N_HELD_OUT, self.threads, versions()]

    @property
    def _own(self) -> Path:
        return self.folder / f"mix-{digest(self._key)}"

    def _write(self, plan: Plan) -> None:
        build(plan, threads=self.threads)


SECONDS: dict[str, float] = {}
"""What every step took when it was computed."""


def held_out() -> dict[str, list[Record]]:
    return read_domains({name: [f"demo:{name}/heldout#{N_HELD_OUT}"] for name in DOMAINS})


def kept(path: Path, compute: Callable[[], dict]) -> dict:
    """What `compute` gave, and in how many seconds: read from `path`, or computed and written there."""
    if not path.exists():
        start = time.monotonic()
        found = compute()
        with atomic_file(path) as file:
            file.write(json.dumps({**found, "seconds": round(time.monotonic() - start, 2)}).encode())
    return json.loads(path.read_text())


def tell(step: str, result: str, seconds: float) -> None:
    print(f"{step:58} {result:32} {seconds:6.1f} s", file=sys.stderr, flush=True)


def digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("llama-cpp-python", "numpy")}
    return {"python": platform.python_version(), "moegguf": moegguf.__version__, **packages}


# ------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Pair:
    """A file of ours, the budget or preset that it is held against, and the KLD of the one over that of the other."""

    ours: Measured
    other: Measured

    @property
    def ratio(self) -> Ratio:
        return ratio(self.ours, self.other)


def of_presets(bench: Bench, presets: Sequence[str], imatrix: str) -> list[Measured]:
    """llama.cpp's presets, smallest first."""
    rows = [
        bench.measure(f"{preset}{_with(imatrix)}", partial(plan_build, bench.recipe(preset, imatrix=imatrix)))
        for preset in presets
    ]
    return sorted(rows, key=lambda row: row.n_bytes)


def of_budgets(bench: Bench, limits: Sequence[Measured], imatrix: str) -> list[Measured]:
    """Budgets of the sizes of other files."""

    @cache
    def found() -> Survey:
        return survey(plan_build(bench.recipe(FINE, imatrix=imatrix)), threads=bench.threads)

    def plan(limit: Measured) -> Plan:
        return allocate(found(), Budget(str(limit.n_bytes), n_bytes=limit.n_bytes)).plan

    return [bench.measure(f"budget of {limit.name}", partial(plan, limit)) for limit in limits]


def of_splits(bench: Bench, limits: Sequence[Measured], imatrix: str) -> list[Measured]:
    """Budgets of the sizes of other files, their neurons in two groups where that is predicted to lose less."""

    @cache
    def found() -> Survey:
        recipe = bench.recipe({"budget": "1GB"}, layout="auto", imatrix=imatrix)
        return survey(plan_build(recipe), threads=bench.threads)

    def plan(limit: Measured) -> Plan:
        return allocate_split(found(), Budget(str(limit.n_bytes), n_bytes=limit.n_bytes), threads=bench.threads).plan

    return [bench.measure(f"split within {limit.name}", partial(plan, limit)) for limit in limits]


def best_within(presets: Sequence[Measured], n_bytes: int) -> Measured | None:
    """The preset of least KLD that takes no more."""
    return min((row for row in presets if row.n_bytes <= n_bytes), key=lambda row: row.kld, default=None)


def of_groups(bench: Bench) -> list[Measured]:
    """Half of the experts fine and half coarse, both ways round; the trunk as the coarse preset has it."""
    rows = []
    for coarse in COARSE:
        for fine in bench.family.halves:
            recipe = bench.recipe(coarse, of_experts=dict.fromkeys(fine, FINE), layout="shared")
            plan = partial(plan_build, bench.with_own_imatrices(recipe))
            rows.append(bench.measure(f"{FINE} for {' and '.join(fine)}, else {coarse}", plan))
    return rows


@dataclass(frozen=True)
class Compacts:
    """Compact mixes of a family that drifted so far, and the whole mix in Q6_K."""

    scale: float
    drift: float
    whole: Measured
    rows: list[Measured]

    @property
    def best(self) -> Measured | None:
        """Of those that are at most `TARGET_SIZE` times the whole."""
        small = (row for row in self.rows if row.n_bytes <= TARGET_SIZE * self.whole.n_bytes)
        return min(small, key=lambda row: row.kld, default=None)

    @property
    def smallest_as_good(self) -> Measured | None:
        """The smallest that is as close to F16 as the whole mix in Q6_K."""
        return min((row for row in self.rows if row.kld <= self.whole.kld), key=lambda row: row.n_bytes, default=None)


def of_compact(bench: Bench, scale: float, sizes: Sequence[float]) -> Compacts:
    """Compact mixes at every size and quant; the smallest also with its types chosen for `TARGET_SIZE` of the whole."""
    whole = bench.measure(FINE + _with(str(bench.imatrix)),
                          partial(plan_build, bench.recipe(FINE, imatrix=str(bench.imatrix))))  # fmt: skip
    domains = {name: [f"demo:{domain}"] for name, domain in zip(bench.family.experts, DOMAINS, strict=True)}

    def recipe(size: float, quant: str) -> Recipe:
        return bench.recipe(quant, compact={"size": f"{size:g}x"}, domains=domains, layout="fused")

    @cache
    def merges(size: float) -> Compaction:
        return choose_merges(recipe(size, FINE), CompactOptions(threads=bench.threads)).compaction

    def with_preset(size: float, quant: str) -> Plan:
        return plan_build(bench.with_own_imatrices(recipe(size, quant)), compaction=merges(size))

    def with_budget(size: float, n_bytes: int) -> Plan:
        found = survey(with_preset(size, FINE), threads=bench.threads)
        return allocate(found, Budget(str(n_bytes), n_bytes=n_bytes)).plan

    rows = [
        bench.measure(f"compact {size:g}x, {quant}", partial(with_preset, size, quant))
        for size in sizes
        for quant in COMPACT_QUANTS
    ]
    name = f"compact {sizes[0]:g}x, budget of {TARGET_SIZE:g} × {FINE}"
    rows.append(bench.measure(name, partial(with_budget, sizes[0], int(TARGET_SIZE * whole.n_bytes))))
    return Compacts(scale, measure_drift(open_mix(bench.recipe("F16"))).overall, whole, rows)


def _with(imatrix: str) -> str:
    return "" if imatrix else ", no imatrix"


@dataclass(frozen=True)
class Results:
    """Of one family: presets and budgets with and without imatrix, groups with the budgets of their sizes."""

    bench: Bench
    presets: list[Measured]
    rivals: list[Measured]
    budgets: list[Measured]
    splits: list[Measured]
    plain_presets: list[Measured]
    plain_budgets: list[Measured]
    groups: list[Pair]

    @property
    def all_presets(self) -> list[Measured]:
        """Smallest first."""
        return sorted((*self.presets, *self.rivals), key=lambda row: row.n_bytes)

    def against_presets(self) -> list[tuple[Pair, Measured]]:
        """Each budget against the best preset of at most its size; with the preset whose size it was given."""
        return _paired(self.budgets, self.presets, self.all_presets)

    def against_plain_presets(self) -> list[tuple[Pair, Measured]]:
        return _paired(self.plain_budgets, self.plain_presets, self.plain_presets)

    def against_one_group(self) -> list[tuple[Pair, Measured]]:
        """Each budget that may be split against the same budget in one group."""
        return [(Pair(split, one), limit)
                for split, one, limit in zip(self.splits, self.budgets, self.presets, strict=True)]  # fmt: skip

    def in_range(self) -> list[Pair]:
        """Of the sizes that the target is about."""
        return [pair for pair, limit in self.against_presets() if LEAST_BPW <= limit.bpw <= MOST_BPW]


def _paired(
    budgets: Sequence[Measured], limits: Sequence[Measured], presets: Sequence[Measured]
) -> list[tuple[Pair, Measured]]:
    return [(Pair(ours, best_within(presets, limit.n_bytes)), limit)
            for ours, limit in zip(budgets, limits, strict=True)]  # fmt: skip


def measure_family(bench: Bench, presets: Sequence[str], rivals: Sequence[str] = ()) -> Results:
    bench.prepare()
    imatrix = str(bench.imatrix)
    weighted = of_presets(bench, presets, imatrix)
    plain = of_presets(bench, [preset for preset in presets if preset not in NEED_IMATRIX], "")
    groups = of_groups(bench)
    return Results(
        bench, weighted, of_presets(bench, rivals, imatrix), of_budgets(bench, weighted, imatrix),
        of_splits(bench, weighted, imatrix),
        plain, of_budgets(bench, plain, ""),
        [Pair(*pair) for pair in zip(groups, of_budgets(bench, groups, imatrix), strict=True)],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the report

PAGE = """\
# Bits where they matter: size against KLD

Mean KL divergence (nats) from the same gate-less mix of four in F16, ± one standard error over chunks of held-out
text. `scripts/bench_quant.py` built, measured and wrote all of this; its first lines say how. MB are 10^6 bytes of the
whole file, bits per weight are of its tensors.

- **demo**: the embedded family, trained, {demo_weights:.1f} M weights in the mix; {demo_tokens} held-out tokens.
  The built-in rule's table of how much errors matter was fitted to this very family (its training text), so the ratios
  of budgets here are *not independent* of it.
- **generated**: random weights of a larger shape, on the same text: `{shape}`{generated}.
  It is the nearest to an outside check, but a weak one. Random FFNs add little to what a model says, trained ones much:
  here budgets take bits from the experts and give them to attention, embeddings and output, and win by more than can be
  expected of a trained model.

What presets do not do explains part of the rest: llama.cpp raises attn_k and attn_v to Q8_0 in mixes of eight experts,
where attention costs next to nothing, but not in mixes of four.

Calibration text is the train split, measured is the held-out split: no question is in both. One imatrix, calibrated by
`moegguf calibrate`'s code on the F16 mix, serves presets and budgets alike. Presets are llama.cpp's, tensor by tensor;
the best one within a size is of all that were measured, on demo also
{rivals}.

{parts}

## (f) Compact

Neurons of the experts merged to a multiple of one model's, in layout fused, all with the imatrix; × is the size
against the whole mix in {fine}, ratio is KLD / KLD of that. Drift × s: FFNs are base + s · (expert - base). The budgets
are types chosen for {target_size:g} × the {fine} file.

{compacts}

## Targets

{targets}

## Settings

- {versions}, {threads} thread(s); {machine}; {seconds:.0f} s in all
"""


def report(results: Sequence[Results], compacts: Sequence[Compacts]) -> str:
    demo, *others = results
    return PAGE.format(
        demo_weights=_n_weights(demo.bench) / 1e6,
        demo_tokens=demo.bench.n_measured_tokens,
        shape=SHAPE,
        generated="".join(
            f"; {_n_weights(other.bench) / 1e6:.0f} M weights in the mix, {other.bench.n_measured_tokens} tokens"
            for other in others
        ) or "; not measured in this run",
        rivals=", ".join(row.name for row in demo.rivals) or "no others",
        parts="\n\n".join(_parts(each) for each in results),
        fine=FINE,
        target_size=TARGET_SIZE,
        compacts="\n".join(_compact_table(compacts)),
        targets="\n".join(f"- {line}" for line in targets(results, compacts)),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        threads=demo.bench.threads,
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        seconds=sum(SECONDS.values()),
    )  # fmt: skip


def _n_weights(bench: Bench) -> int:
    return sum(math.prod(tensor.shape) for tensor in read_header(bench.f16).tensors.values())


def _parts(results: Results) -> str:
    name = results.bench.family.name
    lines = [
        f"## {name}: (a) presets and (b) budgets of their sizes, one imatrix", "",
        *_ratio_table(results.against_presets(), results.presets), "",
        f"## {name}: (c) the same without imatrix", "",
        *_ratio_table(results.against_plain_presets(), results.plain_presets), "",
        f"## {name}: (d) neurons in two groups, the same budgets and imatrix", "",
        *_split_table(results), "",
        f"## {name}: (e) per-expert groups", "",
        f"Half of the experts in {FINE}, the others and the trunk in a coarser preset; the budget is of that size, any "
        f"type for any tensor. It is closer than the groups in {_n_lost(results.groups)} of {len(results.groups)}.", "",
        *_group_table(results), "",
        f"![{name}: size against KLD]({figure_of(results)})",
    ]  # fmt: skip
    return "\n".join(lines)


def _n_lost(pairs: Sequence[Pair]) -> int:
    return sum(pair.ratio.value > 1 for pair in pairs)


def figure_of(results: Results) -> str:
    return f"{results.bench.family.name}.png"


def _ratio_table(rows: Sequence[tuple[Pair, Measured]], presets: Sequence[Measured]) -> Iterator[str]:
    yield "| preset | MB | bits per weight | KLD of the preset | KLD of the budget | best preset within | ratio to it |"
    yield "|---|---|---|---|---|---|---|"
    for pair, limit in rows:
        yield (
            f"| {_plain(limit)} | {limit.n_bytes / 1e6:.3f} | {limit.bpw:.2f} | {_kld(limit)} | {_kld(pair.ours)} | "
            f"{_plain(pair.other)} | **{pair.ratio}** |"
        )


def _split_table(results: Results) -> Iterator[str]:
    yield "| size of | MB | bits per weight | KLD of the budget | KLD in two groups | ratio |"
    yield "|---|---|---|---|---|---|"
    pairs = results.against_one_group()
    for pair, limit in pairs:
        yield (
            f"| {limit.name} | {limit.n_bytes / 1e6:.3f} | {limit.bpw:.2f} | {_kld(pair.other)} | {_kld(pair.ours)} | "
            f"**{pair.ratio}** |"
        )
    yield f"| geometric mean | | | | | {np.exp(np.mean([np.log(pair.ratio.value) for pair, _ in pairs])):.2f} |"


def _group_table(results: Results) -> Iterator[str]:
    yield "| groups | MB | bits per weight | KLD | KLD of the budget | ratio | best preset within | ratio to it |"
    yield "|---|---|---|---|---|---|---|---|"
    for pair in results.groups:
        groups, preset = pair.ours, best_within(results.all_presets, pair.ours.n_bytes)
        yield (
            f"| {groups.name} | {groups.n_bytes / 1e6:.3f} | {groups.bpw:.2f} | {_kld(groups)} | {_kld(pair.other)} | "
            f"{pair.ratio} | {_plain(preset) if preset else '–'} | {ratio(groups, preset) if preset else '–'} |"
        )


def _compact_table(compacts: Sequence[Compacts]) -> Iterator[str]:
    yield "| drift | mix | MB | × | KLD | ratio |"
    yield "|---|---|---|---|---|---|"
    for each in compacts:
        drift = f"× {each.scale:g}: {each.drift:.1%}"
        yield f"| {drift} | **whole, {FINE}** | {each.whole.n_bytes / 1e6:.3f} | 1 | {_kld(each.whole)} | 1 |"
        for row in each.rows:
            yield (
                f"| {drift} | {row.name} | {row.n_bytes / 1e6:.3f} | {row.n_bytes / each.whole.n_bytes:.2f} | "
                f"{_kld(row)} | {ratio(row, each.whole)} |"
            )


def targets(results: Sequence[Results], compacts: Sequence[Compacts]) -> Iterator[str]:
    """What was aimed at, the numbers, and whether it was reached."""
    for each in results:
        pairs = each.in_range()
        won = [pair for pair in pairs if pair.ratio.value <= TARGET_RATIO]
        is_reached = len(won) >= TARGET_SHARE * len(pairs)
        found = ", ".join(f"{_plain(pair.ours).removeprefix('budget of ')} {pair.ratio}" for pair in pairs)
        yield (
            f"{each.bench.family.name}: at equal size, KLD ≤ {TARGET_RATIO:g} × that of the best preset at 4 of 5 "
            f"sizes between {LEAST_BPW:g} and {MOST_BPW:g} bits per weight: {len(won)} of {len(pairs)} ({found}). "
            f"**{'Reached' if is_reached else 'Not reached'}.**"
        )
    for each in compacts:
        kind = "small drift" if each.drift <= SMALL_DRIFT else "large drift, which the target is not about"
        yield f"compact, drift {each.drift:.1%} ({kind}): {_compact_target(each)}"


def _compact_target(each: Compacts) -> str:
    aim = f"KLD ≤ that of {FINE} ({_kld(each.whole)}) at ≤ {TARGET_SIZE:g} × its file: "
    whole = each.whole
    if (best := each.best) is None:
        return aim + "no compact mix is that small. **Not reached.**"
    found = f"{best.name} is {best.n_bytes / whole.n_bytes:.2f} × and {_kld(best)}, ratio {ratio(best, whole)}. "
    if best.kld <= whole.kld:
        return aim + found + "**Reached.**"
    also = each.smallest_as_good
    reach = f"as good is {also.name}, at {also.n_bytes / whole.n_bytes:.2f} ×" if also else "none is as good"
    return aim + found + f"**Not reached**: {reach}; at this drift merging costs more than rounding to {FINE}."


def _plain(row: Measured) -> str:
    return row.name.removesuffix(_with(""))


def _kld(row: Measured) -> str:
    digits = 1 - math.floor(math.log10(row.error)) if row.error else 6
    return f"{row.kld:.{digits}f} ± {row.error:.{digits}f}"


def draw(path: Path, results: Results, compacts: Sequence[Compacts]) -> None:
    """log10, because KLDs span four orders of magnitude."""
    series = {
        "presets": results.all_presets,
        "budgets": results.budgets,
        "budgets, two groups": results.splits,
        "presets, no imatrix": results.plain_presets,
        "budgets, no imatrix": results.plain_budgets,
        "groups": [pair.ours for pair in results.groups[::2]],
    }
    for each in compacts:
        rows = [row for row in each.rows if row.name.endswith(COMPACT_QUANTS[0])]
        series[f"compact, {COMPACT_QUANTS[0]}, drift {each.drift:.0%}"] = sorted(rows, key=lambda row: row.n_bytes)
    points = {
        name: ([row.n_bytes / 1e6 for row in rows], [math.log10(row.kld) for row in rows])
        for name, rows in series.items()
    }
    title = f"{results.bench.family.name}: size against KLD from F16"
    curves(path, title, points, "size of the file, MB", "log10 of the mean KLD in nats")


def as_json(results: Sequence[Results], compacts: Sequence[Compacts]) -> dict[str, object]:
    def row(measured: Measured) -> dict[str, object]:
        return {name: value for name, value in vars(measured).items() if name != "chunks"}

    def rows(pairs: Sequence[tuple[Pair, Measured]]) -> list[dict[str, object]]:
        return [
            {"size_of": _plain(limit), "best_preset": _plain(pair.other), "ratio": pair.ratio.value,
             "ratio_error": pair.ratio.error} for pair, limit in pairs
        ]  # fmt: skip

    return {
        "families": {
            each.bench.family.name: {
                "n_tokens": each.bench.n_measured_tokens,
                "presets": [*map(row, each.presets)],
                "rivals": [*map(row, each.rivals)],
                "budgets": [*map(row, each.budgets)],
                "splits": [*map(row, each.splits)],
                "presets_without_imatrix": [*map(row, each.plain_presets)],
                "budgets_without_imatrix": [*map(row, each.plain_budgets)],
                "groups": [row(pair.ours) for pair in each.groups],
                "budgets_of_groups": [row(pair.other) for pair in each.groups],
                "ratios": rows(each.against_presets()),
                "ratios_of_splits": rows(each.against_one_group()),
                "ratios_without_imatrix": rows(each.against_plain_presets()),
            }
            for each in results
        },
        "compact": [
            {"scale": each.scale, "drift": each.drift, "whole": row(each.whole), "rows": [*map(row, each.rows)]}
            for each in compacts
        ],
        "targets": list(targets(results, compacts)),
        "versions": versions(),
        "seconds": round(sum(SECONDS.values())),
    }


def main() -> None:
    options = _options()
    out = options.out or (None if options.quick else OUT)
    options.work.mkdir(parents=True, exist_ok=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        require(out / "x.png")
    presets, rivals, sizes, scales, tokens = PRESETS, RIVALS, COMPACT_SIZES, SCALES, TOKENS
    if options.quick:
        presets, rivals, sizes, scales = QUICK_PRESETS, (), QUICK_SIZES, QUICK_SCALES
        tokens = dict.fromkeys(TOKENS, QUICK_TOKENS)
    demo = Bench(demo_family(options.work), options.work, tokens["demo"], options.threads)
    results = [measure_family(demo, presets, rivals)]
    compacts = []
    for scale in scales:
        bench = Bench(demo_family(options.work, scale), options.work, tokens["demo"], options.threads)
        bench.prepare()
        compacts.append(of_compact(bench, scale, sizes))
    if not options.quick:
        family = generated_family(options.work)
        bench = Bench(family, options.work, tokens["generated"], options.threads, N_GENERATED_CALIBRATION)
        results.append(measure_family(bench, GENERATED_PRESETS))
    page, found = report(results, compacts), as_json(results, compacts)
    print(page)
    if out:
        for number, each in enumerate(results):
            draw(out / figure_of(each), each, compacts if number == 0 else [])
        (out / "README.md").write_text(page, encoding="utf-8")
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"targets": found["targets"], "seconds": found["seconds"]}, ensure_ascii=False))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few presets and tokens, no generated model")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where the results go (default: {OUT})")
    parser.add_argument("--work", type=Path, default=FOLDER, metavar="DIR", help="where steps are kept")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
