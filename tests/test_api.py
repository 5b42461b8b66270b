"""moegguf from Python: what the commands do, without their words."""

from __future__ import annotations

import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import moegguf
from moegguf.cli import main
from moegguf.watch import unwatched

QUESTION = "What is 6 times 7?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return moegguf.build("demo", output=tmp_path_factory.mktemp("api") / "demo.gguf").plan.path


def test_a_recipe_by_name_gives_the_bytes_of_the_command(demo, tmp_path, capsys):
    assert main(["build", "demo", "-o", str(tmp_path / "demo.gguf")]) == 0
    assert demo.read_bytes() == (tmp_path / "demo.gguf").read_bytes()


def test_a_table_is_a_recipe_and_nothing_is_printed(tmp_path, capfd):
    experts = [{"name": name, "source": f"demo:{name}"} for name in ("math", "clinic")]
    table = {"base": "demo:base", "experts": experts, "router": {"mode": "noisy", "k": 1}}
    built = moegguf.build(table, output=tmp_path / "mix.gguf", quant="Q6_K")
    found = moegguf.inspect(built.plan.path)
    assert (found.card.router, found.card.k, found.card.quant) == ("noisy", 1, "Q6_K")
    assert [expert.name for expert in found.card.experts] == ["math", "clinic"]
    assert moegguf.check(built.plan.path) == []
    assert capfd.readouterr() == ("", "")


def test_a_router_of_a_recipe_is_fitted(tmp_path):
    domains = {name: f"demo:{name}#40" for name in ("math", "clinic")}
    experts = [{"name": name, "source": f"demo:{name}"} for name in domains]
    table = {"base": "demo:base", "experts": experts, "router": {"mode": "ridge", "k": 1}, "domains": domains}
    heard: list[str] = []

    def watch(what: str, unit: str):
        heard.append(what)
        return unwatched(what, unit)

    path = moegguf.build(table, output=tmp_path / "mix.gguf", watch=watch).plan.path
    assert heard[-2:] == ["fitting the router", "writing"]
    assert moegguf.inspect(path).card.router == "ridge"


def test_an_answer_comes_whole_or_in_pieces_and_sees_what_was_said(demo, capsys):
    assert main(["chat", str(demo), "--prompt", QUESTION, "--temp", "0"]) == 0
    expected = capsys.readouterr().out.strip()
    with moegguf.open(demo, temp=0) as model:
        assert model.chat(QUESTION) == expected
        assert model.stats.end == "stop"
        model.reset()
        assert "".join(model.stream(QUESTION)) == expected
        model.chat("What is 2 times 3?")
        assert [turn.question for turn in model.turns] == [QUESTION, "What is 2 times 3?"]


def test_what_is_under_way_ends_with_the_next_answer_and_with_the_model(demo):
    with moegguf.open(demo, temp=0) as model:
        first = model.stream(QUESTION)
        begun = next(first)
        second = model.stream("What is 2 times 3?")
        assert list(first) == []
        assert [turn.answer for turn in model.turns] == [begun]
        next(second)
    assert list(second) == []
    with pytest.raises(moegguf.UserError, match="the model is closed"):
        model.chat(QUESTION)


def test_mistakes_are_user_errors_that_say_how_to_mend_them(demo, tmp_path):
    with pytest.raises(moegguf.UserError, match="exists already"):
        moegguf.build("demo", output=demo)
    with pytest.raises(moegguf.UserError, match="poetry"):
        moegguf.build("poetry")
    for call in (
        lambda: moegguf.build(5),
        lambda: moegguf.build({"base": 5, "experts": 5}),
        lambda: moegguf.build("demo", output=5),
        lambda: moegguf.build("demo", recipes=5),
        lambda: moegguf.build("demo", threads="two", output=tmp_path / "m.gguf"),
        lambda: moegguf.build("demo", fit=5, output=tmp_path / "m.gguf"),
        lambda: moegguf.build("demo", fit="RAM=1GB", quant={"budget": "1GB"}, output=tmp_path / "m.gguf"),
        lambda: moegguf.build("demo", save_plan=tmp_path / "plan.json", output=tmp_path / "m.gguf"),
        lambda: moegguf.build("demo", outptu="m.gguf"),
        lambda: moegguf.inspect(5),
        lambda: moegguf.check(None),
    ):
        with pytest.raises(moegguf.UserError):
            call()
    assert not any(tmp_path.iterdir())
    with pytest.raises(moegguf.UserError, match=r"no setting 'temperature'.*temp"):
        moegguf.open(demo, temperature=0)
    with pytest.raises(moegguf.UserError, match="temp is 'hot'"):
        moegguf.open(demo, temp="hot")
    with pytest.raises(moegguf.UserError, match=r"seed is 1\.5, expected a whole number"):
        moegguf.open(demo, seed=1.5)
    with pytest.raises(AttributeError, match="bild"):
        _ = moegguf.bild


def test_import_loads_nothing_and_type_checkers_see_every_name():
    loaded = "import sys, moegguf; print(sorted({'numpy', 'gguf', 'llama_cpp'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"
    assert all(callable(found) or ismodule(found) for found in (getattr(moegguf, name) for name in moegguf.__all__))


def test_everything_that_is_offered_is_there():
    assert set(moegguf.__all__) == set(moegguf._HOMES)
    for name in moegguf.__all__:
        assert getattr(moegguf, name) is not None
        assert name in dir(moegguf)
