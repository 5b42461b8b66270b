"""Ollama's chat templates in Jinja: they render what Go renders.

What is expected in `CASES` is what Go's own text/template wrote, executed by ollama's template/template.go.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from moegguf.runtime.template import ChatTemplate
from moegguf.sources.go_template import GoTemplateError
from moegguf.sources.go_to_jinja import to_jinja
from moegguf.sources.ollama_chat import Chat, Told, chat_of, prefers_own, takes_system
from tiny_gguf import saying, write_gguf

BOS, EOS = "<s>", "</s>"
Message = dict[str, str]


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


S, U, A = "system", "user", "assistant"
CONVERSATIONS = {
    "asked": messages((U, "Why?")),
    "told": messages((S, "Be brief."), (U, "Why?"), (A, "So."), (U, "Oh?")),
    "begun": messages((U, "Why?"), (A, "Beca")),
    "odd": messages((S, "A"), (U, "1"), (U, "2"), (A, "3"), (S, "B"), (U, "{{4}}\n")),
}
CASES = {
    "a message at a time": (
        "{{- range .Messages }}<|{{ .Role }}|>\n"
        "{{ .Content }}<|end|>\n"
        "{{ end }}<|assistant|>\n",
        {
            "asked": "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
            "told": "<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n"
            "<|assistant|>\nSo.<|end|>\n<|user|>\nOh?<|end|>\n<|assistant|>\n",
            "begun": "<|user|>\nWhy?<|end|>\n<|assistant|>\nBeca<|end|>\n<|assistant|>\n",
            "odd": "<|system|>\nA<|end|>\n<|user|>\n1\n\n2<|end|>\n"
            "<|assistant|>\n3<|end|>\n<|system|>\nB<|end|>\n<|user|>\n{{4}}\n<|end|>\n<|assistant|>\n",
        },
    ),
    "the last is told apart": (
        "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}<|{{ .Role }}"
        "|>{{ .Content }}{{ if not $last }}<|end|>{{ end }}{{ if and $last (ne .Role \"assistant\") }}"
        "<|end|><|assistant|>{{ end }}{{- end }}",
        {
            "asked": "<|user|>Why?<|end|><|assistant|>",
            "told": "<|system|>Be brief.<|end|><|user|>Why?<|end|>"
            "<|assistant|>So.<|end|><|user|>Oh?<|end|><|assistant|>",
            "begun": "<|user|>Why?<|end|><|assistant|>Beca",
            "odd": "<|system|>A<|end|><|user|>1\n\n2<|end|>"
            "<|assistant|>3<|end|><|system|>B<|end|><|user|>{{4}}\n<|end|><|assistant|>",
        },
    ),
    "the system prompt goes last": (
        "{{ range $i, $_ := .Messages }}\n"
        "{{- if eq .Role \"user\" }}[Q]{{ if and $.System (lt (len (slice $.Messages $i)) 2) }}"
        "{{ $.System }}: {{ end }}{{ .Content }}[/Q]\n"
        "{{- else if eq .Role \"assistant\" }} {{ .Content }}</s>\n"
        "{{- end }}\n"
        "{{- end }}",
        {
            "asked": "[Q]Why?[/Q]",
            "told": "[Q]Why?[/Q] So.</s>[Q]Be brief.: Oh?[/Q]",
            "begun": "[Q]Why?[/Q] Beca</s>",
            "odd": "[Q]1\n\n2[/Q] 3</s>[Q]A\n\nB: {{4}}\n[/Q]",
        },
    ),
    "the system prompt is kept for a question": (
        "{{- $s := \"\" }}\n"
        "{{- range .Messages }}\n"
        "{{- if eq .Role \"system\" }}\n"
        "{{- if not $s }}{{ $s = .Content }}{{ else }}{{ $s = printf \"%s+%s\" $s .Content }}{{ end }}\n"
        "{{- continue }}\n"
        "{{- else if eq .Role \"user\" }}Q: {{ if $s }}({{ $s }}) {{ $s = \"\" }}{{ end }}\n"
        "{{- else }}A: {{ end }}{{ .Content }}\n"
        "{{ end }}A:",
        {
            "asked": "Q: Why?\nA:",
            "told": "Q: (Be brief.) Why?\nA: So.\nQ: Oh?\nA:",
            "begun": "Q: Why?\nA: Beca\nA:",
            "odd": "Q: (A) 1\n\n2\nA: 3\nQ: (B) {{4}}\n\nA:",
        },
    ),
    "questions with their answers": (
        "{{ if .System }}<s>{{ .System }}</s>\n"
        "{{ end }}{{ if .Prompt }}<q>{{ .Prompt }}</q>\n"
        "{{ end }}<a>{{ .Response }}</a>\n",
        {
            "asked": "<q>Why?</q>\n<a>",
            "told": "<s>Be brief.</s>\n<q>Why?</q>\n<a>So.</a>\n<q>Oh?</q>\n<a>",
            "begun": "<q>Why?</q>\n<a>Beca",
            "odd": "<s>A</s>\n<q>1\n\n2</q>\n<a>3</a>\n<s>B</s>\n<q>{{4}}\n</q>\n<a>",
        },
    ),
    "an answer without its place": (
        "Q: {{ .Prompt }} A: ",
        {
            "asked": "Q: Why? A: ",
            "told": "Q: Why? A: So.Q: Oh? A: ",
            "begun": "Q: Why? A: Beca",
            "odd": "Q: 1\n\n2 A: 3Q: {{4}}\n A: ",
        },
    ),
    "an answer in a condition": (
        "{{ if .Prompt }}<q>{{ .Prompt }}{{ end }}<a>{{ if .Response }}{{ .Response }}</a>{{ end }}.",
        {
            "asked": "<q>Why?<a>",
            "told": "<q>Why?<a>So.</a>.<q>Oh?<a>",
            "begun": "<q>Why?<a>Beca",
            "odd": "<q>1\n\n2<a>3</a>.<q>{{4}}\n<a>",
        },
    ),
    "both forms": (
        "{{ if .Messages }}{{ range .Messages }}>{{ .Content }};{{ end }}{{ else }}{{ if .Suffix }}"
        "{{ .Suffix }}{{ end }}{{ .Prompt }}{{ end }}>{{ .Response }}{{ if .Response }}<{{ end }}",
        {
            "asked": ">Why?;>",
            "told": ">Be brief.;>Why?;>So.;>Oh?;>",
            "begun": ">Why?;>Beca;>",
            "odd": ">A;>1\n\n2;>3;>B;>{{4}}\n;>",
        },
    ),
    "words of Go": (
        "{{/* {{ not this }} */ -}}\n"
        " {{ $n := -1 }}{{ $done := false -}}\n"
        "{{ range $i, $m := .Messages }}{{ if eq $m.Role \"user\" \"tool\" }}{{ $n = $i }}{{ end }}{{ end -}}\n"
        "{{- range $i, $m := .Messages }}{{ if and (eq $i $n) (gt $n 0) }}{{ break }}{{ end }}"
        "{{ with .Content }}{{ . | printf \"%s%%\\t\" }}{{ else }}-{{ end }}{{ end }}"
        "{{ (index .Messages 0).Role }} {{ len .Messages }} {{ $done }} {{ print `\\n` \"\\u00e9\\\"\" }}"
        " {{ if . }}{{ or .System \"none\" }}{{ end }}",
        {
            "asked": "Why?%\tuser 1 false \\né\" none",
            "told": "Be brief.%\tWhy?%\tSo.%\tsystem 4 false \\né\" Be brief.",
            "begun": "Why?%\tBeca%\tuser 2 false \\né\" none",
            "odd": "A%\t1\n\n2%\t3%\tB%\tsystem 5 false \\né\" A\n\nB",
        },
    ),
}  # fmt: skip


def render(template: str, said: list, *, ask: bool = True, **given: object) -> str:
    """What Transformers would make of it."""
    return Jinja2ChatFormatter(template, EOS, BOS, add_generation_prompt=ask)(messages=said, **given).prompt


@pytest.mark.parametrize("name", CASES)
def test_a_template_renders_what_go_renders(name: str):
    go, expected = CASES[name]
    assert {key: render(to_jinja(go), said) for key, said in CONVERSATIONS.items()} == expected


@pytest.mark.parametrize(
    "name", ["the system prompt is kept for a question", "questions with their answers", "words of Go"]
)
def test_llama_cpp_renders_it_too(name: str, tmp_path: Path):
    """Its server has a Jinja of its own."""
    xllamacpp = pytest.importorskip("xllamacpp")
    go, expected = CASES[name]
    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(tmp_path / "tiny.gguf", saying("xyz"), template=to_jinja(go)))
    params.use_jinja, params.n_ctx, params.cpuparams.n_threads, params.port, params.verbosity = True, 64, 1, 0, -1
    server = xllamacpp.Server(params)
    for key in ("asked", "told", "odd"):
        body = json.dumps({"messages": CONVERSATIONS[key]}).encode()
        request = Request(f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            assert json.load(answer)["prompt"] == expected[key]


AFTER = {
    "a message at a time": "<|end|>\n",
    "the last is told apart": "<|end|>",
    "the system prompt goes last": "</s>",
    "the system prompt is kept for a question": "\n",
    "questions with their answers": "</a>\n",
    "an answer without its place": "",
    "an answer in a condition": "</a>.",
    "both forms": ";",
}
"""What is written after an answer where none is asked for."""


@pytest.mark.parametrize("name", AFTER)
def test_after_an_answer_nothing_is_asked(name: str):
    template = ChatTemplate(to_jinja(CASES[name][0]), BOS, EOS)
    before, answer, after = template.whole(CONVERSATIONS["begun"]).partition("Beca")
    assert (answer, after) == ("Beca", AFTER[name])
    assert before.startswith(template.prompt(CONVERSATIONS["asked"]))
    assert template.after_answer == AFTER[name].lstrip()


TOOLS = (
    "{{ if .Tools }}{{ range .Tools }}{{ .Function.Name }}({{ range $n, $p := .Function.Parameters.Properties }}"
    "{{ $n }}:{{ $p.Type }},{{ end }}) {{ end }}{{ json .Tools }}{{ end }}{{ range .Messages }}"
    "{{ if .ToolCalls }}{{ range .ToolCalls }}{{ .Function.Name }}{{ .Function.Arguments }}{{ end }}"
    '{{ else if eq .Role "tool" }}={{ .ToolName }} {{ .Content }}{{ else }}{{ .Content }}{{ end }}{{ end }}'
)


@pytest.mark.parametrize("arguments", [{"y": 1}, '{"y": 1}'], ids=["object", "text"])
def test_tools_and_their_calls_have_the_names_of_openai(arguments):
    properties = {"y": {"type": "integer", "description": ""}, "x": {"type": "string", "description": ""}}
    parameters = {"type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": parameters}}
    said = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    text = render(to_jinja(TOOLS), said, tools=[tool])
    head, _, rest = text.partition("[")
    assert head == "add(x:string,y:integer,) "
    assert rest.endswith(']1+1?add{"y": 1}=add 2=add 3')
    assert render(to_jinja(TOOLS), said[:1]) == "1+1?"


THOUGHTS = (
    "{{ range $i, $_ := .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}"
    "{{ end }}{{ if and $.IsThinkSet (not .Think) }}<think></think>{{ end }}"
)


def test_thoughts_are_asked_for_unless_told_otherwise():
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}]
    assert render(to_jinja(THOUGHTS), said) == "Q<think>hm</think>A"
    assert render(to_jinja(THOUGHTS), said[:1], enable_thinking=False) == "Q<think></think>"


@pytest.mark.parametrize(
    ("go", "bos", "expected"),
    [
        ("{{ .Prompt }}", "", "hi"),
        ("{{ .Prompt }}", BOS, "<s>hi"),
        ("<s>[{{ .Prompt }}]", BOS, "<s>[hi]"),
    ],
)
def test_the_token_that_begins_a_text_is_written_once(go: str, bos: str, expected: str):
    assert render(to_jinja(go, bos), messages((U, "hi"))) == expected


UNTRANSLATED = {
    "{{ .Prompt ": "an action in it does not close",
    "{{ }}": "an action in it is empty",
    "{{ if .Prompt }}": "its 'if' does not end",
    "{{ end }}": "it has 'end' without a beginning",
    '{{ .Prompt "a }}': "an action in it has",
    "{{/* }}": "a comment in it does not close",
    "{{ (.Prompt }}": "a parenthesis in it does not close",
    "{{ .Prompt | }}": "a pipeline in it has nothing before or after '|'",
    '{{ "\\xff" }}': "it writes bytes as",
    '{{ define "x" }}{{ end }}': "it uses 'define'",
    "{{ call .Prompt }}": "it calls 'call'",
    "{{ not }}": "it calls 'not' with 0 values",
    "{{ .Prompt .System }}": "it calls what is no function",
    "{{ .Weather }}": "it asks for .Weather",
    "{{ range .Messages }}{{ .Mood }}{{ end }}": "it asks for .Mood",
    "{{ $x }}": "it does not say what $x is",
    "{{ .Messages }}": "it writes out what is no text (messages)",
    "{{ . }}": "it writes out what is no text (root)",
    "{{ len .Prompt }}": "it counts the bytes of a text",
    "{{ slice .Prompt 1 }}": "it takes some bytes of a text",
    "{{ index .Prompt 1 }}": "it takes a byte of a text",
    '{{ printf "%q" .Prompt }}': "it prints in a form other than %s",
    "{{ print 1 2 }}": "it prints what is no text",
    "{{ range .Prompt }}{{ end }}": "it loops over .Prompt",
    '{{ $x := 1 }}{{ $x = "a" }}': "it makes something else of $x",
    "{{ $x := .Suffix }}": "it keeps .Suffix in $x",
    "{{ $x, $y := .Prompt }}": "it keeps .Prompt in $x",
    "{{ continue }}": "it has 'continue' outside of a loop",
    "{{ if .Prompt }}" * 200: "its blocks are nested too deeply",
    "{{ " + "(" * 200 + "1" + ")" * 200 + " }}": "its parentheses are nested too deeply",
    "{{ eq 1 " + "1" * 5000 + " }}": "an action in it has '111",
    '{{ "\\ud800" }}': "it has the broken string",
    "{{ if " + "(eq " * 30 + ".System" + " 1 2)" * 30 + " }}{{ end }}": "what it makes with 'eq' is too long",
    "{{ with print .System }}" + "{{ with print . . }}" * 30 + "{{ end }}" * 31: "makes with 'print' is too long",
    "a" * 100_000: "it has 100000 characters",
}


@pytest.mark.parametrize("go", UNTRANSLATED, ids=range(len(UNTRANSLATED)))
def test_what_cannot_be_translated_is_named(go: str):
    with pytest.raises(GoTemplateError) as caught:
        to_jinja(go)
    assert UNTRANSLATED[go] in str(caught.value)


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DEAF = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
EXAMPLES = tuple(messages((U, "1+1"), (A, "2")))


def rendered(told: Told, own: str | None, *said: tuple[str, str]) -> str:
    return render(chat_of(told, own).template, messages(*said))


@pytest.mark.parametrize("template", ["{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}", ""])
def test_a_system_prompt_is_there_until_another_is_given(template: str):
    told = Told(template, system="It's\n'\\so'")
    assert rendered(told, OWN, (U, "Q")) == "<system>It's\n'\\so'<user>Q"
    assert rendered(told, OWN, (S, "Other."), (U, "Q")) == "<system>Other.<user>Q"
    told = Told(template, system="Be brief.", examples=EXAMPLES)
    assert rendered(told, OWN, (U, "Q")) == "<system>Be brief.<user>1+1<assistant>2<user>Q"
    assert rendered(told, OWN, (S, "Other."), (U, "Q")) == "<user>1+1<assistant>2<system>Other.<user>Q"
    assert "says its system prompt and 2 first messages by itself" in chat_of(told, OWN).notes[-1]


def test_a_system_prompt_that_a_template_does_not_show_stays_behind():
    for told, own in ((Told(system="Be brief."), DEAF), (Told(system="x"), None), (Told("{{ .Prompt }}", "x"), OWN)):
        chat = chat_of(told, own)
        assert "has no place for its system prompt: left out" in chat.notes[-1]
        if told.template == "":
            assert chat.template == own
    chat = chat_of(Told("[{{ .Prompt }}]{{ .Response }}", "x", EXAMPLES), OWN)
    assert render(chat.template, messages((U, "Q"))) == "[1+1]2[Q]"
    assert [note.partition("system prompt")[2] for note in chat.notes[1:]] == [": left out", ""]
    assert takes_system(OWN)
    assert not takes_system(DEAF)
    assert not takes_system("{% broken")


def test_where_gos_template_cannot_be_translated_the_ggufs_own_is_taken():
    for own, words in ((OWN, "the mix has the GGUF's own"), (None, "the mix has none")):
        chat = chat_of(Told("{{ .Weather }}"), own)
        assert chat.template == own
        assert "cannot be translated from Go, it asks for .Weather" in chat.notes[0]
        assert words in chat.notes[0]
        assert words in chat_of(Told("{{ .Prompt }}", renderer="qwen9"), own).notes[0]
    assert chat_of(Told(), OWN) == Chat(OWN, ())


@pytest.mark.parametrize(
    "go",
    [
        "{{ if .System }}" * 99 + "{{ end }}" * 99,
        "{{ range $.Messages }}" * 30 + "{{ end }}" * 30,
        "{{ range .Messages }}" + "{{ if .Role }}{{ break }}{{ end }}" * 300 + "{{ end }}",
        "{{ .System" + " | print" * 250 + " }}",
    ],
    ids=["if", "range", "break", "print"],
)
def test_a_translation_that_no_jinja_compiles_is_not_taken(go: str):
    chat = chat_of(Told(go + "{{ .Prompt }}" * ("Messages" not in go)), OWN)
    assert chat.template == OWN
    assert "cannot be translated from Go, it is nested too deeply" in chat.notes[0]


def test_variables_of_one_name_stay_apart():
    loop = "{{ range .Messages }}{{ $x := .Content }}{{ $x5 := .Role }}{{ $x }}{{ $x5 }}{{ end }}"
    go = "{{ $x := .System }}" + loop + "{{ $x }}"
    assert render(to_jinja(go), messages((S, "sys"), (U, "Q"))) == "syssystemQusersys"


@pytest.mark.parametrize(
    ("own", "go", "expected"),
    [
        (OWN, "{{ .Prompt }}", False),
        (OWN + "{{ tools }}", "{{ .Prompt }}", True),
        ("<think></think>", "{{ .Prompt }}", True),
        ("{{ tools }}", "{{ .Messages }}{{ .Tools }}", False),
        ("{{ tools }}{{ tool_calls }}{{ tool_response }}", "{{ .Messages }}{{ .Tools }}", True),
        ("{{ tools }}<think></think>", "{{ .Tools }}{{ .ToolCalls }}tool_response", False),
    ],
)
def test_the_ggufs_own_template_is_taken_where_ollama_takes_it(own: str, go: str, expected: bool):
    assert prefers_own(own, go) is expected
