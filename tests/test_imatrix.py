"""Importance matrices as files and in builds: what each slice is quantised with, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from conftest import build_dense, build_mix, make_recipe, read_tensors, rewrite
from moegguf.assembly import plan_build
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.metadata import PREFIX
from moegguf.quant.imatrix import (
    Calibration,
    CountedText,
    importance_notes,
    read_calibration,
    read_imatrix,
    write_calibration,
)
from moegguf.squares import Squares, added
from test_calibrate import FIXTURES, TEXT
from test_oracle import assert_same_tensors, importances, llama_quantise, write_imatrix

SMALL = {"intermediate_size": 256, "num_hidden_layers": 1}
Q2 = {"preset": "Q8_0", "experts": "Q2_K"}
"""Few bits for the experts, where an importance changes most of the bytes."""
GATE, UP, DOWN = (f"blk.0.ffn_{role}.weight" for role in ("gate", "up", "down"))
DAT = (FIXTURES / "mix.dat").read_bytes()


@pytest.fixture(scope="module")
def models(family):
    return family("llama3_like", dtype="f32", **SMALL)


@pytest.fixture(scope="module")
def dense(models, tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """An importance of the dense model for each expert, all different."""
    tensors = read_tensors(build_dense(tmp_path_factory.mktemp("dense") / "dense.gguf", models.base))
    random = np.random.RandomState(1)
    return [
        {name: row * random.uniform(0.2, 3, row.shape).astype("f4") for name, row in importances(tensors).items()}
        for _ in models.experts
    ]


def with_files(models, dense, folder: Path, n: int = 3) -> list[dict[str, object]]:
    """Experts of a recipe, the first `n` of them with their own imatrix."""
    files = [write_imatrix(folder / f"e{i}.gguf", values) for i, values in enumerate(dense)]
    return [
        {"source": source} | ({"imatrix": str(file)} if i < n else {})
        for i, (source, file) in enumerate(zip(models.experts, files, strict=True))
    ]


def stacked(dense) -> dict[str, np.ndarray]:
    """The imatrix of layout mixtral that says of each expert what its own file says, and of the trunk their mean."""
    own = {name.replace(".weight", "_exps.weight"): [values[name] for values in dense] for name in (GATE, UP, DOWN)}
    trunk = {name for name in dense[0] if name not in (GATE, UP, DOWN)}
    return {name: np.concatenate(rows) for name, rows in own.items()} | {
        name: np.mean([values[name] for values in dense], axis=0, dtype=np.float32) for name in trunk
    }


# ----------------------------------------------------------------------------------------------- in a build


@pytest.mark.parametrize("quant", ["IQ2_XXS", "Q2_K_S", "Q4_K_M"])
def test_imatrices_of_experts_give_what_their_stack_gives_llama_model_quantize(quant, models, dense, tmp_path: Path):
    precise = build_mix(tmp_path / "mix.gguf", models.base, models.experts)
    direct, oracle = tmp_path / "direct.gguf", tmp_path / "oracle.gguf"
    build_mix(direct, models.base, with_files(models, dense, tmp_path), quant=quant)
    assert llama_quantise(precise, oracle, quant, stacked(dense))
    assert_same_tensors(direct, oracle, quant)


def test_every_slice_has_the_bytes_of_a_build_of_its_expert_alone(models, dense, tmp_path: Path):
    experts = with_files(models, dense, tmp_path)
    mix = read_tensors(build_mix(tmp_path / "mix.gguf", models.base, experts, quant=Q2))
    fused = read_tensors(build_mix(tmp_path / "fused.gguf", models.base, experts, quant=Q2, layout="fused"))
    for i, expert in enumerate(experts):
        alone = build_mix(tmp_path / f"alone{i}.gguf", models.base, [expert], quant=Q2, layout="fused")
        as_recipe = build_mix(
            tmp_path / f"recipe{i}.gguf", models.base, [expert["source"]], quant=Q2, layout="fused",
            imatrix=expert["imatrix"],
        )  # fmt: skip
        for name in (GATE, UP, DOWN):
            bytes_alone = read_tensors(alone)[name].data
            assert read_tensors(as_recipe)[name].data == bytes_alone
            slices = mix[name.replace(".weight", "_exps.weight")]
            assert slices.type is GGMLQuantizationType.Q2_K
            assert slices.data[i * len(bytes_alone) : (i + 1) * len(bytes_alone)] == bytes_alone
            if name != DOWN:
                assert fused[name].data[i * len(bytes_alone) : (i + 1) * len(bytes_alone)] == bytes_alone


@pytest.mark.parametrize("layout", ["fused", "shared"])
def test_imatrices_of_experts_are_put_together_as_the_layout_puts_the_experts(layout, models, dense, tmp_path: Path):
    """In down each expert has columns of its own; in gate and up rows, for which llama.cpp has but one importance."""
    precise = build_mix(tmp_path / "mix.gguf", models.base, models.experts, layout=layout)
    alike = [{**values, GATE: dense[0][GATE], UP: dense[0][UP]} for values in dense]
    direct = tmp_path / "direct.gguf"
    build_mix(direct, models.base, with_files(models, alike, tmp_path), quant="Q2_K_S", layout=layout)
    imatrix = {name: values for name, values in stacked(alike).items() if "_exps" not in name}
    if layout == "fused":
        imatrix |= {GATE: dense[0][GATE], UP: dense[0][UP], DOWN: np.hstack([values[DOWN] for values in alike])}
    else:
        for name in (GATE, UP, DOWN):
            imatrix[name.replace(".weight", "_exps.weight")] = alike[2][name]
            imatrix[name.replace(".weight", "_shexp.weight")] = alike[0][name]
        imatrix[DOWN.replace(".weight", "_shexp.weight")] = np.hstack([values[DOWN] for values in alike[:2]])
    assert llama_quantise(precise, tmp_path / "oracle.gguf", "Q2_K_S", imatrix)
    assert_same_tensors(direct, tmp_path / "oracle.gguf", "Q2_K_S")


def test_what_was_measured_on_this_mix_comes_first_then_the_experts_file_then_the_dense_models(
    models, dense, tmp_path: Path
):
    experts = with_files(models, dense, tmp_path, n=2)
    own, other = write_imatrix(tmp_path / "own.gguf", stacked(dense[::-1])), tmp_path / "e2.gguf"

    def bytes_of(given: list, **table) -> dict[str, bytes]:
        path = tmp_path / "built.gguf"
        path.unlink(missing_ok=True)
        tensors = read_tensors(build_mix(path, models.base, given, quant=Q2, **table))
        return {name: tensor.data for name, tensor in tensors.items() if "_exps" in name}

    assert bytes_of(experts, imatrix=str(own)) == bytes_of(models.experts, imatrix=str(own))
    all_own = with_files(models, dense, tmp_path)
    assert bytes_of(experts, imatrix=str(other)) == bytes_of(all_own)
    assert bytes_of(all_own) != bytes_of(models.experts, imatrix=str(own))


def test_a_dense_models_imatrix_gives_way_to_the_experts_in_the_fused_layout_too(models, dense, tmp_path: Path):
    """There gate and up have the names and widths of the dense model's."""
    experts = with_files(models, dense, tmp_path)
    both = build_mix(
        tmp_path / "a.gguf", models.base, experts, quant=Q2, layout="fused", imatrix=str(tmp_path / "e2.gguf")
    )
    only = build_mix(tmp_path / "b.gguf", models.base, experts, quant=Q2, layout="fused")
    for name in (GATE, UP, DOWN):
        assert read_tensors(both)[name].data == read_tensors(only)[name].data


def test_experts_without_an_importance_beside_others_are_named_and_quantised_without(models, dense, tmp_path: Path):
    experts = with_files(models, dense, tmp_path, n=2)
    plan = plan_build(make_recipe(tmp_path / "mix.gguf", models.base, experts, quant="Q4_K_S"))
    notes = list(importance_notes(plan.planned))
    assert notes == [
        "blk.0.ffn_gate_exps.weight, blk.0.ffn_up_exps.weight and 1 more: some experts have an importance and others "
        "none; these are quantised without"
    ]
    quant = {"preset": "Q8_0", "experts": "Q4_K"}
    mix = read_tensors(build_mix(tmp_path / "q4.gguf", models.base, experts, quant=quant))
    plain = read_tensors(build_mix(tmp_path / "plain.gguf", models.base, models.experts, quant=quant))
    for role in ("gate", "up", "down"):
        ours, theirs = (tensors[f"blk.0.ffn_{role}_exps.weight"].data for tensors in (mix, plain))
        third = len(ours) // 3
        assert ours[2 * third :] == theirs[2 * third :]
        assert ours[:third] != theirs[:third]
    all_known = plan_build(make_recipe(tmp_path / "all.gguf", models.base, with_files(models, dense, tmp_path)))
    assert list(importance_notes(all_known.planned)) == []


def test_a_type_that_needs_an_importance_needs_it_of_every_expert(models, dense, tmp_path: Path):
    experts, quant = with_files(models, dense, tmp_path, n=2), {"preset": "Q8_0", "experts": "IQ2_XS"}
    with pytest.raises(UserError, match=r"blk.0.ffn_gate_exps.weight.*IQ2_XS needs an importance matrix"):
        plan_build(make_recipe(tmp_path / "mix.gguf", models.base, experts, quant=quant))
    plan_build(make_recipe(tmp_path / "mix.gguf", models.base, with_files(models, dense, tmp_path), quant="IQ1_S"))


def test_the_old_format_gives_the_bytes_of_the_new(models, dense, tmp_path: Path):
    """In it the matrices of a stack are one row."""
    imatrix = stacked(dense)
    new = write_imatrix(tmp_path / "new.gguf", imatrix)
    old = tmp_path / "old.dat"
    old.write_bytes(dat({name: values * 4 for name, values in imatrix.items()}, n_chunks=4))
    built = [
        build_mix(tmp_path / f"{file.stem}-mix.gguf", models.base, models.experts, quant="Q2_K_S", imatrix=str(file))
        for file in (new, old)
    ]
    assert read_tensors(built[0]) == read_tensors(built[1])


def dat(sums: dict[str, np.ndarray], n_chunks: int) -> bytes:
    """As llama-imatrix wrote it before GGUF, without the name of a data set."""
    entries = b"".join(
        struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_chunks, values.size)
        + values.astype("<f4").tobytes()
        for name, values in sums.items()
    )  # fmt: skip
    return struct.pack("<i", len(sums)) + entries


# -------------------------------------------------------------------------------------------------- files


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path):
    random = np.random.RandomState(0)
    squares = {
        "blk.0.attn_q.weight": Squares(random.rand(1, 7), np.array([900])),
        "blk.0.ffn_down_exps.weight": Squares(random.rand(3, 5) * [[1], [0], [1]], np.array([1030, 0, 5])),
    }
    texts = (CountedText("math", 600, "ab"), CountedText("größe", 300, "cd"))
    calibration = Calibration(squares, 512, "digest", texts, ("math.txt", "demo:general"))
    write_calibration(tmp_path / "i.gguf", calibration)
    found = read_calibration(tmp_path / "i.gguf")
    assert (found.chunk_size, found.model, found.texts, found.datasets, found.n_chunks) == (
        512, "digest", texts, ("math.txt", "demo:general"), 2,
    )  # fmt: skip
    for name, one in squares.items():
        np.testing.assert_array_equal(found.squares[name].sums, one.sums.astype("f4"))
        np.testing.assert_array_equal(found.squares[name].counts, one.counts)
    imatrix = read_imatrix(tmp_path / "i.gguf")
    down = imatrix.entries["blk.0.ffn_down_exps.weight"]
    np.testing.assert_allclose(down[1], squares["blk.0.ffn_down_exps.weight"].sums.sum(axis=0) / 1035, rtol=1e-6)
    assert imatrix.counts["blk.0.ffn_down_exps.weight"].tolist() == [1030, 0, 5]


def test_squares_add_up():
    a, b = Squares(np.ones((2, 3)), np.array([1, 2])), Squares(np.full((2, 3), 2.0), np.array([3, 0]))
    total = added({"x": a, "y": a}, {"y": b, "z": b})
    assert (total["y"].sums == 3).all() and total["y"].counts.tolist() == [4, 2]
    assert total["x"] is a and total["z"] is b
    assert (Squares(np.zeros((1, 3)), np.array([0])).means() == 1).all()


@pytest.mark.parametrize("name", ["mix.dat", "mix.imatrix"])
def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(name: str, tmp_path: Path):
    content = (FIXTURES / name).read_bytes()
    whole = read_imatrix(FIXTURES / name)
    path = tmp_path / "cut"
    n_refused = 0
    for n in range(0, len(content), 97):
        path.write_bytes(content[:n])
        try:
            found = read_imatrix(path)
        except UserError:
            n_refused += 1
        else:  # only what comes after the sums was cut
            assert len(content) - n < 64 and found.entries.keys() == whole.entries.keys()
    assert n_refused >= len(range(0, len(content), 97)) - 1


def test_noise_in_a_file_is_refused_or_read_but_never_crashes(tmp_path: Path):
    path = tmp_path / "noisy"
    random = np.random.RandomState(0)
    for content in (DAT, (FIXTURES / "mix.imatrix").read_bytes()):
        for _ in range(150):
            noisy = bytearray(content)
            for at in random.randint(0, 400, 3):
                noisy[at] = random.randint(256)
            path.write_bytes(noisy)
            try:
                entries = read_imatrix(path).entries
            except UserError as error:
                assert str(path) in str(error)
            else:
                assert all(np.isfinite(values).all() for values in entries.values())


def broken(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        tensors = {"x.in_sum2": np.ones((2, 4), "f4"), "x.counts": np.ones((2, 1), "f4")}
        change(tensors)
        writer = GGUFWriter(path, "")
        writer.add_type("imatrix")
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


BROKEN = {
    "no counts": (broken(lambda tensors: tensors.pop("x.counts")), "lacks F32 sums or counts"),
    "counts of another type": (broken(lambda t: t.update({"x.counts": np.ones((2, 1), "f2")})), "lacks F32"),
    "three counts": (broken(lambda t: t.update({"x.counts": np.ones((3, 1), "f4")})), "8 sums for 3 counts"),
    "NaN": (broken(lambda t: t["x.in_sum2"].fill(np.nan)), "NaN or Inf"),
    "negative sums": (broken(lambda t: t["x.in_sum2"].fill(-1)), "negative"),
    "negative counts": (broken(lambda t: t["x.counts"].fill(-1)), "negative"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_refused(case: str, tmp_path: Path):
    write, says = BROKEN[case]
    with pytest.raises(UserError, match=says):
        read_imatrix(write(tmp_path / "i.gguf"))


# ---------------------------------------------------------------------------------- through the command line


@pytest.fixture
def refused(capsys, tmp_path: Path):
    """`refused(*argv, says=…)`: a command that must fail with one clear line, and write nothing."""

    def run(*argv: object, says: tuple[str, ...]) -> None:
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        assert main([*map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("moegguf: error: "), err
        assert all(fragment in err for fragment in says), f"{says} not all in: {err}"
        assert "Traceback" not in out + err
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before

    return run


def build_with(models, tmp_path: Path, imatrix: Path) -> list[object]:
    experts = [word for i, path in enumerate(models.experts) for word in ("--expert", f"e{i}={path}")]
    return ["build", "--base", models.base, *experts, "-o", tmp_path / "mix.gguf", "--imatrix", imatrix]


def test_an_imatrix_of_other_tensors_is_refused_and_names_them(models, dense, tmp_path: Path, refused):
    path = write_imatrix(tmp_path / "i.gguf", dense[0] | {"blk.7.ffn_up.weight": np.ones((1, 256), "f4")})
    refused(*build_with(models, tmp_path, path), says=("blk.7.ffn_up.weight is no tensor of this mix", "i.gguf"))
    path = write_imatrix(tmp_path / "j.gguf", {f"layer.{i}": np.ones((1, 256), "f4") for i in range(4)})
    refused(*build_with(models, tmp_path, path), says=("layer.0, layer.1 and 2 more are no tensors", "blk.0."))


def test_an_imatrix_of_other_widths_is_refused_and_names_them(models, dense, tmp_path: Path, refused):
    narrow = {name: values[:, :128] for name, values in dense[0].items()}
    path = write_imatrix(tmp_path / "i.gguf", narrow)
    says = "i.gguf: output.weight has 1 × 128 values, expected 1 × 256 (and 7 more)"
    refused(*build_with(models, tmp_path, path), says=(says,))
    two = {"blk.0.ffn_up_exps.weight": np.ones((2, 256), "f4")}
    path = write_imatrix(tmp_path / "j.gguf", stacked(dense) | two)
    says = "blk.0.ffn_up_exps.weight has 2 × 256 values, expected 3 × 256;"
    refused(*build_with(models, tmp_path, path), says=(says,))


def test_an_imatrix_of_an_expert_must_hold_its_ffn(models, dense, tmp_path: Path, refused):
    write_imatrix(tmp_path / "mix.imatrix", stacked(dense))
    write_imatrix(tmp_path / "narrow.imatrix", dense[0] | {UP: np.ones((1, 128), "f4")})
    recipes = tmp_path / "my.toml"
    for file, says in (
        ("mix.imatrix", ("blk.0.ffn_gate.weight (and 2 more) is missing", "expert e0", "it has ")),
        ("narrow.imatrix", ("blk.0.ffn_up.weight is (1, 128), expected (1, 256)",)),
        ("absent.imatrix", ("absent.imatrix", "cannot be read")),
    ):
        recipes.write_text(
            f'[mix.mine]\nbase = "{models.base}"\noutput = "{tmp_path}/mix.gguf"\n'
            f'experts = [{{ name = "e0", source = "{models.experts[0]}", imatrix = "{file}" }}]\n'
        )
        refused("build", "mine", "--recipes", recipes, says=says)


def test_a_key_imatrix_that_is_no_string_is_refused(models, tmp_path: Path):
    with pytest.raises(UserError, match=r"experts\[0\].imatrix: found 3"):
        make_recipe(tmp_path / "mix.gguf", models.base, [{"source": models.experts[0], "imatrix": 3}])


@pytest.fixture
def model(models, tmp_path: Path) -> Path:
    return build_dense(tmp_path / "model.gguf", models.base)


def test_a_calibration_needs_text_of_at_least_one_chunk(model, tmp_path: Path, refused):
    short = tmp_path / "short.txt"
    short.write_text("Only these few words.", encoding="utf-8")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    output = ("-o", tmp_path / "i.gguf", "--threads", 1)
    refused("calibrate", model, *output, says=("no text", "--text NAME=FILE"))
    refused("calibrate", model, "--text", f"a={short}", *output, says=("text a: has ", "one chunk of 512"))
    refused("calibrate", model, "--text", f"a={empty}", *output, says=("empty.txt: is empty",))
    refused("calibrate", model, "--text", str(TEXT), *output, says=("expected NAME=FILE",))
    few = ("--text", f"a={TEXT}", "--max-tokens", 100)
    refused("calibrate", model, *few, *output, says=("--max-tokens 100", "one chunk of 512"))
    refused("calibrate", model, *few, "--chunk", 9999, *output, says=("--chunk 9999", "at most 1024"))


def test_a_calibration_never_overwrites_what_is_no_calibration_of_this_model(model, models, tmp_path: Path, refused):
    text = ("--text", f"a={TEXT}", "--chunk", 64, "--threads", 1)
    theirs, other, ours = tmp_path / "theirs.gguf", tmp_path / "other.gguf", tmp_path / "ours.gguf"
    theirs.write_bytes((FIXTURES / "mix.imatrix").read_bytes())
    (tmp_path / "note.gguf").write_text("a note", encoding="utf-8")
    assert main(["calibrate", str(model), *map(str, text), "-o", str(ours)]) == 0
    build_dense(other, models.experts[0])
    for path, says in (
        (model, "is a GGUF, but no imatrix"),
        (tmp_path / "note.gguf", "exists already, and is no imatrix"),
        (theirs, "does not say which texts it holds"),
        (tmp_path / "absent/i.gguf", "absent: no such folder to write i.gguf to"),
        (tmp_path / "i.txt", "ends in .gguf"),
    ):
        refused("calibrate", model, *text, "-o", path, says=(path.name, says))
    refused("calibrate", model, *text, "--fresh", "-o", model, says=("is a GGUF, but no imatrix",))
    refused("calibrate", other, *text, "-o", ours, says=("of another model", "--fresh"))
    changed = tmp_path / "changed.txt"
    changed.write_text(TEXT.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    rest = (*text[2:], "-o", ours)
    refused("calibrate", model, "--text", f"a={changed}", *rest, says=("text a", "other text of that name"))
    refused("calibrate", model, *text[:2], "--chunk", 32, "-o", ours, says=("chunks of 64 tokens, not 32",))
    alien = tmp_path / "alien.gguf"
    rewrite(model, alien, keep=lambda key: not key.startswith(PREFIX))
    split = ("--split", tmp_path / "experts", "-o", tmp_path / "i.gguf")
    refused("calibrate", alien, *text, *split, says=("was not made by moegguf", "leave --split out"))
    refused("calibrate", "demo:math", *text, *split, says=("--split: goes with a GGUF",))
    refused("calibrate", model, *text, "--base", model, says=("--base: goes with the source of an expert",))
    (tmp_path / "e0.gguf").write_bytes(model.read_bytes())
    split = ("--split", tmp_path, "-o", tmp_path / "i.gguf")
    refused("calibrate", model, *text, *split, "--fresh", says=("e0.gguf", "is a GGUF, but no imatrix"))


def test_a_model_without_weights_and_unknown_names_are_refused(models, tmp_path: Path, refused):
    vocab = tmp_path / "vocab.gguf"
    writer = GGUFWriter(vocab, "llama")
    writer.add_context_length(512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = ("--text", f"a={TEXT}", "-o", tmp_path / "i.gguf")
    refused("calibrate", vocab, *text, says=("without weights",))
    refused("calibrate", tmp_path / "absent.gguf", *text, says=("absent.gguf", "cannot be read"))
    refused("calibrate", "no-such-recipe", *text[:2], says=("has no recipe 'no-such-recipe'",))
    refused("calibrate", "demo", "--text", f"zoo={TEXT}", says=("--text zoo", "no expert of recipe demo"))
