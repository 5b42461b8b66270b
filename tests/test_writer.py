"""The writer names what it cannot write, leaves nothing of it, and needs little memory however large the model is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from conftest import Family, build_dense, build_mix, make_recipe, read_tensors
from moegguf import writer
from moegguf.assembly import build, plan_build
from moegguf.errors import UserError
from moegguf.gguf_header import read_header

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a warning would be a second line for the user

DOWN = "model.layers.1.mlp.down_proj.weight"
N_DOWN = 64 * 96
BAD = {"nan": [np.nan], "inf": [np.inf], "several": [np.nan, 1.0, -np.inf, np.inf]}


@pytest.fixture(scope="module")
def models(family) -> Family:
    return family("tied")


def with_values(folder: Path, target: Path, name: str, values: list[float]) -> Path:
    """A copy of a model whose tensor `name` begins with `values`."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = tiny_models.read_safetensors(path)
    np.put(tensors[name][1], range(len(values)), values)
    stored = {key: (dtype, tiny_models.encode(array, dtype)) for key, (dtype, array) in tensors.items()}
    tiny_models.write_safetensors(path, stored)
    return target


@pytest.mark.parametrize("values", BAD.values(), ids=BAD)
@pytest.mark.parametrize("quant", ["F32", "BF16", "Q4_K_M"])
def test_weights_that_are_no_numbers_are_named_and_counted(quant: str, values, models: Family, tmp_path: Path):
    broken = with_values(models.experts[1], tmp_path / "broken", DOWN, values)
    count = len(values) - values.count(1.0)
    says = f"{broken / 'model.safetensors'}: {DOWN}: {count} of {N_DOWN} weights are NaN or Inf"
    with pytest.raises(UserError, match=re.escape(says)):
        build_mix(tmp_path / "mix.gguf", models.base, [models.experts[0], broken], quant=quant)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", DOWN])
def test_they_are_found_wherever_they_are(name: str, layout: str, models: Family, tmp_path: Path):
    """In rows that are reordered, in vectors, in stacks and in rows that stand side by side."""
    broken = with_values(models.base, tmp_path / "broken", name, [np.nan])
    with pytest.raises(UserError, match=re.escape(f"{name}: 1 of ")):
        build_mix(tmp_path / "mix.gguf", broken, [models.experts[0], broken], layout=layout)


def test_the_old_file_survives_a_build_that_fails(models: Family, tmp_path: Path):
    broken = with_values(models.base, tmp_path / "broken", DOWN, [np.nan])
    target = tmp_path / "mix.gguf"
    target.write_bytes(b"old")
    with pytest.raises(UserError, match="NaN"):
        build(plan_build(make_recipe(target, broken, [broken]), overwrite=True))
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("layout", ["mixtral", "fused"])
@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0"])
def test_weights_too_large_for_their_type_are_named(quant: str, layout: str, models: Family, tmp_path: Path):
    """BF16 reaches 3e38, an F16 weight or block scale 65504. Two experts side by side in a row are told apart."""
    huge = with_values(models.experts[0], tmp_path / "huge", DOWN, [1e30])
    says = f"{huge / 'model.safetensors'}: {DOWN}: holds weights too large for {quant}"
    with pytest.raises(UserError, match=re.escape(says)):
        build_mix(tmp_path / "mix.gguf", models.base, [models.experts[1], huge], quant=quant, layout=layout)
    assert not (tmp_path / "mix.gguf").exists()


@pytest.mark.parametrize("quant", ["Q3_K_S", "IQ4_XS", "IQ3_S"])
def test_weights_whose_squares_overflow_are_refused_before_ggml_sees_them(quant: str, family, tmp_path: Path):
    """It would store noise, or end the process."""
    models = family("tied", intermediate_size=256)
    huge = with_values(models.experts[0], tmp_path / "huge", DOWN, [1e30])
    flags = ["--base", str(models.base), "--expert", f"huge={huge}", "--quant", quant, "-o", str(tmp_path / "mix.gguf")]
    ended = subprocess.run(
        [sys.executable, "-m", "moegguf", "build", *flags],
        capture_output=True, text=True, timeout=60, env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert ended.returncode == 2
    assert f"{DOWN}: holds weights too large for " in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "mix.gguf").exists()


def test_a_factor_that_overflows_is_named(models: Family, tmp_path: Path):
    """3e38 fits into F32, and three times its share of 2.7 does not."""
    huge = with_values(models.experts[0], tmp_path / "huge", DOWN, [3e38])
    experts = [{"source": models.base, "weight": 0.1}, {"source": huge, "weight": 0.9}]
    with pytest.raises(UserError, match=re.escape(f"{DOWN}: holds weights too large for F32")):
        build_mix(tmp_path / "mix.gguf", models.base, experts)


def test_sums_that_overflow_are_no_fault(models: Family, tmp_path: Path):
    """Each weight is a number, and that is all that counts."""
    huge = with_values(models.experts[0], tmp_path / "huge", DOWN, [3e38, 3e38])
    assert build_mix(tmp_path / "mix.gguf", models.base, [huge], quant="BF16").exists()
    assert build_mix(tmp_path / "other.gguf", models.base, [huge], quant="F32").exists()


@pytest.mark.parametrize("quant", ["F32", "BF16"])
def test_weights_that_are_large_but_fit_are_written(quant: str, models: Family, tmp_path: Path):
    huge = with_values(models.experts[0], tmp_path / "huge", DOWN, [1e30])
    tensors = read_tensors(build_mix(tmp_path / "mix.gguf", models.base, [huge, models.experts[1]], quant=quant))
    assert tensors["blk.1.ffn_down_exps.weight"].values[0, 0, 0] == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize("quant", ["Q8_0", "Q5_0", "F32"])
@pytest.mark.parametrize("layout", ["mixtral", "fused"])
def test_a_damaged_block_of_a_quantised_source_is_named(layout: str, quant: str, models: Family, tmp_path: Path):
    """Its scale is Inf; whether the block is copied, scaled or requantised."""
    path = build_dense(tmp_path / "broken.gguf", models.experts[0], quant="Q8_0")
    info = read_header(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"blk.1.ffn_down.weight: 32 of {N_DOWN} weights are NaN or Inf")):
        build_mix(tmp_path / "mix.gguf", models.base, [models.base, path], quant=quant, layout=layout)


@pytest.mark.parametrize("layout", ["mixtral", "fused", "shared"])
@pytest.mark.parametrize(
    ("source", "quant"), [("folder", "F32"), ("folder", "Q4_K_M"), ("Q8_0", "Q8_0"), ("F32", "Q4_0")]
)
def test_how_tensors_are_cut_into_chunks_changes_nothing(
    source: str, quant: str, layout: str, models: Family, tmp_path: Path, monkeypatch
):
    """Tiny models fit into one chunk a tensor, real ones do not."""
    (tmp_path / "whole").mkdir()
    experts = models.experts[:2]
    if source != "folder":
        experts = [build_dense(tmp_path / f"{path.name}.gguf", path, quant=source) for path in experts]
    whole = build_mix(tmp_path / "whole" / "mix.gguf", experts[0], experts, quant=quant, layout=layout)
    monkeypatch.setattr(writer, "CHUNK_WEIGHTS", 1000)
    cut = build_mix(tmp_path / "mix.gguf", experts[0], experts, quant=quant, layout=layout)
    assert cut.read_bytes() == whole.read_bytes()


def test_progress_adds_up_to_the_tensors(models: Family, tmp_path: Path):
    heard: list[int] = []
    plan = plan_build(make_recipe(tmp_path / "mix.gguf", models.base, models.experts, quant="Q8_0"))
    build(plan, progress=heard.append)
    assert sum(heard) == sum(tensor.nbytes for tensor in plan.planned)
    assert len(heard) >= len(plan.planned)


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2}
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_memory_is_bounded_by_the_chunks_in_flight_and_not_by_the_model(tmp_path: Path):
    """Beyond what a dry run of the same mix takes; by the kernel's own account of a process of its own."""
    source = tiny_models.write_model(tmp_path / "model", "llama3_like", **LARGE)
    target = tmp_path / "mix.gguf"
    flags = [word for i in range(8) for word in ("--expert", f"e{i}={source}")]
    command = ["build", "--base", str(source), *flags, "--quant", "Q8_0", "--threads", "2", "-o", str(target)]
    idle = peak_memory([*command, "--dry-run"])
    assert not target.exists()
    busy = peak_memory(command)
    assert target.stat().st_size > 200e6
    assert busy - idle < 100e6


def peak_memory(arguments: list[str]) -> int:
    """The largest resident size of a moegguf process, in bytes.

    A process inherits the peak of the one that started it, and a test session is large: a small one comes between.
    """
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "moegguf", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return int(output) * (1 if sys.platform == "darwin" else 1024)
