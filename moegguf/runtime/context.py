"""A llama.cpp context with many sequences in a batch.

The key-value cache is one for all sequences (`kv_unified`): its cells are shared, so short and long sequences mix
freely, and llama.cpp then keeps the tokens of a batch in the order in which they were given, in one micro-batch.
A token pays for every cell in use, whosever it is: few long sequences cost less than many at a time.

A key press cannot interrupt C code, so while tokens are evaluated, which can take minutes, Ctrl-C goes through
llama.cpp's abort callback. Where a GPU backend computes, llama.cpp asks that callback between its batches only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import llama_cpp
import numpy as np

from moegguf.errors import UserError
from moegguf.interrupt import kept_interrupt
from moegguf.runtime.log import llama_log

MAX_BATCH = 512
MAX_SEQUENCES = 32  # llama.cpp allows 256 (LLAMA_MAX_SEQ of src/llama-cparams.h), but keeps room for logits of each
_MAX_LOGITS = 2**26  # 256 MB


class Entry(NamedTuple):
    """A token to evaluate: which one, where it stands in which sequence, and whether its output is asked for."""

    token: int
    position: int
    sequence: int
    has_output: bool


class Context:
    """One context on the weights of a model, which must stay open for as long. Close it, or use it in a `with`.

    `params.n_batch` entries fit one call of `decode`, of which `params.n_outputs_max` may ask for output.
    """

    def __init__(self, weights: llama_cpp.llama_model_p, params: llama_cpp.llama_context_params) -> None:
        params.n_ubatch = params.n_batch
        params.kv_unified = True
        llama_log().forget()
        self.pointer = _init(weights, params)
        if not self.pointer:
            raise UserError(f"llama.cpp cannot run it: {llama_log().reason()}", "take a smaller --ctx")
        self._params = params  # holds the callback that llama.cpp calls
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._memory = llama_cpp.llama_get_memory(self.pointer)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        self._n_outputs = 0

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the key-value cache and the buffers."""
        if self.pointer:
            llama_cpp.llama_batch_free(self._batch)
            with kept_interrupt():
                llama_cpp.llama_free(self.pointer)
                self.pointer = None

    def decode(self, entries: Sequence[Entry]) -> None:
        """Evaluate `entries` (at least one) after what their sequences hold. Raises KeyboardInterrupt at Ctrl-C."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, entry in enumerate(entries):
            batch.token[i] = entry.token
            batch.pos[i] = entry.position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = entry.sequence
            batch.logits[i] = entry.has_output
        self._n_outputs = sum(entry.has_output for entry in entries)
        with interruptible(self.pointer):
            failure = llama_cpp.llama_decode(self.pointer, batch)
            if failure:
                raise RuntimeError(f"llama_decode returned {failure}: {llama_log().reason()}")

    def logits(self) -> np.ndarray:
        """float32 (n_outputs, n_vocab) of the last `decode`, in the order of its entries; valid until the next."""
        if not self._n_outputs:
            return np.empty((0, self._n_vocab), np.float32)
        with kept_interrupt():  # numpy runs Python code while it looks at the pointer, and drops what is raised there
            values = llama_cpp.llama_get_logits(self.pointer)
            return np.ctypeslib.as_array(values, shape=(self._n_outputs, self._n_vocab))

    def forget(self, sequence: int = -1) -> None:
        """Remove `sequence` from the cache; all of them when it is left out."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)


def max_outputs(n_vocab: int) -> int:
    """How many tokens of a batch may ask for output, so that their logits stay within 256 MB."""
    return max(1, min(MAX_BATCH, _MAX_LOGITS // n_vocab))


def groups(sequences: Iterable[Sequence[int]], n_tokens: int, n_sequences: int) -> Iterator[list[Sequence[int]]]:
    """`sequences` in order, in lists of at most so many tokens and sequences; a longer one is a list of its own."""
    group: list[Sequence[int]] = []
    for sequence in sequences:
        if group and (sum(map(len, group)) + len(sequence) > n_tokens or len(group) == n_sequences):
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def check_fits(n_tokens: int, n_ctx: int) -> None:
    """Raises UserError when a sequence of `n_tokens` does not fit the context."""
    if n_tokens > n_ctx:
        raise UserError(f"a text takes {n_tokens} tokens, the context holds {n_ctx}", "cut it, or take a larger --ctx")


def _init(weights: llama_cpp.llama_model_p, params: llama_cpp.llama_context_params) -> int | None:
    """A new context, or None where there is too little memory. Raises KeyboardInterrupt, and leaves none then."""
    pointer = None
    try:
        with kept_interrupt():
            pointer = llama_cpp.llama_init_from_model(weights, params)
    except KeyboardInterrupt:
        if pointer:
            llama_cpp.llama_free(pointer)
        raise
    return pointer


@contextmanager
def interruptible(
    context: llama_cpp.llama_context_p, is_unwanted: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Let Ctrl-C end the llama_decode call within this block, as KeyboardInterrupt; and `is_unwanted`, which is asked
    again and again meanwhile, as RuntimeError."""
    with kept_interrupt() as pressed:
        abort = llama_cpp.ggml_abort_callback(lambda _: pressed.is_set() or is_unwanted())
        llama_cpp.llama_set_abort_callback(context, abort, None)
        try:
            yield
        except RuntimeError:  # llama_decode returned 2: aborted
            if not pressed.is_set():
                raise
        finally:
            llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
