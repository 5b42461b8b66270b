"""moegguf: mix fine-tunes of one model into a Mixture of Experts, as one GGUF file. In Python, see `moegguf.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moegguf.api import Chat, build, check, inspect, open
    from moegguf.errors import UserError

__version__ = "0.1.0"
__all__ = ["Chat", "UserError", "build", "check", "inspect", "open"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    """What `__all__` names is imported when it is asked for: `import moegguf` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'moegguf' has no attribute {name!r}")
    from moegguf import api

    return getattr(api, name)
