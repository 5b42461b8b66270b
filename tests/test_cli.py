"""The command line as a whole: help, exit codes, what goes to which stream, and what each flag of `build` means."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moegguf
from conftest import read_metadata, read_tensors
from moegguf import __version__
from moegguf.cli import COMMANDS, main
from moegguf.gguf_header import read_header
from moegguf.metadata import Card, read_card

ROOT = Path(__file__).parents[1]
PREFIX = "moegguf: error: "
KIND = "tied"


def shell(*argv: object, **options) -> subprocess.CompletedProcess:
    """The command as a user starts it."""
    command = [sys.executable, "-m", "moegguf", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """`refused(*argv)`: the one line that these arguments end in."""

    def run(*argv: object) -> str:
        assert main([*map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(PREFIX)
        assert err.count("\n") == 1
        return err.removeprefix(PREFIX).rstrip("\n")

    return run


# --- help and usage ---


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_has_examples_that_name_the_command(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([*([command] if command else []), "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert out.startswith("usage: moegguf")
    assert f"  moegguf {command or 'build'} " in out or f"  moegguf {command}\n" in out


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {summary} " in words for name, summary in COMMANDS.items())


def test_the_help_of_a_command_shows_every_flag_of_build(capsys):
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    out = capsys.readouterr().out
    assert all(
        flag in out for flag in ("--base", "--expert", "--quant", "--router", "--layout", "--dry-run", "--recipes")
    )


@pytest.mark.parametrize("argv", [["--help"], ["--version"], []], ids=str)
def test_the_first_help_needs_no_heavy_import(argv):
    code = f"import sys; from moegguf.cli import main\ntry: main({argv})\nexcept SystemExit: pass\nprint(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "moegguf.cli" in modules
    assert {"numpy", "gguf", "torch", "llama_cpp", "rich", "tokenizers", "moegguf.assembly"}.isdisjoint(modules)


def test_building_imports_no_runtime_and_no_torch(family, tmp_path):
    base = family(KIND).base
    argv = ["build", "--base", str(base), "--expert", f"a={base}", "-o", str(tmp_path / "m.gguf"), "--dry-run"]
    code = f"import sys; from moegguf.cli import main\nassert main({argv!r}) == 0\nprint(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "transformers", "llama_cpp", "moegguf.runtime"}.isdisjoint(modules)


def test_no_command_is_answered_with_the_usage():
    done = shell()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: moegguf ")
    assert all(name in done.stderr for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"moegguf {__version__}\n"


# --- mistakes on the command line ---


FLAGS = {
    "unknown command": (["biuld"], "'biuld'", "build"),
    "unknown flag": (["build", "demo", "--fast"], "--fast", "see `moegguf build --help`"),
    "unknown flag of a command of a command": (["route", "fit", "--fast"], "--fast", "see `moegguf route fit --help`"),
    "unknown flag of recipes": (["recipes", "demo"], "demo", "--help"),
    "no file": (["inspect"], "file", "moegguf inspect --help"),
    "k in words": (["build", "demo", "--k", "two"], "--k", "'two'"),
    "noise without a router": (
        ["build", "--base", "b", "--expert", "a=b", "--seed", "3"],
        "router.mode",
        "gateless, noisy",
    ),
    "noise for a gateless recipe": (["build", "demo", "--k", "2"], "router.k: found 2", "only with mode noisy or"),
    "router of no mode": (["build", "demo", "--router", "gated"], "'gated'", "gateless, noisy, hidden, ridge"),
    "layout of no name": (["build", "demo", "--layout", "dense"], "'dense'", "'mixtral', 'fused', 'shared', 'auto'"),
    "nothing to build": (["build"], "nothing to build", "--base and --expert"),
    "expert without a source": (["build", "--base", "b", "--expert", "a"], "--expert a", "expected NAME=SOURCE"),
    "expert of an empty source": (["build", "--base", "b", "--expert", "a="], "--expert a=", "expected NAME=SOURCE"),
    "expert of an empty name": (["build", "--base", "b", "--expert", "=./a"], "--expert =./a", "expected NAME=SOURCE"),
    "weight of nobody": (
        ["build", "--base", "b", "--expert", "a=./a", "--weight", "c=1"],
        "--weight c",
        "use one of a",
    ),
    "weight in words": (
        ["build", "--base", "b", "--expert", "a=./a", "--weight", "a=all"],
        "--weight all",
        "is no number",
    ),
    "weight that is NaN": (
        ["build", "--base", "b", "--expert", "a=./a", "--weight", "a=nan"],
        "weight: found nan",
        "1e-06",
    ),
    "weight without an expert": (["build", "demo", "--weight", "math=1"], "--weight", "goes with --expert"),
    "expert twice": (
        ["build", "--base", "b", "--expert", "a=./a", "--expert", "a=./b"],
        "experts[1].name: found 'a'",
        "rename",
    ),
    "expert of no name": (["build", "--base", "b", "--expert", "a b=./a"], "'a b'", "letters"),
    "experts without a base": (["build", "--expert", "a=./a"], "base: found nothing", "non-empty"),
    "base without experts": (["build", "--base", "b"], "experts: found nothing", "at least one"),
    "no threads": (["build", "demo", "--threads", "0"], "--threads 0", "1 to 512"),
    "threads below none": (["build", "demo", "--threads", "-1"], "--threads -1", "1 to 512"),
    "very many threads": (["build", "demo", "--threads", "100000"], "--threads 100000", "1 to 512"),
    "output of another kind": (["build", "--base", "b", "--expert", "a=./a", "-o", "mix.bin"], "'mix.bin'", ".gguf"),
    "unknown recipe": (["build", "demon"], "has no recipe 'demon', only demo", "moegguf recipes"),
    "std that is NaN": (["build", "demo", "--router", "noisy", "--std", "nan"], "router.std: found nan", "1e-06"),
    "seed below zero": (
        ["build", "demo", "--router", "noisy", "--seed", "-1"],
        "router.seed: found -1",
        "0 to 4294967295",
    ),
    "k past the experts": (["build", "demo", "--router", "noisy", "--k", "9"], "router.k: found 9", "1 to 4"),
    "always on without a router": (["build", "demo", "--always-on", "math"], "always_on: found 'math'", "gate-less"),
    "no prompt": (["chat", "absent.gguf", "--prompt", ""], "prompt is empty", "--prompt"),
    "no such file to inspect": (["inspect", "absent.gguf"], "absent.gguf: cannot be read", "check the path"),
    "no such file to chat with": (["chat", "absent.gguf", "--prompt", "hi"], "absent.gguf", "check the path"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_mistake_is_one_line_with_its_mend_and_exit_code_2(case, refused):
    argv, *says = FLAGS[case]
    line = refused(*argv)
    assert all(fragment in line for fragment in says), line


def test_several_mistakes_are_a_line_each(capsys):
    argv = [
        "build",
        "--base",
        "b",
        "--expert",
        "a=./a",
        "--quant",
        "Q9",
        "--layout",
        "fused",
        "--router",
        "noisy",
        "--k",
        "3",
        "-o",
        "m.bin",
    ]
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{PREFIX}command line: ") for line in lines)


def test_a_mistake_in_the_shell_is_one_line_on_stderr(tmp_path):
    done = shell("build", "--base", tmp_path / "a", "--expert", f"x={tmp_path / 'b'}", "-o", tmp_path / "m.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(" (")[0] for line in done.stderr.splitlines()] == [
        f"{PREFIX}{tmp_path / name}: no such file or folder" for name in "ab"
    ]


def test_control_characters_of_a_name_are_escaped_in_the_line(refused, tmp_path):
    line = refused("inspect", tmp_path / "a\x1b[31m\nb\u202e.gguf")
    assert "a\\x1b[31m\\nb\\u202e.gguf" in line


def test_bytes_of_a_name_that_are_no_text_are_escaped_in_the_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "moegguf", "inspect", b"\xff.gguf"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"moegguf: error: \\udcff.gguf: cannot be read")
    assert done.stderr.count(b"\n") == 1


def unread(*argv: object) -> tuple[int, bytes]:
    """Exit code and stderr of a command whose stdout nobody reads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moegguf", *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr:
        return process.wait(), process.stderr.read()


@pytest.mark.parametrize("argv", [["recipes"], ["recipes", "--json"], ["--help"], ["build", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_mistake(argv):
    assert unread(*argv) == (141, b"")


def test_in_a_pipe_nothing_is_wrapped_cut_or_padded(build, capsys):
    path = build(name="x" * 200)
    written = capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert (written.count(str(path)), out.count(str(path))) == (3, 1)
    assert not any(line.endswith(" ") for line in written.splitlines())
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_a_build_whose_reader_leaves_early_writes_its_file_all_the_same(build, family, tmp_path):
    path, base = tmp_path / "unread.gguf", family(KIND).base
    flags = ["--base", base, "--expert", f"a={base}", "--quant", "Q8_0"]
    assert unread("build", *flags, "-o", path) == (141, b"")
    assert main(["build", *map(str, flags), "-o", str(tmp_path / "read.gguf")]) == 0
    assert read_tensors(path) == read_tensors(tmp_path / "read.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal there")
def test_sigterm_ends_a_chat_that_waits(build):
    import pty

    terminal, stdin = pty.openpty()
    argv = [sys.executable, "-m", "moegguf", "chat", str(build("--quant", "F32")), "--threads", "1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while process.stdout.read(1) not in (b">", b""):  # it asks
            pass
        while process.poll() is None:  # one that comes just before it waits for a line is heard with the next
            time.sleep(0.2)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        err = process.stderr.read()
    finally:
        process.kill()
        os.close(terminal)
        os.close(stdin)
    assert (process.returncode, err) == (143, b"moegguf: terminated\n")


def test_ctrl_c_while_python_ends_is_no_traceback():
    code = """
import atexit, signal, sys
from moegguf.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(signal.raise_signal, signal.SIGINT)
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code, "recipes"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="shells there close no streams")
@pytest.mark.parametrize(("closed", "is_heard"), [("<&- 2>&-", True), (">&-", False)])
def test_streams_that_the_shell_closed_are_no_mistake(closed: str, is_heard: bool):
    argv = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-m", "moegguf", "recipes"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr, b"demo-noisy" in done.stdout) == (0, b"", is_heard)


def test_a_full_device_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moegguf", "recipes"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode != 0
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_terminal_without_unicode_is_written_to_all_the_same(family, tmp_path):
    path = tmp_path / "m.gguf"
    base = family(KIND).base
    assert main(["build", "--base", str(base), "--expert", f"a={base}", "--quant", "Q8_0", "-o", str(path)]) == 0
    done = shell("inspect", path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "Q8_0" in done.stdout


# --- what the flags of build mean ---


@pytest.fixture
def build(family, tmp_path, capsys) -> Callable[..., Path]:
    """`build(*flags)`: a mix of the tiny family's experts x, y and z, made by flags alone."""
    models = family(KIND)
    experts = [f"--expert={name}={path}" for name, path in zip("xyz", models.experts, strict=True)]

    def run(*flags: str, name: str = "m") -> Path:
        path = tmp_path / f"{name}.gguf"
        assert main(["build", "--base", str(models.base), *experts, "-o", str(path), *flags]) == 0, capsys.readouterr()
        return path

    return run


def card_of(path: Path) -> Card:
    card = read_card(read_header(path))
    assert card is not None
    return card


def test_without_flags_a_mix_is_gateless_mixtral_and_q4_k_m(build):
    card = card_of(build())
    assert (card.name, card.router, card.layout, card.quant, card.k) == ("m", "gateless", "mixtral", "Q4_K_M", 3)
    assert [(e.name, e.source, e.weight) for e in card.experts] == [
        (name, source, pytest.approx(1 / 3)) for name, source in zip("xyz", ("e1", "e2", "e3"), strict=True)
    ]


def test_every_flag_of_the_mix_arrives(build):
    flags = ["--router", "noisy", "--k", "2", "--std", "0.5", "--seed", "9", "--always-on", "y", "--quant", "q8_0"]
    card = card_of(build(*flags))
    assert (card.router, card.k, card.std, card.seed, card.always_on) == ("noisy", 2, 0.5, 9, "y")
    assert (card.layout, card.quant) == ("shared", "Q8_0")


def test_weights_are_shares_by_name(build):
    card = card_of(build("--weight", "z=0.5", "--weight", "x=0.25", "--weight", "y=0.25"))
    assert [expert.weight for expert in card.experts] == [0.25, 0.25, 0.5]


def test_the_types_of_roles_and_patterns_arrive(build):
    path = build("--quant", "Q8_0", "--quant-role", "attn=F16", "--quant-tensor", r"blk\.1\.ffn_up=BF16")
    types = {name: tensor.type.name for name, tensor in read_tensors(path).items()}
    assert types["blk.0.attn_q.weight"] == types["blk.1.attn_output.weight"] == "F16"
    assert types["blk.1.ffn_up_exps.weight"] == "BF16"
    assert types["blk.0.ffn_up_exps.weight"] == types["token_embd.weight"] == "Q8_0"


def test_a_pattern_may_hold_an_equals_sign(build):
    path = build("--quant", "Q8_0", "--quant-tensor", "(?=blk).*ffn_up=F16")
    assert read_tensors(path)["blk.0.ffn_up_exps.weight"].type.name == "F16"


def test_a_dry_run_says_it_all_and_writes_nothing(family, tmp_path, capsys):
    models = family(KIND)
    argv = ["build", "--base", str(models.base), "--expert", f"x={models.experts[0]}", "-o", str(tmp_path / "m.gguf")]
    assert main([*argv, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(
        word in out
        for word in ("base", "expert x", "gateless", "mixtral", "bits per weight", "to run", "nothing was written")
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=str)
def test_the_json_of_build_agrees_with_the_file_and_with_python(flags, family, tmp_path, capsys):
    base, path = family(KIND).base, tmp_path / "m.gguf"
    argv = ["build", "--base", str(base), "--expert", f"x={family(KIND).experts[0]}", "--quant", "Q4_0", *flags]
    assert main([*argv, "-o", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == ""
    assert (said["file"], said["written"], said["layout"], said["architecture"]) == (
        str(path), not flags, "mixtral", "llama",
    )  # fmt: skip
    assert [
        (each["name"], each["source"], each["weight"], sum(each["types"].values())) for each in said["experts"]
    ] == [("x", "e1", 1.0, 6)]
    if not flags:
        assert said["bytes"] == path.stat().st_size
        assert said["requantised"]["weights"] == 0
    table = {"base": base, "experts": [{"name": "x", "source": str(family(KIND).experts[0])}]}
    report = moegguf.build(table, quant="Q4_0", output=tmp_path / "same.gguf", dry_run=bool(flags))
    assert report.plan.n_bytes == said["bytes"] == (report.built.n_bytes if report.built else said["bytes"])
    assert report.memory.total == said["memory"]["total"]
    assert list(report.notes) == said["notes"]
    assert (tmp_path / "same.gguf").exists() == path.exists() == (not flags)


def test_force_replaces_the_file(build):
    first = build("--quant", "F16").read_bytes()
    second = build("--quant", "Q8_0", "--force").read_bytes()
    assert len(second) < len(first)


@pytest.fixture
def recipes(family, tmp_path) -> Path:
    """A recipes file whose sources are relative to it, in a folder of its own."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    models = family(KIND)
    for name, target in (("base", models.base), ("one", models.experts[0]), ("two", models.experts[1])):
        (folder / name).symlink_to(target)
    path = folder / "my.toml"
    path.write_text(
        "[mix.mine]\nbase = './base'\nquant = { preset = 'Q8_0', attn = 'F16' }\n"
        "router = { mode = 'noisy', k = 1, std = 0.5, seed = 5 }\noutput = 'mine.gguf'\n"
        "experts = [{ name = 'one', source = 'one' }, { name = 'two', source = './two' }]\n"
    )
    return path


def test_a_recipe_is_built_from_anywhere_and_written_here(recipes, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["build", "mine", "--recipes", str(recipes)]) == 0
    assert [path.name for path in here.iterdir()] == ["mine.gguf"]
    card = card_of(here / "mine.gguf")
    assert (card.name, card.router, card.k, card.seed, card.quant) == ("mine", "noisy", 1, 5, "Q8_0")
    assert [expert.name for expert in card.experts] == ["one", "two"]


def test_a_path_in_a_flag_is_relative_to_here_and_one_in_the_recipe_to_its_file(recipes, family, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "three").symlink_to(family(KIND).experts[2])
    monkeypatch.chdir(here)
    argv = ["build", "mine", "--recipes", str(recipes), "--expert", "a=three", "--expert", "b=two"]
    assert main([*argv, "-o", "m.gguf"]) == 0
    assert [expert.source for expert in card_of(here / "m.gguf").experts] == ["e3", "e2"]


def test_a_flag_changes_its_own_key_of_a_recipe_and_no_other(recipes, tmp_path):
    path = tmp_path / "m.gguf"
    flags = ["--seed", "6", "--quant", "F16", "--quant-role", "embed=F32"]
    assert main(["build", "mine", "--recipes", str(recipes), "-o", str(path), *flags]) == 0
    card = card_of(path)
    assert (card.k, card.std, card.seed, card.quant) == (1, 0.5, 6, "F16")
    types = {name: tensor.type.name for name, tensor in read_tensors(path).items()}
    assert (types["token_embd.weight"], types["blk.0.attn_q.weight"]) == ("F32", "F16")


def test_another_router_replaces_that_of_a_recipe(recipes, tmp_path):
    path = tmp_path / "m.gguf"
    assert main(["build", "mine", "--recipes", str(recipes), "-o", str(path), "--router", "gateless"]) == 0
    assert (card_of(path).router, card_of(path).k) == ("gateless", 2)


def test_requantising_is_announced_with_its_cost_and_copying_is_not(build, tmp_path, capsys):
    dense = build("--layout", "fused", "--quant", "Q8_0", name="dense")
    argv = ["build", "--base", str(dense), "--expert", f"a={dense}", "-o", str(tmp_path / "again.gguf"), "--force"]
    capsys.readouterr()
    assert main([*argv, "--quant", "Q8_0"]) == 0
    assert "requantised" not in capsys.readouterr().out
    assert main([*argv, "--quant", "Q5_0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "quantised already (Q8_0)" in out
    assert "Q8_0 → Q5_0" in out
    assert "relative error" in out


# --- JSON ---


@pytest.mark.parametrize("argv", [["recipes", "--json"], ["doctor", "--json"]], ids=" ".join)
def test_json_is_all_that_json_commands_print(argv, capsys):
    code = main(argv)
    out, err = capsys.readouterr()
    assert code in (0, 1)
    assert err == ""
    assert json.loads(out)


@pytest.mark.parametrize("flags", [[], ["--check"]], ids=str)
def test_the_json_of_inspect_agrees_with_the_file(flags, build, capsys):
    path = build("--quant", "Q8_0")
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(path)
    assert report["bytes"] == path.stat().st_size
    assert report["n_expert"] == read_metadata(path, "llama.expert_count")["llama.expert_count"] == 3
    assert ("faults" in report) == bool(flags)
