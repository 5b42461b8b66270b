"""Routers: what picks, or weighs, the experts of a token. One float32 matrix (n_routed, n_in) a site.

A site is a place in a layer that has a router of its own: the FFN of an ordinary mix; each projection of a mix
that is fine-grained or mixes attention, which only the reference in PyTorch can run. Gate-less is a matrix of
zeros and noisy is white noise from a stored seed: both are made here, from numbers. Hidden, ridge and trained
routers come from a file (`moegguf.routers.file`) that `route fit` or `train` wrote.

The graph of stock llama.cpp has no router bias, so a router is its matrices and how many experts run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from moegguf.errors import UserError
from moegguf.recipe import RouterMode, RouterSpec

FFN = "ffn"
ROLES = (FFN, "ffn_gate", "ffn_up", "ffn_down", "attn_q", "attn_k", "attn_v", "attn_output")
"""Where routers can be. The position is part of the seed of noise."""

Site = tuple[int, str]
"""A layer and one of `ROLES`."""


@dataclass(frozen=True)
class Router:
    """A router of a whole mix. `experts` are its rows in order; an always-on expert is not among them."""

    mode: RouterMode
    experts: tuple[str, ...]
    k: int
    """Experts that run for a token, an always-on one included."""
    matrices: Mapping[Site, np.ndarray]
    always_on: str | None = None
    shared: bool = False
    std: float | None = None
    seed: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """How it was fitted or trained, for the record."""
    trunk: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Trunk tensors that were trained along with it: GGUF name → float32, rows in ggml's order."""

    @property
    def is_gateless(self) -> bool:
        return self.mode is RouterMode.GATELESS

    @property
    def is_stored(self) -> bool:
        """Whether its numbers are known from its matrices alone."""
        return self.mode not in (RouterMode.GATELESS, RouterMode.NOISY)

    @property
    def is_blank(self) -> bool:
        """Whether it is zero where it should choose: ties would always pick the same k experts."""
        return not self.is_gateless and not any(matrix.any() for matrix in self.matrices.values())

    @property
    def digest(self) -> str:
        """SHA-256 of all matrices in order: how a finished file knows its router again."""
        return digest(matrix for _, matrix in sorted(self.matrices.items()))


def digest(matrices: Iterable[np.ndarray]) -> str:
    """SHA-256 of float32 matrices, as hexadecimal."""
    total = sha256()
    for matrix in matrices:
        total.update(np.ascontiguousarray(matrix, "<f4").tobytes())
    return total.hexdigest()


def make_router(spec: RouterSpec, experts: Sequence[str], widths: Mapping[Site, int]) -> Router:
    """The gate-less or noisy router of `spec` over all `experts`; `widths` are the sites and their inputs' sizes.

    Of a mode that has to be fitted it is a blank: the right shape for a plan, and refused by a build.
    """
    routed = tuple(name for name in experts if name != spec.always_on)
    is_noisy = spec.mode is RouterMode.NOISY
    matrices = {
        site: noise(spec, site, len(routed), n_in) if is_noisy else np.zeros((len(routed), n_in), np.float32)
        for site, n_in in widths.items()
    }
    std, seed = (spec.std, spec.seed) if is_noisy else (None, None)
    return Router(spec.mode, routed, spec.k, matrices, spec.always_on, spec.shared, std, seed)


def noise(spec: RouterSpec, site: Site, n_rows: int, n_in: int) -> np.ndarray:
    """N(0, std²), float32 (n_rows, n_in). The stream depends on the seed and the site only: stable forever."""
    layer, role = site
    seed = [spec.seed, 0 if spec.shared else layer, *([ROLES.index(role)] if role != FFN else [])]
    return (spec.std * np.random.RandomState(seed).standard_normal((n_rows, n_in))).astype(np.float32)


def fit_into(
    router: Router, spec: RouterSpec, experts: Sequence[str], widths: Mapping[Site, int], where: str
) -> Router:
    """`router`, that came from `where`, as the router of a mix: rows in the order of `experts`, k as `spec` has it.

    Raises UserError with everything in which it is a router of another mix.
    """
    faults = list(_mismatches(router, spec, experts, widths, where))
    if faults:
        raise UserError.of(faults)
    routed = tuple(name for name in experts if name != router.always_on)
    order = [router.experts.index(name) for name in routed]
    matrices = {site: np.ascontiguousarray(router.matrices[site][order]) for site in widths}
    return replace(router, experts=routed, k=spec.k or router.k, matrices=matrices)


def _mismatches(
    router: Router, spec: RouterSpec, experts: Sequence[str], widths: Mapping[Site, int], where: str
) -> Iterator[UserError]:
    mend = "fit or train a router for this mix"
    routed = {name for name in experts if name != router.always_on}
    if router.always_on != spec.always_on:
        names = (router.always_on, spec.always_on)
        found, expected = (f"{name!r} always on" if name else "no expert always on" for name in names)
        yield UserError(f"{where}: was made with {found}, the mix has {expected}", "set always_on alike, or " + mend)
    elif set(router.experts) != routed:
        yield UserError(
            f"{where}: routes between {', '.join(router.experts)}, the mix between {', '.join(sorted(routed))}", mend
        )
    if missing := [site for site in widths if site not in router.matrices]:
        more = f" and {len(missing) - 1} more places" if len(missing) > 1 else ""
        yield UserError(f"{where}: has no router for layer {missing[0][0]} ({missing[0][1]}){more}", mend)
    if extra := [site for site in router.matrices if site not in widths]:
        more = f" and {len(extra) - 1} more places" if len(extra) > 1 else ""
        yield UserError(f"{where}: has a router for layer {extra[0][0]} ({extra[0][1]}){more}, the mix has none", mend)
    for site, n_in in widths.items():
        found = router.matrices[site].shape if site in router.matrices else None
        if found is not None and found != (len(router.experts), n_in):
            expected = (len(router.experts), n_in)
            yield UserError(f"{where}: the router of layer {site[0]} is {found}, expected {expected}", mend)
            return
    if (spec.k or router.k) > len(experts):
        yield UserError(f"{where}: picks {spec.k or router.k} experts of {len(experts)}", "pass a smaller k")
