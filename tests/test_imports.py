"""The import law: which rooms may know of which. Read from the source, so lazy imports count too.

Modules are named without the package, `sources.hf`, and a room stands for all that is in it: `sources`. What is
imported from elsewhere has a colon in front: `:numpy`.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import moegguf

PACKAGE = Path(moegguf.__file__).parent
BUILD_SIDE = (
    "allocation", "assembly", "assign", "demo", "drift", "edit", "estimate", "exporting", "families", "inspection",
    "layouts", "licences", "mix", "quant", "recipe", "reference", "routers", "sources", "splitting", "tensor", "writer",
)  # fmt: skip
RUNTIME = ("runtime",)
MEASURE = ("measurement",)
"""Numbers and pictures of what was run; knows neither side."""
COMMON = (
    "__init__", "atomic", "checks", "errors", "gguf_header", "interrupt", "journal", "kinds", "leaving", "metadata",
    "sizes", "squares", "stores", "texts", "watch",
)  # fmt: skip
"""What both sides use."""
JOBS = ("jobs",)
"""What needs several sides for one purpose; used by commands, and by each other."""
ENDS = ("__main__", "api", "cli", "commands")
"""Where users come in."""


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that `module` imports; ours without the package's name, others with a leading colon."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name.removeprefix("moegguf.") if name.startswith("moegguf.") else f":{name}" for name in found)


def is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def importers(*rooms: str) -> set[str]:
    """The modules that import anything in `rooms`."""
    return {module for module in MODULES if any(is_in(name, rooms) for name in imports(module))}


def outside(modules: set[str], *rooms: str) -> list[str]:
    return sorted(module for module in modules if not is_in(module, rooms))


def calls(module: str, *names: str) -> bool:
    """Whether a module calls any of `names`, written out as `print` or `sys.exit`."""
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) in names for node in ast.walk(tree(module)))


def test_every_module_is_in_a_room():
    rooms = (*BUILD_SIDE, *RUNTIME, *MEASURE, *COMMON, *JOBS, *ENDS)
    assert outside(set(MODULES), *rooms) == []
    for room in rooms:
        assert any(is_in(module, (room,)) for module in MODULES), room


def test_nothing_imports_a_command_but_its_shared_flags_and_only_the_entry_imports_the_command_line():
    assert outside(importers("commands"), "commands") == []
    imported = {name for module in MODULES for name in imports(module) if is_in(name, ("commands",))}
    assert outside(imported, "commands.options", "commands.output", "commands.progress", "commands.changes") == []
    assert importers("cli") <= {"__main__"}


def test_build_side_and_runtime_never_import_each_other():
    """They meet in files, in the commands, and where a fit or an engine needs both."""
    assert outside(importers(*BUILD_SIDE), *BUILD_SIDE, *JOBS, *ENDS) == ["texts"]  # the demo family's questions
    assert outside(importers(*RUNTIME), *RUNTIME, *JOBS, *ENDS) == []
    assert outside(importers(*MEASURE), *MEASURE, *JOBS, *ENDS) == []
    assert outside(importers(*JOBS), *JOBS, *ENDS) == []


def test_only_ggml_and_the_runtime_know_ctypes_and_llama_cpp():
    assert outside(importers(":ctypes"), "quant.ggml", "runtime") == []
    assert outside(importers(":llama_cpp"), "runtime") == []


def test_only_training_knows_torch():
    heavy = (":torch", ":transformers", ":peft", ":accelerate", ":datasets")
    assert outside(importers(*heavy), "demo.train", "reference") == []


def test_only_commands_print_and_exit():
    talkers = importers(":rich", ":argparse") | {
        module for module in MODULES if calls(module, "print", "input", "exit", "sys.exit", "os._exit")
    }
    assert outside(talkers, *ENDS) == ["leaving"]  # of a process that C code would abort or keep for ever
    assert outside(importers("leaving"), *ENDS) == ["runtime.serve.own_server"]


def test_nothing_unpickles_or_evaluates():
    assert importers(":pickle", ":marshal", ":shelve", ":runpy") == set()
    assert [module for module in MODULES if calls(module, "eval", "exec", "compile")] == []


def test_training_is_imported_by_nothing():
    assert importers("demo.train") == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_import_leads_back(module: str):
    """Dependencies are one-way: following a module's imports never returns to it."""
    seen: set[str] = set()
    todo = reached(module)
    while todo:
        current = todo.pop()
        assert current != module, f"{module} is imported by what it imports"
        if current not in seen:
            seen.add(current)
            todo |= reached(current)


def reached(module: str) -> set[str]:
    """Our modules that `module` imports, the packages around them left out: those are imported by Python itself."""
    names = imports(module)
    modules = {name if name in MODULES else name.rpartition(".")[0] for name in names if not name.startswith(":")}
    return {name for name in modules if name in MODULES}
