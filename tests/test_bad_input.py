"""Bad input through the command line: one clear line for each fault, exit code 2, and nothing on the disk has changed.

Every test puts real files into a folder, breaks one thing, and asks `refused` for the lines; `refused` itself holds
the promises that are the same for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

import tiny_gguf
import tiny_models
from moegguf.cli import main
from moegguf.gguf_header import read_header
from tiny_models import read_safetensors, write_json, write_model, write_safetensors

ROOT = Path(__file__).parents[1]
KIND = "tied"  # the smallest: two layers, hidden size 64, FFN width 96
HIDDEN, WIDTH, VOCAB = 64, 96, 392
PREFIX = "moegguf: error: "


def tree(folder: Path) -> dict[str, tuple]:
    """What is on the disk: every path with its kind, and its size and time where it is a file."""
    return {
        str(path): (path.is_symlink(), path.is_dir(), path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., list[str]]:
    """`refused(*argv, says=…)`: run a command that must fail; its lines, without the prefix."""

    def run(*argv: object, says: tuple[object, ...] = ()) -> list[str]:
        before = tree(tmp_path)
        code = main([*map(str, argv)])
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert "Traceback" not in out + err
        lines = err.splitlines()
        assert lines
        assert all(line.startswith(PREFIX) and "; " in line for line in lines), err
        assert all(str(fragment) in err for fragment in says), f"{says} not all in: {err}"
        assert tree(tmp_path) == before
        return [line.removeprefix(PREFIX) for line in lines]

    return run


@pytest.fixture
def model(family, tmp_path) -> Path:
    """A folder of a tiny base that a test may break."""
    return Path(shutil.copytree(family(KIND).base, tmp_path / "model"))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "mix.gguf"


@pytest.fixture
def gguf(family, tmp_path, capsys) -> Path:
    """A dense GGUF of the tiny base."""
    path = tmp_path / "dense.gguf"
    base = family(KIND).base
    assert main(["build", *sources(base, base), "--layout", "fused", "--quant", "F32", "-o", str(path)]) == 0
    capsys.readouterr()
    return path


def sources(base: Path, *experts: Path) -> list[str]:
    pairs = [f"e{i}={expert}" for i, expert in enumerate(experts)]
    return ["--base", str(base), *(word for pair in pairs for word in ("--expert", pair))]


def plan(base: Path, *experts: Path) -> list[str]:
    """Arguments that only plan: faults that can be known in advance must be found without a weight being read."""
    return ["build", *sources(base, *(experts or (base,))), "--quant", "Q8_0", "-o", str(base.parent / "mix.gguf"),
            "--dry-run"]  # fmt: skip


# --- safetensors ---


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


RAW_SAFETENSORS = {
    "empty": (b"", "0 bytes are too few"),
    "cut in the length": (b"\1\2\3", "3 bytes are too few"),
    "header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", str(2**60)),
    "header of -1 bytes": (b"\xff" * 8 + b"{}", str(2**64 - 1)),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes, the file has 10"),
    "header that is no JSON": ((4).to_bytes(8, "little") + b"{'a}", "no JSON"),
    "header that is no text": ((4).to_bytes(8, "little") + b"\xff\xfe\0\0", "no JSON"),
    "header that is a list": ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
    "header nested 100,000 deep": ((200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000, "no JSON"),
    "numbers of 5,000 digits": ((5000).to_bytes(8, "little") + b"9" * 5000, "no JSON"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "lack token_embd.weight"),
}


@pytest.mark.parametrize("case", RAW_SAFETENSORS)
def test_a_safetensors_file_that_is_none_is_refused(case, model, refused):
    content, says = RAW_SAFETENSORS[case]
    (model / "model.safetensors").write_bytes(content)
    assert len(refused(*plan(model), says=(model, says))) == 1


NAME = "model.layers.1.mlp.up_proj.weight"
SIZE = 2 * WIDTH * HIDDEN
ENTRIES = {  # what changes in the entry of NAME; None takes a key away
    "nothing": (dict.fromkeys(("dtype", "shape", "data_offsets")), "the entry {}"),
    "a number": (7, "the entry 7"),
    "no dtype": ({"dtype": None}, "expected a dtype"),
    "no shape": ({"shape": None}, "expected a dtype"),
    "no offsets": ({"data_offsets": None}, "expected a dtype"),
    "one offset": ({"data_offsets": [0]}, "expected a dtype"),
    "offsets in words": ({"data_offsets": "ab"}, "expected a dtype"),
    "negative offset": ({"data_offsets": [-2, SIZE - 2]}, "-2"),
    "fractional offset": ({"data_offsets": [0.5, SIZE + 0.5]}, "0.5"),
    "true as an offset": ({"data_offsets": [True, SIZE + 1]}, "True"),
    "huge offset": ({"data_offsets": [2**70, 2**70 + SIZE]}, "expected a dtype"),
    "offset past the end": ({"data_offsets": [2**40, 2**40 + SIZE]}, "the file ends at"),
    "end before start": ({"data_offsets": [SIZE, 0]}, "before it starts"),
    "overlap": ({"data_offsets": [2, SIZE + 2]}, "overlap"),
    "too few bytes": ({"data_offsets": [0, SIZE - 2]}, f"has {SIZE - 2} bytes, expected {SIZE}"),
    "negative dimension": ({"shape": [-WIDTH, -HIDDEN]}, "-96"),
    "dimension in words": ({"shape": ["96", "64"]}, "'96'"),
    "shape in words": ({"shape": "96"}, "expected a dtype"),
    "huge dimensions": ({"shape": [2**62, 2**62]}, "bytes, expected"),
    "a thousand dimensions": ({"shape": [1] * 1000}, "expected a dtype"),
    "dtype that is a list": ({"dtype": ["BF16"]}, "expected a dtype"),
    "unknown dtype": ({"dtype": "Q9"}, "is Q9, expected one of F32, F16, BF16"),
    "float64": ({"dtype": "F64", "shape": [WIDTH, HIDDEN // 4]}, "is F64, expected one of F32, F16, BF16"),
    "8-bit floats": ({"dtype": "F8_E4M3", "shape": [2 * WIDTH, HIDDEN]}, "is F8_E4M3"),
    "another shape": ({"shape": [HIDDEN, WIDTH]}, f"has shape {HIDDEN, WIDTH}, config.json expects {WIDTH, HIDDEN}"),
    "another number of dimensions": ({"shape": [WIDTH * HIDDEN]}, f"config.json expects {WIDTH, HIDDEN}"),
    "no dimensions": ({"shape": [], "dtype": "I64", "data_offsets": [0, 8]}, NAME),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_safetensors_entry_that_lies_is_refused_by_name(case, model, refused):
    change, says = ENTRIES[case]
    path = model / "model.safetensors"
    header, data = header_of(path)
    if isinstance(change, dict):
        change = {key: value for key, value in (header[NAME] | change).items() if value is not None}
    write_raw(path, json.dumps(header | {NAME: change}).encode(), data)
    assert len(refused(*plan(model), says=(model, NAME, says))) == 1


def test_a_safetensors_file_that_was_cut_is_refused_by_its_size(model, refused):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(*plan(model), says=(path, "truncated", f"the file ends at {len(whole) - 1}"))


def test_a_tensor_in_two_shards_is_refused_with_both(family, tmp_path, refused):
    model = write_model(tmp_path / "model", KIND, shards=2)
    shards = sorted(model.glob("*.safetensors"))
    write_safetensors(shards[0], stored(shards[0]) | {NAME: stored(shards[1])[NAME]})
    refused(*plan(model), says=(NAME, shards[0], shards[1].name))


def stored(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        name: (dtype, tiny_models.encode(values, dtype)) for name, (dtype, values) in read_safetensors(path).items()
    }


def test_two_checkpoints_in_one_folder_are_refused(model, refused):
    (model / "model.safetensors").rename(model / "new.safetensors")
    shutil.copy(model / "new.safetensors", model / "old.safetensors")
    refused(*plan(model), says=("new.safetensors", "old.safetensors", "remove the stale weight file"))


def test_a_missing_shard_is_named(tmp_path, refused):
    model = write_model(tmp_path / "model", KIND, shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    refused(*plan(model), says=(model, "model-00002-of-00003.safetensors is missing", "3 expected"))


INDEXES = {
    "no weight_map": ({"metadata": {}}, "no weight_map"),
    "weight_map that is a list": ({"weight_map": []}, "no weight_map"),
    "a list": ([], "expected an object"),
    "shards that are no names": ({"weight_map": {NAME: {"a": 1}}}, "is missing"),
    "a shard outside the folder": ({"weight_map": {NAME: "../model.safetensors"}}, "../model.safetensors is missing"),
    "a tensor that no shard has": ({"weight_map": {"lm_head.weight": "model.safetensors"}}, "lists lm_head.weight"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_broken_index_is_refused(case, model, refused):
    content, says = INDEXES[case]
    write_json(model / "model.safetensors.index.json", content)
    assert len(refused(*plan(model), says=("model.safetensors.index.json", says))) == 1


@pytest.mark.parametrize("name", ["model.norm.weight", NAME])
def test_a_missing_tensor_is_named(name, model, refused):
    tensors = stored(model / "model.safetensors")
    del tensors[name]
    write_safetensors(model / "model.safetensors", tensors)
    refused(*plan(model), says=(model, "lack output_norm.weight" if "norm" in name else "lack blk.1.ffn_up.weight"))


def test_a_head_that_neither_exists_nor_is_tied_is_named(model, refused):
    change_config(model, tie_word_embeddings=False)
    refused(*plan(model), says=("lack output.weight",))


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.3.w1.weight", "model.norm.bias", "model.layers.0.mlp.gate_proj.weight_scale",
             "vision.patch.weight", f"model.layers.{'9' * 5000}.mlp.up_proj.weight", "weight"]
)  # fmt: skip
def test_a_tensor_that_no_llama_has_is_named(name, model, refused):
    path = model / "model.safetensors"
    write_safetensors(path, stored(path) | {name: ("F32", np.zeros((2, 2), np.float32))})
    refused(*plan(model), says=(name, "LlamaForCausalLM"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_how_to_convert_them(name, model, refused):
    (model / "model.safetensors").rename(model / name)
    refused(*plan(model), says=(name, "can run code", "safe_serialization=True"))


def test_a_folder_without_weights_is_refused(model, refused):
    (model / "model.safetensors").unlink()
    refused(*plan(model), says=(model, "no *.safetensors file"))


# --- config.json ---


def change_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def test_a_folder_without_config_is_refused(model, refused):
    (model / "config.json").unlink()
    refused(*plan(model), says=(model, "no config.json"))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"text"', "\0\0", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_a_config_that_is_no_json_object_is_refused(text, model, refused):
    (model / "config.json").write_text(text)
    assert len(refused(*plan(model), says=(model / "config.json",))) == 1


@pytest.mark.parametrize(
    "architectures", [["Qwen2ForCausalLM"], ["MixtralForCausalLM"], "GPT2", [], None, 5, [["a"]], {}]
)
def test_an_unknown_architecture_lists_what_is_supported(architectures, model, refused):
    change_config(model, architectures=architectures)
    refused(*plan(model), says=("LlamaForCausalLM", "MistralForCausalLM", "convert it to GGUF"))


COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size", "max_position_embeddings", "head_dim")  # fmt: skip


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", ["64", -1, 0, 1.5, True, [64], 2**40], ids=repr)
def test_a_count_that_is_none_is_named_with_its_value(key, value, model, refused):
    change_config(model, **{key: value})
    (line,) = refused(*plan(model))
    assert f"{key} is {value!r}, expected a positive" in line


def test_more_layers_than_there_are_weights_are_refused_at_once(model, refused):
    change_config(model, num_hidden_layers=2**31 - 1)
    refused(*plan(model), says=("lack blk.2.attn_norm.weight",))


CONFIGS = {
    "heads that do not divide": (
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        "num_attention_heads is 3",
        "64",
    ),
    "kv heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3", "which is 4"),
    "odd head_dim": ({"head_dim": 15}, "head_dim is 15", "even"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "expected 'silu'"),
    "activation of no name": ({"hidden_act": 3}, "hidden_act is 3", "expected 'silu'"),
    "epsilon in words": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'", "a positive number"),
    "epsilon past float32": ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e+300", "a positive number"),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta is -1.0", "a positive number"),
    "infinite theta": ({"rope_theta": float("inf")}, "rope_theta is inf", "a positive number"),
    "quantised weights": ({"quantization_config": {"quant_method": "gptq"}}, "quantised ('gptq')", "bf16, f16 or f32"),
    "quantised in words": ({"quantization_config": "awq"}, "quantised ('awq')", "bf16, f16 or f32"),
    "rope in words": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'", "an object"),
    "rope as a list": ({"rope_parameters": [1]}, "rope_parameters is [1]", "an object"),
    "rope of an unknown type": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'", "llama3 or yarn"),
    "rope of a type that is no name": ({"rope_scaling": {"type": [1], "factor": 2.0}}, "[1]", "llama3 or yarn"),
    "rope without a type": ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type is missing", "linear"),
    "rope without a factor": (
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling.factor is missing",
        "a positive number",
    ),
    "factor in words": (
        {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
        "rope_scaling.factor is '4'",
        "a positive",
    ),
    "factor of zero": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 0}},
        "rope_scaling.factor is 0",
        "a positive",
    ),
    "bands that cross": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor is 1.0",
        "which is 4.0",
    ),
    "context in words": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "9"}},
        "original_max_position_embeddings is '9'",
        "a positive integer",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_value_that_cannot_be_is_named_with_what_is_expected(case, model, refused):
    changes, *says = CONFIGS[case]
    change_config(model, **changes)
    (line,) = refused(*plan(model), says=(model, *says))
    assert "expected" in line


def test_every_fault_of_a_config_is_reported(model, refused):
    change_config(model, hidden_size="64", vocab_size=-5, rope_theta=None, hidden_act="relu", rms_norm_eps=0)
    lines = refused(*plan(model))
    assert len(lines) == 4
    for line, key in zip(lines, ("hidden_size", "vocab_size", "rms_norm_eps", "hidden_act"), strict=True):
        assert key in line


# --- GGUF ---

UINT32, UINT64, STRING, ARRAY = (int(GGUFValueType[name]) for name in ("UINT32", "UINT64", "STRING", "ARRAY"))
F32 = int(GGMLQuantizationType.F32)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", type) + payload


def number(key: str, value: int) -> bytes:
    return field(key, UINT32, struct.pack("<I", value))


def info(name: str, dims: tuple[int, ...], offset: int, type: int = F32, n_dims: int | None = None) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, type, offset)


ARCH = field("general.architecture", STRING, text("llama"))
TENSOR = info("a", (4, 4), 0)


def raw_gguf(fields=(ARCH,), infos=(TENSOR,), *, magic=b"GGUF", version=3, n_infos=None, n_fields=None, data=bytes(64)):
    """The bytes of a GGUF whose every count may lie; `data` is what follows the padded header."""
    counts = struct.pack("<IQQ", version, len(infos) if n_infos is None else n_infos,
                         len(fields) if n_fields is None else n_fields)  # fmt: skip
    header = magic + counts + b"".join(fields) + b"".join(infos)
    return header + bytes(-len(header) % 32) + data


RAW_GGUFS = {
    "empty": (b"", "0 bytes are too few"),
    "cut": (raw_gguf()[:20], "20 bytes are too few"),
    "no GGUF": (b"PK\3\4" + bytes(100), "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "version 1"),
    "version 4": (raw_gguf(version=4), "version 4"),
    "big-endian": (raw_gguf(version=3 << 24), "big-endian"),
    "2^63 tensors": (raw_gguf(n_infos=2**63), f"tensor count {2**63}"),
    "one tensor too many": (raw_gguf(n_infos=2), "corrupt"),
    "2^63 keys": (raw_gguf(n_fields=2**63), f"metadata count {2**63}"),
    "a key of 2^62 bytes": (raw_gguf([struct.pack("<Q", 2**62)]), f"claims {2**62} bytes"),
    "a string of 2^62 bytes": (raw_gguf([field("k", STRING, struct.pack("<Q", 2**62))]), f"claims {2**62} bytes"),
    "an array of 2^61 numbers": (raw_gguf([field("k", ARRAY, struct.pack("<IQ", UINT64, 2**61))]), "claims"),
    "an array of 2^61 strings": (raw_gguf([field("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]), f"{2**61} strings"),
    "an array of arrays": (raw_gguf([field("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "holds arrays"),
    "a value of type 99": (raw_gguf([field("k", 99, b"")]), "unknown type id 99"),
    "a key twice": (raw_gguf([number("k", 1), number("k", 2)]), "'k' occurs twice"),
    "0 dimensions": (raw_gguf(infos=[info("a", (), 0)]), "0 dimensions"),
    "9 dimensions": (raw_gguf(infos=[info("a", (1,) * 9, 0)]), "9 dimensions"),
    "2^32 dimensions": (raw_gguf(infos=[info("a", (1,), 0, n_dims=2**32 - 1)]), f"{2**32 - 1} dimensions"),
    "a dimension of 0": (raw_gguf(infos=[info("a", (4, 0), 0)]), "(0, 4)"),
    "2^63 × 2^63 weights": (raw_gguf(infos=[info("a", (2**63, 2**63), 0)]), "the file ends at"),
    "a tensor of type 99": (raw_gguf(infos=[info("a", (4,), 0, type=99)]), "unknown type id 99"),
    "half a block": (raw_gguf(infos=[info("a", (4, 4), 0, type=int(GGMLQuantizationType.Q4_K))]), "blocks of 256"),
    "past the end": (raw_gguf(infos=[info("a", (4, 4), 64)]), "the file ends at"),
    "2^63 past the end": (raw_gguf(infos=[info("a", (4, 4), 2**63)]), "the file ends at"),
    "overlap": (raw_gguf(infos=[TENSOR, info("b", (4, 4), 32)], data=bytes(96)), "'a' and 'b' overlap"),
    "a name twice": (raw_gguf(infos=[TENSOR, info("a", (4, 4), 64)], data=bytes(128)), "occur twice"),
    "alignment 0": (raw_gguf([ARCH, number("general.alignment", 0)]), "general.alignment is 0"),
    "alignment 48": (raw_gguf([ARCH, number("general.alignment", 48)]), "general.alignment is 48"),
    "alignment in words": (
        raw_gguf([ARCH, field("general.alignment", STRING, text("32"))]),
        "general.alignment is '32'",
    ),
    "architecture that is a number": (raw_gguf([number("general.architecture", 7)]), "general.architecture is 7"),
    "layers in words": (raw_gguf([ARCH, field("llama.block_count", STRING, text("two"))]), "block_count is 'two'"),
    "negative layers": (raw_gguf([ARCH, field("llama.block_count", 5, struct.pack("<i", -1))]), "block_count is -1"),
    "fractional width": (raw_gguf([ARCH, field("llama.embedding_length", 6, struct.pack("<f", 1.5))]), "is 1.5"),
    "no heads in an array": (
        raw_gguf([ARCH, field("llama.attention.head_count", ARRAY, struct.pack("<IQ", UINT32, 0))]),
        "head_count is []",
    ),
}


@pytest.mark.parametrize("case", RAW_GGUFS)
def test_a_gguf_header_that_lies_is_refused_by_every_command(case, tmp_path, refused):
    content, says = RAW_GGUFS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for argv in (plan(path), ["inspect", path], ["inspect", path, "--check"]):
        assert len(refused(*argv, says=(path, says))) == 1


def small_gguf(
    *, arch="llama", n_layer=1, drop=(), extra=(), tensors: dict[str, tuple[int, ...]] | None = None
) -> bytes:
    """A whole model of 8 tokens, hidden size 32 and FFN width 64, in zeros; shapes are numpy's."""
    shapes = {"token_embd.weight": (8, 32), "output_norm.weight": (32,)}
    for layer in range(n_layer):
        shapes |= {f"blk.{layer}.attn_norm.weight": (32,), f"blk.{layer}.ffn_gate.weight": (64, 32),
                   f"blk.{layer}.ffn_up.weight": (64, 32), f"blk.{layer}.ffn_down.weight": (32, 64)}  # fmt: skip
    shapes = {name: shape for name, shape in (shapes | (tensors or {})).items() if name not in drop}
    counts = {"block_count": n_layer, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 1}
    tokens = struct.pack("<IQ", STRING, 8) + b"".join(text(f"t{i}") for i in range(8))
    fields = [field("general.architecture", STRING, text(arch))]
    fields += [number(f"{arch}.{key}", value) for key, value in counts.items() if key not in drop]
    fields += [field("tokenizer.ggml.tokens", ARRAY, tokens)] * ("tokens" not in drop)
    infos, offset = [], 0
    for name, shape in shapes.items():
        infos.append(info(name, shape[::-1], offset))
        offset += 4 * int(np.prod(shape))
    return raw_gguf([*fields, *extra], infos, data=bytes(offset))


WHOLE_GGUFS = {
    "no architecture": (raw_gguf([]), "general.architecture"),
    "no layers": (small_gguf(drop=["block_count"]), "llama.block_count is missing"),
    "no FFN width": (small_gguf(drop=["feed_forward_length"]), "llama.feed_forward_length is missing"),
    "no heads": (small_gguf(drop=["attention.head_count"]), "llama.attention.head_count is missing"),
    "no embedding": (small_gguf(drop=["token_embd.weight"]), "token_embd.weight is missing"),
    "no up": (small_gguf(n_layer=2, drop=["blk.1.ffn_up.weight"]), "blk.1.ffn_up.weight is missing, expected (64, 32)"),
    "no layer": (small_gguf(n_layer=2, drop=["blk.1.attn_norm.weight"]), "layer 1 has an FFN and nothing else"),
    "no FFN at all": (raw_gguf([ARCH], [info("token_embd.weight", (4, 4), 0)]), "has no ffn_gate tensors"),
    "another width": (
        small_gguf(tensors={"blk.0.ffn_up.weight": (32, 32)}),
        "ffn_up.weight is (32, 32), expected (64, 32)",
    ),
    "an FFN without bias in one layer": (
        small_gguf(tensors={"blk.0.ffn_down.bias": (32,)}),
        "blk.0.ffn_gate.bias is missing",
    ),
    "a tensor that ggml cannot read": (
        small_gguf().replace(
            text("output_norm.weight") + struct.pack("<IQI", 1, 32, F32),
            text("output_norm.weight") + struct.pack("<IQI", 1, 32, 26),
        ),
        "output_norm.weight is I32",
    ),
    "a Mixture of Experts": (small_gguf(tensors={"blk.0.ffn_gate_inp.weight": (2, 32)}), "Mixture of Experts already"),
    "no tokenizer": (small_gguf(drop=["tokens"]), "0 tokens, expected one for each of 8"),
    "another tokenizer": (small_gguf(tensors={"token_embd.weight": (9, 32)}), "8 tokens, expected one for each of 9"),
    "an architecture without an MoE graph": (
        small_gguf(arch="qwen2"),
        "'qwen2' has no stock MoE graph for layout mixtral",
    ),
}


@pytest.mark.parametrize("case", WHOLE_GGUFS)
def test_a_gguf_that_is_no_whole_dense_model_is_refused(case, tmp_path, refused):
    content, says = WHOLE_GGUFS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert len(refused(*plan(path), says=(path, says))) == 1


def test_the_whole_gguf_of_these_tests_is_accepted(tmp_path):
    """So that the refusals above are for what they name."""
    path = tmp_path / "x.gguf"
    path.write_bytes(small_gguf(n_layer=2))
    assert main(plan(path)) == 0
    assert main([*plan(path), "--layout", "fused"]) == 0


def test_more_layers_than_a_gguf_has_are_refused_at_once(tmp_path, refused):
    path = tmp_path / "x.gguf"
    path.write_bytes(small_gguf().replace(number("llama.block_count", 1), number("llama.block_count", 2**32 - 1)))
    refused(*plan(path), says=("blk.1.ffn_gate.weight is missing",))


def test_a_mix_is_no_source(family, tmp_path, refused, capsys):
    mix = tmp_path / "moe.gguf"
    base = family(KIND).base
    assert main(["build", *sources(base, base, base), "--quant", "Q8_0", "-o", str(mix)]) == 0
    capsys.readouterr()
    refused(*plan(mix), says=(mix, "Mixture of Experts already"))


def test_a_missing_part_of_a_split_gguf_is_named(tmp_path, refused):
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(small_gguf())
    refused(*plan(part), says=("model-00002-of-00003.gguf and 1 more is missing", "all 3 shards"))


def test_a_split_gguf_that_holds_too_little_is_refused(tmp_path, refused):
    for i in (1, 2):
        (tmp_path / f"model-0000{i}-of-00002.gguf").write_bytes(
            small_gguf(extra=[number("split.tensors.count", 9)]) if i == 1 else raw_gguf(infos=[TENSOR])
        )
    refused(*plan(tmp_path / "model-00001-of-00002.gguf"), says=("hold 7 tensors, expected 9",))


def test_a_tensor_in_two_parts_of_a_split_gguf_is_named(tmp_path, refused):
    parts = [tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(small_gguf())
    refused(*plan(parts[0]), says=(parts[1], "token_embd.weight is in another shard too"))


@pytest.mark.parametrize(
    "argv", [["inspect"], ["inspect", "--check"], ["build", "--base"], ["chat", "-p", "hi"]], ids=str
)
def test_a_folder_called_gguf_is_refused(argv, tmp_path, refused):
    folder = tmp_path / "x.gguf"
    folder.mkdir()
    extra = ["--expert", f"a={folder}", "-o", tmp_path / "mix.gguf"] if argv[0] == "build" else []
    assert refused(*argv, folder, *extra, says=(folder,))


# --- sources that do not fit together ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 128}, ("hidden size 128", "has 64")),
        ({"num_hidden_layers": 3}, ("layers 3", "has 2")),
        ({"intermediate_size": 128}, ("FFN width 128", "has 96")),
    ],
)
def test_an_expert_of_another_shape_is_named_beside_the_base(changes, says, family, tmp_path, refused):
    base = family(KIND).base
    expert = write_model(tmp_path / "expert", KIND, **changes)
    (line,) = refused("build", *sources(base, base, expert), "-o", tmp_path / "mix.gguf", says=says)
    assert f"expert e1 ({expert})" in line
    assert f"the base {base}" in line


def test_all_experts_that_do_not_fit_are_reported_together(family, tmp_path, refused):
    base = family(KIND).base
    wide = write_model(tmp_path / "wide", KIND, intermediate_size=128, hidden_size=128)
    deep = write_model(tmp_path / "deep", KIND, num_hidden_layers=3)
    lines = refused("build", *sources(base, wide, base, deep), "-o", tmp_path / "mix.gguf")
    assert [("e0" in line, "e2" in line) for line in lines] == [(True, False), (True, False), (False, True)]


def test_all_sources_that_cannot_be_opened_are_reported_together(tmp_path, refused):
    refs = [tmp_path / "a", tmp_path / "b.gguf", "s3:bucket", "demo:nobody"]
    lines = refused("build", *sources(*refs), "-o", tmp_path / "mix.gguf")
    assert len(lines) == 4
    for line, says in zip(lines, [refs[0], refs[1], "s3:bucket", "'nobody'"], strict=True):
        assert str(says) in line


def test_a_name_that_looks_like_the_hubs_gets_a_hint(tmp_path, refused):
    refused(*plan(Path("org/model"))[:-2], tmp_path / "mix.gguf", "--dry-run", says=("no such file", "hf:org/model"))


def test_an_expert_with_another_activation_is_refused_by_name(family, tmp_path, refused):
    base = family(KIND).base
    expert = write_model(tmp_path / "expert", KIND, hidden_act="gelu")
    refused(
        "build", *sources(base, base, expert), "-o", tmp_path / "m.gguf", says=(expert, "'gelu'", "expected 'silu'")
    )


def test_experts_of_another_architecture_are_named_beside_the_base(tmp_path, refused):
    base, expert = tmp_path / "base.gguf", tmp_path / "expert.gguf"
    base.write_bytes(small_gguf())
    expert.write_bytes(small_gguf(arch="qwen2"))
    refused(*plan(base, base, expert), says=(f"expert e1 ({expert}): architecture 'qwen2'", base, "'llama'"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"drop": ["blk.1.ffn_up.weight", "blk.0.ffn_up.weight"]},
            "ffn_up.weight is missing, in the base (64, 32), and 1 more",
        ),
        ({"tensors": {"blk.0.ffn_up.weight": (32, 32)}}, "blk.0.ffn_up.weight is (32, 32), in the base (64, 32)"),
        ({"tensors": {"blk.0.ffn_up.bias": (64,)}}, "blk.0.ffn_up.bias is (64,), in the base missing"),
    ],
)
def test_an_expert_whose_ffn_differs_is_refused_by_tensor(change, says, tmp_path, refused):
    base, expert = tmp_path / "base.gguf", tmp_path / "expert.gguf"
    base.write_bytes(small_gguf(n_layer=2))
    expert.write_bytes(small_gguf(n_layer=2, **change))
    assert len(refused(*plan(base, base, expert), says=(f"expert e1 ({expert})", says))) == 1


# --- weights ---


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", [NAME, "model.layers.0.self_attn.o_proj.weight"])
def test_weights_that_are_nan_or_inf_are_counted_and_leave_nothing(name, quant, family, model, output, refused):
    path = model / "model.safetensors"
    tensors = stored(path)
    tensors[name][1].reshape(-1)[[5, 700, 701]] = [0x7FC0, 0x7F80, 0xFF80]  # NaN, Inf and -Inf in bf16
    write_safetensors(path, tensors)
    base = model if "attn" in name else family(KIND).base
    size = tensors[name][1].size
    says = (path, name, f"3 of {size} weights are NaN or Inf")
    assert len(refused("build", *sources(base, base, model), "--quant", quant, "-o", output, says=says)) == 1


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_a_nan_block_scale_in_a_gguf_is_found_though_its_bytes_are_copied(
    quant, family, tmp_path, output, refused, capsys
):
    source = tmp_path / "source.gguf"
    base = family(KIND).base
    assert main(["build", *sources(base, base), "--layout", "fused", "--quant", quant, "-o", str(source)]) == 0
    capsys.readouterr()
    at = read_header(source).tensors["blk.1.ffn_up.weight"]
    with source.open("r+b") as file:
        file.seek(at.offset + at.nbytes // 2)
        file.write(b"\xff\xff\xff\xff")
    n = 1 if quant == "F32" else 32
    says = (source, "blk.1.ffn_up.weight", f"{n} of {WIDTH * HIDDEN} weights are NaN or Inf")
    refused("build", *sources(source, source), "--quant", quant, "-o", output, says=says)


def test_in_the_shell_too_nan_is_one_line_and_nothing_else(model, output):
    """No warning of numpy stands beside it."""
    path = model / "model.safetensors"
    tensors = stored(path)
    tensors[NAME][1][3, :5] = 0x7F80
    tensors[NAME][1][4, :5] = 0xFF80
    write_safetensors(path, tensors)
    command = [sys.executable, "-m", "moegguf", "build", *sources(model, model), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{PREFIX}{path}: {NAME}: 10 of {WIDTH * HIDDEN} weights are NaN or Inf; ")
    assert done.stderr.count("\n") == 1
    assert not output.exists()


def test_weights_too_large_for_a_type_are_named(model, output, refused):
    path = model / "model.safetensors"
    tensors = stored(path)
    tensors[NAME] = ("F32", np.full((WIDTH, HIDDEN), 1e6, np.float32))
    write_safetensors(path, tensors)
    refused("build", *sources(model, model), "--quant", "F16", "-o", output, says=(NAME, "too large for F16"))


# --- paths ---


def test_a_missing_output_folder_is_named(family, tmp_path, refused):
    base = family(KIND).base
    path = tmp_path / "no" / "such" / "mix.gguf"
    refused("build", *sources(base, base), "-o", path, says=(path.parent, "no such folder"))


def test_a_folder_as_output_is_refused(family, tmp_path, refused):
    base = family(KIND).base
    (tmp_path / "mix.gguf").mkdir()
    refused("build", *sources(base, base), "-o", tmp_path / "mix.gguf", "--force", says=("is a folder",))


def test_an_existing_file_stays_without_force(family, output, refused):
    output.write_text("precious")
    base = family(KIND).base
    refused("build", *sources(base, base), "-o", output, says=(output, "exists already", "--force"))
    assert output.read_text() == "precious"


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "hardlink"])
@pytest.mark.parametrize("role", ["base", "expert"])
def test_a_source_is_never_overwritten(role, link, family, gguf, tmp_path, refused):
    target = gguf
    if link:
        target = tmp_path / "link.gguf"
        link(gguf, target)
    base = gguf if role == "base" else family(KIND).base
    refused("build", *sources(base, gguf), "-o", target, "--force", says=(target, "is also a source", gguf))


@pytest.mark.parametrize(
    "path", ["x" * 300 + ".gguf", "x" * 5000 + "/m.gguf", "~nobody-of-this-name/mix.gguf"], ids=len
)
def test_a_path_that_cannot_be_is_refused(path, family, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = family(KIND).base
    says = (path.split("/")[0][:200],)
    refused("build", *sources(base, base), "-o", path, says=says)
    refused(*plan(Path(path))[:-2], "m.gguf", "--dry-run", says=says)
    refused("inspect", path, says=says)


def test_a_path_with_a_zero_byte_is_refused(family, tmp_path, refused):
    recipes = tmp_path / "r.toml"
    recipes.write_text(
        '[mix.a]\nbase = "a\\u0000b"\noutput = "a\\u0000b.gguf"\nexperts = [{name = "x", source = "a\\u0000"}]'
    )
    assert len(refused("build", "a", "--recipes", recipes)) == 3


@contextlib.contextmanager
def open_to_all() -> Iterator[Path]:
    """A folder outside pytest's private ones, that any user may read."""
    folder = Path(tempfile.mkdtemp(prefix="moegguf-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind: root is not bound."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture(scope="module")
def forbidden() -> Iterator[Path]:
    """A model whose weights only its owner may read, and a folder that only its owner may write to."""
    with open_to_all() as folder:
        write_model(folder / "model", KIND)
        write_model(folder / "locked", KIND)
        (folder / "model.gguf").write_bytes(small_gguf())
        (folder / "folder").mkdir(mode=0o555)
        (folder / "free").mkdir()
        (folder / "free").chmod(0o777)
        for name in ("locked/model.safetensors", "model.gguf"):
            (folder / name).chmod(0)
        yield folder
        (folder / "folder").chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("what", ["weights", "gguf", "output", "inspect"])
def test_permissions_that_lack_are_one_line(what, forbidden, capsys):
    model, free, locked = forbidden / "model", forbidden / "free" / "mix.gguf", forbidden / "folder" / "mix.gguf"
    argv, path = {
        "weights": (
            ["build", *sources(forbidden / "locked", model), "-o", free],
            forbidden / "locked/model.safetensors",
        ),
        "gguf": (["build", *sources(forbidden / "model.gguf", model), "-o", free], forbidden / "model.gguf"),
        "output": (["build", *sources(model, model), "-o", locked], locked.parent),
        "inspect": (["inspect", forbidden / "model.gguf"], forbidden / "model.gguf"),
    }[what]
    assert main(["build", *sources(model, model), "-o", str(free), "--dry-run"]) == 0
    before = tree(forbidden)
    capsys.readouterr()
    with unprivileged():
        code = main([*map(str, argv)])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith(f"{PREFIX}{path}")
    assert "Permission denied" in err or "may not be written to" in err
    assert err.count("\n") == 1
    assert tree(forbidden) == before


def test_too_little_disk_is_known_before_the_first_byte(family, output, refused, monkeypatch):
    base = family(KIND).base
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused("build", *sources(base, base), "-o", output, says=(output.parent, "1.00 kB are free", "the mix needs"))


def test_a_disk_that_is_full_before_the_end_leaves_nothing(family, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the midst of the tensors."""
    base = family(KIND).base
    limit = 100_000
    done = subprocess.run(
        [sys.executable, "-m", "moegguf", "build", *sources(base, base), "--quant", "F32", "-o", tmp_path / "mix.gguf"],
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"{PREFIX}{tmp_path / 'mix.gguf'}: cannot be written (File too large)")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_known_before_the_first_byte(family, tmp_path, refused):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    try:
        base = family(KIND).base
        refused("build", *sources(base, base), "-o", small / "mix.gguf", says=(small, "65.54 kB are free"))
    finally:
        subprocess.run(["umount", small], check=True)


# --- quantisation and tokenizers ---


QUANTS = {
    "row length": (["--quant-role", "experts=Q4_K"], ("ffn_down_exps.weight", "multiple of 256", "have 96")),
    "row length by pattern": (["--quant-tensor", r"attn_q=Q6_K"], ("attn_q.weight", "multiple of 256", "have 64")),
    "unknown preset": (["--quant", "Q4_K_XL"], ("'Q4_K_XL'", "Q4_K_M")),
    "unknown type": (["--quant-role", "attn=Q4_K_M"], ("quant.attn", "'Q4_K_M'", "Q4_K,")),
    "unknown role": (["--quant-role", "ffn=Q8_0"], ("quant.ffn", "embed, output, attn, experts")),
    "bad pattern": (["--quant-tensor", "blk.(=Q8_0"], ("quant.tensors", "'blk.('", "regular expression")),
    "pattern without a type": (["--quant-tensor", "blk"], ("--quant-tensor blk: expected REGEX=TYPE",)),
    "role without a type": (["--quant-role", "attn="], ("--quant-role attn=: expected ROLE=TYPE",)),
}


@pytest.mark.parametrize("case", QUANTS)
def test_a_quantisation_that_cannot_be_had_is_refused(case, family, output, refused):
    flags, says = QUANTS[case]
    base = family(KIND).base
    refused("build", *sources(base, base), "-o", output, *flags, says=says)


@pytest.mark.parametrize("quant", ["IQ2_XS", "iq1_s", "Q2_K_S"])
def test_a_preset_below_three_bits_needs_an_imatrix(quant, family, output, refused):
    base = family("llama3_like").base
    refused(
        "build", *sources(base, base), "-o", output, "--quant", quant, says=("blk.0.", "importance matrix", "--imatrix")
    )


@pytest.mark.parametrize("content", [b"", b"imatrix", raw_gguf(), small_gguf()], ids=["empty", "dat", "gguf", "model"])
def test_an_imatrix_that_is_none_is_refused(content, family, output, tmp_path, refused):
    base, path = family(KIND).base, tmp_path / "im.gguf"
    path.write_bytes(content)
    refused("build", *sources(base, base), "-o", output, "--imatrix", path, says=(path,))


def test_a_missing_imatrix_is_named(family, output, tmp_path, refused):
    base = family(KIND).base
    refused("build", *sources(base, base), "-o", output, "--imatrix", tmp_path / "absent", says=(tmp_path / "absent",))


def change_tokenizer(model: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    write_json(model / "tokenizer.json", content)


def unigram(content: dict) -> None:
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}


def own_split(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}


def test_a_kind_of_tokenizer_that_llama_cpp_lacks_is_named(model, refused):
    change_tokenizer(model, unigram)
    refused(*plan(model), says=(model / "tokenizer.json", "Unigram"))


def test_a_splitting_rule_that_is_unknown_is_shown_with_the_way_out(model, refused):
    change_tokenizer(model, own_split)
    refused(*plan(model), says=(model / "tokenizer.json", "x+", "--pre"))


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_named(model, refused):
    refused(*plan(model), "--pre", "qwen99", says=("--pre qwen99", "qwen2"))


def test_a_folder_without_tokenizer_is_refused(model, refused):
    (model / "tokenizer.json").unlink()
    refused(*plan(model), says=(model, "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000], ids=repr)
def test_a_tokenizer_that_is_broken_is_refused(text, model, refused):
    (model / "tokenizer.json").write_text(text[:100_000])
    refused(*plan(model), says=(model / "tokenizer.json",))


def test_tokens_without_an_embedding_row_are_named(tmp_path, refused):
    model = write_model(tmp_path / "model", KIND, vocab_size=VOCAB - 20)
    refused(*plan(model), says=(model, f"{VOCAB - 20} embedding rows"))


# --- chat and inspect ---


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused_before_the_model_is_read(prompt, tmp_path, refused):
    refused("chat", tmp_path / "absent.gguf", "--prompt", prompt, says=("prompt is empty",))


def test_a_gguf_that_is_no_mix_is_inspected_and_said_to_be_none(tmp_path, capsys):
    path = tiny_gguf.write_gguf(tmp_path / "plain.gguf", tiny_gguf.saying("abc"))
    assert main(["inspect", str(path)]) == 0
    assert "not made by moegguf" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_mix"] is False
    assert report["card"] is None
    assert report["architecture"] == "llama"


def test_text_of_a_file_cannot_steer_the_terminal(tmp_path, capsys, refused):
    hostile = "[/bold]\x1b[2J\r\n"
    path = tmp_path / "x.gguf"
    path.write_bytes(small_gguf(extra=[field("general.name", STRING, text(hostile))]))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "[/bold]\\x1b[2J\\r\\n" in out
    assert "\x1b" not in out
    path.write_bytes(raw_gguf(infos=[info(hostile, (4, 0), 0)]))
    assert len(refused("inspect", path)) == 1


# --- damage at random ---


def damaged(random_: random.Random, content: bytes, header_size: int) -> bytes:
    """A copy with a few bytes of its header flipped, overwritten or moved, or with its end cut off."""
    data = bytearray(content)
    if random_.random() < 0.1:
        return bytes(data[: random_.randrange(len(data))])
    for _ in range(random_.choice((1, 1, 2, 8))):
        at = random_.randrange(header_size)
        kind = random_.randrange(4)
        if kind == 0:
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at] = random_.choice((0, 1, 9, 0x22, 0x2D, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            data[at : at + 8] = random_.choice((b"\xff" * 8, bytes(8), (2**40).to_bytes(8, "little")))
        else:
            size, start = random_.randrange(1, 24), random_.randrange(header_size)
            data[at : at + size] = data[start : start + size]
    return bytes(data)


def outcomes(commands: Callable[[random.Random], list[str]], n: int, capsys) -> set[int]:
    """Exit codes of `n` runs on damaged files; a run that raises anything fails the test by itself."""
    random_, codes = random.Random(0), set()
    for _ in range(n):
        code = main(commands(random_))
        err = capsys.readouterr().err
        assert code in (0, 1) or all(line.startswith(PREFIX) for line in err.splitlines()), err
        codes.add(code)
    return codes


@contextlib.contextmanager
def limited_memory(n_bytes: int) -> Iterator[None]:
    """At most `n_bytes` more than now: a length that is believed becomes a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
def test_a_gguf_damaged_at_random_is_read_or_refused(tmp_path, capsys):
    content = small_gguf(n_layer=2)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    header_size = min(info.offset for info in read_header(path).tensors.values())

    def command(random_: random.Random) -> list[str]:
        path.write_bytes(damaged(random_, content, header_size))
        layout = random_.choice(["mixtral", "fused", "shared"])
        return random_.choice(
            [[*plan(path), "--layout", layout], ["inspect", str(path)], ["inspect", str(path), "--check"]]
        )

    with limited_memory(1 << 30):
        assert outcomes(command, 400, capsys) == {0, 1, 2}


@needs_proc
def test_a_mix_damaged_at_random_is_inspected_or_refused(tmp_path, capsys):
    card = tiny_gguf.card(router="noisy", k=1, names=("a", "b"))
    path = tiny_gguf.write_gguf(tmp_path / "x.gguf", tiny_gguf.saying("abc"), card=card)
    content = path.read_bytes()
    header_size = min(info.offset for info in read_header(path).tensors.values())
    ours = content.index(b"moegguf.format_version"), content.index(b"output_norm.weight")

    def command(random_: random.Random) -> list[str]:
        start, end = ours
        path.write_bytes(content[:start] + damaged(random_, content[start:], end - start))
        return ["inspect", str(path), *random_.choice([["--check"], ["--json"]])]

    assert header_size > ours[1]
    with limited_memory(1 << 30):
        assert outcomes(command, 150, capsys) == {0, 1, 2}


@needs_proc
def test_safetensors_and_configs_damaged_at_random_are_read_or_refused(model, capsys):
    weights, config = model / "model.safetensors", model / "config.json"
    originals = {path: path.read_bytes() for path in (weights, config)}
    sizes = {weights: 8 + int.from_bytes(originals[weights][:8], "little"), config: len(originals[config]) - 32}

    def command(random_: random.Random) -> list[str]:
        for path, content in originals.items():
            path.write_bytes(content)
        path = random_.choice([weights, config])
        path.write_bytes(damaged(random_, originals[path], sizes[path]))
        return plan(model)

    with limited_memory(1 << 30):
        assert outcomes(command, 300, capsys) >= {2}


def test_every_config_value_may_be_anything(model, capsys):
    original = json.loads((model / "config.json").read_text())
    values = ["x", "", [], {}, [[1]], True, 0, -1, 1.5, float("nan"), 10**30, {"a": {}}]
    for key in (*original, "rope_parameters", "rope_scaling", "quantization_config"):
        for value in values:
            (model / "config.json").write_text(json.dumps(original | {key: value}))
            assert main(plan(model)) in (0, 2), (key, value)
    assert "Traceback" not in capsys.readouterr().err
