"""A model behind the completions protocol of OpenAI, on the loopback, for programs that measure models.

What lm-evaluation-harness asks of its model type `local-completions` with a remote tokenizer, and no more: log p of
given tokens (`echo` with `logprobs`), greedy continuations, and the model's own tokenizer (`/tokenizer_info`,
`/tokenize`, `/detokenize`, as vLLM has them). Prompts come as tokens, many in a request, and run as one batch, so
what is scored is exactly what was asked. The server of llama-cpp-python takes no tokens, and where a model has no BOS
it returns for each echoed token the log p of the token before it.

Deviations. With `echo`, the one token that the protocol lets a model add is not sampled: it is the end of text, and
no client of this kind looks at it. In `top_logprobs` a token that is not the likeliest is beaten by a nameless one.
Sampling is refused. One request at a time.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import HTTPServer

from moegguf.errors import UserError
from moegguf.runtime.batch import Scored, generate_greedy, score
from moegguf.runtime.json_http import JsonHandler
from moegguf.runtime.model import Model

_FIRST_ROUND = 16
"""Tokens of an answer before stop strings are looked for; each round is twice as long as the one before."""

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionServer:
    """Serves `model` while it is open as a context manager. The model must not be used otherwise meanwhile."""

    def __init__(self, model: Model) -> None:
        answers = _Answers(model)
        routes = {
            "/tokenizer_info": answers.tokenizer_info,
            "/tokenize": answers.tokenize,
            "/detokenize": answers.detokenize,
            "/v1/completions": answers.completions,
        }
        self._server = HTTPServer(("127.0.0.1", 0), functools.partial(_Handler, routes))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens, without a path: a free port of this machine's own."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> CompletionServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()  # waits for the request in progress
        self._server.server_close()
        self._thread.join()


class _Answers:
    """The routes: each takes a request's JSON and returns that of the response."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._vocab = model.vocab
        self._bos = self._vocab.tokenize_prompt("")

    def tokenizer_info(self, _: dict) -> dict:
        names = {"bos_token": self._vocab.bos, "eos_token": self._vocab.eos}
        info = {key: None if token is None else self._vocab.name(token) for key, token in names.items()}
        return {**info, "chat_template": self._model.chat_template}

    def tokenize(self, request: dict) -> dict:
        tokens = self._vocab.tokenize(request["prompt"])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._model.n_ctx}

    def detokenize(self, request: dict) -> dict:
        return {"prompt": self._text(request["tokens"])}

    def completions(self, request: dict) -> dict:
        if request.get("temperature", 0):
            raise UserError(f"temperature {request['temperature']}: answers are greedy here", "take temperature 0")
        prompts = [self._tokens(prompt) for prompt in _several(request["prompt"])]
        choices = self._echoes(prompts) if request.get("echo") else self._continuations(prompts, request)
        return {"object": "text_completion", "model": self._model.name, "choices": choices}

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return self._vocab.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]

    def _text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._vocab.piece, tokens)).decode("utf-8", errors="replace")

    def _begun(self, tokens: list[int]) -> list[int]:
        """`tokens` with the BOS that the model wants in front."""
        return tokens if tokens[:1] == self._bos else [*self._bos, *tokens]

    def _echoes(self, prompts: list[list[int]]) -> list[dict]:
        end = self._vocab.eos or 0
        sequences = [[*self._begun(tokens), end] for tokens in prompts]
        starts = [len(whole) - 1 - len(tokens) for whole, tokens in zip(sequences, prompts, strict=True)]
        scored = score(self._model, sequences, starts)
        return [
            {
                "index": i,
                "text": self._text(tokens),
                "finish_reason": "length",
                "logprobs": self._logprobs([*tokens, end], each),
            }
            for i, (tokens, each) in enumerate(zip(prompts, scored, strict=True))
        ]

    def _logprobs(self, tokens: list[int], scored: Scored) -> dict:
        names = [self._text([token]) or self._vocab.name(token) for token in tokens]
        logprobs = [float(value) for value in scored.logprobs]
        tops = [
            {name: value} if is_greedy else {name: value, "": math.nextafter(value, math.inf)}
            for name, value, is_greedy in zip(names[-len(logprobs) :], logprobs, scored.is_greedy, strict=True)
        ]
        unknown = [None] * (len(tokens) - len(logprobs))  # the first token of all, where no BOS is before it
        return {"tokens": names, "token_logprobs": [*unknown, *logprobs], "top_logprobs": [*unknown, *tops]}

    def _continuations(self, prompts: list[list[int]], request: dict) -> list[dict]:
        limit = int(request.get("max_tokens") or DEFAULT_MAX_TOKENS)
        stops = [stop for stop in _several(request.get("stop") or []) if stop]
        texts = self._greedy([self._begun(tokens) for tokens in prompts], limit, stops)
        return [{"index": i, "text": text, "finish_reason": "stop", "logprobs": None} for i, text in enumerate(texts)]

    def _greedy(self, prompts: list[list[int]], limit: int, stops: list[str]) -> list[str]:
        """Continuations up to the first of `stops`, in rounds: a stop string can span tokens."""
        said: list[list[int]] = [[] for _ in prompts]
        longest = max(map(len, prompts))
        limit = min(limit, self._model.n_ctx - longest)
        if limit < 1:
            raise UserError(f"a prompt takes {longest} tokens, the context holds {self._model.n_ctx}", "shorten it")
        unfinished, n_said, step = list(range(len(prompts))), 0, _FIRST_ROUND
        while unfinished and n_said < limit:
            step = min(step, limit - n_said)
            asked = [[*prompts[i], *said[i]] for i in unfinished]
            still: list[int] = []
            for number, tokens in generate_greedy(self._model, asked, step, self._vocab.ends_answer):
                i = unfinished[number]
                said[i] += tokens
                if len(tokens) == step and not any(stop in self._text(said[i]) for stop in stops):
                    still.append(i)
            unfinished, n_said, step = still, n_said + step, 2 * step
        return [_until(self._text(tokens), stops) for tokens in said]


def _several(value: object) -> list:
    """A prompt or stop of the protocol, one or many, as many."""
    is_many = isinstance(value, list) and (not value or not isinstance(value[0], int))
    return value if is_many else [value]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class _Handler(JsonHandler):
    def __init__(self, routes: Mapping[str, Callable[[dict], dict]], *args) -> None:
        self._routes = routes
        super().__init__(*args)

    def do_GET(self) -> None:
        self._respond({})

    def do_POST(self) -> None:
        try:
            request = self.read_json()
        except ValueError:
            return self.send_json(400, {"error": {"message": "the request is no JSON"}})
        return self._respond(request)

    def _respond(self, request: dict) -> None:
        route = self._routes.get(self.path)
        if route is None:
            return self.send_json(404, {"error": {"message": f"no such path: {self.path}"}})
        try:
            return self.send_json(200, route(request))
        except (UserError, KeyError, TypeError, ValueError) as error:
            return self.send_json(400, {"error": {"message": str(error)}})
