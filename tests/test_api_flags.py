"""What a function of the API takes is what the flags of its command say, with the same defaults; and nothing else."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moegguf
from moegguf.cli import COMMANDS
from moegguf.commands.options import add_device_arguments, add_memory_arguments, run_options
from moegguf.runtime.sampling import SETTINGS

NOT_OFFERED = {"completion"}  # of a shell
CALLED = {"chat": "open"}
RENAMED = {"file": "path", "model": "path", "force": "overwrite"}
RENAMED_OF = {
    "calibrate": {"model": "model"},
    "export ollama": {"no_create": "create", "parameter": "parameters"},
    "measure": {"no_cache": "keep"},
    "serve": {"adapter": "adapters", "api_key_file": "api_key"},
}
NOT_TAKEN = {
    "build": {  # keys of a recipe, and parts of them
        "base", "expert", "weight", "router", "k", "std", "seed", "shared_router", "always_on", "domain", "mix",
        "layers", "trunk", "compact", "layout", "quant", "quant_role", "quant_tensor", "budget", "bpw", "split", "plan",
        "round_types", "imatrix", "output",
    },
    "bench": {"save", "force"},
    "chat": {"prompt", "stats", "engine", "recipes", *SETTINGS},
    "eval": {"save", "details", "chart", "force"},  # as_json and draw of what it returns
    "inspect": {"check"},
    "route map": {"save"},
    "swap": {"in_place"},  # where there is no output
    "worker": {"verbose"},
}  # fmt: skip
NOT_FLAGS = {"keys", "on_plan", "quiet", "sampling", "should_stop", "watch"}
OF_OPTIONS = {"adapter", "batch", "ctx", "experts_used", "threads", "verbose"}


def functions() -> dict[str, Callable[..., Any]]:
    """Those of every command, and what no command is called like."""
    found = {name: attrgetter(CALLED.get(name, name).replace(" ", "."))(moegguf) for name in commands()}
    return {**found, "check": moegguf.check}


def commands() -> dict[str, Any]:
    modules = {
        name: importlib.import_module(f"moegguf.commands.{name}") for name in COMMANDS if name not in NOT_OFFERED
    }
    for name, module in [*modules.items()]:
        if hasattr(module, "COMMANDS"):
            del modules[name]
            for second in module.COMMANDS:
                modules[f"{name} {second}"] = importlib.import_module(f"moegguf.commands.{name}.{second}")
    return modules


def flags(add: Callable[[argparse.ArgumentParser], None]) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return {action.dest: action for action in parser._actions}


@pytest.mark.parametrize("name", commands())
def test_a_function_takes_what_the_flags_say_with_the_same_defaults(name):
    parameters = inspect.signature(functions()[name]).parameters
    asked = flags(commands()[name].add_arguments)
    left_out = NOT_TAKEN.get(name, set()) | {"json"}
    if "options" in parameters or "offload" in parameters:
        left_out |= flags(add_device_arguments).keys()
    if "options" in parameters:
        left_out |= flags(add_memory_arguments).keys() | (OF_OPTIONS - RENAMED_OF.get(name, {}).keys())
    assert NOT_TAKEN.get(name, set()) <= asked.keys()
    names = RENAMED | RENAMED_OF.get(name, {})
    taken = {names.get(flag, flag): action for flag, action in asked.items() if flag not in left_out}
    assert taken.keys() == parameters.keys() - NOT_FLAGS - {"options", "offload"}
    for parameter, action in taken.items():
        default = parameters[parameter].default
        if default is inspect.Parameter.empty:
            assert action.required or name == "build", parameter  # which has flags in place of a recipe
        elif action.dest.startswith("no_"):
            assert default is not action.default
        else:
            shown = Path(default) if isinstance(action.default, Path) else default
            assert (shown or None) == (action.default or None), parameter


@pytest.mark.parametrize(
    "name", [name for name, each in functions().items() if "options" in str(inspect.signature(each))]
)
def test_options_are_those_of_a_command_without_flags(name):
    parser = argparse.ArgumentParser()
    for flag in OF_OPTIONS:
        parser.add_argument(f"--{flag}")
    add_device_arguments(parser)
    add_memory_arguments(parser)
    assert run_options(parser.parse_args([])) == inspect.signature(functions()[name]).parameters["options"].default


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    """Something for what must be given."""
    folder = tmp_path_factory.mktemp("kinds")
    mix = moegguf.build("demo", output=folder / "demo.gguf").path
    return {
        "path": mix, "model": mix, "models": mix, "against": mix, "recipe": "demo", "output": folder / "none.gguf",
        "experts": {"math": "demo:math"}, "max_size": "1GB", "router": "noisy",
    }  # fmt: skip


@pytest.mark.parametrize("name", functions())
def test_a_value_of_another_kind_is_told_by_the_name_of_its_keyword(name, given):
    function = functions()[name]
    parameters = inspect.signature(function).parameters.values()
    given = {**given, **({"experts": ["math"]} if name == "drop" else {})}
    must = {each.name: given[each.name] for each in parameters if each.default is each.empty and each.name in given}
    for each in parameters:
        if each.kind is not each.VAR_KEYWORD:
            of_files = any(kind in each.annotation for kind in ("Location", "Models", "Texts"))
            with pytest.raises(moegguf.UserError, match=None if of_files else rf"^{each.name} .*expected"):
                function(**{**must, each.name: object()}).__enter__()
    assert not given["output"].exists()


def test_what_is_nearly_true_replaces_no_file(given):
    for overwrite in ("no", None, 1):
        with pytest.raises(moegguf.UserError, match=r"overwrite .*expected bool"):
            moegguf.build("demo", output=given["path"], overwrite=overwrite)


def test_numbers_of_numpy_are_numbers(given):
    mine = moegguf.RunOptions(ctx=np.int64(128), offload=moegguf.Offload(tensor_split=np.float32([1, 3]).tolist()))
    assert mine == moegguf.RunOptions(ctx=128, offload=moegguf.Offload(tensor_split=(1, 3)))
    assert type(mine.ctx) is int
    mix = given["path"]
    rooms = [moegguf.plan(mix, vram=vram, ram="4GB").room for vram in (np.int64(8 << 30), 8 << 30)]
    assert rooms[0] == rooms[1]
    with pytest.raises(moegguf.UserError, match=r"expected int \| None"):
        moegguf.RunOptions(ctx=True)


def test_a_path_that_is_none_is_told():
    for path in ("", "a\0b", b"mix.gguf", 5):
        with pytest.raises(moegguf.UserError, match=r"^path "):
            moegguf.inspect(path)
    with pytest.raises(moegguf.UserError, match="cannot be read"):
        moegguf.inspect(".")


def test_what_comes_back_can_be_shown(tmp_path):
    assert len(repr(moegguf.build("demo", output=tmp_path / "mix.gguf"))) < 20_000
