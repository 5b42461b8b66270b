"""Which part of a model goes on which device: sizes and memory in, a placement out. Pure: any machine can be asked for.

llama.cpp knows two ways of placing, and a `Placement` is made of just these. The last N layers go on the devices, in
contiguous runs, the output being one layer more (`n_gpu_layers`, `tensor_split`); and single tensors go elsewhere by
their names (`tensor_buft_overrides`). The token embedding always stays on the CPU.

What is left to us is placed by what matters for a token. Everything but the routed experts is read for each, so the
trunk, the key-value cache and the shared experts come first: as many layers as fit. Of the routed experts a token reads
k of N, so they get what room is left, those of the last layers first, and the others stay in main memory.

How large compute buffers are depends on the placement, and only llama.cpp knows: `find_plan` asks for it (`runtime.
footprint` answers without loading anything), and places again when they turn out larger than was reckoned with.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import accumulate, pairwise

from moegguf.checks import check_range
from moegguf.errors import UserError
from moegguf.gguf_header import Header
from moegguf.kinds import check_fields

ALL = -1
CPU = "CPU"
CACHE, COMPUTE = "KV cache", "compute buffers"
EXPERTS = "routed experts"
_PARTS = (
    (EXPERTS, r"_exps\."),
    ("shared experts", r"_shexp\."),
    ("dense FFN", r"^blk\.\d+\.ffn_(gate|up|down)\."),
    ("attention", r"^blk\.\d+\.attn_(q|k|v|qkv|output)\."),
    ("embedding", r"^token_embd\."),
    ("output", r"^output\."),
    ("norms and routers", r""),
)
"""The first whose expression matches a tensor's name is its part."""
FFNS = (EXPERTS, "shared experts", "dense FFN")
WEIGHTS = tuple(part for part, _ in _PARTS)
PARTS = (*WEIGHTS, CACHE, COMPUTE)
_LAYER = re.compile(r"^blk\.(\d+)\.")
_LARGEST_MARGIN = 1 << 30  # what common/fit.cpp of llama.cpp leaves
_ATTEMPTS = 4


class FlashAttention(Enum):
    """enum llama_flash_attn_type of llama.h.

    It saves memory of compute buffers, and a quantised cache needs it; but it moves logits by 3e-3 and more. So with
    AUTO it is off for a cache of F32, which is there for exactness, and where the CPU computes alone; else llama.cpp
    decides, by what the devices can do.
    """

    AUTO = -1
    OFF = 0
    ON = 1


@dataclass(frozen=True)
class Override:
    """Tensors whose name has a match of the regular expression `pattern` go on `device`."""

    pattern: str
    device: str

    def __post_init__(self) -> None:
        """Raises UserError for what is no regular expression."""
        check_fields(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"--override-tensor {self.pattern}={self.device}: {self.pattern!r} is no regular expression ({error})",
                "mend the pattern",
            ) from error

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Offload:
    """What is asked of the devices. The default takes all of them, and puts on them what fits."""

    layers: int | None = None
    """Layers on the devices, counted from the last, the output being one more; ALL; None is what fits, experts last."""
    cpu_experts: int = 0
    """The routed experts of the first so many layers stay on the CPU; ALL."""
    overrides: tuple[Override, ...] = ()
    """The first that matches a tensor decides, whatever else is asked."""
    devices: tuple[str, ...] | None = None
    """Names of those to use; None is all, an empty tuple the CPU alone."""
    main_gpu: int | None = None
    """Use this one of them alone, counted from 0."""
    tensor_split: tuple[float, ...] = ()
    """Shares of the layers, one for each device; without, by their memory."""
    workers: tuple[str, ...] = ()
    """`host:port` of other machines that run `moegguf worker`. Who loses one ends (`runtime.lost`)."""
    patience: int = 600
    """Seconds for which workers may say nothing while they are waited for."""

    def __post_init__(self) -> None:
        """Raises UserError for what no machine can mean; one name where several are expected is a plausible mistake."""
        for name in ("overrides", "devices", "tensor_split", "workers"):
            if isinstance(value := getattr(self, name), str):
                raise UserError(f"{name} {value!r}: expected several, in a tuple", f"for example {name}=({value!r},)")
        check_fields(self)
        check_range("--gpu-layers", self.layers, ALL)
        check_range("--cpu-experts", self.cpu_experts, ALL)
        check_range("--main-gpu", self.main_gpu, 0)
        shares = self.tensor_split
        if shares and not (all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares)):
            raise UserError(
                f"--tensor-split {','.join(f'{share:g}' for share in shares)}: expected a share for each device, "
                "none negative and not all 0",
                "for example 3,1",
            )
        check_range("--rpc-timeout", self.patience, 1)


WHAT_FITS = Offload()


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on. `kind` is CPU, GPU, IGPU (shares main memory) or ACCEL; memory in bytes."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int

    @property
    def room(self) -> int:
        """Bytes that a model may take: a margin is left to the driver, an eighth of all but 1 GiB at most."""
        return max(0, self.memory_free - min(_LARGEST_MARGIN, self.memory_total // 8))


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, in the layer that llama.cpp counts it to: the output is one after the last."""

    name: str
    part: str
    layer: int | None
    """None is the token embedding's."""
    n_bytes: int
    touched: float
    """Bytes that are read for each token, on average."""
    is_copy: bool = False
    """Whether another device than the CPU needs it a second time: the output that is the embedding too."""


@dataclass(frozen=True)
class Demand:
    """What a model takes. `kv_cache`: bytes for all layers together."""

    weights: tuple[Weight, ...]
    n_layer: int
    kv_cache: int

    @property
    def kv_of_layer(self) -> int:
        return -(-self.kv_cache // self.n_layer)


@dataclass(frozen=True)
class Footprint:
    """What running takes besides the weights, in bytes. `compute`: device → its buffers; `kv_cache`: of all layers."""

    compute: Mapping[str, int]
    kv_cache: int

    def total(self) -> int:
        return sum(self.compute.values()) + self.kv_cache

    def prolonged(self, before: Footprint, steps: float) -> Footprint:
        """The one that lies so many steps further on the straight line from `before` to this one."""

        def further(now: int, then: int) -> int:
            return round(now + steps * (now - then))

        compute = {device: further(n_bytes, before.compute.get(device, 0)) for device, n_bytes in self.compute.items()}
        return Footprint(compute, further(self.kv_cache, before.kv_cache))


@dataclass(frozen=True)
class Placement:
    """Where a model of `n_layer` layers goes; `Placement(n_layer)` is on the CPU."""

    n_layer: int
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    """How many layers each device takes. Together they are the last ones, in order, the output last."""
    cpu_experts: tuple[int, ...] = ()
    """Layers whose routed experts stay on the CPU."""
    overrides: tuple[Override, ...] = ()

    @property
    def n_gpu_layers(self) -> int:
        return sum(self.layers)

    @cached_property
    def all_overrides(self) -> tuple[Override, ...]:
        """In llama.cpp's order: those asked for, then the experts that stay behind."""
        return self.overrides + ((Override(_experts_of(self.cpu_experts), CPU),) if self.cpu_experts else ())

    def device_of_layer(self, layer: int | None) -> str:
        """The device that computes a layer and holds its part of the cache."""
        if layer is None:
            return CPU
        owners = zip(self.devices, _runs(self.layers, self.n_layer + 1), strict=True)
        return next((device for device, run in owners if layer in run), CPU)

    def device_of(self, weight: Weight) -> str:
        overridden = (override.device for override in self.all_overrides if override.matches(weight.name))
        return next(overridden, self.device_of_layer(weight.layer))

    def memory(self, demand: Demand, compute: Mapping[str, int]) -> dict[str, Counter[str]]:
        """Device → part → bytes; the CPU first, and every device that is used."""
        found = {name: Counter() for name in (CPU, *self.devices)}
        for weight in demand.weights:
            device = self.device_of(weight)
            if not (weight.is_copy and device == CPU):
                found.setdefault(device, Counter())[weight.part] += weight.n_bytes
        for layer in range(demand.n_layer):
            found[self.device_of_layer(layer)][CACHE] += demand.kv_of_layer
        for device, n_bytes in compute.items():
            found.setdefault(device, Counter())[COMPUTE] += n_bytes
        return found

    def touched(self, demand: Demand, *, full: bool) -> Counter[str]:
        """Device → bytes that are read to generate a token, with a full or an empty context."""
        found: Counter[str] = Counter()
        for weight in demand.weights:
            found[self.device_of(weight)] += round(weight.touched)
        for layer in range(demand.n_layer if full else 0):
            found[self.device_of_layer(layer)] += demand.kv_of_layer
        return found

    def in_words(self) -> str:
        """Which device has how many layers."""
        layers = [f"{n} on {name}" for name, n in zip(self.devices, self.layers, strict=True) if n]
        if not layers:
            return "all on the CPU"
        left = f", the experts of {len(self.cpu_experts)} on the CPU" if self.cpu_experts else ""
        return f"of {self.n_layer + 1} layers (the output is one) {', '.join(layers)}{left}"

    def flags(self) -> str:
        """The command line that asks for it."""
        words = [f"--gpu-layers {self.n_gpu_layers}"]
        if len(self.devices) > 1 and self.n_gpu_layers:
            words.append(f"--tensor-split {','.join(map(str, self.layers))}")
        if self.cpu_experts == tuple(range(len(self.cpu_experts))):
            words += [f"--cpu-experts {len(self.cpu_experts)}"] if self.cpu_experts else []
            shown = self.overrides
        else:
            shown = self.all_overrides
        return " ".join([*words, *(f"--override-tensor '{over.pattern}={over.device}'" for over in shown)])


def demand_of(header: Header, *, experts_used: int | None, kv_cache: int) -> Demand:
    """What the model of `header` takes, with `kv_cache` bytes of cache, when `experts_used` run for a token."""
    arch = header.get("general.architecture")
    n_layer = n_layers(header)
    n_expert = header.get(f"{arch}.expert_count", 0) or 1
    share = (experts_used or header.get(f"{arch}.expert_used_count", n_expert)) / n_expert
    weights = []
    for info in header.tensors.values():
        part = next(part for part, pattern in _PARTS if re.search(pattern, info.name))
        layer = min(int(found[1]), n_layer) if (found := _LAYER.match(info.name)) else n_layer
        touched = info.nbytes * share if part == EXPERTS else info.nbytes
        if part == "embedding":
            layer, touched = None, info.nbytes / info.shape[0]
            if "output.weight" not in header.tensors:  # llama.cpp loads it a second time, as the output
                weights.append(Weight("output.weight", "output", n_layer, info.nbytes, info.nbytes, is_copy=True))
        weights.append(Weight(info.name, part, layer, info.nbytes, touched))
    return Demand(tuple(weights), n_layer, kv_cache)


def place(demand: Demand, devices: Sequence[Device], asked: Offload, compute: Mapping[str, int]) -> Placement:
    """Where `demand` goes on `devices`, of which `compute` bytes by name are taken by compute buffers.

    A number of layers that was asked for is taken, whether it fits or not; left to us, the most that fit.
    """
    n_blocks = demand.n_layer + 1
    n_left = demand.n_layer if asked.cpu_experts == ALL else min(asked.cpu_experts, demand.n_layer)
    start = Placement(
        demand.n_layer,
        tuple(device.name for device in devices),
        (0,) * len(devices),
        tuple(range(n_left)),
        asked.overrides,
    )
    if not devices:
        return start
    blocks = _Blocks.of(demand, start)
    room = [device.room - compute.get(device.name, 0) - blocks.bound[device.name] for device in devices]
    if asked.layers is not None:
        n = n_blocks if asked.layers == ALL else min(asked.layers, n_blocks)
        return replace(start, layers=next(_divisions(blocks, n, asked.tensor_split, room)))
    for n in range(n_blocks, 0, -1):
        for layers in _divisions(blocks, n, asked.tensor_split, room):
            runs = _runs(layers, n_blocks)
            if all(sum(blocks.fixed[i] for i in run) <= most for run, most in zip(runs, room, strict=True)):
                return replace(start, layers=layers, cpu_experts=_left_behind(start.cpu_experts, blocks, runs, room))
    return start


@dataclass(frozen=True)
class Plan:
    """A placement with all that it takes."""

    placement: Placement
    demand: Demand
    compute: Mapping[str, int]
    devices: tuple[Device, ...]
    asked: Offload

    @cached_property
    def memory(self) -> dict[str, Counter[str]]:
        """Device → part → bytes; the CPU first."""
        return self.placement.memory(self.demand, self.compute)

    def touched(self, *, full: bool) -> Counter[str]:
        """Device → bytes that are read to generate a token, with a full or an empty context."""
        return self.placement.touched(self.demand, full=full)

    @property
    def is_all_on_devices(self) -> bool:
        """Whether the CPU is left nothing but the embedding."""
        return all(
            self.placement.device_of(weight) != CPU for weight in self.demand.weights if weight.layer is not None
        )

    def on_half(self) -> Placement:
        """Where it would go if each device had room for half of what it got."""
        halves = [
            replace(device, memory_free=self.memory[device.name].total() // 2, memory_total=0)
            for device in self.devices
        ]
        return place(self.demand, halves, replace(self.asked, layers=None), self.compute)

    def shrunk(self, parts: Container[str], factor: float) -> Plan:
        """The plan of the same model with weights of `parts` that take `factor` times the bytes."""
        weights = tuple(
            replace(weight, n_bytes=round(factor * weight.n_bytes), touched=factor * weight.touched)
            if weight.part in parts
            else weight
            for weight in self.demand.weights
        )
        demand = replace(self.demand, weights=weights)
        return Plan(
            place(demand, self.devices, self.asked, self.compute), demand, self.compute, self.devices, self.asked
        )

    @property
    def fits_devices(self) -> bool:
        """Whether every device has room for its share; main memory is not asked."""
        return all(self.memory[device.name].total() <= device.room for device in self.devices)


def find_plan(
    header: Header,
    devices: Sequence[Device],
    asked: Offload,
    lay_out: Callable[[Placement], Footprint],
    *,
    experts_used: int | None = None,
) -> Plan:
    """Where the model of `header` goes on `devices`. `lay_out` says what a placement takes besides the weights.

    Raises UserError for an override that matches nothing in the file.
    """
    for override in asked.overrides:
        if not any(map(override.matches, header.tensors)):
            raise UserError(
                f"--override-tensor {override.pattern}: matches no tensor of {header.path}",
                "it is searched for in llama.cpp's names, such as blk.0.ffn_up_exps.weight",
            )
    found = lay_out(Placement(n_layers(header)))
    demand = demand_of(header, experts_used=experts_used, kv_cache=found.kv_cache)
    reckoned = dict.fromkeys((device.name for device in devices), sum(found.compute.values()))
    for _ in range(_ATTEMPTS):
        placement = place(demand, devices, asked, reckoned)
        compute = lay_out(placement).compute
        plan = Plan(placement, demand, compute, tuple(devices), asked)
        if asked.layers is not None or plan.fits_devices:
            break
        reckoned = {name: max(n_bytes, compute.get(name, 0)) for name, n_bytes in reckoned.items()}
    return plan


def check_names(asked: Offload, devices: Sequence[Device]) -> None:
    """Raises UserError when an override or a share has no device among these and the CPU."""
    names = (CPU, *(device.name for device in devices))
    for override in asked.overrides:
        if override.device not in names:
            raise UserError(f"--override-tensor names {override.device!r}", f"the devices are {', '.join(names)}")
    if len(asked.tensor_split) > len(devices):
        raise UserError(
            f"--tensor-split has {len(asked.tensor_split)} shares for {len(devices)} devices", "one for each"
        )


def n_layers(header: Header) -> int:
    """How many layers the model has. Raises UserError when its header does not say."""
    count = header.get(f"{header.get('general.architecture')}.block_count")
    if not count and header.get("split.no"):
        raise UserError(f"{header.path}: is a later part of a split file", "pass the first one, NAME-00001-of-…")
    if not count:
        raise UserError(f"{header.path}: does not say how many layers it has", "convert it again")
    return count


@dataclass(frozen=True)
class _Blocks:
    """Bytes of every layer, the output last. `fixed` goes where the layer goes, `movable` may stay behind."""

    fixed: tuple[int, ...]
    movable: tuple[int, ...]
    bound: Counter[str]
    """Device → bytes that overrides put there."""

    @property
    def whole(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.fixed, self.movable, strict=True)))

    @classmethod
    def of(cls, demand: Demand, start: Placement) -> _Blocks:
        fixed = [demand.kv_of_layer] * demand.n_layer + [0]
        movable = [0] * (demand.n_layer + 1)
        bound: Counter[str] = Counter()
        for weight in demand.weights:
            if any(override.matches(weight.name) for override in start.all_overrides):
                bound[start.device_of(weight)] += weight.n_bytes
            elif weight.layer is not None:
                (movable if weight.part == EXPERTS else fixed)[weight.layer] += weight.n_bytes
        return cls(tuple(fixed), tuple(movable), bound)


def _divisions(blocks: _Blocks, n: int, shares: Sequence[float], room: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ways to divide the last `n` layers among the devices: as asked, or by room with all experts or with none."""
    if shares:
        yield _divided((1,) * n, (*shares, *[0.0] * (len(room) - len(shares))))
        return
    by_room = [max(bytes_left, 1) for bytes_left in room]
    for sizes in (blocks.whole, blocks.fixed):
        yield _divided(sizes[len(sizes) - n :], by_room)


def _divided(sizes: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """How many of `sizes`, in order, each device takes, so that it gets about its share of their sum."""
    ends = list(accumulate(shares))
    counts = [0] * len(shares)
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        middle = (end - size / 2) / max(sum(sizes), 1) * ends[-1]
        counts[bisect_right(ends, middle)] += 1
    return tuple(counts)


def _runs(layers: Sequence[int], n_blocks: int) -> list[range]:
    """The numbers of the layers that each device takes: together they are the last."""
    ends = list(accumulate(layers, initial=n_blocks - sum(layers)))
    return [range(*bounds) for bounds in pairwise(ends)]


def _left_behind(asked: Sequence[int], blocks: _Blocks, runs: Sequence[range], room: Sequence[int]) -> tuple[int, ...]:
    """The layers whose experts stay on the CPU: on each device, the first ones, until the others fit."""
    behind = set(asked)
    for run, most in zip(runs, room, strict=True):
        left = most - sum(blocks.fixed[i] for i in run)
        for i in reversed(run):
            if blocks.movable[i] <= left:
                left -= blocks.movable[i]
            else:
                behind.add(i)
    return tuple(sorted(behind))


def _experts_of(layers: Sequence[int]) -> str:
    """A regular expression for the routed experts of these layers (LLM_FFN_EXPS_REGEX of llama.cpp's common.h)."""
    return rf"blk\.({'|'.join(map(str, layers))})\.ffn_(up|down|gate|gate_up)_(ch|)exps"
