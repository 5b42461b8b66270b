"""llama.cpp's quantisation presets: which tensor gets which type.

A preset such as Q4_K_M is a default type plus a mix: some tensors deserve more bits than others. llama.cpp
decides this tensor by tensor (`llama_tensor_get_type` in llama-quant.cpp). Here the same decisions are a table:
a tensor falls into a category by its name, the first rule of that category whose presets and condition fit names
its type, and without one it gets the preset's default. Last, a type whose blocks do not divide the row length falls
back to one with smaller blocks.

Invariant: for every preset, the types equal those that `llama_model_quantize` gives the same tensors, quirks
included (it counts tensors rather than layers in places, and "8 experts" means exactly 8). The tests hold this
against the shipped library.

Method: tensors are visited as llama.cpp visits them, by layer and then by name, because "the first eighth of
ffn_down" is counted in that order.

Not done: the special cases of architectures without a gated FFN (falcon) and of hybrids (glm5-next, bailingmoe3).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from math import prod

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.tensor import FLOAT_TYPES


@dataclass(frozen=True)
class Preset:
    name: str
    type: Type
    """What a tensor gets when no rule says otherwise."""
    file_type: LlamaFileType
    """The value of `general.file_type`."""


@dataclass(frozen=True)
class ModelFacts:
    """What the presets ask of a model. Head counts are those of the first layer."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls it a 70B, from its layers alone (`load_arch_hparams` in src/models/)."""
        if self.arch in ("llama", "llama-embed"):
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return self.arch in ("qwen2", "olmo", "deci") and self.n_layer == 80


_PRESETS = {
    row.name: row
    for row in (
        Preset("F32", Type.F32, LlamaFileType.ALL_F32),
        Preset("F16", Type.F16, LlamaFileType.MOSTLY_F16),
        Preset("BF16", Type.BF16, LlamaFileType.MOSTLY_BF16),
        Preset("Q8_0", Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        Preset("Q6_K", Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
        Preset("Q5_K_M", Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
        Preset("Q5_K_S", Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
        Preset("Q5_1", Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
        Preset("Q5_0", Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
        Preset("Q4_K_M", Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
        Preset("Q4_K_S", Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
        Preset("Q4_1", Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
        Preset("Q4_0", Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        Preset("IQ4_NL", Type.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
        Preset("IQ4_XS", Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
        Preset("MXFP4_MOE", Type.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
        Preset("Q3_K_L", Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_L),
        Preset("Q3_K_M", Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
        Preset("Q3_K_S", Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
        Preset("IQ3_M", Type.IQ3_S, LlamaFileType.MOSTLY_IQ3_M),
        Preset("IQ3_S", Type.IQ3_S, LlamaFileType.MOSTLY_IQ3_S),
        Preset("IQ3_XS", Type.IQ3_S, LlamaFileType.MOSTLY_IQ3_XS),
        Preset("IQ3_XXS", Type.IQ3_XXS, LlamaFileType.MOSTLY_IQ3_XXS),
        Preset("Q2_K", Type.Q2_K, LlamaFileType.MOSTLY_Q2_K),
        Preset("Q2_K_S", Type.Q2_K, LlamaFileType.MOSTLY_Q2_K_S),
        Preset("IQ2_M", Type.IQ2_S, LlamaFileType.MOSTLY_IQ2_M),
        Preset("IQ2_S", Type.IQ2_XS, LlamaFileType.MOSTLY_IQ2_S),
        Preset("IQ2_XS", Type.IQ2_XS, LlamaFileType.MOSTLY_IQ2_XS),
        Preset("IQ2_XXS", Type.IQ2_XXS, LlamaFileType.MOSTLY_IQ2_XXS),
        Preset("TQ2_0", Type.TQ2_0, LlamaFileType.MOSTLY_TQ2_0),
        Preset("TQ1_0", Type.TQ1_0, LlamaFileType.MOSTLY_TQ1_0),
        Preset("IQ1_M", Type.IQ1_M, LlamaFileType.MOSTLY_IQ1_M),
        Preset("IQ1_S", Type.IQ1_S, LlamaFileType.MOSTLY_IQ1_S),
        Preset("Q1_0", Type.Q1_0, LlamaFileType.MOSTLY_Q1_0),
    )
}

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


class Category(Enum):
    OUTPUT = auto()
    TOKEN_EMBD = auto()
    ATTN_V = auto()
    ATTN_K = auto()
    ATTN_Q = auto()
    ATTN_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OTHER = auto()


_CATEGORIES = (
    (r"^output\.weight$", Category.OUTPUT),
    (r"^(per_layer_)?token_embd\.weight$", Category.TOKEN_EMBD),
    (r"attn_(qkv|kv_b|v)\.weight", Category.ATTN_V),
    (r"attn_k\.weight", Category.ATTN_K),
    (r"attn_q\.weight", Category.ATTN_Q),
    (r"attn_output\.weight", Category.ATTN_OUTPUT),
    (r"ffn_up", Category.FFN_UP),
    (r"ffn_gate", Category.FFN_GATE),
    (r"ffn_down", Category.FFN_DOWN),
    (r"", Category.OTHER),
)
"""The first pattern found in a tensor's name tells its category. attn_v stands for all that holds the values."""

_UNQUANTISED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|^position_embd\.weight$|^token_types\.weight$"
    r"|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight|attn_rel_b\.weight"
)
"""Matrices that llama.cpp's `tensor_allows_quantization` leaves alone, of the architectures that we can meet."""


@dataclass(frozen=True)
class Place:
    """All that a rule may ask about one tensor."""

    facts: ModelFacts
    has_imatrix: bool
    is_stack: bool
    """Whether it holds more than one expert."""
    fills_blocks: bool
    """Whether the default type's block size divides its row length."""
    nth: int
    """How many quantised tensors of its category came before it."""
    layer: int
    """Its block number in a mix. llama.cpp takes `nth` for it in a dense model, and for attn_v everywhere."""
    n_layer: int
    """How far `layer` counts: layers of the model, or its attn_v tensors."""


Condition = Callable[[Place], bool]


@dataclass(frozen=True)
class Rule:
    presets: frozenset[Preset]
    type: Type
    when: Condition


def _always(place: Place) -> bool:
    return True


def _ragged(place: Place) -> bool:
    return not place.fills_blocks


def _not_a_stack(place: Place) -> bool:
    return not place.is_stack


def _imatrix(place: Place) -> bool:
    return place.has_imatrix


def _no_imatrix(place: Place) -> bool:
    return not place.has_imatrix


def _70b(place: Place) -> bool:
    return place.facts.is_70b


def _gqa_4(place: Place) -> bool:
    return place.facts.n_gqa >= 4


def _gqa_4_or_4_experts(place: Place) -> bool:
    return _gqa_4(place) or place.facts.n_expert >= 4


def _8_experts(place: Place) -> bool:
    return place.facts.n_expert == 8


def _not_8_experts(place: Place) -> bool:
    return not _8_experts(place)


def _first_2(place: Place) -> bool:
    return place.layer < 2


def _first_4(place: Place) -> bool:
    return place.layer < 4


def _first_16th(place: Place) -> bool:
    return place.layer < place.n_layer // 16


def _first_8th(place: Place) -> bool:
    return place.layer < place.n_layer // 8


def _first_8th_counted(place: Place) -> bool:
    return place.nth < place.n_layer // 8


def _middle(place: Place) -> bool:
    return place.n_layer // 8 <= place.layer < 7 * place.n_layer // 8


def _ends_and_thirds(place: Place) -> bool:
    """The first and last eighth of the layers, and every third layer between them."""
    return not _middle(place) or (place.layer - place.n_layer // 8) % 3 == 2


def _all(*conditions: Condition) -> Condition:
    return lambda place: all(condition(place) for condition in conditions)


def _rule(presets: str, type: Type, when: Condition = _always) -> Rule:
    return Rule(frozenset(_PRESETS[name] for name in presets.split()), type, when)


_EVERY = " ".join(_PRESETS)
_LOWEST = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"

_RULES: dict[Category, tuple[Rule, ...]] = {
    Category.OUTPUT: (
        _rule(_EVERY, Type.Q8_0, _ragged),
        _rule("Q8_0", Type.Q8_0),
        _rule(f"{_LOWEST} IQ3_XXS", Type.Q5_K),
        _rule(_EVERY, Type.Q6_K),
    ),
    Category.TOKEN_EMBD: (
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", Type.Q2_K),
        _rule("IQ2_S IQ2_M IQ3_XXS", Type.IQ3_S),
        _rule("TQ1_0 TQ2_0", Type.Q4_K),
    ),
    Category.ATTN_V: (
        _rule(_LOWEST, Type.Q4_K, _gqa_4_or_4_experts),
        _rule("IQ2_S IQ2_M", Type.IQ3_S),
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", Type.Q2_K),
        _rule(_EVERY, Type.Q8_0, _8_experts),
        _rule("Q4_K_M Q5_K_M", Type.Q6_K, _ends_and_thirds),
        _rule("Q2_K Q3_K_S Q3_K_M IQ3_M Q4_K_S Q4_K_M", Type.Q5_K, _70b),
        _rule("Q2_K_S IQ3_XXS IQ3_XS IQ3_S", Type.Q5_K, _all(_70b, _gqa_4)),
        _rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", Type.Q4_K, _gqa_4),
        _rule("Q2_K", Type.Q3_K),
        _rule("IQ3_XXS", Type.IQ3_S, _no_imatrix),
        _rule("IQ3_M", Type.Q4_K),
        _rule("Q3_K_M", Type.Q5_K, _first_2),
        _rule("Q3_K_M", Type.Q4_K),
        _rule("Q3_K_L", Type.Q5_K),
        _rule("IQ4_NL IQ4_XS", Type.Q5_K, _gqa_4),
        _rule("Q4_K_S", Type.Q5_K, _first_4),
    ),
    Category.ATTN_K: (
        _rule(_LOWEST, Type.Q4_K, _8_experts),
        _rule(_EVERY, Type.Q8_0, _8_experts),
        _rule("IQ3_XS", Type.IQ3_XXS),
        _rule("IQ3_XXS", Type.IQ2_S),
    ),
    Category.ATTN_Q: (
        _rule("IQ3_XS", Type.IQ3_XXS),
        _rule("IQ3_XXS", Type.IQ2_S),
    ),
    Category.ATTN_OUTPUT: (
        _rule(f"{_LOWEST} Q2_K IQ3_XXS IQ3_XS IQ3_S IQ3_M", Type.Q5_K, _8_experts),
        _rule("Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ4_NL IQ4_XS", Type.Q5_K, _8_experts),
        _rule("IQ1_S IQ1_M", Type.IQ2_XXS),
        _rule("IQ2_S IQ2_M IQ3_XXS", Type.IQ3_S),
        _rule("Q2_K", Type.Q3_K),
        _rule("Q3_K_M IQ3_M", Type.Q4_K),
        _rule("Q3_K_L", Type.Q5_K, _not_8_experts),
    ),
    Category.FFN_UP: (_rule("IQ3_XS", Type.IQ3_XXS, _middle),),
    Category.FFN_GATE: (_rule("IQ3_XS", Type.IQ3_XXS, _middle),),
    Category.FFN_DOWN: (
        _rule("IQ2_S IQ2_M", Type.IQ3_S, _first_8th_counted),
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", Type.Q2_K, _first_8th_counted),
        _rule("Q2_K", Type.Q3_K),
        _rule("Q2_K_S IQ3_M", Type.Q4_K, _first_8th),
        _rule("IQ3_M", Type.Q4_K, _all(_8_experts, _ends_and_thirds)),
        _rule("IQ3_XXS", Type.Q4_K, _all(_first_8th, _no_imatrix)),
        _rule("IQ3_XXS", Type.Q3_K, _no_imatrix),
        _rule("Q3_K_M", Type.Q5_K, _first_16th),
        _rule("Q3_K_M", Type.Q4_K),
        _rule("Q3_K_L", Type.Q5_K),
        _rule("Q4_K_M Q5_K_M", Type.Q6_K, _ends_and_thirds),
        _rule("Q4_K_S", Type.Q5_K, _first_8th),
        _rule("IQ4_NL IQ4_XS", Type.Q5_K, _all(_first_8th, _no_imatrix)),
        _rule("Q4_0", Type.Q4_1, _all(_first_8th, _imatrix)),
        _rule("Q5_0", Type.Q5_1, _all(_first_8th, _imatrix)),
    ),
    Category.OTHER: (),
}
"""The first rule that fits decides."""

_MXFP4_RULES = (_rule("MXFP4_MOE", Type.Q8_0, _not_a_stack),)
"""MXFP4 is for the stacked experts alone; this comes before the rules of any category."""

_FALLBACKS = {
    **dict.fromkeys((Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S), Type.IQ4_NL),
    **dict.fromkeys((Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS), Type.IQ4_NL),
    **dict.fromkeys((Type.Q2_K, Type.Q3_K, Type.TQ1_0, Type.TQ2_0), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
"""Types of 256-weight blocks → the type of 32-weight blocks nearest in size."""

_GARBAGE_WITHOUT_IMATRIX = {Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS}


def preset_names() -> tuple[str, ...]:
    """Names of all presets, most bits first, without aliases."""
    return tuple(_PRESETS)


def presets() -> tuple[Preset, ...]:
    """All presets, most bits first."""
    return tuple(_PRESETS.values())


def preset(name: str) -> Preset:
    """The preset that llama.cpp calls `name`, in any case. Raises UserError for an unknown one."""
    upper = name.upper()
    upper = _ALIASES.get(upper, upper)
    if upper not in _PRESETS:
        raise UserError(f"unknown quantisation preset {name!r}", f"choose one of {', '.join(_PRESETS)}")
    return _PRESETS[upper]


def parse_type(name: str) -> Type:
    """The ggml type called `name`, in any case. Raises UserError for one that cannot be quantised to."""
    types = {type.name: type for type in ggml.supported_types()}
    if name.upper() not in types:
        raise UserError(f"unknown tensor type {name!r}", f"choose one of {', '.join(sorted(types))}")
    return types[name.upper()]


def fallback(type: Type, n_cols: int) -> Type:
    """`type`, or what takes its place in rows of `n_cols` weights (`tensor_type_fallback`, llama-quant.cpp).

    Raises UserError for a type that llama.cpp has no fallback for (Q1_0, NVFP4).
    """
    if _divides(type, n_cols):
        return type
    smaller = _FALLBACKS.get(type, type)
    if _divides(smaller, n_cols):
        return smaller
    block = GGML_QUANT_SIZES[smaller][0]
    if block > 32:
        raise UserError(
            f"rows of {n_cols} weights cannot be {type.name}: not a multiple of its block size {block}",
            "choose a type with smaller blocks, such as Q8_0 (32) or F16 (1)",
        )
    return Type.F16


def requires_imatrix(name: str, type: Type, preset: Preset) -> bool:
    """Whether llama.cpp refuses to quantise tensor `name` to `type` without an imatrix."""
    if _category(name) in (Category.OUTPUT, Category.TOKEN_EMBD):
        return False
    return type in _GARBAGE_WITHOUT_IMATRIX or (type is Type.Q2_K and preset.name == "Q2_K_S")


def tensor_types(
    preset: Preset, shapes: Mapping[str, tuple[int, ...]], facts: ModelFacts, *, has_imatrix: bool = False
) -> dict[str, Type]:
    """GGUF name → type, for all tensors of a model, in llama.cpp's order (by layer, then by name).

    `shapes` are numpy's, slowest dimension first, of the whole model: the choices depend on how many tensors of
    a kind there are. Norms, routers, biases and all else that is never quantised gets F32, as llama.cpp's
    converter writes them. Raises UserError where a row length fits no type (`fallback`).
    """
    names = sorted(shapes, key=_visiting_order)
    counts = Counter(map(_category, names))
    is_tied = not counts[Category.OUTPUT]
    seen: Counter[Category] = Counter()
    types = dict.fromkeys(names, Type.F32)
    for name in (name for name in names if _allows_quantisation(name, shapes[name])):
        shape, category = shapes[name], _category(name)
        is_attn_v = category is Category.ATTN_V
        place = Place(
            facts=facts,
            has_imatrix=has_imatrix,
            is_stack=prod(shape[:-2]) > 1,
            fills_blocks=_divides(preset.type, shape[-1]),
            nth=seen[category],
            layer=_block_number(name) if facts.n_expert > 1 and not is_attn_v else seen[category],
            n_layer=counts[category] if is_attn_v else facts.n_layer,
        )
        seen[category] += 1
        if category is Category.TOKEN_EMBD and is_tied:
            category = Category.OUTPUT
        types[name] = fallback(_choose(preset, category, place), shape[-1])
    return types


def _choose(preset: Preset, category: Category, place: Place) -> Type:
    if preset.type in FLOAT_TYPES:
        return preset.type
    rules = (rule for rule in _MXFP4_RULES + _RULES[category] if preset in rule.presets)
    return next((rule.type for rule in rules if rule.when(place)), preset.type)


def _category(name: str) -> Category:
    return next(category for pattern, category in _CATEGORIES if re.search(pattern, name))


def _allows_quantisation(name: str, shape: tuple[int, ...]) -> bool:
    is_matrix = prod(shape[:-1]) > 1
    return is_matrix and name.endswith("weight") and not _UNQUANTISED.search(name)


def _block_number(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _visiting_order(name: str) -> tuple[int, str]:
    return _block_number(name), name


def _divides(type: Type, n_cols: int) -> bool:
    return n_cols % GGML_QUANT_SIZES[type][0] == 0
