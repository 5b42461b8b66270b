"""Serve models until told to stop.

The address is taken before anything is loaded, so that one that is not free costs nothing; requests are told to come
again until then. At Ctrl-C or SIGTERM no new
request is taken, answers under way get `GRACE_SECONDS`, and then everything ends; a second Ctrl-C does not wait. A
model's server that ends by itself is started again: the requests that it was answering fail, all others go on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable, Sequence

from moegguf.errors import UserError
from moegguf.runtime.serve.address import BACKLOG, Address, listen, tls_context, url
from moegguf.runtime.serve.front import Door, Front
from moegguf.runtime.serve.models import Served
from moegguf.runtime.serve.process import Process

EXTRA = ("xllamacpp", "h11")
"""What the extra `serve` brings."""
GRACE_SECONDS = 30
HANDSHAKE_SECONDS = 10


def check_installed() -> None:
    """Raises UserError when the extra `serve` is not there."""
    for package in EXTRA:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs the package {package}, which is not here", "pip install 'moegguf[serve]'")


def serve(
    models: Sequence[Served], address: Address, door: Door, *, ready: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM. `ready` is told the URL once all models are loaded, `note` what happens later.

    Raises UserError when the address cannot be had or a model does not load, KeyboardInterrupt when it is stopped
    before all are loaded.
    """
    tls = tls_context(address)
    with listen(address) as listener:
        processes = [Process(served.settings) for served in models]
        if not asyncio.run(_serve(processes, listener, door, tls, lambda: ready(url(address, listener)), note)):
            raise KeyboardInterrupt


async def _serve(
    processes: Sequence[Process],
    listener: socket.socket,
    door: Door,
    tls: ssl.SSLContext | None,
    ready: Callable[[], None],
    note: Callable[[str], None],
) -> bool:
    """Whether all models were loaded before it was stopped."""
    stops, front = _stops(), Front(processes, door)
    limits = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_SECONDS} if tls else {}
    server = await asyncio.start_server(front.connected, sock=listener, backlog=BACKLOG, **limits)
    try:
        is_loaded = await _unless(stops, _all(process.start() for process in processes))
        if is_loaded:
            ready()
            await _unless(stops, _all(_keep(process, note) for process in processes))
        return is_loaded
    finally:
        server.close()
        await _unless(stops, front.drain(GRACE_SECONDS))
        await front.drain(0)
        await asyncio.gather(*(process.stop() for process in processes))


async def _keep(process: Process, note: Callable[[str], None]) -> None:
    """Start the server of a model again whenever it ends. Raises UserError when it does not start."""
    while True:
        await process.ended()
        note(f"{process.name}: {process.program} ended by itself ({process.reason}); starting again")
        await process.start()


async def _all(work: Iterable[Coroutine]) -> None:
    """Do all of it at once; the first error ends the rest."""
    tasks = list(map(asyncio.ensure_future, work))
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _unless(stops: asyncio.Queue[None], work: Coroutine) -> bool:
    """Do `work`, unless the next stop comes before it is done. Whether it was done; raises what it raises."""
    done, stop = asyncio.ensure_future(work), asyncio.ensure_future(stops.get())
    await asyncio.wait((done, stop), return_when=asyncio.FIRST_COMPLETED)
    is_done = done.done()
    for task in (done, stop):
        task.cancel()
    await asyncio.wait((done, stop))
    if is_done:
        done.result()
    return is_done


def _stops() -> asyncio.Queue[None]:
    """A queue that gets an item for each Ctrl-C and SIGTERM from now on."""
    stops: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stops.put_nowait, None)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stops.put_nowait, None))
    return stops
