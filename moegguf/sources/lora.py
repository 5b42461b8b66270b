"""A LoRA adapter in PEFT's format, merged into another source as its rows are read.

A target weight W of the model below becomes W + (B A) · scale, in float32 and in the order of operations of PEFT's
`merge_and_unload`: the same bytes wherever two BLAS add up B A alike, else the same but for the last bits. Only the
rows that are asked for are made, so memory is bounded by them and by the few A that are kept. Every other tensor, the
metadata and the tokenizer are those of the model below. The rows of B for q and k are put into ggml's rotary order, as
the rows of W have been.

What there is to merge is read from adapter_model.safetensors. adapter_config.json gives the scales (its own r, alpha,
rank-stabilised or not, and their patterns by module), and has to agree with the tensors. Invariant: what is accepted
merges as PEFT merges it. So whatever else could change a weight is refused by name: variants of LoRA (DoRA, …), other
kinds of adapter, biases, modules that were trained whole, initialisations that changed the base, and every field that
is not known here. So are adapters for another base, and anything left over. `fan_in_fan_out` needs no care: PEFT
takes it back for the linear layers that these models have.

Source of the format and of the matching rules: peft 0.21, tuners/tuners_utils.py (`check_target_module_exists`),
utils/other.py (`get_pattern_key`), tuners/lora/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.families import FAMILIES, TensorName, gguf_name
from moegguf.quant import ggml
from moegguf.sources.blob import LocalFile
from moegguf.sources.hf import Checkpoint, read_json_object, rotary_order
from moegguf.sources.model_card import README, read_model_card
from moegguf.sources.safetensors_file import Entry, read_entries
from moegguf.tensor import Lora, LowRank, Metadata, Source, Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SMALL_FILES = (CONFIG, README)
KEPT = 4
"""How many A of an adapter stay in memory: those of the tensors that a build is at, and of the next ones."""

_MERGE = "merge it into its base with peft (merge_and_unload, save_pretrained) and use the folder that this gives"
_ANOTHER_BASE = "give the model that it was trained on: lora:ADAPTER::SOURCE"
_TWO_ADAPTERS = f"take {CONFIG} and {WEIGHTS} of one adapter"
_UNMODIFIED = f"use an unmodified {CONFIG}"


def local_adapter(folder: Path, ref: str, label: str) -> Checkpoint:
    """The files of an adapter in a local folder."""
    try:
        names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_file()))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})", "check its permissions") from error
    return Checkpoint(ref, label, folder, names, lambda name: LocalFile(folder / name))


def open_lora(adapter: Checkpoint, over: Source) -> Source:
    """`over` with `adapter` merged in, lazily. Raises UserError, without reading a weight, when that cannot be done."""
    config = _read_config(adapter)
    deltas = _deltas(adapter, config, over)
    read_a = lru_cache(KEPT)(lambda name: _values(deltas[name].a))
    merged = {
        name: _merged(over.tensors[name], delta, partial(read_a, name), adapter.label) for name, delta in deltas.items()
    }
    return Source(
        ref=adapter.ref,
        label=f"lora:{adapter.label}::{over.label}",
        metadata=_metadata(adapter, over),
        tensors={**over.tensors, **merged},
        read_vocab=over.read_vocab,
        files=(adapter.folder / CONFIG, adapter.folder / WEIGHTS, *over.files),
        lora=Lora(over, deltas),
        expected=over.expected,
        notes=over.notes,
    )


def _metadata(adapter: Checkpoint, over: Source) -> Metadata:
    """That of the model below, but for the licence: the adapter has its own."""
    kept = {key: value for key, value in over.metadata.items() if not key.startswith("general.license")}
    return kept | read_model_card(adapter.folder)


def _merged(weight: Tensor, delta: LowRank, read_a: Callable[[], np.ndarray], label: str) -> Tensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = ggml.dequantise(weight.type, weight.read_rows(start, stop), weight.n_cols)
        with np.errstate(over="ignore", invalid="ignore"):  # the writer refuses what is not finite, and says where
            change = _product(_values(delta.b, start, stop), read_a()) * np.float32(delta.scale)
            return (rows + change).view(np.uint8)

    origin = f"{weight.origin or weight.name} with {label}"
    return replace(weight, type=GGMLQuantizationType.F32, read_rows=read_rows, origin=origin)


def _product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """b @ a. BLAS adds up the product of a single row in another order than that of several, so none goes alone."""
    return b @ a if len(b) > 1 else (np.repeat(b, 2, axis=0) @ a)[:1]


def _values(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """float32 (stop - start, n_cols)."""
    stop = tensor.n_rows if stop is None else stop
    return ggml.dequantise(tensor.type, tensor.read_rows(start, stop), tensor.n_cols)


# ------------------------------------------------------------------------------------------ adapter_config.json


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says of an ordinary LoRA adapter. Modules are named as in the HF model."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str
    layers_to_transform: list[int]
    layers_pattern: list[str]

    def rank(self, module: str) -> int:
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / √r where the adapter is rank-stabilised (arXiv 2312.03732)."""
        rank = self.rank(module)
        return _of_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put the adapter's tensors into `module`."""
        if self.exclude_modules and _is_named(self.exclude_modules, module):
            return False
        if self.target_modules is None:  # left to PEFT's table of defaults
            return True
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module != "lm_head"
            return _is_named(self.target_modules, module)
        return _is_named(self.target_modules, module) and self._has_layer(module)

    def _has_layer(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [_of_layer(name) for name in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return match is not None and int(match["idx"]) in self.layers_to_transform


def _is_named(modules: list[str] | str, module: str) -> bool:
    """Whether a list of names holds `module` or the end of it, or a regular expression matches all of it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in modules)


def _of_pattern(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """The value under the first key that matches the end of `module`."""
    return next((value for key, value in pattern.items() if re.match(_ending(key), module)), otherwise)


def _ending(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _of_layer(name: str) -> str:
    return rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."


_VARIANTS = {
    "use_dora": "DoRA adds a magnitude to each row",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "bias": "it has trained biases",
    "lora_bias": "it has biases of its own",
    "modules_to_save": "these modules were trained whole",
    "trainable_token_indices": "it has trained embeddings",
    "target_parameters": "it changes parameters that are no linear layers",
    "layer_replication": "it repeats layers of the base",
}
"""Fields that, when set, make the weights something else than W + scale · B A."""

_READ = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern init_lora_weights".split()
)
_HARMLESS = frozenset(
    # where it comes from
    "base_model_name_or_path revision peft_version auto_mapping task_type inference_mode runtime_config "
    # training and initialisation
    "lora_dropout loftq_config eva_config corda_config lora_ga_config velora_config megatron_config megatron_core "
    "ensure_weight_tying "
    # of other layers and kinds than the ones that are accepted
    "fan_in_fan_out qalora_group_size merge_weights".split()
)
"""Fields that say nothing about the merged weights."""

_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations with a name that leave the base as it is; pissa, olora, corda, loftq and lora_ga change it."""


def _read_config(adapter: Checkpoint) -> _Config:
    given = _read_json(adapter)
    if given.get("peft_type") != "LORA":
        raise _config_fault(adapter, given, "peft_type", "expected 'LORA'", _MERGE)
    config = _DEFAULTS | {key: value for key, value in given.items() if value not in (None, "")}
    faults = [*_variant_faults(adapter, given), *_value_faults(adapter, config)]
    if faults:
        raise UserError.of(faults)
    return _Config(
        r=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=config["use_rslora"],
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        target_modules=config["target_modules"],
        exclude_modules=config["exclude_modules"],
        layers_to_transform=_listed(config["layers_to_transform"]),
        layers_pattern=_listed(config["layers_pattern"]),
    )


def _config_fault(adapter: Checkpoint, config: dict, key: str, why: str, mend: str) -> UserError:
    found = reprlib.repr(config[key]) if key in config else "missing"
    return UserError(f"{adapter.ref}: {CONFIG}: {key} is {found}, {why}", mend)


def _variant_faults(adapter: Checkpoint, config: dict) -> Iterator[UserError]:
    """Every field that makes it something else than ordinary LoRA, or might."""
    for key, value in config.items():
        if key not in _READ | _HARMLESS and value and (key, value) != ("bias", "none"):
            why = _VARIANTS.get(key, "a field that is not known to leave the weights as they are")
            yield _config_fault(adapter, config, key, why, _MERGE)
    init = config.get("init_lora_weights")
    if init and init is not True and (not isinstance(init, str) or init.lower() not in _INITS):
        mend = "save it with peft's path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        yield _config_fault(adapter, config, "init_lora_weights", "which is for a changed base", mend)


def _value_faults(adapter: Checkpoint, config: dict) -> Iterator[UserError]:
    broken = [key for key, (fits, _) in _EXPECTED.items() if not fits(config[key])]
    for key in broken:
        yield _config_fault(adapter, config, key, f"expected {_EXPECTED[key][1]}", _UNMODIFIED)
    for key, pattern in _patterns({key: value for key, value in config.items() if key not in broken}):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield _config_fault(adapter, config, key, f"no regular expression: {error}", _UNMODIFIED)


def _patterns(config: dict) -> Iterator[tuple[str, str]]:
    """Every regular expression of a config, with its field."""
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((key, _ending(name)) for name in config.get(key, ()))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key]
    yield from (("layers_pattern", _of_layer(name)) for name in _listed(config.get("layers_pattern", [])))


def _read_json(adapter: Checkpoint) -> dict:
    path = adapter.folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{adapter.ref}: has no {CONFIG}, so it is no PEFT adapter",
            f"point to the folder that holds {CONFIG} and {WEIGHTS}",
        )
    return read_json_object(path)


def _is_rank(value) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e37


def _is_layer(value) -> bool:
    return type(value) is int and value >= 0


def _is_name(value) -> bool:
    return isinstance(value, str)


def _is_pattern(value, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_one_or_list(value, fits: Callable[[object], bool]) -> bool:
    return all(map(fits, value)) if isinstance(value, list) else fits(value)


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


_DEFAULTS = {
    "r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": None,
    "exclude_modules": [], "layers_to_transform": [], "layers_pattern": [],
}  # fmt: skip
"""Those of PEFT."""

_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: _is_pattern(value, _is_rank), "modules with a positive integer each"),
    "alpha_pattern": (lambda value: _is_pattern(value, _is_number), "modules with a number each"),
    "target_modules": (lambda value: value is None or _is_one_or_list(value, _is_name), "names of modules"),
    "exclude_modules": (lambda value: _is_one_or_list(value, _is_name), "names of modules"),
    "layers_to_transform": (lambda value: _is_one_or_list(value, _is_layer), "numbers of layers"),
    "layers_pattern": (lambda value: _is_one_or_list(value, _is_name), "names of lists of layers"),
}


# ------------------------------------------------------------------------------------ adapter_model.safetensors

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_OTHER = (
    (re.compile(r".*\.lora_magnitude_vector.*"), "is of DoRA"),
    (re.compile(r".*\.lora_embedding_[AB].*"), "changes an embedding"),
    (re.compile(r".*\.lora_B\..*bias"), "is a bias of the adapter"),
    (re.compile(r".*\.bias"), "is a trained bias"),
    (re.compile(r".*\.lora_.*"), "is of a kind of LoRA that is not known here"),
    (re.compile(r".*"), "is of a module that was trained whole"),
)
"""Tensors that are neither A nor B of a linear layer, and what they are."""


@dataclass(frozen=True)
class _Factors:
    """A and B of one module."""

    module: str
    a: Entry
    b: Entry


def _deltas(adapter: Checkpoint, config: _Config, over: Source) -> Mapping[str, LowRank]:
    """What the adapter adds to each tensor of `over`, by GGUF name. Raises one UserError with every kind of fault."""
    entries = _read_weights(adapter)
    faults: list[UserError] = []
    factors = _factors(adapter, entries, faults)
    deltas: dict[str, LowRank] = {}
    for each in factors:
        try:
            name = _target(adapter, config, each, over)
            deltas[str(name)] = _low_rank(adapter, config, each, over, name)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(_first_of_each_kind(faults))
    if not deltas:
        raise UserError(f"{adapter.ref}: {WEIGHTS} holds no tensors", "save or download it again")
    return deltas


def _read_weights(adapter: Checkpoint) -> Mapping[str, Entry]:
    if WEIGHTS in adapter.file_names:
        return read_entries(adapter.open_blob(WEIGHTS))
    if PICKLE in adapter.file_names:
        raise UserError(
            f"{adapter.ref}: has only pickled weights ({PICKLE}), which can run code when they are read",
            "convert it once, on a machine you can afford to lose: load it with peft and save_pretrained(OUT)",
        )
    raise UserError(f"{adapter.ref}: has no {WEIGHTS}", f"point to the folder that holds {CONFIG} and {WEIGHTS}")


def _factors(adapter: Checkpoint, entries: Mapping[str, Entry], faults: list[UserError]) -> list[_Factors]:
    """A and B of every module that has both; everything else goes to `faults`."""
    sides: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        match = _LOW_RANK.fullmatch(name)
        if not match:
            what = next(what for pattern, what in _OTHER if pattern.fullmatch(name))
            faults.append(UserError(f"{adapter.ref}: tensor {name} {what}", _MERGE))
            continue
        of_module = sides.setdefault(match["module"].removeprefix(_PREFIX), {})
        same = of_module.setdefault(match["side"], entry)
        if same is not entry:
            faults.append(UserError(f"{adapter.ref}: {same.name} and {name} are the same tensor", "keep one of them"))
    for module, of_module in sides.items():
        if len(of_module) == 1:
            (there,) = of_module
            lacking = "B" if there == "A" else "A"
            faults.append(UserError(f"{adapter.ref}: {module} has lora_{there} and no lora_{lacking}", _TWO_ADAPTERS))
    return [_Factors(module, each["A"], each["B"]) for module, each in sides.items() if len(each) == 2]


_LINEAR = frozenset("attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down output".split())


def _target(adapter: Checkpoint, config: _Config, factors: _Factors, over: Source) -> TensorName:
    """The weight that the factors belong to."""
    try:
        name = gguf_name(f"{factors.module}.weight")
    except KeyError:
        name = None
    if name is None or name.role not in _LINEAR or str(name) not in over.tensors:
        as_gguf = f" ({name})" if name else ""
        raise UserError(
            f"{adapter.ref}: {factors.module}{as_gguf} matches no linear layer of {over.ref}", _ANOTHER_BASE
        )
    if not config.targets(factors.module):
        raise UserError(f"{adapter.ref}: {factors.module} has tensors, but {CONFIG} does not target it", _TWO_ADAPTERS)
    return name


def _low_rank(adapter: Checkpoint, config: _Config, factors: _Factors, over: Source, name: TensorName) -> LowRank:
    a, b = (entry.tensor(str(name)) for entry in (factors.a, factors.b))
    rank, found = config.rank(factors.module), over.tensors[str(name)].shape
    if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise UserError(
            f"{adapter.ref}: {factors.module} has A {a.shape} and B {b.shape}, {CONFIG} gives it rank {rank}",
            _TWO_ADAPTERS,
        )
    if (b.shape[0], a.shape[1]) != found:
        raise UserError(
            f"{adapter.ref}: is for another base: {factors.module} has shape {(b.shape[0], a.shape[1])} in the "
            f"adapter and {found} in {over.ref}",
            _ANOTHER_BASE,
        )
    return LowRank(a, _in_ggml_order(adapter, name, b, over), config.scale(factors.module))


_ROTATED = {family.arch: family.rotated for family in FAMILIES.values()}
_AS_IN_HF = frozenset({"qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "stablelm", "seed_oss"})
"""GGUF architectures whose q and k llama.cpp's converter leaves as they are (llama.cpp, conversion/*.py)."""
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def _in_ggml_order(adapter: Checkpoint, name: TensorName, b: Tensor, over: Source) -> Tensor:
    """B with its rows in the order of the rows of `name`."""
    if name.role not in _HEADS or over.arch in _AS_IN_HF:
        return b
    if over.arch not in _ROTATED:
        raise UserError(
            f"{adapter.ref}: changes {name}, whose rows may stand in another order in architecture {over.arch!r}",
            _MERGE,
        )
    n_head = over.hparam(_HEADS[name.role], over.hparam("attention.head_count"))
    n_head = n_head[name.layer] if isinstance(n_head, list) else n_head
    if not n_head or b.n_rows % (2 * n_head):
        raise UserError(f"{over.ref}: {name} has {b.n_rows} rows for {n_head} heads", "use an undamaged model")
    return rotary_order(b, n_head) if name.role in _ROTATED[over.arch] else b


def _first_of_each_kind(faults: Iterable[UserError]) -> Iterator[UserError]:
    """What is wrong with one layer is mostly wrong with all. Faults of one kind have one mend: the first is told."""
    kinds: dict[str, list[UserError]] = {}
    for fault in faults:
        kinds.setdefault(fault.mend, []).append(fault)
    for mend, (first, *others) in kinds.items():
        more = f" (and {len(others)} more)" if others else ""
        yield UserError(f"{first.message}{more}", mend)
