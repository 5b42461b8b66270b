"""The vocabulary of a GGUF file: text to tokens and back, as llama.cpp does it.

A `Vocab` belongs to a loaded model, or comes from `open_vocab`, which reads a file's tokenizer and none of its
weights. The high-level `llama_cpp.Llama.detokenize` cuts pieces longer than 32 bytes, so pieces are read here.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import llama_cpp

from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.interrupt import kept_interrupt
from moegguf.runtime.log import llama_log


class Vocab:
    """The tokens of one model. `pointer` is its llama_vocab, which must outlive it."""

    def __init__(self, pointer: llama_cpp.llama_vocab_p) -> None:
        self._pointer = pointer
        self.n_tokens: int = llama_cpp.llama_vocab_n_tokens(pointer)
        self.bos = _token_or_none(llama_cpp.llama_vocab_bos(pointer))
        """The token that begins a sequence; None when there is none."""
        self.eos = _token_or_none(llama_cpp.llama_vocab_eos(pointer))
        """The token that ends a sequence; None when there is none."""
        self._adds_bos = self.bos is not None and llama_cpp.llama_vocab_get_add_bos(pointer)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of `text`; the names of special tokens in it become those tokens, nothing is added."""
        encoded = text.encode()
        room = len(encoded) + 2
        while True:
            tokens = (llama_cpp.llama_token * room)()
            n = llama_cpp.llama_tokenize(self._pointer, encoded, len(encoded), tokens, room, False, True)
            if n >= 0:
                return tokens[:n]
            room = -n

    def tokenize_prompt(self, text: str) -> list[int]:
        """Tokens of a whole prompt: with the token that begins it, where the model wants one and `text` has none."""
        tokens = self.tokenize(text)
        return [self.bos, *tokens] if self._adds_bos and tokens[:1] != [self.bos] else tokens

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; none for a control token. A character may span several tokens."""
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self._pointer, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(self._pointer, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def name(self, token: int | None) -> str:
        """How the vocabulary writes `token`, a control token too; empty for None."""
        text = b"" if token is None else llama_cpp.llama_vocab_get_text(self._pointer, token)
        return text.decode("utf-8", errors="replace")

    def ends_answer(self, token: int) -> bool:
        """Whether the vocabulary marks `token` as the end of a turn, a message or a text."""
        return llama_cpp.llama_vocab_is_eog(self._pointer, token)

    def is_control(self, token: int) -> bool:
        """Whether `token` steers the model and is never shown."""
        return llama_cpp.llama_vocab_is_control(self._pointer, token)


def open_vocab(path: str | Path) -> Vocab:
    """The vocabulary of the GGUF at `path`; freed when it is no longer used. Raises UserError."""
    read_header(Path(path))
    llama_log().forget()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with kept_interrupt():
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise UserError(f"{path}: llama.cpp cannot read its vocabulary: {llama_log().reason()}", "convert it again")
    vocab = Vocab(llama_cpp.llama_model_get_vocab(model))
    weakref.finalize(vocab, llama_cpp.llama_model_free, model)
    return vocab


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None
