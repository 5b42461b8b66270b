"""The one address of `moegguf serve`, in front of a server for each model.

A model's server takes whatever is sent to it. The front finds the model that a request names, and lets through only
what is well-formed, of bounded size, sent in bounded time and allowed: its limits are those of `wire`, and
`MAX_CLIENTS`. Answers pass through as they come; a client that leaves takes its request with it.

A request names its model in its JSON body or, as in llama.cpp's own router mode, in the query (`?model=`); one that
names none gets the first. What concerns all models, /v1/models and /metrics, is asked of all and put together; the web
page takes several models for llama.cpp's router, and then offers them all.

Adapters are switched by each request's `lora` alone. llama.cpp forgets that a slot's state was computed with an adapter
when the next request names none, and answers with the wrong state; so where a model has adapters every request says the
scale of each, and others that would change them for everybody are refused.

The models' servers take requests with their `key` alone, which only the front knows. A request without the user's key
is passed on without theirs, if it is a GET: what llama.cpp shows to everybody, the web page, then needs no list here.
Without a user's key anybody on this machine may ask, but no foreign web page in a browser: pages of another origin are
refused, and names that were not served (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import parse_qs

import h11

from moegguf.runtime.serve.wire import BODY_BYTES, BODY_SECONDS, REQUEST_SECONDS, Headers, Peer, Refused, response

MAX_CLIENTS = 256
"""Connections at a time; more are told to come again. Each takes two files."""
_LONGEST_TARGET = 8 << 10  # of llama.cpp's server, which hangs up on a longer one

_METHODS = (b"GET", b"HEAD", b"POST", b"DELETE")
_HEALTH = ("/health", "/v1/health")
_CREDENTIALS = (b"authorization", b"x-api-key")
_OF_THIS_HOP = (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"expect")
_CROSS_ORIGIN = b"access-control-"


class Backend(Protocol):
    """A model's own server, on loopback. `port` is None while it does not run."""

    name: str
    port: int | None
    key: str
    n_adapters: int


@dataclass(frozen=True)
class Door:
    """Who may come in: with `key` whoever knows it; without, whoever calls us by one of `names` (None is any)."""

    key: str | None = None
    names: frozenset[str] | None = None


@dataclass(frozen=True)
class _Request:
    """A whole request. `headers` are those to pass on, `query` has the first value of each name, `content` is what the
    body says in JSON, None without one."""

    method: bytes
    target: bytes
    path: str
    query: Mapping[str, str]
    headers: Headers
    body: bytes
    content: Any
    is_let_in: bool


class Front:
    """Answers clients. Give `connected` to `asyncio.start_server`."""

    def __init__(self, backends: Sequence[Backend], door: Door, *, max_clients: int = MAX_CLIENTS) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._door = door
        self._max_clients = max_clients
        self._clients: set[asyncio.Task] = set()
        self._busy: set[asyncio.Task] = set()
        self._is_closing = False

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one client until either side has enough."""
        client, task = Peer(h11.SERVER, reader, writer), asyncio.current_task()
        self._clients.add(task)
        try:
            if len(self._clients) > self._max_clients:
                raise Refused(503, "too many connections; try again in a moment")
            await self._converse(client, task)
        except Refused as refused:
            await _quietly(client.refuse(refused))
        except h11.RemoteProtocolError as error:
            await _quietly(client.refuse(Refused(error.error_status_hint, f"not HTTP/1.1: {error}")))
        except (OSError, asyncio.CancelledError):  # the client left or takes nothing, or the server stops
            pass
        finally:
            self._clients.discard(task)
            client.close()

    async def drain(self, seconds: float) -> None:
        """Close what is idle, give answers under way so many seconds, then break them off."""
        self._is_closing = True
        for task in self._clients - self._busy:
            task.cancel()
        if self._busy:
            await asyncio.wait(self._busy, timeout=seconds)
        for task in self._clients:
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    async def _converse(self, client: Peer, task: asyncio.Task) -> None:
        while not self._is_closing and (head := await _next_head(client)):
            self._busy.add(task)
            try:
                await self._answer(client, await self._whole(client, head))
            finally:
                self._busy.discard(task)
            if client.http.our_state is not h11.DONE or client.http.their_state is not h11.DONE:
                return
            client.http.start_next_cycle()

    async def _whole(self, client: Peer, head: h11.Request) -> _Request:
        """The request of which `head` came, with its body. Raises Refused when it is not to be answered."""
        headers = dict(head.headers)
        self._check_origin(headers)
        is_let_in = self._door.key is None or hmac.compare_digest(_key(headers), self._door.key.encode())
        if head.method not in _METHODS:
            raise Refused(501, f"method {head.method.decode()} is not known here")
        if not is_let_in and head.method not in (b"GET", b"HEAD"):
            raise Refused(401, "wrong or missing API key")
        target = head.target.decode("ascii")
        if not target.startswith("/"):
            raise Refused(400, "the request's target does not begin with /")
        if len(target) > _LONGEST_TARGET:
            raise Refused(414, f"the request's target is longer than {_LONGEST_TARGET} bytes")
        path, _, query = target.partition("?")
        body = await _body(client, headers)
        return _Request(
            method=head.method,
            target=head.target,
            path=path,
            query={name: values[0] for name, values in parse_qs(query).items()},
            headers=_passed_on(head.headers),
            body=body,
            content=_parsed(body),
            is_let_in=is_let_in,
        )

    def _check_origin(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise Refused(403, f"pages of {origin} may not use this server")
        names = self._door.names
        if self._door.key is None and names is not None and not _is_one_of(host, names):
            raise Refused(403, f"this server is not called {host}")

    async def _answer(self, client: Peer, request: _Request) -> None:
        """Answer, unless the client leaves first."""
        answer = asyncio.ensure_future(self._respond(client, request))
        watch = asyncio.ensure_future(_cancel_when_gone(client, answer))
        try:
            await answer
        finally:
            answer.cancel()
            watch.cancel()
            await asyncio.wait((answer, watch))

    async def _respond(self, client: Peer, request: _Request) -> None:
        if request.path in _HEALTH:
            await self._say_health(client)
        elif request.method == b"GET" and request.path in _OF_ALL and "model" not in request.query:
            await self._ask_all(client, request)
        else:
            backend = self._backend(request)
            async with contextlib.aclosing(_exchange(backend, _with_adapters(request, backend))) as events:
                async for event in events:
                    await client.send(event)

    async def _say_health(self, client: Peer) -> None:
        down = [backend.name for backend in self._backends.values() if backend.port is None]
        if down:
            raise Refused(503, f"being loaded: {', '.join(down)}")
        await client.send_whole(200, [(b"Content-Type", b"application/json")], b'{"status": "ok"}')

    async def _ask_all(self, client: Peer, request: _Request) -> None:
        """Put all models' answers together. Raises Refused when one refuses."""
        bodies = {}
        for name, backend in self._backends.items():
            status, bodies[name] = await _fetch(backend, request)
            if status != 200:
                raise Refused(status, f"{name}: {_message_in(bodies[name])}")
        of_all = _OF_ALL[request.path]
        await client.send_whole(200, [(b"Content-Type", of_all.content_type)], of_all.merge(bodies))

    def _backend(self, request: _Request) -> Backend:
        """The server of the model that a request names; any for one that is not let in. Raises Refused for no model."""
        named = request.content.get("model") if isinstance(request.content, dict) else None
        named = request.query.get("model") if named is None else named
        if named is None or not request.is_let_in:
            return next(iter(self._backends.values()))
        if not isinstance(named, str) or named not in self._backends:
            raise Refused(404, f"there is no model {named!r:.200} here; there are: {', '.join(self._backends)}")
        return self._backends[named]


# --- what a client sends ---


async def _next_head(client: Peer) -> h11.Request | None:
    """The head of the next request; None when none comes. Raises Refused when it takes too long."""
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            event = await client.receive()
    except TimeoutError:
        if client.has_begun:
            raise Refused(408, f"no whole request in {REQUEST_SECONDS} seconds") from None
        return None
    return event if isinstance(event, h11.Request) else None


async def _body(client: Peer, headers: Mapping[bytes, bytes]) -> bytes:
    """The body of a request, at most BODY_BYTES. Raises Refused for a longer one, or one that takes too long."""
    too_long = Refused(413, f"the request is longer than {BODY_BYTES} bytes")
    if int(headers.get(b"content-length", b"0")) > BODY_BYTES:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while isinstance(event := await client.receive(), h11.Data):
                body += event.data
                if len(body) > BODY_BYTES:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"no whole request in {BODY_SECONDS} seconds") from None
    return bytes(body)


async def _cancel_when_gone(client: Peer, answer: asyncio.Future) -> None:
    """What comes instead belongs to the next request: h11 keeps it."""
    try:
        is_gone = not await client.read()
    except OSError:
        is_gone = True
    if is_gone:
        answer.cancel()


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    given = headers.get(b"authorization") or headers.get(b"x-api-key", b"")
    return re.sub(rb"(?i)^bearer ", b"", given).strip()


def _parsed(body: bytes) -> Any:
    """What a body says; None for an empty one. Raises Refused when it is no JSON."""
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request's body is not JSON: {error}") from None


def _with_adapters(request: _Request, backend: Backend) -> _Request:
    """`request` with the scale of every adapter in it. A state that was computed with the same scales may be reused."""
    if request.path == "/lora-adapters" and request.method == b"POST":
        raise Refused(501, 'adapters are chosen by each request: "lora": [{"id": 0, "scale": 1}]')
    if not isinstance(request.content, dict) or not (backend.n_adapters or request.content.get("lora")):
        return request
    scales = _scales(request.content.get("lora") or [], backend)
    lora = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    content = {"cache_prompt": True, **request.content, "lora": lora}
    return replace(request, content=content, body=json.dumps(content).encode())


def _scales(asked: Any, backend: Backend) -> list[float]:
    """The scale of each adapter, 0 for those that are not asked for. Raises Refused for another form or number."""
    scales = [0.0] * backend.n_adapters
    for each in asked if isinstance(asked, list) else [asked]:
        match each:
            case {"id": int(number), "scale": int() | float() as scale} if 0 <= number < backend.n_adapters:
                scales[number] = scale
            case _:
                raise Refused(400, f'`lora`: {each!r:.100} is no {{"id": NUMBER, "scale": NUMBER}} of the '
                                   f"{backend.n_adapters} adapters of {backend.name}, counted from 0")  # fmt: skip
    return scales


def _is_one_of(host: str, names: frozenset[str]) -> bool:
    """Whether `host`, a Host header, is this machine itself or one of `names`."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback or name in names
    return name == "localhost" or name in names


# --- what a model's server answers ---


async def _exchange(backend: Backend, request: _Request) -> AsyncIterator[h11.Event]:
    """The events of a server's answer. Raises Refused when it does not answer."""
    if backend.port is None:
        raise Refused(503, f"{backend.name} is being loaded; try again in a moment")
    try:
        server = Peer(h11.CLIENT, *await asyncio.open_connection("127.0.0.1", backend.port))
        try:
            await server.send(*_for(backend, request))
            while not isinstance(event := await server.receive(), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    event = response(event.status_code, _passed_on(event.headers))
                if not isinstance(event, h11.InformationalResponse):
                    yield event
            yield h11.EndOfMessage()
        finally:
            server.close()
    except h11.RemoteProtocolError as error:
        raise Refused(502, f"the server of {backend.name} hung up without a whole answer; try again") from error
    except OSError as error:
        raise Refused(502, f"{backend.name} does not answer: {error}") from error


async def _fetch(backend: Backend, request: _Request) -> tuple[int, bytes]:
    """Status and body of an answer."""
    head, *rest = [event async for event in _exchange(backend, request)]
    return head.status_code, b"".join(event.data for event in rest if isinstance(event, h11.Data))


def _message_in(body: bytes) -> str:
    """What an error of llama.cpp's server says."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return json.loads(body)["error"]["message"]
    return "no reason given"


def _for(backend: Backend, request: _Request) -> list[h11.Event]:
    """`request` as the backend is to see it."""
    headers = [header for header in request.headers if header[0] != b"content-length"]
    headers.append((b"Connection", b"close"))
    if request.is_let_in:
        headers.append((b"Authorization", b"Bearer " + backend.key.encode()))
    if request.body:
        headers.append((b"Content-Length", b"%d" % len(request.body)))
    head = h11.Request(method=request.method, target=request.target, headers=headers)
    return [head, *([h11.Data(data=request.body)] if request.body else []), h11.EndOfMessage()]


def _passed_on(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """`headers` without those of one connection, those that say who asks, and those that open us to other origins."""
    dropped = (*_OF_THIS_HOP, *_CREDENTIALS)
    return [(name, value) for name, value in headers if name not in dropped and not name.startswith(_CROSS_ORIGIN)]


# --- what is asked of all models ---


@dataclass(frozen=True)
class _OfAll:
    content_type: bytes
    merge: Callable[[Mapping[str, bytes]], bytes]


def _merged_lists(bodies: Mapping[str, bytes]) -> bytes:
    """One list of models from each server's own: `data` as OpenAI has it, `models` as Ollama has it."""
    lists: list[dict[str, Any]] = [json.loads(body) for body in bodies.values()]
    merged = {key: [model for each in lists for model in each[key]] for key in ("data", "models")}
    for model in merged["data"]:
        model["status"] = {"value": "loaded", "args": []}  # as llama.cpp's router says it, for the web page
    return json.dumps({"object": "list", **merged}).encode()


def _merged_properties(bodies: Mapping[str, bytes]) -> bytes:
    """The first server's, which are what requests without a model get."""
    first, *others = bodies.values()
    return json.dumps(json.loads(first) | ({"role": "router"} if others else {})).encode()


def _merged_metrics(bodies: Mapping[str, bytes]) -> bytes:
    """Prometheus' text format: each sample gets its model as a label, each description is kept once."""
    lines: dict[str, list[str]] = {}
    for name, body in bodies.items():
        label = json.dumps(name)
        for line in body.decode().splitlines():
            if line.startswith("#"):
                metric = line.split()[2]
                lines.setdefault(metric, [])
                if line not in lines[metric]:
                    lines[metric].append(line)
            elif line:
                metric, _, value = line.partition(" ")
                lines.setdefault(metric, []).append(f"{metric}{{model={label}}} {value}")
    return ("\n".join(line for metric in lines.values() for line in metric) + "\n").encode()


_MODELS = _OfAll(b"application/json", _merged_lists)
_OF_ALL = {
    "/v1/models": _MODELS,
    "/models": _MODELS,
    "/props": _OfAll(b"application/json", _merged_properties),
    "/metrics": _OfAll(b"text/plain; version=0.0.4", _merged_metrics),
}


async def _quietly(awaitable) -> None:
    """Say it to a client that may not listen any more."""
    with contextlib.suppress(OSError, h11.LocalProtocolError, asyncio.CancelledError):
        await awaitable
