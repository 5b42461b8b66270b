"""The packages that only serving needs. Imports none of them."""

from __future__ import annotations

import importlib.util

from moegguf.errors import UserError

EXTRA = ("xllamacpp", "h11")
"""What the extra `serve` brings."""


def check_installed() -> None:
    """Raises UserError when the extra `serve` is not there."""
    for package in EXTRA:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs the package {package}, which is not here", "pip install 'moegguf[serve]'")
