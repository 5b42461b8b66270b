"""models.toml → a frozen `Recipe`. Everything that can be checked without opening a model is checked here.

    [mix.NAME]
    base = "hf:org/model"                         # gives everything but the experts' FFNs
    trunk = "base"                                # or "mean" of all experts, or the name of one
    experts = [{ name = "math", source = "hf:org/math-model", weight = 0.5, quant = "Q6_K" }, ...]
    mix = "ffn"                                   # or ffn+attention, fine-grained, fine-grained+attention
    layers = [0, "4-7"]                           # only these layers are mixed (default: all)
    router = "gateless"                           # or "router.safetensors", or a table:
                                                  # { mode = "noisy", k = 2, std = 0.02, seed = 0, shared = true }
                                                  # { mode = "ridge", k = 2, lambda = 0.01, temperature = 0.1 }
                                                  # { mode = "hidden", k = 2, tap = "router_input", pool = "mean" }
    domains = { math = "math.jsonl", ... }        # text of each expert's domain: for fits, maps and evaluation
    compact = { size = "1.5x" }                   # gate-less: merge neurons whose copies are alike, to that many times
                                                  # one model's FFNs, or as far as { max_kld = 0.001 } allows
    always_on = "math"                            # not gate-less: this expert runs for every token
    layout = "mixtral"                            # or fused, shared, auto
    quant = "Q4_K_M"                              # or { preset = "Q4_K_M", attn = "Q8_0", tensors = { REGEX = "F16" } }
                                                  # { budget = "12GB" }, { bpw = 4.25 }: types chosen to fit;
                                                  # { plan = "types.json" }: types that --save-plan wrote
                                                  # gate-less, with a budget: split = "neurons", "experts", "none" or
                                                  # "auto" (with layout auto): two precisions in every layer
    round_types = "up"                            # or down: experts of more precisions than a layer holds share them
    imatrix = "imatrix.gguf"                      # from `moegguf calibrate` or llama-imatrix, for few bits; of the
                                                  # mix or its base, and in the table of an expert one of its own
    output = "mix.gguf"

The command line makes the same table from its flags and goes through the same checks, so a flag, a key and
their errors cannot drift apart. All faults are collected and reported at once.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.quant.presets import parse_type, preset, preset_names
from moegguf.sizes import parse_size

DEFAULT_QUANT = "Q4_K_M"
TRUNK_OF_BASE, TRUNK_OF_MEAN = "base", "mean"
WEIGHT_TOLERANCE = 1e-6
MIN_WEIGHT = 1e-6
"""An expert of no weight at all would be stored for nothing."""


class RouterMode(StrEnum):
    """How the experts of a layer are combined.

    Sources: arXiv 2408.17280 (gate-less, noisy, trained), mergekit (hidden), arXiv 2603.29765 (ridge).
    """

    GATELESS = "gateless"
    NOISY = "noisy"
    HIDDEN = "hidden"
    RIDGE = "ridge"
    TRAINED = "trained"


FITTED = frozenset({RouterMode.HIDDEN, RouterMode.RIDGE})
"""Modes whose routers are computed from activations, by `moegguf route fit` or within a build."""


class Mixed(StrEnum):
    """What of a layer is mixed. Fine-grained: gate, up and down each on their own, and not whole FFNs."""

    FFN = "ffn"
    FFN_ATTENTION = "ffn+attention"
    FINE_GRAINED = "fine-grained"
    FINE_GRAINED_ATTENTION = "fine-grained+attention"

    @property
    def attention(self) -> bool:
        return self in (Mixed.FFN_ATTENTION, Mixed.FINE_GRAINED_ATTENTION)

    @property
    def fine_grained(self) -> bool:
        return self in (Mixed.FINE_GRAINED, Mixed.FINE_GRAINED_ATTENTION)


class Tap(StrEnum):
    """Where a hidden router looks: at what the router will see, or at what enters the layer, as mergekit does."""

    ROUTER_INPUT = "router_input"
    LAYER_INPUT = "layer_input"


class Pool(StrEnum):
    """What stands for a prompt: the mean over its tokens, or its last token, as mergekit has it."""

    MEAN = "mean"
    LAST = "last"


class Layout(StrEnum):
    """How a mix is stored; see `moegguf.layouts`."""

    MIXTRAL = "mixtral"
    FUSED = "fused"
    SHARED = "shared"


class Role(StrEnum):
    """Groups of tensors whose type a recipe may choose."""

    EMBED = "embed"
    OUTPUT = "output"
    ATTN = "attn"
    EXPERTS = "experts"


@dataclass(frozen=True)
class ExpertSpec:
    name: str
    source: str
    weight: float
    """Its share in a gate-less mix; the weights of all experts add up to 1."""
    quant: str
    """The preset that chooses the types of its FFN."""
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    """What a hidden router learns this expert's domain from."""
    imatrix: str = ""
    """The importance matrix of its FFN, in place of the recipe's."""


@dataclass(frozen=True)
class FitSpec:
    """How a router is fitted: `ridge_lambda` and `temperature` are ridge's, `tap` and `pool` are hidden's."""

    ridge_lambda: float = 0.01
    temperature: float = 0.1
    tap: Tap = Tap.ROUTER_INPUT
    pool: Pool = Pool.MEAN


@dataclass(frozen=True)
class RouterSpec:
    """`k` experts run for every token; `std` and `seed` make the white noise of a noisy router.

    With a `file`, that router is taken as it is: `mode` is then TRAINED until the file says better, and `k` of 0
    leaves the number to the file. `shared` is one router for all layers.
    """

    mode: RouterMode
    k: int
    std: float = 0.02
    seed: int = 0
    always_on: str | None = None
    shared: bool = False
    fit: FitSpec = FitSpec()
    file: str = ""

    @property
    def is_gateless(self) -> bool:
        return self.mode is RouterMode.GATELESS

    @property
    def is_unfitted(self) -> bool:
        """Whether activations have to be collected before there is a router."""
        return self.mode in FITTED


@dataclass(frozen=True)
class Budget:
    """What a mix may take: a file of `n_bytes`, or `bpw` bits for each weight on average. One of the two is set."""

    text: str
    """As it was written, without blanks."""
    n_bytes: int | None = None
    bpw: float | None = None


class Rounding(StrEnum):
    """Which way the precision of an expert goes where a layer cannot hold as many as were asked for."""

    UP = "up"
    DOWN = "down"


class Splitting(StrEnum):
    """What goes to the finer of two groups in every layer of a gate-less mix that has a budget."""

    AUTO = "auto"
    """Neurons, where that can be done and is predicted to lose less than one group."""
    NEURONS = "neurons"
    EXPERTS = "experts"
    NONE = "none"


@dataclass(frozen=True)
class QuantSpec:
    """A preset of llama.cpp, and what overrides it: types by role, and by regular expression on tensor names.

    With a `budget`, or a `plan` (a file), every tensor that a preset would quantise and nothing overrides has a type of
    its own, in `types` once they are known.
    """

    preset: str
    roles: Mapping[Role, GGMLQuantizationType] = field(default_factory=dict)
    tensors: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    budget: Budget | None = None
    plan: str = ""
    types: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    chosen_for: str = ""
    """The budget that `types` were chosen for."""
    split: Splitting = Splitting.NONE

    @property
    def label(self) -> str:
        """What a file says of itself: a preset, a budget, or the name of a plan."""
        return self.chosen_for or (self.budget.text if self.budget else Path(self.plan).stem or self.preset)


@dataclass(frozen=True)
class CompactSpec:
    """How far neurons whose copies are alike are merged; one of the two is set."""

    size: float | None = None
    """Neurons that are left, as a multiple of one model's: from 1 to the number of experts."""
    max_kld: float | None = None
    """As few as keep the measured KL divergence from the whole mix below this, in nats."""


@dataclass(frozen=True)
class Recipe:
    name: str
    base: str
    experts: tuple[ExpertSpec, ...]
    router: RouterSpec
    layout: Layout
    quant: QuantSpec
    output: Path
    folder: Path
    """What the paths of sources are relative to."""
    mixed: Mixed = Mixed.FFN
    trunk: str = TRUNK_OF_BASE
    """Which model gives what is not mixed: the base, the mean of all experts, or the expert of this name."""
    layers: tuple[int, ...] | None = None
    """The layers that are mixed; None is all of them."""
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Expert → references of texts of its domain (`moegguf.texts`)."""
    compact: CompactSpec | None = None
    imatrix: str = ""
    description: str = ""
    license: str = ""

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)


def find_recipes_file() -> Path:
    """The models.toml that ships with moegguf: in the package when installed, at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "models.toml"
    return installed if installed.is_file() else package.parent / "models.toml"


def load_tables(path: Path) -> dict[str, dict]:
    """The unchecked `[mix.NAME]` tables of a recipes file. Raises UserError when it is no such file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path given to --recipes") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid TOML ({error})", "mend that line") from error
    mixes = content.pop("mix", {})
    if content:
        raise UserError(f"{path}: unknown key {', '.join(content)}, expected only [mix.NAME] tables", "remove it")
    if not isinstance(mixes, dict) or not all(isinstance(mix, dict) for mix in mixes.values()):
        raise UserError(f"{path}: mix is no table of tables", "write recipes as [mix.NAME]")
    return mixes


def load_recipe(name: str, path: Path, overrides: Mapping[str, object]) -> Recipe:
    """The recipe `name` of the file `path`, with `overrides` from the command line on top."""
    tables = load_tables(path)
    if name not in tables:
        known = ", ".join(tables) or "none"
        raise UserError(
            f"{path}: has no recipe {name!r}, only {known}", "see `moegguf recipes`, or pass --recipes FILE"
        )
    table = _overridden(tables[name], overrides)
    return parse_recipe(name, table, where=f"{path}: [mix.{name}]", folder=path.parent)


def _overridden(table: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """`table` with `overrides` on top: inside router and quant only what is given changes.

    The parameters of another router mode mean nothing, so they are dropped.
    """
    old, new = {"router": RouterMode.GATELESS, **table}, dict(overrides)
    for each in (old, new):
        if not isinstance(each.get("router", {}), dict):
            each["router"] = _Checker.router_table(each["router"])
        if not isinstance(each.get("quant", {}), dict):
            each["quant"] = {"preset": each["quant"]}
    if _TARGETS & set(new.get("quant", {})):  # a preset, a budget and a plan exclude each other
        replaced = _TARGETS if set(_BUDGETS) & set(new["quant"]) else {*_TARGETS, "split"}
        old["quant"] = {key: value for key, value in old.get("quant", {}).items() if key not in replaced}
    if "compact" in new:  # a size and a largest KLD are no parts of one thing
        old.pop("compact", None)
    if any(
        new.get("router", {}).get(key, old["router"].get(key)) != old["router"].get(key) for key in ("mode", "file")
    ):
        del old["router"]
    return _on_top(new, old)


def _on_top(new: Mapping[str, object], old: Mapping[str, object]) -> dict[str, object]:
    """Table `new` over table `old`, tables inside likewise. Keys of `new` come first: of patterns the first counts."""
    merged = dict(new)
    for key, value in old.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _on_top(merged[key], value)
    return merged


def parse_recipe(name: str, table: Mapping[str, object], *, where: str, folder: Path) -> Recipe:
    """Check one recipe table and freeze it. Raises one UserError that reports every fault of it."""
    return _Checker(where).recipe(name, table, folder)


def rounded(experts: tuple[ExpertSpec, ...], router: RouterSpec, rounding: Rounding) -> tuple[ExpertSpec, ...]:
    """`experts` with no more precisions than a layer holds, each raised or lowered as little as possible.

    Gate-less: two neighbouring ranges of precisions, each as its finest (up) or coarsest (down). Routed: one for all
    but an always-on expert.
    """
    order = preset_names().index
    pick = min if rounding is Rounding.UP else max  # the finest comes first
    routed = [expert for expert in experts if expert.name != router.always_on]
    quants = sorted({expert.quant for expert in routed}, key=order)
    if not router.is_gateless:
        ranges = [quants]
    elif len(quants) <= 2:
        return experts
    else:
        splits = [(quants[:cut], quants[cut:]) for cut in range(1, len(quants))]
        ranges = min(
            splits,
            key=lambda split: sum(abs(order(q) - order(pick(part, key=order))) for part in split for q in part),
        )
    becomes = {quant: pick(part, key=order) for part in ranges for quant in part}
    return tuple(replace(e, quant=becomes[e.quant]) if e in routed else e for e in experts)


_MISSING = object()
_KEYS = (
    "base", "trunk", "experts", "mix", "layers", "router", "domains", "compact", "always_on", "layout", "quant",
    "round_types", "imatrix", "output", "description", "license",
)  # fmt: skip
_BUDGETS = ("budget", "bpw")
_TARGETS = {"preset", "plan", *_BUDGETS}
_MAX_BPW = 32
_ROUTER_KEYS = {
    RouterMode.GATELESS: (),
    RouterMode.NOISY: ("k", "std", "seed", "shared"),
    RouterMode.HIDDEN: ("k", "shared", "tap", "pool"),
    RouterMode.RIDGE: ("k", "shared", "lambda", "temperature"),
}
"""What else the table of a router of each mode may say. A trained router is a file."""
_FILE_KEYS = ("file", "k")
_PROMPTS = ("positive_prompts", "negative_prompts")
_TRUNKS = (TRUNK_OF_BASE, TRUNK_OF_MEAN)


class _Checker:
    """Reads values out of a recipe table and collects what is wrong with them instead of stopping."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.faults: list[UserError] = []

    def fault(self, key: str, found: object, allowed: str, mend: str) -> None:
        self.faults.append(UserError(f"{self.where} {key}: found {_show(found)}, allowed {allowed}", mend))

    def recipe(self, name: str, table: Mapping[str, object], folder: Path) -> Recipe:
        self.known_keys("", table, _KEYS)
        base = self.text("base", table.get("base", _MISSING), "name the model that all experts were tuned from")
        quant = self.quant(table.get("quant", DEFAULT_QUANT))
        experts = self.experts(table.get("experts", _MISSING), quant)
        router = self.router(table.get("router", RouterMode.GATELESS), table.get("always_on"), experts)
        if "round_types" in table and (rounding := self.choice("round_types", table["round_types"], Rounding)):
            experts = rounded(experts, router, rounding)
        mixed = self.choice("mix", table.get("mix", Mixed.FFN), Mixed) or Mixed.FFN
        layers = self.layers(table["layers"]) if "layers" in table else None
        compact = self.compact(table["compact"], mixed, router, experts) if "compact" in table else None
        must_be_dense = mixed.fine_grained or layers is not None or compact is not None
        layout = self.layout(table.get("layout"), router, experts, must_be_dense=must_be_dense)
        split = self.split(table, router, experts, must_be_dense=must_be_dense)
        if split is not Splitting.NONE:
            quant, layout = replace(quant, split=split), Layout.FUSED
        trunk = self.trunk(table.get("trunk", TRUNK_OF_BASE), experts)
        domains = self.domains(table.get("domains", {}), experts)
        output = self.text("output", table.get("output", f"{name}-{quant.label}.gguf"), "name a .gguf file")
        texts = {
            key: self.text(key, table.get(key, ""), "write a string", empty=True)
            for key in ("imatrix", "description", "license")
        }
        if output and not output.endswith(".gguf"):
            self.fault("output", output, "a name that ends in .gguf", "Ollama and LM Studio look for that ending")
        if self.faults:
            raise UserError.of(self.faults)
        path = Path(os.path.expanduser(output))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
        return Recipe(
            name, base, experts, router, layout, quant, path, folder, mixed, trunk, layers, domains, compact, **texts
        )

    def known_keys(self, prefix: str, table: Mapping[str, object], keys: tuple[str, ...]) -> None:
        for key in table:
            if key not in keys:
                self.fault(f"{prefix}{key}", table[key], f"only the keys {', '.join(keys)}", "remove or rename it")

    def text(self, key: str, value: object, mend: str, *, empty: bool = False) -> str:
        if isinstance(value, str) and (value.strip() or empty) and "\0" not in value:
            return value
        self.fault(key, value, "a string" if empty else "a non-empty string", mend)
        return ""

    def number(self, key: str, value: object, *, integer: bool, low: float, high: float, mend: str):
        kinds = (int,) if integer else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.fault(key, value, f"{'an integer' if integer else 'a number'} from {low} to {high}", mend)
        return low

    def choice(self, key: str, value: object, kind: type[StrEnum], extra: tuple[str, ...] = ()):
        allowed = (*kind, *extra)
        if value in allowed:
            return value if value in extra else kind(value)
        self.fault(key, value, ", ".join(allowed), "pick one of these")
        return None

    def experts(self, value: object, quant: QuantSpec) -> tuple[ExpertSpec, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.fault("experts", value, "a list of { name = …, source = … }, at least one", "list the fine-tunes")
            return ()
        weights = self.weights(value)
        names: set[str] = set()
        specs = []
        for i, (item, weight) in enumerate(zip(value, weights, strict=True)):
            key = f"experts[{i}]."
            self.known_keys(key, item, ("name", "source", "weight", "quant", "imatrix", *_PROMPTS))
            name = self.text(f"{key}name", item.get("name", _MISSING), "give every expert a short name")
            if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                self.fault(f"{key}name", name, "letters, digits, '.', '_' and '-'", "rename it")
            if name and name in names:
                self.fault(f"{key}name", name, "a name that no other expert has", "rename one of them")
            names.add(name)
            source = self.text(f"{key}source", item.get("source", _MISSING), "say where its weights are")
            expert_quant = self.preset(f"{key}quant", item["quant"]) if "quant" in item else quant.preset
            prompts = (self.texts(f"{key}{side}", item.get(side, []), "write a list of prompts") for side in _PROMPTS)
            imatrix = self.text(f"{key}imatrix", item.get("imatrix", ""), "write a string", empty=True)
            specs.append(ExpertSpec(name, source, weight, expert_quant, *prompts, imatrix=imatrix))
        return tuple(specs)

    def texts(self, key: str, value: object, mend: str) -> tuple[str, ...]:
        """A list of strings; a single one may stand alone."""
        items = value if isinstance(value, list) else [value]
        return tuple(self.text(key, item, mend) for item in items)

    def domains(self, value: object, experts: tuple[ExpertSpec, ...]) -> dict[str, tuple[str, ...]]:
        if not isinstance(value, dict):
            self.fault("domains", value, "a table of EXPERT = text file or files", 'write { math = "math.txt", … }')
            return {}
        names = [expert.name for expert in experts]
        for name in value:
            if names and name not in names:
                self.fault(f"domains.{name}", value[name], f"a key for an expert: {', '.join(names)}", "rename it")
        return {name: self.texts(f"domains.{name}", refs, "name a text file") for name, refs in value.items()}

    def trunk(self, value: object, experts: tuple[ExpertSpec, ...]) -> str:
        allowed = [TRUNK_OF_BASE, TRUNK_OF_MEAN, *(e.name for e in experts if e.name not in _TRUNKS)]
        if value in allowed:
            return str(value)
        self.fault("trunk", value, ", ".join(allowed), "pick one of these")
        return TRUNK_OF_BASE

    def layers(self, value: object) -> tuple[int, ...]:
        """Layer numbers from a list of numbers and ranges such as "4-7"."""
        items = value if isinstance(value, list) else [value]
        layers: set[int] = set()
        for item in items:
            match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(item)) if type(item) in (int, str) else None
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                self.fault("layers", item, 'numbers of layers, and ranges such as "4-7"', "mend it, or leave it out")
            layers |= set(range(first, last + 1))
        if not items:
            self.fault("layers", value, "at least one layer", "leave it out to mix all layers")
        return tuple(sorted(layers))

    def compact(
        self, value: object, mixed: Mixed, router: RouterSpec, experts: tuple[ExpertSpec, ...]
    ) -> CompactSpec | None:
        if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"size", "max_kld"}:
            self.fault("compact", value, '{ size = "1.5x" } or { max_kld = 0.001 }', "write one of the two")
            return None
        if not router.is_gateless:
            self.fault("compact", value, "only with router gateless", "a router needs all experts apart: remove it")
        if mixed.fine_grained:
            self.fault("compact", value, f"only with mix = ffn or ffn+attention, not {mixed}", "it is of one model's"
                       " size already: remove it")  # fmt: skip
        if "max_kld" in value:
            mend = "0.001 nats is about what Q4_K_M costs"
            return CompactSpec(
                max_kld=self.number("compact.max_kld", value["max_kld"], integer=False, low=1e-9, high=10, mend=mend)
            )
        return CompactSpec(size=self.size(value["size"], max(1, len(experts))))

    def size(self, value: object, n: int) -> float:
        match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,9})?)x?", str(value))
        if match and not isinstance(value, bool) and 1 <= float(match[1]) <= n:
            return float(match[1])
        self.fault("compact.size", value, f"1x to {n}x", "1x is the size of one model, more is closer to the mix")
        return float(n)

    def weights(self, experts: list[dict]) -> list[float]:
        if not any("weight" in item for item in experts):
            return [1 / len(experts)] * len(experts)
        mend = "give every expert a weight, all adding up to 1, or none of them"
        n_faults = len(self.faults)
        numbers = [
            float(self.number(f"experts[{i}].weight", item.get("weight", _MISSING), integer=False, low=MIN_WEIGHT,
                              high=1, mend=mend))
            for i, item in enumerate(experts)
        ]  # fmt: skip
        if len(self.faults) == n_faults and abs(sum(numbers) - 1) > WEIGHT_TOLERANCE:
            self.fault("experts.weight", numbers, f"weights that add up to 1 (these add up to {sum(numbers):g})", mend)
        return numbers

    def router(self, value: object, always_on: object, experts: tuple[ExpertSpec, ...]) -> RouterSpec:
        table = value if isinstance(value, dict) else self.router_table(value)
        if "file" in table:
            spec = self.router_of_file(table, experts)
        else:
            mode = self.choice("router.mode" if value is table else "router", table.get("mode", _MISSING), RouterMode)
            spec = self.router_of_mode(mode, table, experts) if mode and experts else None
        if spec is None:
            return RouterSpec(RouterMode.GATELESS, 1)
        if always_on is not None:
            self.always_on(always_on, spec, experts)
        if spec.mode is not RouterMode.GATELESS and len({expert.weight for expert in experts}) > 1:
            weights = [expert.weight for expert in experts]
            self.fault("experts.weight", weights, "only with router gateless", "remove the weights: a router decides")
        return replace(spec, always_on=always_on if isinstance(always_on, str) else None)

    @staticmethod
    def router_table(value: object) -> dict[str, object]:
        return {"file": value} if isinstance(value, str) and value.endswith(".safetensors") else {"mode": value}

    def router_of_file(self, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]) -> RouterSpec:
        self.known_keys("router.", table, _FILE_KEYS)
        file = self.text("router.file", table["file"], "name the file that `moegguf route fit` or `train` wrote")
        return RouterSpec(RouterMode.TRAINED, self.k(table, experts) if "k" in table else 0, file=file)

    def router_of_mode(
        self, mode: RouterMode, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]
    ) -> RouterSpec | None:
        if mode is RouterMode.TRAINED:
            self.fault("router.mode", mode, "a trained router as { file = … }", "train one with `moegguf train`")
            return None
        own, all_keys = _ROUTER_KEYS[mode], dict.fromkeys(key for keys in _ROUTER_KEYS.values() for key in keys)
        for key in table:
            if modes := [other for other, keys in _ROUTER_KEYS.items() if key in keys and key not in own]:
                self.fault(f"router.{key}", table[key], f"only with mode {' or '.join(modes)}", "remove it")
        self.known_keys("router.", {key: table[key] for key in table if key not in all_keys}, ("mode", *own))
        if mode is RouterMode.GATELESS:
            return RouterSpec(mode, len(experts))
        table = {key: table[key] for key in own if key in table}
        return RouterSpec(
            mode, self.k(table, experts), self.std(table), self.seed(table), shared=self.shared(table),
            fit=self.fit(table),
        )  # fmt: skip

    def k(self, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]) -> int:
        n = len(experts) or 1
        mend = f"there are {n} experts"
        return self.number("router.k", table.get("k", min(2, n)), integer=True, low=1, high=n, mend=mend)

    def std(self, table: Mapping[str, object]) -> float:
        value, mend = table.get("std", RouterSpec.std), "the paper's noise is small"
        return float(self.number("router.std", value, integer=False, low=1e-6, high=10, mend=mend))

    def seed(self, table: Mapping[str, object]) -> int:
        value = table.get("seed", RouterSpec.seed)
        return self.number("router.seed", value, integer=True, low=0, high=2**32 - 1, mend="pick another seed")

    def shared(self, table: Mapping[str, object]) -> bool:
        value = table.get("shared", False)
        if not isinstance(value, bool):
            self.fault("router.shared", value, "true or false", "true is one router for all layers")
        return value is True

    def fit(self, table: Mapping[str, object]) -> FitSpec:
        default = FitSpec()
        weight, temperature = (
            float(self.number(f"router.{key}", table.get(key, value), integer=False, low=low, high=1e6, mend=mend))
            for key, value, low, mend in (
                ("lambda", default.ridge_lambda, 0, "the usual value is 0.01"),
                ("temperature", default.temperature, 1e-3, "the usual value is 0.1; smaller is sharper"),
            )
        )
        tap = self.choice("router.tap", table.get("tap", default.tap), Tap) or default.tap
        pool = self.choice("router.pool", table.get("pool", default.pool), Pool) or default.pool
        return FitSpec(weight, temperature, tap, pool)

    def always_on(self, name: object, spec: RouterSpec, experts: tuple[ExpertSpec, ...]) -> None:
        names = [expert.name for expert in experts]
        if spec.mode is RouterMode.GATELESS:
            self.fault("always_on", name, "only a router that picks k experts", "a gate-less mix runs them all")
        elif name not in names:
            self.fault("always_on", name, ", ".join(names), "name one of the experts")
        elif 0 < spec.k < 2:
            self.fault("router.k", spec.k, "at least 2 with always_on", "the always-on expert counts as one of the k")

    def layout(
        self, value: object, router: RouterSpec, experts: tuple[ExpertSpec, ...], *, must_be_dense: bool
    ) -> Layout:
        asked = None if value is None else self.choice("layout", value, Layout, extra=("auto",))
        quants = list(dict.fromkeys(expert.quant for expert in experts))
        gateless = router.mode is RouterMode.GATELESS
        if gateless and must_be_dense:
            return self.dense_layout(asked, quants)
        if len(quants) > 2 or (len(quants) == 2 and not self.one_group_per_quant(router, experts)):
            allowed = (
                "one for all experts"
                if not gateless and not router.always_on
                else ("two different ones" if gateless else "one for the always-on expert and one for all others")
            )
            mend = "a layer holds at most two precisions: raise or lower some, or pass --round-types up or down"
            self.fault("experts.quant", quants, allowed, mend)
        if asked is None:
            return Layout.SHARED if len(quants) > 1 or router.always_on else Layout.MIXTRAL
        if asked == "auto":
            fastest = Layout.FUSED if gateless else Layout.MIXTRAL
            return Layout.SHARED if len(quants) > 1 or router.always_on else fastest
        if asked is Layout.FUSED and not gateless:
            self.fault("layout", asked, "mixtral with a router", "fused holds the mean of all experts: no router fits")
        if asked is not Layout.SHARED and len(quants) > 1:
            self.fault("layout", asked, "shared with two precisions", "drop the layout, or give all experts one quant")
        if asked is not Layout.SHARED and router.always_on:
            self.fault("layout", asked, "shared with always_on", "drop the layout")
        if asked is Layout.SHARED and not gateless and not router.always_on:
            self.fault("layout", asked, "mixtral with a router and no always_on", "name an always_on expert")
        return asked

    def split(
        self, table: Mapping[str, object], router: RouterSpec, experts: tuple[ExpertSpec, ...], *, must_be_dense: bool
    ) -> Splitting:
        quant, layout = table.get("quant"), table.get("layout")
        quant = quant if isinstance(quant, dict) else {}
        is_asked = "split" in quant
        asked = self.choice("quant.split", quant["split"], Splitting) if is_asked else Splitting.AUTO
        if asked in (None, Splitting.NONE) or not (is_asked or layout == "auto"):
            return Splitting.NONE
        needs = {
            "router gateless": not router.is_gateless,
            "a mix of whole FFNs in all layers that is not compact": must_be_dense,
            "one quant for all experts": len({expert.quant for expert in experts}) > 1,
            "a budget": not set(_BUDGETS) & set(quant),
            "layout shared or auto": layout in (Layout.MIXTRAL, Layout.FUSED),
            "layout auto": asked is Splitting.AUTO and layout == Layout.SHARED,
        }
        unmet = [f"only with {need}" for need, is_unmet in needs.items() if is_unmet]
        if unmet and is_asked:
            self.fault("quant.split", asked, ", ".join(unmet), f"mend that, or choose split = {str(Splitting.NONE)!r}")
        return Splitting.NONE if unmet else asked

    def dense_layout(self, asked: Layout | str | None, quants: list[str]) -> Layout:
        """The layout of gate-less mixes that only a dense FFN can hold."""
        if asked not in (None, "auto", Layout.FUSED):
            allowed = "fused for a fine-grained mix, one of some layers, or a compact one"
            self.fault("layout", asked, allowed, "drop the layout")
        if len(quants) > 1:
            self.fault("experts.quant", quants, "one for all experts in layout fused", "give all experts one quant")
        return Layout.FUSED

    @staticmethod
    def one_group_per_quant(router: RouterSpec, experts: tuple[ExpertSpec, ...]) -> bool:
        """Whether two precisions fall into the two groups of the shared layout."""
        if router.mode is RouterMode.GATELESS:
            return True
        return len({expert.quant for expert in experts if expert.name != router.always_on}) == 1

    def quant(self, value: object) -> QuantSpec:
        if not isinstance(value, dict):
            return QuantSpec(self.preset("quant", value))
        self.known_keys("quant.", value, ("preset", *_BUDGETS, "plan", *Role, "tensors", "split"))
        if len(targets := sorted(_TARGETS & set(value))) > 1:
            self.fault("quant", " and ".join(targets), "one of preset, budget, bpw and plan", "leave the others out")
        roles = {role: self.type(f"quant.{role}", value[role]) for role in Role if role in value}
        patterns = value.get("tensors", {})
        if not isinstance(patterns, dict):
            self.fault("quant.tensors", patterns, "a table of REGEX = TYPE", "write [mix.NAME.quant.tensors]")
            patterns = {}
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                self.fault("quant.tensors", pattern, f"a regular expression ({error})", "mend the pattern")
        tensors = {pattern: self.type(f"quant.tensors.{pattern}", type) for pattern, type in patterns.items()}
        return QuantSpec(
            self.preset("quant.preset", value.get("preset", DEFAULT_QUANT)), roles, tensors, self.budget(value),
            self.text("quant.plan", value.get("plan", ""), "name the file that --save-plan wrote", empty=True),
        )  # fmt: skip

    def budget(self, table: Mapping[str, object]) -> Budget | None:
        if "bpw" in table:
            mend = "4.25 is about the size of Q4_K_S"
            bpw = self.number("quant.bpw", table["bpw"], integer=False, low=1, high=_MAX_BPW, mend=mend)
            return Budget(f"{bpw:g}bpw", bpw=float(bpw))
        if "budget" not in table:
            return None
        try:
            return Budget("".join(str(table["budget"]).split()), n_bytes=parse_size(str(table["budget"])))
        except UserError as error:
            self.faults.append(UserError(f"{self.where} quant.budget: {error.message}", error.mend))
            return None

    def preset(self, key: str, value: object) -> str:
        try:
            return preset(str(value)).name
        except UserError as error:
            self.faults.append(UserError(f"{self.where} {key}: {error.message}", error.mend))
            return DEFAULT_QUANT

    def type(self, key: str, value: object) -> GGMLQuantizationType:
        try:
            return parse_type(str(value))
        except UserError as error:
            self.faults.append(UserError(f"{self.where} {key}: {error.message}", error.mend))
            return GGMLQuantizationType.F32


def _show(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    return repr(str(value) if isinstance(value, StrEnum) else value)
