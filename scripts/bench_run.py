#!/usr/bin/env python3
"""Measures how fast the forms of a mix run: tokens per second and memory, by number of experts.

    mixtral   gate-less: a stack of experts behind a router of zeros, all of them used
    fused     gate-less: the same numbers from one dense FFN
    shared    gate-less: the same numbers from a fused group beside a stack
    noisy     a random router that takes 2 experts per token

The files are built from one generated model (`generate_models.py`), quantised once and used for every expert: what
the weights are makes no difference to speed, and each expert has its own place in memory. Every run is a new process
that maps the file, warms up, evaluates prompts of random tokens and then generates from an empty context, without
sampling. The forms of one size take turns, so that drift of the machine hits all alike, and medians are reported.

RSS is the process's peak: the mapped file and all that llama.cpp allocates (it keeps a second, rearranged copy of
some types of weights).

A table for people (the shape of the paper's tables 1 and 2), then one line of JSON.

    scripts/bench_run.py                                          2, 4, 6 and 8 experts, six layers of TinyLlama
    scripts/bench_run.py --shape 7B --experts 2 4 --quant Q4_K_M --prompts 512
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_build import Step, ask, machine, run_step
from generate_models import SHAPE_HELP, parse_shape

FORMS = {
    "mixtral": ["--layout", "mixtral"],
    "fused": ["--layout", "fused"],
    "shared": ["--layout", "shared"],
    "noisy": ["--layout", "mixtral", "--router", "noisy", "--k", "2"],
}
REFERENCE = "mixtral"


@dataclass(frozen=True)
class Speed:
    """Medians of one form: bytes, and tokens per second by prompt length and in generation."""

    n_experts: int
    form: str
    file_bytes: int
    peak_rss: int
    prompt: Mapping[int, float]
    generation: float


def measure(path: str, prompts: str, generated: str, threads: str) -> None:
    """What a child does: print one run's numbers."""
    import random
    import resource

    from moegguf.runtime.model import RunOptions, open_model

    lengths, n_generated = json.loads(prompts), int(generated)
    options = RunOptions(ctx=max(*lengths, n_generated) + 64, threads=int(threads) or None)
    with open_model(path, options) as model:
        tokens = random.Random(0).choices(range(3, model.llama.n_vocab()), k=options.ctx)

        def seconds(batches: Sequence[Sequence[int]]) -> float:
            model.llama.reset()
            start = time.perf_counter()
            for batch in batches:
                model.llama.eval(batch)
            return time.perf_counter() - start

        seconds([tokens[:32]])  # touches the weights
        speeds = {n: n / seconds([tokens[:n]]) for n in lengths}
        generation = n_generated / seconds([[token] for token in tokens[:n_generated]])
    peak_rss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"prompt": list(speeds.items()), "generation": generation, "peak_rss": peak_rss}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--shape", type=parse_shape, default="1.1B,layers=6", help=f"{SHAPE_HELP} (default: %(default)s)")
    add("--experts", type=int, nargs="+", default=[2, 4, 6, 8], metavar="N", help="default: 2 4 6 8")
    add("--quant", default="Q4_K_M", metavar="PRESET", help="default: %(default)s")
    add("--prompts", type=int, nargs="+", default=[128, 512], metavar="N", help="lengths in tokens (default: 128 512)")
    add("--generated", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="default: physical cores")
    add("--runs", type=int, default=3, metavar="N", help="the median of so many counts (default: %(default)s)")
    add("--work", type=Path, metavar="DIR", help="folder for the model and its mixes (default: $TMPDIR)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_run-", dir=options.work))
    try:
        speeds = run(options, work)
    finally:
        shutil.rmtree(work)
    print_table(speeds, options)
    settings = {name: getattr(options, name) for name in ("quant", "prompts", "generated", "threads", "runs")}
    results = [asdict(speed) for speed in speeds]
    print(json.dumps({"bench": "run", **machine(), "shape": asdict(options.shape), **settings, "results": results}))


def run(options: argparse.Namespace, work: Path) -> list[Speed]:
    model = _quantised_model(options, work)
    speeds = []
    for n_experts in options.experts:
        files = {form: _build(model, n_experts, options.quant, work / f"{form}.gguf", flags, work / "log")
                 for form, flags in FORMS.items()}  # fmt: skip
        runs: dict[str, list[dict]] = {form: [] for form in FORMS}
        for i in range(options.runs):
            for form, file in files.items():
                runs[form].append(_measure(file, options))
                print(f"{n_experts} experts, run {i + 1}/{options.runs}, {form}", file=sys.stderr)
        speeds += [_median(n_experts, form, files[form], runs[form]) for form in FORMS]
    return speeds


def _quantised_model(options: argparse.Namespace, work: Path) -> Path:
    """The one dense model, as a GGUF file."""
    shape = ",".join(["tiny", *(f"{name}={size}" for name, size in asdict(options.shape).items())])
    generator = Path(__file__).with_name("generate_models.py")
    run_step(Step([sys.executable, generator, work / "models", "--shape", shape, "--experts", "0"]), work / "log")
    model = _build(work / "models" / "base", 1, options.quant, work / "model.gguf", FORMS["fused"], work / "log")
    shutil.rmtree(work / "models")
    return model


def _build(source: Path, n_experts: int, quant: str, output: Path, flags: Sequence[str], log: Path) -> Path:
    command = [sys.executable, "-m", "moegguf", "build", "--base", source, "-o", output, "--force"]
    for i in range(n_experts):
        command += ["--expert", f"e{i}={source}"]
    run_step(Step([*command, "--quant", quant, *flags]), log)
    return output


def _measure(file: Path, options: argparse.Namespace) -> dict:
    arguments = [file, json.dumps(options.prompts), str(options.generated), str(options.threads)]
    return ask(Step([sys.executable, __file__, "--child", *arguments]))


def _median(n_experts: int, form: str, file: Path, runs: Sequence[dict]) -> Speed:
    prompts = [dict(each["prompt"]) for each in runs]
    return Speed(
        n_experts=n_experts,
        form=form,
        file_bytes=file.stat().st_size,
        peak_rss=int(statistics.median(each["peak_rss"] for each in runs)),
        prompt={n: statistics.median(prompt[n] for prompt in prompts) for n in prompts[0]},
        generation=statistics.median(each["generation"] for each in runs),
    )


def print_table(speeds: Sequence[Speed], options: argparse.Namespace) -> None:
    """Tokens per second; "×" is the ratio to the mixtral form of as many experts."""
    columns = [f"prompt {n}" for n in options.prompts] + [f"generate {options.generated}"]
    print(f"\n{options.quant}, tokens per second\n")
    print("experts  form      file GB  RSS GB" + "".join(f"{column:>14}{'×':>7}" for column in columns))
    for speed in speeds:
        reference = next(s for s in speeds if (s.n_experts, s.form) == (speed.n_experts, REFERENCE))
        cells = [(speed.prompt[n], reference.prompt[n]) for n in options.prompts]
        cells.append((speed.generation, reference.generation))
        print(
            f"{speed.n_experts:<9}{speed.form:<8}{speed.file_bytes / 1e9:9.3f}{speed.peak_rss / 1e9:8.3f}"
            + "".join(f"{value:14.2f}{value / of:7.2f}" for value, of in cells)
        )
    print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
    else:
        main()
