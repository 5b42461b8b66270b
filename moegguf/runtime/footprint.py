"""What running a file takes besides its weights, as llama.cpp itself lays it out.

llama.cpp can load a model without its weights (`llama_model_params.no_alloc`) and plan the buffers of a context without
allocating them. It says their sizes in its log alone (llama_get_memory_breakdown is C++), so they are read from there.
The weights are never read, so a file of the right header and size, all of it a hole, is enough: a mix can be measured
before it is built.

The key-value cache is not in that log, because none is made; its size follows from shapes (`moegguf.estimate`).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import llama_cpp

from moegguf.errors import UserError
from moegguf.runtime.log import llama_log

_COMPUTE_BUFFER = re.compile(r"compute buffer size = +([0-9.]+) MiB")
_MIB = 1 << 20
_WITHOUT_MMAP = 0  # LLAMA_LOAD_MODE_NONE of llama.h


def compute_bytes(header: bytes, n_bytes: int, n_ctx: int, folder: Path) -> int:
    """Bytes of all compute buffers that a context of `n_ctx` tokens needs on a CPU.

    `header` and `n_bytes` are those of a GGUF that need not exist; one without data takes its place in `folder` for the
    time of the call. Raises UserError when llama.cpp does not load it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary, llama_log().heard() as lines:
        path = Path(temporary) / "mix.gguf"
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(n_bytes)
        _plan_context(path, n_ctx)
    found = [float(size) for line in lines for size in _COMPUTE_BUFFER.findall(line)]
    if not found:
        raise UserError("llama.cpp does not say what memory it needs", "give a --budget for the file instead of --fit")
    return int(sum(found) * _MIB)


def _plan_context(path: Path, n_ctx: int) -> None:
    model_params, context_params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.no_alloc, model_params.n_gpu_layers = True, 0
    model_params.load_mode = _WITHOUT_MMAP
    context_params.n_ctx = n_ctx
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    context = llama_cpp.llama_init_from_model(model, context_params) if model else None
    if not context:
        raise UserError(f"llama.cpp cannot run the mix: {llama_log().reason()}", "take a smaller --ctx")
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
