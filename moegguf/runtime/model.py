"""Open a GGUF through llama-cpp-python: check it first, say why when it cannot run, generate tokens.

Everything that a user can get wrong is found before llama.cpp sees the file: the header is checked against
the file's size, and a mix is not run with fewer experts than its router can choose from. What only llama.cpp
can know (an unknown architecture, too little memory) is read from its log, which stays hidden otherwise.

Two things the high-level `llama_cpp.Llama` leaves to us. Its `detokenize` cuts pieces longer than 32 bytes,
so pieces are read here. And a key press cannot interrupt C code, so while a prompt is evaluated, which can
take minutes, Ctrl-C goes through llama.cpp's abort callback; between two tokens Python's own way suffices.
Where a GPU backend computes, llama.cpp asks that callback between its batches only.

Does not know chat templates (`chat`) nor how to spread a model over devices.
"""

from __future__ import annotations

import ctypes
import functools
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
import llama_cpp

from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.metadata import Card, read_card
from moegguf.runtime.machine import physical_cores
from moegguf.runtime.sampling import MAX_SEED, Sampling

DEFAULT_CTX = 4096
MIN_CTX = 16
MAX_THREADS = 512  # GGML_MAX_N_THREADS
ALL_LAYERS = -1

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level, ggml/include/ggml.h


@dataclass(frozen=True)
class RunOptions:
    """How to run a file. None leaves the choice to the file and the machine."""

    ctx: int | None = None
    """Context in tokens; default: the model's own, at most 4096."""
    threads: int | None = None
    """CPU threads; default: the physical cores this process may use."""
    gpu_layers: int = 0
    """How many layers go to the GPU; -1 is all of them."""
    batch: int = 512
    """Prompt tokens evaluated at once."""
    experts_used: int | None = None
    """Experts per token, in place of the file's own number."""
    mmap: bool = True
    mlock: bool = False
    verbose: bool = False


def open_model(path: str | Path, options: RunOptions = RunOptions()) -> Model:
    """Load the GGUF at `path`. Raises UserError when the file, the options or the machine do not allow it."""
    header = read_header(Path(path))
    card = read_card(header)
    _check_experts_used(header, card, options.experts_used)
    log = _log()
    log.start(options.verbose)
    try:
        llama = llama_cpp.Llama(str(path), **_llama_arguments(header, options))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: llama.cpp cannot run it: {log.reason() or error}", _mend(log.reason())) from error
    except jinja2.TemplateError as error:
        raise UserError(f"{path}: its chat template is broken: {error}", "convert it with a working one") from error
    if llama_cpp.llama_model_has_encoder(llama.model) or not llama_cpp.llama_get_memory(llama.ctx):
        llama.close()
        raise UserError(
            f"{path}: architecture {header.get('general.architecture')!r} does not write text token by token",
            "pass a decoder-only language model",
        )
    return Model(llama, header, card, options)


class Model:
    """A loaded model with one context. Close it, or use it as a context manager."""

    def __init__(self, llama: llama_cpp.Llama, header: Header, card: Card | None, options: RunOptions) -> None:
        self.llama = llama
        self.header = header
        self.card = card
        self.n_ctx = _ctx(header, options)
        """Tokens that prompt and answer may take together (llama.cpp may have rounded its own number up)."""
        self._vocab = llama_cpp.llama_model_get_vocab(llama.model)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the context."""
        self.llama.close()

    @property
    def bos(self) -> str:
        """Text of the token that begins a sequence; empty when there is none."""
        return self._token_text(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the token that ends a sequence; empty when there is none."""
        return self._token_text(llama_cpp.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """Tokens of `text`; the names of special tokens in it become those tokens, nothing is added."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Tokens of a whole prompt: with the token that begins it, where the model wants one and `text` has none."""
        tokens = self.tokenize(text)
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        wanted = bos >= 0 and llama_cpp.llama_vocab_get_add_bos(self._vocab)
        return [bos, *tokens] if wanted and tokens[:1] != [bos] else tokens

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; none for a control token. A character may span several tokens."""
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def ends_answer(self, token: int) -> bool:
        """Whether the vocabulary marks `token` as the end of a turn, a message or a text."""
        return llama_cpp.llama_vocab_is_eog(self._vocab, token)

    def is_control(self, token: int) -> bool:
        """Whether `token` steers the model and is never shown."""
        return llama_cpp.llama_vocab_is_control(self._vocab, token)

    def n_cached(self, tokens: Sequence[int]) -> int:
        """How many tokens at the head of the prompt `tokens` need no evaluation: the last answer left them here."""
        seen = self.llama.input_ids[: self.llama.n_tokens].tolist()
        return min(self.llama.longest_token_prefix(seen, tokens), len(tokens) - 1)

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The tokens that follow the prompt `tokens`, without end.

        The caller stops it, at an end token or a full context. Ctrl-C raises KeyboardInterrupt, in the midst of
        the prompt too, and leaves the model usable.
        """
        self.llama.set_seed(random.randint(0, MAX_SEED) if sampling.seed is None else sampling.seed)
        stream = self.llama.generate(
            tokens,
            temp=sampling.temp,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repeat_penalty,
        )
        with _interruptible(self.llama.ctx):
            first = next(stream)
        yield first
        yield from stream

    def _token_text(self, token: int) -> str:
        text = llama_cpp.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return text.decode("utf-8", errors="replace")


def _llama_arguments(header: Header, options: RunOptions) -> dict:
    threads = options.threads or physical_cores()
    experts_used = {_key(header, "expert_used_count"): options.experts_used} if options.experts_used else None
    return dict(
        n_ctx=_ctx(header, options),
        n_batch=options.batch,
        n_gpu_layers=options.gpu_layers,
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=options.mmap,
        use_mlock=options.mlock,
        kv_overrides=experts_used,
        verbose=options.verbose,
    )


def _key(header: Header, name: str) -> str:
    return f"{header.get('general.architecture', '')}.{name}"


def _hparam(header: Header, name: str, default: int) -> int:
    value = header.get(_key(header, name), default)
    if not isinstance(value, int):
        raise UserError(f"{header.path}: {_key(header, name)} is {value!r}, expected a whole number")
    return value


def _ctx(header: Header, options: RunOptions) -> int:
    return options.ctx or min(_hparam(header, "context_length", DEFAULT_CTX), DEFAULT_CTX)


def _check_experts_used(header: Header, card: Card | None, asked: int | None) -> None:
    """Refuse numbers of experts that the file cannot run with, above all k < N over a router of zeros."""
    n_expert = _hparam(header, "expert_count", 0)
    used = _hparam(header, "expert_used_count", 0) if asked is None else asked
    if not n_expert:
        if asked is not None:
            raise UserError(f"{header.path}: --experts-used {asked}, but the file has no router", "leave the flag out")
        return
    if not 1 <= used <= n_expert:
        raise UserError(f"{header.path}: {used} experts used per token, expected 1 to {n_expert}")
    if card and card.is_gateless and used < n_expert:
        raise UserError(
            f"{header.path}: a gate-less mix runs all its {n_expert} experts, not {used}: its router is zero, so every"
            f" expert ties and the same {used} would always be taken",
            "leave --experts-used out" if asked is not None else "rebuild it: the file was changed after it was built",
        )


def _mend(reason: str) -> str:
    if "alloc" in reason or "memory" in reason:
        return "take a smaller --ctx or a smaller quant, or leave --no-mmap and --mlock out"
    if "unknown model architecture" in reason:
        return "update llama-cpp-python, or pass a language model that it knows"
    return "run it again with --verbose for all that llama.cpp says"


class _Log:
    """llama.cpp's log: shown when asked for, and otherwise kept for the reason of a failure."""

    def __init__(self) -> None:
        self.start(verbose=False)
        self._callback = llama_cpp.llama_log_callback(self._write)  # C keeps the pointer: it must outlive all use
        llama_cpp.llama_log_set(self._callback, None)

    def start(self, verbose: bool) -> None:
        self._verbose = verbose
        self._level = 0
        self._errors: deque[str] = deque(maxlen=50)

    def _write(self, level: int, text: bytes, _user_data) -> None:
        line = text.decode("utf-8", errors="replace")
        self._level = self._level if level == _CONTINUED else level
        if self._verbose:
            sys.stderr.write(line)
        if self._level == _ERROR:
            self._errors.append(line.strip())

    def reason(self) -> str:
        """The most telling line of what went wrong: the innermost error, without the C function's name."""
        for line in self._errors:
            if "error loading model: " in line:
                return line.partition("error loading model: ")[2]
        return next((line.partition(": ")[2] or line for line in self._errors if line), "")


@functools.cache
def _log() -> _Log:
    """The one log, as llama.cpp has but one callback in a process."""
    return _Log()


@contextmanager
def _interruptible(context) -> Iterator[None]:
    """Let Ctrl-C end the llama_decode call within this block, as KeyboardInterrupt.

    Only where Ctrl-C means Python's default; a server that handles signals itself is left alone.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = threading.Event()
    abort = llama_cpp.ggml_abort_callback(lambda _: pressed.is_set())
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    llama_cpp.llama_set_abort_callback(context, abort, None)
    try:
        yield
    except RuntimeError:  # llama_decode returned 2: aborted
        if not pressed.is_set():
            raise
    finally:
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt
