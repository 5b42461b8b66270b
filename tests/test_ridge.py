"""The ridge router against least squares itself, and its statistics: an expert added later, the file, its faults."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moegguf.errors import UserError
from moegguf.recipe import FitSpec, Pool, RouterMode, Tap
from moegguf.routers import ridge
from moegguf.routers.statistics import Statistics, Subject, read_statistics, write_statistics

N_LAYER, N_EMBD = 2, 24
SUBJECT = Subject(RouterMode.RIDGE, "base", N_LAYER, N_EMBD, Tap.ROUTER_INPUT, None)
COUNTS = {"math": 300, "code": 40, "talk": 7}
SPEC = FitSpec(ridge_lambda=0.01, temperature=0.5)


def activations(name: str, layer: int) -> np.ndarray:
    """float32 (n_tokens, n_embd): noise around a mean of the domain's own, on a large common part."""
    rng = np.random.default_rng([layer, *name.encode()])
    return (rng.normal(size=(COUNTS[name], N_EMBD)) + rng.normal(size=N_EMBD) + 3).astype(np.float32)


def add(statistics: Statistics, *names: str, portion: int = 17) -> Statistics:
    for name in names:
        group = statistics.open_group(name, COUNTS[name], n_tokens=COUNTS[name], digest=name, run_on="test")
        for layer in range(N_LAYER):
            x = activations(name, layer)
            for start in range(0, len(x), portion):
                statistics.add(group, layer, x[start : start + portion])
    return statistics


def least_squares(x: dict[str, list[np.ndarray]], spec: FitSpec) -> np.ndarray:
    """Rows by numpy's own solver: every token times the root of its weight, λ as rows of data."""
    total = {name: sum(map(len, blocks)) for name, blocks in x.items()}
    roots = {name: np.sqrt(np.mean(list(total.values())) / total[name]) for name in x}
    data = np.concatenate([block.astype(np.float64) * roots[name] for name, blocks in x.items() for block in blocks])
    one_hot = np.repeat(np.eye(len(x)) * list(roots.values()), list(total.values()), axis=0)
    penalty = np.sqrt(spec.ridge_lambda) * np.eye(N_EMBD)
    solution = np.linalg.lstsq(np.vstack([data, penalty]), np.vstack([one_hot, np.zeros((N_EMBD, len(x)))]))[0].T
    return solution / np.linalg.norm(solution, axis=1, keepdims=True) / spec.temperature


def test_rows_solve_the_balanced_least_squares_problem():
    rows = ridge.fit(add(Statistics.empty(SUBJECT), *COUNTS), tuple(COUNTS), SPEC, shared=False)
    for layer in range(N_LAYER):
        direct = least_squares({name: [activations(name, layer)] for name in COUNTS}, SPEC)
        assert np.abs(rows[layer] - direct).max() < 1e-6
        assert np.allclose(np.linalg.norm(rows[layer], axis=1), 1 / SPEC.temperature)
    assert not np.allclose(rows[0], rows[1])


def test_a_shared_router_is_the_fit_to_all_layers_together():
    rows = ridge.fit(add(Statistics.empty(SUBJECT), *COUNTS), tuple(COUNTS), SPEC, shared=True)
    direct = least_squares({name: [activations(name, layer) for layer in range(N_LAYER)] for name in COUNTS}, SPEC)
    assert np.abs(rows[0] - direct).max() < 1e-6
    assert np.array_equal(rows[0], rows[1])


def test_fewer_tokens_than_dimensions_still_give_the_exact_solution():
    rows = ridge.fit(add(Statistics.empty(SUBJECT), "talk"), ("talk",), SPEC, shared=False)
    direct = least_squares({"talk": [activations("talk", 0)]}, SPEC)
    assert COUNTS["talk"] < N_EMBD
    assert np.abs(rows[0] - direct).max() < 1e-6


def test_rows_follow_the_order_of_the_experts():
    statistics = add(Statistics.empty(SUBJECT), *COUNTS)
    forward = ridge.fit(statistics, ("math", "code", "talk"), SPEC, shared=False)
    backward = ridge.fit(statistics, ("talk", "code", "math"), SPEC, shared=False)
    assert np.allclose(forward[0], backward[0][::-1], rtol=1e-12)


def test_an_expert_added_from_a_file_gives_the_router_of_one_fit(tmp_path):
    file = tmp_path / "statistics.safetensors"
    write_statistics(file, add(Statistics.empty(SUBJECT), "math", "code"))
    later = add(read_statistics(file, SUBJECT), "talk")
    at_once = add(Statistics.empty(SUBJECT), *COUNTS)
    fits = (ridge.fit(each, tuple(COUNTS), SPEC, shared=False) for each in (later, at_once))
    for ours, theirs in zip(*fits, strict=True):
        assert np.array_equal(ours, theirs)


def test_the_gram_sum_is_kept_in_one_triangle(tmp_path):
    statistics = add(Statistics.empty(SUBJECT), "math")
    x = activations("math", 1).astype(np.float64)
    assert np.allclose(statistics.full_gram(1), x.T @ x / len(x), rtol=1e-12)
    assert statistics.gram.nbytes == SUBJECT.gram_bytes


def test_no_lambda_and_too_little_text_is_an_error():
    statistics = Statistics.empty(SUBJECT)
    for i, name in enumerate(("math", "code")):
        group = statistics.open_group(name, 1, n_tokens=1, digest=name, run_on="test")
        for layer in range(N_LAYER):
            statistics.add(group, layer, np.eye(N_EMBD, dtype=np.float32)[i : i + 1])
    with pytest.raises(UserError, match="larger --lambda"):
        ridge.fit(statistics, ("math", "code"), replace(SPEC, ridge_lambda=0.0), shared=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    statistics = Statistics.empty(SUBJECT)
    group = statistics.open_group("math", 1, n_tokens=1, digest="", run_on="test")
    with pytest.raises(UserError, match="layer 1: the activations are not finite"):
        statistics.add(group, 1, np.full((1, N_EMBD), bad, np.float32))


# ------------------------------------------------------------------------------------------------- file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "statistics.safetensors"
    write_statistics(path, add(Statistics.empty(SUBJECT), "math", "code"))
    return path


def test_safetensors_reads_what_was_written(file):
    arrays = load_file(file)
    assert set(arrays) == {"gram", "mean/math", "mean/code"}
    assert np.allclose(arrays["mean/code"][1], activations("code", 1).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    "other, complaint",
    [
        ({"base": "another"}, "base base (here: another)"),
        ({"n_layer": 3}, "layers 2 (here: 3)"),
        ({"n_embd": 32}, "hidden size 24 (here: 32)"),
        ({"mode": RouterMode.HIDDEN, "pool": Pool.LAST}, "mode ridge (here: hidden), pool None (here: last)"),
    ],
)
def test_statistics_of_something_else_are_refused(file, other, complaint):
    with pytest.raises(UserError) as error:
        read_statistics(file, replace(SUBJECT, **other))
    assert complaint in str(error.value)


def test_damaged_statistics_are_refused(file, tmp_path):
    whole = file.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for content in (b"", whole[:40], whole[:-8], b"GGUF" + whole):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="no intact safetensors file"):
            read_statistics(damaged, SUBJECT)
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(tmp_path / "absent.safetensors", SUBJECT)


@pytest.mark.parametrize(
    "key, value",
    [(key, value) for key in ("subject", "groups") for value in (None, "[]", "null", "{", '{"mean/math": {}}')]
    + [("subject", "{}"), ("groups", '{"mean/talk": {"count": "x"}}')],
)
def test_statistics_with_bad_strings_are_refused(file, tmp_path, key, value):
    about = {"format": "moegguf-router-statistics", "version": "1", **_strings(file)}
    if value is None:
        del about[key]
    else:
        about[key] = value
    save_file(load_file(file), tmp_path / "bad.safetensors", about)
    with pytest.raises(UserError, match="damaged statistics file"):
        read_statistics(tmp_path / "bad.safetensors", SUBJECT)


def test_other_safetensors_and_arrays_of_a_wrong_kind_are_refused(file, tmp_path):
    arrays, about = load_file(file), _strings(file)
    bad = tmp_path / "bad.safetensors"
    save_file(arrays, bad)
    with pytest.raises(UserError, match="no router statistics"):
        read_statistics(bad, SUBJECT)
    for name, array in (("gram", arrays["gram"][:, 1:].copy()), ("mean/math", arrays["mean/math"].astype(np.float32)),
                        ("mean/code", arrays["mean/code"] * np.nan)):  # fmt: skip
        save_file(arrays | {name: array}, bad, about)
        with pytest.raises(UserError, match="damaged statistics file"):
            read_statistics(bad, SUBJECT)


def _strings(file) -> dict[str, str]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
