"""The hidden router against its definition."""

from __future__ import annotations

import numpy as np

from moegguf.recipe import Pool, RouterMode, Tap
from moegguf.routers import hidden
from moegguf.routers.statistics import Statistics, Subject, read_statistics, write_statistics

N_LAYER, N_EMBD = 3, 16
SUBJECT = Subject(RouterMode.HIDDEN, "base", N_LAYER, N_EMBD, Tap.LAYER_INPUT, Pool.LAST)
EXPERTS = ("math", "code", "talk")
COUNTS = (5, 2, 9)
X = {
    name: np.random.default_rng(i).normal(size=(N_LAYER, n, N_EMBD)).astype(np.float32)
    for i, (name, n) in enumerate(zip((*EXPERTS, "not math"), (*COUNTS, 4), strict=True))
}


def statistics_of(*names: str, negative: bool = False) -> Statistics:
    statistics = Statistics.empty(SUBJECT)
    for name in names:
        _add(statistics, name, X[name])
    if negative:
        _add(statistics, "math", X["not math"], negative=True)
    return statistics


def _add(statistics: Statistics, name: str, x: np.ndarray, *, negative: bool = False) -> None:
    n = x.shape[1]
    group = statistics.open_group(name, n, n_tokens=10 * n, digest=name, run_on="test", negative=negative)
    for layer in range(N_LAYER):
        statistics.add(group, layer, x[layer])


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


def test_a_row_is_positive_less_negative_mean_of_length_one():
    rows = hidden.fit(statistics_of(*EXPERTS, negative=True), EXPERTS, shared=False)
    for layer in range(N_LAYER):
        math = X["math"][layer].mean(axis=0) - X["not math"][layer].mean(axis=0)
        assert np.abs(rows[layer][0] - unit(math)).max() < 1e-6


def test_without_negatives_the_other_experts_are_the_negatives_each_with_the_same_weight():
    rows = hidden.fit(statistics_of(*EXPERTS), EXPERTS, shared=False)
    for layer in range(N_LAYER):
        math, code, talk = (X[name][layer].mean(axis=0) for name in EXPERTS)
        assert np.abs(rows[layer][1] - unit(code - (math + talk) / 2)).max() < 1e-6


def test_a_shared_router_is_made_of_the_mean_state_of_all_layers():
    rows = hidden.fit(statistics_of(*EXPERTS), EXPERTS, shared=True)
    math, code, talk = (X[name].mean(axis=(0, 1)) for name in EXPERTS)
    assert np.abs(rows[0][2] - unit(talk - (math + code) / 2)).max() < 1e-6
    assert all(np.array_equal(rows[0], row) for row in rows)


def test_experts_alike_get_rows_of_zero_and_not_of_noise_blown_up():
    statistics = Statistics.empty(SUBJECT)
    for name in EXPERTS:
        _add(statistics, name, X["math"])
    assert np.abs(np.stack(hidden.fit(statistics, EXPERTS, shared=False))).max() < 1e-6


def test_an_expert_added_from_a_file_gives_the_router_of_one_fit(tmp_path):
    file = tmp_path / "statistics.safetensors"
    write_statistics(file, statistics_of("math", "code", negative=True))
    later = read_statistics(file, SUBJECT)
    _add(later, "talk", X["talk"])
    at_once = statistics_of(*EXPERTS, negative=True)
    assert later.gram is None
    for ours, theirs in zip(*(hidden.fit(each, EXPERTS, shared=False) for each in (later, at_once)), strict=True):
        assert np.array_equal(ours, theirs)
