"""How well a placement would run on a machine: whether it fits, how fast it is, and what would make it fit. Pure.

To generate a token, what is touched of the weights and of the cache is read once; so its time is the sum, over the
devices, of the bytes read there over the device's bandwidth. That is a bound: what is computed, sent between devices
and waited for comes on top, so small models reach less of it.

A suggestion is only made when it was tried: each is the same question asked again of a smaller model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from gguf import GGMLQuantizationType

from moegguf.gguf_header import Header
from moegguf.metadata import Card
from moegguf.runtime.offload import CPU, FFNS, WEIGHTS, Plan
from moegguf.runtime.run_options import RunOptions, ctx_of
from moegguf.sizes import show_size

_FEWEST_BITS = 1.6  # IQ1_S
_SHORTEST_CTX = 512


@dataclass(frozen=True)
class Outlook:
    """A plan on a machine with `ram` bytes of main memory to give.

    `bandwidth`: device → bytes that are read in a second, as far as known.
    """

    plan: Plan
    ram: int
    bandwidth: Mapping[str, float]

    @property
    def missing(self) -> int:
        """Bytes of main memory that are lacking; 0 where it fits."""
        return max(0, self.plan.memory[CPU].total() - self.ram)

    @property
    def fits(self) -> bool:
        return self.plan.fits_devices and not self.missing

    def tokens_per_s(self, *, full: bool) -> float | None:
        """Tokens that are generated in a second at most, with a full or an empty context; None where it is unknown."""
        touched = {device: n for device, n in self.plan.touched(full=full).items() if n}
        if not touched.keys() <= self.bandwidth.keys():
            return None
        return 1 / sum(n_bytes / self.bandwidth[device] for device, n_bytes in touched.items())


def suggestions(
    outlook: Outlook, model: Header, card: Card | None, options: RunOptions, again: Callable[[RunOptions], Outlook]
) -> list[str]:
    """What would make it fit, or run faster where it fits. `again` says how it would be with other options."""
    found = []
    if not outlook.plan.fits_devices:
        fitting = again(replace(options, offload=replace(options.offload, layers=None, cpu_experts=0)))
        found.append(f"what fits the devices: {fitting.plan.placement.flags()}")
    if outlook.missing:
        found += [*_smaller_context(options, ctx_of(model, options), again), *_smaller_file(outlook, model, card)]
    if outlook.fits:
        found += [*_fewer_experts(model, card, options, again), *_all_on_devices(outlook, model)]
    return found if found or outlook.fits else ["more memory, or a smaller model"]


def _smaller_context(options: RunOptions, ctx: int, again: Callable[[RunOptions], Outlook]) -> Iterator[str]:
    while (ctx := ctx // 2) >= _SHORTEST_CTX:
        if again(replace(options, ctx=ctx)).fits:
            yield f"less context: --ctx {ctx}"
            break
    if options.kv_type is GGMLQuantizationType.F16 and again(replace(options, kv_type=GGMLQuantizationType.Q8_0)).fits:
        yield "a smaller cache: --kv-type q8_0"


def _smaller_file(outlook: Outlook, model: Header, card: Card | None) -> Iterator[str]:
    def fits(plan: Plan) -> bool:
        return replace(outlook, plan=plan).fits

    yield from _smaller_quant(model, _largest(outlook.plan, WEIGHTS, fits), "it fits")
    n_experts = len(card.experts) if card and card.compact is None else 0
    left = n_experts * _largest(outlook.plan, FFNS, fits)
    if left >= 1 and card.is_gateless:
        yield f"neurons merged: build it with --compact {int(left * 10) / 10:g}x, now {n_experts}x"
    if left >= 1:
        yield f"fewer experts in it: moegguf prune --keep {int(left)}, now {n_experts}"


def _fewer_experts(
    model: Header, card: Card | None, options: RunOptions, again: Callable[[RunOptions], Outlook]
) -> Iterator[str]:
    used = options.experts_used or model.get(f"{model.get('general.architecture')}.expert_used_count", 0)
    if used > 1 and not (card and card.is_gateless):
        speed = again(replace(options, experts_used=used - 1)).tokens_per_s(full=False)
        yield f"fewer experts used: --experts-used {used - 1}" + (f", up to {speed:.1f} tokens/s" if speed else "")


def _all_on_devices(outlook: Outlook, model: Header) -> Iterator[str]:
    if outlook.plan.devices and not outlook.plan.is_all_on_devices:
        share = _largest(outlook.plan, WEIGHTS, lambda plan: plan.is_all_on_devices and plan.fits_devices)
        yield from _smaller_quant(model, share, "nothing is left to the CPU")


def _smaller_quant(model: Header, share: float, then: str) -> Iterator[str]:
    n_bytes = share * sum(info.nbytes for info in model.tensors.values())
    bits = 8 * n_bytes / sum(prod(info.shape) for info in model.tensors.values())
    size = show_size(int(n_bytes)).replace(" ", "")
    if bits >= _FEWEST_BITS:
        yield f"a smaller quant: built with --budget {size} ({bits:.2f} bits per weight) {then}"


def _largest(plan: Plan, parts: Container[str], is_enough: Callable[[Plan], bool]) -> float:
    """The largest share of the bytes of `parts`, in steps of 1 %, at which the plan is good; 0 where none is."""
    percents = range(99, 0, -1)
    steps = bisect_left(percents, True, key=lambda percent: is_enough(plan.shrunk(parts, percent / 100)))
    return percents[steps] / 100 if steps < len(percents) else 0
