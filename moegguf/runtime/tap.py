"""The activation tap: values inside a running llama.cpp graph, from any GGUF, quantised too.

Nodes of the graph are known by name: `ffn_norm-12` is node `ffn_norm` of layer 12. A tap has a context of its own on
the weights of a model, so it neither sees nor disturbs a conversation. Once it has read the last node that it wants,
it ends the graph. Values are those of a key-value cache of type `RunOptions.kv_type`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moegguf.errors import UserError
from moegguf.runtime.context import Entry
from moegguf.runtime.model import Model
from moegguf.runtime.nodes import name_of, values_of
from moegguf.runtime.watch import Watch

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
        self._read: dict[Site, np.ndarray] = {}
        self._watch = Watch(model, self._wants, self._take)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._watch.close()

    def run(self, sequences: Iterable[Sequence[int]]) -> Iterator[Tapped]:
        """Evaluate sequences of tokens, each on its own, and yield what was tapped, for a few of them at a time.

        They come in the order given, whole: as many as 512 tokens hold, or one longer one. Holds their values in
        memory, so cut long texts into pieces. No sequence is empty. Raises UserError for one longer than the context,
        and KeyboardInterrupt at Ctrl-C.
        """
        for lengths, batches in self._watch.batches(sequences):
            read = [self._decode(batch) for batch in batches]
            yield Tapped(lengths, {site: np.concatenate([values[site] for values in read]) for site in read[0]})

    def _decode(self, batch: Sequence[Entry]) -> dict[Site, np.ndarray]:
        self._read = {}
        self._watch.decode(batch)
        return {site: values.reshape(len(batch), -1) for site, values in self._read.items()}

    def _wants(self, node: int) -> bool:
        return name_of(node) in self._names

    def _take(self, node: int) -> bool:
        site = self._names[name_of(node)]
        if site in self._read:
            raise RuntimeError(f"llama.cpp computed {site} twice for one batch")
        self._read[site] = values_of(node)
        return len(self._read) < len(self._names)


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
        names.append(name_of(tensor).decode())
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
