"""Open a GGUF through llama-cpp-python: check it first, say why when it cannot run, generate tokens.

Everything that a user can get wrong is found before llama.cpp sees the file: the header is checked against
the file's size, and a mix is not run with fewer experts than its router can choose from. What only llama.cpp
can know (an unknown architecture, too little memory, an adapter of another model) is read from its log, which
stays hidden otherwise.

A model has one context, for one sequence, and opens others on the same weights where many are to run at once.
Does not know chat templates (`template`, `chat`) nor which device takes what (`placing`).
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jinja2
import llama_cpp

from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.interrupt import call_under_way, kept_interrupt
from moegguf.metadata import Card, read_card
from moegguf.runtime.context import Context, interruptible
from moegguf.runtime.devices import accelerators, fill
from moegguf.runtime.log import llama_log
from moegguf.runtime.lost import keep_alive
from moegguf.runtime.offload import FlashAttention, Placement
from moegguf.runtime.placing import check_room, flash_attention, place_model, plan_model
from moegguf.runtime.run_options import DEFAULT_CTX, DEFAULT_OPTIONS, RunOptions, ctx_of, hparam, key_of, threads_for
from moegguf.runtime.sampling import MAX_SEED, Sampling
from moegguf.runtime.vocab import Vocab

_ADAPTER_MEND = "pass a LoRA GGUF that was made for this model"

OnNode = Callable[[int, bool, int | None], bool]
"""ggml_backend_sched_eval_callback of ggml/include/ggml-backend.h: (tensor, ask, user data) → wanted, or go on."""


def open_model(path: str | Path, options: RunOptions = DEFAULT_OPTIONS) -> Model:
    """Load the GGUF at `path`. Raises UserError when the file, the options or the machine do not allow it."""
    header = read_header(Path(path))
    card = read_card(header)
    check_experts_used(header, card, options.experts_used)
    log = llama_log()
    log.start(options.verbose)
    placement = place_model(header, options)
    flash = flash_attention(options, placement)
    log.forget()
    try:
        with kept_interrupt():
            llama = _Llama(header, options, placement, flash)
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = log.reason()
        raise UserError(
            f"{path}: llama.cpp cannot run it: {reason or error}", _mend(reason, header, options, placement)
        ) from error
    except jinja2.TemplateError as error:
        raise UserError(f"{path}: its chat template is broken: {error}", "convert it with a working one") from error
    if llama_cpp.llama_model_has_encoder(llama.model) or not llama_cpp.llama_get_memory(llama.ctx):
        llama.close()
        raise UserError(
            f"{path}: architecture {header.get('general.architecture')!r} does not write text token by token",
            "pass a decoder-only language model",
        )
    model = Model(llama, header, card, options)
    try:
        if options.adapter:
            model.load_adapter(options.adapter)
    except UserError:
        model.close()
        raise
    keep_alive(options.offload.workers)
    return model


class Model:
    """A loaded model with one context. Close it, or use it as a context manager."""

    def __init__(self, llama: _Llama, header: Header, card: Card | None, options: RunOptions) -> None:
        self.llama = llama
        self.header = header
        self.card = card
        self._options = options
        self.n_ctx = ctx_of(header, options)
        """Tokens that prompt and answer may take together (llama.cpp may have rounded its own number up)."""
        self.n_cells = options.ctx or DEFAULT_CTX
        """Tokens that several sequences may take together in a context of `open_context`."""
        self.n_layer = llama_cpp.llama_model_n_layer(llama.model)
        self.vocab = Vocab(llama_cpp.llama_model_get_vocab(llama.model))
        self._adapter: llama_cpp.llama_adapter_lora_p | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the context."""
        with kept_interrupt():
            self.llama.close()

    @property
    def placement(self) -> Placement:
        """What went on which device."""
        return self.llama.placement

    @property
    def name(self) -> str:
        """The file's name."""
        return self.header.path.name

    @cached_property
    def chat_template(self) -> str | None:
        """Source of the chat template in the file."""
        source = self.header.get("tokenizer.chat_template")
        return source if isinstance(source, str) else None

    def load_adapter(self, path: Path) -> None:
        """Run with the LoRA GGUF at `path` from now on. Raises UserError when it is none, or of another model."""
        check_adapter(read_header(path), self.header)
        llama_log().forget()
        adapter = llama_cpp.llama_adapter_lora_init(self.llama.model, str(path).encode())  # freed with the weights
        if not adapter:
            raise UserError(f"{path}: cannot be used with {self.name}: {llama_log().reason()}", _ADAPTER_MEND)
        self._adapter = adapter
        self._apply_adapter(self.llama.ctx)

    def open_context(self, *, n_batch: int, n_sequences: int, n_outputs: int, on_node: OnNode | None = None) -> Context:
        """Another context on these weights: `n_cells` tokens in at most `n_sequences` at a time, `n_batch` at once, of
        which `n_outputs` (at least `n_sequences`) may ask for output; `on_node` sees every node that is computed."""
        check_room([self.header], self._options, accelerators(self._options.offload), ctx=self.n_cells)
        params = type(self.llama.context_params).from_buffer_copy(self.llama.context_params)
        params.n_ctx, params.n_batch = self.n_cells, n_batch
        params.n_seq_max, params.n_outputs_max = n_sequences, n_outputs
        if on_node:
            params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(on_node)
        context = Context(self.llama.model, params)
        self._apply_adapter(context.pointer)
        return context

    def n_cached(self, tokens: Sequence[int]) -> int:
        """How many tokens at the head of the prompt `tokens` need no evaluation: the last answer left them here."""
        seen = self.llama.input_ids[: self.llama.n_tokens].tolist()
        return min(self.llama.longest_token_prefix(seen, tokens), len(tokens) - 1)

    def generate(
        self, tokens: Sequence[int], sampling: Sampling, is_unwanted: Callable[[], bool] = lambda: False
    ) -> Iterator[int]:
        """The tokens that follow the prompt `tokens`, without end.

        The caller stops it, at an end token or a full context. Ctrl-C raises KeyboardInterrupt, in the midst of
        the prompt too, and leaves the model usable. While the prompt is evaluated `is_unwanted` is asked again and
        again; where it says so, RuntimeError is raised.
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
        with interruptible(self.llama.ctx, is_unwanted):
            token = next(stream)
        while True:
            yield token
            with call_under_way():
                token = next(stream)

    def _apply_adapter(self, context: llama_cpp.llama_context_p) -> None:
        if self._adapter:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))


class _Llama(llama_cpp.Llama):
    """The high-level class, with what its constructor has no arguments for: where the tensors go, and llama.cpp's own
    choice of flash attention. It makes parameters, fills in its arguments, and hands them on; here they pass by."""

    def __init__(self, header: Header, options: RunOptions, placement: Placement, flash: FlashAttention) -> None:
        self.placement = placement
        self._flash_attention = flash
        try:
            super().__init__(str(header.path), n_gpu_layers=placement.n_gpu_layers, **_llama_arguments(header, options))
        except BaseException:
            self.close()  # now, and not when the exception is forgotten: a worker may be gone by then
            raise

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        self._model_params = fill(params, self.placement)

    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        self._context_params.flash_attn_type = self._flash_attention.value  # the constructor knows on and off only
        return self._context_params

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        self._context_params = params


def _llama_arguments(header: Header, options: RunOptions) -> dict:
    threads = options.threads or threads_for(header)
    experts_used = {key_of(header, "expert_used_count"): options.experts_used} if options.experts_used else None
    return dict(
        n_ctx=ctx_of(header, options),
        n_batch=options.batch,
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=options.mmap,
        use_mlock=options.mlock,
        kv_overrides=experts_used,
        type_k=int(options.kv_type),
        type_v=int(options.kv_type),
        verbose=options.verbose,
    )


def check_experts_used(header: Header, card: Card | None, asked: int | None) -> None:
    """Refuse numbers of experts that the file cannot run with, above all k < N over a router of zeros."""
    n_expert = hparam(header, "expert_count", 0)
    used = hparam(header, "expert_used_count", 0) if asked is None else asked
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


def _mend(reason: str, header: Header, options: RunOptions, placement: Placement) -> str:
    if "alloc" in reason or "memory" in reason:
        fitting = _fitting(header, options, placement)
        return f"{fitting}take a smaller --ctx or a smaller quant, or leave --no-mmap and --mlock out"
    if "unknown model architecture" in reason:
        return "update llama-cpp-python, or pass a language model that it knows"
    return "run it again with --verbose for all that llama.cpp says"


def _fitting(header: Header, options: RunOptions, failed: Placement) -> str:
    """The placement that would fit, as advice; nothing where no device is used."""
    if not failed.n_gpu_layers:
        return ""
    asked = replace(options.offload, layers=None, cpu_experts=0)
    plan = plan_model(header, replace(options, offload=asked))
    if plan.placement != failed:
        return f"{plan.placement.flags()} fits, or "
    return f"its devices have less memory than they say: try {plan.on_half().flags()}, or "


def check_adapter(adapter: Header, model: Header) -> None:
    """Refuse what is no LoRA adapter of `model`, as far as its header says."""
    kind = adapter.get("general.type"), adapter.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise UserError(f"{adapter.path}: not a LoRA adapter in GGUF form", _ADAPTER_MEND)
    arch, expected = (header.get("general.architecture") for header in (adapter, model))
    if arch != expected:
        raise UserError(f"{adapter.path}: an adapter of architecture {arch!r}, expected {expected!r}", _ADAPTER_MEND)
