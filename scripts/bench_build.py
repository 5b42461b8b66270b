#!/usr/bin/env python3
"""Measures a build against the other ways to the same file, and against what no way can beat. Linux only.

On generated models (`generate_models.py`) of a chosen shape:

    ours       moegguf build: one pass from the sources to the quantised mix
    two-step   moegguf build at F16, then llama_model_quantize
    mergekit   mergekit-moe, convert_hf_to_gguf.py at F16, llama_model_quantize (where --mergekit and --converter say)
    quantise   ggml_quantize_chunk alone: as many weights to the same types, from float32 in memory
    cp         cp of the mix
    gguf       moegguf build from GGUF sources that have the wanted types already (made beforehand)
    bare       an interpreter that imports what a build imports, for the memory that is not the build's

Every run is made of new processes; the ways take turns, so that drift of the machine hits all alike, and medians are
reported. Every way ends with its result synced to the disk. All find their sources freshly read into the page
cache, as far as memory goes, or none with --cold. This process stays small, for a child's peak RSS begins with its
parent's.

time        wall time, interpreter start included; of `quantise` the loop alone
cpu         user and system time of all processes
peak RSS    the largest of any process, by the kernel's account (ru_maxrss)
read        bytes through read calls (rchar in /proc/PID/io), those of Python's modules included, or through mmap
written     bytes through write calls (wchar)
extra disk  bytes written that are not the result; nothing is removed before the end

The floor is the slower of `quantise` and `cp`. A table for people, then one line of JSON.

    scripts/bench_build.py                                4 × TinyLlama-1.1B to Q4_K_M
    scripts/bench_build.py --quant Q4_K_M Q8_0 --mergekit VENV/bin/python --converter LLAMA_CPP/convert_hf_to_gguf.py
    scripts/bench_build.py --only bare --runs 1           the memory of a build, and nothing else
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import NoReturn

from generate_models import SHAPE_HELP, parse_shape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the moegguf of this checkout

CHUNK_WEIGHTS = 1 << 20
POOL_WEIGHTS = 16 * CHUNK_WEIGHTS


@dataclass(frozen=True)
class Usage:
    """What a run took: seconds and bytes."""

    time: float
    cpu: float
    peak_rss: int
    read: int
    written: int

    def then(self, other: Usage) -> Usage:
        """Both, one after the other."""
        return Usage(
            self.time + other.time,
            self.cpu + other.cpu,
            max(self.peak_rss, other.peak_rss),
            self.read + other.read,
            self.written + other.written,
        )


@dataclass(frozen=True)
class Step:
    """One process, that must end with 0."""

    command: Sequence[str | Path]
    mapped: Sequence[Path] = ()
    """Files as large as what it reads through mmap, which no system call counts."""
    is_clock: bool = False
    """Whether the last line that it prints is JSON with the time and cpu that count."""


@dataclass(frozen=True)
class Job:
    """One mix to build in many ways. `output` is where ours stays; the others write into `scratch`."""

    models: Path
    n_experts: int
    quant: str
    layout: str
    threads: int
    mergekit: Path | None
    converter: Path | None
    output: Path
    scratch: Path
    kept: Path
    """Folder for what is made once and not timed."""

    @property
    def base(self) -> Path:
        return self.models / "base"

    @property
    def experts(self) -> list[Path]:
        return [self.models / f"expert{i + 1}" for i in range(self.n_experts)]


# The ways, as steps.


def ours(job: Job) -> list[Step]:
    return [_build(job, job.base, job.experts, job.output)]


def two_step(job: Job) -> list[Step]:
    f16 = job.scratch / "f16.gguf"
    return [_build(job, job.base, job.experts, f16, "--quant", "F16"), _llama_quantise(job, f16)]


def mergekit(job: Job) -> list[Step]:
    config, merged, f16 = job.kept / "mergekit.yml", job.scratch / "merged", job.scratch / "f16.gguf"
    experts = [{"source_model": str(path), "positive_prompts": [path.name]} for path in job.experts]
    mix = {"base_model": str(job.base), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    config.write_text(json.dumps(mix))  # JSON is YAML
    return [
        Step([job.mergekit, "-m", "mergekit.scripts.moe", config, merged], [merged]),  # it reads what it writes
        Step([job.mergekit, job.converter, merged, "--outfile", f16, "--outtype", "f16"], [merged]),
        _llama_quantise(job, f16),
    ]


def quantise(job: Job) -> list[Step]:
    return [_child(quantise_alone, job.output, str(job.threads), is_clock=True)]


def cp(job: Job) -> list[Step]:
    copy = 'cp --reflink=never -- "$1" "$2" && sync -- "$2"'
    return [Step(["sh", "-c", copy, "sh", job.output, job.scratch / "copy.gguf"])]


def gguf(job: Job) -> list[Step]:
    base, *experts = _gguf_sources(job)
    return [_build(job, base, experts, job.scratch / "mix.gguf")]


def bare(job: Job) -> list[Step]:
    return [_child(import_all)]


WAYS: dict[str, Callable[[Job], list[Step]]] = {
    "ours": ours,
    "two-step": two_step,
    "mergekit": mergekit,
    "quantise": quantise,
    "cp": cp,
    "gguf": gguf,
    "bare": bare,
}


def _build(job: Job, base: Path, experts: Sequence[Path], output: Path, *flags: str) -> Step:
    """A build as the job wants it; `flags` override."""
    command = [sys.executable, "-m", "moegguf", "build", "--base", base, "-o", output, "--force"]
    for i, expert in enumerate(experts):
        command += ["--expert", f"e{i}={expert}"]
    command += ["--layout", job.layout, "--quant", job.quant, "--threads", str(job.threads), *flags]
    return Step(command)


def _llama_quantise(job: Job, f16: Path) -> Step:
    out = job.scratch / "mix.gguf"
    return _child(llama_quantise, f16, out, job.quant, str(job.threads), mapped=[f16])


def _gguf_sources(job: Job) -> list[Path]:
    """Base and experts as dense GGUF files, each tensor in the type that it has in the mix; made at the first call."""
    folders = [job.base, *job.experts]
    sources = [job.kept / f"{folder.name}-{job.quant}.gguf" for folder in folders]
    for folder, source in zip(folders, sources, strict=True):
        if not source.exists():
            flags = ask(_child(dense_type_flags, job.output))
            run_step(_build(job, folder, [folder], source, "--layout", "fused", *flags), job.kept / "log")
    return sources


# What runs in the children.


def dense_type_flags(mix: str) -> None:
    """Print the flags of a build that give a dense model's tensors the types that they have in `mix`."""
    from moegguf.gguf_header import read_header

    names: dict[str, list[str]] = {}
    for info in read_header(Path(mix)).tensors.values():
        if len(info.shape) > 1 and "ffn_gate_inp" not in info.name:
            dense = info.name.replace("_exps.", ".").replace("_shexp.", ".")
            names.setdefault(info.type.name, []).append(re.escape(dense))
    print(json.dumps([flag for type, several in names.items() for flag in
                      ("--quant-tensor", f"^({'|'.join(several)})$={type}")]))  # fmt: skip


def quantise_alone(mix: str, threads: str) -> None:
    """Quantise as many weights as `mix` holds to the types that it has, from a pool of float32 in memory."""
    import llama_cpp
    import numpy as np

    quantise_chunk = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantise_chunk.argtypes = (ctypes.c_int, pointer, pointer, integer, integer, integer, pointer)
    pool = np.random.default_rng(0).standard_normal(POOL_WEIGHTS, np.float32) * np.float32(0.02)
    chunks = iter(_chunks(Path(mix)))

    def work() -> None:
        out = np.zeros(4 * CHUNK_WEIGHTS, np.uint8)
        for type, start, n_rows, n_cols in chunks:
            quantise_chunk(type, pool.ctypes.data + 4 * start, out.ctypes.data, 0, n_rows, n_cols, None)

    workers = [threading.Thread(target=work) for _ in range(int(threads))]
    wall, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(json.dumps({"time": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


def _chunks(mix: Path) -> list[tuple[int, int, int, int]]:
    """(type, first weight in the pool, rows, columns) of all that is quantised in `mix`."""
    from moegguf.gguf_header import read_header

    chunks, start = [], 0
    for info in read_header(mix).tensors.values():
        n_rows, n_cols = prod(info.shape[:-1]), info.shape[-1]
        step = max(1, CHUNK_WEIGHTS // n_cols)
        for first in range(0, n_rows if info.type.name != "F32" else 0, step):
            chunks.append((int(info.type), start, min(step, n_rows - first), n_cols))
            start = (start + step * n_cols) % (POOL_WEIGHTS - CHUNK_WEIGHTS)
    return chunks


def llama_quantise(source: str, target: str, quant: str, threads: str) -> None:
    """llama.cpp's own quantiser, and a sync."""
    import llama_cpp

    from moegguf.quant.presets import preset

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = int(threads), int(preset(quant).file_type)
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama_model_quantize failed on {source}")
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def import_all() -> None:
    """What a build imports."""
    import moegguf.assembly
    import moegguf.cli
    import moegguf.commands.build
    import moegguf.sources.gguf_file
    import moegguf.sources.hf

    moegguf.quant.ggml.supported_types()  # loads ggml


CHILDREN = {function.__name__: function for function in (dense_type_flags, quantise_alone, llama_quantise, import_all)}


def _child(function: Callable[..., None], *arguments: str | Path, **step) -> Step:
    return Step([sys.executable, __file__, "--child", function.__name__, *arguments], **step)


# Measuring.


def run_step(step: Step, log: Path) -> Usage:
    """Run one process to its end and ask the kernel what it took, its own children included."""
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped: /proc still has it
        seconds = time.perf_counter() - start
    io = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, rusage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        _give_up(step.command, log.read_text())
    times = {"time": seconds, "cpu": rusage.ru_utime + rusage.ru_stime}
    if step.is_clock:
        times = json.loads(log.read_text().splitlines()[-1])
    read = int(io["rchar"]) + sum(map(_size, step.mapped))
    return Usage(**times, peak_rss=1024 * rusage.ru_maxrss, read=read, written=int(io["wchar"]))


def ask(step: Step):
    """Run one process and return the JSON that it prints last."""
    done = subprocess.run(step.command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        _give_up(step.command, done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    paths = [path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def _give_up(command: Sequence[str | Path], log: str) -> NoReturn:
    sys.exit(f"failed: {' '.join(map(str, command))}\n{log[-4000:]}")


def _size(path: Path) -> int:
    """Bytes of a file, or of all weights in a folder."""
    return sum(_size(file) for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def measure(way: str, job: Job, is_cold: bool) -> Usage:
    job.scratch.mkdir()
    steps = WAYS[way](job)
    os.sync()  # nobody pays for what another left to be written
    if is_cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        _warm(_sources(way, job))
    usage = functools.reduce(Usage.then, [run_step(step, job.kept / "log") for step in steps])
    shutil.rmtree(job.scratch)
    return usage


def _sources(way: str, job: Job) -> list[Path]:
    """The files that a way reads."""
    if way == "cp":
        return [job.output]
    return _gguf_sources(job) if way == "gguf" else sorted(job.models.rglob("*.safetensors"))


def _warm(paths: Sequence[Path]) -> None:
    """Read files into the page cache: some machines drop what has not been used for a minute."""
    for path in paths:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def measure_all(job: Job, ways: Sequence[str], runs: int, is_cold: bool) -> dict[str, Usage]:
    """The median of every number over the runs, by way."""
    usages: dict[str, list[Usage]] = {way: [] for way in ways}
    for run in range(runs):
        for way in ways:
            usages[way].append(measure(way, job, is_cold))
            print(f"{job.quant} run {run + 1}/{runs} {way}: {usages[way][-1].time:.1f} s", file=sys.stderr)
    return {way: median(several) for way, several in usages.items()}


def median(usages: Sequence[Usage]) -> Usage:
    return Usage(*map(statistics.median, zip(*map(astuple, usages), strict=True)))


def ratios(usages: Mapping[str, Usage]) -> dict[str, float]:
    """The numbers that the ways are measured for, as far as they were."""
    time = {way: usage.time for way, usage in usages.items()}
    found = {f"ours / {way}": time["ours"] / time[way] for way in ("quantise", "cp") if way in time}
    if len(found) == 2:
        found["ours / floor"] = time["ours"] / max(time["quantise"], time["cp"])
    found |= {f"{way} / ours": time[way] / time["ours"] for way in ("two-step", "mergekit") if way in time}
    if "gguf" in time and "cp" in time:
        found["speed of gguf / speed of cp"] = time["cp"] / time["gguf"]
    found["peak RSS beyond bare, GB"] = (usages["ours"].peak_rss - usages["bare"].peak_rss) / 1e9
    return found


# Reporting.

MAKERS = ("ours", "two-step", "mergekit", "cp", "gguf")
"""The ways that end with a file."""


def extra_disk(way: str, usage: Usage, n_bytes: int) -> int:
    return max(0, usage.written - n_bytes) if way in MAKERS else 0


def print_table(job: Job, usages: Mapping[str, Usage]) -> None:
    n_bytes = job.output.stat().st_size
    print(f"\n{job.quant}, {job.layout}, {job.n_experts} experts, {n_bytes / 1e9:.3f} GB\n")
    print("way         time s  / ours   cpu s  peak RSS MB  read GB  written GB  extra disk GB")
    for way, usage in usages.items():
        print(
            f"{way:<10}{usage.time:8.2f}{usage.time / usages['ours'].time:8.2f}{usage.cpu:8.2f}"
            f"{usage.peak_rss / 1e6:13.0f}{usage.read / 1e9:9.3f}{usage.written / 1e9:12.3f}"
            f"{extra_disk(way, usage, n_bytes) / 1e9:15.3f}"
        )
    print()
    for name, ratio in ratios(usages).items():
        print(f"{name:<28}{ratio:8.2f}")


def report(job: Job, usages: Mapping[str, Usage]) -> dict[str, object]:
    n_bytes = job.output.stat().st_size
    ways = {way: asdict(usage) | {"extra_disk": extra_disk(way, usage, n_bytes)} for way, usage in usages.items()}
    return {"quant": job.quant, "bytes": n_bytes, "ways": ways, "ratios": ratios(usages)}


def machine() -> dict[str, object]:
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    packages = {name: version(name) for name in ("moegguf", "llama-cpp-python", "gguf", "numpy")}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()} | packages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--shape", type=parse_shape, default="1.1B", help=f"{SHAPE_HELP} (default: %(default)s)")
    add("--experts", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--quant", nargs="+", default=["Q4_K_M"], metavar="PRESET", help="one or several (default: Q4_K_M)")
    add("--layout", default="mixtral", choices=["mixtral", "fused", "shared"], help="default: %(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all usable cores")
    add("--runs", type=int, default=3, metavar="N", help="the median of so many counts (default: %(default)s)")
    add("--only", nargs="+", choices=WAYS, metavar="WAY", help=f"ours, bare, and these of {', '.join(WAYS)}")
    add("--cold", action="store_true", help="drop the page cache before every run (as root)")
    add("--mergekit", type=Path, metavar="PYTHON", help="an interpreter that has mergekit 0.0.6")
    add("--converter", type=Path, metavar="FILE", help="convert_hf_to_gguf.py of llama.cpp")
    add("--work", type=Path, metavar="DIR", help="folder for models and results (default: $TMPDIR)")
    add("--keep", action="store_true", help="leave the models and the mixes there")
    options = parser.parse_args()
    if options.cold and os.geteuid():
        parser.error("--cold needs root")
    for path in (options.mergekit, options.converter):
        if path and not path.exists():
            parser.error(f"{path}: no such file")
    ways = [way for way in WAYS if way in ("ours", "bare") or way in (options.only or WAYS)]
    if "mergekit" in ways and not (options.mergekit and options.converter):
        print("mergekit is skipped: give --mergekit PYTHON and --converter FILE to measure it", file=sys.stderr)
        ways.remove("mergekit")

    work = Path(tempfile.mkdtemp(prefix="bench_build-", dir=options.work))
    try:
        run(options, ways, work)
    finally:
        if options.keep:
            print(f"kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)


def run(options: argparse.Namespace, ways: Sequence[str], work: Path) -> None:
    models, kept = work / "models", work / "kept"
    kept.mkdir()
    shape = ",".join(["tiny", *(f"{name}={size}" for name, size in asdict(options.shape).items())])
    generator = Path(__file__).with_name("generate_models.py")
    run_step(
        Step([sys.executable, generator, models, "--shape", shape, "--experts", str(options.experts)]), kept / "log"
    )
    results = []
    for quant in options.quant:
        job = Job(
            models=models,
            n_experts=options.experts,
            quant=quant,
            layout=options.layout,
            threads=options.threads,
            mergekit=options.mergekit,
            converter=options.converter,
            output=work / f"mix-{quant}.gguf",
            scratch=work / "scratch",
            kept=kept,
        )
        usages = measure_all(job, ways, options.runs, options.cold)
        print_table(job, usages)
        results.append(report(job, usages))
    settings = {name: getattr(options, name) for name in ("experts", "layout", "threads", "runs", "cold")}
    print(json.dumps({"bench": "build", **machine(), "shape": asdict(options.shape), **settings, "results": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
    else:
        main()
