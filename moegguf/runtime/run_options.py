"""How to run a file: what a user may choose, and what it comes to for a file and a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError
from moegguf.gguf_header import Header
from moegguf.kinds import check_fields
from moegguf.runtime.machine import physical_cores
from moegguf.runtime.offload import WHAT_FITS, FlashAttention, Offload

DEFAULT_CTX = 4096
MIN_CTX = 16
SMALL_FILE = 32 << 20


@dataclass(frozen=True)
class RunOptions:
    """How to run a file. None leaves the choice to the file and the machine."""

    ctx: int | None = None
    """Context in tokens; default: the model's own, at most 4096."""
    threads: int | None = None
    """CPU threads; default: the physical cores this process may use, but one for models of a few MB."""
    offload: Offload = WHAT_FITS
    """What goes on which device; default: on GPUs what fits."""
    batch: int = 512
    """Prompt tokens evaluated at once."""
    experts_used: int | None = None
    """Experts per token, in place of the file's own number."""
    adapter: Path | None = None
    """A LoRA GGUF of this model to run with, at full strength."""
    kv_type: GGMLQuantizationType = GGMLQuantizationType.F16
    """Type of the key-value cache. F16 moves logits by about 1e-3; to compare two computations, take F32."""
    flash_attention: FlashAttention = FlashAttention.AUTO
    mmap: bool = True
    mlock: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for what no file and no machine can run with."""
        check_fields(self)
        check_range("--ctx", self.ctx, MIN_CTX)
        check_threads(self.threads)
        check_range("--batch", self.batch, 1)
        check_range("--experts-used", self.experts_used, 1)


DEFAULT_OPTIONS = RunOptions()


def threads_for(header: Header) -> int:
    """All cores; one for a model that is over in a moment, where threads spend their time waiting for each other."""
    return 1 if header.file_size < SMALL_FILE else physical_cores()


def key_of(header: Header, name: str) -> str:
    return f"{header.get('general.architecture', '')}.{name}"


def hparam(header: Header, name: str, default: int) -> int:
    value = header.get(key_of(header, name), default)
    if not isinstance(value, int):
        raise UserError(f"{header.path}: {key_of(header, name)} is {value!r}, expected a whole number")
    return value


def ctx_of(header: Header, options: RunOptions) -> int:
    return options.ctx or min(hparam(header, "context_length", DEFAULT_CTX), DEFAULT_CTX)
