"""References of text: what they read, and which line they blame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moegguf.demo.text import DOMAINS, examples, split_of
from moegguf.errors import UserError
from moegguf.texts import MAX_FAULTS, Chat, Completion, Message, Text, read_domains, read_records


def lines(path: Path, *rows: object) -> Path:
    """A JSONL file: strings as they are, everything else as JSON."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_every_shape_of_line_gives_its_record(tmp_path):
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    path = lines(
        tmp_path / "all.jsonl",
        {"text": " plain "},
        {"prompt": "", "completion": "said"},
        {"messages": chat},
        {"question": "Q?", "answer": "A.", "source": "ignored"},
    )
    assert read_records(str(path)) == [
        Text(" plain ", f"{path}:1"),
        Completion("", "said", f"{path}:2"),
        Chat(tuple(Message(role, role) for role in ("system", "user", "assistant")), f"{path}:3"),
        Chat((Message("user", "Q?"), Message("assistant", "A.")), f"{path}:4"),
    ]


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    path = lines(tmp_path / "a.jsonl", "", {"text": "one"}, "  ", {"text": "two"}, "")
    assert [record.where for record in read_records(str(path))] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_record_to_the_character(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("\ufeff# Häagen\n\n<|user|>{{ 1 + 1 }}  \n".encode())
    assert read_records(str(path)) == [Text("# Häagen\n\n<|user|>{{ 1 + 1 }}  \n", f"{path}:1")]


def test_relative_paths_are_relative_to_the_folder(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "here"})
    assert [record.text for record in read_records("a.jsonl", tmp_path)] == ["here"]


# ------------------------------------------------------------------------------------------ demo family


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("suffix", "split"), [("", "train"), ("/heldout", "heldout")])
def test_demo_texts_are_the_examples_of_that_side_of_the_split(domain, suffix, split):
    records = read_records(f"demo:{domain}{suffix}#30")
    answers = {example.question: example.answer for example in examples(domain, split, 30, seed=11)}
    assert [record.messages[0].content for record in records] == [e.question for e in examples(domain, split, 30, 11)]
    assert all(answers[record.messages[0].content] == record.messages[1].content for record in records)
    assert len(records) == 30


def test_demo_texts_are_200_unless_told_and_always_the_same():
    assert len(read_records("demo:math")) == 200
    assert read_records("demo:math") == read_records("demo:math")
    bare = [record.messages[0].content for record in read_records("demo:math/heldout")]
    assert {split_of(question) for question in bare} == {"heldout"}


@pytest.mark.parametrize("ref", ["demo:poetry", "demo:", "demo:math/test", "demo:math#0", "demo:math#x", "demo:math#"])
def test_another_demo_reference_is_refused_with_the_domains(ref):
    with pytest.raises(UserError, match=r"general, math, clinic, strings"):
        read_records(ref)


# -------------------------------------------------------------------------------------------- bad input


FAULTS = {
    "no JSON": ('{"text": "a"', r"no valid JSON \(Expecting ',' delimiter"),
    "no object": ("[1]", r"found \[1\], expected a JSON object"),
    "deep": ("[" * 100_000, r"no JSON that can be read"),
    "other fields": ({"q": "?"}, r'found \{"q"\}, expected one of \{"messages"\}'),
    "half of a pair": ({"question": "?"}, r'found \{"question"\}'),
    "number": ({"text": 7}, r"text is 7, expected a string"),
    "null": ({"text": None}, r"text is nothing, expected a string"),
    "blank": ({"question": "Q?", "answer": " \n"}, r"answer is empty"),
    "lone surrogate": ('{"text": "\\ud800"}', r"half a character"),
    "no messages": ({"messages": []}, r"messages is \[\], expected a list"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, r'messages\[0\] has role "tool"'),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is nothing"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_line_is_named_with_its_number_and_its_fault(case, tmp_path):
    row, says = FAULTS[case]
    path = lines(tmp_path / "a.jsonl", {"text": "good"}, "", row, {"text": "good"})
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{says}") as caught:
        read_records(str(path))
    assert len(caught.value.faults) == 1 and caught.value.mend


def test_the_first_faults_of_a_file_are_reported_together(tmp_path):
    path = lines(tmp_path / "a.jsonl", *["{"] * (MAX_FAULTS + 3))
    with pytest.raises(UserError) as caught:
        read_records(str(path))
    assert [fault.message.split(": ")[0] for fault in caught.value.faults] == [
        f"{path}:{i}" for i in range(1, MAX_FAULTS + 1)
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "cannot be read"),
        ("empty.jsonl", b"\n \n", "is empty"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", "Häagen".encode("latin-1"), "is not UTF-8 text"),
        ("table.csv", b"a,b", r"expected demo:DOMAIN or a \.txt, \.md or \.jsonl file"),
        ("nul\0.txt", None, "is no path"),
    ],
)
def test_a_file_that_holds_no_text_is_refused(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_records(name, tmp_path)


def test_domains_are_read_in_order_and_all_faults_are_reported_at_once(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "one"})
    lines(tmp_path / "b.jsonl", {"text": "two"})
    read = read_domains({"x": ["a.jsonl", "b.jsonl"], "y": ["demo:math#3"]}, tmp_path)
    assert [record.text for record in read["x"]] == ["one", "two"]
    assert len(read["y"]) == 3
    with pytest.raises(UserError) as caught:
        read_domains({"x": ["a.jsonl", "gone.txt"], "y": ["demo:poetry"], "z": []}, tmp_path)
    assert [fault.message for fault in caught.value.faults] == [
        f"{tmp_path / 'gone.txt'}: cannot be read (No such file or directory)",
        "demo:poetry: is no text of the demo family, expected demo:DOMAIN, demo:DOMAIN/heldout or demo:DOMAIN#N",
        "domain z: has no text",
    ]
