"""LoRA adapters as sources: equal to what PEFT merges, and refused by name where they are no ordinary LoRA.

On weights of a grid, where float32 sums are exact in every order, equal means to the byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from conftest import build_dense, build_mix, read_tensors, rewrite
from hub_server import TOKEN, HubServer
from moegguf.cli import main
from moegguf.demo import ADAPTERS, MODELS, adapter_folder, folder
from moegguf.demo.text import examples
from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.sources import OpenOptions, open_source
from moegguf.tensor import Source
from peft_adapters import (
    ATTENTION,
    FFN,
    anywhere,
    change_config,
    change_tensors,
    ends_with,
    linear_shapes,
    merged_by_peft,
    write_adapter,
    write_tensors,
)
from tiny_models import write_model

KIND = "tied"  # the smallest: two layers, hidden size 64, FFN width 96, 4 heads of which 2 for k and v
PREFIX = "base_model.model.model.layers."


@pytest.fixture
def base(family) -> Path:
    return family(KIND).base


@pytest.fixture
def peft():
    """The tests that compare with PEFT need it; the others do not."""
    return pytest.importorskip("peft")


def lora(adapter: Path, over: object) -> Source:
    return open_source(f"lora:{adapter}::{over}")


def values(source: Source) -> dict[str, np.ndarray]:
    """Every tensor as float32, read whole."""
    return {
        name: ggml.dequantise(tensor.type, tensor.read_rows(0, tensor.n_rows), tensor.n_cols)
        for name, tensor in source.tensors.items()
    }


def stored(source: Source) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in values(source).items()}


def changed(source: Source, below: Source) -> set[str]:
    before, after = stored(below), stored(source)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


# ------------------------------------------------------------------------------------------- equal to PEFT


ALL = (*FFN, *ATTENTION)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 8, "rank": lambda module: 8},
        {"lora_alpha": 5.5, "dtype": "BF16"},
        {"infix": "default."},
        {"modules": ends_with(*ALL), "target_modules": list(ALL)},
        {"modules": ends_with(*ALL), "target_modules": "all-linear"},
        {"modules": ends_with("k_proj", "up_proj"), "target_modules": ["up_proj", "k_proj"]},
        {
            "rank": lambda module: 2 if "0.mlp.gate" in module else 6 if "down" in module else 4,
            "rank_pattern": {"layers.0.mlp.gate_proj": 2, "down_proj": 6, "proj": 4},
            "alpha_pattern": {r"layers\.[1-9]\.mlp\..*": 3, "^model.layers.0.mlp.up_proj": 9, "gate": 99},
        },
        {
            "use_rslora": True,
            "rank": lambda module: 3 if "up" in module else 4,
            "rank_pattern": {"mlp.up_proj": 3},
            "alpha_pattern": {"up_proj": 7},
        },
        {"modules": lambda module: "layers.1.mlp" in module, "layers_to_transform": [1]},
        {
            "modules": lambda module: "layers.0.mlp" in module,
            "layers_to_transform": 0,
            "layers_pattern": "(layers|h)",
            "exclude_modules": ["q_proj"],
        },
        {"modules": ends_with("gate_proj", "up_proj"), "target_modules": r".*\.mlp\.(gate|up)_proj"},
        {"modules": ends_with("gate_proj", "up_proj"), "exclude_modules": r".*down.*"},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_gives_the_bytes_that_peft_merges(peft, base, tmp_path, settings):
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    source = lora(adapter, base)
    assert stored(source) == stored(open_source(str(merged_by_peft(tmp_path / "merged", base, adapter))))
    assert changed(source, open_source(str(base))) == set(source.lora.deltas) != set()


@pytest.mark.parametrize("kind", ["mistral_like", "llama3_like"])
def test_attention_rows_follow_the_rotary_order_of_every_head_layout(peft, family, tmp_path, kind):
    base = family(kind).base
    adapter = write_adapter(
        tmp_path / "adapter", base, modules=ends_with(*ATTENTION), target_modules=list(ATTENTION), lora_alpha=7
    )
    merged = open_source(str(merged_by_peft(tmp_path / "merged", base, adapter)))
    assert stored(lora(adapter, base)) == stored(merged)


@pytest.mark.parametrize("r", [1, 7, 16, 200])
def test_off_the_grid_only_the_last_bits_depend_on_who_adds_up(peft, base, tmp_path, r):
    adapter = write_adapter(tmp_path / "adapter", base, r=r, rank=lambda module: r, draw=anywhere)
    merged = values(open_source(str(merged_by_peft(tmp_path / "merged", base, adapter))))
    for name, ours in values(lora(adapter, base)).items():
        np.testing.assert_allclose(ours, merged[name], rtol=0, atol=np.spacing(np.float32(np.abs(ours).max())))


def test_an_adapter_that_peft_itself_has_saved_merges_to_the_same_bytes(peft, base, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.copy_(torch.randint(-8, 9, weight.shape, generator=random) / 8)
    model.save_pretrained(tmp_path / "adapter")
    source = lora(tmp_path / "adapter", base)
    assert stored(source) == stored(open_source(str(merged_by_peft(tmp_path / "merged", base, tmp_path / "adapter"))))
    assert len(source.lora.deltas) == len(linear_shapes(base))


def test_a_mix_of_two_adapters_is_the_mix_of_the_two_merged_models(peft, base, tmp_path):
    adapters = (
        write_adapter(tmp_path / "a", base, lora_alpha=3, seed=1),
        write_adapter(tmp_path / "b", base, r=2, rank=lambda module: 2, lora_alpha=16, use_rslora=True, seed=2),
    )
    merged = [merged_by_peft(tmp_path / f"merged-{adapter.name}", base, adapter) for adapter in adapters]
    ours = build_mix(tmp_path / "ours.gguf", base, [f"lora:{adapter}" for adapter in adapters])
    theirs = build_mix(tmp_path / "theirs.gguf", base, merged)
    assert read_tensors(ours) == read_tensors(theirs)


def test_adapters_stack_from_right_to_left(peft, base, tmp_path):
    first = write_adapter(tmp_path / "first", base, seed=1)
    second = write_adapter(tmp_path / "second", base, modules=ends_with("up_proj", "q_proj"),
                           target_modules=["up_proj", "q_proj"], seed=2)  # fmt: skip
    stacked = open_source(f"lora:{second}::lora:{first}::{base}")
    merged = open_source(str(merged_by_peft(tmp_path / "merged", base, first, second)))
    assert stored(stacked) == stored(merged)
    assert stacked.lora.over.lora.over.label == base.name


# ------------------------------------------------------------------------------------ over what, and read how


def test_an_adapter_over_a_fine_tune_changes_the_fine_tune(family, tmp_path):
    models = family(KIND)
    adapter = write_adapter(tmp_path / "adapter", models.base)
    over_base, over_expert = lora(adapter, models.base), lora(adapter, models.experts[0])
    below = values(open_source(str(models.experts[0])))
    deltas = over_expert.lora.deltas
    assert stored(over_base) != stored(over_expert)
    for name, array in values(over_expert).items():
        expected = below[name] + product(deltas[name]) if name in deltas else below[name]
        assert array.tobytes() == expected.tobytes()


def product(delta) -> np.ndarray:
    a, b = (ggml.dequantise(t.type, t.read_rows(0, t.n_rows), t.n_cols) for t in (delta.a, delta.b))
    return b @ a * np.float32(delta.scale)


def test_over_a_gguf_is_as_over_the_folder_that_it_was_made_of(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, modules=ends_with(*ALL), target_modules=list(ALL))
    gguf = build_dense(tmp_path / "base.gguf", base)
    assert stored(lora(adapter, gguf)) == stored(lora(adapter, base))


def test_over_a_quantised_gguf_the_change_goes_on_top_of_its_decoded_weights(family, tmp_path):
    base = family("llama3_like").base
    adapter = write_adapter(tmp_path / "adapter", base)
    gguf = build_dense(tmp_path / "base.gguf", base, quant="Q4_K_M")
    source, below = lora(adapter, gguf), values(open_source(str(gguf)))
    for name, delta in source.lora.deltas.items():
        assert below[name].shape == source.tensors[name].shape
        assert source.tensors[name].type is Type.F32
        assert values(source)[name].tobytes() == (below[name] + product(delta)).tobytes()


def test_q_and_k_of_an_architecture_without_rotary_pairs_keep_their_order(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, modules=ends_with("q_proj"), target_modules=["q_proj"])
    llama = build_dense(tmp_path / "llama.gguf", base)
    qwen = rewrite(llama, tmp_path / "qwen.gguf", arch="qwen2")
    of_llama, of_qwen = (next(iter(lora(adapter, path).lora.deltas.values())).b for path in (llama, qwen))
    in_order = of_qwen.read_rows(0, 64).reshape(4, 2, 8, -1)
    assert of_llama.read_rows(0, 64).tobytes() == in_order.swapaxes(1, 2).tobytes()


def test_q_and_k_of_an_unknown_architecture_are_refused_and_its_ffn_is_not(base, tmp_path):
    dense = build_dense(tmp_path / "llama.gguf", base)
    unknown = rewrite(dense, tmp_path / "unknown.gguf", arch="plamo")
    adapter = write_adapter(tmp_path / "q", base, modules=ends_with("q_proj"), target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight.*another order in architecture 'plamo' \(and 1 more"):
        lora(adapter, unknown)
    assert lora(write_adapter(tmp_path / "ffn", base), unknown).lora.deltas


def test_rows_are_the_same_however_they_are_asked_for(base, tmp_path):
    settings = {"modules": ends_with(*ALL), "target_modules": list(ALL), "r": 64, "rank": lambda module: 64}
    source = lora(write_adapter(tmp_path / "adapter", base, draw=anywhere, **settings), base)
    for name in source.lora.deltas:
        tensor = source.tensors[name]
        whole = tensor.read_rows(0, tensor.n_rows)
        for step in (1, 5, 32):
            starts = range(0, tensor.n_rows, step)
            parts = [tensor.read_rows(start, min(start + step, tensor.n_rows)) for start in starts]
            assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_everything_that_the_adapter_leaves_alone_is_the_model_below(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    source, below = lora(adapter, base), open_source(str(base))
    assert changed(source, below) == {name for name in below.tensors if ".ffn_" in name and "norm" not in name}
    assert list(source.tensors) == list(below.tensors)
    assert source.metadata == below.metadata
    assert source.read_vocab() == below.read_vocab()
    assert source.label == "lora:adapter::base"
    assert {file.name for file in source.files} == {
        "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
    }  # fmt: skip


def test_paths_are_relative_to_the_recipe_and_the_base_is_the_recipes(base, tmp_path):
    write_adapter(tmp_path / "adapter", base)
    shutil.copytree(base, tmp_path / "model")
    options = OpenOptions(folder=tmp_path, base="model")
    assert stored(open_source("lora:adapter", options)) == stored(open_source("lora:adapter::model", options))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_the_demo_family_goes_over_its_base(name):
    short, long = open_source(f"demo:{name}"), open_source(f"lora:demo:{name}::demo:base")
    assert short.label == long.label == f"lora:demo:{name}::demo:base"
    assert stored(short) == stored(long)
    assert changed(short, open_source("demo:base")) == set(short.lora.deltas)


# ------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process for which `hub` is the Hub: huggingface_hub reads its environment when it is imported."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def read_from_hub(ref: str, stream: bool) -> tuple[str, dict[str, bytes]]:
    source = open_source(ref, OpenOptions(stream=stream))
    return source.label, stored(source)


def build_from_hub(*argv: object) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in argv])
    return code, err.getvalue()


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_on_the_hub_is_read_at_its_commit_and_nothing_else_is_fetched(hub, client, base, tmp_path, stream):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "optimizer.bin").write_bytes(b"a pickle")
    repo = f"org/adapter-{stream}"
    commit = hub.push(repo, adapter)
    hub.requests.clear()
    label, tensors = client(read_from_hub, f"lora:hf:{repo}@main::{base}", stream)
    assert label == f"lora:hf:{repo}@{commit}::{base.name}"
    assert tensors == stored(lora(adapter, base))
    fetched = {request.file for request in hub.requests if f"/{repo}/" in request.path and request.sent}
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file for file in fetched if "." in file} == wanted
    assert all(bool(request.range) is stream for request in hub.large_reads())


def test_a_repo_of_the_hub_that_holds_no_adapter_is_refused(hub, client, base, tmp_path):
    hub.push("org/model", base)
    code, err = client(
        build_from_hub, "build", "--base", base, "--expert", "e=lora:hf:org/model", "-o", tmp_path / "mix.gguf"
    )
    assert code == 2
    assert "lora:hf:org/model: has no adapter_config.json" in err
    code, err = client(
        build_from_hub, "build", "--base", base, "--expert", "e=lora:hf:org/none", "-o", tmp_path / "mix.gguf"
    )
    assert code == 2
    assert "lora:hf:org/none" in err and "no model of that name" in err


# ----------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(capsys, tmp_path, base) -> Callable[..., list[str]]:
    """`refused(source)`: build with this expert, which must fail and write nothing; its lines, without the prefix."""

    def run(source: object, over: Path = base) -> list[str]:
        output = tmp_path / "out" / "mix.gguf"
        output.parent.mkdir(exist_ok=True)
        code = main(["build", "--base", str(over), "--expert", f"e={source}", "-o", str(output)])
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert "Traceback" not in out + err
        assert list(output.parent.iterdir()) == []
        lines = err.splitlines()
        assert lines
        assert all(line.startswith("moegguf: error: ") and "; " in line for line in lines), err
        return [line.removeprefix("moegguf: error: ") for line in lines]

    return run


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "use_dora is True, DoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"bias": "all"}, "bias is 'all', it has trained biases"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save is ['embed_tokens', 'lm_head']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_something_new": 0.5}, "use_something_new is 0.5, a field that is not known"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which is for a changed base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": 3}, "init_lora_weights is 3"),
        ({"r": 0}, "r is 0, expected a positive integer"),
        ({"r": "4"}, "r is '4', expected a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"rank_pattern": {"up_proj": 1.5}}, "rank_pattern is {'up_proj': 1.5}"),
        ({"alpha_pattern": ["up_proj"]}, "alpha_pattern is ['up_proj']"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"target_modules": "*"}, "target_modules is '*', no regular expression"),
        ({"target_modules": {"up_proj": 1}}, "expected names of modules"),
        ({"layers_pattern": ["(?P<idx>x)"]}, "layers_pattern is ['(?P<idx>x)'], no regular expression"),
        ({"layers_to_transform": ["one"]}, "expected numbers of layers"),
        ({"r": 5}, "config.json gives it rank 5 (and 5 more)"),
        ({"rank_pattern": {"down_proj": 8}}, "model.layers.0.mlp.down_proj has A (4, 96) and B (64, 4)"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "layers.0.mlp.down_proj has tensors, but adapter_config.json"),
        ({"layers_to_transform": [0]}, "layers.1.mlp.gate_proj has tensors, but adapter_config.json does not target"),
        ({"exclude_modules": ["up_proj"]}, "layers.0.mlp.up_proj has tensors"),
    ],
    ids=str,
)
def test_a_config_that_is_not_of_an_ordinary_lora_is_refused_by_name(refused, adapter, fields, says):
    change_config(adapter, **fields)
    (line,) = refused(f"lora:{adapter}")
    assert says in line


def test_all_faults_of_a_config_are_told_at_once(refused, adapter):
    change_config(adapter, use_dora=True, bias="all", r=-1)
    assert len(refused(f"lora:{adapter}")) == 3


def add(name: str, like: str | None = None) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[name] = tensors.pop(like) if like else np.ones((2, 2), np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add(PREFIX + "0.mlp.up_proj.lora_magnitude_vector"), "lora_magnitude_vector is of DoRA"),
        (add("base_model.model.model.embed_tokens.lora_embedding_A"), "lora_embedding_A changes an embedding"),
        (add("base_model.model.model.embed_tokens.weight"), "embed_tokens.weight is of a module that was trained"),
        (add("base_model.model.lm_head.weight"), "lm_head.weight is of a module that was trained whole"),
        (add(PREFIX + "0.mlp.up_proj.lora_B.bias"), "lora_B.bias is a bias of the adapter"),
        (add(PREFIX + "0.mlp.up_proj.base_layer.bias"), "is a trained bias"),
        (add(PREFIX + "0.mlp.up_proj.lora_diag"), "is of a kind of LoRA that is not known"),
        (lambda tensors: tensors.pop(PREFIX + "0.mlp.up_proj.lora_B.weight"), "has lora_A and no lora_B"),
        (lambda tensors: tensors.pop(PREFIX + "1.mlp.up_proj.lora_A.weight"), "has lora_B and no lora_A"),
        (add(PREFIX + "0.mlp.up_proj.lora_A.default.weight"), "are the same tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_are_not_of_an_ordinary_lora_are_named(refused, adapter, change, says):
    change_tensors(adapter, change)
    (line,) = refused(f"lora:{adapter}")
    assert says in line


def test_every_kind_of_fault_is_told_once_with_the_number_of_others(refused, adapter):
    def change(tensors: dict) -> None:
        for name in list(tensors):
            if ".0.mlp.gate" in name or ".0.mlp.up" in name:
                tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
        del tensors[PREFIX + "0.mlp.down_proj.lora_A.weight"]

    change_tensors(adapter, change)
    lone, unmatched = refused(f"lora:{adapter}")
    assert "model.layers.0.mlp.down_proj has lora_B and no lora_A" in lone
    assert "model.layers.7.mlp.gate_proj (blk.7.ffn_gate.weight) matches no linear layer" in unmatched
    assert "(and 1 more)" in unmatched


def test_modules_that_no_model_here_has_are_named(refused, adapter):
    change_tensors(
        adapter,
        lambda tensors: tensors.update(
            {f"{PREFIX}0.mlp.experts.3.w1.lora_{side}.weight": np.ones((4, 4)) for side in "AB"}
        ),
    )
    (line,) = refused(f"lora:{adapter}")
    assert "model.layers.0.mlp.experts.3.w1 matches no linear layer" in line


def test_an_adapter_for_another_base_is_refused_with_both_shapes(refused, tmp_path):
    other = write_model(tmp_path / "wider", KIND, intermediate_size=128)
    (line,) = refused(f"lora:{write_adapter(tmp_path / 'adapter', other)}")
    assert "is for another base" in line and "(128, 64)" in line and "(96, 64)" in line and "(and 5 more)" in line


def test_an_adapter_on_a_tied_output_is_named(refused, adapter):
    change_config(adapter, target_modules=[*FFN, "lm_head"])
    change_tensors(
        adapter, lambda tensors: tensors.update({f"lm_head.lora_{side}.weight": np.ones((4, 4)) for side in "AB"})
    )
    (line,) = refused(f"lora:{adapter}")
    assert "lm_head (output.weight) matches no linear layer" in line


def test_weights_that_are_not_finite_are_named_with_the_adapter(refused, adapter):
    def change(tensors: dict) -> None:
        tensors[PREFIX + "1.mlp.up_proj.lora_B.weight"][3, 2] = np.inf

    change_tensors(adapter, change)
    (line,) = refused(f"lora:{adapter}")
    assert "up_proj" in line and "with adapter" in line and "NaN or Inf" in line


def test_pickled_adapters_are_refused_and_stay_closed(refused, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (line,) = refused(f"lora:{adapter}")
    assert "pickled weights (adapter_model.bin)" in line


def test_a_folder_that_is_no_adapter_is_refused(refused, adapter, base, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refused(f"lora:{base}")[0]
    assert "has no adapter_config.json" in refused(f"lora:{tmp_path / 'empty'}")[0]
    assert "no such folder" in refused(f"lora:{tmp_path / 'nowhere'}")[0]
    assert "write lora:hf:org/name" in refused("lora:org/name")[0]
    assert "no adapter 'poetry'" in refused("lora:demo:poetry")[0]
    assert "expected a PEFT adapter" in refused("lora:")[0]
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(f"lora:{adapter}")[0]


def test_an_adapter_is_no_model_and_says_how_to_use_it(refused, adapter):
    (line,) = refused(adapter)
    assert "is a PEFT adapter" in line and f"write lora:{adapter}" in line


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100000])
def test_a_broken_config_is_refused(refused, adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    (line,) = refused(f"lora:{adapter}")
    assert "adapter_config.json" in line


def test_broken_weights_are_refused(refused, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "corrupt or truncated" in refused(f"lora:{adapter}")[0]
    write_tensors(adapter, {})
    assert "holds no tensors" in refused(f"lora:{adapter}")[0]


def test_a_dtype_without_ggml_type_is_refused(refused, adapter):
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    assert "is I32, expected one of F32" in refused(f"lora:{adapter}")[0]


def test_an_adapter_over_nothing_is_refused(refused, adapter):
    (line, *_) = refused("demo:math", over=f"lora:{adapter}")
    assert "names no model that the adapter goes over" in line and "::SOURCE" in line
    with pytest.raises(UserError, match="names no model"):
        open_source(f"lora:{adapter}")


def test_a_base_of_another_name_is_no_fault(base, adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere/else"
    assert lora(adapter, base).lora.over.label == base.name


# ----------------------------------------------------------------------------------------- the demo family


def test_the_demo_adapters_are_those_that_family_json_records_and_are_small():
    recorded = json.loads((MODELS / "family.json").read_text())["adapters"]["sha256"]
    files = {name: (adapter_folder(name) / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}
    assert recorded == {name: sha256(content).hexdigest() for name, content in files.items()}
    assert all(len(content) < 400_000 for content in files.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_demo_adapter_merged_into_the_base_answers_held_out_questions_of_its_domain(peft, name):
    train = pytest.importorskip("moegguf.demo.train")
    asked = examples(name.removeprefix("lora-"), "heldout", 60, seed=2)
    tokenizer = train.Tokenizer.from_file(str(folder("base") / "tokenizer.json"))
    with_adapter, without = train.load_adapter(MODELS, name), train.load_member(folder("base"))
    assert train.exact_match(with_adapter, tokenizer, asked) > 0.94
    assert train.exact_match(without, tokenizer, asked) < 0.9


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_source_of_a_demo_adapter_is_what_peft_merges(peft, tmp_path, name):
    merged = values(open_source(str(merged_by_peft(tmp_path / "merged", folder("base"), adapter_folder(name)))))
    for tensor, ours in values(open_source(f"demo:{name}")).items():
        np.testing.assert_allclose(ours, merged[tensor], rtol=0, atol=np.spacing(np.float32(np.abs(ours).max())))
