"""`moegguf route fit` on the embedded family: fitted routers separate its domains and make a better mix."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import moegguf
from conftest import build_dense, build_mix, make_recipe, read_tensors, rewrite
from moegguf.cli import main
from moegguf.demo.text import DOMAINS
from moegguf.gguf_header import read_header
from moegguf.jobs.dense import dense_model
from moegguf.jobs.fitting import FitOptions, plan_fit, read_texts
from moegguf.recipe import Recipe, RouterMode
from moegguf.routers import FFN, Router
from moegguf.routers.file import read_router
from moegguf.runtime.batch import score
from moegguf.runtime.encode import encode
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.template import chat_template
from moegguf.texts import read_records

EXPERTS = ("base", "math", "clinic", "strings")
DOMAIN_OF = dict(zip(EXPERTS, DOMAINS, strict=True))
N_LAYER, N_EMBD = 4, 256
ONE_THREAD = ("--threads", 1)


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> Path:
    """The gate-less mix of the family."""
    folder = tmp_path_factory.mktemp("mix")
    return build_mix(folder / "mix.gguf", "demo:base", [_demo(name) for name in EXPERTS], quant="Q8_0")


def _demo(name: str) -> dict[str, str]:
    return {"name": name, "source": f"demo:{name}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_dense(tmp_path_factory.mktemp("base") / "base.gguf", "demo:base", quant="Q8_0")


def texts(n: int, *names: str, flag: str = "--text") -> list[str]:
    """Flags for `n` questions of each expert's domain."""
    return [word for name in names or EXPERTS for word in (flag, f"{name}=demo:{DOMAIN_OF[name]}#{n}")]


def fit(capsys, output: Path, *flags: object) -> tuple[Router, dict]:
    """The router and the JSON report of a fit that works."""
    capsys.readouterr()
    code = main([*map(str, ("route", "fit", *flags, *ONE_THREAD, "-o", output, "--json"))])
    out, err = capsys.readouterr()
    assert code == 0, err
    return read_router(output), json.loads(out)


@pytest.fixture(scope="module")
def ridge(mix, tmp_path_factory) -> tuple[Path, dict]:
    """The file and the report of a ridge fit to 50 questions a domain."""
    folder = tmp_path_factory.mktemp("ridge")
    with contextlib.redirect_stdout(open(folder / "report.json", "w")) as out:
        code = main([*map(str, ("route", "fit", "--mix", mix, *texts(50), *ONE_THREAD, "--temperature", 0.3, "--json",
                                "-o", folder / "r.safetensors"))])  # fmt: skip
    out.close()
    assert code == 0
    return folder / "r.safetensors", json.loads((folder / "report.json").read_text())


# ------------------------------------------------------------------------------------------------ ridge


def test_a_ridge_router_separates_held_out_text_of_the_domains(ridge):
    file, report = ridge
    router, separation = read_router(file), report["separation"]
    assert (router.mode, router.experts, router.k) == (RouterMode.RIDGE, EXPERTS, 2)
    assert list(router.matrices) == [(layer, FFN) for layer in range(N_LAYER)]
    assert min(separation["top1_by_layer"][2:]) > 0.8
    assert separation["top1"] == pytest.approx(np.mean(separation["top1_by_layer"]))
    assert all(0.1 < load < 0.5 for load in separation["load"].values())
    assert report["notes"] == []
    for rows in router.matrices.values():
        assert np.allclose(np.linalg.norm(rows, axis=1), 1 / 0.3, rtol=1e-5)


def test_the_routed_mix_answers_more_held_out_questions_than_the_gateless_one(mix, ridge, tmp_path):
    routed = shutil.copy(mix, tmp_path / "routed.gguf")
    assert main(["route", "set", str(routed), "--router", str(ridge[0])]) == 0
    assert exact_match(routed) > exact_match(mix) + 0.05


def exact_match(path: Path) -> float:
    """Share of held-out questions whose whole answer is the greedy one, in the three domains that experts know."""
    with open_model(path, RunOptions(threads=1)) as model:
        template = chat_template(model.chat_template, model.vocab)
        records = [record for domain in DOMAINS[1:] for record in read_records(f"demo:{domain}/heldout#30")]
        asked = [encode(model.vocab, template, record) for record in records]
        scored = score(model, [one.tokens for one in asked], [one.n_prompt for one in asked])
        return float(np.mean([one.is_greedy.all() for one in scored]))


def test_a_fit_to_the_base_alone_separates_as_well_as_one_to_the_mix(ridge, tmp_path, capsys):
    router, report = fit(capsys, tmp_path / "r.safetensors", "demo", *texts(50), "--temperature", 0.3)
    assert report["separation"]["top1"] == pytest.approx(ridge[1]["separation"]["top1"], abs=0.04)
    of_mix = read_router(ridge[0])
    for site, rows in router.matrices.items():
        cosines = (rows * of_mix.matrices[site]).sum(axis=1) * 0.3**2
        assert cosines.min() > 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_an_expert_added_later_gives_the_router_of_one_fit(base, tmp_path, capsys):
    statistics = tmp_path / "s.safetensors"
    run = ("--base-gguf", base)
    fit(capsys, tmp_path / "3.safetensors", *run, *texts(20, *EXPERTS[:3]), "--statistics", statistics)
    later, _ = fit(capsys, tmp_path / "4.safetensors", *run, *texts(20, "strings"), "--statistics", statistics)
    at_once, _ = fit(capsys, tmp_path / "1.safetensors", *run, *texts(20))
    assert later.experts == at_once.experts == EXPERTS
    for site, rows in at_once.matrices.items():
        assert np.abs(later.matrices[site] - rows).max() < 1e-5


def test_other_settings_need_no_text_once_there_are_statistics(base, tmp_path, capsys):
    run = ("--base-gguf", base, "--statistics", tmp_path / "s.safetensors")
    first, with_text = fit(capsys, tmp_path / "1.safetensors", *run, *texts(20))
    again, report = fit(capsys, tmp_path / "2.safetensors", *run, "--temperature", 0.2, "--k", 3)
    assert again.k == 3
    assert with_text["separation"]
    assert report["separation"] is None
    for site, rows in first.matrices.items():
        assert np.allclose(again.matrices[site], rows / 2, rtol=1e-6)
    same, report = fit(capsys, tmp_path / "3.safetensors", *run, *texts(20))
    assert report["separation"] == with_text["separation"]
    assert np.array_equal(same.matrices[0, FFN], first.matrices[0, FFN])


def test_a_shared_router_is_the_same_in_every_layer(base, tmp_path, capsys):
    file = tmp_path / "r.safetensors"
    router, report = fit(capsys, file, "--base-gguf", base, *texts(20), "--shared")
    assert router.shared and report["shared"]
    assert all(np.array_equal(rows, router.matrices[0, FFN]) for rows in router.matrices.values())
    assert report["separation"]["top1"] > 0.5


def test_an_always_on_expert_has_no_row_and_needs_no_text(base, tmp_path, capsys):
    flags = ("--base-gguf", base, "--always-on", "base", *texts(20, *EXPERTS[1:]))
    router, report = fit(capsys, tmp_path / "r.safetensors", *flags)
    assert (router.always_on, router.experts, router.k) == ("base", EXPERTS[1:], 2)
    assert set(report["tokens"]) == set(EXPERTS[1:])
    assert report["notes"] == []


# ----------------------------------------------------------------------------------------------- hidden


def test_a_hidden_router_separates_the_domains_of_its_prompts(mix, tmp_path, capsys):
    router, report = fit(
        capsys, tmp_path / "r.safetensors", "--mix", mix, "--mode", "hidden", *texts(30), *texts(10, flag="--positive")
    )
    assert router.mode is RouterMode.HIDDEN
    assert router.settings["tap"] == "router_input"
    assert report["separation"]["top1"] > 0.45
    for rows in router.matrices.values():
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_hidden_rows_are_those_of_the_definition_on_the_last_token_of_what_enters_a_layer(base, tmp_path, capsys):
    """Layer 0's input is the embedding, so mergekit's choice can be worked out from the file alone."""
    prompts = {"math": ["one two", "three"], "clinic": ["The arm", "the wheel squeaks"]}
    negative = {"math": ["a word"], "clinic": ["the sum of"]}
    table = {
        "base": str(base), "router": {"mode": "hidden", "tap": "layer_input", "pool": "last"},
        "experts": [{"name": name, "source": str(base), "positive_prompts": prompts[name],
                     "negative_prompts": negative[name]} for name in prompts],
    }  # fmt: skip
    recipes = tmp_path / "recipes.toml"
    recipes.write_text(_toml("tiny", table))
    router, _ = fit(capsys, tmp_path / "r.safetensors", "tiny", "--recipes", recipes, "--holdout", 0)
    embeddings = read_tensors(base)["token_embd.weight"].values
    with open_model(base, RunOptions(threads=1)) as model:
        last = {text: embeddings[model.vocab.tokenize_prompt(text)[-1]]
                for side in (prompts, negative) for texts in side.values() for text in texts}  # fmt: skip
    for row, name in zip(router.matrices[0, FFN], prompts, strict=True):
        state = np.mean([last[text] for text in prompts[name]], axis=0) - last[negative[name][0]]
        assert np.abs(row - state / np.linalg.norm(state)).max() < 1e-5


def _toml(name: str, table: dict) -> str:
    """A recipes file of one recipe: JSON values are TOML values but for tables."""

    def value(of: object) -> str:
        if isinstance(of, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in of.items()) + "}"
        return "[" + ", ".join(map(value, of)) + "]" if isinstance(of, list) else json.dumps(of)

    return f"[mix.{name}]\n" + "\n".join(f"{key} = {value(item)}" for key, item in table.items()) + "\n"


# ------------------------------------------------------------------------------------------- from Python


def test_python_gets_the_router_and_the_report_of_the_command(base, tmp_path, capsys):
    file = tmp_path / "r.safetensors"
    router, report = fit(capsys, file, "--base-gguf", base, *texts(10, "math", "clinic"), "--k", 1)
    planned = []
    text = {name: f"demo:{name}#10" for name in ("math", "clinic")}
    fitted = moegguf.route.fit(
        base_gguf=base, text=text, k=1, threads=1, output=tmp_path / "p.safetensors", on_plan=planned.append
    )
    assert all(np.array_equal(rows, fitted.router.matrices[site]) for site, rows in router.matrices.items())
    assert read_router(tmp_path / "p.safetensors").digest == fitted.router.digest
    assert report.pop("seconds") > 0
    assert report == {"file": str(file), "bytes": file.stat().st_size} | fitted.as_json()
    assert planned[0].n_tokens > 0
    assert capsys.readouterr() == ("", "")


def test_a_router_is_replaced_only_when_asked_to(base, tmp_path, capsys):
    file, flags = tmp_path / "r.safetensors", ("--base-gguf", base, *texts(5, "math", "clinic"))
    fit(capsys, file, *flags)
    before = file.read_bytes()
    assert main([*map(str, ("route", "fit", *flags, "-o", file))]) == 2
    assert "r.safetensors: exists already; choose another name, or pass --force" in capsys.readouterr().err
    assert file.read_bytes() == before
    fit(capsys, file, *flags, "--k", 1, "--force")
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    "given",
    [
        {"mix": 5},
        {"text": "math.jsonl"},
        {"text": {"math": 5, "clinic": "demo:clinic"}},
        {"recipe": 5},
        {"max_tokens": "many"},
        {"holdout": "some"},
        {"k": "two"},
        {"ridge_lambda": "small"},
        {"output": 5},
        {"threads": 1.5},
        {"mode": "best"},
    ],
)
def test_values_of_the_wrong_kind_are_users_mistakes(base, tmp_path, given):
    text = {"math": "demo:math#5", "clinic": "demo:clinic#5"}
    call = {"base_gguf": None if "mix" in given else base, "text": text, "output": tmp_path / "r.safetensors"} | given
    with pytest.raises(moegguf.UserError):
        moegguf.route.fit(**call)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- texts and what they run on


def demo_recipe(output: Path, **table) -> Recipe:
    return make_recipe(output, "demo:base", [_demo(name) for name in EXPERTS], router="ridge", quant="Q8_0", **table)


def test_a_file_that_is_one_long_text_is_held_out_in_part_and_none_of_it_is_lost(base, tmp_path):
    words = [f"word{i}" for i in range(5000)]
    (tmp_path / "long.txt").write_text(" ".join(words))
    domains = {name: [str(tmp_path / "long.txt")] for name in EXPERTS}
    texts = read_texts(demo_recipe(tmp_path / "mix.gguf", domains=domains), FitOptions(max_tokens=10**6))
    material = plan_fit(texts, base).material["math"]
    assert material.heldout.n_tokens == pytest.approx(0.2 * material.n_tokens, rel=0.1)
    with open_model(base, RunOptions(threads=1)) as model:
        pieces = [b"".join(map(model.vocab.piece, piece)).decode() for sample in (material.fit, material.heldout)
                  for piece in sample.pieces]  # fmt: skip
    assert sorted("".join(pieces)) == sorted(" ".join(words))


def test_no_more_text_is_taken_than_asked_for(base, tmp_path):
    domains = {name: [f"demo:{domain}"] for name, domain in DOMAIN_OF.items()}
    texts = read_texts(demo_recipe(tmp_path / "mix.gguf", domains=domains), FitOptions(max_tokens=700, holdout=0.5))
    for material in plan_fit(texts, base).material.values():
        assert material.n_tokens == 700
        assert len(material.fit.pieces) == pytest.approx(len(material.heldout.pieces), abs=1)


@pytest.mark.parametrize("trunk", ["base", "mean"])
def test_what_a_fit_runs_on_before_there_is_a_mix_is_gone_afterwards(tmp_path, trunk):
    recipe = demo_recipe(tmp_path / "mix.gguf", trunk=trunk)
    (tmp_path / ".moegguf-dense.99999999.left").mkdir()  # by a fit that was killed
    with pytest.raises(KeyboardInterrupt), dense_model(recipe) as path:
        header = read_header(path)
        assert path.parent.parent == tmp_path
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert header.get("llama.feed_forward_length") == N_EMBD * (1 if trunk == "base" else len(EXPERTS))
    assert header.get("moegguf.trunk") == trunk


def test_a_base_that_is_a_gguf_is_run_as_it_is(base, tmp_path):
    recipe = make_recipe(tmp_path / "mix.gguf", base, [base], layout="fused")
    with dense_model(recipe) as path:
        assert path == base


# --------------------------------------------------------------------------------------------- warnings


def warned(capsys, base: Path, tmp_path: Path, *flags: object) -> str:
    return "\n".join(fit(capsys, tmp_path / "r.safetensors", "--base-gguf", base, *flags)[1]["notes"])


def test_the_same_text_for_two_experts_is_warned_of(base, tmp_path, capsys):
    found = warned(capsys, base, tmp_path, "--text", "a=demo:math#20", "--text", "b=demo:math#20")
    assert "experts a and b have the same text" in found
    assert "the rows of a and b are nearly equal" in found
    assert "hardly tells the domains apart" in found


def test_too_little_text_is_warned_of(base, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("What is 2 + 2?")
    found = warned(capsys, base, tmp_path, "--text", f"math={tmp_path / 'short.txt'}", *texts(20, "clinic"))
    assert re.search(r"expert math has only \d+ tokens of text", found)
    assert "expert math has no held-out text" in found


# -------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """`refused(*flags)`: the lines of a fit that must fail, without a router written."""

    def run(*flags: object) -> str:
        code = main([*map(str, ("route", "fit", "-o", tmp_path / "r.safetensors", *ONE_THREAD, *flags))])
        _, err = capsys.readouterr()
        assert code == 2
        assert all(line.startswith("moegguf: error: ") and "; " in line for line in err.splitlines()), err
        assert not (tmp_path / "r.safetensors").exists()
        return err

    return run


def test_all_experts_without_text_are_named_at_once(refused, mix):
    found = refused("--mix", mix, *texts(20, "base", "clinic"))
    assert "no text for expert math, strings; pass --text math=FILE --text strings=FILE" in found
    found = refused("--mix", mix, "--mode", "hidden", *texts(20, "base", flag="--positive"))
    assert "no text for expert math, clinic, strings; there is text of one domain only, base; pass --positive" in found


def test_text_of_one_domain_only_is_refused(refused, base):
    assert "math is its only expert, so there is nothing to choose from" in refused(
        "--base-gguf", base, *texts(20, "math")
    )


def test_nothing_to_fit_or_to_fit_to_is_refused(refused, base):
    assert "nothing to fit" in refused(*texts(20))
    assert "no text to fit to" in refused("--base-gguf", base)


def test_empty_and_missing_text_is_refused_all_at_once(refused, mix, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    found = refused("--mix", mix, "--text", f"math={tmp_path / 'empty.txt'}", "--text", f"base={tmp_path / 'no.txt'}")
    assert "empty.txt: is empty" in found
    assert "no.txt: cannot be read" in found


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--text", "maths=demo:math"), "allowed a key for an expert: base, math, clinic, strings"),
        (("--text", "math"), "--text math: expected NAME=FILE"),
        (("--positive", "math=demo:math"), "--positive and --negative go with --mode hidden"),
        (("--k", 5), "router.k: found 5, allowed an integer from 1 to 4"),
        (("--tap", "layer_input"), "only with mode hidden"),
        (("--mode", "hidden", "--temperature", 1), "only with mode ridge"),
        (("--mode", "hidden", "--negative", "maths=demo:math"), "--negative maths: no expert has that name"),
        (("--always-on", "base"), "has 4 experts behind its router, this one is for 3"),
        (("--lambda", -1), "router.lambda: found -1.0"),
        (("--max-tokens", 0), "--max-tokens 0: expected a whole number from 1 to"),
        (("--holdout", 1), "--holdout 1.0: expected a share from 0 to 0.9"),
        (("-o", "router.gguf"), "ends in .safetensors"),
        (("-o", "both.safetensors", "--statistics", "both.safetensors"), "is to be both router and statistics"),
        (("--statistics", "no/such/folder.safetensors"), "no/such: no such folder to write folder.safetensors to"),
        (("-o", "/no/such/folder/r.safetensors"), "no such folder"),
        (("demo-noisy", "--base-gguf", "x.gguf"), "not allowed with argument"),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, mix, flags, complaint):
    assert complaint in refused("--mix", mix, *texts(5), *flags)


def test_files_that_are_no_mix_with_a_router_are_refused(refused, base, tmp_path):
    assert "has no router in it" in refused("--mix", base, *texts(5))
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    assert "x.gguf" in refused("--mix", tmp_path / "x.gguf", *texts(5))
    plain = rewrite(
        build_dense(tmp_path / "f32.gguf", "demo:base"), tmp_path / "plain.gguf", keep=lambda key: "moegguf" not in key
    )
    assert "was not made by moegguf" in refused("--mix", plain, *texts(5))


def test_weights_of_a_model_are_never_overwritten(mix, tmp_path, capsys):
    shutil.copy(Path(read_header.__code__.co_filename).parent / "demo/models/base/model.safetensors", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for force in ((), ("--force",)):
        code = main(
            [*map(str, ("route", "fit", "--mix", mix, *texts(5), "-o", tmp_path / "model.safetensors", *force))]
        )
        assert code == 2
        assert "exists already, and is no router" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_statistics_of_another_mix_or_with_other_text_are_refused(refused, base, mix, tmp_path, capsys, family):
    file = tmp_path / "s.safetensors"
    fit(capsys, tmp_path / "ok.safetensors", "--base-gguf", base, *texts(5, "math", "clinic"), "--statistics", file)
    assert set(load_file(file)) == {"gram", "mean/math", "mean/clinic"}
    given = ("--base-gguf", base, "--statistics", file)
    assert "the statistics hold other text of it already" in refused(*given, *texts(6, "math"))
    assert "statistics of mode ridge (here: hidden)" in refused(*given, "--mode", "hidden")
    assert "holds the text of clinic, the router is to choose between math, strings" in refused(
        "--mix", _pair(tmp_path, "math", "strings"), *texts(5, "strings"), "--statistics", file
    )
    tiny = build_dense(tmp_path / "tiny.gguf", family("tied").base)
    found = refused("--base-gguf", tiny, "--statistics", file)
    assert "(here: base)" in found
    assert "hidden size 256 (here: 64)" in found


def _pair(folder: Path, *names: str) -> Path:
    return build_mix(folder / "pair.gguf", "demo:base", [_demo(name) for name in names], quant="Q8_0")


def test_activations_that_are_not_finite_are_refused(refused, tmp_path):
    sound = build_dense(tmp_path / "sound.gguf", "demo:base")
    nan = np.full(N_EMBD, np.nan, np.float32)
    broken = rewrite(sound, tmp_path / "broken.gguf", tensors={"blk.1.ffn_norm.weight": nan})
    assert "layer 1: the activations are not finite" in refused("--base-gguf", broken, *texts(5))
