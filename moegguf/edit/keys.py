"""What a finished mix says of itself, its chat template, and how many experts run. No weights change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gguf import GGUFValue, GGUFValueType

from moegguf.edit.change import Change, stored_tensors, with_card
from moegguf.edit.finished import FinishedMix
from moegguf.errors import UserError
from moegguf.metadata import Card, check_name
from moegguf.recipe import Layout

NAME, TEMPLATE = "general.name", "tokenizer.chat_template"
TEXTS = {
    "name": (NAME, "what it is called"),
    "author": ("general.author", "who made it"),
    "organization": ("general.organization", "for whom"),
    "description": ("general.description", "what it is for"),
    "license": ("general.license", "its licence, as an SPDX name such as apache-2.0"),
    "url": ("general.url", "where it is published"),
}
"""What can be said of a mix → the key, and what it is."""


def plan_set(mix: FinishedMix, texts: Mapping[str, str], k: int | None = None) -> Change:
    """`mix` with other texts (key → text; an empty one removes the key), and with `k` experts for a token.

    Raises UserError, with every fault, for what this mix cannot be given.
    """
    if faults := [*_text_faults(texts), *_k_faults(mix, k)]:
        raise UserError.of(faults)
    check_name(texts.get(NAME, ""), mix.metadata)
    card = replace(mix.card, name=texts.get(NAME, mix.card.name), k=k or mix.card.k)
    metadata = {key: value for key, value in mix.metadata.items() if texts.get(key) != ""}
    metadata |= {key: GGUFValue(text, GGUFValueType.STRING) for key, text in texts.items() if text}
    if k:
        used = GGUFValue(_used(card), GGUFValueType.UINT32)
        metadata[f"{mix.arch}.expert_used_count"] = used
    return Change(mix, card, with_card(metadata, card), stored_tensors(mix))


def _used(card: Card) -> int:
    """Experts of the routed stack that run for a token."""
    return card.k - 1 if card.always_on else card.k


def _text_faults(texts: Mapping[str, str]) -> Iterator[UserError]:
    for key, text in texts.items():
        if not text.strip() and key == NAME:
            yield UserError(f"{key}: found nothing, expected a name", "give it one")
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):  # bytes that could not be decoded
            yield UserError(f"{key}: found {text!r:.60}, which is no text in UTF-8", "write it in UTF-8")


def _k_faults(mix: FinishedMix, k: int | None) -> Iterator[UserError]:
    card, n = mix.card, len(mix.card.experts)
    if k is None or k == card.k:
        return
    if card.is_gateless:
        yield UserError(
            f"{mix.path}: is gate-less, so all {n} experts run for every token, not {k}",
            f"give it a router: `moegguf route set {mix.path} --router noisy --k {k}`",
        )
    elif not 1 <= k <= n:
        yield UserError(f"k {k}: expected 1 to {n}", "the mix has that many experts")
    elif card.layout == Layout.SHARED:
        yield UserError(f"{mix.path}: k is {card.k} by its weights, {card.always_on} is always on", "build it again")
