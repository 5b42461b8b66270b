"""`moegguf worker`: lend this machine's devices to `--rpc` of another one, until Ctrl-C.

It is llama.cpp's own RPC server. It serves one program at a time, and whoever reaches it can use it, read what is
computed, and write to its memory: so it listens on this machine alone unless one insists.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, TextIO

from moegguf.checks import check_threads, host_and_port
from moegguf.commands.options import add_threads, device_names
from moegguf.errors import UserError
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from moegguf.runtime.offload import Device

HELP = "Lend the GPUs of this machine, or its CPU, to a model that runs on another."
EXAMPLES = """\
examples:
  moegguf worker                                            here, to try it; on port 50052
  moegguf chat mix.gguf --rpc 127.0.0.1:50052               on the same machine
  ssh -L 50052:127.0.0.1:50052 other moegguf worker         on another, through an encrypted tunnel
  moegguf worker --listen 192.168.1.7:50052 --i-know-it-is-unauthenticated
"""
DEFAULT = "127.0.0.1:50052"
_REASONS = {
    errno.EADDRINUSE: ("the port is in use", "choose another port, or end what listens there"),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "listen on one of its own"),
    errno.EACCES: ("you may not listen on that port", "choose one from 1024 on"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default=DEFAULT, help=f"where others connect to (default: {DEFAULT})"
    )
    parser.add_argument("--device", metavar="NAMES", help="devices to lend, with commas (default: GPUs, else the CPU)")
    add_threads(parser)
    parser.add_argument(
        "--i-know-it-is-unauthenticated", action="store_true",
        help="listen on an address that other machines reach: all of them can use this worker, and take it over",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C, which is no failure. Raises UserError when it cannot listen."""
    from moegguf.runtime.log import llama_log
    from moegguf.runtime.machine import physical_cores
    from moegguf.runtime.workers import is_up, lent, serve

    check_threads(args.threads)
    host, port = _address(args.listen, others_may=args.i_know_it_is_unauthenticated)
    _check_free(host, port)
    llama_log().start(args.verbose)
    devices = lent(device_names(args.device))
    server = threading.Thread(
        target=serve, args=(host, port), daemon=True,
        kwargs={"threads": args.threads or physical_cores(), "names": [device.name for device in devices]},
    )  # fmt: skip
    with _stdout_of_our_own(shared=args.verbose) as stdout:
        server.start()
        if not is_up(f"{host}:{port}", server.is_alive):
            raise UserError(f"--listen {host}:{port}: llama.cpp cannot listen there", "run it again with --verbose")
        try:
            for device in devices:
                print(f"lending    {device.name} ({device.description}), {_memory(device)}", file=stdout)
            print(f"listening  {host}:{port}; use it with --rpc {host}:{port}; Ctrl-C ends it", file=stdout, flush=True)
            server.join()
        except KeyboardInterrupt:
            print("stopped", file=stdout, flush=True)
            os._exit(0)  # the server is C code in a thread, which nothing else ends
    raise UserError(f"--listen {host}:{port}: llama.cpp does not listen any more", "run it again with --verbose")


def _memory(device: Device) -> str:
    """What a device has free. llama.cpp tells clients that all of a CPU's is, and its server takes no other number."""
    from moegguf.runtime.machine import memory

    if device.kind != "CPU":
        return f"{show_size(device.memory_free)} free of {show_size(device.memory_total)}"
    here = memory()
    return (
        f"{show_size(here.available)} free of {show_size(here.total)}; clients see all of it as free, and put what fits"
        " there unless --gpu-layers or --tensor-split tells them less"
    )


def _address(listen: str, *, others_may: bool) -> tuple[str, int]:
    """IPv4 address and port to listen on. Raises UserError for an unknown one, and one that is open to others."""
    from moegguf.runtime.workers import addresses

    host, port = host_and_port("--listen", listen)
    found = sorted(addresses(host, port))
    if not found:
        raise UserError(f"--listen {listen}: no IPv4 address is called {host!r}", f"for example {DEFAULT}")
    address = found[0][0]
    if not (ip_address(address).is_loopback or others_may):
        raise UserError(
            f"--listen {listen}: other machines reach this address, and a worker asks nobody who they are",
            f"listen on {DEFAULT} and reach it through an SSH tunnel, or add --i-know-it-is-unauthenticated",
        )
    return address, port


def _check_free(host: str, port: int) -> None:
    """Raises UserError when nothing can listen there; llama.cpp would not say why."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":  # where it would mean to share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason, mend = _REASONS.get(error.errno, (error.strerror, "listen elsewhere"))
            raise UserError(f"--listen {host}:{port}: {reason}", mend) from error


@contextmanager
def _stdout_of_our_own(*, shared: bool) -> Iterator[TextIO]:
    """Where we print, while what the server writes to C's stdout goes nowhere, or there too."""
    sys.stdout.flush()
    ours = os.dup(1)
    if not shared:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    with open(ours, "w", encoding="utf-8", closefd=False) as stdout:
        try:
            yield stdout
        finally:
            stdout.flush()
            os.dup2(ours, 1)
            os.close(ours)
