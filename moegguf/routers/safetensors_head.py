"""The head of a safetensors file, always in the same order.

The library keeps the strings of a file in an order of their own at each run; then the same router would be another
file every time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

_DTYPES = {np.dtype("<f4"): "F32", np.dtype("<f8"): "F64"}


def safetensors_head(about: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> bytes:
    """What precedes the data of `arrays`, one after the other (safetensors, README: Format)."""
    entries: dict[str, object] = {"__metadata__": dict(about)}
    at = 0
    for name, array in arrays.items():
        entries[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
