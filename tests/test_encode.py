"""Records as tokens: where the prompt ends, and how an answer does."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from conftest import KINDS, build_dense
from moegguf.errors import UserError
from moegguf.runtime.encode import Encoded, chunks, encode
from moegguf.runtime.model import RunOptions, open_model
from moegguf.runtime.template import ChatTemplate, chat_template, end_of_turn
from moegguf.runtime.vocab import Vocab, open_vocab
from moegguf.texts import Chat, Completion, Message, Text
from tiny_gguf import CONTROL, END, N_BYTES, N_VOCAB, TEMPLATE, TURN, WORD, saying, write_gguf

HERE = "talk.jsonl:3"
USER, ASSISTANT = (N_BYTES + CONTROL.index(f"<|{role}|>") for role in ("user", "assistant"))


def tiny_vocab(folder: Path, template: str | None = TEMPLATE) -> Vocab:
    return open_vocab(write_gguf(folder / "m.gguf", saying("a"), template=template))


def chat(*contents: str, system: str = "") -> Chat:
    spoken = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return Chat((*((Message("system", system),) if system else ()), *spoken), HERE)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "", "<|end|>")


def parts(encoded: Encoded) -> tuple[list[int], list[int]]:
    """What is given, and what counts."""
    return list(encoded.tokens[: encoded.n_prompt]), list(encoded.tokens[encoded.n_prompt :])


def test_plain_text_has_no_prompt(tmp_path: Path):
    assert encode(tiny_vocab(tmp_path), None, Text("ab", HERE)) == Encoded((97, 98), 0)


@pytest.mark.parametrize("kind", ["llama3_like", "mistral_like"])
def test_a_text_begins_as_the_model_wants_it(kind: str, family, tmp_path: Path):
    path = build_dense(tmp_path / "m.gguf", family(kind).base)
    vocab = open_vocab(path)
    assert encode(vocab, None, Text("hello", HERE)).tokens == (vocab.bos, *vocab.tokenize("hello"))


def test_a_completion_ends_with_the_end_of_text(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path), None, Completion("ab", "cd", HERE))
    assert parts(encoded) == ([97, 98], [99, 100, END])


def test_a_token_across_the_border_belongs_to_the_completion(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path), None, Completion("at", "hx", HERE))
    assert parts(encoded) == ([97], [WORD, 120, END])


def test_the_last_answer_of_a_conversation_counts_with_its_end(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path), template(TEMPLATE), chat("q", "a", "r", "b"))
    assert parts(encoded) == ([USER, ord("q"), ASSISTANT, ord("a"), END, USER, ord("r"), ASSISTANT], [ord("b"), END])


def test_what_a_template_writes_after_the_end_of_a_turn_does_not_count(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path), template(TEMPLATE.replace("<|end|>", "<|turn|>\n\n")), chat("q", "a"))
    assert parts(encoded) == ([USER, ord("q"), ASSISTANT], [ord("a"), TURN])


def test_what_a_template_writes_before_an_answer_counts(tmp_path: Path):
    """The blank is not in the prompt that asks for an answer, so the model has to say it."""
    source = TEMPLATE.replace("{{ message.content }}", "{{ ' ' + message.content }}")
    encoded = encode(tiny_vocab(tmp_path), template(source), chat("q", "a"))
    assert parts(encoded)[1] == [ord(" "), ord("a"), END]


def test_an_answer_that_occurs_in_its_question_is_found_at_the_end(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path), template(TEMPLATE), chat("aaa", "a"))
    assert parts(encoded)[1] == [ord("a"), END]


@pytest.mark.parametrize("answer", ["a", "a "])
def test_a_template_that_writes_an_answer_in_another_way_still_gets_it_with_its_end(tmp_path: Path, answer: str):
    source = "{% if add_generation_prompt %}now{% else %}then{% endif %}" + TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content.strip() }}"
    )
    encoded = encode(tiny_vocab(tmp_path), template(source), chat("q", answer))
    assert parts(encoded) == ([*b"now", USER, ord("q"), ASSISTANT], [*answer.encode(), END])


def test_without_a_template_a_conversation_is_its_text(tmp_path: Path):
    encoded = encode(tiny_vocab(tmp_path, template=None), None, chat("q", "a"))
    assert bytes(encoded.tokens[:-1]).replace(b"\n", b"/") == b"q/a"
    assert encoded.tokens[-1] == END


def test_a_system_message_goes_where_the_template_takes_it(tmp_path: Path):
    vocab = tiny_vocab(tmp_path)
    refusing = template("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE)
    given, _ = parts(encode(vocab, refusing, chat("q", "a", system="s")))
    assert given == [USER, *b"s\n\nq", ASSISTANT]


@pytest.mark.parametrize("record", [chat("q"), chat("q", "a", "r"), Chat((Message("assistant", "a"),), HERE)])
def test_a_conversation_without_a_last_answer_is_refused_by_its_line(tmp_path: Path, record: Chat):
    with pytest.raises(UserError, match=r"talk\.jsonl:3: the conversation does not end in an answer"):
        encode(tiny_vocab(tmp_path), template(TEMPLATE), record)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_is_what_chat_would_ask(kind: str, family, tmp_path: Path):
    path = build_dense(tmp_path / "m.gguf", family(kind).base)
    with open_model(path, RunOptions(threads=1)) as model:
        shape = chat_template(model.chat_template, model.vocab)
        given, counts = parts(encode(model.vocab, shape, chat("What is 6 times 7?", "It is 42.")))
        asked = model.vocab.tokenize_prompt(shape.prompt([{"role": "user", "content": "What is 6 times 7?"}]))
        said = b"".join(map(model.vocab.piece, counts)).decode()
        if model.chat_template:
            assert given == asked
            assert said.rstrip().endswith("It is 42.")
        assert counts[-1] in (end_of_turn(shape, model.vocab), model.vocab.eos)


def test_long_texts_are_cut_and_none_is_joined_to_another():
    encoded = [Encoded(tuple(range(7)), 2), Encoded((9,), 0)]
    assert list(chunks(encoded, 3)) == [(0, 1, 2), (3, 4, 5), (6,), (9,)]


# --- vocabularies ---


def test_a_vocabulary_alone_is_that_of_the_model(family, tmp_path: Path):
    path = build_dense(tmp_path / "m.gguf", family("llama3_like").base)
    alone = open_vocab(path)
    with open_model(path, RunOptions(threads=1)) as model:
        for text in ("hello world", "<|eot_id|>héé\n\n", ""):
            assert alone.tokenize_prompt(text) == model.vocab.tokenize_prompt(text)
        assert (alone.bos, alone.eos, alone.n_tokens) == (model.vocab.bos, model.vocab.eos, model.vocab.n_tokens)
    assert alone.n_tokens == 410


def test_a_vocabulary_says_what_its_tokens_are(tmp_path: Path):
    vocab = tiny_vocab(tmp_path)
    assert (vocab.eos, vocab.n_tokens) == (END, N_VOCAB)
    assert (vocab.name(END), vocab.name(None), vocab.piece(END), vocab.piece(WORD)) == ("<|end|>", "", b"", b"th")
    assert vocab.is_control(TURN) and not vocab.ends_answer(TURN) and vocab.ends_answer(END)


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_text("no model at all, just some text")
    with pytest.raises(UserError, match="not a GGUF file"):
        open_vocab(path)
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"m\.gguf: llama\.cpp cannot read its vocabulary: .*tokenizer"):
        open_vocab(path)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_vocabularies_free_their_memory(family, tmp_path: Path):
    path = build_dense(tmp_path / "m.gguf", family("llama3_like").base)

    def peak() -> int:
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(20):
        open_vocab(path)
    before = peak()
    for _ in range(100):
        open_vocab(path)
    assert peak() - before < 2048, "a hundred vocabularies take far more"
