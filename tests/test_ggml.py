"""The references here are independent of us: gguf's quantisers in numpy, and ggml's own validity check."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

from moegguf.errors import UserError
from moegguf.quant import ggml

TYPES = sorted(ggml.supported_types())
QUANTISED = [type for type in TYPES if type not in (Type.F32, Type.F16, Type.BF16)]
SCALED_BY_F16 = [type for type in QUANTISED if type not in (Type.MXFP4, Type.NVFP4)]
N_COLS = 512

QUANTISED_BY_GGUF = [
    *(Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0),
    *(Type.TQ1_0, Type.TQ2_0, Type.MXFP4),
]


def weights(n_rows: int = 6, n_cols: int = N_COLS, std: float = 1.0) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n_rows, n_cols), dtype=np.float32) * np.float32(std)


def importance(n_cols: int = N_COLS) -> np.ndarray:
    return np.random.default_rng(8).random(n_cols, dtype=np.float32) + np.float32(0.1)


def quantised(type: Type, **how) -> np.ndarray:
    return ggml.quantise(type, weights(**how), importance())


def is_valid_to_ggml(type: Type, rows: np.ndarray) -> bool:
    validate = ggml._library().ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return validate(type, rows.ctypes.data, rows.nbytes)


@pytest.mark.parametrize("type", QUANTISED_BY_GGUF, ids=lambda type: type.name)
def test_quantising_equals_ggufs_numpy_quantisers(type: Type):
    assert np.array_equal(ggml.quantise(type, weights()), quants.quantize(weights(), type).view(np.uint8))


@pytest.mark.parametrize("type", [type for type in TYPES if type is not Type.Q1_0], ids=lambda type: type.name)
def test_dequantising_equals_ggufs_numpy_dequantisers(type: Type):
    rows = quantised(type)
    stored = rows.view({Type.F32: np.float32, Type.F16: np.float16}.get(type, np.uint8))
    assert np.array_equal(ggml.dequantise(type, rows, N_COLS), quants.dequantize(stored, type))


def test_q1_0_keeps_signs_and_the_mean_magnitude_of_each_block():
    blocks = weights().reshape(-1, 128)
    expected = np.sign(blocks) * np.abs(blocks).mean(axis=1, keepdims=True)
    assert np.allclose(ggml.dequantise(Type.Q1_0, quantised(Type.Q1_0), N_COLS).reshape(-1, 128), expected, rtol=1e-3)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_rows_quantised_apart_in_threads_equal_rows_quantised_together(type: Type):
    rows = weights(n_rows=24)
    with ThreadPoolExecutor(4) as pool:
        apart = list(pool.map(lambda row: ggml.quantise(type, row[None], importance()), rows))
    assert np.array_equal(np.concatenate(apart), ggml.quantise(type, rows, importance()))


@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q6_K, Type.IQ3_S], ids=lambda type: type.name)
def test_importance_moves_the_error_to_the_columns_that_count_less(type: Type):
    counts = np.where(np.arange(N_COLS) % 2, 100, 0.01).astype(np.float32)

    def error(importance: np.ndarray | None) -> float:
        rows = ggml.dequantise(type, ggml.quantise(type, weights(), importance), N_COLS)
        return float(np.square((rows - weights())[:, 1::2]).sum())

    assert error(counts) < error(None)


def test_strided_and_transposed_rows_are_quantised_by_value():
    rows = weights(n_rows=256, n_cols=512)
    assert np.array_equal(ggml.quantise(Type.Q8_0, rows.T), ggml.quantise(Type.Q8_0, rows.T.copy()))
    assert np.array_equal(ggml.quantise(Type.Q8_0, rows[::2, 256:]), ggml.quantise(Type.Q8_0, rows[::2, 256:].copy()))


@pytest.mark.parametrize("type", [Type.F16, Type.Q8_0, Type.Q4_K, Type.IQ3_S], ids=lambda type: type.name)
def test_no_rows_give_no_bytes(type: Type):
    none = ggml.quantise(type, np.empty((0, N_COLS), np.float32), importance())
    assert none.shape[0] == 0 and ggml.dequantise(type, none, N_COLS).shape == (0, N_COLS)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_rows_are_valid_where_ggml_says_so(type: Type, capfd):
    """On random bytes, which hold NaN and Inf scales among good ones. `capfd` swallows what ggml prints."""
    blocks = np.random.default_rng(9).integers(0, 256, (3000, 1, GGML_QUANT_SIZES[type][1]), dtype=np.uint8)
    ours = [ggml.is_valid(type, block) for block in blocks]
    assert ours == [is_valid_to_ggml(type, block) for block in blocks]
    assert set(ours) == ({True} if type is Type.NVFP4 else {True, False})
    assert ggml.is_valid(type, blocks[:, 0]) == all(ours)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_quantised_rows_are_valid(type: Type):
    assert ggml.is_valid(type, quantised(type))


@pytest.mark.parametrize("type", SCALED_BY_F16, ids=lambda type: type.name)
@pytest.mark.parametrize("factor", [0.5, 0.25, 2.0, -1.0])
def test_scaling_rows_by_a_power_of_two_is_exact(type: Type, factor: float):
    rows = quantised(type, std=256)  # so that no scale becomes a subnormal f16 number
    scaled = ggml.dequantise(type, ggml.scale_rows(type, rows, factor), N_COLS)
    assert np.array_equal(scaled, ggml.dequantise(type, rows, N_COLS) * np.float32(factor))


@pytest.mark.parametrize("type", SCALED_BY_F16, ids=lambda type: type.name)
@pytest.mark.parametrize("factor", [1 / 3, 0.7, 3.0])
def test_scaling_rows_by_any_factor_rounds_each_scale_once(type: Type, factor: float):
    """A weight is d·q, or d·q - m·r with neither term more than twice the largest weight; d and m round at 2^-11."""
    rows = quantised(type, std=256)
    exact = ggml.dequantise(type, rows, N_COLS) * np.float32(factor)
    error = np.abs(ggml.dequantise(type, ggml.scale_rows(type, rows, factor), N_COLS) - exact)
    has_minimum = type in (Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K)
    terms = 4 * np.abs(exact).max() if has_minimum else np.abs(exact)
    assert (error <= terms * 2.0**-11 * 1.001).all() and error.any()


@pytest.mark.parametrize(
    ("type", "largest_multiple"),
    [(Type.Q8_0, 128), (Type.Q6_K, 128 * 32), (Type.IQ4_XS, 32 * 127), (Type.Q4_K, 63 * 15 + 63)],
    ids=lambda value: getattr(value, "name", None),
)
def test_scales_below_the_normal_f16_numbers_are_off_by_half_a_subnormal_step_at_most(type, largest_multiple):
    """A weight is an integer multiple of its block's scales: their error times that integer is its own."""
    rows = quantised(type, std=0.02)
    exact = ggml.dequantise(type, rows, N_COLS) / 64
    error = np.abs(ggml.dequantise(type, ggml.scale_rows(type, rows, 1 / 64), N_COLS) - exact)
    assert (error <= largest_multiple * 2.0**-25).all() and error.any()


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16], ids=lambda type: type.name)
def test_scaling_floats_rounds_each_product_once(type: Type):
    rows = quantised(type)
    product = ggml.dequantise(type, rows, N_COLS) * np.float32(1 / 3)
    assert np.array_equal(ggml.scale_rows(type, rows, 1 / 3), ggml.quantise(type, product))


def test_mxfp4_is_scaled_by_powers_of_two_alone():
    rows = quantised(Type.MXFP4)
    for factor in (0.25, 2.0**-9, 8.0):
        scaled = ggml.dequantise(Type.MXFP4, ggml.scale_rows(Type.MXFP4, rows, factor), N_COLS)
        assert np.array_equal(scaled, ggml.dequantise(Type.MXFP4, rows, N_COLS) * np.float32(factor))
    assert all(ggml.scale_rows(Type.MXFP4, rows, factor) is None for factor in (1 / 3, 3.0, -2.0, 0.0, 2.0**254))


def test_scaling_leaves_zeros_zero_and_its_input_as_it_was():
    zeros = np.zeros((2, N_COLS), np.float32)
    for type in TYPES:
        if type is not Type.NVFP4:
            rows = ggml.quantise(type, zeros, importance())
            before = rows.copy()
            assert not ggml.dequantise(type, ggml.scale_rows(type, rows, 0.5), N_COLS).any()
            assert np.array_equal(rows, before)


def test_rows_that_cannot_be_scaled_are_none():
    assert ggml.scale_rows(Type.NVFP4, quantised(Type.NVFP4), 0.5) is None
    for type in (Type.Q8_0, Type.Q4_K, Type.IQ1_M):
        assert ggml.scale_rows(type, quantised(type, std=256), 1e7) is None


@pytest.mark.parametrize(
    ("type", "n_cols", "says"),
    [
        (Type.Q4_K, 300, "rows of 300 weights cannot be Q4_K.*256.*Q8_0"),
        (Type.IQ2_XXS, 256, "IQ2_XXS cannot be quantised without an imatrix"),
        (Type.Q8_1, 256, "Q8_1.*choose one of BF16"),
        (Type.F64, 256, "F64.*choose one of BF16"),
    ],
)
def test_what_cannot_be_quantised_is_an_error_with_its_reason(type: Type, n_cols: int, says: str):
    with pytest.raises(UserError, match=says):
        ggml.quantise(type, weights(n_cols=n_cols))


def test_a_type_that_cannot_be_read_back_is_an_error():
    with pytest.raises(UserError, match="Q8_K"):
        ggml.dequantise(Type.Q8_K, np.zeros((1, 292), np.uint8), 256)


def test_every_type_of_llama_cpps_presets_is_supported():
    assert {type.name for type in TYPES} >= {
        *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
        *("TQ1_0", "TQ2_0", "MXFP4"),
    }
