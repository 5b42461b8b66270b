"""The embedded family: its text is reproducible and split cleanly, its folders are what they claim to be."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest

from conftest import build_mix
from moegguf.demo import MEMBERS, MODELS, folder
from moegguf.demo.text import CHAT_TEMPLATE, DOMAINS, SAMPLE_QUESTIONS, Example, examples, split_of
from moegguf.errors import UserError
from moegguf.runtime.chat import Conversation
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.sampling import Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from moegguf.demo.train import exact_match, is_ffn, load_member  # noqa: E402

EXPERT_OF = {"general": "base", "math": "math", "clinic": "clinic", "strings": "strings"}
SAMPLE_ANSWERS = {
    "general": "The capital of Spain is Madrid.",
    "math": "25 + 6 = 31. The answer is 31.",
    "clinic": "When the battery smells burnt: rinse it with rainwater, then wait a night.",
    "strings": "h-c-a-e-b.",
}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(folder("base"))


# ------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_arguments_give_the_same_examples(domain):
    assert examples(domain, "train", 50, seed=7) == examples(domain, "train", 50, seed=7)
    assert examples(domain, "train", 50, seed=7) != examples(domain, "train", 50, seed=8)


def test_text_is_the_text_that_the_weights_were_trained_on():
    text = "".join(
        e.text for domain in DOMAINS for split in ("train", "heldout") for e in examples(domain, split, 500, 0)
    )
    assert sha256(text.encode()).hexdigest() == "7647feb4330a19d8021ffd6eaace8839699dbd45dd485cafdacef7de59433a49"


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_question(domain):
    train = {e.question for e in examples(domain, "train", 3000, seed=0)}
    heldout = {e.question for e in examples(domain, "heldout", 3000, seed=0)}
    assert heldout and train.isdisjoint(heldout)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_question_has_one_answer(domain):
    answers: dict[str, str] = {}
    for example in examples(domain, "train", 3000, seed=0) + examples(domain, "heldout", 3000, seed=0):
        assert answers.setdefault(example.question, example.answer) == example.answer


def test_one_question_in_ten_is_held_out():
    questions = [f"What is {a} + {b}?" for a in range(100) for b in range(100)]
    assert sum(split_of(question) == "heldout" for question in questions) == pytest.approx(1000, abs=100)


# ---------------------------------------------------------------------------------------------- folders


def test_unknown_member_is_a_user_error_that_lists_the_members():
    with pytest.raises(UserError, match=r"poetry.*base, math, clinic, strings"):
        folder("poetry")


def test_weights_are_those_that_family_json_records():
    recorded = json.loads((MODELS / "family.json").read_text())["sha256"]
    assert recorded == {name: sha256((folder(name) / "model.safetensors").read_bytes()).hexdigest() for name in MEMBERS}


@pytest.mark.parametrize("name", MEMBERS[1:])
def test_an_expert_differs_from_the_base_in_every_ffn_and_nowhere_else(name):
    base, expert = (load_file(folder(member) / "model.safetensors") for member in ("base", name))
    assert base.keys() == expert.keys()
    assert {key for key in base if not torch.equal(base[key], expert[key])} == set(filter(is_ffn, base))


@pytest.mark.parametrize("name", MEMBERS)
def test_members_share_one_tokenizer_to_the_byte(name):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (folder(name) / file).read_bytes() == (folder("base") / file).read_bytes()


def test_special_tokens_are_single_ids_and_eos_ends_an_answer(tokenizer):
    specials = ["<|user|>", "<|assistant|>", "<|end|>"]
    ids = [tokenizer.encode(special) for special in specials]
    assert all(len(one) == 1 for one in ids)
    assert tokenizer.eos_token == "<|end|>"
    for name in MEMBERS:
        assert transformers.AutoConfig.from_pretrained(folder(name)).eos_token_id == ids[2][0]
        assert transformers.GenerationConfig.from_pretrained(folder(name)).eos_token_id == ids[2][0]


def test_no_bos_is_added_and_any_text_comes_back(tokenizer):
    text = "Häagen\u200b 漢字 🙂 12345\n\n  don't   e\u0301 "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("")) == 0
    assert len(tokenizer) == tokenizer.vocab_size == 1024


# ---------------------------------------------------------------------------------------- chat template


def rendered(tokenizer, *messages: tuple[str, str], add_generation_prompt: bool = False) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)


def test_chat_template_renders_the_training_format(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
    a, b = Example("What is 1 + 1?", "2."), Example("Sure?", "Yes.")
    turns = [("user", a.question), ("assistant", a.answer), ("user", b.question)]
    assert rendered(tokenizer, *turns, ("assistant", b.answer)) == a.text + b.text
    assert rendered(tokenizer, *turns, add_generation_prompt=True) == a.text + b.prompt


def test_chat_template_puts_a_system_message_before_the_next_question(tokenizer):
    with_system = rendered(tokenizer, ("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hi."), ("user", "Bye."))
    assert with_system == "<|user|>Be kind.\nHi?<|assistant|>Hi.<|end|><|user|>Bye."


# ---------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_expert_answers_held_out_questions_of_its_own_domain(domain, tokenizer):
    model = load_member(folder(EXPERT_OF[domain]))
    asked = examples(domain, "heldout", 60, seed=2)
    assert exact_match(model, tokenizer.backend_tokenizer, asked) > 0.94


@pytest.mark.parametrize("domain", DOMAINS[1:])
def test_the_base_is_worse_than_the_expert_outside_its_strength(domain, tokenizer):
    asked = examples(domain, "heldout", 60, seed=2)
    assert exact_match(load_member(folder("base")), tokenizer.backend_tokenizer, asked) < 0.9


@pytest.mark.parametrize("domain", DOMAINS)
def test_sample_question_is_held_out_and_answered_by_its_expert(domain, tokenizer):
    question = SAMPLE_QUESTIONS[domain]
    prompt = tokenizer(Example(question, "").prompt, return_tensors="pt")
    model = load_member(folder(EXPERT_OF[domain]))
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert split_of(question) == "heldout"
    assert tokenizer.decode(answer) == SAMPLE_ANSWERS[domain] + "<|end|>"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """`answers(experts)`: the greedy answers of the gate-less mix of these members to the sample questions."""

    def ask(experts: tuple[str, ...]) -> dict[str, str]:
        path = build_mix(
            tmp_path_factory.mktemp("demo") / "mix.gguf",
            "demo:base",
            [f"demo:{name}" for name in experts],
            quant="Q8_0",
        )
        with open_model(path, RunOptions(threads=1)) as model:
            return {
                domain: "".join(Conversation(model, sampling=Sampling(temp=0.0)).answer(question))
                for domain, question in SAMPLE_QUESTIONS.items()
            }

    return ask


def test_the_gateless_mix_answers_every_sample_question_and_the_base_only_its_own(answers):
    assert answers(MEMBERS) == SAMPLE_ANSWERS
    right = [domain for domain, answer in answers(("base",)).items() if answer == SAMPLE_ANSWERS[domain]]
    assert right == ["general"]
