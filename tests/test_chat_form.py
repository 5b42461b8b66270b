"""Chat templates in Ollama's form: what Go's templates make of a conversation is what Jinja's do."""

from __future__ import annotations

from pathlib import Path

import pytest

from go_template import Message, parse_modelfile, render
from moegguf.demo.text import CHAT_TEMPLATE
from moegguf.exporting.chat_form import recognise
from moegguf.exporting.ollama import Modelfile
from moegguf.runtime.template import PLAIN, ChatTemplate
from moegguf.sources.go_to_jinja import to_jinja

BOS, EOS = "<s>", "</s>"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
)
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml with a system prompt of its own": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}{% for message in rest %}" + ALTERNATE +
    "{% if loop.index0 == 0 and s != false %}{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set c = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}" + ALTERNATE +
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}",
    "mistral, system prompt last": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s + '\n\n' if loop.last and s is defined else '') }}"
    "{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set r = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + r + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi 3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "alpaca": "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{{ '### Instruction:\n' if m.role == 'user' else '### Response:\n' }}"
    "{{ m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    "braces, quotes and characters that Ollama drops": "{% for m in messages %}{{ '\"\"\"{{ ' + m.role + ' }}\u3000' }}"
    "{{ m.content + '{' }}{% endfor %}{{ '\x07\u00e9\"' }}",
    "demo": CHAT_TEMPLATE,
    "plain": PLAIN,
}  # fmt: skip
OTHERS = {
    "changes what is said": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "counts": "{% for m in messages %}{{ loop.index }}: {{ m.content }}{% endfor %}",
    "forgets": "{{ messages[-1].content }}",
    "looks back": "{% for m in messages %}{{ m.content }}{% if messages|length > 4 %}!{% endif %}{% endfor %}",
    "repeats": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "fails": "{{ raise_exception('never') }}",
}


def conversation(*turns: str, system: str = "") -> list[Message]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


CONVERSATIONS = [
    conversation(*turns, system=system)
    for system in ("", "You are a teacher.\nBe {{ .Kind }}.")
    for turns in (("Why?",), ("1", "2", "3"), ("Ä {", "<|im_end|>", 'x """ y', "\\n", "{{ .Content }}", "6", "7"))
]


def go_template(source: str) -> str:
    """The template as it comes out of a Modelfile."""
    form = recognise(ChatTemplate(source, BOS, EOS).prompt)
    text = Modelfile(Path("mix.gguf"), form.to_go()).text(Path())
    return dict(parse_modelfile(text))["TEMPLATE"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_alike_in_go_and_in_jinja(name: str):
    jinja, go = ChatTemplate(TEMPLATES[name], BOS, EOS), go_template(TEMPLATES[name])
    for messages in CONVERSATIONS:
        assert render(go, messages) == jinja.prompt(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_comes_back_from_ollama_as_it_went_there(name: str):
    there, back = (
        ChatTemplate(TEMPLATES[name], BOS, EOS),
        ChatTemplate(to_jinja(go_template(TEMPLATES[name])), BOS, EOS),
    )
    for messages in CONVERSATIONS:
        assert back.prompt(messages) == there.prompt(messages)


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_of_another_form_is_not_claimed(name: str):
    assert recognise(ChatTemplate(OTHERS[name], BOS, EOS).prompt) is None


def test_an_answer_that_is_begun_is_left_open():
    begun = conversation("Why?", "Beca")
    assert render(go_template(TEMPLATES["chatml"]), begun).endswith("<|im_start|>assistant\nBeca")


@pytest.mark.parametrize("name", ["llama 2", "mistral", "mistral, system prompt last", "chatml"])
def test_what_the_runtime_puts_first_itself_is_left_out_once(name: str):
    form = recognise(ChatTemplate(TEMPLATES[name], BOS, EOS).prompt)
    for messages in CONVERSATIONS:
        assert form.without(BOS).render(messages) == form.render(messages).removeprefix(BOS)
