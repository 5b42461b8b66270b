"""The types that a recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.quant.presets import parse_type, preset
from moegguf.recipe.specs import DEFAULT_QUANT, Budget, QuantSpec, Role
from moegguf.recipe.values import Reader
from moegguf.sizes import parse_size

BUDGETS = ("budget", "bpw")
TARGETS = frozenset({"preset", "plan", *BUDGETS})
"""Keys that exclude each other."""
_MAX_BPW = 32


def read_quant(read: Reader, value: object) -> QuantSpec:
    if not isinstance(value, dict):
        return QuantSpec(read_preset(read, "quant", value))
    read.known_keys("quant.", value, ("preset", *BUDGETS, "plan", *Role, "tensors", "split"))
    if len(targets := sorted(TARGETS & set(value))) > 1:
        read.fault("quant", " and ".join(targets), "one of preset, budget, bpw and plan", "leave the others out")
    roles = {role: _type(read, f"quant.{role}", value[role]) for role in Role if role in value}
    patterns = value.get("tensors", {})
    if not isinstance(patterns, dict):
        read.fault("quant.tensors", patterns, "a table of REGEX = TYPE", "write [mix.NAME.quant.tensors]")
        patterns = {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            read.fault("quant.tensors", pattern, f"a regular expression ({error})", "mend the pattern")
    tensors = {pattern: _type(read, f"quant.tensors.{pattern}", type) for pattern, type in patterns.items()}
    return QuantSpec(
        read_preset(read, "quant.preset", value.get("preset", DEFAULT_QUANT)), roles, tensors, _budget(read, value),
        read.text("quant.plan", value.get("plan", ""), "name the file that --save-plan wrote", empty=True),
    )  # fmt: skip


def _budget(read: Reader, table: Mapping[str, object]) -> Budget | None:
    if "bpw" in table:
        mend = "4.25 is about the size of Q4_K_S"
        bpw = read.number("quant.bpw", table["bpw"], integer=False, low=1, high=_MAX_BPW, mend=mend)
        return Budget(f"{bpw:g}bpw", bpw=float(bpw))
    if "budget" not in table:
        return None
    try:
        return Budget("".join(str(table["budget"]).split()), n_bytes=parse_size(str(table["budget"])))
    except UserError as error:
        read.faults.append(UserError(f"{read.where} quant.budget: {error.message}", error.mend))
        return None


def read_preset(read: Reader, key: str, value: object) -> str:
    try:
        return preset(str(value)).name
    except UserError as error:
        read.faults.append(UserError(f"{read.where} {key}: {error.message}", error.mend))
        return DEFAULT_QUANT


def _type(read: Reader, key: str, value: object) -> GGMLQuantizationType:
    try:
        return parse_type(str(value))
    except UserError as error:
        read.faults.append(UserError(f"{read.where} {key}: {error.message}", error.mend))
        return GGMLQuantizationType.F32
