"""moegguf's own server for one model, on the runtime of `moegguf chat`: for what the wheel's llama.cpp cannot do.

That one has neither RPC nor a choice of devices or of the number of experts. This one has no slots: one answer at a
time, others wait for their turn. It offers what OpenAI's clients need to talk, /v1/chat/completions, /v1/completions
and /v1/models; whatever else would change an answer is refused by name. A client that leaves loses its turn, or ends
its answer: at the next token, or within the prompt, at once or at the end of a batch where a device computes it. It is
meant for `front` alone, which knows its key and bounds what comes in.

When a worker is lost, or says nothing for too long, the process ends with one line on stderr.
"""

from __future__ import annotations

import functools
import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar

from gguf import GGMLQuantizationType

from moegguf.errors import UserError, one_line
from moegguf.leaving import leave
from moegguf.runtime.answer import Answer, without_leading_blanks
from moegguf.runtime.json_http import JsonHandler
from moegguf.runtime.lost import when_lost
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.offload import FlashAttention, Offload, Override
from moegguf.runtime.run_options import RunOptions
from moegguf.runtime.sampling import Sampling, suggested_by_file
from moegguf.runtime.serve import child
from moegguf.runtime.serve.wire import Refused
from moegguf.runtime.template import Message, end_of_turn, template_of
from moegguf.texts import is_unicode

_SETTINGS = {
    "temp": ("temperature",), "top_p": ("top_p",), "top_k": ("top_k",), "min_p": ("min_p",),
    "repeat_penalty": ("repeat_penalty",), "seed": ("seed",), "max_tokens": ("max_completion_tokens", "max_tokens"),
}  # fmt: skip
"""Field of Sampling → what requests call it; the first that is given counts."""
_MISSING = {
    "best_of": 1, "echo": None, "frequency_penalty": 0, "functions": None, "grammar": None, "json_schema": None,
    "logit_bias": None, "logprobs": None, "lora": None, "n": 1, "presence_penalty": 0,
    "response_format": {"type": "text"}, "suffix": None, "tools": None,
}  # fmt: skip
"""What requests may ask for and is not here → the value that asks for nothing."""
_HERE = "there are /v1/chat/completions, /v1/completions, /v1/models and /health"
_EMBEDDINGS = dict.fromkeys(
    ("/v1/embeddings", "/embeddings", "/embedding"),
    "they need a context of their own beside that of answers; llama.cpp's server has them, which serves where none of "
    "--rpc, --device and --experts-used is given",
)
_WELCOME = b"moegguf serve: OpenAI's API is at /v1. The web page is llama.cpp's, and this is moegguf's own server.\n"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Settings:
    """What one server is to do. Everything survives JSON; `options` have no adapter."""

    module: ClassVar[str] = "moegguf.runtime.serve.own_server"
    program: ClassVar[str] = "moegguf's own server"
    n_adapters: ClassVar[int] = 0
    model: str
    """Path of the GGUF."""
    name: str
    """What requests call it."""
    key: str
    """Opens the server to requests."""
    options: RunOptions

    @property
    def is_verbose(self) -> bool:
        return self.options.verbose

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), default=lambda each: each.value).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str) -> Settings:
        fields = json.loads(line)
        return cls(**fields | {"options": _options(fields["options"])})


def _options(fields: dict[str, Any]) -> RunOptions:
    """From what JSON made of it: lists for tuples, values for enums, dicts for data classes."""
    asked = {name: tuple(each) if isinstance(each, list) else each for name, each in fields["offload"].items()}
    asked["overrides"] = tuple(Override(**each) for each in asked["overrides"])
    return RunOptions(**fields | {
        "offload": Offload(**asked),
        "kv_type": GGMLQuantizationType(fields["kv_type"]),
        "flash_attention": FlashAttention(fields["flash_attention"]),
    })  # fmt: skip


def start(line: str) -> tuple[int, object]:
    """Serve as `line` says; returns the port and the server. Raises UserError when the model cannot be loaded."""
    settings = Settings.from_line(line)
    offload = settings.options.offload
    when_lost(offload.workers, offload.patience, lambda message, code: leave(one_line(message), code))
    voice = _Voice(open_model(settings.model, settings.options))
    server = _Server(("127.0.0.1", 0), functools.partial(_Handler, settings, voice))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1], server


@dataclass(frozen=True)
class _Asked:
    """A request for an answer. Texts in `stops` end it, and are no part of it."""

    prompt: list[int]
    sampling: Sampling
    stops: tuple[str, ...]
    is_streamed: bool
    has_usage: bool
    """Whether a stream is to end with what it took."""


class _Voice:
    """The model, for whoever holds `turn`: one at a time."""

    def __init__(self, model: Model) -> None:
        self.turn = threading.Lock()
        self._model = model
        self._defaults = suggested_by_file(model.header.get)
        self._template = template_of(model.header, model.vocab)
        self._end_of_turn = end_of_turn(self._template, model.vocab)

    def asked(self, endpoint: _Endpoint, content: Any) -> _Asked:
        """Raises UserError for what is wrong with a request, Refused for what is missing here."""
        if not isinstance(content, dict):
            raise UserError("the request is no JSON object")
        for name, nothing in _MISSING.items():
            if content.get(name) and content[name] != nothing:
                raise Refused(501, f"`{name}` is not supported by moegguf's own server")
        given = {
            name: next((content[each] for each in names if content.get(each) is not None), None)
            for name, names in _SETTINGS.items()
        }
        options = content.get("stream_options")
        return _Asked(
            prompt=self._fitting(endpoint.prompt(self, content)),
            sampling=self._defaults.merged(given),
            stops=_stops(content.get("stop")),
            is_streamed=bool(content.get("stream")),
            has_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )

    def chat_prompt(self, content: dict) -> list[int]:
        messages = content.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UserError("`messages`: expected a list of messages, the last one the user's")
        messages = [_message(each) for each in messages]
        if messages[-1]["role"] != "user":
            raise UserError("`messages`: the last one is not the user's")
        return self._tokens(self._template.prompt(messages))

    def text_prompt(self, content: dict) -> list[int]:
        match content.get("prompt"):
            case str(text) | [str(text)]:
                return self._tokens(text)
            case [int(), *_] as tokens if all(isinstance(each, int) for each in tokens):
                if not all(0 <= token < self._model.vocab.n_tokens for token in tokens):
                    raise UserError("`prompt`: holds a token that the vocabulary lacks")
                return tokens
            case [_, *_]:
                raise Refused(501, "several prompts in a request are not supported by moegguf's own server")
        raise UserError("`prompt`: expected a text, or a list of tokens")

    def answer(self, asked: _Asked, is_gone: Callable[[], bool]) -> Answer:
        """`is_gone` is asked within the prompt and after each token; where it says so, ConnectionAbortedError is
        raised."""

        def tokens() -> Iterator[int]:
            with closing(self._model.generate(asked.prompt, asked.sampling, is_gone)) as generated:
                try:
                    for token in generated:
                        if is_gone():
                            break
                        yield token
                except RuntimeError:
                    if not is_gone():
                        raise
            raise ConnectionAbortedError

        room = self._model.n_ctx - len(asked.prompt)
        limit = min(asked.sampling.max_tokens or room, room)
        return Answer(tokens(), self._model.vocab, ends=self._ends, limit=limit)

    def _ends(self, token: int) -> bool:
        return token == self._end_of_turn or self._model.vocab.ends_answer(token)

    def _tokens(self, text: str) -> list[int]:
        if not is_unicode(text):
            raise UserError("the prompt holds half a character")
        return self._model.vocab.tokenize_prompt(text)

    def _fitting(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise UserError("the prompt is empty")
        if len(tokens) >= self._model.n_ctx:
            raise UserError(f"the prompt is {len(tokens)} tokens long, the context holds {self._model.n_ctx}")
        return tokens


def _message(each: Any) -> Message:
    match each:
        case {"role": str(role), "content": str(text)} if role in _ROLES:
            return {"role": _ROLES[role], "content": text}
        case {"role": str(role), "content": [*parts]} if role in _ROLES:
            texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if len(texts) == len(parts):
                return {"role": _ROLES[role], "content": "".join(texts)}
    raise UserError(f"`messages`: {each!r:.100} is no text of role {', '.join(_ROLES)}")


def _stops(given: Any) -> tuple[str, ...]:
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(stop, str) for stop in stops):
        raise UserError("`stop`: expected a text, or a list of texts")
    return tuple(filter(None, stops))


class _Reply:
    """An answer as a client is to see it: up to the first of the stops."""

    def __init__(self, asked: _Asked, answer: Answer, shown: Callable[[Iterator[str]], Iterator[str]]) -> None:
        self._asked, self._answer, self._shown = asked, answer, shown
        self._is_cut = False

    def pieces(self) -> Iterator[str]:
        """Its text, each part as soon as no stop can begin in it."""
        held = ""
        with closing(self._answer.pieces()) as said:
            for piece in self._shown(said):
                held += piece
                if found := [held.index(stop) for stop in self._asked.stops if stop in held]:
                    self._is_cut, held = True, held[: min(found)]
                    break
                if n_safe := len(held) - self._n_doubtful(held):
                    yield held[:n_safe]
                    held = held[n_safe:]
        if held:
            yield held

    @property
    def finish_reason(self) -> str:
        return "length" if self._answer.end == "limit" and not self._is_cut else "stop"

    @property
    def usage(self) -> dict[str, int]:
        n_prompt, n_said = len(self._asked.prompt), self._answer.n_tokens
        return {"prompt_tokens": n_prompt, "completion_tokens": n_said, "total_tokens": n_prompt + n_said}

    def _n_doubtful(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop."""
        longest = max(map(len, self._asked.stops), default=1) - 1
        tails = range(min(longest, len(text)), 0, -1)
        return next((n for n in tails if any(stop.startswith(text[-n:]) for stop in self._asked.stops)), 0)


# --- HTTP ---


@dataclass(frozen=True)
class _Endpoint:
    """How a path takes its prompt and words its answers."""

    kind: str
    kind_of_piece: str
    prompt: Callable[[_Voice, dict], list[int]]
    shown: Callable[[Iterator[str]], Iterator[str]]
    whole: Callable[[str], dict]
    piece: Callable[[str], dict]


_ENDPOINTS = {
    "/v1/chat/completions": _Endpoint(
        "chat.completion",
        "chat.completion.chunk",
        _Voice.chat_prompt,
        without_leading_blanks,
        lambda text: {"message": {"role": "assistant", "content": text}},
        lambda text: {"delta": {"role": "assistant", "content": text} if text else {}},
    ),
    "/v1/completions": _Endpoint(
        "text_completion",
        "text_completion",
        _Voice.text_prompt,
        iter,
        lambda text: {"text": text},
        lambda text: {"text": text},
    ),
}


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


class _Handler(JsonHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def __init__(self, settings: Settings, voice: _Voice, *args) -> None:
        self._settings, self._voice = settings, voice
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/", "/index.html"):
            self.send_whole(200, "text/plain", _WELCOME)
        elif path in ("/health", "/v1/health"):
            self.send_json(200, {"status": "ok"})
        else:
            self._guarded(lambda: self._list(path))

    def do_POST(self) -> None:
        self._guarded(self._answer)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses."""
        self._refuse(Refused(code, message or self.responses[code][0]))

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def _guarded(self, respond: Callable[[], None]) -> None:
        """Respond to whoever has the key, and turn errors into answers."""
        try:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._settings.key.encode()):
                raise Refused(401, "wrong or missing API key")
            respond()
        except OSError:  # nobody listens any more
            self.close_connection = True
        except Refused as refused:
            self._refuse(refused)
        except UserError as error:
            self._refuse(Refused(400, str(error)))

    def _refuse(self, refused: Refused) -> None:
        self.send_whole(refused.status, "application/json", refused.body)

    def _list(self, path: str) -> None:
        if path not in ("/v1/models", "/models"):
            raise Refused(404, f"{path} is not here: {_HERE}")
        name = self._settings.name
        model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "moegguf"}
        self.send_json(200, {"object": "list", "data": [model], "models": [{"name": name, "model": name}]})

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path not in _ENDPOINTS:
            raise Refused(501, f"{path} is not supported by moegguf's own server: {_EMBEDDINGS.get(path, _HERE)}")
        try:
            content = self.read_json()
        except ValueError as error:
            raise Refused(400, f"the request's body is not JSON: {error}") from None
        endpoint = _ENDPOINTS[path]
        asked = self._voice.asked(endpoint, content)
        with self._voice.turn:
            if self._is_gone():
                raise ConnectionAbortedError
            reply = _Reply(asked, self._voice.answer(asked, self._is_gone), endpoint.shown)
            if asked.is_streamed:
                self._stream(endpoint, reply, asked.has_usage)
            else:
                self._say_whole(endpoint, reply)

    def _say_whole(self, endpoint: _Endpoint, reply: _Reply) -> None:
        content = endpoint.whole("".join(reply.pieces()))
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reply.finish_reason}
        self.send_json(200, self._about(endpoint.kind) | {"choices": [choice], "usage": reply.usage})

    def _stream(self, endpoint: _Endpoint, reply: _Reply, has_usage: bool) -> None:
        about = self._about(endpoint.kind_of_piece)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with closing(reply.pieces()) as pieces:
            for piece in pieces:
                self._send_event(about | {"choices": [{"index": 0, **endpoint.piece(piece), "finish_reason": None}]})
        last = {"index": 0, **endpoint.piece(""), "finish_reason": reply.finish_reason}
        self._send_event(about | {"choices": [last]})
        if has_usage:
            self._send_event(about | {"choices": [], "usage": reply.usage})
        self._send_chunk(b"data: [DONE]\n\n")
        self._send_chunk(b"")

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": self._settings.name}

    def _send_event(self, content: dict) -> None:
        self._send_chunk(b"data: %s\n\n" % json.dumps(content).encode())

    def _send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _is_gone(self) -> bool:
        """Whether the client has left: it has said all that it had to say, so what comes is its end."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


if __name__ == "__main__":
    child.run(start)
