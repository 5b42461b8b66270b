"""Serve models until told to stop.

The address is taken before anything is loaded, so that one that is not free costs nothing; until all models are loaded
requests are told to come again. At Ctrl-C or SIGTERM no new request is taken, answers under way get `GRACE_SECONDS`,
and then everything ends; a second Ctrl-C does not wait. A model's server that ends by itself is started again: the
requests that it was answering fail, all others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import re
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from moegguf.errors import UserError
from moegguf.runtime.serve.address import BACKLOG, KEY_VARIABLE, Address, is_loopback, listen, tls_context, url
from moegguf.runtime.serve.front import MAX_CLIENTS, Door, Front
from moegguf.runtime.serve.models import Served
from moegguf.runtime.serve.process import Process

try:
    import resource
except ImportError:  # Windows
    resource = None

GRACE_SECONDS = 30
HANDSHAKE_SECONDS = 10
_OWN_FILES, _FILES_OF_SERVER = 24, 4
_NOTE_SECONDS = 60

Note = Callable[[str], None]
"""Is told, in a line, what happens while models are served."""


def open_door(address: Address, key: str | None, *, to_all: bool = False) -> Door:
    """Who may come in at `address`: whoever knows `key`. Raises UserError for no key where other machines can come in,
    unless the door is to be open `to_all`."""
    if key is not None and not (isinstance(key, str) and re.fullmatch(r"[!-~]+", key)):
        raise UserError("an API key is one line of letters, digits and signs, without blanks", "write another")
    is_local = is_loopback(address)
    if not is_local and key is None and not to_all:
        raise UserError(
            f"--host {address.host}: other machines could use the server without a key",
            f"set ${KEY_VARIABLE} or --api-key-file, or say --i-know-it-is-unauthenticated",
        )
    return Door(key, names=frozenset({address.host.lower()}) if is_local else None)


def serve(models: Sequence[Served], address: Address, door: Door, *, ready: Callable[[str], None], note: Note) -> None:
    """Serve until Ctrl-C or SIGTERM. `ready` is told the URL once all models are loaded, `note` what happens later.

    Raises UserError when the address cannot be had or a model does not load, KeyboardInterrupt when it is stopped
    before all are loaded.
    """
    tls = tls_context(address)
    with listen(address) as listener:

        async def work() -> bool:
            return await _serve(models, listener, door, tls, _stops(), lambda: ready(url(address, listener)), note)

        if not asyncio.run(work()):
            raise KeyboardInterrupt


@contextlib.contextmanager
def serving(models: Sequence[Served], address: Address, door: Door, *, note: Note) -> Iterator[str]:
    """Serve in a thread for as long as the block runs; gives the URL once all models are loaded. Answers that are under
    way at the block's end are finished. Raises UserError, at the block's end for a model that could not go on."""
    tls = tls_context(address)
    begun: Future[Callable[[], None]] = Future()
    is_ready: Future[None] = Future()

    async def work() -> None:
        stops, loop = asyncio.Queue(), asyncio.get_running_loop()
        begun.set_result(lambda: loop.call_soon_threadsafe(stops.put_nowait, None))
        await _serve(models, listener, door, tls, stops, lambda: is_ready.set_result(None), note)

    with listen(address) as listener, ThreadPoolExecutor(1) as pool:
        working = pool.submit(asyncio.run, work())
        stop = begun.result()
        try:
            wait((working, is_ready), return_when=FIRST_COMPLETED)
            if is_ready.done():
                yield url(address, listener)
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                stop()
        working.result()


async def _serve(
    models: Sequence[Served],
    listener: socket.socket,
    door: Door,
    tls: ssl.SSLContext | None,
    stops: asyncio.Queue[None],
    ready: Callable[[], None],
    note: Note,
) -> bool:
    """Serve until the first of `stops`. Whether all models were loaded before it."""
    processes = [Process(served.settings) for served in models]
    front = Front(processes, door, max_clients=_max_clients(len(models)))
    asyncio.get_running_loop().set_exception_handler(_ear_for_lack_of_files(listener, note))
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


async def _keep(process: Process, note: Note) -> None:
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


def _max_clients(n_models: int) -> int:
    """As many as this process may open two files each for, beside its own and those of its servers. It is let open as
    many as it can be: macOS gives 256 to those who do not ask for more."""
    if resource is None:
        return MAX_CLIENTS
    n_files, n_most = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_own = _OWN_FILES + _FILES_OF_SERVER * n_models
    wanted = n_own + 2 * MAX_CLIENTS
    if 0 <= n_files < wanted:
        n_files = wanted if n_most < 0 else min(wanted, n_most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, n_most))
    return MAX_CLIENTS if n_files < 0 else max(1, min(MAX_CLIENTS, (n_files - n_own) // 2))


def _ear_for_lack_of_files(
    listener: socket.socket, note: Note
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler: connections that find no file wait, and asyncio would say so hundreds of times a second,
    and as often that it cannot take them any more once the listener is closed."""
    said = -math.inf

    def hear(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        error = context.get("exception")
        if isinstance(error, ValueError) and listener.fileno() == -1:
            return
        if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > said + _NOTE_SECONDS:
            said = loop.time()
            note("too many files are open: more connections wait; `ulimit -n` allows more")

    return hear


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
