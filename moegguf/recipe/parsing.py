"""One table → one `Recipe`, or every fault of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moegguf.errors import UserError
from moegguf.recipe.experts import read_domains, read_experts, rounded
from moegguf.recipe.layout import choose_layout, choose_split
from moegguf.recipe.quant import read_quant
from moegguf.recipe.router import read_router
from moegguf.recipe.specs import (
    DEFAULT_QUANT,
    TRUNK_OF_BASE,
    TRUNK_OF_MEAN,
    CompactSpec,
    ExpertSpec,
    Layout,
    Mixed,
    Recipe,
    Rounding,
    RouterMode,
    RouterSpec,
    Splitting,
)
from moegguf.recipe.values import MISSING, Reader

_KEYS = (
    "base", "trunk", "experts", "mix", "layers", "router", "domains", "compact", "always_on", "layout", "quant",
    "round_types", "imatrix", "output", "description", "license",
)  # fmt: skip
_TRUNKS = (TRUNK_OF_BASE, TRUNK_OF_MEAN)


def parse_recipe(name: str, table: Mapping[str, object], *, where: str, folder: Path) -> Recipe:
    """Check one recipe table and freeze it. Raises one UserError that reports every fault of it.

    `where` begins the faults; `folder` is what paths are relative to.
    """
    read = Reader(where)
    read.known_keys("", table, _KEYS)
    base = read.text("base", table.get("base", MISSING), "name the model that all experts were tuned from")
    quant = read_quant(read, table.get("quant", DEFAULT_QUANT))
    experts = read_experts(read, table.get("experts", MISSING), quant)
    router = read_router(read, table.get("router", RouterMode.GATELESS), table.get("always_on"), experts)
    if "round_types" in table and (rounding := read.choice("round_types", table["round_types"], Rounding)):
        experts = rounded(experts, router, rounding)
    mixed = read.choice("mix", table.get("mix", Mixed.FFN), Mixed) or Mixed.FFN
    layers = _layers(read, table["layers"]) if "layers" in table else None
    compact = _compact(read, table["compact"], mixed, router, experts) if "compact" in table else None
    must_be_dense = mixed.fine_grained or layers is not None or compact is not None
    layout = choose_layout(read, table.get("layout"), router, experts, must_be_dense=must_be_dense)
    split = choose_split(read, table, router, experts, must_be_dense=must_be_dense)
    if split is not Splitting.NONE:
        quant, layout = replace(quant, split=split), Layout.FUSED
    trunk = _trunk(read, table.get("trunk", TRUNK_OF_BASE), experts)
    domains = read_domains(read, table.get("domains", {}), experts)
    output = read.text("output", table.get("output", f"{name}-{quant.label}.gguf"), "name a .gguf file")
    texts = {
        key: read.text(key, table.get(key, ""), "write a string", empty=True)
        for key in ("imatrix", "description", "license")
    }
    if output and not output.endswith(".gguf"):
        read.fault("output", output, "a name that ends in .gguf", "Ollama and LM Studio look for that ending")
    if read.faults:
        raise UserError.of(read.faults)
    path = Path(os.path.expanduser(output))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    return Recipe(
        name, base, experts, router, layout, quant, path, folder, mixed, trunk, layers, domains, compact, **texts
    )


def _trunk(read: Reader, value: object, experts: tuple[ExpertSpec, ...]) -> str:
    allowed = [TRUNK_OF_BASE, TRUNK_OF_MEAN, *(e.name for e in experts if e.name not in _TRUNKS)]
    if value in allowed:
        return str(value)
    read.fault("trunk", value, ", ".join(allowed), "pick one of these")
    return TRUNK_OF_BASE


def _layers(read: Reader, value: object) -> tuple[int, ...]:
    """Layer numbers from a list of numbers and ranges such as "4-7"."""
    items = value if isinstance(value, list) else [value]
    layers: set[int] = set()
    for item in items:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(item)) if type(item) in (int, str) else None
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            read.fault("layers", item, 'numbers of layers, and ranges such as "4-7"', "mend it, or leave it out")
        layers |= set(range(first, last + 1))
    if not items:
        read.fault("layers", value, "at least one layer", "leave it out to mix all layers")
    return tuple(sorted(layers))


def _compact(
    read: Reader, value: object, mixed: Mixed, router: RouterSpec, experts: tuple[ExpertSpec, ...]
) -> CompactSpec | None:
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"size", "max_kld"}:
        read.fault("compact", value, '{ size = "1.5x" } or { max_kld = 0.001 }', "write one of the two")
        return None
    if not router.is_gateless:
        read.fault("compact", value, "only with router gateless", "a router needs all experts apart: remove it")
    if mixed.fine_grained:
        read.fault("compact", value, f"only with mix = ffn or ffn+attention, not {mixed}", "it is of one model's"
                   " size already: remove it")  # fmt: skip
    if "max_kld" in value:
        mend = "0.001 nats is about what Q4_K_M costs"
        return CompactSpec(
            max_kld=read.number("compact.max_kld", value["max_kld"], integer=False, low=1e-9, high=10, mend=mend)
        )
    return CompactSpec(size=_size(read, value["size"], max(1, len(experts))))


def _size(read: Reader, value: object, n: int) -> float:
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,9})?)x?", str(value))
    if match and not isinstance(value, bool) and 1 <= float(match[1]) <= n:
        return float(match[1])
    read.fault("compact.size", value, f"1x to {n}x", "1x is the size of one model, more is closer to the mix")
    return float(n)
