"""How the next token is chosen: the settings, their limits, and where a file may suggest its own.

Each setting is declared once, as a field of `Sampling`; the flags of `chat`, its `/set` command, the checks
and the keys that a GGUF may carry (`general.sampling.*` of llama.cpp, src/llama-arch.cpp) all derive from it.
Imports nothing heavy, because `--help` needs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moegguf.errors import UserError

MAX_SEED = 2**32 - 2  # 2**32 - 1 asks llama.cpp for a random one


def _setting(default, parse: Callable[[str], Any], low: float, high: float, help: str, file_key: str = "") -> Any:
    return field(default=default, metadata={"setting": Setting("", parse, low, high, help, file_key)})


@dataclass(frozen=True)
class Setting:
    """What is known of one setting besides its value. `low` and `high` are both allowed."""

    name: str
    parse: Callable[[str], Any]
    low: float
    high: float
    help: str
    file_key: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """`value` as this setting's type. Raises UserError when it is none, or out of range."""
        try:
            number = self.parse(value)
            number = math.nan if isinstance(value, float) and number != value else number  # half a token
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not self.low <= number <= self.high:
            kind = "a whole number" if self.parse is int else "a number"
            limits = f"from {self.low:g} to {self.high:g}" if math.isfinite(self.high) else f"of at least {self.low:g}"
            raise UserError(f"{self.name} is {value!r}, expected {kind} {limits}")
        return number


@dataclass(frozen=True)
class Sampling:
    """One way to choose tokens. None means: a fresh random seed per answer; as many tokens as fit."""

    temp: float = _setting(
        0.7, float, 0, 100, "randomness: 0 always takes the likeliest token, 1 samples as trained", "temp"
    )
    top_p: float = _setting(
        0.95, float, 0, 1, "sample among the likeliest tokens that hold this share of probability; 1 is off", "top_p"
    )
    top_k: int = _setting(40, int, 0, 2**31 - 1, "sample among this many likeliest tokens; 0 is off", "top_k")
    min_p: float = _setting(
        0.05, float, 0, 1, "drop tokens less likely than this share of the likeliest one; 0 is off", "min_p"
    )
    repeat_penalty: float = _setting(
        1.0, float, 0.01, 100, "divide the odds of the last 64 tokens by this; 1 is off", "penalty_repeat"
    )
    seed: int | None = _setting(None, int, 0, MAX_SEED, "same seed, same settings, same words: same answer")
    max_tokens: int | None = _setting(None, int, 1, 2**31 - 1, "longest answer in tokens (default: what fits)")

    def with_text(self, name: str, text: str) -> Sampling:
        """A copy with the setting `name` read from `text`. Raises UserError for a bad name or value."""
        if name not in SETTINGS:
            raise UserError(f"there is no setting {name!r}", f"the settings are {', '.join(SETTINGS)}")
        return self.merged({name: text})

    def merged(self, given: Mapping[str, Any]) -> Sampling:
        """A copy in which every setting of `given` that is not None, checked, replaces ours."""
        checked = {
            name: setting.check(given[name]) for name, setting in SETTINGS.items() if given.get(name) is not None
        }
        return dataclasses.replace(self, **checked)


SETTINGS: dict[str, Setting] = {
    f.name: dataclasses.replace(f.metadata["setting"], name=f.name) for f in dataclasses.fields(Sampling)
}


DEFAULTS = Sampling()


def suggested_by_file(get: Callable[[str], Any]) -> Sampling:
    """The defaults, with what the file's `general.sampling.*` keys say; `get(key)` gives None for a key it lacks."""
    found = {name: get(f"general.sampling.{s.file_key}") for name, s in SETTINGS.items() if s.file_key}
    try:
        return DEFAULTS.merged(found)
    except UserError as error:
        raise UserError(f"the file's general.sampling.* keys: {error.message}", "convert it again") from error
