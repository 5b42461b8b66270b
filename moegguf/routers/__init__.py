"""Routers: per MoE layer a float32 matrix (n_expert, n_embd), which stock llama.cpp multiplies with the FFN's
input before a softmax over all experts. `rows` is the table of modes; each mode is a function of the spec alone.

Source: METHODS of the paper, arXiv 2408.17280.
"""

from __future__ import annotations

import numpy as np

from moegguf.recipe import RouterMode, RouterSpec


def rows(spec: RouterSpec, layer: int, n_expert: int, n_embd: int) -> np.ndarray:
    """The router of one layer, float32 (n_expert, n_embd)."""
    return _MODES[spec.mode](spec, layer, n_expert, n_embd)


def gateless(spec: RouterSpec, layer: int, n_expert: int, n_embd: int) -> np.ndarray:
    """All zeros: the softmax of equal logits gives every expert exactly 1/n_expert."""
    return np.zeros((n_expert, n_embd), np.float32)


def noisy(spec: RouterSpec, layer: int, n_expert: int, n_embd: int) -> np.ndarray:
    """White noise N(0, std²), fixed by (seed, layer).

    `RandomState` because its stream is frozen (NEP 19): the same recipe gives the same bytes on any numpy.
    """
    noise = np.random.RandomState([spec.seed, layer]).standard_normal((n_expert, n_embd))
    return (noise * spec.std).astype(np.float32)


_MODES = {RouterMode.GATELESS: gateless, RouterMode.NOISY: noisy}
