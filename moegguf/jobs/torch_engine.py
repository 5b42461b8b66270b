"""A recipe opened for the PyTorch engine: `--engine torch` of `chat` and `eval`.

The network comes from the build side, its tokenizer from llama.cpp, which reads it from a GGUF of the mix's metadata
that holds no tensor. So text becomes the same tokens as in a built file.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moegguf.assembly import open_mix
from moegguf.errors import UserError
from moegguf.mix import Mix
from moegguf.recipe import Recipe
from moegguf.runtime.vocab import Vocab, open_vocab
from moegguf.writer import header_bytes

if TYPE_CHECKING:
    from moegguf.reference.engine import TorchEngine


def open_engine(recipe: Recipe, mix: Mix, *, ctx: int | None = None, threads: int | None = None) -> TorchEngine:
    """The engine of `mix`, which `open_checked` gave. Raises UserError where there is no PyTorch, too."""
    try:
        from moegguf.reference.engine import TorchEngine
    except ImportError as error:
        raise UserError(
            f"--engine torch needs PyTorch ({error})", "install it with `pip install 'moegguf[train]'`"
        ) from error
    return TorchEngine.of_mix(mix, name=recipe.name, vocab=vocab_of(mix), ctx=ctx, threads=threads)


def open_checked(recipe: Recipe) -> Mix:
    """The mix of `recipe`. Raises UserError for one whose router has not been fitted."""
    mix = open_mix(recipe)
    if mix.router.is_blank:
        raise UserError(
            f"recipe {recipe.name}: its {mix.router.mode} router has not been fitted yet",
            "run `moegguf route fit`, and give the file that it writes as the router",
        )
    return mix


def identity(recipe: Recipe, mix: Mix) -> dict[str, object]:
    """What tells `mix` from any other: the recipe, its sources with their revisions, size and time of local files."""
    sources = (mix.base, *(expert.source for expert in mix.experts))
    files = {file for source in sources for file in source.files}
    if recipe.router.file:
        files.add(recipe.folder / recipe.router.file)
    return {
        "recipe": recipe.name,
        "settings": sha256(repr(recipe).encode()).hexdigest(),
        "router": mix.router.digest,
        "sources": [source.label for source in sources],
        "files": {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)},
    }


def vocab_of(mix: Mix) -> Vocab:
    """The tokenizer of `mix`, as a built file would have it."""
    header = header_bytes(mix.base.arch, mix.base.metadata | mix.base.read_vocab(), ())
    with TemporaryDirectory(prefix="moegguf-") as folder:
        path = Path(folder) / "vocab.gguf"
        path.write_bytes(header)
        return open_vocab(path)
