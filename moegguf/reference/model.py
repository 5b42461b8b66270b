"""A decoder of the Llama family in PyTorch that computes every mix, in the order of its definition.

It is three things: the oracle that a built GGUF is held against; what router training differentiates; and where
mixes run that no graph of stock llama.cpp expresses (routed attention, routed fine-grained FFNs). Hence the rule of
this file: nothing is folded. A gate-less mix adds up its experts' outputs, even where a build adds up their weights.

A variant is a composition of four kinds of map, and `_Assembly` is the list of compositions:

    Linear         y = W x (+ b)                           of the trunk, or of an expert
    Adapted        y = W x + scale · B A x                 of a LoRA expert kept apart from its W, which is shared
    FeedForward    y = down(silu(gate x) ⊙ up x)           gate, up and down are linear, or (fine-grained) Mixtures
    Mixture        y = Σ a_e f_e(x) + c · Σ p_e f_e(x)     f_e is a FeedForward, or a single linear map

An expert that is an adapter can be computed in two forms that are equal up to rounding: merged (W + Δ as one matrix,
the default) or as branches (W x + Δ x; all adapters over one model share its W in memory). In a Mixture of linear maps
the shares add up to 1, so branches are W x + Σ p_e · scale_e · B_e A_e x.

Tensors keep ggml's order of rows: the rotary pairs of q and k are neighbours (0, 1), (2, 3), …, and names of
parameters outside FFNs and mixtures are their GGUF names: `token_embd.weight`, `blk.0.attn_output.weight`.
The arithmetic is that of llama.cpp, src/models/llama.cpp (`build_moe_ffn` of src/llama-graph.cpp for mixtures), which
looks at all previous tokens, whatever sliding window a model was trained with, and takes 1/√head_dim for the scale of
attention.

Not done: other architectures than `llama`; padding on the left (on the right it is harmless, attention is causal);
speed beyond computing only the experts that were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moegguf.errors import UserError
from moegguf.families import TensorName
from moegguf.mix import ATTENTION_ROLES, FFN_ROLES, Expert, Mix
from moegguf.quant import ggml
from moegguf.routers import FFN, Router, Site
from moegguf.tensor import Source, Tensor

ARCH = "llama"


class Output(NamedTuple):
    """What a pass over tokens (batch, n) gives."""

    logits: torch.Tensor
    """(batch, n, n_vocab)"""
    routing: dict[Site, torch.Tensor]
    """Of every router: the softmax over all that it chooses from, float32 (batch, n, n_routed). Empty if gate-less."""


class Cache:
    """Keys and values of the tokens seen so far: (batch, n_kv_head, n_tokens, head_dim) in each layer."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def n_tokens(self) -> int:
        return next((keys.shape[2] for keys, _ in self._layers.values()), 0)

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append those of new tokens; returns those of all."""
        if layer in self._layers:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self._layers[layer], (keys, values), strict=True))
        self._layers[layer] = keys, values
        return keys, values

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`."""
        self._layers = {
            layer: (keys[:, :, :n_tokens], values[:, :, :n_tokens]) for layer, (keys, values) in self._layers.items()
        }


class Linear(nn.Module):
    """y = W x (+ b)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Adapted(nn.Module):
    """y = W x (+ b) + scale · B A x, where `linear` may be shared between adapters."""

    def __init__(self, linear: Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


class FeedForward(nn.Module):
    """y = down(silu(gate x) ⊙ up x)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Rule:
    """How experts, by their place in the mix, are combined: `always` with fixed shares, and `scale` times the top
    `n_top` of `routed`."""

    always: tuple[tuple[int, float], ...]
    routed: tuple[int, ...]
    n_top: int
    scale: float

    @classmethod
    def of(cls, mix: Mix) -> Rule:
        """Gate-less: Σ a_e f_e. Top k: Σ p_e f_e. Expert a always on: f_a / k + (k − 1) / k · Σ p_e f_e."""
        if mix.router.is_gateless:
            return cls(tuple(enumerate(expert.weight for expert in mix.experts)), (), 0, 0.0)
        places = {expert.name: place for place, expert in enumerate(mix.experts)}
        k, always_on = mix.router.k, mix.router.always_on
        always = () if always_on is None else ((places[always_on], 1 / k),)
        n_top = k - len(always)
        return cls(always, tuple(places[name] for name in mix.router.experts), n_top, n_top / k)


class Mixture(nn.Module):
    """y = Σ a_e f_e(x) over the experts that always run + c · Σ p_e f_e(x) over the k chosen of the others.

    p is the softmax of the router's logits over all others, cut to its k largest, divided by their sum. An expert sees
    the tokens that chose it and no others. Router logits are float32, whatever the type of the weights.
    """

    def __init__(self, site: Site, experts: Iterable[nn.Module], rule: Rule, router: nn.Parameter | None) -> None:
        super().__init__()
        self.site, self.rule, self.router = site, rule, router
        self.experts = nn.ModuleList(experts)
        self.probs: torch.Tensor | None = None
        """Of the last pass: p over all routed experts, before the cut; (*, n_routed)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        always = [share * self.experts[place](x) for place, share in self.rule.always]
        return sum([*always, self._chosen(x)] if self.rule.n_top else always)

    def _chosen(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(tokens.float(), self.router.float()).softmax(dim=-1)
        self.probs = probs.reshape(*x.shape[:-1], -1)
        top, choices = probs.topk(self.rule.n_top)
        shares = self.rule.scale * top / top.sum(dim=-1, keepdim=True)
        rows, places = zip(*((choices == i).nonzero(as_tuple=True) for i in range(len(self.rule.routed))), strict=True)
        outputs = [self.experts[place](tokens[row]) for place, row in zip(self.rule.routed, rows, strict=True)]
        row, place, output = map(torch.cat, (rows, places, outputs))
        weighted = output * shares[row, place, None].to(output.dtype)
        return output.new_zeros(len(tokens), output.shape[-1]).index_add(0, row, weighted).reshape(*x.shape[:-1], -1)


class RmsNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    """One layer. Attributes are named after the GGUF tensors that they hold."""

    def __init__(self, layer: int, head_dim: int, **parts: nn.Module) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, head_dim
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        x = x + self._attention(self.attn_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))

    def _attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.attn_q, self.attn_k, self.attn_v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        n, n_seen = q.shape[2], k.shape[2]
        if n == n_seen:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(n, n_seen, dtype=torch.bool, device=x.device).tril(n_seen - n)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.attn_output(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, n, n_head · head_dim) → (batch, n_head, n, head_dim)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring columns of x (…, n, head_dim) turned by angles (n, head_dim / 2)."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast each pair turns, and by how much YaRN stretches it.

    Scaling as llama.cpp has it: factors per frequency (llama3), linear, YaRN (arXiv 2309.00071; ggml's
    `ggml_rope_yarn_corr_dims` and src/llama-context.cpp). The `llama` graph reads no betas: they are 32 and 1.
    """

    frequencies: torch.Tensor
    """Radians per token, float32 (head_dim / 2,)"""
    magnitude: float

    @classmethod
    def of(cls, base: Source, head_dim: int, factors: np.ndarray | None) -> Rope:
        """`factors` divides the frequencies. Raises UserError for a kind of scaling that is none of these."""
        theta = float(base.hparam("rope.freq_base", 10000.0))
        kind = base.hparam("rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn"):
            raise UserError(f"{base.ref}: rope scaling {kind!r}, the PyTorch reference has linear, yarn and llama3")
        factor = base.hparam("rope.scaling.factor", 0.0) or base.hparam("rope.scale_linear", 0.0) or 1.0
        factor = 1.0 if kind == "none" else float(factor)
        frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (1.0 if factors is None else factors)
        magnitude = float(base.hparam("rope.scaling.attn_factor", 1.0))
        kept = np.zeros(head_dim // 2)
        if kind == "yarn":
            context = base.hparam("rope.scaling.original_context_length", base.hparam("context_length"))
            kept = _kept_by_yarn(head_dim, theta, int(context))
            magnitude *= 1 + 0.1 * math.log(max(factor, 1.0))
        return cls(torch.tensor(frequencies * (kept + (1 - kept) / factor), dtype=torch.float32), magnitude)

    def angles(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Stretched cosine and sine of positions start … stop − 1, float32 (stop − start, head_dim / 2)."""
        angles = torch.arange(start, stop, device=device)[:, None] * self.frequencies.to(device)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def _kept_by_yarn(head_dim: int, theta: float, context: int, fast: float = 32.0, slow: float = 1.0) -> np.ndarray:
    """How much of each frequency is not interpolated: 1 where it turns fast, 0 where slowly; (head_dim / 2,)."""

    def pair(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(pair(fast))), min(head_dim - 1, math.ceil(pair(slow)))
    return 1 - np.clip((np.arange(head_dim // 2) - low) / max(0.001, high - low), 0, 1)


class ReferenceModel(nn.Module):
    """A whole mix. All parameters come frozen; whoever trains some of them says which.

    `routers` are its parameters by site, one parameter for all layers of a shared router; `get_parameter` finds
    those of the trunk by GGUF name. Tied embeddings are one parameter.
    """

    def __init__(
        self, token_embd: Linear, blocks: Iterable[Block], output_norm: RmsNorm, output: Linear, rope: Rope,
        router: Router,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token_embd = token_embd
        self.blk = nn.ModuleList(blocks)
        self.output_norm = output_norm
        self.output = output
        self._rope = rope
        self._router = router

    @classmethod
    def from_mix(
        cls,
        mix: Mix,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        branches: bool = False,
    ) -> ReferenceModel:
        """Read the weights of `mix`, tensor by tensor, as `dtype`; routers are float32 always.

        With `branches`, experts that are adapters share the weights that they go over; other experts are as without.
        Equal tensors of experts are kept once. Raises UserError for an architecture that is not `llama`, and for
        tensors that this architecture does not have.
        """
        return _Assembly(mix, dtype, torch.device(device), branches).model()

    @property
    def routers(self) -> dict[Site, nn.Parameter]:
        """Float32 (n_routed, n_in) of every site; empty if gate-less."""
        return {mixture.site: mixture.router for mixture in self._mixtures() if mixture.router is not None}

    def router(self) -> Router:
        """The router as it is now: that of the mix with the present values of `routers`."""
        matrices = {site: matrix.detach().cpu().numpy().copy() for site, matrix in self.routers.items()}
        return replace(self._router, matrices=matrices or self._router.matrices)

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> Output:
        """Logits after each of `tokens`, int64 (batch, n), which follow those in `cache` and join them there."""
        features = self.features(tokens, cache)
        return Output(self.output(features), {m.site: m.probs for m in self._mixtures() if m.probs is not None})

    def features(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """(batch, n, n_embd): what `output` makes logits of."""
        n_seen = cache.n_tokens if cache is not None else 0
        cos, sin = self._rope.angles(n_seen, n_seen + tokens.shape[1], tokens.device)
        x = F.embedding(tokens, self.token_embd.weight)
        for block in self.blk:
            x = block(x, cos, sin, cache)
        return self.output_norm(x)

    def _mixtures(self) -> list[Mixture]:
        return [module for module in self.modules() if isinstance(module, Mixture)]


class _Assembly:
    """Puts a mix together: which map stands where in each layer."""

    def __init__(self, mix: Mix, dtype: torch.dtype, device: torch.device, branches: bool) -> None:
        if mix.base.arch != ARCH:
            raise UserError(
                f"{mix.base.ref}: architecture {mix.base.arch!r}, the PyTorch reference computes {ARCH!r} only "
                "(Llama, Mistral and models with their graph)",
                "build it as a gate-less GGUF, which llama.cpp runs",
            )
        self.mix, self.dtype, self.device, self.branches = mix, dtype, device, branches
        self.rule = Rule.of(mix)
        self.unread = {name for name in mix.trunk if not self._is_mixed(TensorName.parse(name))}
        self.known: dict[bytes, nn.Parameter] = {}
        self.routers: dict[Site | str, nn.Parameter] = {}

    def model(self) -> ReferenceModel:
        base = self.mix.base
        eps = self._hparam("attention.layer_norm_rms_epsilon")
        token_embd = self.linear("token_embd")
        model = ReferenceModel(
            token_embd,
            [self.block(layer, base.head_size, eps) for layer in range(self.mix.n_layer)],
            RmsNorm(self.trunk("output_norm.weight"), eps),
            self.linear("output") if "output.weight" in self.mix.trunk else token_embd,
            Rope.of(base, base.head_size, self.rope_factors()),
            self.mix.router,
        )
        if self.unread:
            raise UserError(
                f"{base.ref}: {min(self.unread)} is no tensor of the graph of {ARCH!r} ({len(self.unread)} in all)",
                "use the plain text model",
            )
        return model

    def block(self, layer: int, head_dim: int, eps: float) -> Block:
        return Block(
            layer,
            head_dim,
            attn_norm=RmsNorm(self.trunk(f"blk.{layer}.attn_norm.weight"), eps),
            **{role: self.projection(layer, role, self.mix.mixed.attention) for role in ATTENTION_ROLES},
            ffn_norm=RmsNorm(self.trunk(f"blk.{layer}.ffn_norm.weight"), eps),
            ffn=self.feed_forward(layer),
        )

    def feed_forward(self, layer: int) -> nn.Module:
        if layer in self.mix.layers and not self.mix.mixed.fine_grained:
            experts = [[self.of_expert(expert, layer, role) for role in FFN_ROLES] for expert in self.mix.experts]
            return self.mixture((layer, FFN), [FeedForward(*maps) for maps in experts])
        return FeedForward(*(self.projection(layer, role, self.mix.mixed.fine_grained) for role in FFN_ROLES))

    def projection(self, layer: int, role: str, is_mixed: bool) -> nn.Module:
        """A linear map of the trunk, or a mixture of the experts' maps."""
        if not is_mixed or layer not in self.mix.layers:
            return self.linear(f"blk.{layer}.{role}")
        return self.mixture((layer, role), [self.of_expert(expert, layer, role) for expert in self.mix.experts])

    def mixture(self, site: Site, experts: Sequence[nn.Module]) -> Mixture:
        if self.mix.router.is_gateless:
            return Mixture(site, experts, self.rule, None)
        key = site[1] if self.mix.router.shared else site
        if key not in self.routers:
            matrix = torch.tensor(self.mix.router.matrices[site], dtype=torch.float32, device=self.device)
            self.routers[key] = nn.Parameter(matrix, requires_grad=False)
        return Mixture(site, experts, self.rule, self.routers[key])

    def linear(self, module: str) -> Linear:
        bias = f"{module}.bias"
        return Linear(self.trunk(f"{module}.weight"), self.trunk(bias) if bias in self.mix.trunk else None)

    def of_expert(self, expert: Expert, layer: int, role: str) -> Linear | Adapted:
        name, bias = (str(TensorName(layer, role, kind)) for kind in ("weight", "bias"))
        lora = expert.source.lora if self.branches else None
        source = lora.over if lora else expert.source
        linear = Linear(
            self.shared(source.tensors[name]), self.shared(source.tensors[bias]) if bias in source.tensors else None
        )
        if not lora or name not in lora.deltas:
            return linear
        delta = lora.deltas[name]
        return Adapted(linear, self.shared(delta.a), self.shared(delta.b), delta.scale)

    def trunk(self, name: str) -> nn.Parameter:
        """A tensor of the trunk, as a parameter of its own: it may be trained."""
        if name not in self.mix.trunk:
            raise UserError(f"{self.mix.base.ref}: {name} is missing", "use a complete model")
        self.unread.discard(name)
        return self._parameter(_values(self.mix.trunk[name]))

    def shared(self, tensor: Tensor) -> nn.Parameter:
        """A tensor of an expert, the same parameter as any other with the same values."""
        values = _values(tensor)
        key = sha256(values.tobytes()).digest() + str(values.shape).encode()
        if key not in self.known:
            self.known[key] = self._parameter(values)
        return self.known[key]

    def rope_factors(self) -> np.ndarray | None:
        """float32 (head_dim / 2,)"""
        name = "rope_freqs.weight"
        self.unread.discard(name)
        return _values(self.mix.trunk[name]) if name in self.mix.trunk else None

    def _parameter(self, values: np.ndarray) -> nn.Parameter:
        return nn.Parameter(torch.tensor(values, dtype=self.dtype, device=self.device), requires_grad=False)

    def _is_mixed(self, name: TensorName) -> bool:
        """Whether the trunk's tensor is replaced by those of the experts."""
        return self.mix.mixed.attention and name.role in ATTENTION_ROLES and name.layer in self.mix.layers

    def _hparam(self, key: str):
        try:
            return self.mix.base.hparam(key)
        except KeyError:
            raise UserError(f"{self.mix.base.ref}: {ARCH}.{key} is missing", "use a complete model") from None


def _values(tensor: Tensor) -> np.ndarray:
    """float32 of the tensor's shape."""
    return ggml.dequantise(tensor.type, tensor.read_rows(0, tensor.n_rows), tensor.n_cols).reshape(tensor.shape)
