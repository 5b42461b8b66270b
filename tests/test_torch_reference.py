"""The reference in PyTorch: stock llama.cpp's numbers where a GGUF holds the mix, identities where none does.

Routed attention and routed fine-grained FFNs, which have no other home, are held against transformers' Llama whose
linear layers are replaced by a mixture written down here again from its definition, in HF's order of rows.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import tiny_models
from conftest import CLOSE, KINDS, TOKENS, Family, build_dense, build_mix, distance, logits, make_recipe, rewrite
from moegguf.assembly import open_mix
from moegguf.cli import main
from moegguf.demo import MEMBERS
from moegguf.demo.text import SAMPLE_QUESTIONS
from moegguf.errors import UserError
from moegguf.jobs.torch_engine import open_checked, open_engine
from moegguf.mix import Mix
from moegguf.routers import ROLES
from moegguf.runtime.batch import generate_greedy, score
from moegguf.runtime.chat import Conversation
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.sampling import Sampling
from peft_adapters import anywhere, ends_with, linear_shapes, write_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moegguf.reference.engine import TorchEngine, candidates, choose  # noqa: E402
from moegguf.reference.model import Cache, Mixture, Output, ReferenceModel  # noqa: E402
from test_reference import mixtral, noise, run, sizes  # noqa: E402

LONG = TOKENS * 4
"""Long enough for scaled rotary positions to matter."""
FAR = 0.05
EXACT = RunOptions(threads=1, kv_type=GGMLQuantizationType.F32)
GREEDY = Sampling(temp=0)
NOISY = {"mode": "noisy", "k": 2, "std": 0.05, "seed": 11}
WEIGHTS = (0.6, 0.1, 0.3)
ROUTED = ("ffn+attention", "fine-grained", "fine-grained+attention")
"""What only the reference can route."""


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def tuned(family, tmp_path_factory) -> Callable[[str], Family]:
    """`tuned(kind)`: a base and three fine-tunes that differ from it in every tensor."""
    written: dict[str, Family] = {}

    def write(kind: str) -> Family:
        if kind not in written:
            base, folder = family(kind).base, tmp_path_factory.mktemp(kind)
            experts = [tiny_models.write_expert(folder / f"t{i}", base, i, tuned="") for i in (1, 2, 3)]
            written[kind] = Family(base, tuple(experts))
        return written[kind]

    return write


@pytest.fixture(scope="module")
def adapted(family, tmp_path_factory) -> Family:
    """A base and two adapters of all its linear layers, as references."""
    base, folder = family("llama3_like").base, tmp_path_factory.mktemp("adapted")
    adapters = [
        write_adapter(folder / str(seed), base, modules=lambda _: True, target_modules="all-linear", draw=anywhere,
                      rank=lambda _: 4, lora_alpha=6, seed=seed)
        for seed in (1, 2)
    ]  # fmt: skip
    return Family(base, tuple(f"lora:{adapter}" for adapter in adapters))


def mix_of(folder: Path, models: Family, **table) -> Mix:
    return open_mix(make_recipe(folder / "mix.gguf", models.base, models.experts, **table))


def output_of(mix: Mix, tokens=TOKENS, **how) -> Output:
    with torch.inference_mode():
        return ReferenceModel.from_mix(mix, **how)(torch.tensor([tokens]))


def logits_of(mix: Mix, tokens=TOKENS, **how) -> np.ndarray:
    return output_of(mix, tokens, **how).logits[0].numpy()


def n_weights(model: ReferenceModel) -> int:
    """Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def with_matrices(mix: Mix, change: Callable[[np.ndarray], np.ndarray]) -> Mix:
    matrices = {site: change(matrix) for site, matrix in mix.router.matrices.items()}
    return replace(mix, router=replace(mix.router, matrices=matrices))


def routed(mixed: str, k: int = 2) -> dict:
    return {"mix": mixed, "router": NOISY | {"k": k}}


# ------------------------------------------------------------------------------------ mixes that a GGUF holds


def assert_is_the_gguf(folder: Path, models: Family, tokens=TOKENS, **table) -> None:
    built = build_mix(folder / "built.gguf", models.base, models.experts, **table)
    assert distance(logits(built, tokens), logits_of(mix_of(folder, models, **table), tokens)) < CLOSE


@pytest.mark.parametrize("router", ["gateless", NOISY], ids=["gateless", "noisy"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_its_gguf(kind: str, router, tuned, tmp_path: Path):
    assert_is_the_gguf(tmp_path, tuned(kind), LONG, router=router)


@pytest.mark.parametrize(
    "table",
    [
        {"router": NOISY | {"k": 1}},
        {"router": NOISY | {"k": 3}},
        {"router": NOISY | {"shared": True}},
        {"router": NOISY | {"k": 2}, "always_on": "e1"},
        {"router": NOISY | {"k": 3}, "always_on": "e0"},
        {"router": NOISY | {"k": 2, "shared": True}, "always_on": "e2", "trunk": "mean"},
        {"mix": "ffn+attention"},
        {"mix": "fine-grained"},
        {"mix": "fine-grained+attention"},
        {"layers": [1]},
        {"layers": [1], "mix": "ffn+attention"},
        {"layers": [0], "mix": "fine-grained+attention"},
        {"trunk": "mean"},
        {"trunk": "e1"},
        {"trunk": "e1", "router": NOISY},
    ],
    ids=json.dumps,
)
def test_every_variant_is_its_gguf(table: dict, tuned, tmp_path: Path):
    assert_is_the_gguf(tmp_path, tuned("llama3_like"), **table)


@pytest.mark.parametrize("mixed", ["ffn", "ffn+attention", "fine-grained"])
def test_weights_are_those_of_the_gguf(mixed: str, tuned, tmp_path: Path):
    models = tuned("tied")
    experts = [{"source": path, "weight": weight} for path, weight in zip(models.experts, WEIGHTS, strict=True)]
    assert_is_the_gguf(tmp_path, Family(models.base, tuple(experts)), mix=mixed)


@pytest.mark.parametrize("router", ["gateless", NOISY], ids=["gateless", "noisy"])
def test_adapters_are_their_gguf(router, adapted, tmp_path: Path):
    assert_is_the_gguf(tmp_path, adapted, router=router)


def test_quantised_sources_are_read_as_llama_cpp_reads_them(tuned, tmp_path: Path):
    """Both mixes are in F32 from the same decoded values."""
    models = tuned("tied")
    files = [
        build_dense(tmp_path / f"{i}.gguf", path, quant="Q8_0") for i, path in enumerate([models.base, *models.experts])
    ]
    assert_is_the_gguf(tmp_path, Family(files[0], tuple(files[1:])), router=NOISY)


@pytest.mark.parametrize("mixed", ["ffn", "ffn+attention", "fine-grained"])
def test_biases_are_added_as_in_the_gguf(mixed: str, tuned, tmp_path: Path):
    models = tuned("tied")
    widths = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96, "ffn_down": 64}
    files = []
    for i, path in enumerate((models.base, *models.experts)):
        random = np.random.default_rng(i)
        biases = {
            f"blk.{layer}.{role}.bias": random.standard_normal(width).astype(np.float32)
            for layer in (0, 1)
            for role, width in widths.items()
        }
        dense = build_dense(tmp_path / f"dense{i}.gguf", path)
        files.append(rewrite(dense, tmp_path / f"{i}.gguf", tensors=biases))
    assert_is_the_gguf(tmp_path, Family(files[0], tuple(files[1:])), mix=mixed, layout="fused")


@pytest.mark.parametrize(("kind", "k"), [("llama3_like", 1), ("llama3_like", 2), ("mistral_like", 2), ("tied", 3)])
def test_a_routed_mix_is_transformers_mixtral(kind: str, k: int, family, tmp_path: Path):
    models = family(kind)
    n_layer, n_embd = sizes(models)
    theirs = mixtral(models, {layer: noise(layer, 3, n_embd) for layer in range(n_layer)}, k)
    assert distance(logits_of(mix_of(tmp_path, models, router=NOISY | {"k": k})), run(theirs)) < CLOSE


# ---------------------------------------------------------------------------------- mixes that no GGUF holds


class Definition(torch.nn.Module):
    """Σ p_e W_e x with p the softmax over all experts, cut to the top k, divided by its sum. Computes everything."""

    def __init__(self, layers: list[torch.nn.Linear], matrix: np.ndarray, k: int) -> None:
        super().__init__()
        self.layers, self.matrix, self.k = layers, torch.from_numpy(matrix), k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = torch.softmax(x @ self.matrix.T, dim=-1)
        probs = probs * (probs >= probs.topk(self.k).values[..., -1:])
        probs = probs / probs.sum(-1, keepdim=True)
        return sum(probs[..., i, None] * layer(x) for i, layer in enumerate(self.layers))


HF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["llama3_like", "mistral_like"])
def test_routed_linear_maps_are_their_definition_in_transformers(kind: str, k: int, tuned, tmp_path: Path):
    """Each projection has its own router on its own input: o sees the heads, down the intermediate activation."""
    models = tuned(kind)
    mix = mix_of(tmp_path, models, **routed("fine-grained+attention", k))
    theirs, experts = load(models.base), [load(folder) for folder in models.experts]
    for (layer, role), matrix in mix.router.matrices.items():
        name = f"model.layers.{layer}.{HF_NAMES[role]}"
        theirs.set_submodule(name, Definition([expert.get_submodule(name) for expert in experts], matrix, k))
    assert distance(logits_of(mix), run(theirs)) < CLOSE
    assert {role for _, role in mix.router.matrices} == set(ROLES) - {"ffn"}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("mixed", ROUTED)
def test_n_copies_of_one_expert_are_that_expert_under_any_router(mixed: str, k: int, tuned, tmp_path: Path):
    models = tuned("tied")
    expert = models.experts[0]
    copies = Family(models.base, (expert,) * 3)
    dense = build_mix(tmp_path / "dense.gguf", models.base, [expert], mix=mixed)
    assert distance(logits_of(mix_of(tmp_path, copies, **routed(mixed, k))), logits(dense)) < CLOSE


@pytest.mark.parametrize("mixed", ROUTED)
def test_all_experts_behind_a_zero_router_are_the_gateless_mix(mixed: str, tuned, tmp_path: Path):
    models = tuned("llama3_like")
    zero = with_matrices(mix_of(tmp_path, models, **routed(mixed, k=3)), np.zeros_like)
    collapsed = build_mix(tmp_path / "built.gguf", models.base, models.experts, mix=mixed)
    assert distance(logits_of(zero), logits(collapsed)) < CLOSE


@pytest.mark.parametrize("mixed", ROUTED)
def test_routing_moves_the_logits(mixed: str, tuned, tmp_path: Path):
    """Else the identities above would say nothing."""
    mix = mix_of(tmp_path, tuned("tied"), **routed(mixed))
    assert distance(logits_of(mix), logits_of(with_matrices(mix, np.negative))) > FAR


def test_an_always_on_expert_in_every_router_is_its_share_of_each_output(tuned, tmp_path: Path):
    """k = N over zero routers: (1 / 3) f_a + (2 / 3) · ½ · (f_b + f_c), the plain mean."""
    models = tuned("tied")
    mix = mix_of(tmp_path, models, **routed("fine-grained+attention", k=3), always_on="e1")
    mean = build_mix(tmp_path / "built.gguf", models.base, models.experts, mix="fine-grained+attention")
    assert distance(logits_of(with_matrices(mix, np.zeros_like)), logits(mean)) < CLOSE
    assert distance(logits_of(mix), logits(mean)) > FAR


def test_only_the_layers_of_a_subset_are_routed(tuned, tmp_path: Path):
    models = tuned("tied")
    mix = mix_of(tmp_path, models, **routed("ffn"), layers=[1])
    output = output_of(mix)
    assert list(output.routing) == [(1, "ffn")]
    only_dense = logits(build_dense(tmp_path / "base.gguf", models.base))
    copies = mix_of(tmp_path, Family(models.base, (models.base,) * 3), **routed("ffn"), layers=[1])
    assert distance(logits_of(copies), only_dense) < CLOSE
    assert distance(output.logits[0].numpy(), only_dense) > FAR


@pytest.mark.parametrize("router", ["gateless", NOISY], ids=["gateless", "noisy"])
@pytest.mark.parametrize("mixed", ["ffn", *ROUTED])
def test_branches_are_the_merged_adapters(mixed: str, router, adapted, tmp_path: Path):
    mix = mix_of(tmp_path, adapted, mix=mixed, router=router)
    assert distance(logits_of(mix, branches=True), logits_of(mix)) < CLOSE
    assert distance(logits_of(mix), logits_of(mix_of(tmp_path, Family(adapted.base, (adapted.base,))))) > FAR


def test_branches_of_a_partial_adapter_beside_a_plain_expert_are_the_merged_ones(family, tmp_path: Path):
    models = family("llama3_like")
    adapter = write_adapter(tmp_path / "a", models.base, modules=ends_with("up_proj"), target_modules=["up_proj"])
    mix = mix_of(tmp_path, Family(models.base, (f"lora:{adapter}", models.experts[0])), router=NOISY)
    assert distance(logits_of(mix, branches=True), logits_of(mix)) < CLOSE


def test_branches_share_the_weights_that_they_go_over(adapted, tmp_path: Path):
    mix = mix_of(tmp_path, adapted)
    merged, branches = (n_weights(ReferenceModel.from_mix(mix, branches=is_on)) for is_on in (False, True))
    shapes = [shape for module, shape in linear_shapes(adapted.base).items() if "mlp" in module]
    n_in_ffns, n_in_factors = sum(n_out * n_in for n_out, n_in in shapes), sum(4 * sum(shape) for shape in shapes)
    assert merged - branches == n_in_ffns - 2 * n_in_factors


# ------------------------------------------------------------------------------------- what a trainer relies on


def test_a_shared_router_is_one_parameter_and_others_are_one_each(tuned, tmp_path: Path):
    models = tuned("mistral_like")
    shared = ReferenceModel.from_mix(mix_of(tmp_path, models, router=NOISY | {"shared": True})).routers
    own = ReferenceModel.from_mix(mix_of(tmp_path, models, router=NOISY)).routers
    assert list(shared) == list(own) == [(0, "ffn"), (1, "ffn"), (2, "ffn")]
    assert len(set(map(id, shared.values()))) == 1
    assert len(set(map(id, own.values()))) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_the_exported_router_is_the_one_that_came_in_until_a_step_changes_it(shared: bool, tuned, tmp_path: Path):
    mix = mix_of(tmp_path, tuned("tied"), mix="fine-grained", router=NOISY | {"shared": shared})
    model = ReferenceModel.from_mix(mix)
    assert model.router().digest == mix.router.digest
    before = {site: matrix.copy() for site, matrix in mix.router.matrices.items()}
    for parameter in model.routers.values():
        parameter.requires_grad_()
    tokens = torch.tensor([TOKENS])
    loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if name.endswith(".router")
    }
    torch.optim.SGD(set(model.routers.values()), lr=1.0).step()
    after = model.router().matrices
    assert all(distance(after[site], before[site]) > 0 for site in before)
    assert all(np.array_equal(mix.router.matrices[site], before[site]) for site in before)
    assert not shared or distance(after[0, "ffn_up"], after[1, "ffn_up"]) == 0


def test_the_router_gradient_is_that_of_finite_differences(tuned, tmp_path: Path):
    """Through renormalised shares and the tokens that are gathered for each expert; in float64 but for the router."""
    model = ReferenceModel.from_mix(mix_of(tmp_path, tuned("tied"), router=NOISY), dtype=torch.float64)
    tokens, router = torch.tensor([TOKENS]), model.routers[0, "ffn"].requires_grad_()

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])

    loss().backward()
    direction, step = router.grad / router.grad.norm(), 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            router.add_(sign * step * direction)
            ends.append(float(loss()))
            router.sub_(sign * step * direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(router.grad.norm()), rel=1e-2)


def test_routing_holds_the_probabilities_of_every_router(tuned, tmp_path: Path):
    mix = mix_of(tmp_path, tuned("tied"), **routed("ffn+attention"), always_on="e0")
    routing = output_of(mix).routing
    assert routing.keys() == mix.router.matrices.keys()
    for probs in routing.values():
        assert probs.shape == (1, len(TOKENS), 2) and probs.dtype == torch.float32
        assert probs.sum(-1).allclose(torch.ones(1, len(TOKENS)))


def test_gateless_mixes_have_no_routers_and_no_routing(tuned, tmp_path: Path):
    mix = mix_of(tmp_path, tuned("tied"), mix="fine-grained+attention")
    assert ReferenceModel.from_mix(mix).routers == {}
    assert output_of(mix).routing == {}


def test_an_expert_computes_the_tokens_that_chose_it_and_no_others(tuned, tmp_path: Path):
    model = ReferenceModel.from_mix(mix_of(tmp_path, tuned("tied"), router=NOISY))
    seen: list[int] = []
    for mixture in model.modules():
        if isinstance(mixture, Mixture):
            for expert in mixture.experts:
                expert.register_forward_hook(lambda module, args, _: seen.append(len(args[0])))
    model(torch.tensor([TOKENS]))
    assert sum(seen) == 2 * 2 * len(TOKENS)
    assert len(set(seen)) > 1


def test_trunk_parameters_have_their_gguf_names_and_values(tuned, tmp_path: Path):
    mix = mix_of(tmp_path, tuned("mistral_like"))
    model = ReferenceModel.from_mix(mix)
    for name, tensor in mix.trunk.items():
        stored = tensor.read_rows(0, tensor.n_rows).view(np.uint16).astype(np.uint32) << 16  # bf16
        if name.endswith("weight") and "norm" not in name:
            assert np.array_equal(model.get_parameter(name).numpy(), stored.view(np.float32))
        assert model.get_parameter(name).shape == tensor.shape
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_equal_expert_tensors_are_kept_once_and_trunk_tensors_are_not(tuned, tmp_path: Path):
    models = tuned("tied")
    copies = [mix_of(tmp_path, Family(models.base, (models.base,) * n)) for n in (1, 3)]
    one, three = (n_weights(ReferenceModel.from_mix(mix)) for mix in copies)
    assert one == three
    model = ReferenceModel.from_mix(mix_of(tmp_path, models))
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == len(set(map(id, norms))) == 5


def test_bfloat16_weights_leave_routers_in_float32(tuned, tmp_path: Path):
    mix = mix_of(tmp_path, tuned("tied"), router=NOISY)
    model = ReferenceModel.from_mix(mix, dtype=torch.bfloat16)
    assert {p.dtype for p in model.routers.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if not name.endswith(".router")} == {torch.bfloat16}
    with torch.inference_mode():
        found = model(torch.tensor([TOKENS]))
    assert found.logits.dtype == torch.bfloat16
    assert distance(found.logits[0].float().numpy(), logits_of(mix)) < 0.5


# -------------------------------------------------------------------------------------------- caches and batches


@pytest.mark.parametrize("table", [{"router": NOISY}, routed("fine-grained+attention")], ids=["ffn", "all"])
@pytest.mark.parametrize("kind", ["llama3_like", "yarn"])
@torch.inference_mode()
def test_tokens_in_pieces_are_the_tokens_at_once(kind: str, table: dict, tuned, tmp_path: Path):
    model, cache = ReferenceModel.from_mix(mix_of(tmp_path, tuned(kind), **table)), Cache()
    tokens = torch.tensor([TOKENS])
    pieces = [model(tokens[:, a:b], cache).logits for a, b in ((0, 1), (1, 5), (5, 6), (6, 14))]
    whole = model(tokens).logits
    assert distance(torch.cat(pieces, dim=1).numpy(), whole.numpy()) < CLOSE
    cache.truncate(5)
    assert cache.n_tokens == 5
    assert distance(model(tokens[:, 5:], cache).logits.numpy(), whole[:, 5:].numpy()) < CLOSE


@torch.inference_mode()
def test_sequences_of_a_batch_do_not_see_each_other_nor_padding_on_the_right(tuned, tmp_path: Path):
    model = ReferenceModel.from_mix(mix_of(tmp_path, tuned("tied"), **routed("fine-grained+attention")))
    short = TOKENS[::-1][:6]
    padded = model(torch.tensor([TOKENS, (*short, *[0] * (len(TOKENS) - 6))])).logits
    assert distance(padded[0].numpy(), model(torch.tensor([TOKENS])).logits[0].numpy()) < CLOSE
    assert distance(padded[1, :6].numpy(), model(torch.tensor([short])).logits[0].numpy()) < CLOSE


# ---------------------------------------------------------------------------------------------------- bad input


def test_another_architecture_is_refused_by_name(tuned, tmp_path: Path):
    file = rewrite(build_dense(tmp_path / "dense.gguf", tuned("tied").base), tmp_path / "qwen.gguf", arch="qwen2")
    mix = mix_of(tmp_path, Family(file, (file,)), layout="fused")
    with pytest.raises(UserError, match=r"qwen\.gguf: architecture 'qwen2', .* computes 'llama' only"):
        ReferenceModel.from_mix(mix)


def test_tensors_that_the_graph_does_not_have_are_refused_by_name(tuned, tmp_path: Path):
    dense, odd = build_dense(tmp_path / "dense.gguf", tuned("tied").base), np.ones(64, np.float32)
    file = rewrite(dense, tmp_path / "odd.gguf", tensors={"blk.1.attn_q_norm.weight": odd})
    with pytest.raises(UserError, match=r"odd\.gguf: blk\.1\.attn_q_norm\.weight is no tensor of the graph"):
        ReferenceModel.from_mix(mix_of(tmp_path, Family(file, (file,))))


# ------------------------------------------------------------------------------------------------------- engine


DEMO = [f"demo:{member}" for member in MEMBERS]


def demo_recipe(folder: Path, **table):
    return make_recipe(folder / "demo.gguf", "demo:base", DEMO, **table)


def engine_of(recipe) -> TorchEngine:
    return open_engine(recipe, open_checked(recipe), threads=1)


@pytest.mark.parametrize("router", ["gateless", {"mode": "noisy", "k": 2}], ids=["gateless", "noisy"])
def test_answers_of_the_demo_family_are_those_of_its_gguf(router, tmp_path: Path):
    table = {"router": router}
    engine = engine_of(demo_recipe(tmp_path, **table))
    with open_model(build_mix(tmp_path / "built.gguf", "demo:base", DEMO, **table), EXACT) as model:
        ours, theirs = (Conversation(each, sampling=GREEDY) for each in (engine, model))
        for question in SAMPLE_QUESTIONS.values():
            assert list(ours.answer(question)) == list(theirs.answer(question))
            assert ours.stats.prompt_tokens == theirs.stats.prompt_tokens
            assert ours.stats.end == theirs.stats.end == "stop"


@pytest.fixture(scope="module")
def pair(tuned, tmp_path_factory):
    """An engine, and the file of the same mix."""
    models, folder = tuned("llama3_like"), tmp_path_factory.mktemp("pair")
    recipe = make_recipe(folder / "mix.gguf", models.base, models.experts, router=NOISY)
    return engine_of(recipe), build_mix(folder / "built.gguf", models.base, models.experts, router=NOISY)


def test_the_vocabulary_is_that_of_the_file(pair):
    engine, path = pair
    text = "Hello, wörld! 12345 <|begin_of_text|>"
    with open_model(path, EXACT) as model:
        assert engine.vocab.tokenize_prompt(text) == model.vocab.tokenize_prompt(text)
        assert (engine.n_ctx, engine.chat_template) == (model.n_ctx, model.chat_template)


def test_scores_and_greedy_answers_are_those_of_the_file(pair):
    engine, path = pair
    texts, starts = [list(TOKENS), list(TOKENS[::-1]), [7], list(TOKENS[:3])], [0, 9, 0, 2]
    with open_model(path, EXACT) as model:
        for ours, theirs in zip(engine.score(texts, starts), score(model, texts, starts), strict=True):
            assert (ours.logprobs.dtype, ours.logprobs.shape) == (np.float32, theirs.logprobs.shape)
            assert len(ours.logprobs) == 0 or distance(ours.logprobs, theirs.logprobs) < CLOSE
            assert np.array_equal(ours.is_greedy, theirs.is_greedy)
        ends = {5, 8}.__contains__
        theirs = dict(generate_greedy(model, texts, 12, ends))
        assert dict(engine.generate_greedy(texts, 12, ends)) == theirs
        assert (
            dict(engine.generate_greedy(texts, 12, {theirs[0][4]}.__contains__))[0]
            == (theirs[0][: theirs[0].index(theirs[0][4])])
        )


def test_what_does_not_fit_the_context_is_refused(pair):
    engine, _ = pair
    too_long = [3] * (engine.n_ctx + 1)
    with pytest.raises(UserError, match=r"1025 tokens do not fit the context of 1024"):
        list(engine.score([[3, 5], too_long], [0, 0]))
    with pytest.raises(UserError, match=r"1025 tokens do not fit"):
        list(engine.generate_greedy([too_long[:-2]], 2, lambda _: False))


def test_a_prompt_costs_only_what_is_new_in_it_and_goes_on_after_an_interruption(pair):
    engine, path = pair
    first = list(islice(engine.generate(TOKENS, GREEDY), 6))
    assert engine.n_cached([*TOKENS, *first, 9]) == len(TOKENS) + 5
    assert engine.n_cached(TOKENS) == len(TOKENS) - 1
    assert engine.n_cached([TOKENS[0], 1]) == 1

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    hook = engine.model.blk[1].register_forward_hook(interrupt)  # the first layer's cache has grown by then
    with pytest.raises(KeyboardInterrupt):
        next(engine.generate([*TOKENS, 9], GREEDY))
    hook.remove()
    with open_model(path, EXACT) as model:
        theirs = list(islice(model.generate([*TOKENS, 9], GREEDY), 6))
    assert list(islice(engine.generate([*TOKENS, 9], GREEDY), 6)) == theirs


def llama_candidates(logits: np.ndarray, sampling: Sampling) -> tuple[list[int], list[float]]:
    """What llama.cpp's own chain leaves of `logits`, the likeliest first, and its probabilities."""
    data = (llama_cpp.llama_token_data * len(logits))(*[(i, float(x), 0.0) for i, x in enumerate(logits)])
    array = llama_cpp.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    for sampler in (
        llama_cpp.llama_sampler_init_top_k(sampling.top_k),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temp),
        llama_cpp.llama_sampler_init_dist(0),
    ):
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    kept = sorted((array.data[i].p, array.data[i].id) for i in range(array.size))[::-1]
    return [token for _, token in kept], [p for p, _ in kept]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temp=1.3, top_k=0, top_p=1, min_p=0),
        Sampling(temp=0.5, top_k=7, top_p=1, min_p=0),
        Sampling(temp=1, top_k=0, top_p=0.6, min_p=0),
        Sampling(temp=1, top_k=0, top_p=0, min_p=0),
        Sampling(temp=2, top_k=0, top_p=1, min_p=0.2),
        Sampling(temp=2, top_k=0, top_p=1, min_p=1),
    ],
    ids=str,
)
def test_candidates_are_those_of_llama_cpps_chain(sampling: Sampling):
    logits = 2 * np.random.default_rng(3).standard_normal(300).astype(np.float32)
    tokens, probs = candidates(torch.from_numpy(logits), sampling)
    their_tokens, their_probs = llama_candidates(logits, sampling)
    assert tokens.tolist() == their_tokens
    assert probs.tolist() == pytest.approx(their_probs, rel=1e-4)


def test_draws_follow_the_probabilities_and_their_seed():
    logits, sampling = torch.tensor([0.0, 2.0, 1.0, -5.0]), Sampling(temp=1, top_k=3, top_p=1, min_p=0)
    random = torch.Generator().manual_seed(1)
    draws = [choose(logits, [], sampling, random) for _ in range(3000)]
    shares = np.bincount(draws, minlength=4) / 3000
    assert shares == pytest.approx(np.array([0.0900, 0.6652, 0.2447, 0]), abs=0.03)
    again, other = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    assert [choose(logits, [], sampling, again) for _ in range(100)] == draws[:100]
    assert [choose(logits, [], sampling, other) for _ in range(100)] != draws[:100]


def test_the_repeat_penalty_divides_odds_above_one_and_multiplies_those_below():
    logits, random = torch.tensor([2.0, 1.8, -1.0]), torch.Generator()
    assert choose(logits, [], Sampling(temp=0, repeat_penalty=1.5), random) == 0
    assert choose(logits, [0, 0], Sampling(temp=0, repeat_penalty=1.5), random) == 1
    assert choose(torch.tensor([-1.0, -1.2]), [0], Sampling(temp=0, repeat_penalty=1.5), random) == 1


# ----------------------------------------------------------------------------------------------------- commands

RECIPES = """
[mix.routed]
base = "demo:base"
mix = "fine-grained+attention"
router = { mode = "noisy", k = 2 }
experts = [{ name = "base", source = "demo:base" }, { name = "math", source = "demo:math" }]

[mix.unfitted]
base = "demo:base"
router = "ridge"
experts = [{ name = "base", source = "demo:base" }, { name = "math", source = "demo:math" }]
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(RECIPES)
    return path


def test_chat_answers_from_a_recipe_that_no_gguf_holds(recipes: Path, capsys):
    argv = ["chat", "routed", "--engine", "torch", "--recipes", str(recipes), "--threads", "1", "--temp", "0"]
    assert main([*argv, "--prompt", "What is 6 + 7?"]) == 0
    assert capsys.readouterr().out == "6 + 7 = 13. The answer is 13.\n"


def test_eval_measures_a_recipe_as_it_measures_its_gguf(tmp_path: Path, capsys):
    built = build_mix(tmp_path / "demo.gguf", "demo:base", DEMO)
    (tmp_path / "text.jsonl").write_text('{"text": "The capital of Spain is Madrid."}\n')
    argv = ["--tasks", "demo:math/heldout#8", str(tmp_path / "text.jsonl"), "--cache", str(tmp_path), "--threads", "1"]
    figures = []
    for model in ([str(built)], ["demo", "--engine", "torch"]):
        assert main(["eval", *model, *argv, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["models"][0]["tasks"]
        figures.append([task["value"] for task in found.values()])
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)  # the file's key-value cache is F16


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chat", "unfitted", "--prompt", "hi"], "ridge router has not been fitted yet; run `moegguf route fit`"),
        (["chat", "nothing", "--prompt", "hi"], "has no recipe 'nothing', only routed, unfitted"),
        (["chat", "routed", "--prompt", "hi", "--mlock"], "takes only --ctx and --threads of the machine flags"),
        (["eval", "unfitted", "--tasks", "demo:math#2"], "ridge router has not been fitted yet"),
        (["eval", "routed", "--harness", "arc_easy"], "--harness and device flags are for GGUF files only"),
    ],
)
def test_mistakes_with_the_torch_engine_are_one_line(argv: list[str], said: str, recipes: Path, capsys):
    assert main([*argv, "--engine", "torch", "--recipes", str(recipes)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
