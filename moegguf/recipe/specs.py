"""What a recipe says, frozen: the values that the rest of moegguf is built on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gguf import GGMLQuantizationType

DEFAULT_QUANT = "Q4_K_M"
TRUNK_OF_BASE, TRUNK_OF_MEAN = "base", "mean"


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
