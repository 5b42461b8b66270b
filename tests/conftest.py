"""What several test files share: tiny models that are written once, mixes built through the front door, logits."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValue, GGUFWriter

import tiny_models
from moegguf.assembly import Built, build, plan_build
from moegguf.gguf_header import read_header
from moegguf.quant import ggml
from moegguf.recipe import Recipe, parse_recipe

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # llama.cpp's threads spin while they wait for each other: workers that share cores would mostly wait
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
    signal.signal(signal.SIGINT, signal.default_int_handler)

KINDS = tuple(tiny_models.KINDS)
TOKENS = (3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 5, 8, 34)
BUILD_THREADS = 2
CLOSE = 1e-4
"""Logits of the order of 1 that differ by less are the same: float32 sums in another order differ by about 3e-6."""


@llama_cpp.llama_log_callback
def _say_nothing(level, text, data):
    """A module-level callback, because llama.cpp keeps the pointer for as long as the process lives."""


@pytest.fixture(scope="session", autouse=True)
def silence():
    """Keep llama.cpp's log out of the test report."""
    llama_cpp.llama_log_set(_say_nothing, None)


class Heard:
    """A watch that remembers: `parts` is step → [those that it has, those that were done]."""

    def __init__(self) -> None:
        self.parts: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, what: str, unit: str) -> Iterator[Heard]:
        self._now = self.parts[what] = [0, 0]
        yield self

    def has(self, n_parts: int) -> None:
        self._now[0] = n_parts

    def did(self, n_parts: int) -> None:
        self._now[1] += n_parts

    def says(self, what: str) -> None: ...


@pytest.fixture(scope="module")
def one_torch_thread():
    """On such sizes torch's threads spend their time waiting for each other."""
    torch = pytest.importorskip("torch")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@dataclass(frozen=True)
class Family:
    """A tiny base model and three fine-tunes of it, as Hugging Face folders."""

    base: Path
    experts: tuple[Path, ...]


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[..., Family]:
    """`family(kind, dtype="bf16", **config)`: a tiny base with three experts, written once a session."""

    @functools.cache
    def write(kind: str, dtype: str = "bf16", **config) -> Family:
        folder = tmp_path_factory.mktemp(kind)
        base = tiny_models.write_model(folder / "base", kind, dtype=dtype, **config)
        return Family(base, tuple(tiny_models.write_expert(folder / f"e{i}", base, i) for i in (1, 2, 3)))

    return write


def make_recipe(output: Path, base: Path, experts: Sequence[Path | dict], **table) -> Recipe:
    """A recipe for `output`. An expert is a source, or a table whose `source` is a path; they are called e0, e1, …"""
    tables = [expert if isinstance(expert, dict) else {"source": expert} for expert in experts]
    tables = [{"name": f"e{i}", **table, "source": str(table["source"])} for i, table in enumerate(tables)]
    table = {"base": str(base), "experts": tables, "output": str(output), "quant": "F32", **table}
    return parse_recipe("mix", table, where="test:", folder=output.parent)


def build_mix(
    output: Path, base: Path, experts: Sequence[Path | dict], *, threads: int = BUILD_THREADS, **table
) -> Path:
    """Build a mix, F32 unless `table` says otherwise; returns its path."""
    return build_report(output, base, experts, threads=threads, **table).plan.path


def build_report(
    output: Path, base: Path, experts: Sequence[Path | dict], *, threads: int = BUILD_THREADS, **table
) -> Built:
    return build(plan_build(make_recipe(output, base, experts, **table)), threads=threads)


def build_dense(output: Path, model: Path, *, quant: object = "F32", base: Path | None = None) -> Path:
    """The plain dense model: a mix of one expert, fused. With `base`, the FFNs of `model` in its trunk."""
    return build_mix(output, base or model, [model], layout="fused", quant=quant)


def logits(path: Path, tokens: Sequence[int] = TOKENS) -> np.ndarray:
    """float32 (n_tokens, n_vocab) from stock llama.cpp.

    The KV cache is F32: in F16, the default, it is the largest error of all (2e-3). One thread, because on such
    sizes several spend their time waiting for each other.
    """
    f32 = int(GGMLQuantizationType.F32)
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=f32, type_v=f32,
    )  # fmt: skip
    try:
        model.eval(list(tokens))
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference anywhere."""
    return float(np.abs(a - b).max())


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its type, its shape and its bytes."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: bytes

    @property
    def rows(self) -> np.ndarray:
        """uint8 (n_rows, row_bytes)."""
        n_rows = int(np.prod(self.shape[:-1]))
        return np.frombuffer(self.data, np.uint8).reshape(n_rows, -1)

    @property
    def values(self) -> np.ndarray:
        """float32 of `shape`."""
        return ggml.dequantise(self.type, self.rows, self.shape[-1]).reshape(self.shape)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a GGUF file by name, in file order."""
    content = path.read_bytes()
    return {
        name: Stored(info.type, info.shape, content[info.offset : info.offset + info.nbytes])
        for name, info in read_header(path).tensors.items()
    }


def read_metadata(path: Path, *prefixes: str) -> dict[str, object]:
    """Key → plain value of all keys that start with one of `prefixes` (all keys without)."""
    header = read_header(path)
    return {key: header.get(key) for key in header.fields if key.startswith(prefixes or "")}


def rewrite(
    source: Path,
    target: Path,
    *,
    arch: str | None = None,
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
    keys: Mapping[str, GGUFValue] = MappingProxyType({}),
    keep: Callable[[str], bool] = lambda key: True,
    split_max_tensors: int = 0,
) -> Path:
    """Write the F32 GGUF `source` again, with gguf's own writer: as another architecture, with tensors or keys added or
    replaced, without the keys that are not to keep, or split. Returns `target`; of a split file, its first shard."""
    header = read_header(source)
    old = header.get("general.architecture")
    writer = GGUFWriter(target, arch or old, split_max_tensors=split_max_tensors)
    for key, value in ({key: header.value(key) for key in header.fields if keep(key)} | dict(keys)).items():
        if key != "general.architecture":
            writer.add_key_value(key.replace(f"{old}.", f"{arch or old}."), value.value, value.type, value.sub_type)
    stored = {name: tensor.values for name, tensor in read_tensors(source).items()}
    for name, values in (stored | dict(tensors)).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(target.parent.glob(f"{target.stem}-*-of-*.gguf")) if split_max_tensors else target
