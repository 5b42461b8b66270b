"""`moegguf.eval`, `measure` and `train` take what the flags of their commands say, with the same defaults."""

from __future__ import annotations

import argparse
import importlib
from inspect import signature

import pytest

import moegguf
from moegguf.commands.options import add_device_arguments

RENAMED = {"no_cache": "keep", "force": "overwrite"}
NOT_TAKEN = {
    "eval": {"json", "save", "details", "chart", "force"},  # as_json and draw of what it returns
    "measure": {"json"},
    "train": {"json"},
}
NOT_FLAGS = {"eval": {"offload", "watch"}, "measure": {"offload", "watch"}, "train": {"watch", "should_stop"}}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_function_takes_what_the_flags_say_with_the_same_defaults(name):
    parser, devices = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"moegguf.commands.{name}").add_arguments(parser)
    add_device_arguments(devices)
    flags = {action.dest: action.default for action in parser._actions}
    if "offload" in NOT_FLAGS[name]:
        for action in devices._actions:
            del flags[action.dest]
    parameters = {
        parameter.name: parameter.default for parameter in signature(getattr(moegguf, name)).parameters.values()
    }
    taken = {RENAMED.get(flag, flag): default for flag, default in flags.items() if flag not in NOT_TAKEN[name]}
    assert set(taken) == set(parameters) - NOT_FLAGS[name]
    for parameter, default in taken.items():
        if parameter not in ("keep", *(action.dest for action in parser._actions if action.required)):
            assert (parameters[parameter] or None) == (default or None), parameter
