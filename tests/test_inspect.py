"""`moegguf inspect`: what it says equals the recipe, and --check finds whatever was broken since the build."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType, GGUFWriter

from conftest import build_mix, read_tensors
from moegguf.cli import main
from moegguf.gguf_header import read_header
from moegguf.metadata import read_card
from moegguf.quant import ggml

KIND = "llama3_like"  # rows of 256: every type applies
N_LAYER, N_EMBD, N_FF = 2, 256, 512
WEIGHTED = [0.5, 0.25, 0.25]
MIXES = {
    "mixtral": {},
    "fused": {"layout": "fused"},
    "shared": {"layout": "shared"},
    "weighted": {"weights": WEIGHTED},
    "weighted fused": {"layout": "fused", "weights": WEIGHTED},
    "two precisions": {"quants": ["Q8_0", "Q4_K_M", "Q4_K_M"]},
    "noisy": {"router": {"mode": "noisy", "k": 2, "std": 0.05, "seed": 7}},
    "noisy, k = 1": {"router": {"mode": "noisy", "k": 1}},
    "noisy, k = N": {"router": {"mode": "noisy", "k": 3, "seed": 2**32 - 1}},
    "always on": {"router": {"mode": "noisy", "k": 2}, "always_on": "e1"},
}


@pytest.fixture(scope="module")
def mix(family, tmp_path_factory) -> Callable[..., Path]:
    """`mix(label, quant="Q8_0")`: the mix of MIXES, built once; not to be changed."""
    folder, built = tmp_path_factory.mktemp("mixes"), {}

    def build(label: str, quant: str = "Q8_0") -> Path:
        if (label, quant) not in built:
            models, table = family(KIND), dict(MIXES[label])
            experts = [{"source": path} for path in models.experts]
            for key, column in (("weight", table.pop("weights", None)), ("quant", table.pop("quants", None))):
                experts = [e | ({key: column[i]} if column else {}) for i, e in enumerate(experts)]
            path = folder / f"{len(built)}.gguf"
            built[label, quant] = build_mix(path, models.base, experts, quant=quant, **table)
        return built[label, quant]

    return build


@pytest.fixture
def inspected(capsys) -> Callable[..., dict]:
    """`inspected(path, *flags, code=0)`: the JSON of the command."""

    def run(path: Path, *flags: str, code: int = 0) -> dict:
        assert main(["inspect", str(path), "--json", *flags]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def faults(inspected, mix, tmp_path) -> Callable[..., list[str]]:
    """`faults(label, quant, change)`: what --check says of a mix after `change(path)` broke a copy of it."""

    def check(label: str, quant: str, change: Callable[[Path], None]) -> list[str]:
        path = tmp_path / "broken.gguf"
        path.write_bytes(mix(label, quant).read_bytes())
        change(path)
        return inspected(path, "--check", code=1)["faults"]

    return check


# --- what it says ---


def test_the_facts_of_a_gateless_mix_are_its_recipes(inspected, mix):
    report = inspected(mix("weighted"))
    assert report["is_mix"] is True
    assert (report["architecture"], report["n_layer"], report["n_embd"], report["n_ctx"]) == (
        "llama",
        N_LAYER,
        N_EMBD,
        1024,
    )
    assert (report["n_expert"], report["n_expert_used"], report["quant"]) == (3, 3, "Q8_0")
    assert report["has_chat_template"] is True
    card = report["card"]
    assert (card["router"], card["layout"], card["k"], card["quant"], card["base"]) == (
        "gateless", "mixtral", 3, "Q8_0", "base",
    )  # fmt: skip
    assert (card["std"], card["seed"], card["always_on"]) == (None, None, None)
    assert [tuple(expert.values()) for expert in card["experts"]] == [
        ("e0", "e1", 0.5, "Q8_0", ""), ("e1", "e2", 0.25, "Q8_0", ""), ("e2", "e3", 0.25, "Q8_0", ""),
    ]  # fmt: skip


def test_the_facts_of_a_noisy_mix_are_its_recipes(inspected, mix):
    report = inspected(mix("noisy"))
    card = report["card"]
    assert (report["n_expert"], report["n_expert_used"]) == (3, 2)
    assert (card["router"], card["k"], card["seed"], card["always_on"]) == ("noisy", 2, 7, None)
    assert card["std"] == pytest.approx(0.05)


def test_the_facts_of_an_always_on_mix_are_its_recipes(inspected, mix):
    report = inspected(mix("always on"))
    assert (report["architecture"], report["n_expert"], report["n_expert_used"]) == ("granitemoe", 2, 1)
    assert (report["card"]["layout"], report["card"]["k"], report["card"]["always_on"]) == ("shared", 2, "e1")


@pytest.mark.parametrize(
    ("label", "arch", "stacked"), [("mixtral", "llama", 3), ("fused", "llama", 0), ("shared", "granitemoe", 1)]
)
def test_every_layout_is_told_by_its_own_name(label, arch, stacked, inspected, mix):
    report = inspected(mix(label))
    assert (report["card"]["layout"], report["architecture"], report["n_expert"]) == (label, arch, stacked)
    assert (report["card"]["router"], report["card"]["k"], len(report["card"]["experts"])) == ("gateless", 3, 3)


@pytest.mark.parametrize("label", MIXES)
def test_the_groups_add_up_to_the_file(label, inspected, mix):
    report = inspected(mix(label))
    stored = read_tensors(mix(label))
    groups = {group["name"]: group for group in report["groups"]}
    assert sum(group["bytes"] for group in groups.values()) == sum(len(tensor.data) for tensor in stored.values())
    assert report["weights"] == sum(int(np.prod(tensor.shape)) for tensor in stored.values())
    assert sum(sum(group["types"].values()) for group in groups.values()) == len(stored)
    ffn = sum(groups[name]["weights"] for name in ("routed experts", "shared experts", "dense FFN") if name in groups)
    assert ffn == 3 * N_LAYER * 3 * N_EMBD * N_FF


def test_the_types_of_every_group_are_counted(inspected, mix):
    groups = {group["name"]: group["types"] for group in inspected(mix("two precisions"))["groups"]}
    assert groups["routed experts"] == {"Q4_K": 5, "Q6_K": 1}
    assert groups["shared experts"] == {"Q8_0": 6}
    assert groups["router"] == {"F32": N_LAYER}


@pytest.mark.parametrize("label", MIXES)
def test_the_words_name_every_expert_and_its_router(label, mix, capsys):
    assert main(["inspect", str(mix(label))]) == 0
    out = capsys.readouterr().out
    router = MIXES[label].get("router", {"mode": "gateless"})
    assert all(f"e{i}" in out for i in range(3))
    assert f"{router['mode']}: " in out
    if router["mode"] == "noisy":
        assert f"{router['k']} of 3 experts" in out
        assert f"seed {router.get('seed', 0)}" in out
    assert ("e1 always on" in out) == (label == "always on")


# --- that what is sound is called so ---


@pytest.mark.parametrize("label", MIXES)
def test_a_fresh_mix_is_sound(label, inspected, mix):
    assert inspected(mix(label), "--check")["faults"] == []


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q5_1", "Q2_K", "Q4_K_M"])
@pytest.mark.parametrize("label", ["mixtral", "fused", "shared"])
def test_a_fresh_mix_of_any_type_is_sound(label, quant, inspected, mix):
    assert inspected(mix(label, quant), "--check")["faults"] == []


def test_a_sound_file_is_said_to_be_sound(mix, capsys):
    assert main(["inspect", str(mix("mixtral")), "--check"]) == 0
    assert "check: sound" in capsys.readouterr().out


# --- that what is broken is found ---


def overwrite(name: str, data: bytes, *, at: float | int = 0) -> Callable[[Path], None]:
    """Put `data` into tensor `name`; `at` counts bytes, or is a share of the tensor where it is a fraction."""

    def change(path: Path) -> None:
        info = read_header(path).tensors[name]
        start = at if isinstance(at, int) else round(at * info.nbytes)
        assert start + len(data) <= info.nbytes
        with path.open("r+b") as file:
            file.seek(info.offset + start)
            file.write(data)

    return change


def empty_slice(name: str, i: int, n: int) -> Callable[[Path], None]:
    """Fill the i-th of n equal pieces of a tensor with zero bytes."""

    def change(path: Path) -> None:
        size = read_header(path).tensors[name].nbytes // n
        overwrite(name, bytes(size), at=i * size)(path)

    return change


def empty_columns(name: str, i: int, n: int) -> Callable[[Path], None]:
    """Set the i-th of n bands of columns to the weight zero, as its type stores it."""

    def change(path: Path) -> None:
        tensor = read_tensors(path)[name]
        values = tensor.values.copy()
        width = tensor.shape[1] // n
        values[:, i * width : (i + 1) * width] = 0
        overwrite(name, ggml.quantise(tensor.type, values).tobytes())(path)

    return change


EMPTY = {
    "a stacked expert": ("mixtral", empty_slice("blk.1.ffn_up_exps.weight", 2, 3), "blk.1.ffn_up_exps.weight[2]"),
    "a stacked expert behind a router": (
        "noisy",
        empty_slice("blk.0.ffn_down_exps.weight", 0, 3),
        "blk.0.ffn_down_exps.weight[0]",
    ),
    "rows of a fused expert": ("fused", empty_slice("blk.0.ffn_gate.weight", 1, 3), "blk.0.ffn_gate.weight[1]"),
    "columns of a fused expert": ("fused", empty_columns("blk.1.ffn_down.weight", 2, 3), "blk.1.ffn_down.weight[2]"),
    "rows of a shared expert": (
        "shared",
        empty_slice("blk.0.ffn_up_shexp.weight", 1, 2),
        "blk.0.ffn_up_shexp.weight[1]",
    ),
    "columns of a shared expert": (
        "shared",
        empty_columns("blk.0.ffn_down_shexp.weight", 0, 2),
        "blk.0.ffn_down_shexp.weight[0]",
    ),
    "an always-on expert": ("always on", empty_slice("blk.0.ffn_up_shexp.weight", 0, 1), "blk.0.ffn_up_shexp.weight"),
    "the embedding": ("mixtral", empty_slice("token_embd.weight", 0, 1), "token_embd.weight"),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("quant", ["Q8_0", "F32"])
def test_an_empty_expert_is_found_wherever_it_is_stored(case, quant, faults):
    label, change, where = EMPTY[case]
    assert faults(label, quant, change) == [f"{where} is empty: it holds only zeros"]


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_an_expert_of_weight_zero_is_found_though_its_bytes_are_not(quant, faults):
    """A block of zeros is not always all zero bytes: Q4_0 stores 8 for it."""
    name = "blk.0.ffn_gate_exps.weight"

    def change(path: Path) -> None:
        tensor = read_tensors(path)[name]
        values = tensor.values.copy()
        values[1] = 0
        rows = values.reshape(-1, tensor.shape[-1])
        overwrite(name, ggml.quantise(tensor.type, rows).tobytes())(path)

    assert faults("mixtral", quant, change) == [f"{name}[1] is empty: it holds only zeros"]


NAN16 = b"\xff\x7f"
NOT_FINITE = {
    "F32": (b"\0\0\x80\x7f", 4),
    "F16": (b"\0\xfc", 2),
    "BF16": (b"\xc0\x7f", 2),
    "Q8_0": (NAN16, 34),
    "Q4_0": (NAN16, 18),
    "Q4_K_S": (NAN16, 144),
    "Q6_K": (NAN16, 210),
}  # quant: bytes of a NaN or Inf, and bytes of a block


@pytest.mark.parametrize("quant", NOT_FINITE)
def test_a_scale_that_is_nan_or_inf_is_found_in_its_expert(quant, faults):
    value, block = NOT_FINITE[quant]
    name = "blk.1.ffn_up_exps.weight"
    skip = 208 if quant == "Q6_K" else 0  # where its scale lies in a block

    def change(path: Path) -> None:
        n_blocks = read_header(path).tensors[name].nbytes // block
        overwrite(name, value, at=(n_blocks // 2) * block + skip)(path)

    assert faults("mixtral", quant, change) == [f"{name}[1] holds NaN or Inf"]


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.attn_q.weight"])
def test_a_nan_in_the_trunk_is_found(name, faults):
    assert faults("fused", "F32", overwrite(name, b"\xff\xff\xff\xff", at=40)) == [f"{name} holds NaN or Inf"]


ROUTERS = {
    "a gate-less router that prefers": ("mixtral", overwrite("blk.1.ffn_gate_inp.weight", b"\0\0\x80\x3f"), "gateless"),
    "one of the shared layout": ("shared", overwrite("blk.0.ffn_gate_inp.weight", b"\1\0\0\0", at=80), "gateless"),
    "a noisy router of one other weight": ("noisy", overwrite("blk.1.ffn_gate_inp.weight", b"\0\0\x80\x3f"), "noisy"),
    "a noisy router of zeros": ("noisy", empty_slice("blk.1.ffn_gate_inp.weight", 0, 1), "noisy"),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_a_router_that_its_mode_does_not_make_is_found(case, faults):
    label, change, mode = ROUTERS[case]
    (fault,) = faults(label, "Q8_0", change)
    assert f"is not the router of mode {mode}" in fault


@pytest.mark.parametrize("n", [1, 31, 32, 1000])
def test_bytes_after_the_last_tensor_are_found(n, faults):
    def change(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"\1" * n)

    assert faults("mixtral", "Q8_0", change) == [f"the file has {n} bytes after its last tensor"]


def rekeyed(
    change_keys: Callable[[dict], None], change_tensors: Callable[[dict], None] = lambda tensors: None
) -> Callable[[Path], None]:
    """Write the file again with other metadata or tensors: bytes are sound, but say something else."""

    def change(path: Path) -> None:
        header = read_header(path)
        keys = {key: header.value(key) for key in header.fields}
        tensors = read_tensors(path)
        change_keys(keys)
        change_tensors(tensors)
        writer = GGUFWriter(path, keys.pop("general.architecture").value)
        for key, value in keys.items():
            writer.add_key_value(key, value.value, value.type, value.sub_type)
        for name, tensor in tensors.items():
            row = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
            is_float = tensor.type == GGMLQuantizationType.F32
            writer.add_tensor(name, tensor.values if is_float else row, raw_dtype=None if is_float else tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return change


def set_key(key: str, value: object) -> Callable[[Path], None]:
    def change(keys: dict) -> None:
        keys[key] = replace(keys[key], value=value)

    return rekeyed(change)


def drop_tensor(name: str) -> Callable[[Path], None]:
    return rekeyed(lambda keys: None, lambda tensors: tensors.pop(name) and None)


def test_writing_a_file_again_breaks_nothing(mix, inspected, tmp_path):
    """So that the faults below are those of the change."""
    path = tmp_path / "again.gguf"
    path.write_bytes(mix("shared").read_bytes())
    rekeyed(lambda keys: None)(path)
    assert inspected(path, "--check")["faults"] == []


KEYS = {
    "fewer run than gate-less needs": (
        "mixtral",
        set_key("llama.expert_used_count", 2),
        ["2 stacked and 0 fused", "k is 3"],
    ),
    "more run than k": ("noisy", set_key("llama.expert_used_count", 3), ["3 stacked and 0 fused", "k is 2"]),
    "k of the shared layout": (
        "shared",
        set_key("granitemoe.expert_used_count", 0),
        ["0 stacked and 2 fused", "k is 3"],
    ),
    "another k": ("noisy", set_key("moegguf.router.k", 1), ["2 stacked and 0 fused", "k is 1"]),
    "another seed": (
        "noisy",
        set_key("moegguf.router.seed", 8),
        ["blk.0.ffn_gate_inp.weight is not the router of mode noisy"],
    ),
    "a seed that cannot be": ("noisy", set_key("moegguf.router.seed", 2**40), [f"seed {2**40}"]),
    "another std": ("noisy", set_key("moegguf.router.std", 0.06), ["is not the router of mode noisy"]),
    "noise that is said to be none": ("noisy", set_key("moegguf.router", "gateless"), ["gateless", "2 of 3"]),
    "an unknown router": ("noisy", set_key("moegguf.router", "nosy"), ["router mode 'nosy' is unknown"]),
    "an unknown layout": ("mixtral", set_key("moegguf.layout", "mixed"), ["layout 'mixed' is unknown"]),
    "another layout": ("mixtral", set_key("moegguf.layout", "fused"), ["blk.0.ffn_gate.weight and 5 more: missing"]),
    "fewer experts than stacked": (
        "mixtral",
        set_key("llama.expert_count", 2),
        ["2 stacked and 0 fused experts, but 3"],
    ),
    "fewer layers": ("mixtral", set_key("llama.block_count", 3), ["blk.2.ffn_gate_inp.weight and 3 more: missing"]),
    "very many layers": ("mixtral", set_key("llama.block_count", 2**32 - 1), ["missing"]),
    "a missing stack": ("mixtral", drop_tensor("blk.1.ffn_up_exps.weight"), ["blk.1.ffn_up_exps.weight: missing"]),
    "a missing router": ("noisy", drop_tensor("blk.0.ffn_gate_inp.weight"), ["blk.0.ffn_gate_inp.weight: missing"]),
    "a missing shared expert": (
        "shared",
        drop_tensor("blk.0.ffn_down_shexp.weight"),
        ["blk.0.ffn_down_shexp.weight: missing"],
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_metadata_and_tensors_that_contradict_each_other_are_found(case, faults):
    label, change, says = KEYS[case]
    found = "\n".join(faults(label, "Q8_0", change))
    assert all(fragment in found for fragment in says), found


def test_every_fault_is_named(mix, tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    path.write_bytes(mix("mixtral", "F32").read_bytes())
    overwrite("blk.0.ffn_gate_inp.weight", b"\0\0\x80\x3f")(path)
    empty_slice("blk.0.ffn_up_exps.weight", 0, 3)(path)
    overwrite("blk.1.ffn_down_exps.weight", b"\0\0\xc0\x7f", at=0.75)(path)
    with path.open("ab") as file:
        file.write(b"more")
    assert main(["inspect", str(path), "--check"]) == 1
    out = capsys.readouterr().out
    lines = [line.removeprefix("fault: ") for line in out.splitlines() if line.startswith("fault: ")]
    assert lines == [
        "the file has 4 bytes after its last tensor",
        "blk.0.ffn_up_exps.weight[0] is empty: it holds only zeros",
        "blk.1.ffn_down_exps.weight[2] holds NaN or Inf",
        "blk.0.ffn_gate_inp.weight is not the router of mode gateless",
    ]
    assert out.rstrip().endswith("check: 4 faults")


# --- keys of ours that are damaged ---


def mistyped(key: str, value: object, type: GGUFValueType) -> Callable[[Path], None]:
    def change(keys: dict) -> None:
        keys[key] = GGUFValue(value, type)

    return rekeyed(change)


CARDS = {
    "a newer format": (set_key("moegguf.format_version", 99), "mix format 99, this moegguf knows 1"),
    "a missing key": (rekeyed(lambda keys: keys.pop("moegguf.layout") and None), "moegguf.layout is missing"),
    "lists of different length": (set_key("moegguf.expert.weights", [0.5, 0.5]), "no lists of equal length"),
    "a list that is none": (mistyped("moegguf.expert.names", "abc", GGUFValueType.STRING), "no lists of equal length"),
    "k in words": (mistyped("moegguf.router.k", "3", GGUFValueType.STRING), "moegguf.router.k is '3', expected UINT32"),
    "a name that is a number": (
        mistyped("moegguf.name", 3, GGUFValueType.UINT32),
        "moegguf.name is 3, expected STRING",
    ),
}


@pytest.mark.parametrize("case", CARDS)
@pytest.mark.parametrize("flags", [[], ["--check"], ["--json"]], ids=str)
def test_damaged_keys_of_a_mix_are_one_line_and_exit_code_2(case, flags, mix, tmp_path, capsys):
    change, says = CARDS[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(mix("mixtral").read_bytes())
    change(path)
    assert main(["inspect", str(path), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moegguf: error: {path}: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_stock_moe_that_is_no_mix_is_checked_as_far_as_that_goes(mix, tmp_path, inspected):
    def forget(keys: dict) -> None:
        for key in [key for key in keys if key.startswith("moegguf.")]:
            del keys[key]

    path = tmp_path / "stock.gguf"
    path.write_bytes(mix("mixtral", "F32").read_bytes())
    rekeyed(forget)(path)
    assert read_card(read_header(path)) is None
    report = inspected(path, "--check")
    assert (report["is_mix"], report["n_expert"], report["faults"]) == (False, 3, [])
    empty_slice("blk.0.ffn_up_exps.weight", 1, 3)(path)
    found = inspected(path, "--check", code=1)["faults"]
    assert found == ["blk.0.ffn_up_exps.weight[1] is empty: it holds only zeros"]
