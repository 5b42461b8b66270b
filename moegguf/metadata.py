"""The `moegguf.*` keys of a mix: what stock runtimes ignore and `inspect`, `chat` and later edits rely on.

A `Card` is the typed form of those keys; `Card.to_metadata` and `read_card` are each other's inverse. This is
the only file that spells the keys. Build side and runtime side both use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.gguf_header import Header

FORMAT_VERSION = 1
PREFIX = "moegguf."
GATELESS = "gateless"


@dataclass(frozen=True)
class ExpertCard:
    """One expert of a finished mix. `weight` is its share in a gate-less mix, 1/N otherwise."""

    name: str
    source: str
    weight: float
    quant: str


@dataclass(frozen=True)
class Card:
    """What a finished mix says of itself."""

    name: str
    tool_version: str
    layout: str
    router: str
    k: int
    """Experts that run for a token, an always-on one included."""
    base: str
    quant: str
    experts: tuple[ExpertCard, ...]
    std: float | None = None
    seed: int | None = None
    always_on: str | None = None

    @property
    def is_gateless(self) -> bool:
        return self.router == GATELESS

    def to_metadata(self) -> dict[str, GGUFValue]:
        """The keys of this card, typed. Keys of absent values are absent."""
        u32, u64, f32, string = (
            GGUFValueType.UINT32, GGUFValueType.UINT64, GGUFValueType.FLOAT32, GGUFValueType.STRING,
        )  # fmt: skip

        def array(values: list, type: GGUFValueType) -> GGUFValue:
            return GGUFValue(values, GGUFValueType.ARRAY, type)

        values = {
            "format_version": GGUFValue(FORMAT_VERSION, u32),
            "version": GGUFValue(self.tool_version, string),
            "name": GGUFValue(self.name, string),
            "layout": GGUFValue(self.layout, string),
            "router": GGUFValue(self.router, string),
            "router.k": GGUFValue(self.k, u32),
            "router.std": None if self.std is None else GGUFValue(self.std, f32),
            "router.seed": None if self.seed is None else GGUFValue(self.seed, u64),
            "always_on": None if self.always_on is None else GGUFValue(self.always_on, string),
            "base": GGUFValue(self.base, string),
            "quant": GGUFValue(self.quant, string),
            "expert.names": array([expert.name for expert in self.experts], string),
            "expert.sources": array([expert.source for expert in self.experts], string),
            "expert.weights": array([expert.weight for expert in self.experts], f32),
            "expert.quants": array([expert.quant for expert in self.experts], string),
        }
        return {PREFIX + key: value for key, value in values.items() if value is not None}


def read_card(header: Header) -> Card | None:
    """The card of a GGUF file, or None when it is no mix of ours. Raises UserError for damaged or newer keys."""
    if PREFIX + "format_version" not in header.fields:
        return None

    def get(key: str, default=None):
        value = header.get(PREFIX + key, default)
        if value is None:
            raise UserError(f"{header.path}: the key {PREFIX}{key} is missing", "build the mix again")
        return value

    version = get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{header.path}: mix format {version}, this moegguf knows {FORMAT_VERSION}", "use the moegguf that made it"
        )
    columns = [get(f"expert.{column}") for column in ("names", "sources", "weights", "quants")]
    if not all(map(_is_list, columns)) or len({len(column) for column in columns}) != 1:
        raise UserError(f"{header.path}: {PREFIX}expert.* are no lists of equal length", "build the mix again")
    card = Card(
        name=get("name"),
        tool_version=get("version"),
        layout=get("layout"),
        router=get("router"),
        k=get("router.k"),
        base=get("base"),
        quant=get("quant"),
        experts=tuple(ExpertCard(*row) for row in zip(*columns, strict=True)),
        std=header.get(PREFIX + "router.std"),
        seed=header.get(PREFIX + "router.seed"),
        always_on=header.get(PREFIX + "always_on"),
    )
    for key, expected in card.to_metadata().items():
        found = header.value(key)
        if (found.type, found.sub_type) != (expected.type, expected.sub_type):
            raise UserError(
                f"{header.path}: {key} is {found.value!r:.80}, expected {expected.type.name}", "build the mix again"
            )
    return card


def _is_list(value) -> bool:
    """Whether it is an array whose strings, if it holds any, are valid UTF-8 (others are bytes)."""
    return isinstance(value, list) and not any(isinstance(item, bytes) for item in value)
