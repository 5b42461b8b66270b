"""What goes on which device: pure placement, on machines that are only described."""

from __future__ import annotations

from collections import Counter

import pytest

from conftest import build_mix
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.runtime.offload import (
    ALL,
    CACHE,
    COMPUTE,
    CPU,
    WHAT_FITS,
    Demand,
    Device,
    Footprint,
    Offload,
    Override,
    Placement,
    Weight,
    demand_of,
    find_plan,
    place,
)

N_LAYER, TRUNK, EXPERTS, OUTPUT, KV = 4, 10, 30, 20, 5
LAYER = TRUNK + KV
EVERYTHING = N_LAYER * (LAYER + EXPERTS) + OUTPUT


def model() -> Demand:
    """Four layers of 10 bytes of trunk, 5 of cache and 30 of experts, of which a token reads 15; an output of 20."""
    weights = [Weight("token_embd.weight", "embedding", None, 20, 1), Weight("output.weight", "output", 4, 20, 20)]
    for i in range(N_LAYER):
        weights.append(Weight(f"blk.{i}.attn_q.weight", "attention", i, TRUNK, TRUNK))
        weights.append(Weight(f"blk.{i}.ffn_up_exps.weight", "routed experts", i, EXPERTS, EXPERTS / 2))
    return Demand(tuple(weights), N_LAYER, N_LAYER * KV)


def gpus(*sizes: int) -> list[Device]:
    """GPUs with room for so many bytes."""
    found = [Device(f"GPU{i}", "", "GPU", size, 0) for i, size in enumerate(sizes)]
    assert [device.room for device in found] == list(sizes)
    return found


TRUNK_ONLY = N_LAYER * LAYER + OUTPUT


@pytest.mark.parametrize(
    ("sizes", "layers", "behind"),
    [
        ((EVERYTHING,), (5,), ()),
        ((EVERYTHING - 1,), (5,), (0,)),
        ((TRUNK_ONLY + 2 * EXPERTS,), (5,), (0, 1)),
        ((TRUNK_ONLY,), (5,), (0, 1, 2, 3)),
        ((TRUNK_ONLY - 1,), (4,), (1, 2, 3)),
        ((OUTPUT,), (1,), ()),
        ((OUTPUT - 1,), (0,), ()),
        ((0,), (0,), ()),
        ((EVERYTHING, EVERYTHING), (2, 3), ()),
        ((TRUNK_ONLY, 0), (5, 0), (0, 1, 2, 3)),
        ((45, 200), (1, 4), ()),
        ((), (), ()),
    ],
)
def test_trunk_and_cache_come_first_then_experts_of_the_last_layers(sizes, layers, behind):
    placement = place(model(), gpus(*sizes), WHAT_FITS, {})
    assert (placement.layers, placement.cpu_experts) == (layers, behind)


@pytest.mark.parametrize("size", range(0, EVERYTHING + 10, 7))
@pytest.mark.parametrize("second", [0, 30, 100])
def test_what_is_placed_fits_and_nothing_is_lost(size, second):
    devices, compute = gpus(size, second), {"GPU0": 3, "GPU1": 3}
    memory = place(model(), devices, WHAT_FITS, compute).memory(model(), {})
    assert all(memory[device.name].total() + 3 <= device.room or not memory[device.name] for device in devices)
    assert sum(map(Counter.total, memory.values())) == EVERYTHING + 20


def test_compute_buffers_take_room():
    assert place(model(), gpus(EVERYTHING), WHAT_FITS, {"GPU0": 1}).cpu_experts == (0,)


@pytest.mark.parametrize(
    ("asked", "layers", "behind"),
    [
        (Offload(layers=0), (0, 0), ()),
        (Offload(layers=3), (1, 2), ()),
        (Offload(layers=ALL), (2, 3), ()),
        (Offload(layers=99), (2, 3), ()),
        (Offload(layers=ALL, cpu_experts=2), (3, 2), (0, 1)),
        (Offload(layers=ALL, cpu_experts=ALL), (3, 2), (0, 1, 2, 3)),
        (Offload(layers=ALL, tensor_split=(4, 1)), (4, 1), ()),
        (Offload(layers=ALL, tensor_split=(1,)), (5, 0), ()),
        (Offload(layers=ALL, tensor_split=(0, 1)), (0, 5), ()),
        (Offload(tensor_split=(4, 1)), (4, 1), ()),
        (Offload(cpu_experts=1), (3, 2), (0,)),
    ],
)
def test_what_was_asked_for_is_done(asked, layers, behind):
    placement = place(model(), gpus(1000, 1000), asked, {})
    assert (placement.layers, placement.cpu_experts) == (layers, behind)


def test_a_number_of_layers_is_taken_whether_it_fits_or_not():
    assert place(model(), gpus(1), Offload(layers=3), {}).n_gpu_layers == 3


def test_the_first_override_that_matches_decides():
    overrides = (Override(r"blk\.0\.ffn_up_exps", "GPU0"), Override("_exps", CPU))
    placement = place(model(), gpus(1000), Offload(layers=2, overrides=overrides), {})
    where = {weight.name: placement.device_of(weight) for weight in model().weights}
    assert where["blk.0.ffn_up_exps.weight"] == "GPU0"
    assert where["blk.3.ffn_up_exps.weight"] == CPU
    assert (where["blk.2.attn_q.weight"], where["blk.3.attn_q.weight"]) == (CPU, "GPU0")
    assert (where["token_embd.weight"], where["output.weight"]) == (CPU, "GPU0")


def test_what_overrides_put_on_a_device_takes_room_there():
    bound = Offload(overrides=(Override(r"blk\.[01]\..*_exps", "GPU0"),))
    placement = place(model(), gpus(TRUNK_ONLY + 3 * EXPERTS), bound, {})
    assert placement.cpu_experts == (2,)
    assert placement.memory(model(), {})["GPU0"].total() == TRUNK_ONLY + 3 * EXPERTS


def test_a_token_reads_the_share_of_the_experts_that_run_and_the_cache_where_it_lies():
    placement = Placement(N_LAYER, ("GPU0",), (5,), (0, 1))
    assert placement.touched(model(), full=False) == {CPU: 1 + 2 * 15, "GPU0": 4 * 10 + 2 * 15 + 20}
    full = placement.touched(model(), full=True)
    assert (full[CPU], full["GPU0"]) == (31, 90 + 4 * KV)


@pytest.mark.parametrize(
    ("placement", "flags"),
    [
        (Placement(4), "--gpu-layers 0"),
        (Placement(4, ("GPU0",), (5,), (0, 1)), "--gpu-layers 5 --cpu-experts 2"),
        (Placement(4, ("GPU0", "GPU1"), (2, 3)), "--gpu-layers 5 --tensor-split 2,3"),
        (
            Placement(4, ("GPU0",), (2,), (3,), (Override("x", CPU),)),
            r"--gpu-layers 2 --override-tensor 'x=CPU'"
            r" --override-tensor 'blk\.(3)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'",
        ),
    ],
)
def test_a_placement_can_be_written_as_flags(placement, flags):
    assert placement.flags() == flags


def test_the_plan_is_made_again_when_compute_buffers_turn_out_larger(family, tmp_path):
    """The laid out buffers shrink what is left for experts, until it fits."""
    tiny = family("llama3_like")
    header = read_header(build_mix(tmp_path / "m.gguf", tiny.base, tiny.experts))
    demand = demand_of(header, experts_used=None, kv_cache=0)
    needed = sum(weight.n_bytes for weight in demand.weights if weight.layer is not None)
    tried = []

    def lay_out(placement: Placement) -> Footprint:
        tried.append(placement)
        return Footprint({CPU: 0, **({"GPU0": 5000} if placement.n_gpu_layers else {})}, kv_cache=1000)

    plan = find_plan(header, gpus(needed + 1000), WHAT_FITS, lay_out)
    assert plan.fits_devices and plan.memory["GPU0"][COMPUTE] == 5000
    assert not tried[1].cpu_experts and tried[-1].cpu_experts
    assert sum(parts[CACHE] for parts in plan.memory.values()) >= 1000


def test_every_tensor_of_a_file_is_counted_once_and_experts_by_their_use(family, tmp_path):
    tiny = family("llama3_like")
    header = read_header(build_mix(tmp_path / "m.gguf", tiny.base, tiny.experts))
    demand, one = (demand_of(header, experts_used=used, kv_cache=0) for used in (None, 1))
    stored = [weight for weight in demand.weights if not weight.is_copy]
    assert sum(weight.n_bytes for weight in stored) == sum(info.nbytes for info in header.tensors.values())
    experts = [
        (weight, fewer) for weight, fewer in zip(demand.weights, one.weights, strict=True) if "_exps" in weight.name
    ]
    assert experts and all(fewer.touched * 3 == weight.touched == weight.n_bytes for weight, fewer in experts)


def test_an_override_that_matches_nothing_is_refused_with_its_pattern(family, tmp_path):
    tiny = family("llama3_like")
    header = read_header(build_mix(tmp_path / "m.gguf", tiny.base, tiny.experts))
    asked = Offload(overrides=(Override("nosuchtensor", CPU),))
    with pytest.raises(UserError, match="nosuchtensor: matches no tensor"):
        find_plan(header, [], asked, lambda placement: Footprint({}, 0))


def test_a_smaller_model_needs_less():
    plan = find_plan_of_model(gpus(TRUNK_ONLY))
    small = plan.shrunk({"routed experts"}, 0.0)
    assert len(plan.placement.cpu_experts) == 4 and not small.placement.cpu_experts
    assert small.is_all_on_devices and not plan.is_all_on_devices


def find_plan_of_model(devices: list[Device]):
    from moegguf.runtime.offload import Plan

    return Plan(place(model(), devices, WHAT_FITS, {}), model(), {}, tuple(devices), WHAT_FITS)
