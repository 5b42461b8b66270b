"""A Hugging Face checkpoint (safetensors plus config.json) as a Source.

What llama.cpp's converter does for these families, without loading anything: config.json becomes GGUF
metadata, tensors are renamed, the rows of q and k are reordered for ggml's rotary pairs as they are read,
and llama3 rope scaling becomes its table of frequency factors. A test holds the result against the converter,
to the byte. Checkpoints that would have to be unpickled are refused.

Source of the rules: llama.cpp, conversion/base.py and conversion/llama.py.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType

from moegguf.errors import UserError
from moegguf.families import FAMILIES, Family, TensorName, gguf_name
from moegguf.sources.blob import Blob, LocalFile
from moegguf.sources.model_card import read_model_card
from moegguf.sources.safetensors_file import Entry, read_entries
from moegguf.sources.vocab import read_vocab
from moegguf.tensor import Metadata, Source, Tensor, constant

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint, wherever they are: how to open a weight file, and a folder of small files."""

    ref: str
    label: str
    folder: Path
    """Holds config.json and the tokenizer (and the weights too, unless they are streamed)."""
    file_names: tuple[str, ...]
    """Every file of the checkpoint, the ones that are not in `folder` included."""
    open_blob: Callable[[str], Blob]
    files: tuple[Path, ...] = ()


def open_folder(folder: Path, ref: str, label: str, pre: str | None = None) -> Source:
    """The checkpoint in a local folder. Raises UserError, without reading a weight, when it cannot be used."""
    try:
        names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_file()))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})", "check its permissions") from error
    files = tuple(folder / name for name in names if name.endswith(".safetensors"))
    return open_checkpoint(Checkpoint(ref, label, folder, names, lambda name: LocalFile(folder / name), files), pre)


def open_checkpoint(checkpoint: Checkpoint, pre: str | None = None) -> Source:
    """Map a checkpoint to GGUF names and metadata. `pre` overrides the BPE pre-tokenizer that is recognised."""
    config = _read_json(checkpoint, "config.json")
    family = _family(checkpoint, config)
    config = _checked_config(checkpoint, family, config)
    entries = _entries(checkpoint)
    return Source(
        ref=checkpoint.ref,
        label=checkpoint.label,
        metadata=_metadata(family, config, checkpoint.label) | read_model_card(checkpoint.folder),
        tensors=_tensors(checkpoint, family, config, entries),
        read_vocab=lambda: read_vocab(checkpoint.folder, config["vocab_size"], pre),
        files=checkpoint.files,
    )


def _read_json(checkpoint: Checkpoint, name: str) -> dict:
    path = checkpoint.folder / name
    if not path.is_file():
        raise UserError(
            f"{checkpoint.ref}: has no {name}, so it is no Hugging Face model folder",
            "point to the folder that holds config.json and *.safetensors, or to a .gguf file",
        )
    return read_json_object(path)


def read_json_object(path: Path) -> dict:
    """The object in a JSON file that is there. Raises UserError when it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error})", "download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object", "download it again")
    return content


def _family(checkpoint: Checkpoint, config: dict) -> Family:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{checkpoint.ref}: architecture {reprlib.repr(name)} cannot be read from safetensors, "
            f"expected one of {', '.join(FAMILIES)}",
            "convert it to GGUF with llama.cpp: any dense GGUF model with a gated FFN can go into the fused layout",
        )
    return FAMILIES[name]


def _checked_config(checkpoint: Checkpoint, family: Family, config: dict) -> dict:
    """The config with its family's defaults filled in and every number that is used checked."""
    faults = []
    config = dict(family.defaults) | {key: value for key, value in config.items() if value is not None}

    def fault(key: str, expected: str, mend: str = "use an unmodified config.json of the model") -> None:
        found = reprlib.repr(config[key]) if key in config else "missing"
        faults.append(UserError(f"{checkpoint.ref}: config.json: {key} is {found}, expected {expected}", mend))

    if "num_attention_heads" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    for key in _COUNTS:
        if not _is_count(config.get(key)):
            fault(key, "a positive integer")
    for key in ("rms_norm_eps", "rope_theta"):
        if not _is_positive(config[key]):
            fault(key, "a positive number")
    if config["hidden_act"] != "silu":
        fault("hidden_act", "'silu'", "only SwiGLU models have a stock MoE graph")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        faults.append(
            UserError(
                f"{checkpoint.ref}: the weights are quantised ({reprlib.repr(method)}), expected bf16, f16 or f32",
                "use the unquantised model, or a GGUF of it",
            )
        )
    if faults:
        raise UserError.of(faults)

    n_embd, n_head = config["hidden_size"], config["num_attention_heads"]
    if "head_dim" not in config and n_embd % n_head:
        fault("num_attention_heads", f"a divisor of hidden_size, which is {n_embd}")
    elif not _is_count(config.setdefault("head_dim", n_embd // n_head)) or config["head_dim"] % 2:
        fault("head_dim", "a positive even integer")
    if n_head % config["num_key_value_heads"]:
        fault("num_key_value_heads", f"a divisor of num_attention_heads, which is {n_head}")
    faults += _rope_faults(checkpoint, config)
    if faults:
        raise UserError.of(faults)
    return config


_COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _is_count(value) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value) -> bool:
    """Whether it is a number that float32 holds and that can be divided by."""
    return type(value) in (int, float) and 1e-37 < value < 1e37


def _rope_faults(checkpoint: Checkpoint, config: dict) -> Iterator[UserError]:
    """What is wrong with how the context is stretched."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"

    def fault(where: str, found, expected: str, mend: str = "use an unmodified config.json of the model") -> UserError:
        found = "missing" if found is None else reprlib.repr(found)
        return UserError(f"{checkpoint.ref}: config.json: {where} is {found}, expected {expected}", mend)

    if not isinstance(config.get(key) or {}, dict):
        yield fault(key, config[key], "an object")
        return
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        yield fault("rope_type", kind, "default, linear, llama3 or yarn", "convert it to GGUF with llama.cpp first")
        return
    if "factor" in rope and "rope_type" not in rope:
        yield fault(f"{key}.rope_type", None, "default, linear, llama3 or yarn")
    if kind in ("linear", "yarn"):
        rope.setdefault("factor", None)
    for name, value in rope.items():
        if name == "original_max_position_embeddings":
            if not _is_count(value):
                yield fault(f"{key}.{name}", value, "a positive integer")
        elif name in _ROPE_NUMBERS and not _is_positive(value):
            yield fault(f"{key}.{name}", value, "a positive number")
    if kind == "llama3":
        low, high = (rope.get(f"{end}_freq_factor", default) for end, default in LLAMA3_BAND)
        if _is_positive(low) and _is_positive(high) and low >= high:
            yield fault(f"{key}.high_freq_factor", high, f"more than low_freq_factor, which is {low}")


_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "extrapolation_factor", "attention_factor",
    "attn_factor", "beta_fast", "beta_slow",
)  # fmt: skip
LLAMA3_BAND = (("low", 1.0), ("high", 4.0))


def _rope(config: dict) -> dict:
    """Rope parameters in the one form of transformers 5 (`rope_parameters`), whichever the config has."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    rope.setdefault("rope_theta", config["rope_theta"])
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    if "original_max_position_embeddings" in config:
        rope.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return rope


def _metadata(family: Family, config: dict, label: str) -> Metadata:
    """`general.*` and architecture keys, as the converter writes them."""
    u32, f32, string = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    arch = family.arch
    metadata: Metadata = {
        "general.architecture": GGUFValue(arch, string),
        "general.type": GGUFValue("model", string),
        "general.name": GGUFValue(re.split(r"[/:]", label.partition("@")[0])[-1], string),
    }

    def add(key: str, value, type: GGUFValueType) -> None:
        metadata[f"{arch}.{key}"] = GGUFValue(value, type)

    add("block_count", config["num_hidden_layers"], u32)
    add("context_length", config["max_position_embeddings"], u32)
    add("embedding_length", config["hidden_size"], u32)
    add("feed_forward_length", config["intermediate_size"], u32)
    add("attention.head_count", config["num_attention_heads"], u32)
    add("attention.head_count_kv", config["num_key_value_heads"], u32)
    add("attention.layer_norm_rms_epsilon", config["rms_norm_eps"], f32)
    add("attention.key_length", config["head_dim"], u32)
    add("attention.value_length", config["head_dim"], u32)
    add("vocab_size", config["vocab_size"], u32)
    add("rope.dimension_count", config["head_dim"], u32)

    rope = _rope(config)
    add("rope.freq_base", rope["rope_theta"], f32)
    if rope.get("rope_type") in ("linear", "yarn"):
        add("rope.scaling.type", rope["rope_type"], string)
        add("rope.scaling.factor", rope["factor"], f32)
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        add("rope.scaling.original_context_length", original, u32)
        for key, names in _YARN_KEYS.items():
            value = next((rope[name] for name in names if rope.get(name) is not None), None)
            if value is not None:
                add(f"rope.scaling.{key}", value, f32)
    return metadata


_YARN_KEYS = {
    "yarn_ext_factor": ("extrapolation_factor",),
    "yarn_attn_factor": ("attention_factor", "attn_factor"),
    "yarn_beta_fast": ("beta_fast",),
    "yarn_beta_slow": ("beta_slow",),
}


def _entries(checkpoint: Checkpoint) -> Mapping[str, Entry]:
    """Every tensor of the checkpoint by its HF name, over all shards."""
    if INDEX in checkpoint.file_names:
        weight_map = _read_json(checkpoint, INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{checkpoint.ref}: {INDEX} has no weight_map", "download it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
    else:
        weight_map = {}
        names = [name for name in checkpoint.file_names if name.endswith(".safetensors")]
        shards = [SINGLE_FILE] if SINGLE_FILE in names else names  # some keep consolidated.safetensors beside it
    if missing := [shard for shard in shards if shard not in checkpoint.file_names]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{checkpoint.ref}: shard {missing[0]}{more} is missing ({len(shards)} expected by {INDEX})",
            "finish the download",
        )
    if not shards:
        raise _no_safetensors(checkpoint)

    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_entries(checkpoint.open_blob(shard)).items():
            if name in entries:
                raise UserError(
                    f"{checkpoint.ref}: tensor {name} is in {entries[name].blob.name} and in {shard}",
                    "remove the stale weight file: a folder holds one checkpoint",
                )
            entries[name] = entry
    if lost := [name for name in weight_map if name not in entries]:
        raise UserError(f"{checkpoint.ref}: {INDEX} lists {lost[0]}, but no shard has it", "download it again")
    return entries


def _no_safetensors(checkpoint: Checkpoint) -> UserError:
    pickles = [name for name in checkpoint.file_names if name.endswith(PICKLES)]
    if pickles:
        return UserError(
            f"{checkpoint.ref}: has only pickled weights ({pickles[0]}), which can run code when they are read",
            "convert it once, on a machine you can afford to lose: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)",
        )
    return UserError(f"{checkpoint.ref}: holds no *.safetensors file", "point to the folder with the weights")


def _tensors(
    checkpoint: Checkpoint, family: Family, config: dict, entries: Mapping[str, Entry]
) -> Mapping[str, Tensor]:
    n_layer = config["num_hidden_layers"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    shapes = _expected_shapes(config)
    tensors: dict[str, Tensor] = {}
    for hf_name, entry in entries.items():
        try:
            name = gguf_name(hf_name)
            expected = name and shapes[name.role, name.kind]
        except KeyError:
            raise UserError(
                f"{checkpoint.ref}: tensor {hf_name} is unknown to {family.hf_architecture}",
                "use the plain text model (no adapter, no vision tower, no routed experts)",
            ) from None
        if name is None or (name.layer is not None and name.layer >= n_layer):
            continue
        tensor = entry.tensor(str(name))
        if tensor.shape != expected:
            raise UserError(
                f"{checkpoint.ref}: {hf_name} has shape {tensor.shape}, config.json expects {expected}",
                "config.json and the weights are of two models: download both again",
            )
        tensors[str(name)] = rotary_order(tensor, heads[name.role]) if name.role in family.rotated else tensor
    _require_complete(checkpoint, config, tensors)
    if (factors := _rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = constant("rope_freqs.weight", factors)
    return tensors


def _expected_shapes(config: dict) -> dict[tuple[str, str], tuple[int, ...]]:
    n_embd, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    weights = {
        "token_embd": (n_vocab, n_embd), "output": (n_vocab, n_embd), "output_norm": (n_embd,),
        "attn_norm": (n_embd,), "ffn_norm": (n_embd,),
        "attn_q": (q, n_embd), "attn_k": (kv, n_embd), "attn_v": (kv, n_embd), "attn_output": (n_embd, q),
        "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff),
    }  # fmt: skip
    biases = {(role, "bias"): shape[:1] for role, shape in weights.items() if len(shape) == 2}
    return {(role, "weight"): shape for role, shape in weights.items()} | biases


_REQUIRED = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def _require_complete(checkpoint: Checkpoint, config: dict, tensors: Mapping[str, Tensor]) -> None:
    for name in _required_names(config):
        if name not in tensors:
            raise UserError(f"{checkpoint.ref}: the weights lack {name}", "finish the download")


def _required_names(config: dict) -> Iterator[str]:
    yield "token_embd.weight"
    yield "output_norm.weight"
    if not config["tie_word_embeddings"]:
        yield "output.weight"
    for layer in range(config["num_hidden_layers"]):
        for role in _REQUIRED:
            yield str(TensorName(layer, role, "weight"))


def rotary_order(tensor: Tensor, n_head: int) -> Tensor:
    """q or k with the two halves of each head's rows interleaved: HF (2, head_dim/2) → ggml (head_dim/2, 2).

    A bias is one row of n_head · head_dim values, so its columns move instead.
    """
    n = tensor.shape[0]
    order = np.arange(n).reshape(n_head, 2, n // n_head // 2).swapaxes(1, 2).reshape(n)

    def read_rows(start: int, stop: int) -> np.ndarray:
        wanted = order[start:stop]
        first = int(wanted.min())
        return tensor.read_rows(first, int(wanted.max()) + 1)[wanted - first]

    def read_bias(start: int, stop: int) -> np.ndarray:
        row = tensor.read_rows(start, stop)
        return row.reshape(n, -1)[order].reshape(row.shape)

    return replace(tensor, read_rows=read_bias if len(tensor.shape) == 1 else read_rows)


def _rope_factors(config: dict) -> np.ndarray | None:
    """float32 (head_dim / 2,): how much slower each rotary frequency turns under llama3 scaling; None without it.

    Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`. The converter computes this in torch's
    float32, where a number over a tensor is the number times the reciprocal: so here too, for the same last bits.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    dim = config["head_dim"]
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    periods = (rope["rope_theta"] ** exponents).astype(np.float32)
    return np.array([_rope_factor(1 / period, rope) for period in periods], np.float32)


def _rope_factor(frequency: np.float32, rope: dict) -> np.float32 | float:
    factor, original = rope.get("factor", 8.0), rope.get("original_max_position_embeddings", 8192)
    low, high = (rope.get(f"{end}_freq_factor", default) for end, default in LLAMA3_BAND)
    wavelength = 1 / frequency * np.float32(2 * math.pi)
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return factor
    smooth = (1 / wavelength * np.float32(original) - np.float32(low)) / np.float32(high - low)
    return 1 / ((1 - smooth) / np.float32(factor) + smooth)
