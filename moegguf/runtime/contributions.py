"""How much every expert contributes to a running mix: p_e · |f_e(x)|, over the tokens that reach it.

That mean is the saliency of router-weighted expert activation pruning (REAP, arXiv 2510.13999) for the experts of a
layer. It is read where llama.cpp has multiplied their outputs by their weights, so any GGUF will do, quantised too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moegguf.runtime.model import Model
from moegguf.runtime.nodes import name_of, values_of
from moegguf.runtime.watch import Watch

_TOPK, _WEIGHTED = "ffn_moe_topk", "ffn_moe_weighted"
"""Which experts a token reaches (k), and their outputs times their weights (k, n_embd): src/llama-graph.cpp."""


class Contributions:
    """Sums over tokens, (n_layer, n_expert): `norms` of weighted outputs, and `counts` of tokens. Close it before the
    model, or use it in a `with`."""

    def __init__(self, model: Model, n_expert: int) -> None:
        self.norms = np.zeros((model.n_layer, n_expert))
        self.counts = np.zeros((model.n_layer, n_expert), np.int64)
        self._nodes = {
            f"{node}-{layer}".encode(): (node, layer) for node in (_TOPK, _WEIGHTED) for layer in range(model.n_layer)
        }
        self._last = model.n_layer - 1
        self._experts = np.empty(0, np.int64)
        self._watch = Watch(model, lambda node: name_of(node) in self._nodes, self._take)

    def __enter__(self) -> Contributions:
        return self

    def __exit__(self, *_) -> None:
        self._watch.close()

    @property
    def means(self) -> np.ndarray:
        """The saliency of each expert in each layer; 0 for one that no token reached."""
        return self.norms / np.maximum(self.counts, 1)

    def run(self, sequences: Iterable[Sequence[int]]) -> Iterator[int]:
        """Evaluate sequences of tokens, each on its own; yields how many tokens were, a few sequences at a time."""
        for lengths, batches in self._watch.batches(sequences):
            for batch in batches:
                self._watch.decode(batch)
            yield sum(lengths)

    def _take(self, node: int) -> bool:
        what, layer = self._nodes[name_of(node)]
        if what == _TOPK:
            self._experts = values_of(node).ravel()
            return True
        outputs = values_of(node)
        norms = np.linalg.norm(outputs.reshape(-1, outputs.shape[-1]), axis=1)
        n_expert = self.norms.shape[1]
        self.norms[layer] += np.bincount(self._experts, norms, n_expert)
        self.counts[layer] += np.bincount(self._experts, minlength=n_expert)
        return layer != self._last
