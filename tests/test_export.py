"""`moegguf export`: what other programs are handed says what the file says."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType
from huggingface_hub import ModelCard

import moegguf
from conftest import build_mix, rewrite
from go_template import parse_modelfile, render
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.exporting.recipe_toml import recipe_toml
from moegguf.gguf_header import read_header
from moegguf.licences import asks, combine, recognise
from moegguf.metadata import Card, CompactCard, ExpertCard, read_card
from moegguf.recipe import Recipe, parse_recipe
from moegguf.sources import open_source
from peft_adapters import write_adapter
from tiny_gguf import TEMPLATE, card, saying, write_gguf

STRING, F32 = GGUFValueType.STRING, GGUFValueType.FLOAT32
NOISY = card(router="noisy", k=2, names=("a", "b", "c"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home of its own, and no Ollama to be found."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "no-store"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "home"


@pytest.fixture
def mix(home: Path, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-mix.gguf", saying("xyz"), card=NOISY)


def run(capsys, *argv: object, code: int = 0) -> str:
    """What a command says: on stdout, or when it fails its one line of stderr."""
    assert main(["export", *map(str, argv)]) == code
    said = capsys.readouterr()
    if code:
        assert said.err.count("\n") == 1
    return said.err if code else said.out


# ------------------------------------------------------------------------------------------------- Ollama


def modelfile(path: Path) -> dict[str, list[str]]:
    commands: dict[str, list[str]] = {}
    for name, value in parse_modelfile(path.read_text(encoding="utf-8")):
        commands.setdefault(name, []).append(value)
    return commands


def test_a_modelfile_says_what_the_file_and_the_flags_say(mix: Path, tmp_path: Path, capsys):
    extra = {
        "general.sampling.temp": GGUFValue(0.3, F32),
        "general.sampling.top_k": GGUFValue(9, GGUFValueType.INT32),
        "general.license": GGUFValue("mit", STRING),
    }
    write_gguf(mix, saying("xyz"), card=NOISY, extra=extra)
    flags = ("--system", 'Be\n"brief"', "--stop", "Q:", "--parameter", "min_p=0.125", "--parameter", "top_k=5")
    run(capsys, "ollama", mix, "--name", "me/my-mix:v1", *flags)
    said = modelfile(tmp_path / "Modelfile")
    template = said.pop("TEMPLATE")[0]
    assert said == {
        "FROM": ["./tiny-mix.gguf"], "stop": ["<|end|>", "<|user|>", "Q:"], "num_ctx": ["256"], "temperature": ["0.3"],
        "repeat_penalty": ["1"],
        "top_k": ["5"], "min_p": ["0.125"], "SYSTEM": ['Be\n"brief"'], "LICENSE": ["mit"],
    }  # fmt: skip
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert render(template, question) == "<|system|>S<|user|>Q<|assistant|>"


def test_a_modelfile_elsewhere_names_the_file_by_its_whole_path(mix: Path, tmp_path: Path, capsys):
    run(capsys, "ollama", mix, "-o", tmp_path / "deep", "--ctx", 64)
    said = modelfile(tmp_path / "deep" / "Modelfile")
    assert (said["FROM"], said["num_ctx"]) == ([str(mix)], ["64"])


def test_the_beginning_that_the_vocabulary_adds_is_not_in_the_template(home: Path, family, tmp_path: Path, capsys):
    source = "{{ bos_token }}{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}"
    plain = build_mix(tmp_path / "plain.gguf", family("tied").base, family("tied").experts[:1])
    bos = read_header(plain).get("tokenizer.ggml.tokens")[read_header(plain).get("tokenizer.ggml.bos_token_id")]
    for adds in (True, False):
        keys = {
            "tokenizer.chat_template": GGUFValue(source, STRING),
            "tokenizer.ggml.add_bos_token": GGUFValue(adds, GGUFValueType.BOOL),
        }
        run(capsys, "ollama", rewrite(plain, tmp_path / "mix.gguf", keys=keys), "--force")
        text = render(modelfile(tmp_path / "Modelfile")["TEMPLATE"][0], [{"role": "user", "content": "Q"}])
        assert text == ("[Q]" if adds else f"{bos}[Q]")


@pytest.mark.parametrize(
    "template",
    [TEMPLATE + "{% if messages|length > 5 %}!{% endif %}", "{{ strftime_now('%d %b %Y') }}" + TEMPLATE],
    ids=["counts", "dates"],
)
def test_a_template_that_go_cannot_follow_is_left_out_and_told(template: str, mix: Path, tmp_path: Path, capsys):
    write_gguf(mix, saying("xyz"), template=template)
    assert "template: left out" in run(capsys, "ollama", mix)
    said = modelfile(tmp_path / "Modelfile")
    assert "TEMPLATE" not in said
    assert said["stop"][0] == "<|end|>"


def test_without_a_template_what_is_said_is_given_as_it_is(mix: Path, tmp_path: Path, capsys):
    write_gguf(mix, saying("xyz"), template=None)
    assert "the file has none" in run(capsys, "ollama", mix)
    said = modelfile(tmp_path / "Modelfile")
    assert render(said["TEMPLATE"][0], [{"role": "user", "content": "Once upon"}]) == "Once upon"
    assert "stop" not in said


def test_words_end_an_answer_where_no_token_does(mix: Path, tmp_path: Path, capsys):
    alpaca = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n"
    write_gguf(mix, saying("xyz"), template=alpaca)
    run(capsys, "ollama", mix)
    assert modelfile(tmp_path / "Modelfile")["stop"] == ["### user:"]


@pytest.fixture
def ollama(home: Path, tmp_path: Path) -> Path:
    """A program of that name on PATH; returns the file where it leaves what it was called with."""
    program, record = tmp_path / "bin" / "ollama", tmp_path / "called.json"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], open(sys.argv[-1]).read()], open({str(record)!r}, 'w'))\n"
        "print('success')\nif 'fail' in sys.argv[2]: sys.exit(print('no room', file=sys.stderr) or 1)\n"
    )
    program.chmod(0o755)
    return record


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_ollama_is_asked_to_create_the_model(mix: Path, ollama: Path, tmp_path: Path, capfd):
    assert main(["export", "ollama", str(mix), "--name", "my-mix", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    path = tmp_path / "Modelfile"
    assert (said["created"], said["file"]) == (True, str(path))
    assert json.loads(ollama.read_text()) == [["create", "my-mix", "-f", str(path)], path.read_text()]
    assert not (tmp_path / "no-store").exists()


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_ollama_is_left_alone_when_asked_to_and_its_failure_is_told(mix: Path, ollama: Path, capfd):
    assert main(["export", "ollama", str(mix), "--name", "my-mix", "--no-create"]) == 0
    assert not ollama.exists()
    assert "ollama create my-mix -f" in capfd.readouterr().out
    assert main(["export", "ollama", str(mix), "--name", "fail", "--force"]) == 2
    assert "failed with code 1; start Ollama if" in capfd.readouterr().err


BAD_OLLAMA = {
    "name": (["--name", "a b"], "--name: 'a b' is no name of an Ollama model"),
    "parameter": (["--parameter", "heat=1"], "--parameter heat: Ollama has none of that name; it has num_ctx"),
    "value": (["--parameter", "top_k=some"], "--parameter top_k=some: expected a whole number"),
    "infinite": (["--parameter", "temperature=inf"], "--parameter temperature=inf: expected a number"),
    "no value": (["--parameter", "seed"], "--parameter seed=: expected a whole number"),
    "quotes": (["--system", 'say """'], "the system prompt holds three quotes in a row"),
    "empty stop": (["--stop", ""], "an empty stop sequence ends every answer at once"),
    "context": (["--ctx", "0"], "--ctx 0: expected a whole number from 1"),
}


@pytest.mark.parametrize("kind", BAD_OLLAMA)
def test_what_ollama_would_not_take_is_told_before_anything_is_written(kind: str, mix: Path, tmp_path: Path, capsys):
    flags, expected = BAD_OLLAMA[kind]
    assert expected in run(capsys, "ollama", mix, *flags, code=2)
    assert not (tmp_path / "Modelfile").exists()


def test_a_modelfile_is_not_replaced_unasked_and_a_shard_is_no_model(mix: Path, tmp_path: Path, capsys):
    (tmp_path / "Modelfile").write_text("mine")
    assert "exists already" in run(capsys, "ollama", mix, code=2)
    assert (tmp_path / "Modelfile").read_text() == "mine"
    odd = shutil.copy(mix, tmp_path / "Modelfile")
    assert "is the file itself" in run(capsys, "ollama", odd, "--name", "x", "--force", code=2)
    shard = mix.rename(tmp_path / "mix-00001-of-00002.gguf")
    assert "is one of 2 shards" in run(capsys, "ollama", shard, code=2)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(mix: Path, tmp_path: Path, capsys):
    assert "no such folder" in run(capsys, "ollama", mix, "-o", tmp_path / "a" / "b", code=2)
    (tmp_path / "file").touch()
    assert "is a file, expected a folder" in run(capsys, "ollama", mix, "-o", tmp_path / "file", code=2)


def test_from_python_ollama_is_told_what_the_command_tells_it(mix: Path, tmp_path: Path, capsys):
    flags = ("--name", "me/it:v1", "--system", "Be brief.", "--stop", "Q:", "--parameter", "top_k=5", "--ctx", "64")
    said = json.loads(run(capsys, "ollama", mix, *flags, "-o", tmp_path / "a", "--json"))
    made = moegguf.export.ollama(
        mix, name="me/it:v1", output=tmp_path / "b", ctx=64, system="Be brief.", stop=["Q:"], parameters={"top_k": 5}
    )
    assert made.path == tmp_path / "b" / "Modelfile"
    assert made.path.read_bytes() == Path(said["file"]).read_bytes()
    assert (made.name, made.is_created, list(made.modelfile.stops)) == (said["name"], said["created"], said["stop"])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="exists already"):
        moegguf.export.ollama(mix, output=tmp_path / "b")
    moegguf.export.ollama(str(mix), output=str(tmp_path / "b"), overwrite=True)
    wrong = ({"stop": "Q:"}, {"parameters": ["top_k"]}, {"parameters": {"top_k": 0.5}}, {"system": 5}, {"ctx": "64"})
    for given in (*wrong, {"name": 5}, {"output": 5}, {"stop": [5]}):
        with pytest.raises(UserError, match="expected"):
            moegguf.export.ollama(mix, overwrite=True, **given)


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_from_python_ollama_says_nothing_and_its_failure_is_told(mix: Path, ollama: Path, capfd):
    assert moegguf.export.ollama(mix).is_created
    with pytest.raises(UserError, match="failed with code 1: no room; start Ollama if"):
        moegguf.export.ollama(mix, name="fail", overwrite=True)
    ollama.unlink()
    assert not moegguf.export.ollama(mix, create=False, overwrite=True).is_created
    assert not ollama.exists()
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- LM Studio


@pytest.fixture
def models(home: Path) -> Path:
    folder = home / ".lmstudio" / "models"
    folder.mkdir(parents=True)
    return folder


def test_lm_studio_finds_the_same_file_and_how_many_experts_it_runs(mix: Path, models: Path, capsys):
    said = json.loads(run(capsys, "lmstudio", mix, "--publisher", "me", "--name", "my mix", "--json"))
    target = models / "me" / "my mix" / "tiny-mix.gguf"
    assert said["files"] == {str(target): "linked"}
    assert target.samefile(mix)
    settings = models.parent / ".internal/user-concrete-model-default-config/me/my mix/tiny-mix.gguf.json"
    assert said["settings"] == str(settings)
    assert json.loads(settings.read_text())["load"]["fields"] == [{"key": "llm.load.numExperts", "value": 2}]
    assert "there already" in run(capsys, "lmstudio", mix, "--publisher", "me", "--name", "my mix")


def test_other_settings_of_the_model_stay(mix: Path, models: Path, capsys):
    settings = models.parent / ".internal/user-concrete-model-default-config/moegguf/tiny-mix/tiny-mix.gguf.json"
    settings.parent.mkdir(parents=True)
    field = {"key": "llm.load.contextLength", "value": 77}
    old = {"preset": "@local:mine", "operation": {"fields": [1]}, "load": {"fields": [field]}}
    old["load"]["fields"].append({"key": "llm.load.numExperts", "value": 9})
    settings.write_text(json.dumps(old))
    run(capsys, "lmstudio", mix)
    new = json.loads(settings.read_text())
    assert new == {**old, "load": {"fields": [field, {"key": "llm.load.numExperts", "value": 2}]}}


def test_settings_of_another_form_are_told_before_anything_is_linked(mix: Path, models: Path, capsys):
    settings = models.parent / ".internal/user-concrete-model-default-config/moegguf/tiny-mix/tiny-mix.gguf.json"
    settings.parent.mkdir(parents=True)
    settings.write_text("[]")
    assert "is not of the form that LM Studio writes" in run(capsys, "lmstudio", mix, code=2)
    assert list(models.iterdir()) == []


def test_a_model_without_stacked_experts_gets_no_number(mix: Path, models: Path, capsys):
    write_gguf(mix, saying("xyz"))
    assert json.loads(run(capsys, "lmstudio", mix, "--json"))["k"] is None
    assert not (models.parent / ".internal").exists()


SHM = Path("/dev/shm")


@pytest.mark.skipif(not SHM.is_dir() or not os.access(SHM, os.W_OK), reason="needs a second file system")
def test_on_another_disk_it_is_a_copy(mix: Path, models: Path, capsys):
    folder = SHM / f"moegguf-test-{os.getpid()}"
    folder.mkdir()
    try:
        with pytest.raises(OSError) as caught:
            os.link(mix, folder / "x")
        assert caught.value.errno == errno.EXDEV
        said = json.loads(run(capsys, "lmstudio", mix, "-o", folder, "--json"))
        target = folder / "moegguf" / "tiny-mix" / "tiny-mix.gguf"
        assert said["files"] == {str(target): "copied"}
        assert target.read_bytes() == mix.read_bytes()
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    finally:
        shutil.rmtree(folder)


def test_another_file_of_that_name_is_replaced_only_when_asked_to(mix: Path, models: Path, capsys):
    target = models / "moegguf" / "tiny-mix" / "tiny-mix.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"another")
    assert "is another file; choose another --name" in run(capsys, "lmstudio", mix, code=2)
    assert target.read_bytes() == b"another"
    run(capsys, "lmstudio", mix, "--force")
    assert target.samefile(mix)


def test_a_place_that_lm_studio_has_not_is_told_in_one_line(mix: Path, home: Path, capsys):
    assert f"{home}/.lmstudio/models: LM Studio's models folder is not there" in run(capsys, "lmstudio", mix, code=2)
    (home / ".lmstudio/models").mkdir(parents=True)
    for flag in ("--publisher", "--name"):
        assert f"{flag} '../x': expected letters" in run(capsys, "lmstudio", mix, flag, "../x", code=2)
    assert list((home / ".lmstudio/models").iterdir()) == []


def test_from_python_lm_studio_gets_what_the_command_gives_it(mix: Path, models: Path, capsys):
    made = moegguf.export.lmstudio(mix, publisher="me", name="its name")
    said = json.loads(run(capsys, "lmstudio", mix, "--publisher", "me", "--name", "its name", "--json"))
    assert {str(target) for target in made.files} == set(said["files"]) == {said["file"]}
    assert (made.n_bytes, made.n_experts, str(made.settings)) == (said["bytes"], said["k"], said["settings"])
    assert set(said["files"].values()) == {"there already"}
    for given in ({"publisher": 5}, {"name": 5}, {"output": 5}):
        with pytest.raises(UserError, match="expected"):
            moegguf.export.lmstudio(mix, **given)


# ------------------------------------------------------------------------------------------------ licences


def test_licences_of_sources_are_recorded_in_the_mix(family, tmp_path: Path):
    models = family("tied")
    readmes = {
        "base": "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base\n",
        "e1": "---\nlicense: other\nlicense_name: my-terms\n---\n",
        "e2": "---\nlicense: [\n---\n",
    }
    for name, text in readmes.items():
        shutil.copytree(models.base if name == "base" else models.experts[int(name[1]) - 1], tmp_path / name)
        (tmp_path / name / "README.md").write_text(text)
    path = build_mix(tmp_path / "mix.gguf", tmp_path / "base", [tmp_path / "e1", tmp_path / "e2"])
    header = read_header(path)
    assert read_card(header).licences == {"base": "apache-2.0", "e1": "my-terms", "e2": ""}
    assert header.get("general.license") == "apache-2.0"
    assert header.get("general.languages") == ["en", "de"]


def test_an_adapter_has_a_licence_of_its_own(family, tmp_path: Path):
    models, adapter = family("tied"), tmp_path / "adapter"
    shutil.copytree(models.base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_adapter(adapter, tmp_path / "base")
    ref = f"lora:{adapter}::{tmp_path / 'base'}"
    assert open_source(ref).licence == ""
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    assert open_source(ref).licence == "mit"


COMBINED = {
    "one": ({"a": "mit", "b": "mit"}, "mit", []),
    "the one with more notices": ({"a": "mit", "b": "apache-2.0"}, "apache-2.0", []),
    "terms": ({"a": "apache-2.0", "b": "llama3.1"}, "llama3.1", []),
    "two terms": ({"a": "llama2", "b": "gemma"}, "other", ["llama2 (a) and gemma (b): the terms of both"]),
    "non-commercial": (
        {"a": "mit", "b": "cc-by-nc-4.0"}, "cc-by-nc-4.0", ["b: cc-by-nc-4.0 makes the whole mix non-commercial"],
    ),
    "all non-commercial": ({"a": "cc-by-nc-4.0", "b": "cc-by-nc-4.0"}, "cc-by-nc-4.0", []),
    "the stricter of two": ({"a": "cc-by-nc-4.0", "b": "cc-by-nc-sa-4.0"}, "cc-by-nc-sa-4.0", []),
    "share alike": ({"a": "gpl-3.0", "b": "mit"}, "gpl-3.0", []),
    "incompatible": ({"a": "gpl-3.0", "b": "llama3"}, "other", ["gpl-3.0 (a) and llama3 (b) are incompatible"]),
    "two that share alike": ({"a": "gpl-3.0", "b": "cc-by-sa-4.0"}, "other", ["are incompatible"]),
    "no derivatives": ({"a": "cc-by-nd-4.0", "b": "cc-by-nd-4.0"}, "cc-by-nd-4.0", ["a, b: cc-by-nd-4.0 forbids"]),
    "openrail": ({"a": "creativeml-openrail-m", "b": "mit"}, "creativeml-openrail-m", []),
    "missing": ({"a": "mit", "b": "", "c": ""}, "unknown", ["no licence is named by b, c"]),
    "unknown": ({"a": "mit", "b": "my-own"}, "other", ["b: the licence 'my-own' is not one that moegguf knows"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMBINED)
def test_licences_come_to_the_strictest_and_conflicts_are_named(kind: str):
    licences, expected, warnings = COMBINED[kind]
    combined = combine(licences)
    assert combined.licence == expected
    assert len(combined.warnings) == len(warnings)
    assert all(words in found for words, found in zip(warnings, combined.warnings, strict=True))


def test_the_text_of_a_well_known_licence_is_recognised():
    text = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"
    assert recognise(text) == "llama3.1"
    assert recognise("Copyright: ask me") == recognise("") == ""
    assert asks(recognise("\n\nMIT License\n\nCopyright")) is not None


# ---------------------------------------------------------------------------------------------------- card


def published(*, licences: tuple[str, str, str], **changes) -> Card:
    """A mix of two models of the Hub over a third, one of them an adapter."""
    base, one, two = licences
    sources = ("hf:org/math@0123456789abcdef", "lora:hf:me/code-lora@v1::hf:org/base@main")
    experts = tuple(
        ExpertCard(name, source, 0.5, "Q8_0", licence)
        for name, source, licence in zip(("math", "code"), sources, (one, two), strict=True)
    )
    fields = {"layout": "mixtral", "router": "gateless", "k": 2, "quant": "Q8_0", **changes}
    return Card("my-mix", "0.1.0", base="hf:org/base@main", experts=experts, base_licence=base, **fields)


def write_card(path: Path, made: Card, capsys, *flags: object, code: int = 0, **general: str) -> tuple[ModelCard, str]:
    """The README.md for a file with that card, read back by the Hub's own library, and what the command warned of."""
    from moegguf.assembly import base_models

    extra = {f"general.{key}": GGUFValue(value, STRING) for key, value in general.items()}
    labels = [made.base, *(expert.source for expert in made.experts)]
    write_gguf(path, saying("xyz"), card=made, extra=base_models(labels) | extra)
    assert main(["export", "card", str(path), "--force", *map(str, flags)]) == code
    return ModelCard((path.parent / "README.md").read_text(encoding="utf-8")), capsys.readouterr().err


def test_the_hub_reads_what_the_mix_is_made_of(tmp_path: Path, capsys):
    made = published(licences=("apache-2.0", "mit", "apache-2.0"))
    readme, warned = write_card(tmp_path / "m.gguf", made, capsys, "--repo", "me/my-mix", license="apache-2.0")
    assert warned == ""
    assert readme.data.to_dict() == {
        "license": "apache-2.0",
        "base_model": ["org/base", "org/math", "me/code-lora"],
        "base_model_relation": "merge",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "moe", "merge", "moegguf"],
    }
    for words in (
        "# my-mix",
        "| math |",
        "(https://huggingface.co/org/math)",
        "ollama run hf.co/me/my-mix",
        "## Run it",
    ):
        assert words in readme.text


def test_licences_that_exclude_each_other_are_named_in_the_card_and_by_the_command(tmp_path: Path, capsys):
    made = published(licences=("llama3", "gpl-3.0", ""))
    readme, warned = write_card(tmp_path / "m.gguf", made, capsys)
    assert readme.data.license == "unknown"
    for words in ("no licence is named by lora:hf:me/code-lora", "are incompatible"):
        assert words in warned
        assert words in readme.text
    made = published(licences=("apache-2.0", "mit", ""))
    for declared, expected in (("apache-2.0", "unknown"), ("mit", "mit")):
        assert write_card(tmp_path / "m.gguf", made, capsys, license=declared)[0].data.license == expected
    made = published(licences=("apache-2.0", "cc-by-nc-4.0", "mit"))
    readme, warned = write_card(tmp_path / "m.gguf", made, capsys, license="apache-2.0")
    assert readme.data.license == "cc-by-nc-4.0"
    assert "the file says apache-2.0, but what is in it comes to cc-by-nc-4.0" in warned


def test_a_licence_of_its_own_is_told_as_the_hub_wants_it(tmp_path: Path, capsys):
    made = published(licences=("my-terms", "my-terms", "my-terms"))
    readme, _ = write_card(tmp_path / "m.gguf", made, capsys)
    assert (readme.data.license, readme.data["license_name"]) == ("other", "my-terms")


RECIPES = {
    "gateless": {},
    "fused": {"layout": "fused", "mixed": "ffn+attention", "layers": (0, 2), "trunk": "mean"},
    "noisy": {"router": "noisy", "std": 0.02, "seed": 7, "shared": True, "quant": "Q4_K_M"},
    "always on": {"router": "noisy", "std": 0.02, "seed": 7, "layout": "shared", "always_on": "math"},
    "fitted": {"router": "ridge", "settings": {"lambda": "0.01"}, "k": 1},
    "bits": {"quant": "4.25bpw"},
    "budget": {"quant": "12GB"},
    "compact": {"layout": "fused", "compact": CompactCard((300, 300), 200)},
}


def read_recipe(made: Card) -> Recipe:
    """The recipe of a card's text, by way of the front door."""
    tables = tomllib.loads(recipe_toml(made, 'a "fine" mix', "mit"))["mix"]
    return parse_recipe(made.name, tables[made.name], where="card:", folder=Path())


@pytest.mark.parametrize("kind", RECIPES)
def test_the_recipe_in_a_card_is_the_one_of_the_mix(kind: str):
    made = published(licences=("", "", ""), **RECIPES[kind])
    recipe = read_recipe(made)
    found = (recipe.base, recipe.layout, recipe.mixed, recipe.trunk, recipe.layers, recipe.quant.label)
    assert found == (made.base, made.layout, made.mixed, made.trunk, made.layers, made.quant)
    assert [(e.name, e.source) for e in recipe.experts] == [(e.name, e.source) for e in made.experts]
    assert (recipe.description, recipe.license) == ('a "fine" mix', "mit")
    router = recipe.router
    if made.router == "ridge":
        assert router.file == "router.safetensors"
    else:
        assert (router.mode, router.k, router.always_on) == (made.router, made.k, made.always_on)
    if made.router == "noisy":
        assert (router.std, router.seed, router.shared) == (made.std, made.seed, made.shared)
    if made.compact:
        assert recipe.compact.size == made.compact.size


def test_the_recipe_keeps_shares_and_precisions(tmp_path: Path):
    made = published(licences=("", "", ""))
    shares = (ExpertCard("math", "./x", 0.75, "Q8_0"), ExpertCard("code", "y", 0.25, "Q4_K_M"))
    made = Card(**{**vars(made), "experts": shares, "layout": "shared"})
    assert [(e.weight, e.quant) for e in read_recipe(made).experts] == [(0.75, "Q8_0"), (0.25, "Q4_K_M")]
    assert "files of the maker's disk" in recipe_toml(made)


def test_what_was_measured_is_in_the_card(tmp_path: Path, capsys):
    made = published(licences=("mit", "mit", "mit"))
    mix = write_gguf(tmp_path / "m.gguf", saying("xyz"), card=made)
    (tmp_path / "task.jsonl").write_text('{"question": "q", "answer": "xyz"}\n{"question": "r", "answer": "no"}\n')
    (tmp_path / "book.txt").write_text("some words to read, again and again " * 20)
    scores, kld = tmp_path / "scores.json", tmp_path / "kld.json"
    quiet = ("--threads", "1", "--cache", str(tmp_path / "cache"))
    assert main(["eval", str(mix), "--tasks", str(tmp_path / "task.jsonl"), *quiet, "--save", str(scores)]) == 0
    capsys.readouterr()
    measure = ["measure", str(mix), "--against", str(mix), "--text", str(tmp_path / "book.txt"), *quiet, "--json"]
    assert main(measure) == 0
    kld.write_text(capsys.readouterr().out)
    readme, _ = write_card(mix, made, capsys, "--results", scores, "--results", kld)
    assert "| model | task (exact match) |" in readme.text
    assert "| m | 50 (9.453 to 90.55) |" in readme.text
    assert "KLD from m.gguf, nats" in readme.text
    (tmp_path / "other.json").write_text('{"models": [{}]}')
    other = ("--results", tmp_path / "other.json", "--force")
    assert "holds no results of moegguf" in run(capsys, "card", mix, *other, code=2)


def test_names_in_a_file_cannot_write_the_card(tmp_path: Path, capsys):
    made = published(licences=("mit", "mit", "mit"))
    experts = (ExpertCard("a | b", "x` | <script>\n---", 0.5, "Q8_0", "mit\nlicense: gpl"), made.experts[1])
    readme, _ = write_card(tmp_path / "m.gguf", Card(**{**vars(made), "experts": experts}), capsys)
    assert readme.data.license == "other"
    row = next(line for line in readme.text.splitlines() if line.startswith("| a"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert cells == [r"a \| b", r"`x' \| <script>\n---`", "0.5", "Q8_0", r"mit\nlicense: gpl"]


def test_from_python_a_card_is_the_one_of_the_command(mix: Path, tmp_path: Path, capsys):
    said = json.loads(run(capsys, "card", mix, "--repo", "me/it", "-o", tmp_path / "A.md", "--json"))
    made = moegguf.export.card(mix, repo="me/it", output=tmp_path / "B.md")
    assert made.path.read_bytes() == Path(said["file"]).read_bytes()
    assert (made.n_bytes, list(made.warnings)) == (said["bytes"], said["notes"])
    for given in ({"repo": 5}, {"results": 5}, {"output": 5}):
        with pytest.raises(UserError, match="expected"):
            moegguf.export.card(mix, overwrite=True, **given)


def test_a_card_is_for_mixes_and_replaces_nothing_unasked(mix: Path, tmp_path: Path, capsys):
    run(capsys, "card", mix)
    assert "exists already" in run(capsys, "card", mix, code=2)
    assert "is the file itself" in run(capsys, "card", mix, "-o", mix, "--force", code=2)
    assert "is no name of a model on the Hub" in run(capsys, "card", mix, "--repo", "x", "--force", code=2)
    plain = write_gguf(tmp_path / "plain.gguf", saying("xyz"))
    assert "was not made by moegguf" in run(capsys, "card", plain, "--force", code=2)
