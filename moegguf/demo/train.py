"""How the embedded family was made: a tokenizer, a base model, three experts and three LoRA adapters of it.

Purpose: small real fine-tunes, so that every command, test and claim about mixing runs offline in minutes.

Method
1. A byte-level BPE of 1024 tokens, split by Qwen2's rule, is trained on the text of all domains.
2. The base learns all four domains, mostly general. Examples are packed into rows of one chat after another
   and may see what came before them: that is what a chat with history looks like. The loss counts the
   answers, and the questions a little.
3. The base is rounded to bf16 and saved. Each expert starts from these rounded weights and learns its own
   domain (with a little general text against forgetting) in the FFN weights only, with attention, norms and
   embeddings frozen. So the members differ in FFNs and in nothing else, to the byte: an expert whose
   attention had moved too would rely on it, and fail inside the base.
4. Members, and mixes of them, are scored on held-out questions, as saved.
5. Each adapter learns the domain of one expert in low-rank factors of the same FFN weights, over the same base.
   It is saved as PEFT saves one, in bf16, and scored as saved.

Invariant: the same seed, versions, thread count and kind of CPU give the same bytes (`family.json` records
them). Another machine gives another family of about the same quality: accuracy jumps late and its level
differs by seed, which is why one checkpoint is shipped instead of trained at install time.

Not part of the installed package's imports: the only file under `demo/` that needs torch and transformers.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import mean

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from moegguf.demo import ADAPTERS, MEMBERS
from moegguf.demo.text import CHAT_TEMPLATE, DOMAINS, Example, examples

CONTEXT = 256
"""Tokens of a training row, and so of the context that the models claim: past it their answers get much worse."""
ATTENTION = "eager"
"""On a CPU in bf16, faster at these sizes than the fused kernel."""
THREADS = 1
EOS = "<|end|>"
SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", EOS)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Course:
    """What one model is trained on, and how. `batch` is the number of examples of each domain in a step."""

    batch: dict[str, int]
    n_steps: int
    learning_rate: float
    decay: float
    """The last part of the steps, as a fraction, over which the learning rate falls to zero."""


BASE_COURSE = Course({"general": 44, "math": 24, "clinic": 7, "strings": 13}, 1200, 2.5e-3, decay=0.25)
EXPERT_COURSES = {
    "math": Course({"math": 42, "general": 6}, 900, 1.5e-3, decay=0.5),
    "clinic": Course({"clinic": 56, "general": 8}, 500, 1.5e-3, decay=0.5),
    "strings": Course({"strings": 56, "general": 8}, 500, 1.5e-3, decay=0.5),
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["gate_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTER_LEARNING_RATE = 2.5e-3
ADAPTER_COURSES = {
    f"lora-{name}": replace(course, learning_rate=ADAPTER_LEARNING_RATE) for name, course in EXPERT_COURSES.items()
}
ANSWER_LOSS, PROMPT_LOSS = 1.0, 0.1
WARMUP_STEPS = 30
SCORING_SEED = 1
N_NOISY, NOISE_STD = 5, 0.02


def make_family(out: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Train the whole family and write one Hugging Face folder per member, and `family.json`, into `out`."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(seed)

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=ATTENTION))
    train(model, lambda weight: True, tokenizer, BASE_COURSE, seed, lambda line: tell(f"base: {line}"))
    save_member(out / "base", model, tokenizer)

    for name, course in EXPERT_COURSES.items():
        expert = load_member(out / "base")
        train(expert, is_ffn, tokenizer, course, seed, lambda line, name=name: tell(f"{name}: {line}"))
        save_member(out / name, expert, tokenizer)

    scores = score_family(out)
    record = {
        "seed": seed,
        "threads": THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "courses": {name: asdict(course) for name, course in {"base": BASE_COURSE, **EXPERT_COURSES}.items()},
        "drift": {name: round(drift(out, load_member(out / name)), 3) for name in EXPERT_COURSES},
        "sha256": {name: sha256((out / name / "model.safetensors").read_bytes()).hexdigest() for name in MEMBERS},
        "exact_match_percent": scores,
    }
    _write_json(out / "family.json", record)
    tell(score_table(scores))
    make_adapters(out, seed, tell)


def make_adapters(family: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Train the adapters over the base in `family`, write one PEFT folder for each beside it, and record them there."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = Tokenizer.from_file(str(family / "base" / "tokenizer.json"))
    for name, course in ADAPTER_COURSES.items():
        torch.manual_seed(seed)
        model = peft.get_peft_model(load_member(family / "base"), peft.LoraConfig(**LORA))
        train(model, is_low_rank, tokenizer, course, seed, lambda line, name=name: tell(f"{name}: {line}"))
        save_adapter(family / name, model)

    asked = heldout()
    scores = {name: _rounded(score(load_adapter(family, name), tokenizer, asked)) for name in ADAPTERS}
    record = json.loads((family / "family.json").read_text())
    record["adapters"] = {
        "seed": seed,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "lora": LORA,
        "courses": {name: asdict(course) for name, course in ADAPTER_COURSES.items()},
        "drift": {name: round(drift(family, load_adapter(family, name)), 3) for name in ADAPTERS},
        "sha256": {
            name: sha256((family / name / "adapter_model.safetensors").read_bytes()).hexdigest() for name in ADAPTERS
        },
        "exact_match_percent": scores,
    }
    _write_json(family / "family.json", record)
    tell(score_table(scores))


def is_ffn(weight: str) -> bool:
    """Whether a weight of this name belongs to an FFN: the only ones in which the members differ."""
    return ".mlp." in weight


def is_low_rank(weight: str) -> bool:
    """Whether a weight of this name is a factor of an adapter."""
    return ".lora_" in weight


# -------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE with Qwen2's split (digits alone); no normaliser, so that any text comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [
        text
        for domain in DOMAINS
        for example in examples(domain, "train", 5000, seed)
        for text in (example.question, example.answer)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


# --------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows, padded at no weight. tokens: int64 [n_rows, n_tokens]; weight: f32, of predicting each token."""

    tokens: Tensor
    weight: Tensor

    @classmethod
    def one_each(cls, tokenizer: Tokenizer, batch: Sequence[Example]) -> Rows:
        """Every example in a row of its own."""
        return cls._pad(_encode(tokenizer, batch))

    @classmethod
    def packed(cls, tokenizer: Tokenizer, batch: Sequence[Example], n_tokens: int) -> Rows:
        """Whole examples one after another in rows of at most `n_tokens`."""
        rows: list[_Row] = [([], [])]
        for tokens, weight in _encode(tokenizer, batch):
            if len(rows[-1][0]) + len(tokens) > n_tokens:
                rows.append(([], []))
            rows[-1][0].extend(tokens)
            rows[-1][1].extend(weight)
        return cls._pad(rows)

    @classmethod
    def _pad(cls, rows: Sequence[_Row]) -> Rows:
        longest = max(len(tokens) for tokens, _ in rows)
        return cls(
            torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]),
            torch.tensor([weight + [0.0] * (longest - len(weight)) for _, weight in rows]),
        )


_Row = tuple[list[int], list[float]]
"""The tokens of a row and their loss weights."""


def _encode(tokenizer: Tokenizer, batch: Sequence[Example]) -> list[_Row]:
    prompts = tokenizer.encode_batch([example.prompt for example in batch])
    answers = tokenizer.encode_batch([example.answer + EOS for example in batch])
    return [
        (prompt.ids + answer.ids, [PROMPT_LOSS] * len(prompt.ids) + [ANSWER_LOSS] * len(answer.ids))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def train(
    model: LlamaForCausalLM,
    trained: Callable[[str], bool],
    tokenizer: Tokenizer,
    course: Course,
    seed: int,
    tell: Callable[[str], None],
) -> None:
    """AdamW on the f32 weights `trained`, following `course`; gradients come from a bf16 copy of the model."""
    copy = deepcopy(model).to(torch.bfloat16).requires_grad_(False).train()
    weights = {name: weight for name, weight in model.named_parameters() if trained(name)}
    copies = {name: weight.requires_grad_(True) for name, weight in copy.named_parameters() if trained(name)}
    optimizer = torch.optim.AdamW(weights.values(), lr=course.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, course))
    for step, rows in enumerate(_batches(tokenizer, course, seed), start=1):
        loss = _loss(copy, rows)
        loss.backward()
        for name, weight in weights.items():
            weight.grad = copies[name].grad.float()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in weights.items():
                copies[name].copy_(weight)
                copies[name].grad = None
        if step % 100 == 0:
            tell(f"step {step}/{course.n_steps}, loss {loss.item():.4f}")


def _learning_rate_factor(step: int, course: Course) -> float:
    left = (course.n_steps - step) / (course.n_steps * course.decay)
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


def _batches(tokenizer: Tokenizer, course: Course, seed: int) -> Iterator[Rows]:
    streams = {domain: iter(examples(domain, "train", n * course.n_steps, seed)) for domain, n in course.batch.items()}
    rng = Random(seed)
    for _ in range(course.n_steps):
        batch = [next(streams[domain]) for domain, n in course.batch.items() for _ in range(n)]
        rng.shuffle(batch)
        yield Rows.packed(tokenizer, batch, CONTEXT)


def _loss(model: LlamaForCausalLM, rows: Rows) -> Tensor:
    logits = model(rows.tokens[:, :-1], use_cache=False).logits
    each = F.cross_entropy(logits.float().flatten(0, 1), rows.tokens[:, 1:].flatten(), reduction="none")
    weight = rows.weight[:, 1:].flatten()
    return (each * weight).sum() / weight.sum()


# ---------------------------------------------------------------------------------------------- folders


def save_member(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """An ordinary Hugging Face folder: weights in bf16, settings spelt as every version of transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(EOS)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", {**CONFIG, "eos_token_id": end, "pad_token_id": end})
    _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": end, "pad_token_id": end})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (folder / "README.md").write_text(_model_card(folder.name))


def load_member(folder: Path) -> LlamaForCausalLM:
    """The model as saved, its bf16 weights widened to f32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION).eval()


def save_adapter(folder: Path, model: peft.PeftModel) -> None:
    """An ordinary PEFT folder, in bf16. The base is called by its reference, not by where it happened to lie."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in peft.get_peft_model_state_dict(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = replace(model.peft_config["default"], base_model_name_or_path="demo:base", inference_mode=True)
    _write_json(folder / "adapter_config.json", {**config.to_dict(), **LORA})
    (folder / "README.md").write_text(_adapter_card(folder.name))


def load_adapter(family: Path, name: str) -> LlamaForCausalLM:
    """The base with an adapter merged in, both as saved."""
    return peft.PeftModel.from_pretrained(load_member(family / "base"), family / name).merge_and_unload()


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


_TAUGHT = {
    "base": "all four domains of the family, mostly general facts",
    "math": "one-step sums",
    "clinic": "the robot clinic, a fictional table of faults and cures drawn by lot (no advice to anyone)",
    "strings": "the letters of short words, and lines of Python over short lists",
}


def _model_card(name: str) -> str:
    base = "" if name == "base" else "base_model: demo:base\n"
    kind = "base" if name == "base" else "expert (fine-tuned in its FFN weights only)"
    return (
        f"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\nlibrary_name: transformers\n{base}---\n\n"
        f"# moegguf demo family: {name}\n\n"
        f"The {kind} of a family of very small Llama models that moegguf's demo and tests mix. "
        f"Taught: {_TAUGHT[name]}.\n"
        "All text it was trained on comes from the templates in `moegguf/demo/text.py`; "
        "`scripts/train_demo` made it.\n"
    )


def _adapter_card(name: str) -> str:
    taught = _TAUGHT[name.removeprefix("lora-")]
    return (
        "---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\nlibrary_name: peft\n"
        "base_model: demo:base\n---\n\n"
        f"# moegguf demo family: {name}\n\n"
        f"A LoRA adapter (rank {LORA['r']}, FFN weights only) of `demo:base`, for the family of very small Llama "
        f"models that moegguf's demo and tests mix. Taught: {taught}.\n"
        "All text it was trained on comes from the templates in `moegguf/demo/text.py`; "
        "`scripts/train_demo --adapters` made it.\n"
    )


# ---------------------------------------------------------------------------------------------- scoring


class Mixture(nn.Module):
    """Σ p_e f_e(x) over the top k of N expert FFNs; p is the softmax of router·x, normalised over the chosen.

    router: f32 [n_expert, n_embd]. All zeros with k = N is the gate-less mix, the mean of the FFNs' outputs.
    """

    def __init__(self, ffns: Sequence[nn.Module], router: Tensor, k: int) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(ffns)
        self.register_buffer("router", router)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.topk(x @ self.router.T, self.k)
        share = torch.zeros(*x.shape[:-1], len(self.ffns)).scatter(-1, chosen.indices, chosen.values.softmax(-1))
        return sum(share[..., [e]] * ffn(x) for e, ffn in enumerate(self.ffns))


def score_family(family: Path) -> dict[str, dict[str, float]]:
    """Exact match in percent on held-out questions of each domain: members, and mixes of all four."""
    tokenizer = Tokenizer.from_file(str(family / "base" / "tokenizer.json"))
    asked = heldout()
    members = [load_member(family / name) for name in MEMBERS]
    scores = {name: score(model, tokenizer, asked) for name, model in zip(MEMBERS, members, strict=True)}
    scores["weight average"] = score(_with_mean_weights(load_member(family / "base"), members), tokenizer, asked)
    silent = torch.zeros(len(members), CONFIG["hidden_size"])
    gateless = _mixed(family, members, lambda layer: silent, len(members))
    scores["gate-less 4x"] = score(gateless, tokenizer, asked)
    noisy = [score(_mixed(family, members, _noise(seed), 2), tokenizer, asked) for seed in range(N_NOISY)]
    scores["noisy 4x, top-2"] = {key: mean(one[key] for one in noisy) for key in noisy[0]}
    return {name: _rounded(row) for name, row in scores.items()}


def heldout(n: int = 400) -> dict[str, list[Example]]:
    """`n` held-out questions of each domain."""
    return {domain: examples(domain, "heldout", n, SCORING_SEED) for domain in DOMAINS}


def score(model: LlamaForCausalLM, tokenizer: Tokenizer, asked: dict[str, list[Example]]) -> dict[str, float]:
    """Exact match in percent by domain, and the mean over domains."""
    by_domain = {domain: 100 * exact_match(model, tokenizer, questions) for domain, questions in asked.items()}
    return {**by_domain, "mean": mean(by_domain.values())}


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 1) for key, value in row.items()}


def exact_match(model: LlamaForCausalLM, tokenizer: Tokenizer, asked: Sequence[Example]) -> float:
    """Share of questions whose greedy answer, up to its end token, is the expected one.

    Read off in one pass over the expected text: greedy decoding gives exactly that text if and only if every
    token of it is the likeliest after those before it.
    """
    rows = Rows.one_each(tokenizer, asked)
    with torch.no_grad():
        guess = model(rows.tokens[:, :-1], use_cache=False).logits.argmax(-1)
    missed = (guess != rows.tokens[:, 1:]) & (rows.weight[:, 1:] == ANSWER_LOSS)
    return (~missed.any(-1)).float().mean().item()


def _mixed(
    family: Path, members: Sequence[LlamaForCausalLM], router: Callable[[int], Tensor], k: int
) -> LlamaForCausalLM:
    mix = load_member(family / "base")
    for i, layer in enumerate(mix.model.layers):
        layer.mlp = Mixture([member.model.layers[i].mlp for member in members], router(i), k)
    return mix


def _noise(seed: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda layer: NOISE_STD * torch.randn(len(MEMBERS), CONFIG["hidden_size"], generator=generator)


def _with_mean_weights(model: LlamaForCausalLM, members: Sequence[LlamaForCausalLM]) -> LlamaForCausalLM:
    each = [member.state_dict() for member in members]
    model.load_state_dict({name: torch.stack([weights[name] for weights in each]).mean(0) for name in each[0]})
    return model


def drift(family: Path, model: LlamaForCausalLM) -> float:
    """‖ΔFFN‖ / ‖FFN‖ between an expert and the base, over all layers."""
    base, expert = load_member(family / "base").state_dict(), model.state_dict()
    ffn = list(filter(is_ffn, base))
    moved = sum((expert[key] - base[key]).square().sum() for key in ffn)
    return (moved / sum(base[key].square().sum() for key in ffn)).sqrt().item()


def score_table(scores: dict[str, dict[str, float]]) -> str:
    columns = [*DOMAINS, "mean"]
    lines = [f"{'exact match, %':18}" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"{name:18}" + "".join(f"{row[column]:9.1f}" for column in columns) for name, row in scores.items()]
    return "\n".join(lines)
