"""The router of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moegguf.recipe.specs import ExpertSpec, FitSpec, Pool, RouterMode, RouterSpec, Tap
from moegguf.recipe.values import MISSING, Reader

_ROUTER_KEYS = {
    RouterMode.GATELESS: (),
    RouterMode.NOISY: ("k", "std", "seed", "shared"),
    RouterMode.HIDDEN: ("k", "shared", "tap", "pool"),
    RouterMode.RIDGE: ("k", "shared", "lambda", "temperature"),
}
"""What else the table of a router of each mode may say. A trained router is a file."""
_FILE_KEYS = ("file", "k")


def read_router(read: Reader, value: object, always_on: object, experts: tuple[ExpertSpec, ...]) -> RouterSpec:
    table = value if isinstance(value, dict) else router_table(value)
    if "file" in table:
        spec = _of_file(read, table, experts)
    else:
        mode = read.choice("router.mode" if value is table else "router", table.get("mode", MISSING), RouterMode)
        spec = _of_mode(read, mode, table, experts) if mode and experts else None
    if spec is None:
        return RouterSpec(RouterMode.GATELESS, 1)
    if always_on is not None:
        _check_always_on(read, always_on, spec, experts)
    if spec.mode is not RouterMode.GATELESS and len({expert.weight for expert in experts}) > 1:
        weights = [expert.weight for expert in experts]
        read.fault("experts.weight", weights, "only with router gateless", "remove the weights: a router decides")
    return replace(spec, always_on=always_on if isinstance(always_on, str) else None)


def router_table(value: object) -> dict[str, object]:
    return {"file": value} if isinstance(value, str) and value.endswith(".safetensors") else {"mode": value}


def _of_file(read: Reader, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]) -> RouterSpec:
    read.known_keys("router.", table, _FILE_KEYS)
    file = read.text("router.file", table["file"], "name the file that `moegguf route fit` or `train` wrote")
    return RouterSpec(RouterMode.TRAINED, _k(read, table, experts) if "k" in table else 0, file=file)


def _of_mode(
    read: Reader, mode: RouterMode, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]
) -> RouterSpec | None:
    if mode is RouterMode.TRAINED:
        read.fault("router.mode", mode, "a trained router as { file = … }", "train one with `moegguf train`")
        return None
    own, all_keys = _ROUTER_KEYS[mode], dict.fromkeys(key for keys in _ROUTER_KEYS.values() for key in keys)
    for key in table:
        if modes := [other for other, keys in _ROUTER_KEYS.items() if key in keys and key not in own]:
            read.fault(f"router.{key}", table[key], f"only with mode {' or '.join(modes)}", "remove it")
    read.known_keys("router.", {key: table[key] for key in table if key not in all_keys}, ("mode", *own))
    if mode is RouterMode.GATELESS:
        return RouterSpec(mode, len(experts))
    table = {key: table[key] for key in own if key in table}
    return RouterSpec(
        mode, _k(read, table, experts), _std(read, table), _seed(read, table), shared=_shared(read, table),
        fit=_fit(read, table),
    )  # fmt: skip


def _k(read: Reader, table: Mapping[str, object], experts: tuple[ExpertSpec, ...]) -> int:
    n = len(experts) or 1
    mend = f"there are {n} experts"
    return read.number("router.k", table.get("k", min(2, n)), integer=True, low=1, high=n, mend=mend)


def _std(read: Reader, table: Mapping[str, object]) -> float:
    value, mend = table.get("std", RouterSpec.std), "the paper's noise is small"
    return float(read.number("router.std", value, integer=False, low=1e-6, high=10, mend=mend))


def _seed(read: Reader, table: Mapping[str, object]) -> int:
    value = table.get("seed", RouterSpec.seed)
    return read.number("router.seed", value, integer=True, low=0, high=2**32 - 1, mend="pick another seed")


def _shared(read: Reader, table: Mapping[str, object]) -> bool:
    value = table.get("shared", False)
    if not isinstance(value, bool):
        read.fault("router.shared", value, "true or false", "true is one router for all layers")
    return value is True


def _fit(read: Reader, table: Mapping[str, object]) -> FitSpec:
    default = FitSpec()
    weight, temperature = (
        float(read.number(f"router.{key}", table.get(key, value), integer=False, low=low, high=1e6, mend=mend))
        for key, value, low, mend in (
            ("lambda", default.ridge_lambda, 0, "the usual value is 0.01"),
            ("temperature", default.temperature, 1e-3, "the usual value is 0.1; smaller is sharper"),
        )
    )
    tap = read.choice("router.tap", table.get("tap", default.tap), Tap) or default.tap
    pool = read.choice("router.pool", table.get("pool", default.pool), Pool) or default.pool
    return FitSpec(weight, temperature, tap, pool)


def _check_always_on(read: Reader, name: object, spec: RouterSpec, experts: tuple[ExpertSpec, ...]) -> None:
    names = [expert.name for expert in experts]
    if spec.mode is RouterMode.GATELESS:
        read.fault("always_on", name, "only a router that picks k experts", "a gate-less mix runs them all")
    elif name not in names:
        read.fault("always_on", name, ", ".join(names), "name one of the experts")
    elif 0 < spec.k < 2:
        read.fault("router.k", spec.k, "at least 2 with always_on", "the always-on expert counts as one of the k")
