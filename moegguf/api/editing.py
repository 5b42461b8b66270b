"""`moegguf.swap`, `add`, `drop`, `prune`, `set`, `split` and `merge`: finished files changed.

What changes a mix does so in place where no `output` is given and the command can, else it writes a copy. A file that
exists is replaced only with `overwrite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.api.paths import Location, Texts, maybe_path, to_named, to_path, to_ref, to_refs
from moegguf.checks import check_range, check_threads
from moegguf.edit.experts import plan_add, plan_drop, plan_swap
from moegguf.edit.keys import TEMPLATE, TEXTS, plan_set
from moegguf.edit.made import Made, Target, make, open_target, unchanged
from moegguf.edit.shards import Merged, Parts, merge_parts, split_file
from moegguf.errors import UserError
from moegguf.jobs.domains import texts_by_name
from moegguf.kinds import checked
from moegguf.sizes import size_of
from moegguf.watch import Watch, unwatched

if TYPE_CHECKING:
    from moegguf.jobs.pruning import Pruned


@checked
def swap(
    path: Location,
    experts: Mapping[str, Location],
    *,
    output: Location | None = None,
    imatrix: Location | None = None,
    stream: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Made:
    """Other weights for experts of a mix: name → source, as `moegguf swap` takes them. Raises UserError."""
    refs = _sources(experts)
    target = _target(path, output, threads, overwrite)
    change = plan_swap(target.mix, refs, imatrix=maybe_path("imatrix", imatrix), stream=stream)
    return make(target, change, threads=threads, watch=watch)


@checked
def add(
    path: Location,
    experts: Mapping[str, Location],
    *,
    output: Location,
    router: Location | None = None,
    imatrix: Location | None = None,
    stream: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Made:
    """A copy of a mix with more experts: name → source. `router` is one for all of them: a file, gateless, noisy.

    Raises UserError.
    """
    refs = _sources(experts)
    target = _target(path, to_path("output", output), threads, overwrite)
    router = None if router is None else to_ref("router", router)
    change = plan_add(target.mix, refs, router=router, imatrix=maybe_path("imatrix", imatrix), stream=stream)
    return make(target, change, threads=threads, watch=watch)


@checked
def drop(
    path: Location,
    experts: str | Sequence[str],
    *,
    output: Location,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Made:
    """A copy of a mix without the experts of these names. Raises UserError."""
    names = _names(experts)
    if not names:
        raise UserError("experts: found none", "for example experts=['math']")
    target = _target(path, to_path("output", output), threads, overwrite)
    return make(target, plan_drop(target.mix, names), threads=threads, watch=watch)


@checked
def prune(
    path: Location,
    *,
    output: Location,
    drop: str | Sequence[str] = (),
    keep: int | None = None,
    text: Texts = (),
    domains: str | None = None,
    recipes: Location | None = None,
    max_tokens: int = 4096,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Pruned:
    """A copy of a mix without the experts `drop`, or with the `keep` that matter most on texts, and what that costs.

    The texts are files, which may have names, and those of the recipe `domains` in the file `recipes`.
    Raises UserError.
    """
    from moegguf.jobs.pruning import prune as prune_target

    names = _names(drop)
    target = _target(path, to_path("output", output), threads, overwrite)
    texts = texts_by_name(to_named("text", text), domains, maybe_path("recipes", recipes))
    return prune_target(target, texts, drop=names, keep=keep, max_tokens=max_tokens, threads=threads, watch=watch)


@checked
def set(
    path: Location,
    *,
    output: Location | None = None,
    name: str | None = None,
    author: str | None = None,
    organization: str | None = None,
    description: str | None = None,
    license: str | None = None,
    url: str | None = None,
    template: Location | None = None,
    k: int | None = None,
    recover: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Made:
    """Change what a mix says of itself, its chat template (a file) and how many experts run; an empty text goes.

    What an interrupted change of it left half written is put back first; `recover` is to ask for no more than that.
    Raises UserError.
    """
    given = {
        "name": name,
        "author": author,
        "organization": organization,
        "description": description,
        "license": license,
        "url": url,
    }
    texts = {TEXTS[flag][0]: text for flag, text in given.items() if text is not None}
    if template is not None:
        texts[TEMPLATE] = _template(to_path("template", template))
    check_range("--k", k, 1)
    if not texts and k is None:
        if not recover or output is not None:
            raise UserError("nothing to set", "see `moegguf set --help`")
        return unchanged(_target(path, None, threads, overwrite))
    target = _target(path, output, threads, overwrite)
    return make(target, plan_set(target.mix, texts, k), threads=threads, watch=watch)


@checked
def split(
    path: Location,
    max_size: str | int,
    *,
    output: Location | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Parts:
    """Write a GGUF file in parts of at most `max_size`, such as "2GB". `output` is how their names begin.

    Raises UserError.
    """
    check_threads(threads)
    max_bytes, prefix = size_of("--max-size", max_size), maybe_path("output", output)
    return split_file(to_path("path", path), max_bytes, prefix, threads=threads, overwrite=overwrite, watch=watch)


@checked
def merge(
    path: Location,
    *,
    output: Location,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Merged:
    """Put the parts of a split file together, of which `path` is one. Raises UserError."""
    check_threads(threads)
    target = to_path("output", output)
    return merge_parts(to_path("path", path), target, threads=threads, overwrite=overwrite, watch=watch)


def _target(path: Location, output: Location | None, threads: int | None, overwrite: bool) -> Target:
    check_threads(threads)
    return open_target(to_path("path", path), maybe_path("output", output), overwrite=overwrite)


def _sources(experts: Mapping[str, Location]) -> dict[str, str]:
    """Expert → reference of its source. Raises UserError for what is no such mapping."""
    refs = to_refs("experts", experts)
    if several := [name for name, found in refs.items() if len(found) != 1]:
        raise UserError(f"experts: {several[0]} has {len(refs[several[0]])} sources", "give each expert one")
    if not refs:
        raise UserError("experts: found none", "for example experts={'math': './math-model'}")
    return {name: ref for name, (ref,) in refs.items()}


def _names(experts: str | Sequence[str]) -> list[str]:
    return [experts] if isinstance(experts, str) else list(experts)


def _template(path: Path) -> str:
    """The text of a template that works. Raises UserError for any other."""
    from moegguf.runtime.template import ChatTemplate

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8", "convert it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path given to --template") from error
    try:
        ChatTemplate(text, "<bos>", "<eos>").prompt([{"role": "user", "content": "hello"}])
    except UserError as error:
        raise UserError(f"--template {path}: {error.message}", "mend it, and try again") from error
    if not text:
        raise UserError(f"{path}: is empty", "name a file with a template")
    return text
