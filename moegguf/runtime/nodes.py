"""Nodes of a running llama.cpp graph: their names, their values, and what the products of weights multiply.

A callback is handed the address of a `struct ggml_tensor`. The library answers most questions about it, but not how it
lies in memory nor what it was computed from; so the struct is declared here, as ggml/include/ggml.h has it. Its name
is an array near its end, so where the library says that it is tells whether the declaration fits: `_ggml` asks.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from math import prod
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from llama_cpp._ctypes_extensions import load_shared_library

_DTYPES = {
    int(GGMLQuantizationType.F32): np.float32,
    int(GGMLQuantizationType.F16): np.float16,
    int(GGMLQuantizationType.I32): np.int32,
}
_PRODUCT, _PRODUCT_OF_EXPERTS = b"MUL_MAT", b"MUL_MAT_ID"


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor`, up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


@dataclass(frozen=True)
class Product:
    """A product of a weight and activations. `input` and `experts` are nodes; `experts` says which of the
    `n_matrices` stacked experts each row goes through, and is None where the weight is no stack."""

    weight: str
    n_matrices: int
    input: int
    experts: int | None


def name_of(tensor: int) -> bytes:
    """What a node is called in the graph."""
    return _ggml().ggml_get_name(tensor)


def values_of(tensor: int) -> np.ndarray:
    """A copy of a node on any device, in numpy's order of dimensions; a view's gaps are left out."""
    head = _Tensor.from_address(tensor)
    shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
    if head.type not in _DTYPES or prod(shape) != _ggml().ggml_nelements(tensor):
        raise RuntimeError(f"cannot read a tensor of type {head.type} and shape {shape}")
    stored = np.empty(_ggml().ggml_nbytes(tensor), np.uint8)
    _ggml().ggml_backend_tensor_get(tensor, stored.ctypes.data, 0, stored.nbytes)
    values = np.ndarray(shape, _DTYPES[head.type], stored, strides=strides)
    return np.array(values, dtype=np.int32 if values.dtype == np.int32 else np.float32, order="C")


def product_of(tensor: int) -> Product | None:
    """The product that a node computes, None for any other node."""
    operation = _ggml().ggml_op_desc(tensor)
    if operation not in (_PRODUCT, _PRODUCT_OF_EXPERTS):
        return None
    weight, activations, experts = _Tensor.from_address(tensor).src[:3]
    n_matrices = _Tensor.from_address(weight).ne[2]
    return Product(
        _name_of_weight(weight), n_matrices, activations, experts if operation == _PRODUCT_OF_EXPERTS else None
    )


def _name_of_weight(tensor: int) -> str:
    """Its name in the file. A copy on another device is called DEVICE#NAME#NUMBER (ggml/src/ggml-backend.cpp)."""
    parts = name_of(tensor).decode(errors="replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]


@functools.cache
def _ggml() -> ctypes.CDLL:
    library = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("ggml_get_name", ctypes.c_char_p, pointer),
        ("ggml_op_desc", ctypes.c_char_p, pointer),
        ("ggml_nbytes", size, pointer),
        ("ggml_nelements", ctypes.c_int64, pointer),
        ("ggml_backend_tensor_get", None, pointer, pointer, size, size),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _check_layout(library)
    return library


def _check_layout(library: ctypes.CDLL) -> None:
    """Whether the library's tensors are declared as `_Tensor` has them."""
    address_of_name = library["ggml_get_name"]  # a function object of its own
    address_of_name.restype, address_of_name.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blank = ctypes.create_string_buffer(2 * ctypes.sizeof(_Tensor))
    start = ctypes.addressof(blank)
    if address_of_name(start) != start + _Tensor.name.offset:
        raise RuntimeError("this llama.cpp lays its tensors out in another way")
