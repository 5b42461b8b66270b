"""HTTP/1.1 over asyncio streams, with a limit on everything that the other side decides.

h11 holds the protocol: what it lets through is well-formed. This adds the waiting, and one exception, `Refused`, for
whatever is to be answered with an error: the body of that answer has the form that llama.cpp's server and OpenAI's
clients use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from http import HTTPStatus

import h11

HEAD_BYTES = 32 << 10
BODY_BYTES = 16 << 20
CHUNK = 64 << 10
REQUEST_SECONDS = 30
"""From a connection's start, or its last answer, to the end of the next request's head."""
BODY_SECONDS = 60
WRITE_SECONDS = 60
"""How long a client may take no byte of its answer."""
LINGER_SECONDS = 2
"""How long a refused client may go on sending: a connection closed on unread data loses the answer with it."""

Headers = list[tuple[bytes, bytes]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    431: "invalid_request_error",
    501: "not_supported_error",
    502: "server_error",
    503: "unavailable_error",
}


class Refused(Exception):
    """A request that is answered with the HTTP status `status` and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    @property
    def body(self) -> bytes:
        error = {"code": self.status, "message": self.message, "type": _TYPES.get(self.status, "server_error")}
        return json.dumps({"error": error}).encode()


class Peer:
    """One end of a connection: h11's rules (`http`) over a pair of streams."""

    def __init__(
        self, role: type[h11.CLIENT] | type[h11.SERVER], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.http = h11.Connection(role, max_incomplete_event_size=HEAD_BYTES)
        self._reader, self._writer = reader, writer
        self._wants_body = True

    async def receive(self) -> h11.Event:
        """What the other side sent next. Raises h11.RemoteProtocolError for what is no HTTP, and OSError."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            if self.http.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            await self.read()
        if isinstance(event, h11.Request):
            self._wants_body = event.method != b"HEAD"
        return event

    async def read(self) -> bool:
        """Take in some of what the other side sends; False at its end."""
        data = await self._reader.read(CHUNK)
        self.http.receive_data(data)
        return bool(data)

    async def send(self, *events: h11.Event) -> None:
        """Raises TimeoutError when the other side takes nothing for long, and OSError."""
        for event in events:
            self._writer.write(self.http.send(event) or b"")
        async with asyncio.timeout(WRITE_SECONDS):
            await self._writer.drain()

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """An answer whose body is at hand."""
        head = response(status, [*headers, (b"Content-Length", b"%d" % len(body))])
        await self.send(head, *([h11.Data(data=body)] if self._wants_body else []), h11.EndOfMessage())

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error if an answer is still to be given, and let the other side read it."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [(b"Content-Type", b"application/json"), (b"Connection", b"close")]
        await self.send_whole(refused.status, headers, refused.body)
        if self._writer.can_write_eof():
            self._writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(CHUNK):
                    pass

    @property
    def has_begun(self) -> bool:
        """Whether a part of a request is here."""
        return bool(self.http.trailing_data[0])

    def close(self) -> None:
        self._writer.close()


def response(status: int, headers: Headers) -> h11.Response:
    """The head of an answer, with the status in words as well."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    return h11.Response(status_code=status, headers=headers, reason=reason)
