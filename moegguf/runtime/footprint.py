"""What running a file takes besides its weights, as llama.cpp itself lays it out.

llama.cpp can load a model without its weights (`llama_model_params.no_alloc`) and plan the buffers of a context without
allocating them. It says their sizes in its log alone (llama_get_memory_breakdown is C++), so they are read from there.
The weights are never read, so a file of the right header and size, all of it a hole, is enough: a mix can be measured
before it is built.

Even so llama.cpp keeps a list of the cache's cells, which for a long context takes gigabytes and minutes. As cache and
compute buffers grow with the context in a straight line, those of more than a million tokens are reckoned from those of
two shorter contexts.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

import llama_cpp

from moegguf.errors import UserError
from moegguf.interrupt import kept_interrupt
from moegguf.runtime.devices import buffer_name, fill
from moegguf.runtime.log import llama_log
from moegguf.runtime.offload import CPU, Footprint, Placement

_COMPUTE_BUFFER = re.compile(r": +(\S+) compute buffer size = +([0-9.]+) MiB")
_CACHE = re.compile(r": size = +([0-9.]+) MiB \( *\d+ cells")
_MIB = 1 << 20
_WITHOUT_MMAP = 0  # LLAMA_LOAD_MODE_NONE of llama.h
LONG = 1 << 20
"""Tokens of the longest context that llama.cpp is asked for."""


def compute_bytes(header: bytes, n_bytes: int, n_ctx: int, folder: Path) -> int:
    """Bytes of all compute buffers that a context of `n_ctx` tokens needs on a CPU.

    `header` and `n_bytes` are those of a GGUF that need not exist; one without data takes its place in `folder` for the
    time of the call. Raises UserError when llama.cpp does not load it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "mix.gguf"
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(n_bytes)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        return sum(footprint(path, Placement(0), params).compute.values())


def footprint(path: Path, placement: Placement, context: llama_cpp.llama_context_params) -> Footprint:
    """What a context of these parameters would take on the devices of `placement`.

    Raises UserError when llama.cpp does not load the file, or has no room even to plan.
    """
    if context.n_ctx <= LONG:
        return _laid_out(path, placement, context)
    half, whole = (_laid_out(path, placement, _of_length(context, n_ctx)) for n_ctx in (LONG // 2, LONG))
    return whole.prolonged(half, (context.n_ctx - LONG) / (LONG - LONG // 2))


def _of_length(context: llama_cpp.llama_context_params, n_ctx: int) -> llama_cpp.llama_context_params:
    copy = type(context).from_buffer_copy(context)
    copy.n_ctx = n_ctx
    return copy


def _laid_out(path: Path, placement: Placement, context: llama_cpp.llama_context_params) -> Footprint:
    params = fill(llama_cpp.llama_model_default_params(), placement)
    params.no_alloc, params.load_mode = True, _WITHOUT_MMAP
    with llama_log().heard() as lines, kept_interrupt():
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        planned = llama_cpp.llama_init_from_model(model, context) if model else None
        if planned:
            llama_cpp.llama_free(planned)
        if model:
            llama_cpp.llama_model_free(model)
        if not planned:
            raise UserError(
                f"{path}: llama.cpp cannot run it: {llama_log().reason()}", "take a smaller --ctx, or a model it knows"
            )
    if not any(_COMPUTE_BUFFER.search(line) for line in lines):
        raise UserError("llama.cpp does not say what memory it needs", "update moegguf: its log has changed")
    names = {buffer_name(device): device for device in placement.devices}
    compute: Counter[str] = Counter()
    for buffer, size in _COMPUTE_BUFFER.findall("".join(lines)):
        compute[names.get(buffer, CPU)] += int(float(size) * _MIB)
    return Footprint(compute, int(sum(map(float, _CACHE.findall("".join(lines)))) * _MIB))
