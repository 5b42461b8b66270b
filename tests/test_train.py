"""Router training: what changes and what does not, the same numbers however a run is cut up, and bad input.

Mechanics run on tiny random models, the effect is shown on the demo family. The built GGUF is held against the
reference that was trained.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moegguf
from conftest import CLOSE, Family, Heard, build_mix, distance, logits, make_recipe, read_tensors
from moegguf.assembly import open_mix
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.mix import Mix
from moegguf.recipe import RouterMode, load_recipe
from moegguf.routers.file import read_router, write_router

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

from moegguf.jobs.training import Training  # noqa: E402
from moegguf.reference.examples import (  # noqa: E402
    IGNORED,
    Example,
    collate,
    equal_parts,
    fit_length,
    read_dataset,
)
from moegguf.reference.model import ReferenceModel  # noqa: E402
from moegguf.reference.train import (  # noqa: E402
    Checkpoints,
    Settings,
    Step,
    Trained,
    Variant,
    balance_term,
    chosen_from,
    digest_of_frozen,
    last_checkpoint,
    train,
)

KIND = "tied"
N_VOCAB = 392
NOISY = {"mode": "noisy", "k": 2, "std": 0.05, "seed": 11}
FAST = {"batch": 2, "accumulate": 2, "lr": 1e-2, "max_steps": 6}
PREFIX = "moegguf: error: "


pytestmark = pytest.mark.usefixtures("one_torch_thread", "small_collections")


@pytest.fixture(scope="module")
def small_collections():
    """Each training begins with a collection of garbage: most of its time would go into all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tiny(family) -> Family:
    return family(KIND)


def mix_of(tiny: Family, **table) -> Mix:
    return open_mix(make_recipe(Path("mix.gguf"), tiny.base, tiny.experts, **{"router": NOISY, **table}))


def model_of(tiny: Family, dtype=torch.float32, **table) -> ReferenceModel:
    return ReferenceModel.from_mix(mix_of(tiny, **table), dtype=dtype)


def some_examples(n: int, seed: int = 0) -> list[Example]:
    """Random tokens of random lengths; the first three are given."""
    rng = np.random.RandomState(seed)
    return [Example(rng.randint(0, N_VOCAB, rng.randint(5, 14)).astype(np.int32), 3, f"e:{i}") for i in range(n)]


def fit(model: ReferenceModel, folder: Path, examples=None, *, resume=False, save_steps=100, on_step=None, stop=None,
        **settings) -> Trained:  # fmt: skip
    return train(
        model, some_examples(10) if examples is None else examples, Settings(**FAST | settings),
        Checkpoints(folder, save_steps, resume), on_step=on_step or (lambda step: None),
        should_stop=stop or (lambda: False),
    )  # fmt: skip


def bytes_of(model: ReferenceModel) -> dict[str, bytes]:
    return {name: p.detach().float().numpy().tobytes() for name, p in model.named_parameters()}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def same_router(a: Trained | Training, b: Trained | Training) -> bool:
    matrices = zip(a.router.matrices.values(), b.router.matrices.values(), strict=True)
    return all(np.array_equal(x, y) for x, y in matrices)


def reference_logits(model: ReferenceModel, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


# --- what is trained ---


@pytest.mark.parametrize(
    ("variant", "trunk"),
    [
        ("router", set()),
        ("pretrain", set()),
        ("router+embeddings", {"token_embd.weight"}),
        ("router+o_proj", {"blk.0.attn_output.weight", "blk.1.attn_output.weight"}),
    ],
)
def test_a_variant_changes_exactly_its_tensors_and_the_built_gguf_carries_them(variant, trunk, tiny, tmp_path):
    model = model_of(tiny)
    before = bytes_of(model)
    trained = fit(model, tmp_path / "c", variant=Variant(variant))
    assert changed(before, bytes_of(model)) == {"blk.0.ffn.router", "blk.1.ffn.router"} | trunk
    assert set(trained.router.trunk) == trunk
    assert trained.router.mode is RouterMode.TRAINED

    write_router(tmp_path / "r.safetensors", trained.router)
    built = build_mix(tmp_path / "mix.gguf", tiny.base, tiny.experts, router=str(tmp_path / "r.safetensors"))
    plain = read_tensors(build_mix(tmp_path / "plain.gguf", tiny.base, tiny.experts, router=NOISY))
    stored = read_tensors(built)
    routers = {f"blk.{layer}.ffn_gate_inp.weight" for layer in (0, 1)}
    assert {name for name in stored if stored[name].data != plain[name].data} == routers | trunk
    tokens = [t % N_VOCAB for t in range(5, 300, 23)]
    assert distance(logits(built, tokens), reference_logits(model, tokens)) < CLOSE


def test_the_frozen_digest_is_that_of_the_weights_and_is_recorded(tiny, tmp_path):
    model = model_of(tiny)
    trained = fit(model, tmp_path / "c", max_steps=1)
    assert trained.router.settings["frozen sha256"] == digest_of_frozen(model)
    expected = hashlib.sha256()
    for name, p in model_of(tiny).named_parameters():
        if not name.endswith("router"):
            expected.update(f"{name} {tuple(p.shape)} {p.dtype} ".encode() + p.detach().numpy().tobytes())
    assert digest_of_frozen(model) == expected.hexdigest()


def test_a_change_of_what_is_frozen_is_an_error(tiny, tmp_path):
    model = model_of(tiny)

    def tamper(step: Step) -> None:
        with torch.no_grad():
            model.get_parameter("blk.1.ffn.experts.2.down.weight")[0, 0] += 1e-3

    with pytest.raises(RuntimeError, match="frozen"):
        fit(model, tmp_path / "c", max_steps=1, on_step=tamper)


def test_a_shared_router_trains_one_matrix(tiny, tmp_path):
    model = model_of(tiny, router=NOISY | {"shared": True})
    before = model.router().matrices[0, "ffn"]
    trained = fit(model, tmp_path / "c")
    first, second = trained.router.matrices.values()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, before)
    write_router(tmp_path / "r.safetensors", trained.router)
    assert read_router(tmp_path / "r.safetensors").shared


def test_an_always_on_expert_has_no_row_and_the_built_gguf_agrees(tiny, tmp_path):
    model = model_of(tiny, always_on="e1", router=NOISY | {"k": 3})
    before = model.router().matrices[0, "ffn"]
    trained = fit(model, tmp_path / "c")
    assert trained.router.experts == ("e0", "e2")
    assert trained.router.matrices[0, "ffn"].shape == (2, 64)
    assert not np.array_equal(trained.router.matrices[0, "ffn"], before)
    write_router(tmp_path / "r.safetensors", trained.router)
    built = build_mix(
        tmp_path / "mix.gguf", tiny.base, tiny.experts, router=str(tmp_path / "r.safetensors"), always_on="e1"
    )
    tokens = [t % N_VOCAB for t in range(5, 300, 23)]
    assert distance(logits(built, tokens), reference_logits(model, tokens)) < CLOSE


def test_training_goes_on_from_a_trained_router_and_keeps_its_trunk(tiny, tmp_path):
    first = fit(model_of(tiny), tmp_path / "c1", variant=Variant.O_PROJ).router
    write_router(tmp_path / "r.safetensors", first)
    model = model_of(tiny, router=str(tmp_path / "r.safetensors"))
    second = fit(model, tmp_path / "c2").router
    assert set(second.trunk) == set(first.trunk)
    assert all(np.array_equal(second.trunk[name], first.trunk[name]) for name in first.trunk)


@pytest.mark.parametrize("mixed", ["ffn+attention", "fine-grained"])
def test_routers_that_no_gguf_holds_are_trained_at_every_site(mixed, tiny, tmp_path):
    model = model_of(tiny, mix=mixed)
    before = model.router().matrices
    trained = fit(model, tmp_path / "c", max_steps=2)
    assert all(not np.array_equal(trained.router.matrices[site], before[site]) for site in before)


def test_bfloat16_trains_float32_parameters_over_bfloat16_weights(tiny, tmp_path):
    model = model_of(tiny, torch.bfloat16)
    trained = fit(model, tmp_path / "c", variant=Variant.EMBEDDINGS, max_steps=20)
    types = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert types == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert trained.steps[-1].smoothed < trained.steps[0].loss


# --- the loss ---


def test_only_what_follows_the_prompt_counts():
    batch = collate([Example(np.arange(10, 16, dtype=np.int32), 3, ""), Example(np.array([7, 8], np.int32), 0, "")])
    assert batch["tokens"].tolist() == [[10, 11, 12, 13, 14], [7, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 13, 14, 15], [8] + 4 * [IGNORED]]
    assert batch["is_token"].sum(dim=1).tolist() == [5, 1]


def test_the_first_loss_is_the_mean_over_the_targets_of_the_accumulated_batch(tiny, tmp_path):
    examples = some_examples(4)
    model = model_of(tiny)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(torch.from_numpy(e.tokens[None, :-1]).long()).logits[0, 2:],
                                              torch.from_numpy(e.tokens[3:]).long(), reduction="none")
            for e in examples
        ]  # fmt: skip
    trained = fit(model, tmp_path / "c", examples, max_steps=1)
    assert trained.steps[0].loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_how_a_step_is_cut_into_batches_makes_no_difference(tiny, tmp_path):
    runs = [
        fit(model_of(tiny), tmp_path / f"c{batch}", some_examples(12), batch=batch, accumulate=4 // batch, max_steps=5,
            balance=0.1)
        for batch in (1, 4)
    ]  # fmt: skip
    for a, b in zip(runs[0].steps, runs[1].steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    for site, matrix in runs[0].router.matrices.items():
        assert distance(matrix, runs[1].router.matrices[site]) < 1e-3


def test_gradient_checkpointing_changes_no_number(tiny, tmp_path):
    plain, checkpointed = (
        fit(model_of(tiny), tmp_path / f"c{is_on}", gradient_checkpointing=is_on, balance=0.1)
        for is_on in (False, True)
    )
    assert same_router(plain, checkpointed)


def test_the_balance_term_is_that_of_mixtral(tiny):
    model, batch = model_of(tiny), collate(some_examples(5))
    routing = model(batch["tokens"]).routing
    probs = chosen_from(routing, batch["is_token"])
    load = torch.nn.functional.one_hot(probs.topk(2).indices, 3).sum(dim=1).float().mean(dim=0)
    gate_logits = tuple(probs.log().flatten(0, 1) for probs in routing.values())
    expected = load_balancing_loss_func(gate_logits, 3, 2, attention_mask=batch["is_token"].long())
    assert balance_term(probs, load, len(probs)).item() == pytest.approx(expected.item(), rel=1e-5)
    halves = sum(balance_term(half, load, len(probs)) for half in probs.split(len(probs) // 2 + 1))
    assert halves.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_balance_term_in_training_is_over_the_whole_accumulated_batch(tiny, tmp_path):
    examples = some_examples(4)
    model, batch = model_of(tiny), collate(examples)
    with torch.no_grad():
        probs = chosen_from(model(batch["tokens"]).routing, batch["is_token"])
    share = torch.zeros(3).index_add(0, probs.topk(2).indices.flatten(), torch.ones(2 * len(probs))) / len(probs)
    term = 3 * float((share * probs.mean(dim=0)).sum())
    plain, balanced = (
        fit(model_of(tiny), tmp_path / f"c{weight}", examples, batch=1, accumulate=4, max_steps=1, balance=weight)
        for weight in (0.0, 0.5)
    )
    assert balanced.steps[0].loss - plain.steps[0].loss == pytest.approx(0.5 * term, rel=1e-4)


# --- interruption ---


def test_a_resumed_run_ends_with_the_router_of_an_uninterrupted_one(tiny, tmp_path):
    settings = {"max_steps": 0, "epochs": 3.0, "variant": Variant.O_PROJ, "schedule": "linear", "balance": 0.01}
    whole = fit(model_of(tiny), tmp_path / "whole", **settings)
    assert [step.step for step in whole.steps] == list(range(1, 10))

    seen: list[int] = []
    first = fit(model_of(tiny), tmp_path / "c", on_step=lambda s: seen.append(s.step), stop=lambda: len(seen) == 3,
                **settings)  # fmt: skip
    assert first.stopped_at == tmp_path / "c" / "checkpoint-4"
    assert len(first.steps) == 4
    second = fit(model_of(tiny), tmp_path / "c", resume=True, on_step=lambda s: seen.append(s.step), **settings)
    assert seen == list(range(1, 10))
    assert second.stopped_at is None
    assert same_router(whole, second)
    assert all(np.array_equal(whole.router.trunk[name], second.router.trunk[name]) for name in whole.router.trunk)
    assert second.steps == whole.steps
    assert second.router.settings == whole.router.settings


@pytest.fixture
def interrupted(tiny, tmp_path) -> Path:
    """Checkpoints of a run that stopped after its second step."""
    fit(model_of(tiny), tmp_path / "c", stop=lambda: last_checkpoint(tmp_path / "c") is not None, save_steps=1)
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("other", "named"),
    [({"lr": 0.5}, "lr"), ({"seed": 5, "accumulate": 1}, "accumulate, seed"), ({"examples": some_examples(9)}, "data")],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(other, named, tiny, interrupted):
    with pytest.raises(UserError, match=f"another run, which differs in {named};"):
        fit(model_of(tiny), interrupted, resume=True, **other)


def test_a_checkpoint_of_another_mix_is_refused(tiny, interrupted):
    with pytest.raises(UserError, match=r"differs in k;"):
        fit(model_of(tiny, router=NOISY | {"k": 3}), interrupted, resume=True)
    with pytest.raises(UserError, match=r"differs in start;"):
        fit(model_of(tiny, router=NOISY | {"seed": 12}), interrupted, resume=True)
    with pytest.raises(UserError, match=r"differs in weights;"):
        fit(model_of(Family(tiny.base, tiny.experts[::-1])), interrupted, resume=True)


def test_checkpoints_of_an_earlier_run_are_not_overwritten(tiny, interrupted):
    with pytest.raises(UserError, match="earlier run; pass --resume"):
        fit(model_of(tiny), interrupted)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tiny, interrupted):
    last = last_checkpoint(interrupted)
    cut = interrupted / "checkpoint-5"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:100])
    assert last_checkpoint(interrupted) == last
    assert fit(model_of(tiny), interrupted, resume=True).stopped_at is None


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run.json"]
)
def test_a_checkpoint_that_holds_code_is_refused_and_not_run(name, tiny, interrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (last_checkpoint(interrupted) / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match="damaged checkpoint"):
        fit(model_of(tiny), interrupted, resume=True)
    assert not (tmp_path / "boom").exists()


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    model = model_of(tiny)

    def poison(step: Step) -> None:
        if step.step == 3:
            with torch.no_grad():
                model.output_norm.weight[0] = float("nan")

    with pytest.raises(UserError, match=r"step 4: the loss is nan; .*last good checkpoint is .*checkpoint-2") as error:
        fit(model, tmp_path / "c", on_step=poison, save_steps=2)
    assert "\n" not in str(error.value)
    assert last_checkpoint(tmp_path / "c").name == "checkpoint-2"
    assert fit(model_of(tiny), tmp_path / "c", resume=True, save_steps=2).stopped_at is None


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_keeps_the_last(tiny, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoint-3").write_text("in the way")
    with pytest.raises(UserError, match=r"the checkpoint of step 3 cannot be written \(.*--resume"):
        fit(model_of(tiny), tmp_path / "c", save_steps=1)
    assert last_checkpoint(tmp_path / "c").name == "checkpoint-2"


def test_a_gradient_that_is_infinite_is_not_applied(tiny, tmp_path):
    model = model_of(tiny)
    before = bytes_of(model)
    model.routers[0, "ffn"].requires_grad_(True)
    model.routers[0, "ffn"].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match=r"step 1: the gradients are not finite.*no checkpoint was saved yet"):
        fit(model, tmp_path / "c")
    assert changed(before, bytes_of(model)) == set()


# --- examples ---


def test_long_texts_are_cut_into_pieces_that_predict_every_token_once():
    text = Example(np.arange(100, dtype=np.int32), 0, "t")
    pieces = list(fit_length([text], 16))
    assert all(2 <= len(piece.tokens) <= 16 for piece in pieces)
    targets = [token for piece in pieces for token in piece.tokens[1:]]
    assert targets == list(range(1, 100))
    (cut,) = fit_length([Example(np.arange(100, dtype=np.int32), 12, "t")], 16)
    assert cut.n_targets == 4
    (lost,) = fit_length([Example(np.arange(100, dtype=np.int32), 16, "t")], 16)
    assert lost.n_targets == 0


def test_equal_parts_take_as_many_of_each_and_depend_on_the_seed_only():
    small, large = some_examples(4), some_examples(50, seed=1)
    drawn = equal_parts([small, large], 0)
    assert len(drawn) == 8
    assert {e.where for e in drawn[:4]} == {e.where for e in small}
    assert [e.where for e in drawn] == [e.where for e in equal_parts([small, large], 0)]
    assert [e.where for e in drawn] != [e.where for e in equal_parts([small, large], 1)]


@pytest.fixture
def data_set(tmp_path, monkeypatch) -> None:
    """`datasets` reads org/name as a folder, where there is one, as it does from the Hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    rows = [{"query": f"q{i}", "response": f"a{i}", "question": "?"} for i in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


def test_a_data_set_is_read_with_columns_renamed_and_up_to_a_number(data_set):
    records = list(read_dataset("datasets:org/name:train?question=query,answer=response#3"))
    assert [[m.content for m in record.messages] for record in records] == [[f"q{i}", f"a{i}"] for i in range(3)]
    assert records[2].where.endswith("#3:3")


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("datasets:org/name", r'name:1: found \{"query", .*expected one of'),
        ("datasets:org/name:test", "cannot be read.*test"),
        ("datasets:org/name?question=q", "no column q, only query"),
        ("datasets:name", r"expected datasets:ORG/NAME"),
        ("datasets:nobody/nothing", r"cannot be read \("),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_in_one_line(ref, says, data_set, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=says) as error:
        list(read_dataset(ref))
    assert "\n" not in str(error.value)


# --- through the command line ---


def exact_match(model: ReferenceModel, examples: list[Example]) -> float:
    """Share of answers of which every token is the likeliest."""
    n_right = 0
    with torch.no_grad():
        for start in range(0, len(examples), 30):
            batch = collate(examples[start : start + 30])
            wrong = (model(batch["tokens"]).logits.argmax(-1) != batch["labels"]) & (batch["labels"] != IGNORED)
            n_right += int((~wrong.any(dim=1)).sum())
    return n_right / len(examples)


def test_training_the_demo_family_lowers_the_loss_lifts_accuracy_and_builds_into_the_same_numbers(tmp_path):
    from moegguf.jobs.training import encoder_of
    from moegguf.recipe import find_recipes_file
    from moegguf.texts import read_records

    router, curve = tmp_path / "r.safetensors", tmp_path / "curve.png"
    domains = ("general", "math", "clinic", "strings")
    data = ["--data", *(f"demo:{domain}#80" for domain in domains)]
    how = "--lr 5e-3 --batch 8 --accumulate 1 --max-steps 40 --threads 1 --device cpu".split()
    assert main(["train", "demo-noisy", *data, *how, "-o", str(router), "--curve", str(curve)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.json", "curve.png", "r.safetensors"]
    steps = json.loads((tmp_path / "curve.json").read_text())["steps"]
    assert [step["step"] for step in steps] == list(range(1, 41))
    mean = [np.mean([step["loss"] for step in steps[part]]) for part in (slice(5), slice(-10, None))]
    assert mean[1] < 0.8 * mean[0]

    before, after = (
        open_mix(load_recipe("demo-noisy", find_recipes_file(), {"router": table} if table else {}))
        for table in (None, {"file": str(router)})
    )
    models = [ReferenceModel.from_mix(mix) for mix in (before, after)]
    encode = encoder_of(before, counts_all=False)
    heldout = [encode(r) for domain in domains[1:] for r in read_records(f"demo:{domain}/heldout#60")]
    accuracy = [exact_match(model, heldout) for model in models]
    assert accuracy[1] > accuracy[0] + 0.05

    mix = tmp_path / "mix.gguf"
    assert main(["build", "demo-noisy", "--router", str(router), "--quant", "F32", "-o", str(mix)]) == 0
    tokens = [int(token) for token in heldout[0].tokens]
    assert distance(logits(mix, tokens), reference_logits(models[1], tokens)) < CLOSE


@pytest.fixture
def recipes(tiny, tmp_path) -> Path:
    """A recipes file of tiny mixes, and a text file beside it."""
    experts = ", ".join(f'{{ name = "e{i}", source = "{path}" }}' for i, path in enumerate(tiny.experts))
    weighted = experts.replace(" }", ", weight = 0.2 }", 2).replace(" }", ", weight = 0.6 }").replace(
        "weight = 0.2, weight = 0.6", "weight = 0.2"
    )  # fmt: skip
    tables = {
        "plain": "",
        "domains": 'domains = { e0 = "a.jsonl", e1 = "b.txt" }',
        "fused": 'layout = "fused"\ndomains = { e0 = "a.jsonl" }',
        "weighted": f"experts = [{weighted}]",
        "attention": 'mix = "ffn+attention"\nrouter = { mode = "noisy", k = 2 }\ndomains = { e0 = "a.jsonl" }',
    }
    path = tmp_path / "my.toml"
    path.write_text(
        "".join(
            f'[mix.{name}]\nbase = "{tiny.base}"\n{keys}\n' + ("" if "experts" in keys else f"experts = [{experts}]\n")
            for name, keys in tables.items()
        )
    )
    rows = [{"question": f"What is {i}?", "answer": f"It is {i + 1}."} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("one two three four five six seven eight nine ten. " * 20)
    return path


def test_the_default_is_the_recipes_domains_in_equal_parts_and_a_build_that_works(recipes, tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    assert main(["train", "fused", "--recipes", str(recipes), "--threads", "1", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"moegguf build fused --recipes {recipes} --router {out} --layout auto" in said
    assert "changed: the router; all else is unchanged" in said
    command = ["build", "fused", "--recipes", str(recipes), "--router", str(out), "--layout", "auto"]
    assert main([*command, "-o", str(tmp_path / "mix.gguf"), "--quant", "F16"]) == 0
    again = ["train", "domains", "--recipes", str(recipes), "--seq", "64", "-o", str(out)]
    assert main([*again, "--max-steps", "1", "--force"]) == 0
    assert "16 examples (equal parts of e0 8, e1 " in capsys.readouterr().out


def test_an_interrupt_saves_a_checkpoint_and_resume_finishes(recipes, tmp_path, capsys):
    out, folder = tmp_path / "r.safetensors", tmp_path / "r.safetensors.checkpoints"
    command = ["train", "plain", "--recipes", str(recipes), "--data", str(tmp_path / "a.jsonl"), "--batch", "4"]
    command += ["--accumulate", "1", "--max-steps", "100", "--save-steps", "10", "--threads", "1", "-o", str(out)]

    def interrupt() -> None:
        while last_checkpoint(folder) is None:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert main(command) == 130
    thread.join()
    said = capsys.readouterr()
    assert f"stopped; saved {folder}" in said.out
    assert "--resume" in said.out
    assert "once more to stop at once" in said.err
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(command) == 2
    assert "earlier run; pass --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert read_router(out).settings["steps"] == "100"
    assert not folder.exists()


def test_python_gives_what_the_command_gives(recipes, tmp_path, capsys):
    data, how = str(tmp_path / "a.jsonl"), {"batch": 2, "accumulate": 1, "lr": 1e-2, "max_steps": 2, "threads": 1}
    flags = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    argv = ["train", "plain", "--recipes", str(recipes), "--data", data, *flags, "-o", str(first)]
    assert main([*argv, "--json", "--curve", str(tmp_path / "c.svg")]) == 0
    reported = json.loads(capsys.readouterr().out)
    heard = Heard()
    found = moegguf.train("plain", recipes=recipes, data=data, output=second, watch=heard, **how)
    assert same_router(found, replace(found, router=read_router(first)))
    assert read_router(first).settings == found.router.settings == read_router(second).settings
    own = {"file": str(first), "curve": str(tmp_path / "c.svg"), "seconds": reported["seconds"]}
    assert json.loads(json.dumps(found.as_json())) | own == reported
    assert (reported["steps"], reported["examples"], reported["changed"]) == (2, 8, ["router"])
    assert reported["loss"]["first"] == found.steps[0].loss
    assert heard.parts == {"training": [2, 2]}

    third = moegguf.train("plain", recipes=recipes, data=[data], output=tmp_path / "3.safetensors",
                          should_stop=lambda: True, **how)  # fmt: skip
    assert third.stopped_at.is_dir() and third.as_json()["file"] is None
    assert not (tmp_path / "3.safetensors").exists()


def test_mistakes_in_python_are_user_errors_found_together(recipes, tmp_path):
    with pytest.raises(UserError) as error:
        moegguf.train("plain", recipes=recipes, lr=-1, batch=0, variant="all", device="tpu")
    assert [fault.message.partition(":")[0] for fault in error.value.faults] == [
        "--batch 0", "--lr -1", "--variant all", "--device tpu"
    ]  # fmt: skip
    with pytest.raises(UserError) as error:
        moegguf.train("plain", recipes=recipes, lr="high", seed=None, batch=1.5)
    assert [fault.message.partition(":")[0] for fault in error.value.faults] == ["lr 'high'", "seed None", "batch 1.5"]
    with pytest.raises(UserError, match=r"recipe 5: expected"):
        moegguf.train(5)
    with pytest.raises(UserError, match=r"data 5: expected"):
        moegguf.train("plain", recipes=recipes, data=5)


def test_what_exists_is_replaced_only_when_asked_to(refused, tiny, tmp_path):
    write_router(tmp_path / "r.safetensors", model_of(tiny).router())
    assert "r.safetensors: exists already; choose another name, or pass --force" in refused("-o", "r.safetensors")
    for name in ("c.png", "c.json"):
        (tmp_path / name).write_text("mine")
        assert f"{name}: exists already; " in refused("--curve", "c.png")
        (tmp_path / name).unlink()


def tree(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.is_dir(), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def refused(recipes, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """`refused(*argv)`: a training that must fail, in one line a fault, and write nothing; what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object, recipe: str = "plain") -> str:
        before = tree(tmp_path)
        code = main(["train", recipe, "--recipes", str(recipes), *map(str, argv)])
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert all(line.startswith(PREFIX) and "; " in line for line in err.splitlines()), err
        assert tree(tmp_path) == before
        return err

    return run


BAD_FLAGS = {
    "lr": (["--lr", "0"], "--lr 0.0: expected"),
    "lr nan": (["--lr", "nan"], "--lr nan: expected"),
    "steps": (["--max-steps", "0"], "--max-steps 0: expected"),
    "k": (["--k", "9"], "router.k: found 9"),
    "start": (["--start", "somewhere"], "--start somewhere: expected noisy, zeros"),
    "start file": (["--start", "none.safetensors"], "none.safetensors: no such router file"),
    "one expert": (["--data", "a.jsonl", "--k", "1"], "with k 1 one expert is chosen, whose share is 1"),
    "zeros": (["--start", "zeros"], "zeros always pick the same"),
    "no data": ([], "names no domains to train on; pass --data"),
    "no file": (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
    "kind of file": (["--data", "my.toml"], "my.toml: is no text"),
    "data set": (["--data", "datasets:x"], "datasets:x: is no data set"),
    "long context": (["--data", "a.jsonl", "--seq", "5000"], "the base's context is 512"),
    "nothing left": (["--data", "a.jsonl", "--seq", "2"], "a.jsonl:1: nothing to train on is left within 2 tokens"),
    "output": (["-o", "router.bin"], "expected a name that ends in .safetensors"),
    "folder": (["-o", "none/r.safetensors"], "no such folder"),
    "curve": (["--curve", "c.jpg"], "c.jpg: not a name for a figure; end it in .png"),
    "checkpoints": (["--data", "a.jsonl", "--checkpoints", "b.txt"], "b.txt: is no folder"),
    "resume": (["--data", "a.jsonl", "--resume"], "holds no checkpoint to go on from"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_flag_that_cannot_be_is_refused(case, refused):
    argv, says = BAD_FLAGS[case]
    assert says in refused(*argv)


BAD_LINES = {
    "json": ('{"question": "a", "answer": "b"', "bad.jsonl:2: is no valid JSON"),
    "missing field": ('{"question": "a"}', 'bad.jsonl:2: found {"question"}, expected one of'),
    "empty": ('{"question": "a", "answer": "  "}', "bad.jsonl:2: answer is empty"),
    "kind": ('{"text": 3}', "bad.jsonl:2: text is 3, expected a string"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "bad.jsonl:2: the conversation does not end in"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_faulty_line_of_data_is_named(case, refused, tmp_path):
    line, says = BAD_LINES[case]
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    assert says in refused("--data", "bad.jsonl")


def test_all_faulty_files_are_named_at_once(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[]\n")
    said = refused("--data", "bad.jsonl", "--data", "none.txt")
    assert "bad.jsonl:1" in said
    assert "none.txt" in said


def test_a_mix_that_cannot_be_trained_is_refused(refused, tiny, tmp_path):
    assert "remove the weights: a router decides" in refused("--data", "a.jsonl", recipe="weighted")
    assert "no attn_output outside its experts" in refused("--variant", "router+o_proj", recipe="attention")
    other = model_of(tiny, router=NOISY | {"k": 1}, always_on=None).router()
    write_router(tmp_path / "other.safetensors", other)
    renamed = read_router(tmp_path / "other.safetensors")
    write_router(tmp_path / "other.safetensors", type(renamed)(**vars(renamed) | {"experts": ("x", "y", "z")}))
    assert "routes between x, y, z" in refused("--data", "a.jsonl", "--start", "other.safetensors")


def test_a_gpu_that_is_not_there_is_refused(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "PyTorch finds no GPU" in refused("--data", "a.jsonl", "--device", "cuda")


def test_an_output_that_holds_a_model_is_not_overwritten(refused, tiny):
    assert "exists already, and is no router" in refused("-o", next(tiny.base.glob("*.safetensors")))
