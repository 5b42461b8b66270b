"""ggml's own quantisers, on numpy arrays.

Purpose: bytes that are identical to llama.cpp's, because llama.cpp's code makes them. `libggml-base`, shipped
inside the llama_cpp package, is called through ctypes, without importing llama_cpp and its runtime. Every C call
works on whole rows, needs no state of ours and releases the GIL, so threads may quantise different rows at once:
a result depends on its row and its importance only, never on how rows are grouped into calls.

Rows are 2-D: float32 (n, n_cols) on one side, uint8 (n, row_bytes) on the other.

Two things are done here in numpy, because ggml cannot: multiplying quantised rows by a factor without
requantising them (`scale_rows`), and looking for NaN or Inf block scales in silence (ggml's own check prints).
Both rest on `_F16_SCALES`, the places of the half-precision scales in a block (ggml-common.h).

Not done: checking that weights are finite before they are quantised, which the caller must do (most types turn
NaN into blocks that look valid, and IQ3_S and IQ3_XXS abort the process); types that gguf cannot name (Q2_0).
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from math import frexp
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from moegguf.errors import UserError
from moegguf.tensor import row_bytes

_LIBRARY_NAMES = (
    *("libggml-base.so.0", "libggml-base.so"),
    *("libggml-base.0.dylib", "libggml-base.dylib"),
    *("ggml-base.dll", "libggml-base.dll"),
)
"""The first that is there is loaded. A name with a version is what libllama itself links to: wheels hold copies
instead of links, and only under that name do both share one library and its tables."""

_F16_SCALES: dict[Type, slice] = {
    Type.F16: slice(0, 2),
    Type.Q1_0: slice(0, 2),
    Type.Q4_0: slice(0, 2),
    Type.Q4_1: slice(0, 4),
    Type.Q5_0: slice(0, 2),
    Type.Q5_1: slice(0, 4),
    Type.Q8_0: slice(0, 2),
    Type.Q2_K: slice(80, 84),
    Type.Q3_K: slice(108, 110),
    Type.Q4_K: slice(0, 4),
    Type.Q5_K: slice(0, 4),
    Type.Q6_K: slice(208, 210),
    Type.IQ1_S: slice(0, 2),
    Type.IQ2_XXS: slice(0, 2),
    Type.IQ2_XS: slice(0, 2),
    Type.IQ2_S: slice(0, 2),
    Type.IQ3_XXS: slice(0, 2),
    Type.IQ3_S: slice(0, 2),
    Type.IQ4_NL: slice(0, 2),
    Type.IQ4_XS: slice(0, 2),
    Type.TQ1_0: slice(52, 54),
    Type.TQ2_0: slice(64, 66),
}
"""Bytes of a block that hold its f16 scales: `d`, or `d` and `m` / `dmin` side by side."""

_IQ1_M_SCALES = slice(48, 56)
"""Four uint16; the top nibble of each is a quarter of the block's only f16 scale, lowest nibble first."""

_NIBBLES = np.array([0, 4, 8, 12], dtype=np.uint16)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h; `_traits` checks that the library agrees."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


def _library_path() -> Path:
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise UserError("the package llama_cpp is not installed", "install it with `pip install llama-cpp-python`")
    folder = Path(spec.origin).parent / "lib"
    present = [folder / name for name in _LIBRARY_NAMES if (folder / name).exists()]
    if not present:
        raise UserError(f"{folder} holds no libggml-base", "reinstall llama-cpp-python")
    return present[0]


@cache
def _library() -> ctypes.CDLL:
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"cannot load {path} ({error})", "reinstall llama-cpp-python") from None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, *arguments in (
        ("ggml_type_name", ctypes.c_char_p, ctypes.c_int),
        ("ggml_blck_size", integer, ctypes.c_int),
        ("ggml_type_size", size, ctypes.c_int),
        ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int),
        ("ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, integer, integer, integer, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _traits(type: Type) -> _TypeTraits:
    """The library's description of `type`. Raises UserError where its ABI is not the one declared here."""
    library = _library()
    traits = library.ggml_get_type_traits(type).contents
    found = traits.type_name, traits.blck_size, traits.type_size
    stated = library.ggml_type_name(type), library.ggml_blck_size(type), library.ggml_type_size(type)
    if found != stated:
        raise UserError(
            f"the installed ggml says {stated} of {type.name}, and {found} in its type table",
            "install the version of llama-cpp-python that moegguf asks for",
        )
    return traits


@cache
def supported_types() -> frozenset[Type]:
    """The types that the installed library both quantises to and reads back, in blocks as gguf knows them."""
    return frozenset(
        type
        for type in Type
        if type is Type.F32
        or (_traits(type).to_float and (_traits(type).blck_size, _traits(type).type_size) == GGML_QUANT_SIZES[type])
    )


def _require_supported(type: Type) -> None:
    if type not in supported_types():
        names = ", ".join(sorted(each.name for each in supported_types()))
        raise UserError(f"ggml neither quantises to {type.name} nor reads it back", f"choose one of {names}")


def requires_importance(type: Type) -> bool:
    """Whether ggml refuses to quantise to `type` without an importance per column."""
    return bool(_library().ggml_quantize_requires_imatrix(type))


def quantise(type: Type, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 (n, n_cols) → uint8 (n, row_bytes), by ggml_quantize_chunk (ggml.c).

    `importance` is float32 (n_cols,): how much the squared error of each column counts (an imatrix row).
    F32 returns a view. The first call for an i-quant builds its lookup table, once a process: 0.1 s for IQ3_XXS,
    8 s for IQ1_S and IQ1_M. Raises UserError when the library cannot quantise to `type`, when n_cols is not a
    multiple of its block size, and when it needs an importance and there is none.
    """
    _require_supported(type)
    n_rows, n_cols = rows.shape
    block = GGML_QUANT_SIZES[type][0]
    if n_cols % block:
        raise UserError(
            f"rows of {n_cols} weights cannot be {type.name}: not a multiple of its block size {block}",
            "choose a type with smaller blocks, such as Q8_0 (32) or F16 (1)",
        )
    if importance is None and requires_importance(type):
        raise UserError(f"{type.name} cannot be quantised without an imatrix", "give one, or choose IQ2_S or Q2_K")
    if importance is not None and importance.shape != (n_cols,):
        raise ValueError(f"importance of shape {importance.shape} for rows of {n_cols} weights")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if type is Type.F32:
        return rows.view(np.uint8)
    out = np.empty((n_rows, row_bytes(type, n_cols)), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    weights_at = None if weights is None else weights.ctypes.data
    _library().ggml_quantize_chunk(type, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, weights_at)
    return out


def dequantise(type: Type, rows: np.ndarray, n_cols: int) -> np.ndarray:
    """uint8 (n, row_bytes) → float32 (n, n_cols), as llama.cpp reads them. F32 returns a view.

    Raises UserError when the library cannot read `type` back.
    """
    _require_supported(type)
    if rows.shape[1] != row_bytes(type, n_cols):
        raise ValueError(f"{rows.shape[1]} bytes a row for {n_cols} weights of {type.name}")
    rows = np.ascontiguousarray(rows)
    if type is Type.F32:
        return rows.view(np.float32)
    out = np.empty((len(rows), n_cols), dtype=np.float32)
    _traits(type).to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def is_valid(type: Type, rows: np.ndarray) -> bool:
    """Whether no weight or block scale in uint8 (n, row_bytes) is NaN or Inf (as ggml_validate_row_data judges)."""
    rows = np.ascontiguousarray(rows)
    if type is Type.F32:
        return bool(np.isfinite(rows.view(np.float32)).all())
    if type is Type.BF16:
        return bool(((rows.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if type is Type.MXFP4:
        return bool((_blocks(type, rows)[:, 0] != 0xFF).all())
    if type is Type.IQ1_M:
        return bool(np.isfinite(_iq1_m_scales(_blocks(type, rows))).all())
    if type in _F16_SCALES:
        scales = _blocks(type, rows)[:, _F16_SCALES[type]].view(np.uint16)
        return bool(((scales & 0x7C00) != 0x7C00).all())
    return True


def scale_rows(type: Type, rows: np.ndarray, factor: float) -> np.ndarray | None:
    """uint8 (n, row_bytes) times `factor`, without requantising; None where `type` cannot express it.

    Quantised blocks have their scales multiplied: MXFP4 by powers of two only; NVFP4 not at all; f16 scales by
    any factor that does not carry one past 65504. A product is exact for powers of two and rounds at 2^-11
    otherwise, as long as it is a normal f16 number (≥ 2^-14); below that it is off by up to 2^-25, whatever the
    factor. Q6_K, Q5_K and IQ4_XS scales are that small in ordinary models: for weights of standard deviation 0.02
    and a factor of 1/8, the rms error added is 0.7 % of the weights in Q6_K (whose own is 2.1 %), 0.5 % in Q5_K
    (4.1 %), 0.7 % in IQ4_XS (8.8 %), 0.3 % in Q4_K (8.3 %), and below 0.1 % in Q8_0, Q4_0, Q3_K, Q2_K, IQ3_S and
    IQ2_XXS. Dequantising and requantising instead adds as much or more, except in Q6_K and Q5_K for weights as
    small as 0.005 and factors ≤ 1/4.
    """
    rows = np.ascontiguousarray(rows)
    if type in (Type.F32, Type.BF16):
        n_cols = rows.shape[1] // GGML_QUANT_SIZES[type][1]
        with np.errstate(over="ignore"):  # an Inf is for the caller to find, with `is_valid`
            return quantise(type, dequantise(type, rows, n_cols) * np.float32(factor))
    out = rows.copy()
    blocks = _blocks(type, out)
    if type in _F16_SCALES:
        scales = blocks[:, _F16_SCALES[type]].view("<f2")
        return out if _multiply(scales, factor) else None
    if type is Type.IQ1_M:
        scales = _iq1_m_scales(blocks)
        if not _multiply(scales, factor):
            return None
        _store_iq1_m_scales(blocks, scales)
        return out
    if type is Type.MXFP4:
        return out if _multiply_e8m0(blocks[:, 0], factor) else None
    return None


def _blocks(type: Type, rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, GGML_QUANT_SIZES[type][1])


def _multiply(scales: np.ndarray, factor: float) -> bool:
    """Multiplies float16 `scales` in place; False when one of them overflows."""
    with np.errstate(over="ignore"):
        scales[...] = scales.astype(np.float32) * np.float32(factor)
    return not np.isinf(scales).any()


def _multiply_e8m0(exponents: np.ndarray, factor: float) -> bool:
    """Multiplies powers of two, stored as biased exponents, in place; False when a product is not one."""
    mantissa, exponent = frexp(factor)
    shifted = exponents.astype(np.int32) + exponent - 1
    if mantissa != 0.5 or (shifted > 254).any():
        return False
    exponents[...] = np.maximum(shifted, 0)
    return True


def _iq1_m_scales(blocks: np.ndarray) -> np.ndarray:
    words = blocks[:, _IQ1_M_SCALES].view("<u2")
    return np.bitwise_or.reduce((words >> 12) << _NIBBLES, axis=1, dtype=np.uint16).view("<f2")


def _store_iq1_m_scales(blocks: np.ndarray, scales: np.ndarray) -> None:
    words = blocks[:, _IQ1_M_SCALES].view("<u2")
    words[...] = (words & 0x0FFF) | ((scales.view("<u2")[:, None] >> _NIBBLES) << 12)
