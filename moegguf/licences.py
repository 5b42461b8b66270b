"""Well-known licences of models, and what they come to when several models go into one.

A mix is made of the weights of every model in it, so what each of their licences asks holds for the whole. The table
says of each licence what it asks beyond notices; where two ask for things that exclude each other, or one is missing or
unknown, that is said by name. It is a reading of the usual cases and no legal advice.

Licences go by the Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from fnmatch import fnmatchcase


class Asks(Flag):
    """What a licence asks beyond its notices."""

    NOTHING = 0
    TERMS = auto()
    """Its own terms go with every copy, and rule out some uses."""
    SHARE_ALIKE = auto()
    """The whole is under this licence, and nothing is added to it."""
    NON_COMMERCIAL = auto()
    NO_DERIVATIVES = auto()


LICENCES: dict[str, Asks] = {
    "cc0-1.0": Asks.NOTHING,
    "unlicense": Asks.NOTHING,
    "wtfpl": Asks.NOTHING,
    "mit": Asks.NOTHING,
    "isc": Asks.NOTHING,
    "bsd*": Asks.NOTHING,
    "cc-by-nc-nd-*": Asks.NON_COMMERCIAL | Asks.NO_DERIVATIVES,
    "cc-by-nc-sa-*": Asks.NON_COMMERCIAL | Asks.SHARE_ALIKE,
    "cc-by-nc-*": Asks.NON_COMMERCIAL,
    "cc-by-nd-*": Asks.NO_DERIVATIVES,
    "cc-by-sa-*": Asks.SHARE_ALIKE,
    "cc-by-*": Asks.NOTHING,
    "apache-2.0": Asks.NOTHING,
    "gpl*": Asks.SHARE_ALIKE,
    "lgpl*": Asks.SHARE_ALIKE,
    "agpl*": Asks.SHARE_ALIKE,
    "llama*": Asks.TERMS,
    "gemma": Asks.TERMS,
    "*openrail*": Asks.TERMS,
    "qwen*": Asks.TERMS,
    "tongyi-qianwen*": Asks.TERMS,
    "mrl": Asks.TERMS | Asks.NON_COMMERCIAL,
}
"""Identifier, or a pattern of them → what it asks. The first that matches counts; of those that ask for nothing, the
later one asks for more notices."""

UNKNOWN, OTHER = "unknown", "other"

_TEXTS = {
    "llama 2 community license": "llama2",
    "llama 3 community license": "llama3",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
    "gemma terms of use": "gemma",
    "apache license": "apache-2.0",
    "mit license": "mit",
}
"""What the text of a licence begins with, in lower case → its identifier."""
_BEGINNING = 400


@dataclass(frozen=True)
class Combined:
    """What the licences of several models come to: an identifier of the Hub, and what is wrong or to be heeded."""

    licence: str
    warnings: tuple[str, ...]


def recognise(text: str) -> str:
    """The identifier of the licence whose text begins like this; empty for one that is not well known."""
    beginning = " ".join(text[:_BEGINNING].lower().split())
    return next((licence for words, licence in _TEXTS.items() if words in beginning), "")


def asks(licence: str) -> Asks | None:
    """What a licence asks; None for one that is not in the table."""
    return next((found for pattern, found in LICENCES.items() if fnmatchcase(licence.lower(), pattern)), None)


def combine(licences: Mapping[str, str]) -> Combined:
    """What holds for a mix of models: name → identifier of its licence, empty where it names none."""
    warnings = (*_unclear(licences), *_restrictions(licences), *_conflicts(licences))
    return Combined(_strictest(licences), warnings)


def _strictest(licences: Mapping[str, str]) -> str:
    """The one that holds for the whole; `other` where no single one does, `unknown` where one is missing."""
    found = set(licences.values())
    if "" in found or not found:
        return UNKNOWN
    if len(found) == 1:
        return next(iter(found))
    strict = [licence for licence in found if asks(licence) is not Asks.NOTHING]
    if not strict:
        return max(found, key=_notices)
    if None in map(asks, strict):
        return OTHER
    covering = [one for one in strict if all(_covers(one, other) for other in strict)]
    return covering[0] if len(covering) == 1 else OTHER


def _covers(one: str, other: str) -> bool:
    """Whether a whole under licence `one` may hold what is under `other`, both of them in the table."""
    if one == other:
        return True
    return Asks.SHARE_ALIKE in asks(one) and Asks.SHARE_ALIKE not in asks(other) and not asks(other) & ~asks(one)


def _notices(licence: str) -> int:
    return next(i for i, pattern in enumerate(LICENCES) if fnmatchcase(licence.lower(), pattern))


def _unclear(licences: Mapping[str, str]) -> Iterator[str]:
    if missing := [name for name, licence in licences.items() if not licence]:
        yield f"no licence is named by {', '.join(missing)}: without one, nobody may pass it on; ask its authors"
    for licence in dict.fromkeys(licences.values()):
        if licence and asks(licence) is None:
            yield f"{_who(licences, licence)}: the licence {licence!r} is not one that moegguf knows; read it"


def _restrictions(licences: Mapping[str, str]) -> Iterator[str]:
    """Licences that change what may be done with the whole, where not all of it has them."""
    for licence in dict.fromkeys(licences.values()):
        asked = asks(licence) or Asks.NOTHING
        if Asks.NO_DERIVATIVES in asked:
            yield f"{_who(licences, licence)}: {licence} forbids derivatives, and a mix is one"
        elif Asks.NON_COMMERCIAL in asked and not all(map(_is_non_commercial, licences.values())):
            yield f"{_who(licences, licence)}: {licence} makes the whole mix non-commercial"


def _conflicts(licences: Mapping[str, str]) -> Iterator[str]:
    """Pairs of which one wants the whole under itself and the other adds something."""
    strict = [licence for licence in dict.fromkeys(licences.values()) if asks(licence)]
    for i, one in enumerate(strict):
        for other in strict[i + 1 :]:
            pair = f"{one} ({_who(licences, one)}) and {other} ({_who(licences, other)})"
            if _covers(one, other) or _covers(other, one):
                continue
            if Asks.SHARE_ALIKE in asks(one) | asks(other):
                yield f"{pair} are incompatible: one wants the whole under itself, the other adds restrictions"
            elif Asks.TERMS in asks(one) & asks(other):
                yield f"{pair}: the terms of both hold for the whole"


def _is_non_commercial(licence: str) -> bool:
    return Asks.NON_COMMERCIAL in (asks(licence) or Asks.NOTHING)


def _who(licences: Mapping[str, str], licence: str) -> str:
    return ", ".join(name for name, each in licences.items() if each == licence)
