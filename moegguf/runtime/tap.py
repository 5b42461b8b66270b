"""The activation tap: values inside a running llama.cpp graph, from any GGUF, quantised too.

llama.cpp calls `cb_eval` for every node of its graph, first to ask whether the node is wanted, then, once it is
computed, to show it (ggml/src/ggml-backend.cpp). Nodes are known by name: `ffn_norm-12` is node `ffn_norm` of layer
12. A tap has a context of its own on the weights of a model, so it neither sees nor disturbs a conversation.

Two facts shape it. In its last layer llama.cpp keeps only the tokens whose output is asked for, so all of them are;
and once the last wanted node is there, the callback ends the graph, which saves the output matrix. That is left
out where a GPU computes: a graph then is in parts, and the parts that follow would run on what was not computed.
Values are those of a key-value cache of type `RunOptions.kv_type`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from llama_cpp._ctypes_extensions import load_shared_library

from moegguf.errors import UserError
from moegguf.runtime.context import MAX_SEQUENCES, Entry, check_fits, groups, max_outputs
from moegguf.runtime.machine import has_gpu
from moegguf.runtime.model import Model

ROUTER_INPUT = FFN_INPUT = "ffn_norm"
"""The normed hidden state that enters the router and the FFN (n_embd)."""
LAYER_INPUT = "layer_input"
"""The hidden state that enters a layer: `l_out` of the layer before, for layer 0 the embeddings (n_embd)."""
ATTENTION_INPUT = "attn_norm"
"""The normed hidden state that enters q, k and v (n_embd)."""
ATTENTION_OUTPUT = "kqv_out"
"""What enters the output projection of attention (n_head · head_dim)."""
MOE_LOGITS = "ffn_moe_logits"
"""What the router says of each expert (n_expert)."""
MOE_PROBS = "ffn_moe_probs"
"""Its softmax over all experts (n_expert)."""
MOE_TOPK = "ffn_moe_topk"
"""The experts that are used, likeliest first (int32, k)."""
MOE_WEIGHTS = "ffn_moe_weights_norm"
"""Their weights, which add up to 1, in the order of `MOE_TOPK` (k)."""
SWIGLU = "ffn_swiglu"
"""What enters `down` of a dense FFN or of a shared expert (n_ff); `ffn_geglu` in gemma's graphs."""
MOE_SWIGLU = "ffn_moe_swiglu"
"""What enters `down` of the used experts, one after the other in the order of `MOE_TOPK` (k · n_ff)."""

_LAYER_OUTPUT = "l_out"
_EMBEDDINGS = ("inp_scaled", "embd")
"""What enters layer 0, by architecture: gemma scales its embeddings (src/models/gemma*.cpp); others take them as
they are (build_inp_embd of src/llama-graph.cpp)."""

Site = tuple[str, int]
"""A node and its layer."""


@dataclass(frozen=True)
class Tapped:
    """What was tapped while some sequences were evaluated.

    `lengths[i]` is the number of tokens of the i-th of them; `values[node, layer]` is (n_tokens, width), with the
    tokens of all sequences one after the other: float32, int32 for `MOE_TOPK`.
    """

    lengths: tuple[int, ...]
    values: Mapping[Site, np.ndarray]

    def split(self, node: str, layer: int) -> list[np.ndarray]:
        """The values of one node, an array a sequence."""
        return np.split(self.values[node, layer], np.cumsum(self.lengths)[:-1])


class Tap:
    """Reads `nodes` in `layers` (default: all) of a model. Close it before the model, or use it in a `with`.

    Raises UserError when the model's graph lacks one of them: `available` says which it has.
    """

    def __init__(self, model: Model, nodes: Iterable[str], layers: Iterable[int] | None = None) -> None:
        layers = range(model.n_layer) if layers is None else layers
        self._names = _names(model, [(node, layer) for node in nodes for layer in layers])
        self._n_ctx = model.n_ctx
        self._n_batch = min(max_outputs(model.vocab.n_tokens), model.n_cells)
        self._n_sequences = min(MAX_SEQUENCES, self._n_batch)
        self._may_end = not has_gpu()
        self._read: dict[Site, np.ndarray] = {}
        self._has_ended = False
        self._error: BaseException | None = None
        self._context = model.open_context(
            n_batch=self._n_batch, n_sequences=self._n_sequences, n_outputs=self._n_batch, on_node=self._on_node
        )

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._context.close()

    def run(self, sequences: Iterable[Sequence[int]]) -> Iterator[Tapped]:
        """Evaluate sequences of tokens, each on its own, and yield what was tapped, for a few of them at a time.

        They come in the order given, whole: as many as 512 tokens hold, or one longer one. Holds their values in
        memory, so cut long texts into pieces. No sequence is empty. Raises UserError for one longer than the context,
        and KeyboardInterrupt at Ctrl-C.
        """
        for group in groups(sequences, self._n_batch, self._n_sequences):
            yield self._evaluate(group)

    def _evaluate(self, sequences: list[Sequence[int]]) -> Tapped:
        lengths = tuple(map(len, sequences))
        check_fits(max(lengths), self._n_ctx)
        entries = [
            Entry(token, position, number, has_output=True)
            for number, tokens in enumerate(sequences)
            for position, token in enumerate(tokens)
        ]
        self._context.forget()
        batches = [
            self._decode(entries[start : start + self._n_batch]) for start in range(0, len(entries), self._n_batch)
        ]
        return Tapped(lengths, {site: np.concatenate([read[site] for read in batches]) for site in batches[0]})

    def _decode(self, entries: list[Entry]) -> dict[Site, np.ndarray]:
        self._read, self._has_ended, self._error = {}, False, None
        self._context.decode(entries)
        if self._error:
            raise self._error
        return {site: values.reshape(len(entries), -1) for site, values in self._read.items()}

    def _on_node(self, tensor: int, ask: bool, _user_data: int | None) -> bool:
        """ctypes would drop an exception: it is kept, and ends the graph."""
        try:
            return self._wants(tensor) if ask else self._take(tensor)
        except BaseException as error:
            self._error, self._has_ended = error, True
            return ask

    def _wants(self, tensor: int) -> bool:
        """Once the graph is to end, any node will do: the answer to it is what ends the graph."""
        return self._has_ended or _ggml().ggml_get_name(tensor) in self._names

    def _take(self, tensor: int) -> bool:
        if self._has_ended:
            return False
        site = self._names[_ggml().ggml_get_name(tensor)]
        if site in self._read:
            raise RuntimeError(f"llama.cpp computed {site} twice for one batch")
        self._read[site] = _values(tensor)
        self._has_ended = self._may_end and len(self._read) == len(self._names)
        return not self._has_ended


def available(model: Model) -> dict[str, tuple[int, ...]]:
    """Every node that a tap can read of this model, with the layers that have it."""
    found: dict[str, list[int]] = {}
    for name in _graph(model):
        node, _, layer = name.rpartition("-")
        if node and layer.isdecimal():
            found.setdefault(node, []).append(int(layer))
    if _LAYER_OUTPUT in found:
        found[LAYER_INPUT] = [0, *(layer + 1 for layer in found[_LAYER_OUTPUT] if layer + 1 < model.n_layer)]
    return {node: tuple(sorted(set(layers))) for node, layers in found.items()}


def _graph(model: Model) -> list[str]:
    """The names of the nodes of the model's graph, in the order in which they are computed for one token."""
    names: list[str] = []

    def listen(tensor: int, _ask: bool, _user_data: int | None) -> bool:
        names.append(_ggml().ggml_get_name(tensor).decode())
        return False

    with model.open_context(n_batch=1, n_sequences=1, n_outputs=1, on_node=listen) as context:
        context.decode([Entry(0, 0, 0, has_output=True)])
    return names


def _names(model: Model, sites: list[Site]) -> dict[bytes, Site]:
    """Name in the graph → site."""
    graph = _graph(model)
    embeddings = next((name for name in _EMBEDDINGS if name in graph), "embd")
    names = {}
    for node, layer in sites:
        name = f"{node}-{layer}"
        if node == LAYER_INPUT:
            name = f"{_LAYER_OUTPUT}-{layer - 1}" if layer else embeddings
        if name not in graph:
            arch = model.header.get("general.architecture")
            raise UserError(f"{model.name}: llama.cpp's graph of {arch!r} has no node {name!r}", _mend(node))
        names[name.encode()] = node, layer
    return names


def _mend(node: str) -> str:
    return "pass a mix with a router" if node.startswith("ffn_moe_") else ""


# --- tensors of ggml ---

_DTYPES = {
    int(GGMLQuantizationType.F32): np.float32,
    int(GGMLQuantizationType.F16): np.float16,
    int(GGMLQuantizationType.I32): np.int32,
}


class _TensorHead(ctypes.Structure):
    """How `struct ggml_tensor` of ggml/include/ggml.h begins; `_values` checks that the library agrees."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


def _values(tensor: int) -> np.ndarray:
    """A copy of a tensor on any device, in numpy's order of dimensions; a view's gaps are left out."""
    head = _TensorHead.from_address(tensor)
    shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
    if head.type not in _DTYPES or prod(shape) != _ggml().ggml_nelements(tensor):
        raise RuntimeError(f"cannot read a tensor of type {head.type} and shape {shape}")
    stored = np.empty(_ggml().ggml_nbytes(tensor), np.uint8)
    _ggml().ggml_backend_tensor_get(tensor, stored.ctypes.data, 0, stored.nbytes)
    values = np.ndarray(shape, _DTYPES[head.type], stored, strides=strides)
    return np.array(values, dtype=np.int32 if values.dtype == np.int32 else np.float32, order="C")


@functools.cache
def _ggml() -> ctypes.CDLL:
    library = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("ggml_get_name", ctypes.c_char_p, pointer),
        ("ggml_nbytes", size, pointer),
        ("ggml_nelements", ctypes.c_int64, pointer),
        ("ggml_backend_tensor_get", None, pointer, pointer, size, size),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
