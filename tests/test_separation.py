"""How well a router separates: shares, loads, and the warnings for routers that do not."""

from __future__ import annotations

import numpy as np
import pytest

from moegguf.routers.separation import Separation, count_choices, warnings

EXPERTS = ("math", "code", "talk")
SOUND = {0: np.eye(3, 8, dtype=np.float32), 1: np.eye(3, 8, 2, dtype=np.float32)}


def separation(*layers, domains=EXPERTS) -> Separation:
    return Separation(EXPERTS, domains, np.array(layers))


def test_choices_are_counted_by_the_largest_logit():
    x = np.array([[3, 1, 0, 0], [0, 1, 2, 0], [0, 1, 5, 9], [-1, -2, -3, 0]], np.float32)
    matrices = {0: np.eye(3, 4, dtype=np.float32), 1: np.eye(3, 4, 1, dtype=np.float32)}
    assert count_choices(matrices, {0: x, 1: x}).tolist() == [[2, 0, 2], [1, 1, 2]]


def test_every_domain_weighs_the_same_however_long_its_text():
    found = separation([[8, 2, 0], [0, 100, 0], [500, 250, 250]])
    assert found.top1 == pytest.approx([(0.8 + 1.0 + 0.25) / 3])
    assert found.load[0] == pytest.approx([(0.8 + 0 + 0.5) / 3, (0.2 + 1 + 0.25) / 3, 0.25 / 3])
    assert found.load.sum() == pytest.approx(1)


def test_domains_without_held_out_text_are_left_out_of_top1():
    found = separation([[1, 3, 0], [0, 1, 3]], domains=("code", "talk"))
    assert found.top1 == pytest.approx([0.75])
    assert not found.covers_all


def test_a_sound_router_gets_no_warning():
    assert list(warnings(EXPERTS, SOUND, separation([[9, 1, 0], [1, 9, 0], [1, 1, 8]], [[9, 1, 0]] * 3))) == []
    assert list(warnings(EXPERTS, SOUND, None)) == []


def test_an_expert_that_is_hardly_ever_first_is_named():
    (warning,) = warnings(EXPERTS, SOUND, separation([[99, 1, 0], [2, 98, 0], [60, 39, 1]]))
    assert warning.startswith("expert talk is hardly ever the first choice (0.3%")


def test_a_router_that_chooses_by_chance_is_told():
    (warning,) = warnings(EXPERTS, SOUND, separation([[36, 32, 32], [32, 36, 32], [32, 32, 36]]))
    assert "right for 36% of held-out tokens, 33% would be by chance" in warning


def test_equal_rows_are_named_with_their_layers():
    alike = np.eye(3, 8, dtype=np.float32)
    alike[2] = 2 * alike[0] + 0.01
    (warning,) = warnings(EXPERTS, {0: SOUND[0], 1: alike, 2: alike}, None)
    assert warning.startswith("the rows of math and talk are nearly equal in layers 1, 2:")


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_rows_of_zero_are_named_with_their_layers(scale):
    rows = scale * np.eye(3, 8, dtype=np.float32)
    rows[1] = 0
    found = list(warnings(EXPERTS, {0: SOUND[0], 5: rows}, None))
    assert found[0 if scale else 1].startswith("the row of expert code is nearly zero in layer 5:")
    assert len(found) == (1 if scale else 3)
