"""Router files, and routers inside finished mixes: what is set is what runs, and what was there comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import moegguf
from conftest import CLOSE, TOKENS, build_mix, distance, logits, read_metadata, read_tensors, rewrite
from moegguf.cli import main
from moegguf.edit.finished import read_mix
from moegguf.edit.router import router_of
from moegguf.errors import UserError
from moegguf.journal import Patch, apply, journal_of, locked
from moegguf.metadata import SPARE
from moegguf.recipe import RouterMode, parse_recipe
from moegguf.routers import FFN, Router, make_router, noise
from moegguf.routers.file import read_router, router_bytes, write_router

N_EMBD, N_LAYER = 64, 2
NAMES = ("e0", "e1", "e2")


def a_router(names=NAMES, *, k: int = 2, seed: int = 1, n_embd: int = N_EMBD, n_layer: int = N_LAYER, **more) -> Router:
    """A router of random rows, as a fit might give."""
    random = np.random.RandomState(seed)
    matrices = {(layer, FFN): random.standard_normal((len(names), n_embd)).astype("f4") for layer in range(n_layer)}
    return Router(RouterMode.RIDGE, tuple(names), k, matrices, settings={"lambda": "0.01", "tokens": "4000"}, **more)


def assert_same(a: Router, b: Router) -> None:
    assert replace(a, matrices={}, trunk={}) == replace(b, matrices={}, trunk={})
    for ours, theirs in ((a.matrices, b.matrices), (a.trunk, b.trunk)):
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def router_file(tmp_path: Path) -> Path:
    path = tmp_path / "router.safetensors"
    write_router(path, a_router())
    return path


@pytest.fixture
def mix(family, tmp_path: Path) -> Path:
    """A noisy mix of three experts, F32."""
    models = family("tied")
    return build_mix(tmp_path / "mix.gguf", models.base, models.experts, router={"mode": "noisy", "k": 2, "seed": 3})


# --- files ---


@pytest.mark.parametrize(
    "router",
    [
        a_router(),
        a_router(("b", "c"), always_on="a"),
        replace(a_router(), trunk={"token_embd.weight": np.arange(6, dtype="f4").reshape(2, 3)}),
        Router(RouterMode.GATELESS, NAMES, 3, {(0, FFN): np.zeros((3, 4), "f4")}),
        Router(RouterMode.NOISY, NAMES, 2, {(4, FFN): np.ones((3, 4), "f4")}, std=0.5, seed=2**32 - 1),
    ],
    ids=["ridge", "always_on", "trunk", "gateless", "noisy"],
)
def test_a_router_file_gives_back_what_was_written(router: Router, tmp_path: Path):
    write_router(tmp_path / "r.safetensors", router)
    assert_same(read_router(tmp_path / "r.safetensors"), router)
    assert router_bytes(read_router(tmp_path / "r.safetensors")) == (tmp_path / "r.safetensors").read_bytes()


def test_a_shared_router_is_stored_once_and_read_for_every_layer(tmp_path: Path):
    one = a_router().matrices[0, FFN]
    router = replace(a_router(), matrices={(layer, FFN): one for layer in range(50)}, shared=True)
    write_router(tmp_path / "r.safetensors", router)
    assert_same(read_router(tmp_path / "r.safetensors"), router)
    assert (tmp_path / "r.safetensors").stat().st_size < 2 * one.nbytes


# --- routers in a build ---


def test_a_mix_with_a_router_file_is_transformers_mixtral_with_those_rows(family, router_file, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from test_reference import mixtral, run

    models = family("tied")
    rows = {layer: torch.from_numpy(matrix) for (layer, _), matrix in a_router().matrices.items()}
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=str(router_file))
    assert distance(logits(mix), run(mixtral(models, rows, k=2))) < CLOSE
    assert_same(router_of(read_mix(mix)), a_router())


def test_rows_follow_the_names_of_experts_not_their_order(family, router_file, tmp_path: Path):
    models = family("tied")
    experts = [{"name": name, "source": path} for name, path in zip(NAMES, models.experts, strict=True)]
    forward = build_mix(tmp_path / "forward.gguf", models.base, experts, router=str(router_file))
    backward = build_mix(tmp_path / "backward.gguf", models.base, experts[::-1], router=str(router_file))
    assert distance(logits(forward), logits(backward)) < CLOSE


def test_trunk_tensors_that_were_trained_along_go_into_the_build(family, tmp_path: Path):
    models = family("tied")
    embeddings = np.random.RandomState(0).standard_normal((392, N_EMBD)).astype("f4")
    write_router(tmp_path / "r.safetensors", replace(a_router(), trunk={"token_embd.weight": embeddings}))
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=str(tmp_path / "r.safetensors"))
    assert np.array_equal(read_tensors(mix)["token_embd.weight"].values, embeddings)


def test_a_shared_noisy_router_is_the_same_in_every_layer(family, tmp_path: Path):
    models = family("mistral_like")
    router = {"mode": "noisy", "k": 2, "seed": 5, "shared": True}
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts, router=router)
    tensors = read_tensors(mix)
    routers = [tensors[f"blk.{layer}.ffn_gate_inp.weight"].values for layer in range(3)]
    spec = read_recipe_spec(router)
    assert all(np.array_equal(matrix, noise(spec, (0, FFN), 3, 128)) for matrix in routers)
    assert main(["inspect", "--check", str(mix)]) == 0


def read_recipe_spec(router: dict):
    experts = [{"name": name, "source": "x"} for name in NAMES]
    table = {"base": "x", "experts": experts, "router": router}
    return parse_recipe("m", table, where="", folder=Path()).router


def test_always_on_works_with_a_router_file(family, tmp_path: Path):
    """Its rows are those of the other experts, behind the shared group."""
    models = family("llama3_like")
    router = a_router(("e0", "e2"), n_embd=256, always_on="e1")
    write_router(tmp_path / "r.safetensors", router)
    mix = build_mix(
        tmp_path / "mix.gguf", models.base, models.experts, router=str(tmp_path / "r.safetensors"), always_on="e1"
    )
    assert_same(router_of(read_mix(mix)), router)
    same = [models.experts[0], models.experts[1], models.experts[0]]
    copies = build_mix(
        tmp_path / "copies.gguf", models.base, same, router=str(tmp_path / "r.safetensors"), always_on="e1"
    )
    halves = [{"source": path, "weight": 0.5} for path in models.experts[:2]]
    assert distance(logits(copies), logits(build_mix(tmp_path / "halves.gguf", models.base, halves))) < CLOSE


# --- route set ---


def test_a_set_router_makes_the_file_of_a_fresh_build(family, mix: Path, router_file, tmp_path: Path, capsys):
    """Every tensor and every key, but for how much room is left in the header."""
    models = family("tied")
    fresh = build_mix(tmp_path / "fresh.gguf", models.base, models.experts, router=str(router_file))
    assert main(["route", "set", str(mix), "--router", str(router_file)]) == 0
    assert read_tensors(mix) == read_tensors(fresh)
    assert read_metadata(mix) | {SPARE: None} == read_metadata(fresh) | {SPARE: None}
    assert main(["inspect", "--check", str(mix)]) == 0
    assert "ridge: 2 of 3 experts, lambda 0.01, tokens 4000" in capsys.readouterr().out


@pytest.mark.parametrize("router", ["gateless", "noisy", "noisy:99", "file"])
def test_undo_restores_every_byte(router: str, mix: Path, router_file):
    before = mix.read_bytes()
    assert main(["route", "set", str(mix), "--router", str(router_file) if router == "file" else router]) == 0
    changed = mix.read_bytes()
    assert changed != before
    assert main(["route", "set", str(mix), "--undo"]) == 0
    assert mix.read_bytes() == before
    assert main(["route", "set", str(mix), "--undo"]) == 0
    assert mix.read_bytes() == changed


def test_python_sets_and_undoes_as_the_command_does(mix: Path, router_file, tmp_path: Path, capsys):
    copy = Path(shutil.copy(mix, tmp_path / "copy.gguf"))
    before = mix.read_bytes()
    assert main(["route", "set", str(mix), "--router", str(router_file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    changed = moegguf.route.set(copy, router_file)
    assert copy.read_bytes() == mix.read_bytes() != before
    same = changed.as_json() | {"file": str(mix), "seconds": report["seconds"], "old_router": report["old_router"]}
    assert report == same
    assert report["old_router"] == {"mode": "noisy", "file": f"{mix}.old-router.safetensors"}
    assert_same(changed.old, read_router(changed.kept))
    moegguf.route.set(copy, undo=True)
    assert copy.read_bytes() == before
    assert capsys.readouterr() == ("", "")
    for given in ({}, {"router": "noisy", "undo": True}, {"router": 5}, {"router": "noisy", "k": "two"},
                  {"router": "noisy", "std": "small"}, {"router": "noisy", "k": 0}):  # fmt: skip
        with pytest.raises(UserError):
            moegguf.route.set(copy, **given)
    assert copy.read_bytes() == before


def test_setting_gateless_and_back_to_noise_is_each_fresh_build(family, mix: Path, tmp_path: Path):
    models = family("tied")
    gateless = build_mix(tmp_path / "gateless.gguf", models.base, models.experts)
    assert main(["route", "set", str(mix), "--router", "gateless"]) == 0
    assert distance(logits(mix), logits(gateless)) < CLOSE
    noisy = build_mix(tmp_path / "noisy.gguf", models.base, models.experts, router={"mode": "noisy", "k": 1, "seed": 8})
    assert main(["route", "set", str(mix), "--router", "noisy:8", "--k", "1"]) == 0
    assert distance(logits(mix), logits(noisy)) < CLOSE


def test_a_killed_change_leaves_the_old_file_or_can_be_recovered(mix: Path, monkeypatch, capsys):
    """Killed after every single write in turn."""
    before = mix.read_bytes()
    for kill_at in range(5):
        script = f"""
import os, moegguf.journal as journal
write = journal.write
def dying(file, patches):
    for i, patch in enumerate(patches):
        if i == {kill_at}:
            file.flush(); os._exit(9)
        write(file, [patch])
journal.write = dying
from moegguf.cli import main
main(["route", "set", {str(mix)!r}, "--router", "gateless"])
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        if done.returncode != 9:  # there are fewer writes than that
            break
        assert journal_of(mix).exists()
        assert main(["inspect", str(mix)]) == 2
        assert "was interrupted" in capsys.readouterr().err
        if kill_at == 1:  # who changes it next recovers it first
            assert main(["route", "export", str(mix), "--router", "noisy", "-o", str(mix.with_name("a.gguf"))]) == 0
            assert "an interrupted change of it was undone" in capsys.readouterr().err
        else:
            assert main(["set", str(mix), "--recover"]) == 0
        assert mix.read_bytes() == before
        assert not journal_of(mix).exists()
    assert kill_at == N_LAYER + 1


def test_patches_are_applied_whole(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with locked(path) as file:
        apply(path, file, [Patch(3, b"abc"), Patch(98, b"yz")])
    assert path.read_bytes() == bytes(range(3)) + b"abc" + bytes(range(6, 98)) + b"yz"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="locks of the other kind")
def test_two_processes_cannot_change_one_file(mix: Path, capsys):
    import fcntl

    before = mix.read_bytes()
    with open(mix, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["route", "set", str(mix), "--router", "gateless"]) == 2
    assert "another process is changing it" in capsys.readouterr().err
    assert mix.read_bytes() == before


# --- route export ---


def test_an_exported_router_gives_the_logits_of_the_router_in_the_file(family, mix: Path, router_file, tmp_path: Path):
    adapter = tmp_path / "adapter.gguf"
    assert main(["route", "export", str(mix), "--router", str(router_file), "-o", str(adapter)]) == 0
    models = family("tied")
    fresh = build_mix(tmp_path / "fresh.gguf", models.base, models.experts, router=str(router_file))
    assert distance(logits(mix), logits(fresh)) > 0.01
    assert distance(logits_with_adapter(mix, adapter), logits(fresh)) < CLOSE


def test_python_exports_what_the_command_does(mix: Path, router_file, tmp_path: Path, capsys):
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    assert main(["route", "export", str(mix), "--router", str(router_file), "-o", str(first), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    made = moegguf.route.export(mix, router_file, output=second)
    assert first.read_bytes() == second.read_bytes()
    assert report == made.as_json() | {"file": str(first)}
    assert report["bytes"] == first.stat().st_size
    with pytest.raises(UserError, match="exists already"):
        moegguf.route.export(mix, "noisy", output=second)
    with pytest.raises(UserError, match="expected a path"):
        moegguf.route.export(mix, 5, output=second)


def logits_with_adapter(path: Path, adapter: Path) -> np.ndarray:
    f32 = int(GGMLQuantizationType.F32)
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=f32, type_v=f32, lora_path=str(adapter),
    )  # fmt: skip
    try:
        model.eval(list(TOKENS))
        return np.array(model.scores[: len(TOKENS)])
    finally:
        model.close()


# --- mistakes ---


def refuse(capsys, *argv: object) -> str:
    """The one line with which a command refuses."""
    assert main([*map(str, argv)]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    return err.removeprefix("moegguf: error: ")


MISTAKES = {
    "of another width": (a_router(n_embd=32), "the router of layer 0 is (3, 32), expected (3, 64)"),
    "with a layer too few": (a_router(n_layer=1), "has no router for layer 1 (ffn)"),
    "with a layer too many": (a_router(n_layer=3), "has a router for layer 2 (ffn), the mix has none"),
    "of another mix": (
        a_router(("math", "code", "chat")),
        "routes between math, code, chat, the mix between e0, e1, e2",
    ),
    "of more experts": (a_router(("e0", "e1", "e2", "e3")), "routes between e0, e1, e2, e3"),
    "with another expert always on": (a_router(("e0", "e1"), always_on="e2"), "was made with 'e2' always on"),
    "of more experts than there are": (a_router(k=4), "picks 4 experts of 3"),
    "with its own embeddings": (
        replace(a_router(), trunk={"token_embd.weight": np.zeros((392, N_EMBD), "f4")}),
        "was trained together with token_embd.weight",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_router_that_does_not_fit_is_refused_and_nothing_is_written(case: str, mix: Path, tmp_path: Path, capsys):
    router, says = MISTAKES[case]
    write_router(tmp_path / "wrong.safetensors", router)
    before = mix.read_bytes()
    assert says in refuse(capsys, "route", "set", mix, "--router", tmp_path / "wrong.safetensors")
    assert mix.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.gguf", "wrong.safetensors"]


@pytest.mark.parametrize("case", [case for case in MISTAKES if case != "with its own embeddings"])
def test_a_build_refuses_the_same_routers(case: str, family, tmp_path: Path):
    router, says = MISTAKES[case]
    models = family("tied")
    write_router(tmp_path / "wrong.safetensors", router)
    with pytest.raises(UserError) as refused:
        build_mix(tmp_path / "m.gguf", models.base, models.experts, router=str(tmp_path / "wrong.safetensors"))
    assert says in str(refused.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no intact safetensors file"),
        (b"GGUF" + bytes(60), "is no intact safetensors file"),
        (None, "no such router file"),
    ],
)
def test_a_file_that_is_no_router_is_refused(content, says, mix: Path, tmp_path: Path, capsys):
    path = tmp_path / "r.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert says in refuse(capsys, "route", "set", mix, "--router", path)


def test_a_safetensors_file_of_something_else_is_refused(family, mix: Path, capsys):
    weights = family("tied").base / "model.safetensors"
    assert "is a safetensors file, but no router" in refuse(capsys, "route", "set", mix, "--router", weights)


FLAGS = {
    "a mode that has to be fitted": (["--router", "ridge"], "--router ridge: expected a .safetensors file"),
    "a seed that is none": (["--router", "noisy:x"], "--router noisy:x"),
    "gateless with k": (["--router", "gateless", "--k", "2"], "a gate-less mix runs all experts"),
    "too many experts": (["--router", "noisy", "--k", "9"], "--k 9: expected a whole number from 1 to 3"),
    "no noise": (["--router", "noisy", "--std", "-1"], "--std -1.0: expected more than 0"),
    "nothing to undo": (["--undo"], "no such router file"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_is_one_line(case: str, mix: Path, capsys):
    flags, says = FLAGS[case]
    before = mix.read_bytes()
    assert says in refuse(capsys, "route", "set", mix, *flags)
    assert mix.read_bytes() == before


FORMS = {
    "fused": ({"layout": "fused"}, "has no router in it"),
    "gate-less and shared": ({"layout": "shared"}, "its shared group always runs"),
    "weighted": ({"weights": (0.5, 0.3, 0.2)}, "its experts have weights"),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_file_that_no_router_fits_says_why(case: str, family, tmp_path: Path, capsys):
    table, says = FORMS[case]
    models = family("tied")
    weights = table.get("weights")
    experts = [{"source": path} | ({"weight": weights[i]} if weights else {}) for i, path in enumerate(models.experts)]
    layout = table.get("layout", "mixtral")
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, layout=layout)
    router = a_router(("e2",), k=1) if layout == "shared" else a_router()
    write_router(tmp_path / "r.safetensors", router)
    named = "noisy" if layout == "shared" else tmp_path / "r.safetensors"
    assert says in refuse(capsys, "route", "set", mix, "--router", named)


def test_an_unfitted_router_is_planned_but_not_built(family, tmp_path: Path):
    models = family("tied")
    with pytest.raises(UserError, match="its ridge router has not been fitted yet"):
        build_mix(tmp_path / "mix.gguf", models.base, models.experts, router="ridge")


def test_a_gguf_of_another_program_is_refused(family, tmp_path: Path, capsys):
    models = family("tied")
    mix = build_mix(tmp_path / "mix.gguf", models.base, models.experts)
    foreign = rewrite(mix, tmp_path / "foreign.gguf", keep=lambda key: not key.startswith("moegguf."))
    assert "was not made by moegguf" in refuse(capsys, "route", "set", foreign, "--router", "noisy")
    moved = rewrite(mix, tmp_path / "moved.gguf", keep=lambda key: key != "moegguf.spare")
    assert "its header was changed by another program" in refuse(capsys, "route", "set", moved, "--router", "noisy")


def test_an_adapter_cannot_change_how_many_experts_run(mix: Path, tmp_path: Path, capsys):
    write_router(tmp_path / "one.safetensors", a_router(k=1))
    line = refuse(capsys, "route", "export", mix, "--router", tmp_path / "one.safetensors", "-o", tmp_path / "a.gguf")
    assert "runs 2 experts a token, the router 1" in line
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_overwrites_another_one_and_no_model(mix: Path, tmp_path: Path, capsys):
    before, export = mix.read_bytes(), ["route", "export", str(mix), "--router", "noisy:1", "-o"]
    assert "is there already, and no adapter" in refuse(capsys, *export, mix)
    assert mix.read_bytes() == before
    assert "expected a name that ends in .gguf" in refuse(capsys, *export, tmp_path / "adapter")
    assert main([*export, str(tmp_path / "adapter.gguf")]) == 0
    assert "adapter.gguf: exists already; choose another name, or pass --force" in refuse(
        capsys, *export, tmp_path / "adapter.gguf"
    )
    assert main([*export, str(tmp_path / "adapter.gguf"), "--force"]) == 0
    assert "no adapter" in refuse(capsys, *export, mix, "--force")
    assert mix.read_bytes() == before


def test_a_router_that_cannot_be_set_leaves_the_one_that_was_kept(mix: Path, monkeypatch, capsys):
    assert main(["route", "set", str(mix), "--router", "noisy:8"]) == 0
    kept = mix.with_name("mix.gguf.old-router.safetensors")
    before = mix.read_bytes(), kept.read_bytes()
    monkeypatch.setattr("moegguf.atomic.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 9))
    capsys.readouterr()
    assert "the journal of this change needs" in refuse(capsys, "route", "set", mix, "--router", "noisy:9")
    assert (mix.read_bytes(), kept.read_bytes()) == before


def test_make_router_gives_noise_to_every_site():
    spec = read_recipe_spec({"mode": "noisy", "k": 2, "seed": 1})
    router = make_router(spec, NAMES, {(0, FFN): 8, (0, "attn_q"): 8})
    assert not np.array_equal(router.matrices[0, FFN], router.matrices[0, "attn_q"])
