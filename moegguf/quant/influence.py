"""How far an error in one tensor's output moves what a model says.

Purpose: a coefficient for each tensor, in nats of mean KL divergence for a relative error of 1, so that the errors of
`moegguf.quant.sensitivity` can be added up and compared across layers and projections.

Method: attention and FFNs add their outputs to one stream, from which the logits are read. A relative error ε in the
output of a sublayer of power p reaches a stream of power P as ε p / P. From there on each later sublayer adds to the
stream, and so dilutes the error, but has also read it, and passes on a part κ of what it has read:

    ρ_i P_i = ρ_(i-1) P_(i-1) + p_i (κ ρ_(i-1) + ε_i),        P_i = P_(i-1) + p_i

Powers come from importances and weights (`Sensitivity.power`). Without importances they are guessed from weights and
norms alone, which is rough; where those are not known, all sublayers are taken as equally strong. An error within a
sublayer counts by its role, `WITHIN`. An error of the output matrix is one of the logits.

`NATS`, `PASSED_ON` and `WITHIN` were fitted to the KL divergence that quantising single tensors to Q4_K caused in the
embedded family, in its gate-less mix and in its base alone: of their 58 tensors, 48 are predicted within a factor of
two and 53 within three. From Q4_K to Q3_K divergences were proportional to errors there, and likewise in a generated
model of six layers with random weights; but random layers amplify errors on their way (κ > 1), as trained ones do not,
so of that model nothing else was used. Predicted losses are to be compared with each other rather than believed; where
a mix can be run, a few measurements correct them, group by group and layer by layer (`moegguf.jobs.probing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from moegguf.families import TensorName
from moegguf.quant.sensitivity import Sensitivity

NATS = 0.4
"""Mean KL divergence for a relative error of 1 in the logits."""
PASSED_ON = 0.3
"""κ."""
WITHIN = {
    "attn_q": 0.2, "attn_k": 0.2, "attn_v": 0.25, "attn_output": 0.25, "ffn_gate": 0.07, "ffn_up": 0.07,
    "ffn_down": 0.33,
}  # fmt: skip
"""What of a relative error in the output of a projection counts as one in the output of its sublayer."""
OTHER = 0.25
"""That of projections which other architectures have."""

TOGETHER = 20.0
"""How much larger the output of a trained FFN is than if its gate and up were independent: 20 to 100 in the family."""

ATTENTION, FFN = "attn_output", "ffn_down"
"""The projection that ends a sublayer stands for it."""

Site = tuple[int | None, str]
"""A layer and a projection or norm in it."""

_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 200) for i in range(200)])
"""200 values that are normally distributed."""


def group(name: str) -> str:
    """What a tensor is compared with: its projection, whatever the layer and the layout; attn_q, ffn_down, …"""
    return TensorName.parse(name).role.removesuffix("_exps").removesuffix("_shexp")


def influences(sensitivities: Mapping[str, Sensitivity], n_layer: int, norms: Mapping[Site, float]) -> dict[str, float]:
    """Tensor name → nats for a relative error of 1 in its output, for tensors of any kind.

    `norms` are the mean squared weights of `attn_norm` and `ffn_norm` by layer, as far as there are any.
    """
    embedding, sublayers = _arrivals(*_powers(sensitivities, n_layer, norms))
    is_tied = "output.weight" not in sensitivities
    coefficients = {}
    for name in sensitivities:
        layer, role = TensorName.parse(name).layer, group(name)
        if layer is None:
            arrives = embedding + is_tied if role == "token_embd" else 1.0
        else:
            arrives = WITHIN.get(role, OTHER) * sublayers[layer, FFN if role.startswith("ffn") else ATTENTION]
        coefficients[name] = NATS * arrives
    return coefficients


def _arrivals(first: float, powers: Mapping[Site, float]) -> tuple[float, dict[Site, float]]:
    """How much of a relative error of the embeddings, and of each sublayer's output, arrives at the end."""
    added = np.array(list(powers.values()))
    after = first + np.cumsum(added)
    before = after - added
    passed = (before + PASSED_ON * added) / after
    beyond = np.append(np.cumprod(passed[::-1])[::-1][1:], 1.0)
    return float(passed.prod()), dict(zip(powers, (added / after * beyond).tolist(), strict=True))


def _powers(
    sensitivities: Mapping[str, Sensitivity], n_layer: int, norms: Mapping[Site, float]
) -> tuple[float, dict[Site, float]]:
    """The power of the embeddings and of what each sublayer adds, in order.

    No sublayer adds more than all others together: a few tokens with enormous states, which attention discards, would
    otherwise outweigh all else.
    """
    by_site: dict[Site, Sensitivity] = {}
    for name, sensitivity in sensitivities.items():
        by_site.setdefault((TensorName.parse(name).layer, group(name)), sensitivity)
    sites = [(layer, end) for layer in range(n_layer) for end in (ATTENTION, FFN)]
    if all(site in by_site and by_site[site].is_weighted for site in sites):
        powers = {site: by_site[site].power for site in sites}
    elif all((layer, role) in by_site for layer in range(n_layer) for role in _NEEDED) and len(norms) == len(sites):
        powers = {(layer, end): guess(by_site, layer, norms) for layer, end in sites for guess in [_GUESSES[end]]}
    else:
        return 1.0, dict.fromkeys(sites, 1.0)
    first = by_site[None, "token_embd"].power if (None, "token_embd") in by_site else min(powers.values())
    total = first + sum(powers.values())
    return first, {site: min(power, total - power) for site, power in powers.items()}


def _guessed_attention(by_site: Mapping[Site, Sensitivity], layer: int, norms: Mapping[Site, float]) -> float:
    """As if every head passed on the value of one token, and inputs were what their norm makes of them."""
    value = by_site[layer, "attn_v"]
    return by_site[layer, ATTENTION].power * norms[layer, "attn_norm"] * value.power / value.n_rows


def _guessed_ffn(by_site: Mapping[Site, Sensitivity], layer: int, norms: Mapping[Site, float]) -> float:
    """As if gate and up were normally distributed, times what they gain by being large for the same tokens."""
    gate, up = (by_site[layer, role].power / by_site[layer, role].n_rows for role in ("ffn_gate", "ffn_up"))
    scale = norms[layer, "ffn_norm"]
    x = np.sqrt(gate * scale) * _NORMAL
    activated = float(np.square(x / (1 + np.exp(-x))).mean())
    return TOGETHER * by_site[layer, FFN].power * activated * up * scale


_NEEDED = ("attn_v", ATTENTION, "ffn_gate", "ffn_up", FFN)
_GUESSES = {ATTENTION: _guessed_attention, FFN: _guessed_ffn}
