"""`moegguf.swap`, `add`, `drop`, `prune`, `set`, `split` and `merge`: finished files changed.

What changes a mix does so in place where no `output` is given and the command can, else it writes a copy. A file that
exists is replaced only with `overwrite`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.api.paths import Location, Locations, maybe_path, to_named, to_path, to_ref, to_refs, to_text
from moegguf.assembly import usable_cores
from moegguf.checks import check_range, check_threads
from moegguf.edit.experts import plan_add, plan_drop, plan_swap
from moegguf.edit.keys import TEMPLATE, TEXTS, plan_set
from moegguf.edit.made import Made, Target, check_name, make, open_target, unchanged
from moegguf.edit.shards import plan_merge, plan_split, write_merged, write_parts
from moegguf.errors import UserError
from moegguf.jobs.domains import texts_of_recipe
from moegguf.sizes import parse_size
from moegguf.texts import Record, read_domains
from moegguf.watch import Watch, unwatched

if TYPE_CHECKING:
    from moegguf.jobs.pruning import Pruned


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
    """Other weights for experts of a mix: name → source, as `moegguf swap` takes them."""
    refs = _sources(experts)
    target = _target(path, output, threads, overwrite)
    change = plan_swap(target.mix, refs, imatrix=maybe_path("imatrix", imatrix), stream=stream)
    return make(target, change, threads=threads, watch=watch)


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
    """A copy of a mix with more experts: name → source. `router` is one for all of them: a file, gateless, noisy."""
    refs = _sources(experts)
    target = _target(path, to_path("output", output), threads, overwrite)
    router = None if router is None else to_ref("router", router)
    change = plan_add(target.mix, refs, router=router, imatrix=maybe_path("imatrix", imatrix), stream=stream)
    return make(target, change, threads=threads, watch=watch)


def drop(
    path: Location,
    experts: str | Sequence[str],
    *,
    output: Location,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Made:
    """A copy of a mix without the experts of these names."""
    names = _names(experts)
    target = _target(path, to_path("output", output), threads, overwrite)
    return make(target, plan_drop(target.mix, names), threads=threads, watch=watch)


def prune(
    path: Location,
    *,
    output: Location,
    drop: str | Sequence[str] = (),
    keep: int | None = None,
    text: Location | Sequence[Location] | Locations = (),
    domains: str | None = None,
    recipes: Location | None = None,
    max_tokens: int = 4096,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Pruned:
    """A copy of a mix without the experts `drop`, or with the `keep` that matter most on texts, and what that costs.

    The texts are files, which may have names, and those of the recipe `domains` in the file `recipes`.
    """
    from moegguf.jobs.pruning import prune as prune_target

    names = _names(drop)
    target = _target(path, to_path("output", output), threads, overwrite)
    texts = _texts(text, domains, maybe_path("recipes", recipes))
    return prune_target(target, texts, drop=names, keep=keep, max_tokens=max_tokens, threads=threads, watch=watch)


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
    """
    given = {
        "name": name,
        "author": author,
        "organization": organization,
        "description": description,
        "license": license,
        "url": url,
    }
    texts = {TEXTS[flag][0]: to_text(flag, text) for flag, text in given.items() if text is not None}
    if template is not None:
        texts[TEMPLATE] = _template(to_path("template", template))
    check_range("--k", k, 1)
    if not texts and k is None:
        if not recover or output is not None:
            raise UserError("nothing to set", "see `moegguf set --help`")
        return unchanged(_target(path, None, threads, overwrite))
    target = _target(path, output, threads, overwrite)
    return make(target, plan_set(target.mix, texts, k), threads=threads, watch=watch)


@dataclass(frozen=True)
class Written:
    """A file that was written, and its size."""

    path: Path
    n_bytes: int


@dataclass(frozen=True)
class Parts:
    """A file that was split. Runtimes open the first part."""

    files: tuple[Written, ...]
    seconds: float

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True)
class Merged(Written):
    """A file that parts were put together to."""

    seconds: float


def split(
    path: Location,
    max_size: str | int,
    *,
    output: Location | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Parts:
    """Write a GGUF file in parts of at most `max_size`, such as "2GB". `output` is how their names begin."""
    check_threads(threads)
    try:
        max_bytes = parse_size(str(max_size))
    except UserError as error:
        raise UserError(f"--max-size {error.message}", error.mend) from None
    file = to_path("path", path)
    prefix = maybe_path("output", output) or file.with_suffix("")
    if prefix.is_dir():
        raise UserError(f"-o {prefix}: is a folder, the parts need a name", f"write -o {prefix / file.stem}")
    start = time.monotonic()
    parts = plan_split(file, max_bytes, prefix, overwrite=overwrite)
    with watch("writing", "bytes") as step:
        step.has(sum(part.n_tensor_bytes for part in parts))
        write_parts(file, parts, threads=threads or usable_cores(), progress=step.did)
    return Parts(tuple(Written(part.path, part.n_bytes) for part in parts), time.monotonic() - start)


def merge(
    path: Location,
    *,
    output: Location,
    threads: int | None = None,
    overwrite: bool = False,
    watch: Watch = unwatched,
) -> Merged:
    """Put the parts of a split file together, of which `path` is one."""
    check_threads(threads)
    target = to_path("output", output)
    check_name(target)
    start = time.monotonic()
    merged = plan_merge(to_path("path", path), target, overwrite=overwrite)
    with watch("writing", "bytes") as step:
        step.has(merged.n_tensor_bytes)
        write_merged(merged, threads=threads or usable_cores(), progress=step.did)
    return Merged(merged.path, merged.n_bytes, time.monotonic() - start)


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
    names = [experts] if isinstance(experts, str) else experts
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"experts {experts!r}: expected names", "for example ['math', 'clinic']")
    return list(names)


def _texts(
    text: Location | Sequence[Location] | Locations, domains: str | None, recipes: Path | None
) -> dict[str, list[Record]]:
    """Name → records; none where none are asked for."""
    refs: dict[str, list[str]] = {}
    for name, ref in to_named("text", text):
        refs.setdefault(name, []).append(ref)
    texts = read_domains(refs)
    return texts if domains is None else texts | texts_of_recipe(to_text("domains", domains), recipes)


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
