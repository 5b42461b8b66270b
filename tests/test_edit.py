"""Other experts in a finished mix: the file of a fresh build, to the byte; in place, whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import moegguf
import tiny_models
from conftest import CLOSE, Family, build_dense, build_mix, distance, logits, read_metadata, read_tensors, rewrite
from moegguf import writer
from moegguf.cli import main
from moegguf.edit import change as change_module
from moegguf.edit.change import Change, write_copy, write_in_place
from moegguf.edit.experts import plan_add, plan_drop, plan_swap
from moegguf.edit.finished import read_mix
from moegguf.edit.keys import plan_set
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.inspection import check
from moegguf.journal import held, journal_of
from moegguf.metadata import SPARE, CompactCard, SplitCard
from moegguf.routers.file import write_router
from peft_adapters import write_adapter
from striking import CHUNK, strike
from test_oracle import importances, write_imatrix
from test_routers import a_router, refuse

NOISY = {"mode": "noisy", "k": 2, "seed": 7}
FORMS = {
    "mixtral": {},
    "weighted": {"weights": (0.5, 0.3, 0.2)},
    "noisy": {"router": NOISY},
    "fused": {"layout": "fused"},
    "some layers": {"layers": [1]},
    "shared": {"layout": "shared"},
    "always on": {"router": NOISY, "always_on": "e1"},
}
"""All ways in which experts lie in a file."""


@pytest.fixture(scope="module")
def models(family) -> Family:
    return family("tied")


@pytest.fixture(scope="module")
def newcomer(models, tmp_path_factory) -> Path:
    """A fourth fine-tune. Its folder has a name as long as those of the others, so that a header stays as long."""
    return tiny_models.write_expert(tmp_path_factory.mktemp("new") / "e4", models.base, 4)


def built(path: Path, models: Family, names: str = "012", *, swapped: dict | None = None, **table) -> Path:
    """A mix of the experts with these numbers, by their own names, some of them `swapped` for other sources."""
    weights = table.pop("weights", None)
    experts = [
        {"name": f"e{i}", "source": (swapped or {}).get(f"e{i}", models.experts[int(i)])}
        | ({"weight": weights[n]} if weights else {})
        for n, i in enumerate(names)
    ]
    return build_mix(path, models.base, experts, **({"quant": "Q8_0"} | table))


def copied(change: Change, output: Path) -> Path:
    write_copy(change, output)
    return output


def copied_by_llama_quantize(mix: Path, target: Path) -> Path:
    """As `ollama create` does it to every file: dimensions of 1 go at the end, which is the front here."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.only_copy = 1, True
    assert llama_cpp.llama_model_quantize(bytes(mix), bytes(target), ctypes.byref(params)) == 0
    return target


@pytest.mark.parametrize(
    "table", [{"layout": "shared"}, {"router": NOISY, "always_on": "e1"}], ids=["shared", "always"]
)
def test_a_mix_that_went_through_llama_quantize_is_sound_and_changed_like_any_other(table, models, newcomer, tmp_path):
    mix = built(tmp_path / "mix.gguf", models, "01", **table)
    copy = copied_by_llama_quantize(mix, tmp_path / "copy.gguf")
    shapes = [read_header(path).tensors["blk.0.ffn_up_exps.weight"].shape for path in (mix, copy)]
    assert shapes[0] == (1, *shapes[1])
    assert check(copy) == []
    for path in (mix, copy):
        write_in_place(plan_set(read_mix(path), {"general.name": "other"}))
        write_in_place(plan_swap(read_mix(path), {"e0": str(newcomer)}))
    assert check(copy) == []
    ours, theirs = read_tensors(mix), read_tensors(copy)
    assert {name: tensor.data for name, tensor in ours.items()} == {
        name: tensor.data for name, tensor in theirs.items()
    }


# --- swap ---


@pytest.mark.parametrize("at", ["e0", "e1", "e2"])
@pytest.mark.parametrize("form", FORMS)
def test_a_swap_is_a_fresh_build_to_the_byte(form: str, at: str, models: Family, newcomer: Path, tmp_path: Path):
    quant = {"e0": "Q8_0", "e1": "Q4_K_M", "e2": "F32"}[at]
    mix = built(tmp_path / "mix.gguf", models, quant=quant, **FORMS[form])
    fresh = built(tmp_path / "fresh.gguf", models, swapped={at: newcomer}, quant=quant, **FORMS[form])
    change = plan_swap(read_mix(mix), {at: str(newcomer)})
    assert copied(change, tmp_path / "copy.gguf").read_bytes() == fresh.read_bytes()
    write_in_place(change)
    assert mix.read_bytes() == fresh.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["copy.gguf", "fresh.gguf", "mix.gguf"]


@pytest.mark.parametrize("quant", ["Q2_K_S", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("form", ["mixtral", "fused"])
def test_what_needs_or_has_an_imatrix_is_swapped_to_the_byte_too(form: str, quant: str, family, tmp_path: Path):
    """One of the dense model, which is that of every expert."""
    models = family("llama3_like", num_hidden_layers=1)
    dense = read_tensors(build_dense(tmp_path / "dense.gguf", models.base))
    table = FORMS[form] | {"quant": quant, "imatrix": str(write_imatrix(tmp_path / "i.gguf", importances(dense)))}
    mix = built(tmp_path / "mix.gguf", models, "01", **table)
    fresh = built(tmp_path / "fresh.gguf", models, "01", swapped={"e0": models.experts[2]}, **table)
    change = plan_swap(read_mix(mix), {"e0": str(models.experts[2])}, imatrix=tmp_path / "i.gguf")
    write_in_place(change)
    assert mix.read_bytes() == fresh.read_bytes()
    assert change.notes == ()


def test_a_type_that_needs_an_imatrix_is_not_swapped_in_without(family, tmp_path: Path):
    models = family("llama3_like", num_hidden_layers=1)
    dense = read_tensors(build_dense(tmp_path / "dense.gguf", models.base))
    imatrix = write_imatrix(tmp_path / "i.gguf", importances(dense))
    mix = built(tmp_path / "mix.gguf", models, "01", quant="Q2_K_S", imatrix=str(imatrix))
    with pytest.raises(UserError, match="Q2_K needs an importance matrix; pass --imatrix FILE"):
        plan_swap(read_mix(mix), {"e0": str(models.experts[2])})


@pytest.mark.parametrize("layout", ["mixtral", "fused"])
def test_adapters_and_gguf_files_are_swapped_in_as_a_build_takes_them(layout: str, models, tmp_path: Path, capsys):
    adapter = write_adapter(tmp_path / "adapter", models.base)
    ref, gguf = f"lora:{adapter}::{models.base}", build_dense(tmp_path / "q4.gguf", models.experts[2], quant="Q4_0")
    mix = built(tmp_path / "mix.gguf", models, layout=layout)
    fresh = built(tmp_path / "fresh.gguf", models, swapped={"e0": ref, "e2": gguf}, layout=layout)
    assert main(["swap", str(mix), f"e0={ref}", f"e2={gguf}", "-o", str(tmp_path / "out.gguf")]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == fresh.read_bytes()
    said = capsys.readouterr().out
    assert "requantised" in said
    assert "(Q4_0 → Q8_0)" in said


def test_only_what_a_swap_touches_is_written(models, newcomer: Path, tmp_path: Path):
    """Bytes of the other experts, of the trunk and of the router are not even written again."""
    mix = built(tmp_path / "mix.gguf", models)
    change = plan_swap(read_mix(mix), {"e1": str(newcomer)})
    touched = [span for chunk in change.chunks() for span in chunk.spans]
    tensors = [info for name, info in read_mix(mix).header.tensors.items() if "_exps" in name]
    assert sum(span.n_bytes for span in touched) == sum(info.nbytes for info in tensors) // 3
    for span in touched:
        assert any(info.offset < span.offset < info.offset + info.nbytes for info in tensors)


def test_a_router_that_was_fitted_stays_and_that_is_said(models, newcomer: Path, tmp_path: Path):
    write_router(tmp_path / "r.safetensors", a_router())
    mix = built(tmp_path / "mix.gguf", models, router=str(tmp_path / "r.safetensors"))
    before = read_tensors(mix)
    change = plan_swap(read_mix(mix), {"e1": str(newcomer)})
    assert change.notes == (
        "the ridge router stays as it is: it was made for the old e1; `moegguf route fit --mix` makes one for the new",
    )
    write_in_place(change)
    assert check(mix) == []
    after = read_tensors(mix)
    assert [name for name in after if after[name] != before[name]] == [name for name in after if "_exps" in name]


def test_a_longer_label_goes_into_the_room_of_the_header(models, tmp_path: Path):
    """All tensors and all keys of a fresh build, but for how much room is left."""
    longer = tmp_path / "a-model-with-quite-a-long-name"
    shutil.copytree(models.experts[2], longer)
    mix = built(tmp_path / "mix.gguf", models)
    fresh = built(tmp_path / "fresh.gguf", models, swapped={"e0": longer})
    size = mix.stat().st_size
    assert main(["swap", str(mix), f"e0={longer}", "--in-place", "--threads", "1"]) == 0
    assert (read_tensors(mix), mix.stat().st_size) == (read_tensors(fresh), size)
    assert read_metadata(mix) | {SPARE: None} == read_metadata(fresh) | {SPARE: None}
    assert distance(logits(mix), logits(fresh)) == 0


# --- whole or not at all ---


def in_a_child(run: Callable[[], object]) -> int:
    """Run in a forked process, which ends with 0 if nothing ends it before. Returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", ["mixtral", "fused"])
def test_a_swap_killed_after_any_write_is_undone_by_the_next_command(
    form: str, models, newcomer: Path, tmp_path: Path, monkeypatch, capsys
):
    mix = built(tmp_path / "mix.gguf", models, quant="F32", **FORMS[form])
    link = tmp_path / "elsewhere" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(mix)
    before, change = mix.read_bytes(), plan_swap(read_mix(link), {"e1": str(newcomer)})
    spans = [span for chunk in change.chunks() for span in chunk.spans]
    pwrite, write, n_done = os.pwrite, change_module.write, 0

    def dying(function: Callable, nth: int) -> Callable:
        def count_and_die(*args):
            nonlocal n_done
            if n_done == nth:
                os._exit(9)
            n_done += 1
            return function(*args)

        return count_and_die

    for nth in [*range(4), len(spans) // 2, len(spans) - 1, len(spans)]:
        monkeypatch.setattr(os, "pwrite", dying(pwrite, nth))
        monkeypatch.setattr(change_module, "write", dying(write, nth))
        assert in_a_child(lambda: write_in_place(change)) == 9
        monkeypatch.undo()
        assert journal_of(mix).exists()
        assert "was interrupted" in refuse(capsys, "inspect", mix)
        assert "was interrupted" in refuse(capsys, "inspect", link)
        if nth % 2:
            assert main(["set", str(mix), "--recover"]) == 0
        else:
            assert main(["set", str(mix), "--name", "mix"]) == 0  # any other change puts it back first
        capsys.readouterr()
        assert mix.read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"mix.gguf", "elsewhere"}
    assert in_a_child(lambda: write_in_place(change)) == 0
    assert mix.read_bytes() != before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")], ids=["Ctrl-C", "disk"])
def test_an_error_in_the_midst_of_a_swap_puts_everything_back_at_once(error, models, newcomer, tmp_path, monkeypatch):
    mix = built(tmp_path / "mix.gguf", models)
    before, n_heard = mix.read_bytes(), 0

    def interrupt(n_bytes: int) -> None:
        nonlocal n_heard
        n_heard += 1
        if n_heard == 3:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        write_in_place(plan_swap(read_mix(mix), {"e0": str(newcomer)}), progress=interrupt)
    assert n_heard == 3
    assert mix.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mix.gguf"]


@pytest.mark.parametrize("point", [(CHUNK, 0), ("os.fsync", 2)], ids=str)
def test_sigterm_in_the_midst_of_a_swap_puts_everything_back_at_once(point, models, newcomer, tmp_path: Path):
    mix = built(tmp_path / "mix.gguf", models)
    before = mix.read_bytes()
    stopped = strike(signal.SIGTERM, point, ["swap", mix, f"e0={newcomer}", "--in-place", "--threads", "1"])
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (143, "", "moegguf: terminated\n")
    assert mix.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mix.gguf"]


def test_ctrl_c_while_a_thread_starts_leaves_none_that_writes_on(models, newcomer, tmp_path: Path, monkeypatch):
    mix = built(tmp_path / "mix.gguf", models)
    before, start, make_rows = mix.read_bytes(), threading.Thread.start, writer.make_rows

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        signal.raise_signal(signal.SIGINT)

    def slow(*args):
        time.sleep(0.1)
        return make_rows(*args)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    monkeypatch.setattr(writer, "make_rows", slow)
    with pytest.raises(KeyboardInterrupt):
        write_in_place(plan_swap(read_mix(mix), {"e0": str(newcomer)}))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("quantise")]
    assert mix.read_bytes() == before


def test_a_source_that_turns_out_broken_leaves_the_mix_as_it_was(models, tmp_path: Path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(models.experts[0], broken)
    file = broken / "model.safetensors"
    tensors = tiny_models.read_safetensors(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][1][3, 5] = np.nan
    tiny_models.write_safetensors(file, {k: (d, tiny_models.encode(v, d)) for k, (d, v) in tensors.items()})
    mix = built(tmp_path / "mix.gguf", models)
    before = mix.read_bytes()
    assert "1 of 6144 weights are NaN or Inf" in refuse(capsys, "swap", mix, f"e1={broken}", "--in-place")
    assert mix.read_bytes() == before
    assert not journal_of(mix).exists()


def test_a_disk_without_room_is_known_before_the_first_write(models, newcomer, tmp_path: Path, monkeypatch, capsys):
    mix = built(tmp_path / "mix.gguf", models)
    before = mix.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    swap = ["swap", mix, f"e1={newcomer}"]
    assert "are free, the journal of this change needs" in refuse(capsys, *swap, "--in-place")
    assert "are free, the copy needs" in refuse(capsys, *swap, "-o", tmp_path / "out.gguf")
    assert "the split file needs" in refuse(capsys, "split", mix, "--max-size", "100kB")
    assert mix.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mix.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="locks of the other kind")
def test_a_file_that_another_process_changes_or_copies_is_left_alone(models, newcomer, tmp_path: Path, capsys):
    import fcntl

    mix = built(tmp_path / "mix.gguf", models)
    change = plan_swap(read_mix(mix), {"e1": str(newcomer)})
    with open(mix, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for where in (["--in-place"], ["-o", tmp_path / "out.gguf"]):
            assert "another process is changing it" in refuse(capsys, "swap", mix, f"e1={newcomer}", *where)
    with held(mix), pytest.raises(UserError, match="another process"):
        write_in_place(change)
    with held(mix):
        write_copy(change, tmp_path / "out.gguf")


def test_a_file_that_changed_since_it_was_looked_at_is_not_touched(models, newcomer, tmp_path: Path):
    mix = built(tmp_path / "mix.gguf", models)
    change = plan_swap(read_mix(mix), {"e1": str(newcomer)})
    built(mix.with_name("other.gguf"), models, "01").replace(mix)
    before = mix.read_bytes()
    with pytest.raises(UserError, match="changed by another program"):
        write_in_place(change)
    assert mix.read_bytes() == before


def test_a_copy_is_of_the_mix_that_was_looked_at(models, newcomer, tmp_path: Path):
    mix = built(tmp_path / "mix.gguf", models)
    change = plan_swap(read_mix(mix), {"e1": str(newcomer)})
    assert main(["set", str(mix), "--name", "another"]) == 0
    with pytest.raises(UserError, match="was changed meanwhile; try again"):
        write_copy(change, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_recovering_says_whether_there_was_anything_to_undo(models, tmp_path: Path, capsys):
    mix = built(tmp_path / "mix.gguf", models)
    capsys.readouterr()
    assert main(["set", str(mix), "--recover", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["undone"], said["bytes_written"]) == (str(mix), False, 0)
    (tmp_path / "empty.gguf").touch()
    assert "0 bytes are too few" in refuse(capsys, "set", tmp_path / "empty.gguf", "--recover")


# --- add and drop ---


@pytest.mark.parametrize(
    ("form", "drop"), [("mixtral", "1"), ("mixtral", "01"), ("noisy", "0"), ("noisy", "2"), ("always on", "0")]
)
def test_adding_and_dropping_are_fresh_builds_to_the_byte(form: str, drop: str, models, tmp_path: Path):
    """Where a layout folds nothing into the weights that depends on how many experts there are."""
    left = "".join(i for i in "012" if i not in drop)
    full = built(tmp_path / "full.gguf", models, "012", **FORMS[form])
    less = built(tmp_path / "less.gguf", models, left, **FORMS[form])
    turned = built(tmp_path / "turned.gguf", models, left + drop, **FORMS[form])
    without = plan_drop(read_mix(full), [f"e{i}" for i in drop])
    assert copied(without, tmp_path / "dropped.gguf").read_bytes() == less.read_bytes()
    more = plan_add(read_mix(less), {f"e{i}": str(models.experts[int(i)]) for i in drop})
    assert copied(more, tmp_path / "added.gguf").read_bytes() == turned.read_bytes()
    assert without.notes == more.notes == ()


@pytest.mark.parametrize("form", ["weighted", "fused", "some layers", "shared", "always on"])
def test_where_shares_are_folded_in_the_others_are_scaled(form: str, models, tmp_path: Path):
    """An always-on mix of three that runs three has k folded in."""
    table, left, at = FORMS[form] | {"quant": "F32"}, {}, 0
    if form == "weighted":
        left = {"weights": (0.6, 0.4)}
    if form == "always on":
        table, left, at = table | {"router": NOISY | {"k": 3}}, {"router": NOISY | {"k": 2}}, 2
    mix = built(tmp_path / "mix.gguf", models, "102", **table)
    fresh = built(tmp_path / "fresh.gguf", models, "102"[:at] + "102"[at + 1 :], **(table | left))
    change = plan_drop(read_mix(mix), [f"e{'102'[at]}"])
    found = copied(change, tmp_path / "dropped.gguf")
    assert "multiplied by" in change.notes[0]
    assert read_metadata(found) == read_metadata(fresh)
    assert check(found) == []
    assert distance(logits(found), logits(fresh)) < CLOSE
    if form in ("fused", "some layers", "shared"):
        again = copied(plan_add(read_mix(found), {"e1": str(models.experts[1])}), tmp_path / "again.gguf")
        assert distance(logits(again), logits(mix)) < CLOSE


def test_a_factor_goes_into_the_block_scales_and_nothing_is_quantised_again(models, tmp_path: Path):
    mix = built(tmp_path / "mix.gguf", models, "102", layout="fused")
    found = copied(plan_drop(read_mix(mix), ["e1"]), tmp_path / "dropped.gguf")
    old, new = (read_tensors(path)["blk.0.ffn_down.weight"] for path in (mix, found))
    old, new = (down.rows.reshape(64, -1, 34) for down in (old, new))  # blocks of a scale and 32 weights
    old = old[:, 96 // 32 :]
    assert np.array_equal(new[..., 2:], old[..., 2:])
    scales = [np.ascontiguousarray(blocks[..., :2]).view("<f2").astype("f4") for blocks in (old, new)]
    assert np.array_equal(scales[1], (scales[0] * np.float32(1.5)).astype("<f2"))


def test_a_fitted_router_loses_rows_and_gains_none(models, newcomer, tmp_path: Path, capsys):
    write_router(tmp_path / "r.safetensors", a_router())
    mix = built(tmp_path / "mix.gguf", models, router=str(tmp_path / "r.safetensors"))
    found = copied(plan_drop(read_mix(mix), ["e1"]), tmp_path / "dropped.gguf")
    for name, tensor in read_tensors(mix).items():
        if name.endswith("ffn_gate_inp.weight"):
            assert np.array_equal(read_tensors(found)[name].values, tensor.values[[0, 2]])
    assert check(found) == []
    before = found.read_bytes()
    assert main(["route", "set", str(found), "--router", "noisy:3"]) == 0
    assert main(["route", "set", str(found), "--undo"]) == 0
    assert found.read_bytes() == before
    capsys.readouterr()
    add = ["add", mix, f"e3={newcomer}", "-o", tmp_path / "out.gguf"]
    assert "its ridge router has no row for another expert; pass --router" in refuse(capsys, *add)
    four = a_router(("e0", "e1", "e2", "e3"))
    write_router(tmp_path / "four.safetensors", four)
    assert main([*map(str, add), "--router", str(tmp_path / "four.safetensors")]) == 0
    fresh = build_mix(
        tmp_path / "fresh.gguf", models.base, [*models.experts, newcomer], quant="Q8_0",
        router=str(tmp_path / "four.safetensors"),
    )  # fmt: skip
    assert (tmp_path / "out.gguf").read_bytes() == fresh.read_bytes()


def test_experts_of_two_precisions_keep_their_own(family, tmp_path: Path):
    """The new one is of the coarser kind; where one would have to change its kind, that is refused."""
    models = family("tied")
    experts = [
        {"name": f"e{i}", "source": models.experts[i], "quant": quant} for i, quant in enumerate(["Q8_0", "Q4_0"])
    ]
    mix = build_mix(tmp_path / "mix.gguf", models.base, experts, quant="Q4_0")
    found = copied(plan_add(read_mix(mix), {"e2": str(models.experts[2])}), tmp_path / "more.gguf")
    assert [expert.quant for expert in read_mix(found).card.experts] == ["Q8_0", "Q4_0", "Q4_0"]
    assert check(found) == []
    with pytest.raises(UserError, match="e0 would have to be quantised again: it is Q8_0, and Q4_0 for"):
        plan_drop(read_mix(mix), ["e1"])


# --- set ---


def test_what_is_set_in_place_is_what_a_reader_finds_and_can_be_set_back(models, tmp_path: Path, capsys):
    mix = built(tmp_path / "mix.gguf", models, router=NOISY | {"k": 2})
    before, template = mix.read_bytes(), tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    flags = ["--name", "my mix", "--license", "mit", "--author", "Zoë", "--k", "3", "--template", str(template)]
    assert main(["set", str(mix), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["in_place"] is True
    expected = {"general.name": "my mix", "moegguf.name": "my mix", "general.license": "mit", "general.author": "Zoë"}
    expected |= {"llama.expert_used_count": 3, "moegguf.router.k": 3, "tokenizer.chat_template": template.read_text()}
    assert {key: read_metadata(mix)[key] for key in expected} == expected
    assert read_tensors(mix).keys() == read_tensors(mix).keys()
    assert check(mix) == []
    assert mix.stat().st_size == len(before)
    old = tmp_path / "old.jinja"
    old.write_text(read_metadata(built(tmp_path / "fresh.gguf", models))["tokenizer.chat_template"])
    back = ["--name", "mix", "--license", "", "--author", "", "--k", "2", "--template", str(old)]
    assert main(["set", str(mix), *back]) == 0
    assert mix.read_bytes() == before


def test_what_does_not_fit_into_the_header_goes_into_a_copy(models, tmp_path: Path, capsys):
    mix = built(tmp_path / "mix.gguf", models)
    before, text = mix.read_bytes(), "long " * 400
    line = refuse(capsys, "set", mix, "--description", text)
    assert "its header has room for" in line
    assert "write a copy with -o" in line
    assert main(["set", str(mix), "--description", text, "-o", str(tmp_path / "out.gguf")]) == 0
    assert mix.read_bytes() == before
    assert read_metadata(tmp_path / "out.gguf") == read_metadata(mix) | {"general.description": text}
    assert read_tensors(tmp_path / "out.gguf") == read_tensors(mix)


# --- mistakes ---


def test_a_mistake_is_one_line_and_leaves_the_file_as_it_was(models, newcomer, family, tmp_path: Path, capsys):
    mix, out = built(tmp_path / "mix.gguf", models), tmp_path / "out.gguf"
    weighted = built(tmp_path / "weighted.gguf", models, **FORMS["weighted"])
    always = built(tmp_path / "always.gguf", models, **FORMS["always on"])
    foreign = rewrite(built(tmp_path / "f32.gguf", models, quant="F32"), tmp_path / "foreign.gguf",
                      keep=lambda key: not key.startswith("moegguf."))  # fmt: skip
    fused = built(tmp_path / "fused.gguf", models, layout="fused")
    dense = build_dense(tmp_path / "dense.gguf", models.base)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = family("tied", intermediate_size=128).base
    for says, *argv in (
        ("has no expert 'e7', only e0, e1, e2; name one of these", "swap", mix, f"e7={newcomer}", "--in-place"),
        ("has no expert 'e7', only e0, e1, e2; name one of these", "drop", mix, "e7", "-o", out),
        ("FFN width 128, the base", "swap", mix, f"e1={other}", "--in-place"),
        ("FFN width 128, the base", "add", mix, f"e3={other}", "-o", out),
        ("no such file or folder", "swap", mix, "e1=./nowhere", "--in-place"),
        ("e1: expected NAME=SOURCE", "swap", mix, "e1", "--in-place"),
        ("e1 was given", "swap", mix, f"e1={newcomer}", f"e1={newcomer}", "--in-place"),
        ("one of the arguments -o/--output --in-place is required", "swap", mix, f"e1={newcomer}"),
        ("not allowed with argument", "swap", mix, f"e1={newcomer}", "--in-place", "-o", out),
        ("a name that no other expert has", "add", mix, f"e1={newcomer}", "-o", out),
        ("letters, digits", "add", mix, f"e 1={newcomer}", "-o", out),
        ("blk.0.ffn_gate.weight is missing, in the base (96, 64)", "swap", mix, f"e1={weighted}", "--in-place"),
        ("has no router in it: layout fused", "add", fused, f"e3={newcomer}", "--router", "noisy", "-o", out),
        ("is also a source", "swap", mix, f"e1={dense}", "--force", "-o", dense),
        ("is the mix itself", "swap", mix, f"e1={mix}", "--in-place"),
        ("is the file itself", "swap", mix, f"e1={newcomer}", "--force", "-o", mix),
        ("exists already", "swap", mix, f"e1={newcomer}", "-o", weighted),
        ("expected a name that ends in .gguf", "swap", mix, f"e1={newcomer}", "-o", tmp_path / "out.bin"),
        ("was not made by moegguf", "swap", foreign, f"e1={newcomer}", "--in-place"),
        ("not a GGUF file", "swap", newcomer / "config.json", f"e1={newcomer}", "--in-place"),
        ("cannot be read", "swap", tmp_path / "absent.gguf", f"e1={newcomer}", "--in-place"),
        ("no expert would be left of e0, e1, e2", "drop", mix, "e0", "e1", "e2", "-o", out),
        ("e1 is always on, so it cannot be dropped", "drop", always, "e1", "-o", out),
        ("its experts have weights, and no share is left", "add", weighted, f"e3={newcomer}", "-o", out),
        ("is gate-less, so all 3 experts run", "set", mix, "--k", "2"),
        ("k is 2 by its weights, e1 is always on", "set", always, "--k", "3"),
        ("expected 1 to 3", "set", always, "--k", "4"),
        ("nothing to set", "set", mix),
        ("expected a name", "set", mix, "--name", " "),
        ("is no text in UTF-8", "set", mix, "--author", "\udcff"),
        ("bad.jinja: the file's chat template is broken", "set", mix, "--template", tmp_path / "bad.jinja"),
        ("cannot be read", "set", mix, "--template", tmp_path / "absent.jinja"),
        ("--threads 0: expected", "drop", mix, "e0", "-o", out, "--threads", "0"),
    ):
        assert says in refuse(capsys, *argv), argv
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"mix": "fine-grained"}, "it is fine-grained, its experts are averaged into one"),
        ({"mix": "ffn+attention"}, "its attention is the mean of all experts'"),
        ({"trunk": "mean"}, "its trunk is the mean of all experts'"),
        ({"trunk": "e1"}, "its trunk is that of e1"),
    ],
)
def test_what_holds_more_than_its_experts_is_refused(table, says: str, models, newcomer, tmp_path: Path, capsys):
    mix = built(tmp_path / "mix.gguf", models, "01", **table)
    for argv in (["swap", mix, f"e1={newcomer}", "--in-place"], ["drop", mix, "e1", "-o", tmp_path / "out.gguf"]):
        line = refuse(capsys, *argv)
        assert says in line
        assert "build the mix again" in line


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"compact": CompactCard((64, 64), 96)}, "it is compact, neurons of its experts are merged"),
        ({"split": SplitCard("neurons", 96, 288, "0")}, "its neurons are split into two groups"),
    ],
)
def test_neurons_that_lie_otherwise_are_refused(what, says: str, models, tmp_path: Path):
    """By the card, before anything is made of shapes that may happen to fit."""
    mix = read_mix(built(tmp_path / "mix.gguf", models, layout="shared"))
    with pytest.raises(UserError, match=says):
        plan_drop(replace(mix, card=replace(mix.card, **what)), ["e1"])


def test_experts_that_share_blocks_cannot_be_told_apart(family, tmp_path: Path, capsys):
    """Eight of 352 neurons are eleven blocks of 256: so a build may quantise them, and no slice is one expert's."""
    models = family("mistral_like")
    mix = build_mix(tmp_path / "mix.gguf", models.base, [models.experts[0]] * 8, layout="fused", quant="Q4_K_M")
    assert "experts of 352 columns share blocks of 256" in refuse(
        capsys, "swap", mix, f"e1={models.base}", "--in-place"
    )


# --- from Python ---


def test_functions_write_what_the_commands_write(models, newcomer, tmp_path: Path, capfd):
    mix = built(tmp_path / "mix.gguf", models, router=NOISY)
    calls = {
        "swap": (({"e0": newcomer},), [f"e0={newcomer}"]),
        "add": (({"e3": newcomer},), [f"e3={newcomer}"]),
        "drop": ((["e1"],), ["e1"]),
    }
    for name, (given, argv) in calls.items():
        output, other = tmp_path / f"{name}.gguf", tmp_path / f"{name}-too.gguf"
        made = getattr(moegguf, name)(mix, *given, output=output, threads=1)
        assert capfd.readouterr() == ("", "")
        assert main([name, str(mix), *argv, "-o", str(other), "--threads", "1", "--json"]) == 0
        said = json.loads(capfd.readouterr().out)
        assert output.read_bytes() == other.read_bytes()
        assert (made.path, made.in_place, made.n_bytes) == (output, False, output.stat().st_size)
        assert (said["bytes"], said["notes"]) == (made.n_bytes, list(made.notes))
        assert [each["name"] for each in said["experts"]] == [expert.name for expert in made.card.experts]


def test_a_function_changes_in_place_where_there_is_no_output(models, newcomer, tmp_path: Path):
    mix, fresh = built(tmp_path / "mix.gguf", models), built(tmp_path / "fresh.gguf", models, swapped={"e0": newcomer})
    made = moegguf.swap(mix, {"e0": str(newcomer)}, threads=1)
    assert made.in_place and made.path == mix and not made.is_undone
    assert mix.read_bytes() == fresh.read_bytes()
    changed = moegguf.set(mix, name="other", author="me")
    assert changed.card.name == read_metadata(mix)["general.name"] == "other"
    journal_of(mix).write_bytes(b"moegguf-journal-1")
    assert moegguf.set(mix, recover=True).is_undone
    assert not moegguf.set(mix, recover=True).is_undone


def test_values_of_the_wrong_kind_are_user_errors(models, tmp_path: Path):
    mix = built(tmp_path / "mix.gguf", models)
    before = mix.read_bytes()
    for call in (
        lambda: moegguf.swap(mix, 5),
        lambda: moegguf.swap(mix, {"e0": 5}),
        lambda: moegguf.swap(mix, {"e0": ["a", "b"]}),
        lambda: moegguf.swap(mix, {}),
        lambda: moegguf.swap(5, {"e0": mix}),
        lambda: moegguf.swap(mix, {"e0": models.base}, threads=0),
        lambda: moegguf.add(mix, {"e3": models.base}, output=None),
        lambda: moegguf.drop(mix, 5, output=tmp_path / "out.gguf"),
        lambda: moegguf.drop(mix, ["e0"], output=mix),
        lambda: moegguf.prune(mix, output=tmp_path / "out.gguf"),
        lambda: moegguf.prune(mix, output=tmp_path / "out.gguf", keep="two", text=[]),
        lambda: moegguf.prune(mix, output=tmp_path / "out.gguf", keep=1, text=5),
        lambda: moegguf.set(mix, name=5),
        lambda: moegguf.set(mix, k="two"),
        lambda: moegguf.set(mix),
        lambda: moegguf.split(mix, None),
        lambda: moegguf.merge(mix, output=5),
    ):
        with pytest.raises(UserError):
            call()
    assert mix.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mix.gguf"]
