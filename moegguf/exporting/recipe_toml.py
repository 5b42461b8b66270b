"""The recipe of a finished mix, as a table of models.toml that builds it again.

Everything but the texts that a router was fitted to, and files that only its maker has: a fitted or trained router is
named as a file, a local source by the last part of its path. Comments say which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from moegguf.errors import UserError, one_line
from moegguf.metadata import Card
from moegguf.quant.presets import preset_names
from moegguf.recipe import TRUNK_OF_BASE, Layout, Mixed, RouterMode
from moegguf.sizes import parse_size

ROUTER_FILE = "router.safetensors"
_REMOTE = re.compile(r"(hf|demo|ollama|lmstudio):\S+")


def recipe_toml(card: Card, description: str = "", licence: str = "") -> str:
    """`[mix.NAME]` and its keys."""
    name = card.name if re.fullmatch(r"[A-Za-z0-9_-]+", card.name) else json.dumps(card.name)
    lines = [f"[mix.{name}]"]
    for key, value in _table(card, description, licence).items():
        lines.append(f"{key} = {_value(value)}")
    lines += ["experts = [", *(f"  {_value(expert)}," for expert in _experts(card)), "]"]
    return "\n".join([*(f"# {one_line(comment)}" for comment in _comments(card)), *lines]) + "\n"


def _table(card: Card, description: str, licence: str) -> dict[str, object]:
    """The keys that differ from their defaults, and those that one wants to see."""
    wanted = {
        "description": description,
        "base": card.base,
        "mix": "" if card.mixed == Mixed.FFN else card.mixed,
        "trunk": "" if card.trunk == TRUNK_OF_BASE else card.trunk,
        "layers": list(card.layers or ()),
        "router": _router(card),
        "always_on": card.always_on,
        "compact": {"size": f"{card.compact.size:.9g}x"} if card.compact else None,
        "layout": Layout(card.layout).value if card.layout in set(Layout) else "",
        "quant": _quant(card.quant),
        "license": licence,
    }
    return {key: value for key, value in wanted.items() if value}


def _router(card: Card) -> str | dict[str, object]:
    if card.is_gateless:
        return str(RouterMode.GATELESS)
    if card.router != RouterMode.NOISY:
        return ROUTER_FILE
    table = {"mode": card.router, "k": card.k, "std": float(f"{card.std or 0:.6g}"), "seed": card.seed}
    return table | ({"shared": True} if card.shared else {})


def _quant(label: str) -> str | dict[str, object]:
    """What a recipe says for what a file says of itself: a preset, a budget in bits or bytes, or the name of a plan."""
    if label in preset_names():
        return label
    if match := re.fullmatch(r"([\d.]+)bpw", label):
        return {"bpw": float(match[1])}
    try:
        parse_size(label)
    except UserError:
        return {"plan": f"{label}.json"}
    return {"budget": label}


def _experts(card: Card) -> Iterator[dict[str, object]]:
    is_weighted = card.is_gateless and len({expert.weight for expert in card.experts}) > 1
    for expert in card.experts:
        table: dict[str, object] = {"name": expert.name, "source": expert.source}
        if is_weighted:
            table["weight"] = float(f"{expert.weight:.9g}")
        if expert.quant != card.quant and expert.quant in preset_names():
            table["quant"] = expert.quant
        yield table


def _comments(card: Card) -> Iterator[str]:
    if local := [source for source in card.licences if not _is_remote(source)]:
        yield f"{', '.join(map(json.dumps, local))}: files of the maker's disk; give paths of your own"
    if not card.is_gateless and card.router != RouterMode.NOISY:
        how = ", ".join(f"{key} {value}" for key, value in card.settings.items())
        yield f"{ROUTER_FILE}: the {card.router} router of this mix" + (f" ({how})" if how else "")


def _is_remote(source: str) -> bool:
    """Whether a source, and what an adapter goes over, means the same to everybody."""
    return all(_REMOTE.fullmatch(part) for part in source.removeprefix("lora:").split("::"))


def _value(value: object) -> str:
    """A value of TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character of JSON's that it lacks
