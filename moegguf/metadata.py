"""The `moegguf.*` keys of a mix: what stock runtimes ignore and `inspect`, `chat` and later edits rely on.

A `Card` is the typed form of those keys; `Card.to_metadata` and `read_card` are each other's inverse. This is
the only file that spells the keys. Build side and runtime side both use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gguf import GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.gguf_header import Header

FORMAT_VERSION = 1
PREFIX = "moegguf."
SPARE = PREFIX + "spare"
SPARE_BYTES = 1024
"""Room in the header of a new mix for what a later edit of its card may add, so that no tensor has to move."""
GATELESS = "gateless"


@dataclass(frozen=True)
class ExpertCard:
    """One expert of a finished mix. `weight` is its share in a gate-less mix, 1/N otherwise."""

    name: str
    source: str
    weight: float
    quant: str
    licence: str = ""
    """The Hub's identifier of it, as the source names it; empty where it names none."""


@dataclass(frozen=True)
class CompactCard:
    """What was merged in a compacted mix.

    `widths` are the neurons left in each mixed layer, of `width` in each expert. `kld` is the measured mean divergence
    from the mix that is not compacted, in nats, over `n_tokens` tokens; None where it was not measured.
    """

    widths: tuple[int, ...]
    width: int
    kld: float | None = None
    n_tokens: int = 0

    @property
    def size(self) -> float:
        """Neurons left, as a multiple of one model's."""
        return sum(self.widths) / (self.width * len(self.widths))


@dataclass(frozen=True)
class SplitCard:
    """How the neurons of a gate-less mix are split: in each layer `fine` of `neurons` are in the finer group.

    `by` is neurons or experts, `digest` the SHA-256 of which they are.
    """

    by: str
    fine: int
    neurons: int
    digest: str


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
    shared: bool = False
    """Whether all layers have one router."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the router was fitted or trained, for people."""
    router_digest: str = ""
    """SHA-256 of the router's matrices; empty in a file that stores none."""
    mixed: str = "ffn"
    trunk: str = "base"
    layers: tuple[int, ...] | None = None
    """The layers that are mixed; None is all."""
    compact: CompactCard | None = None
    split: SplitCard | None = None
    base_licence: str = ""

    @property
    def is_gateless(self) -> bool:
        return self.router == GATELESS

    @property
    def licences(self) -> dict[str, str]:
        """Source → licence of everything that is in the mix, the base first; empty where none is named."""
        return {self.base: self.base_licence, **{expert.source: expert.licence for expert in self.experts}}

    @property
    def is_weighted(self) -> bool:
        """Whether its experts have shares that were given, which are folded into their weights."""
        return len({expert.weight for expert in self.experts}) > 1

    @property
    def is_dense(self) -> bool:
        """Whether the experts collapsed into one: gate-less and fine-grained."""
        return self.is_gateless and self.mixed.startswith("fine-grained")

    def describe_mixed(self) -> str:
        """What is mixed where, and where the rest is from, for people."""
        layers = "all layers" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        trunk = {"base": "", "mean": "; trunk: the mean of all experts"}.get(self.trunk, f"; trunk: {self.trunk}'s")
        return f"{self.mixed} in {layers}{trunk}"

    def describe_compact(self) -> str:
        """What was merged, for people; nothing where nothing was."""
        if self.compact is None:
            return ""
        compact, n = self.compact, len(self.experts)
        low, high = min(compact.widths), max(compact.widths)
        widths = f"{low}" if low == high else f"{low} to {high}"
        cost = "not measured" if compact.kld is None else f"KLD {compact.kld:.2g} ({compact.n_tokens} tokens)"
        return f"{compact.size:.3g}x of {n}x: {widths} neurons a layer, {n * compact.width} in the mix; {cost}"

    def describe_split(self) -> str:
        """What is in two groups, for people; nothing where nothing is."""
        if self.split is None:
            return ""
        return f"by {self.split.by}: {self.split.fine} of {self.split.neurons} neurons of each layer in the finer group"

    def describe_router(self) -> str:
        """One line for people."""
        n = len(self.experts)
        if self.is_gateless:
            weighted = "weighted " * self.is_weighted
            return f"gateless: the {weighted}mean of {n} experts"
        parts = [f"{self.router}: {self.k} of {n} experts"]
        if self.always_on:
            parts.append(f"{self.always_on} always on")
        if self.std is not None:
            parts.append(f"std {self.std:.6g}, seed {self.seed}")
        if self.shared:
            parts.append("one for all layers")
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.settings.items())])

    def to_metadata(self) -> dict[str, GGUFValue]:
        """The keys of this card, typed. Keys of absent values are absent."""
        u32, u64, f32, string = (
            GGUFValueType.UINT32, GGUFValueType.UINT64, GGUFValueType.FLOAT32, GGUFValueType.STRING,
        )  # fmt: skip

        def array(values: list, type: GGUFValueType) -> GGUFValue:
            return GGUFValue(values, GGUFValueType.ARRAY, type)

        settings = [f"{key}={value}" for key, value in self.settings.items()]
        licences = [expert.licence for expert in self.experts]
        is_measured = self.compact is not None and self.compact.kld is not None
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
            "router.shared": GGUFValue(True, GGUFValueType.BOOL) if self.shared else None,
            "router.settings": array(settings, string) if settings else None,
            "router.digest": GGUFValue(self.router_digest, string) if self.router_digest else None,
            "mix": GGUFValue(self.mixed, string),
            "trunk": GGUFValue(self.trunk, string),
            "layers": None if self.layers is None else array(list(self.layers), u32),
            "compact.widths": array(list(self.compact.widths), u32) if self.compact else None,
            "compact.width": GGUFValue(self.compact.width, u32) if self.compact else None,
            "compact.kld": GGUFValue(self.compact.kld, f32) if is_measured else None,
            "compact.tokens": GGUFValue(self.compact.n_tokens, u32) if is_measured else None,
            "split.by": GGUFValue(self.split.by, string) if self.split else None,
            "split.fine": GGUFValue(self.split.fine, u32) if self.split else None,
            "split.neurons": GGUFValue(self.split.neurons, u32) if self.split else None,
            "split.digest": GGUFValue(self.split.digest, string) if self.split else None,
            "base": GGUFValue(self.base, string),
            "base.license": GGUFValue(self.base_licence, string) if self.base_licence else None,
            "quant": GGUFValue(self.quant, string),
            "expert.names": array([expert.name for expert in self.experts], string),
            "expert.sources": array([expert.source for expert in self.experts], string),
            "expert.weights": array([expert.weight for expert in self.experts], f32),
            "expert.quants": array([expert.quant for expert in self.experts], string),
            "expert.licenses": array(licences, string) if any(licences) else None,
        }
        return {PREFIX + key: value for key, value in values.items() if value is not None}


def check_name(name: str, metadata: Mapping[str, GGUFValue]) -> None:
    """Raises UserError for a name that keeps llama.cpp from loading a model with these keys.

    By 'phi3' in it, it takes a model for Phi 3, and gives up where tokens of Phi 3 are missing (`src/llama-vocab.cpp`,
    the attributes at the end of `load`).
    """
    if not re.search("phi-?3", name.lower()):
        return
    tokens = metadata.get("tokenizer.ggml.tokens")
    if missing := sorted({"</s>", "<unk>", "<s>", "<|endoftext|>"} - set(tokens.value if tokens else ())):
        raise UserError(
            f"name {name!r}: llama.cpp takes that for a Phi 3, whose tokens {', '.join(missing)} its base lacks",
            "choose a name (of the recipe, or of -o) without phi3 and phi-3",
        )


def spare_bytes(n: int) -> dict[str, GGUFValue]:
    """The key that keeps `n` bytes (at least one) free in a header.

    They are Booleans: the writer of Ollama's older versions, up to 0.24, knows no arrays of numbers of one byte.
    """
    return {SPARE: GGUFValue([False] * n, GGUFValueType.ARRAY, GGUFValueType.BOOL)}


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
    if PREFIX + "expert.licenses" in header.fields:
        columns.append(get("expert.licenses"))
    if not all(map(_is_list, columns)) or len({len(column) for column in columns}) != 1:
        raise UserError(f"{header.path}: {PREFIX}expert.* are no lists of equal length", "build the mix again")
    compact = None
    if PREFIX + "compact.widths" in header.fields:
        kld, n_tokens = (header.get(f"{PREFIX}compact.{key}") for key in ("kld", "tokens"))
        compact = CompactCard(get("compact.widths"), get("compact.width"), kld, n_tokens or 0)
        counts = [compact.width, *compact.widths] if isinstance(compact.widths, list) else []
        if len(counts) < 2 or not all(type(n) is int and n > 0 for n in counts):
            raise UserError(f"{header.path}: {PREFIX}compact.* are no counts of neurons", "build the mix again")
        compact = replace(compact, widths=tuple(compact.widths))
    split = None
    if PREFIX + "split.by" in header.fields:
        split = SplitCard(*(get(f"split.{key}") for key in ("by", "fine", "neurons", "digest")))
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
        shared=header.get(PREFIX + "router.shared", False),
        settings=dict(str(item).partition("=")[::2] for item in header.get(PREFIX + "router.settings", [])),
        router_digest=header.get(PREFIX + "router.digest", ""),
        mixed=header.get(PREFIX + "mix", Card.mixed),
        trunk=header.get(PREFIX + "trunk", Card.trunk),
        layers=None if (layers := header.get(PREFIX + "layers")) is None else tuple(layers),
        compact=compact,
        split=split,
        base_licence=header.get(PREFIX + "base.license", Card.base_licence),
    )
    for key, expected in card.to_metadata().items():
        if key not in header.fields:  # a file of before there was such a key
            continue
        found = header.value(key)
        if (found.type, found.sub_type) != (expected.type, expected.sub_type):
            raise UserError(
                f"{header.path}: {key} is {found.value!r:.80}, expected {expected.type.name}", "build the mix again"
            )
    return card


def _is_list(value) -> bool:
    """Whether it is an array whose strings, if it holds any, are valid UTF-8 (others are bytes)."""
    return isinstance(value, list) and not any(isinstance(item, bytes) for item in value)
