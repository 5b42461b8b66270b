"""How fast memory can be read, measured: what limits the generation of tokens, which reads most of a model for each.

Main memory: the sum of a large array on so many threads, which only reads, as a product with weights does. A device:
a copy within it by ggml, which reads and writes once each. The best of a few runs counts, as others only disturb.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from gguf import GGMLQuantizationType

from moegguf.runtime.devices import InitParams, buffer_type, function

_BYTES = 128 << 20
_RUNS = 5
_BOOKKEEPING = 1 << 16  # of two tensors


@functools.cache
def memory_bandwidth(threads: int) -> float:
    """Bytes of main memory that `threads` read in a second, measured once in a process. Takes about 0.1 s."""
    arrays = [np.ones(_BYTES // 8 // threads, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(array.nbytes for array in arrays) / _shortest(lambda: list(pool.map(np.sum, arrays)))


def device_bandwidth(device: str) -> float | None:
    """Bytes that are read or written in a second within the memory of a device; None where it has no room to try."""
    with _two_tensors(device) as tensors:
        return 2 * _BYTES / _shortest(lambda: function("ggml_backend_tensor_copy")(*tensors)) if tensors else None


@contextmanager
def _two_tensors(device: str) -> Iterator[tuple[int, int] | None]:
    """Two tensors of `_BYTES` in the memory of `device`; None where there is no room."""
    context = function("ggml_init")(InitParams(_BOOKKEEPING, None, True))
    tensors = tuple(function("ggml_new_tensor_1d")(context, int(GGMLQuantizationType.I8), _BYTES) for _ in range(2))
    buffer = function("ggml_backend_alloc_ctx_tensors_from_buft")(context, buffer_type(device))
    try:
        yield tensors if buffer else None
    finally:
        function("ggml_backend_buffer_free")(buffer)
        function("ggml_free")(context)


def _shortest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
