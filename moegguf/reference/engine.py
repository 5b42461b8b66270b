"""Text from a `ReferenceModel`: what the runtime does with a GGUF, one sequence at a time.

A `TorchEngine` has the methods that a conversation needs of a model and, for evaluation, those of many sequences
(`score`, `generate_greedy`). It works on tokens: the vocabulary is handed in, and handed on to whoever asks for it.
Greedy choices are those of the runtime up to rounding. Sampling goes through the same steps as llama.cpp's chain, with
random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moegguf.errors import UserError
from moegguf.mix import Mix
from moegguf.reference.model import Cache, ReferenceModel

DEFAULT_CTX = 4096
PENALTY_TOKENS = 64
"""How many of the last tokens of an answer a repeat penalty looks at."""
SCORED_AT_ONCE = 512
"""Positions whose logits are in memory together."""


class Settings(Protocol):
    """How tokens are chosen: 0 is off for `top_k` and `min_p`, 1 for `top_p` and `repeat_penalty`."""

    temp: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Scored:
    """How likely the tokens of one sequence are, each after those before it.

    `logprobs` is float32 (n_scored,), natural logarithms; `is_greedy` bool (n_scored,): no token was likelier.
    """

    logprobs: np.ndarray
    is_greedy: np.ndarray


class TorchEngine:
    """A model with one context. It remembers the tokens of its last answer, so that a longer history costs only
    what is new in it."""

    def __init__(self, model: ReferenceModel, *, name: str, vocab: Any, chat_template: str | None, n_ctx: int) -> None:
        self.model = model.eval()
        self.name = name
        self.vocab = vocab
        """The tokenizer, for whoever asks: nothing here does."""
        self.chat_template = chat_template
        self.n_ctx = n_ctx
        """Tokens that prompt and answer may take together."""
        self._cache = Cache()
        self._seen: list[int] = []

    @classmethod
    def of_mix(
        cls, mix: Mix, *, name: str, vocab: Any, ctx: int | None = None, threads: int | None = None
    ) -> TorchEngine:
        """Read the weights of `mix`, as float32. `ctx` is the base's own unless given, but at most 4096; `threads` CPU
        threads are used from now on, by all of PyTorch. Raises UserError as `ReferenceModel.from_mix` does."""
        if threads:
            torch.set_num_threads(threads)
        template = mix.base.read_vocab().get("tokenizer.chat_template")
        n_ctx = ctx or min(int(mix.base.hparam("context_length", DEFAULT_CTX)), DEFAULT_CTX)
        model = ReferenceModel.from_mix(mix)
        return cls(model, name=name, vocab=vocab, chat_template=template.value if template else None, n_ctx=n_ctx)

    def n_cached(self, tokens: Sequence[int]) -> int:
        """How many tokens at the head of the prompt `tokens` need no evaluation: the last answer left them here."""
        same = (seen == token for seen, token in zip(self._seen, tokens, strict=False))
        n_same = next((i for i, is_same in enumerate(same) if not is_same), min(len(self._seen), len(tokens)))
        return min(n_same, len(tokens) - 1)

    def generate(self, tokens: Sequence[int], sampling: Settings) -> Iterator[int]:
        """The tokens that follow the prompt `tokens`, without end; the caller stops it."""
        random = torch.Generator()
        if sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(sampling.seed)
        n_cached = self.n_cached(tokens)
        del self._seen[n_cached:]
        new, said = list(tokens[n_cached:]), []
        while True:
            token = choose(self._next_logits(new), said[-PENALTY_TOKENS:], sampling, random)
            yield token
            new = [token]
            said.append(token)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[Scored]:
        """How likely the tokens of each sequence are, from its token number `starts[i]` on, in the order given.

        The first token of a sequence has nothing before it, so a start of 0 means 1. Raises UserError for a sequence
        longer than the context.
        """
        for tokens in sequences:
            self._check_fits(len(tokens))
        for tokens, start in zip(sequences, starts, strict=True):
            yield self._score(tokens, max(start, 1))

    def generate_greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, ends: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """How the model goes on after each prompt when it always takes the likeliest token: (index, tokens).

        An answer ends before the first token that `ends`, or after `max_tokens`. Raises UserError for a prompt that
        leaves no room for `max_tokens` in the context.
        """
        for prompt in prompts:
            self._check_fits(len(prompt) + max_tokens)
        for index, prompt in enumerate(prompts):
            yield index, self._answer(prompt, max_tokens, ends)

    def _answer(self, prompt: Sequence[int], max_tokens: int, ends: Callable[[int], bool]) -> list[int]:
        del self._seen[self.n_cached(prompt) :]
        new, said = list(prompt[len(self._seen) :]), []
        while len(said) < max_tokens:
            token = int(self._next_logits(new).argmax())
            if ends(token):
                break
            said.append(token)
            new = [token]
        return said

    @torch.inference_mode()
    def _next_logits(self, new: list[int]) -> torch.Tensor:
        """Float32 (n_vocab,) after all tokens seen and `new`, which join them."""
        self._cache.truncate(len(self._seen))  # whatever an interrupted pass has left behind it, too
        features = self.model.features(self._batch(new), self._cache)
        self._seen += new
        return self.model.output(features[0, -1]).float().cpu()

    @torch.inference_mode()
    def _score(self, tokens: Sequence[int], start: int) -> Scored:
        features = self.model.features(self._batch(tokens))[0]
        logprobs, is_greedy = [np.zeros(0, np.float32)], [np.zeros(0, bool)]
        for first in range(start, len(tokens), SCORED_AT_ONCE):
            targets = self._batch(tokens[first : first + SCORED_AT_ONCE])[0]
            logits = self.model.output(features[first - 1 : first - 1 + len(targets)]).float()
            of_targets = logits.gather(-1, targets[:, None])[:, 0]
            logprobs.append((of_targets - logits.logsumexp(-1)).cpu().numpy())
            is_greedy.append((of_targets == logits.amax(-1)).cpu().numpy())
        return Scored(np.concatenate(logprobs), np.concatenate(is_greedy))

    def _batch(self, tokens: Sequence[int]) -> torch.Tensor:
        """int64 (1, n)"""
        return torch.tensor([list(tokens)], device=self.model.token_embd.weight.device)

    def _check_fits(self, n_tokens: int) -> None:
        if n_tokens > self.n_ctx:
            raise UserError(f"{n_tokens} tokens do not fit the context of {self.n_ctx}", "take a larger --ctx")


def choose(logits: torch.Tensor, recent: Sequence[int], settings: Settings, random: torch.Generator) -> int:
    """The next token, from float32 (n_vocab,); at temperature 0 the likeliest after the penalty for `recent` ones."""
    logits = _penalised(logits, recent, settings.repeat_penalty)
    if settings.temp == 0:
        return int(logits.argmax())
    tokens, probs = candidates(logits, settings)
    return int(tokens[probs.multinomial(1, generator=random)])


def candidates(logits: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, the likeliest first, and with which probability: top_k, top_p, min_p, temperature.

    Each step as in llama.cpp, src/llama-sampler.cpp.
    """
    logits, tokens = logits.sort(descending=True, stable=True)
    logits = logits[: settings.top_k or None]
    shares = logits.softmax(-1)
    is_kept = (shares.cumsum(-1) - shares < settings.top_p) | (settings.top_p == 1)
    is_kept &= shares >= settings.min_p * shares[0]
    is_kept[0] = True
    return tokens[: len(logits)][is_kept], (logits[is_kept] / settings.temp).softmax(-1)


def _penalised(logits: torch.Tensor, recent: Sequence[int], penalty: float) -> torch.Tensor:
    """Each of the `recent` tokens made less likely: a positive logit is divided by `penalty`, others multiplied."""
    if penalty == 1 or not recent:
        return logits
    places = torch.tensor(sorted(set(recent)))
    found = logits[places]
    return logits.index_copy(0, places, torch.where(found > 0, found / penalty, found * penalty))
