"""Recipes: what a table means, and every fault of it reported together, each with its file, key, value and mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.quant.presets import preset_names
from moegguf.recipe import (
    Layout,
    Recipe,
    Role,
    RouterMode,
    RouterSpec,
    find_recipes_file,
    load_recipe,
    load_tables,
    parse_recipe,
)

PREFIX = "moegguf: error: "
A, B, C = ({"name": name, "source": f"./{name}"} for name in "abc")
PAIR = {"base": "./base", "experts": [A, B]}
TRIO = {"base": "./base", "experts": [A, B, C]}
NOISY = {"mode": "noisy", "k": 2}


def recipe(**table: object) -> Recipe:
    return parse_recipe("m", PAIR | table, where="r.toml: [mix.m]", folder=Path())


def faults(**table: object) -> list[str]:
    """What is wrong with a recipe of two experts, changed by `table`; None takes a key away."""
    merged = {key: value for key, value in (PAIR | table).items() if value is not None}
    with pytest.raises(UserError) as raised:
        parse_recipe("m", merged, where="r.toml: [mix.m]", folder=Path())
    lines = [str(fault) for fault in raised.value.faults]
    assert all(line.startswith("r.toml: [mix.m] ") and "; " in line for line in lines)
    return [line.removeprefix("r.toml: [mix.m] ") for line in lines]


# --- what a recipe means ---


def test_the_least_recipe_is_an_equal_gateless_mix_in_the_mixtral_layout():
    found = recipe()
    assert found.router == RouterSpec(RouterMode.GATELESS, k=2)
    assert [(e.name, e.source, e.weight, e.quant) for e in found.experts] == [
        ("a", "./a", 0.5, "Q4_K_M"),
        ("b", "./b", 0.5, "Q4_K_M"),
    ]
    assert (found.layout, found.quant.preset, found.output) == (Layout.MIXTRAL, "Q4_K_M", Path("m-Q4_K_M.gguf"))


def test_every_key_arrives_where_it_belongs():
    found = recipe(
        **TRIO,
        router={"mode": "noisy", "k": 3, "std": 1, "seed": 2**32 - 1},
        always_on="b",
        quant={"preset": "q6_k", "attn": "q8_0", "tensors": {"ffn_up": "F16"}},
        output="out/x.gguf",
        description="words",
        license="mit",
    )
    assert found.router == RouterSpec(RouterMode.NOISY, 3, 1.0, 2**32 - 1, "b")
    assert found.layout is Layout.SHARED
    assert (found.quant.preset, found.quant.roles, found.quant.tensors) == (
        "Q6_K", {Role.ATTN: Type.Q8_0}, {"ffn_up": Type.F16},
    )  # fmt: skip
    assert (found.output, found.description, found.license) == (Path("out/x.gguf"), "words", "mit")


def test_weights_stay_as_given():
    found = recipe(experts=[A | {"weight": 0.75}, B | {"weight": 0.25}])
    assert [expert.weight for expert in found.experts] == [0.75, 0.25]
    assert recipe(experts=[A | {"weight": 1}]).experts[0].weight == 1.0
    third = 1 / 3
    assert recipe(experts=[e | {"weight": round(third, 7)} for e in (A, B, C)]).experts[0].weight == round(third, 7)


@pytest.mark.parametrize(
    ("table", "layout"),
    [
        ({"layout": "auto"}, Layout.FUSED),
        ({"layout": "auto", "router": NOISY}, Layout.MIXTRAL),
        ({"layout": "auto", "router": NOISY, "always_on": "a"}, Layout.SHARED),
        ({"layout": "shared"}, Layout.SHARED),
        ({"router": NOISY}, Layout.MIXTRAL),
        ({"router": NOISY, "always_on": "a"}, Layout.SHARED),
        ({"experts": [A | {"quant": "Q8_0"}, B]}, Layout.SHARED),
        ({"experts": [A | {"quant": "Q8_0"}, B], "layout": "auto"}, Layout.SHARED),
        ({"experts": [A | {"quant": "Q8_0"}, B, C], "router": NOISY, "always_on": "a"}, Layout.SHARED),
        ({"experts": [A | {"quant": "q4_k"}, B]}, Layout.MIXTRAL),  # another name of the default
    ],
)
def test_the_layout_follows_from_the_rest(table, layout):
    assert recipe(**table).layout is layout


def test_k_never_exceeds_the_experts_by_default():
    assert recipe(experts=[A], router="noisy").router.k == 1
    assert recipe(**TRIO, router="noisy").router.k == 2


# --- faults ---

PRESETS = preset_names()
FAULTS = {
    # table → key, found, allowed
    "no base": ({"base": None}, "base", "nothing", "a non-empty string"),
    "base of no name": ({"base": 5}, "base", "5", "a non-empty string"),
    "empty base": ({"base": " "}, "base", "' '", "a non-empty string"),
    "base with a zero byte": ({"base": "a\0b"}, "base", "'a\\x00b'", "a non-empty string"),
    "no experts": ({"experts": None}, "experts", "nothing", "a list of { name = …, source = … }, at least one"),
    "empty experts": ({"experts": []}, "experts", "[]", "at least one"),
    "experts as a table": ({"experts": {"a": "./a"}}, "experts", "{'a': './a'}", "a list of"),
    "experts as words": ({"experts": ["./a"]}, "experts", "['./a']", "a list of"),
    "expert without name": ({"experts": [{"source": "./a"}]}, "experts[0].name", "nothing", "a non-empty string"),
    "expert without source": ({"experts": [A, {"name": "b"}]}, "experts[1].source", "nothing", "a non-empty string"),
    "expert name with a blank": ({"experts": [A | {"name": "a b"}]}, "experts[0].name", "'a b'", "letters, digits"),
    "expert name with a dash first": ({"experts": [A | {"name": "-a"}]}, "experts[0].name", "'-a'", "letters, digits"),
    "expert name twice": ({"experts": [A, B, A]}, "experts[2].name", "'a'", "a name that no other expert has"),
    "unknown key": ({"expert": []}, "expert", "[]", "only the keys base, trunk, experts, mix, layers, router,"),
    "unknown key of an expert": (
        {"experts": [A | {"wieght": 1}]},
        "experts[0].wieght",
        "1",
        "name, source, weight, quant",
    ),
    "unknown key of gateless": ({"router": {"mode": "gateless", "k": 2}}, "router.k", "2", "only with mode noisy"),
    "unknown key of noisy": ({"router": NOISY | {"sdt": 1}}, "router.sdt", "1", "mode, k, std, seed"),
    "unknown key of quant": (
        {"quant": {"ffn": "Q8_0"}},
        "quant.ffn",
        "'Q8_0'",
        "preset, budget, bpw, plan, embed, output, attn, experts, tensors",
    ),
    "unknown router": ({"router": "gate-less"}, "router", "'gate-less'", "gateless, noisy"),
    "unknown router mode": ({"router": {"mode": "Noisy"}}, "router.mode", "'Noisy'", "gateless, noisy"),
    "router without mode": ({"router": {"k": 2}}, "router.mode", "nothing", "gateless, noisy"),
    "router that is a number": ({"router": 2}, "router", "2", "gateless, noisy"),
    "router that is a list": ({"router": ["noisy"]}, "router", "['noisy']", "gateless, noisy"),
    "unknown layout": ({"layout": "fuzed"}, "layout", "'fuzed'", "mixtral, fused, shared, auto"),
    "layout that is a table": ({"layout": {}}, "layout", "{}", "mixtral, fused, shared, auto"),
    "k past the experts": ({"router": {"mode": "noisy", "k": 3}}, "router.k", "3", "an integer from 1 to 2"),
    "k of zero": ({"router": {"mode": "noisy", "k": 0}}, "router.k", "0", "an integer from 1 to 2"),
    "k in words": ({"router": {"mode": "noisy", "k": "2"}}, "router.k", "'2'", "an integer"),
    "k as true": ({"router": {"mode": "noisy", "k": True}}, "router.k", "True", "an integer"),
    "k as a fraction": ({"router": {"mode": "noisy", "k": 1.5}}, "router.k", "1.5", "an integer"),
    "std of zero": ({"router": NOISY | {"std": 0}}, "router.std", "0", "a number from 1e-06 to 10"),
    "negative std": ({"router": NOISY | {"std": -0.1}}, "router.std", "-0.1", "a number from 1e-06 to 10"),
    "std that is NaN": ({"router": NOISY | {"std": float("nan")}}, "router.std", "nan", "a number from 1e-06 to 10"),
    "endless std": ({"router": NOISY | {"std": float("inf")}}, "router.std", "inf", "a number from 1e-06 to 10"),
    "negative seed": ({"router": NOISY | {"seed": -1}}, "router.seed", "-1", "an integer from 0 to 4294967295"),
    "huge seed": ({"router": NOISY | {"seed": 2**32}}, "router.seed", "4294967296", "an integer from 0 to 4294967295"),
    "seed in words": ({"router": NOISY | {"seed": "0"}}, "router.seed", "'0'", "an integer"),
    "always_on of nobody": ({"router": NOISY, "always_on": "z"}, "always_on", "'z'", "a, b"),
    "always_on as a list": ({"router": NOISY, "always_on": ["a"]}, "always_on", "['a']", "a, b"),
    "always_on alone": (
        {"router": {"mode": "noisy", "k": 1}, "always_on": "a"},
        "router.k",
        "1",
        "at least 2 with always_on",
    ),
    "always_on without a router": ({"always_on": "a"}, "always_on", "'a'", "only a router that picks k experts"),
    "fused with a router": ({"router": NOISY, "layout": "fused"}, "layout", "'fused'", "mixtral with a router"),
    "shared with a router": ({"router": NOISY, "layout": "shared"}, "layout", "'shared'", "mixtral with a router"),
    "mixtral with always_on": (
        {"router": NOISY, "always_on": "a", "layout": "mixtral"},
        "layout",
        "'mixtral'",
        "shared with always_on",
    ),
    "mixtral with two precisions": (
        {"experts": [A, B | {"quant": "Q8_0"}], "layout": "mixtral"},
        "layout",
        "'mixtral'",
        "shared with two precisions",
    ),
    "fused with two precisions": (
        {"experts": [A, B | {"quant": "Q8_0"}], "layout": "fused"},
        "layout",
        "'fused'",
        "shared with two precisions",
    ),
    "two precisions with a router": (
        {"experts": [A, B | {"quant": "Q8_0"}], "router": NOISY},
        "experts.quant",
        "['Q4_K_M', 'Q8_0']",
        "one for all experts",
    ),
    "a precision of another than always_on": (
        {"experts": [A, B | {"quant": "Q8_0"}, C], "router": NOISY, "always_on": "a"},
        "experts.quant",
        "['Q4_K_M', 'Q8_0']",
        "one for the always-on expert and one for all others",
    ),
    "three precisions": (
        {"experts": [A | {"quant": "Q8_0"}, B | {"quant": "Q6_K"}, C]},
        "experts.quant",
        "['Q8_0', 'Q6_K', 'Q4_K_M']",
        "two different ones",
    ),
    "output of another kind": ({"output": "mix.bin"}, "output", "'mix.bin'", "a name that ends in .gguf"),
    "output that is a number": ({"output": 3}, "output", "3", "a non-empty string"),
    "description that is a list": ({"description": ["a"]}, "description", "['a']", "a string"),
    "patterns as a list": ({"quant": {"tensors": ["ffn"]}}, "quant.tensors", "['ffn']", "a table of REGEX = TYPE"),
    "a pattern that is none": ({"quant": {"tensors": {"a(": "Q8_0"}}}, "quant.tensors", "'a('", "a regular expression"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line_with_key_found_and_allowed(case):
    table, key, found, allowed = FAULTS[case]
    (line,) = faults(**table)
    assert line.startswith(f"{key}: found {found}, allowed ")
    assert allowed in line


WEIGHTS = {
    "too much": (
        [0.5, 0.6],
        "experts.weight: found [0.5, 0.6], allowed weights that add up to 1 (these add up to 1.1)",
    ),
    "too little": ([0.5, 0.4], "these add up to 0.9"),
    "one missing": ([0.5, None], "experts[1].weight: found nothing, allowed a number from 1e-06 to 1"),
    "negative": ([-0.5, 1], "experts[0].weight: found -0.5, allowed a number"),
    "zero": ([0, 1], "experts[0].weight: found 0, allowed a number"),
    "more than one": ([0.5, 1.5], "experts[1].weight: found 1.5, allowed a number"),
    "words": (["0.5", 0.5], "experts[0].weight: found '0.5', allowed a number"),
    "true": ([True, 0.5], "experts[0].weight: found True, allowed a number"),
    "NaN": ([float("nan"), 0.5], "experts[0].weight: found nan, allowed a number"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weight_that_cannot_be_is_the_only_fault_reported(case):
    weights, says = WEIGHTS[case]
    experts = [e if w is None else e | {"weight": w} for e, w in zip((A, B), weights, strict=True)]
    (line,) = faults(experts=experts)
    assert says in line
    assert "adding up to 1" in line


def test_weights_are_for_gateless_mixes_only():
    (line,) = faults(experts=[A | {"weight": 0.75}, B | {"weight": 0.25}], router="noisy")
    assert line.startswith("experts.weight: found [0.75, 0.25], allowed only with router gateless")


@pytest.mark.parametrize("value", ["Q4_K_XL", "", 4, True, ["Q8_0"], None], ids=repr)
@pytest.mark.parametrize("key", ["quant", "quant.preset", "experts[0].quant", "quant.attn"])
def test_an_unknown_quant_lists_the_known_ones(key, value):
    table = {
        "quant": {"quant": {} if value is None else value},
        "quant.preset": {"quant": {"preset": value}},
        "experts[0].quant": {"experts": [A | {"quant": value}, B]},
        "quant.attn": {"quant": {"attn": value}},
    }[key]
    if key == "quant" and value is None:
        assert recipe(**table).quant.preset == "Q4_K_M"
        return
    line = faults(**table)[0]
    assert line.startswith(f"{key}: unknown ")
    assert repr(str(value)) in line
    assert "choose one of" in line
    assert "Q8_0" in line


def test_all_faults_of_a_recipe_are_reported_together():
    lines = faults(
        base=7,
        nonsense=1,
        experts=[A | {"quant": "Q9"}, A | {"extra": 1}, {"name": "c"}],
        router={"mode": "noisy", "k": 4, "std": -1, "seed": "x", "temperature": 1},
        always_on="nobody",
        layout="fussed",
        quant={"preset": "Q4_K_XL", "attn": "Q1", "norms": "F32", "tensors": {"(": "F16"}},
        output="mix.txt",
        license=3,
    )
    keys = [line.partition(":")[0] for line in lines]
    assert sorted(keys) == sorted([
        "base", "nonsense", "experts[0].quant", "experts[1].name", "experts[1].extra", "experts[2].source",
        "router.k", "router.std", "router.seed", "router.temperature", "always_on", "layout",
        "quant.preset", "quant.attn", "quant.norms", "quant.tensors", "output", "license",
    ])  # fmt: skip


# --- files ---


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(text, *argv)`: the lines of a command that must fail with this recipes file."""

    def run(content: bytes | str, *argv: str) -> list[str]:
        path = tmp_path / "r.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = argv or ("recipes",)
        assert main([*argv, "--recipes", str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith(f"{PREFIX}{path}: ") and "; " in line for line in lines)
        assert [entry.name for entry in tmp_path.iterdir()] == ["r.toml"]
        return [line.removeprefix(f"{PREFIX}{path}: ") for line in lines]

    return run


FILES = {
    "no TOML": ("[mix.a\n", "is no valid TOML", "line 1"),
    "a key twice": ("[mix.a]\nbase='a'\nbase='b'\n", "is no valid TOML", "line 3"),
    "no text": (b"\xff\xfe[mix.a]", "is no valid TOML", "utf-8"),
    "nested too deep": ("a = " + "[" * 100_000, "is no valid TOML", ""),
    "numbers of 5,000 digits": ("a = " + "9" * 5000, "is no valid TOML", ""),
    "other tables": ("[mixes.a]\nbase='a'\n[seed]\n", "unknown key mixes, seed", "[mix.NAME]"),
    "a mix that is no table": ("mix = 3", "mix is no table of tables", "[mix.NAME]"),
    "a recipe that is no table": ("[mix]\na = 3", "mix is no table of tables", "[mix.NAME]"),
    "many recipes": ("[[mix]]\nbase='a'", "mix is no table of tables", "[mix.NAME]"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("argv", [("recipes",), ("build", "a")], ids=" ".join)
def test_a_recipes_file_that_is_none_is_refused(argv, case, refused):
    content, *says = FILES[case]
    (line,) = refused(content, *argv)
    assert all(fragment in line for fragment in says)


def test_an_unknown_recipe_lists_the_known_ones(refused):
    assert refused("[mix.a]\n[mix.b]\n", "build", "c")[0].startswith("has no recipe 'c', only a, b")
    assert refused("", "build", "c")[0].startswith("has no recipe 'c', only none")


def test_faults_of_all_recipes_of_a_file_are_reported_with_their_recipe(refused):
    content = (
        "[mix.a]\nbase = 'b'\nexperts = []\n[mix.'b c']\nlayout = 'x'\nbase = 'b'\nexperts = [{name='a', source='a'}]\n"
    )
    lines = refused(content)
    assert [line.partition(":")[0] for line in lines] == ["[mix.a] experts", "[mix.b c] layout"]


@pytest.mark.parametrize("name", ["absent.toml", ".", "x" * 300], ids=["absent", "folder", "long"])
def test_a_recipes_file_that_cannot_be_read_is_named(name, tmp_path, capsys):
    path = tmp_path / name
    for argv in (["recipes"], ["build", "a"]):
        assert main([*argv, "--recipes", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"{PREFIX}{path}: cannot be read (")


def test_every_recipe_that_ships_is_sound(capsys):
    path = find_recipes_file()
    names = list(load_tables(path))
    assert {"demo", "demo-noisy", "merlinite-2x", "merlinite-4x", "laptop"} <= set(names)
    assert main(["recipes", "--json"]) == 0
    assert [shown["name"] for shown in json.loads(capsys.readouterr().out)] == names
    assert main(["recipes"]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_recipes_show_what_is_in_a_file_as_it_is(tmp_path, capsys):
    path = tmp_path / "r.toml"
    experts = "experts = [{name = 'a', source = './a', weight = 0.25}, {name = 'b', source = './b', weight = 0.75}]"
    path.write_text(f"[mix.'x[/y]']\ndescription = \"[bold]\\u001b[2J\"\nbase = './[base]'\n{experts}\n")
    assert main(["recipes", "--recipes", str(path)]) == 0
    out = capsys.readouterr().out
    assert "x[/y]  [bold]\\x1b[2J" in out
    assert "2 experts (a, b) in ./[base]; gateless, mixtral, Q4_K_M" in out
    assert main(["recipes", "--recipes", str(path), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown == {
        "name": "x[/y]", "description": "[bold]\x1b[2J", "base": "./[base]", "router": "gateless", "k": 2,
        "layout": "mixtral", "quant": "Q4_K_M", "output": "x[/y]-Q4_K_M.gguf",
        "experts": [{"name": "a", "source": "./a", "weight": 0.25, "quant": "Q4_K_M"},
                    {"name": "b", "source": "./b", "weight": 0.75, "quant": "Q4_K_M"}],
    }  # fmt: skip


# --- flags on top of a recipe ---

ON_DISK = """
[mix.m]
base = "./base"
router = { mode = "noisy", k = 2, std = 0.5, seed = 7 }
quant = { preset = "Q6_K", attn = "Q8_0", tensors = { "ffn_up" = "F16", "ffn" = "F32" } }
experts = [{ name = "a", source = "./a" }, { name = "b", source = "./b" }, { name = "c", source = "./c" }]
"""


@pytest.fixture
def loaded(tmp_path):
    """`loaded(**overrides)`: the recipe on disk with these flags on top."""
    path = tmp_path / "r.toml"
    path.write_text(ON_DISK)
    return lambda **overrides: load_recipe("m", path, overrides)


def test_paths_of_a_recipe_are_relative_to_its_file(loaded, tmp_path):
    assert loaded().folder == tmp_path


def test_a_flag_of_the_router_changes_that_alone(loaded):
    assert loaded(router={"mode": "noisy", "seed": 8}).router == RouterSpec(RouterMode.NOISY, 2, 0.5, 8)
    assert loaded(router="noisy").router == RouterSpec(RouterMode.NOISY, 2, 0.5, 7)


def test_another_router_mode_drops_the_parameters_of_the_old_one(loaded):
    assert loaded(router="gateless").router == RouterSpec(RouterMode.GATELESS, 3)


def test_experts_of_flags_replace_those_of_the_recipe_and_leave_the_texts_of_the_others(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        '[mix.m]\nbase = "b"\nexperts = [{name = "x", source = "x"}, {name = "y", source = "y"}]\n'
        'domains = {x = "x.txt", y = "y.txt"}\n'
    )
    experts = [{"name": "y", "source": "other"}, {"name": "z", "source": "z"}]
    recipe = load_recipe("m", path, {"experts": experts})
    assert (recipe.expert_names, recipe.domains) == (("y", "z"), {"y": ("y.txt",)})


def test_a_flag_of_the_quant_changes_that_alone(loaded):
    assert (loaded(quant="Q8_0").quant.preset, loaded(quant="Q8_0").quant.roles) == ("Q8_0", {Role.ATTN: Type.Q8_0})
    roles = {"attn": "F16", "embed": "F32"}
    assert loaded(quant=roles).quant.roles == {Role.ATTN: Type.F16, Role.EMBED: Type.F32}
    assert loaded(quant=roles).quant.preset == "Q6_K"


def test_a_pattern_of_a_flag_comes_before_those_of_the_recipe(loaded):
    found = loaded(quant={"tensors": {"ffn_u": "Q8_0", "ffn": "BF16"}}).quant.tensors
    assert list(found.items()) == [("ffn_u", Type.Q8_0), ("ffn", Type.BF16), ("ffn_up", Type.F16)]


def test_a_flag_on_a_plain_value_keeps_it(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(ON_DISK.replace('{ mode = "noisy", k = 2, std = 0.5, seed = 7 }', '"noisy"'))
    assert load_recipe("m", path, {"router": {"mode": "noisy", "k": 3}}).router == RouterSpec(RouterMode.NOISY, 3)


def test_faults_of_flags_and_of_the_recipe_are_reported_together(loaded):
    with pytest.raises(UserError) as raised:
        loaded(router={"mode": "noisy", "k": 9}, layout="auto", quant={"attn": "X"}, output="m.bin")
    assert len(raised.value.faults) == 3
