"""models.toml → a frozen `Recipe`. Everything that can be checked without opening a model is checked here.

    [mix.NAME]
    base = "hf:org/model"                         # gives everything but the experts' FFNs
    experts = [{ name = "math", source = "hf:org/math-model", weight = 0.5, quant = "Q6_K" }, ...]
    router = "gateless"                           # or { mode = "noisy", k = 2, std = 0.02, seed = 0 }
    always_on = "math"                            # noisy only: this expert runs for every token
    layout = "mixtral"                            # or fused, shared, auto
    quant = "Q4_K_M"                              # or { preset = "Q4_K_M", attn = "Q8_0", tensors = { REGEX = "F16" } }
    imatrix = "imatrix.gguf"                      # importance matrix of llama-imatrix, for very low bits
    output = "mix.gguf"

The command line makes the same table from its flags and goes through the same checks, so a flag, a key and
their errors cannot drift apart. All faults are collected and reported at once.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.quant.presets import parse_type, preset

DEFAULT_QUANT = "Q4_K_M"
WEIGHT_TOLERANCE = 1e-6
MIN_WEIGHT = 1e-6
"""An expert of no weight at all would be stored for nothing."""


class RouterMode(StrEnum):
    """How the experts of a layer are combined. Source: METHODS of the paper, arXiv 2408.17280."""

    GATELESS = "gateless"
    NOISY = "noisy"


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


@dataclass(frozen=True)
class RouterSpec:
    """`k` experts run for every token; `std` and `seed` make the white noise of a noisy router."""

    mode: RouterMode
    k: int
    std: float = 0.02
    seed: int = 0
    always_on: str | None = None


@dataclass(frozen=True)
class QuantSpec:
    """A preset of llama.cpp, and what overrides it: types by role, and by regular expression on tensor names."""

    preset: str
    roles: Mapping[Role, GGMLQuantizationType] = field(default_factory=dict)
    tensors: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)


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
    for key, short in (("router", "mode"), ("quant", "preset")):
        for each in (old, new):
            if key in each and not isinstance(each[key], dict):
                each[key] = {short: each[key]}
    if "router" in old and "mode" in new.get("router", {}) and old["router"].get("mode") != new["router"]["mode"]:
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


_MISSING = object()
_NOISE = ("k", "std", "seed")
"""Keys of a noisy router."""


class _Checker:
    """Reads values out of a recipe table and collects what is wrong with them instead of stopping."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.faults: list[UserError] = []

    def fault(self, key: str, found: object, allowed: str, mend: str) -> None:
        self.faults.append(UserError(f"{self.where} {key}: found {_show(found)}, allowed {allowed}", mend))

    def recipe(self, name: str, table: Mapping[str, object], folder: Path) -> Recipe:
        keys = (
            "base",
            "experts",
            "router",
            "always_on",
            "layout",
            "quant",
            "imatrix",
            "output",
            "description",
            "license",
        )
        self.known_keys("", table, keys)
        base = self.text("base", table.get("base", _MISSING), "name the model that all experts were tuned from")
        quant = self.quant(table.get("quant", DEFAULT_QUANT))
        experts = self.experts(table.get("experts", _MISSING), quant)
        router = self.router(table.get("router", RouterMode.GATELESS), table.get("always_on"), experts)
        layout = self.layout(table.get("layout"), router, experts)
        output = self.text("output", table.get("output", f"{name}-{quant.preset}.gguf"), "name a .gguf file")
        texts = {
            key: self.text(key, table.get(key, ""), "write a string", empty=True)
            for key in ("imatrix", "description", "license")
        }
        if output and not output.endswith(".gguf"):
            self.fault("output", output, "a name that ends in .gguf", "Ollama and LM Studio look for that ending")
        if self.faults:
            raise UserError.of(self.faults)
        path = Path(os.path.expanduser(output))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
        return Recipe(name, base, experts, router, layout, quant, path, folder, **texts)

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
            self.known_keys(key, item, ("name", "source", "weight", "quant"))
            name = self.text(f"{key}name", item.get("name", _MISSING), "give every expert a short name")
            if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                self.fault(f"{key}name", name, "letters, digits, '.', '_' and '-'", "rename it")
            if name and name in names:
                self.fault(f"{key}name", name, "a name that no other expert has", "rename one of them")
            names.add(name)
            source = self.text(f"{key}source", item.get("source", _MISSING), "say where its weights are")
            expert_quant = self.preset(f"{key}quant", item["quant"]) if "quant" in item else quant.preset
            specs.append(ExpertSpec(name, source, weight, expert_quant))
        return tuple(specs)

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
        table = value if isinstance(value, dict) else {"mode": value}
        key = "router.mode" if isinstance(value, dict) else "router"
        mode = self.choice(key, table.get("mode", _MISSING), RouterMode)
        if mode is None or not experts:
            return RouterSpec(RouterMode.GATELESS, 1)
        n = len(experts)
        if mode is RouterMode.GATELESS:
            self.known_keys("router.", table, ("mode", *_NOISE))
            for key in filter(table.__contains__, _NOISE):
                self.fault(f"router.{key}", table[key], "only with mode noisy", "remove it, or choose mode noisy")
            if always_on is not None:
                self.fault(
                    "always_on", always_on, "only a router that picks k experts", "a gate-less mix runs them all"
                )
            return RouterSpec(mode, n)
        self.known_keys("router.", table, ("mode", *_NOISE))
        if len({expert.weight for expert in experts}) > 1:
            weights = [expert.weight for expert in experts]
            self.fault("experts.weight", weights, "only with router gateless", "remove the weights: a router decides")
        k = self.number(
            "router.k", table.get("k", min(2, n)), integer=True, low=1, high=n, mend=f"there are {n} experts"
        )
        std = self.number(
            "router.std", table.get("std", 0.02), integer=False, low=1e-6, high=10, mend="the paper's noise is small"
        )
        seed = self.number(
            "router.seed", table.get("seed", 0), integer=True, low=0, high=2**32 - 1, mend="pick another seed"
        )
        if always_on is not None:
            names = [expert.name for expert in experts]
            if always_on not in names:
                self.fault("always_on", always_on, ", ".join(names), "name one of the experts")
            elif k < 2:
                self.fault("router.k", k, "at least 2 with always_on", "the always-on expert counts as one of the k")
        return RouterSpec(mode, k, float(std), seed, always_on if isinstance(always_on, str) else None)

    def layout(self, value: object, router: RouterSpec, experts: tuple[ExpertSpec, ...]) -> Layout:
        asked = None if value is None else self.choice("layout", value, Layout, extra=("auto",))
        quants = list(dict.fromkeys(expert.quant for expert in experts))
        gateless = router.mode is RouterMode.GATELESS
        if len(quants) > 2 or (len(quants) == 2 and not self.one_group_per_quant(router, experts)):
            allowed = (
                "one for all experts"
                if not gateless and not router.always_on
                else ("two different ones" if gateless else "one for the always-on expert and one for all others")
            )
            self.fault("experts.quant", quants, allowed, "a layer holds at most two precisions: raise or lower some")
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

    @staticmethod
    def one_group_per_quant(router: RouterSpec, experts: tuple[ExpertSpec, ...]) -> bool:
        """Whether two precisions fall into the two groups of the shared layout."""
        if router.mode is RouterMode.GATELESS:
            return True
        return len({expert.quant for expert in experts if expert.name != router.always_on}) == 1

    def quant(self, value: object) -> QuantSpec:
        if not isinstance(value, dict):
            return QuantSpec(self.preset("quant", value))
        self.known_keys("quant.", value, ("preset", *Role, "tensors"))
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
        return QuantSpec(self.preset("quant.preset", value.get("preset", DEFAULT_QUANT)), roles, tensors)

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
