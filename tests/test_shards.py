"""A file in parts: llama.cpp opens them, and together they are the file that they were, to the byte."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

import moegguf
from conftest import build_mix, distance, logits, read_metadata, read_tensors, rewrite
from moegguf.cli import main
from moegguf.edit.shards import plan_merge, plan_split, write_merged, write_parts
from moegguf.gguf_header import read_header
from moegguf.inspection import check, inspect
from moegguf.sizes import parse_size
from test_routers import refuse

SIZE = "70kB"


@pytest.fixture(scope="module")
def built(family, tmp_path_factory) -> bytes:
    models = family("tied")
    mix = build_mix(tmp_path_factory.mktemp("mix") / "mix.gguf", models.base, models.experts, quant="Q8_0")
    return mix.read_bytes()


@pytest.fixture
def mix(built: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "mix.gguf"
    path.write_bytes(built)
    return path


def split(path: Path, size: str = SIZE) -> list[Path]:
    parts = plan_split(path, parse_size(size), path.with_suffix(""))
    write_parts(path, parts)
    return [part.path for part in parts]


def test_parts_are_named_and_numbered_as_llama_cpp_has_it_and_none_is_too_large(mix: Path):
    parts = split(mix)
    assert len(parts) > 2
    assert [part.name for part in parts] == [f"mix-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    n_tensors = len(read_tensors(mix))
    for i, part in enumerate(parts):
        assert part.stat().st_size <= parse_size(SIZE)
        header = read_header(part)
        keys = {key: (header.value(key).value, header.value(key).type.name) for key in header.fields if "split." in key}
        assert keys == {
            "split.no": (i, "UINT16"),
            "split.count": (len(parts), "UINT16"),
            "split.tensors.count": (n_tensors, "INT32"),
        }
    assert {name: tensor for part in parts for name, tensor in read_tensors(part).items()} == read_tensors(mix)


@pytest.mark.parametrize("name", ["-my mix", "it's $HOME"])
def test_the_line_that_puts_parts_together_again_can_be_copied(name: str, mix: Path, built, monkeypatch, capsys):
    monkeypatch.chdir(mix.parent)
    mix.rename(f"{name}.gguf")
    assert main(["split", f"./{name}.gguf", "--max-size", SIZE]) == 0
    line = capsys.readouterr().out.partition("together: ")[2].replace("FILE", "again.gguf")
    program, *argv = shlex.split(line)
    assert program == "moegguf" and main(argv) == 0
    assert Path("again.gguf").read_bytes() == built


def test_stock_llama_cpp_opens_the_first_part(mix: Path):
    parts = split(mix)
    whole = logits(mix)
    mix.unlink()
    assert distance(logits(parts[0]), whole) == 0


def test_parts_are_inspected_checked_and_built_from_like_the_whole(mix: Path, family, tmp_path: Path):
    parts = split(mix)
    for part in (parts[0], parts[-1]):
        found, whole = inspect(part), inspect(mix)
        assert (found.card, found.groups) == (whole.card, whole.groups)
        assert check(part) == []
    dense = build_mix(tmp_path / "dense.gguf", family("tied").base, [family("tied").base], layout="fused", quant="F16")
    source = split(dense)[0]
    experts = [family("tied").experts[0], dense]
    expected = build_mix(tmp_path / "a.gguf", family("tied").base, experts)
    found = build_mix(tmp_path / "b.gguf", family("tied").base, [experts[0], source])
    assert read_tensors(found) == read_tensors(expected)


@pytest.mark.parametrize("which", [0, -1])
def test_merging_any_part_gives_the_file_back_to_the_byte(which: int, mix: Path, built: bytes, tmp_path: Path):
    parts = split(mix)
    write_merged(plan_merge(parts[which], tmp_path / "merged.gguf"))
    assert (tmp_path / "merged.gguf").read_bytes() == built
    assert mix.read_bytes() == built


def test_what_other_programs_split_is_merged_too(family, tmp_path: Path):
    models = family("tied")
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts)
    first = rewrite(mix, tmp_path / "theirs.gguf", split_max_tensors=5)
    assert main(["merge", str(first), "-o", str(tmp_path / "merged.gguf"), "--threads", "1"]) == 0
    assert read_tensors(tmp_path / "merged.gguf") == read_tensors(mix)
    assert read_metadata(tmp_path / "merged.gguf") == read_metadata(mix)


@pytest.mark.parametrize("prefix", ["", ".", "..", "/"])
def test_a_folder_is_no_name_of_parts(prefix: str, mix: Path, monkeypatch, capsys):
    monkeypatch.chdir(mix.parent)
    assert "is a folder, the parts need a name" in refuse(capsys, "split", mix, "--max-size", SIZE, "-o", prefix)
    assert [path.name for path in mix.parent.iterdir()] == ["mix.gguf"]


def test_a_later_part_is_not_run(mix: Path, capsys):
    assert "is a later part of a split file; pass the first one" in refuse(capsys, "plan", split(mix)[1])


@pytest.mark.parametrize("nth", [0, 1, -1])
def test_all_parts_are_there_or_none(nth: int, mix: Path, monkeypatch):
    """The last rename is that of the first part; whichever fails, nothing stays."""
    parts, replace, calls = plan_split(mix, parse_size(SIZE), mix.with_suffix("")), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == range(1, len(parts) + 1)[nth]:
            raise OSError(5, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert main(["split", str(mix), "--max-size", SIZE, "--threads", "1"]) == 2
    assert [path.name for path in mix.parent.iterdir()] == ["mix.gguf"]
    assert calls[0] == parts[-1].path


def test_a_set_that_is_not_whole_or_not_one_is_refused(mix: Path, tmp_path: Path, capsys):
    parts, out = split(mix), tmp_path / "out.gguf"
    assert "is one part of a split file" in refuse(capsys, "split", parts[0], "--max-size", SIZE)
    assert "is one part of a split file" in refuse(capsys, "set", parts[0], "--name", "x")
    assert "is no part of a split file" in refuse(capsys, "merge", mix, "-o", out)
    assert "is one of the parts" in refuse(capsys, "merge", parts[0], "-o", parts[1], "--force")
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    line = refuse(capsys, "merge", parts[0], "-o", out)
    assert f"is shard 3 of {len(parts)} by its keys, 2 of {len(parts)} by its name" in line
    parts[1].unlink()
    assert f"shard {parts[1].name} is missing" in refuse(capsys, "merge", parts[0], "-o", out)
    parts[1].write_bytes(content[:-100])
    assert "corrupt or truncated" in refuse(capsys, "merge", parts[0], "-o", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("10kB", "and its header take"),
        ("1GB", "all of it fits into one part"),
        ("big", "--max-size 'big': is no size"),
        ("0", "--max-size '0': is no size"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(size: str, says: str, mix: Path, capsys):
    assert says in refuse(capsys, "split", mix, "--max-size", size)
    assert [path.name for path in mix.parent.iterdir()] == ["mix.gguf"]


def test_parts_that_exist_are_not_replaced_unless_asked(mix: Path, capsys):
    parts = split(mix)
    assert "exists already" in refuse(capsys, "split", mix, "--max-size", SIZE)
    parts[0].write_bytes(b"something")
    assert main(["split", str(mix), "--max-size", SIZE, "--force", "--json"]) == 0
    assert check(parts[0]) == []


def test_functions_give_the_file_back_and_json_names_the_parts(mix: Path, tmp_path: Path, capsys):
    parts = moegguf.split(mix, SIZE, output=tmp_path / "part", threads=1)
    assert main(["split", str(mix), "--max-size", SIZE, "-o", str(tmp_path / "other"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["bytes"] for each in said["files"]] == [file.n_bytes for file in parts.files]
    assert said["bytes"] == parts.n_bytes == sum(file.path.stat().st_size for file in parts.files)
    merged = moegguf.merge(parts.files[0].path, output=tmp_path / "merged.gguf", threads=1)
    assert merged.path.read_bytes() == mix.read_bytes()
    with pytest.raises(moegguf.UserError, match="exists already"):
        moegguf.merge(parts.files[0].path, output=merged.path)
