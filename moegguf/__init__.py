"""moegguf: mix fine-tunes of one model into a Mixture of Experts, as one GGUF file. In Python, see `moegguf.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moegguf.api import export, route
    from moegguf.api.building import build, check, inspect, recipes
    from moegguf.api.calibrating import calibrate
    from moegguf.api.chatting import Chat, open
    from moegguf.api.editing import add, drop, merge, prune, set, split, swap
    from moegguf.api.measuring import eval, measure, train
    from moegguf.api.running import Offload, Override, RunOptions, bench, doctor, plan, serve, worker
    from moegguf.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Chat", "Offload", "Override", "RunOptions", "UserError", "add", "bench", "build", "calibrate", "check", "doctor",
    "drop", "eval", "export", "inspect", "measure", "merge", "open", "plan", "prune", "recipes", "route", "serve",
    "set", "split", "swap", "train", "worker",
]  # fmt: skip
_MODULES = {
    "api": ("export", "route"),
    "api.building": ("build", "check", "inspect", "recipes"),
    "api.calibrating": ("calibrate",),
    "api.chatting": ("Chat", "open"),
    "api.editing": ("add", "drop", "merge", "prune", "set", "split", "swap"),
    "api.measuring": ("eval", "measure", "train"),
    "api.running": ("Offload", "Override", "RunOptions", "bench", "doctor", "plan", "serve", "worker"),
    "errors": ("UserError",),
}
"""Where `__all__` is from. A name that its module lacks is that of a module in it."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # who is told that any name may be there finds no misspelt one

    def __getattr__(name: str) -> object:
        """What `__all__` names is imported when it is asked for: `import moegguf` costs nothing."""
        if name not in _HOMES:
            raise AttributeError(f"module 'moegguf' has no attribute {name!r}")
        import importlib

        home = f"moegguf.{_HOMES[name]}"
        return getattr(importlib.import_module(home), name, None) or importlib.import_module(f"{home}.{name}")
