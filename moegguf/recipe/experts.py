"""The experts of a recipe, their weights, and the texts of their domains."""

from __future__ import annotations

import re
from dataclasses import replace

from moegguf.quant.presets import preset_names
from moegguf.recipe.quant import read_preset
from moegguf.recipe.specs import ExpertSpec, QuantSpec, Rounding, RouterSpec
from moegguf.recipe.values import MISSING, Reader

WEIGHT_TOLERANCE = 1e-6
MIN_WEIGHT = 1e-6
"""An expert of no weight at all would be stored for nothing."""
_PROMPTS = ("positive_prompts", "negative_prompts")


def read_experts(read: Reader, value: object, quant: QuantSpec) -> tuple[ExpertSpec, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        read.fault("experts", value, "a list of { name = …, source = … }, at least one", "list the fine-tunes")
        return ()
    weights = _weights(read, value)
    names: set[str] = set()
    specs = []
    for i, (item, weight) in enumerate(zip(value, weights, strict=True)):
        key = f"experts[{i}]."
        read.known_keys(key, item, ("name", "source", "weight", "quant", "imatrix", *_PROMPTS))
        name = read.text(f"{key}name", item.get("name", MISSING), "give every expert a short name")
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            read.fault(f"{key}name", name, "letters, digits, '.', '_' and '-'", "rename it")
        if name and name in names:
            read.fault(f"{key}name", name, "a name that no other expert has", "rename one of them")
        names.add(name)
        source = read.text(f"{key}source", item.get("source", MISSING), "say where its weights are")
        expert_quant = read_preset(read, f"{key}quant", item["quant"]) if "quant" in item else quant.preset
        prompts = (read.texts(f"{key}{side}", item.get(side, []), "write a list of prompts") for side in _PROMPTS)
        imatrix = read.text(f"{key}imatrix", item.get("imatrix", ""), "write a string", empty=True)
        specs.append(ExpertSpec(name, source, weight, expert_quant, *prompts, imatrix=imatrix))
    return tuple(specs)


def _weights(read: Reader, experts: list[dict]) -> list[float]:
    if not any("weight" in item for item in experts):
        return [1 / len(experts)] * len(experts)
    mend = "give every expert a weight, all adding up to 1, or none of them"
    n_faults = len(read.faults)
    numbers = [
        float(read.number(f"experts[{i}].weight", item.get("weight", MISSING), integer=False, low=MIN_WEIGHT,
                          high=1, mend=mend))
        for i, item in enumerate(experts)
    ]  # fmt: skip
    if len(read.faults) == n_faults and abs(sum(numbers) - 1) > WEIGHT_TOLERANCE:
        read.fault("experts.weight", numbers, f"weights that add up to 1 (these add up to {sum(numbers):g})", mend)
    return numbers


def read_domains(read: Reader, value: object, experts: tuple[ExpertSpec, ...]) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        read.fault("domains", value, "a table of EXPERT = text file or files", 'write { math = "math.txt", … }')
        return {}
    names = [expert.name for expert in experts]
    for name in value:
        if names and name not in names:
            read.fault(f"domains.{name}", value[name], f"a key for an expert: {', '.join(names)}", "rename it")
    return {name: read.texts(f"domains.{name}", refs, "name a text file") for name, refs in value.items()}


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
