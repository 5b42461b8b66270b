"""An answer as text, made of a model's tokens as they come."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

from moegguf.runtime.vocab import Vocab


class Answer:
    """The text of `tokens`, until one of them `ends` it or there are `limit`; reading it closes them at the end.

    `n_tokens` were taken so far. `end` is `stop` or `limit` once it is over, `interrupted` until then.
    """

    def __init__(self, tokens: Iterator[int], vocab: Vocab, *, ends: Callable[[int], bool], limit: int) -> None:
        self.n_tokens, self.end = 0, "interrupted"
        self._tokens, self._vocab, self._ends, self._limit = tokens, vocab, ends, limit

    def pieces(self) -> Iterator[str]:
        """The text, in whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            for token in self._tokens:
                if self._ends(token):
                    self.end = "stop"
                    break
                self.n_tokens += 1
                if piece := decoder.decode(self._vocab.piece(token)):
                    yield piece
                if self.n_tokens == self._limit:
                    self.end = "limit"
                    break
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            self._tokens.close()


def without_leading_blanks(pieces: Iterator[str]) -> Iterator[str]:
    """`pieces` from their first character that is not blank on, none of them empty."""
    for piece in pieces:
        if piece := piece.lstrip():
            yield piece
            yield from pieces
