"""`moegguf.plan`, `bench`, `doctor`, `serve` and `worker`: what a machine can run, and running it for others.

How a file is run is said by `moegguf.RunOptions`, and its `offload`, `moegguf.Offload`, by what goes on which device.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.api.paths import Location, Locations, maybe_path, to_path, to_refs
from moegguf.checks import host_and_port
from moegguf.errors import UserError
from moegguf.kinds import checked
from moegguf.runtime.bench import Speeds, bench_all
from moegguf.runtime.forecast import Forecast, Size, forecast
from moegguf.runtime.machine import Machine, inspect_machine
from moegguf.runtime.offload import Offload as Offload
from moegguf.runtime.offload import Override as Override
from moegguf.runtime.run_options import DEFAULT_OPTIONS, RunOptions
from moegguf.watch import Watch, unwatched


@checked
def plan(
    path: Location,
    *,
    vram: Size | Sequence[Size] | None = None,
    ram: Size | None = None,
    bandwidth: Size | None = None,
    vram_bandwidth: Size | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Forecast:
    """Where a file would go, what memory it takes, how fast it would be, and what would make it fit.

    On this machine, or on one with `vram` free in each GPU and `ram` in main memory. Sizes are bytes, or such as "8GB";
    bandwidths are what is read in a second. Raises UserError.
    """
    gpus = [vram] if isinstance(vram, int | str) else vram
    return forecast(
        to_path("path", path), options, vram=gpus, ram=ram, bandwidth=bandwidth, vram_bandwidth=vram_bandwidth
    )


@checked
def bench(
    path: Location,
    *,
    compare: Location | None = None,
    prompt: int | Sequence[int] | None = None,
    generate: int | Sequence[int] | None = None,
    repeat: int = 5,
    options: RunOptions = DEFAULT_OPTIONS,
    watch: Watch = unwatched,
) -> Speeds:
    """How fast a file runs here, and with `compare` a second one: its prompts and answers of so many tokens each.

    Raises UserError.
    """
    prompt, generate = ([each] if isinstance(each, int) else each for each in (prompt, generate))
    paths = [to_path("path", path), *([] if compare is None else [to_path("compare", compare)])]
    return bench_all(paths, options, watch, prompts=prompt, generations=generate, repeat=repeat)


def doctor() -> Machine:
    """What this machine can run; its `advice` says what is missing."""
    return inspect_machine(Path.cwd())


@dataclass(frozen=True)
class Server:
    """A server that runs. `notes`: what happened meanwhile, in lines; it may come to be longer."""

    url: str
    notes: list[str]


@checked
@contextlib.contextmanager
def serve(
    models: Location | Mapping[str, Location],
    *,
    adapters: Locations | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    tls_cert: Location | None = None,
    tls_key: Location | None = None,
    api_key: str | None = None,
    i_know_it_is_unauthenticated: bool = False,
    parallel: int | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Iterator[Server]:
    """Serve files for as long as the block runs: OpenAI's API is at the server's `url` + "/v1".

    `models`: a file, or name → file; `adapters`: name of a model → LoRA GGUFs that its requests can switch on. Port 0
    takes one that is free. At the block's end answers that are under way are finished. Raises UserError, at the
    end for a model that could not go on.
    """
    from moegguf.runtime.serve.extra import check_installed

    check_installed()
    from moegguf.runtime.serve.address import Address
    from moegguf.runtime.serve.models import name_of, prepare
    from moegguf.runtime.serve.serving import open_door, serving

    named = models if isinstance(models, Mapping) else {name_of(to_path("models", models)): models}
    paths = {str(name): to_path("models", path) for name, path in named.items()}
    if not paths:
        raise UserError("models: none are given", "pass at least one")
    given = {} if adapters is None else to_refs("adapters", adapters)
    loras = {name: list(map(Path, refs)) for name, refs in given.items()}
    if unknown := [name for name in loras if name not in paths]:
        raise UserError(f"adapters for {unknown[0]!r}: there is no such model", f"there are {', '.join(paths)}")
    address = Address.of(host, port, maybe_path("tls_cert", tls_cert), maybe_path("tls_key", tls_key))
    door = open_door(address, api_key, to_all=i_know_it_is_unauthenticated)
    notes: list[str] = []
    with serving(prepare(paths, options, slots=parallel, adapters=loras), address, door, note=notes.append) as url:
        yield Server(url, notes)


@checked
@contextlib.contextmanager
def worker(
    listen: str = "127.0.0.1:50052",
    *,
    device: str | Sequence[str] | None = None,
    threads: int | None = None,
    i_know_it_is_unauthenticated: bool = False,
) -> Iterator[str]:
    """Lend this machine's devices for as long as the block runs, in a process of their own, as `moegguf worker` does.

    Gives its address, for `Offload(workers=…)`. Raises UserError when it cannot listen.
    """
    host_and_port("--listen", listen)
    flags = ["--listen", listen]
    names = device if isinstance(device, str | None) else ",".join(device)
    flags += [] if names is None else ["--device", names]
    flags += [] if threads is None else ["--threads", str(threads)]
    flags += ["--i-know-it-is-unauthenticated"] * i_know_it_is_unauthenticated
    process = subprocess.Popen(
        [sys.executable, "-m", "moegguf", "worker", *flags],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            if not any(line.startswith("listening") for line in process.stdout):
                raise UserError(process.stderr.read().strip().removeprefix("moegguf: error: "))
            yield listen
        finally:
            process.terminate()
