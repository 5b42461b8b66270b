"""Other people's programs load what a build writes: all three layouts, and the same words where they generate.

`scripts/test` installs node-llama-cpp (a llama.cpp of its own) and the Hub's parser where npm is. llama.cpp's server is
asked in test_serve.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from conftest import CLOSE, distance, logits
from moegguf.assembly import build, plan_build
from moegguf.gguf_header import read_header
from moegguf.recipe import parse_recipe
from moegguf.runtime.batch import generate_greedy
from moegguf.runtime.model import RunOptions, open_model

CLIENTS = Path(__file__).parent / "clients"
PROMPT, N_TOKENS = "<|user|>What is 6 times 7?<|assistant|>", 8
LAYOUTS = ("mixtral", "fused", "shared")

needs_node = pytest.mark.skipif(
    not shutil.which("node") or not (CLIENTS / "node_modules").is_dir(),
    reason="scripts/test installs the clients where npm is",
)


@pytest.fixture(scope="module")
def mixes(tmp_path_factory) -> dict[str, Path]:
    """Layout → the demo family's mathematician and clinician, averaged."""
    folder = tmp_path_factory.mktemp("clients")
    experts = [{"name": name, "source": f"demo:{name}"} for name in ("math", "clinic")]
    table = {"base": "demo:base", "experts": experts, "quant": "F32"}

    def built(layout: str) -> Path:
        output = {"layout": layout, "output": str(folder / f"{layout}.gguf")}
        return build(plan_build(parse_recipe("mix", table | output, where="test:", folder=folder)), threads=1).plan.path

    return {layout: built(layout) for layout in LAYOUTS}


def run_node(script: str, *arguments: object) -> list[dict]:
    """What a script of `CLIENTS` prints: a JSON object a line."""
    command = ["node", str(CLIENTS / script), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@needs_node
def test_node_llama_cpp_goes_on_as_our_runner_does(mixes):
    ours = []
    for path in mixes.values():
        with open_model(path, RunOptions(threads=1)) as model:
            ((_, tokens),) = generate_greedy(model, [model.vocab.tokenize(PROMPT)], N_TOKENS, lambda token: False)
            ours.append(b"".join(map(model.vocab.piece, tokens)).decode())
    assert ours[0].startswith("6 * 7 =")
    assert [said["text"] for said in run_node("greedy.mjs", PROMPT, N_TOKENS, *mixes.values())] == ours


@needs_node
def test_the_hubs_parser_finds_every_tensor_and_weight(mixes):
    for path, found in zip(mixes.values(), run_node("header.mjs", *mixes.values()), strict=True):
        header = read_header(path)
        assert found["arch"] == header.get("general.architecture")
        assert found["tensors"] == {
            name: [list(info.shape[::-1]), int(info.type)] for name, info in header.tensors.items()
        }
        assert found["parameterCount"] == sum(prod(info.shape) for info in header.tensors.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ggufs_dump_script_prints_every_key_and_tensor(layout: str, mixes):
    command = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--json", str(mixes[layout])]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    header = read_header(mixes[layout])
    assert set(header.fields) <= set(found["metadata"])
    assert {name: tensor["type"] for name, tensor in found["tensors"].items()} == {
        name: info.type.name for name, info in header.tensors.items()
    }


def test_transformers_computes_a_fused_mix_as_llama_cpp_does(mixes):
    """It knows no experts in files of architecture `llama`, and no `granitemoe`: the other layouts are not for it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = mixes["fused"]
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = (3, 5, 8, 13, 21, 34)
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert distance(theirs, logits(path, tokens)) < CLOSE
