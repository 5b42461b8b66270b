"""Conversations and `moegguf chat`: at a terminal (a pseudo-terminal here), in pipes, and given bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.runtime.chat import Conversation, Turn, load, save
from moegguf.runtime.model import Model, RunOptions, open_model
from moegguf.runtime.sampling import Sampling
from moegguf.runtime.template import PLAIN, ChatTemplate, Message
from tiny_gguf import TEMPLATE, TURN, babbling, card, repeating, saying, write_gguf

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "moegguf", "chat"]
GREEDY = Sampling(temp=0)
MISTRAL_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@contextlib.contextmanager
def a_model(folder: Path, chain, ctx: int | None = None, **given) -> Iterator[Model]:
    with open_model(write_gguf(folder / "m.gguf", chain, **given), RunOptions(ctx=ctx, threads=1)) as model:
        yield model


# --- conversations ---


def test_characters_of_several_tokens_arrive_whole(tmp_path):
    with a_model(tmp_path, saying("é€ж😀!")) as model:
        conversation = Conversation(model, sampling=GREEDY)
        assert list(conversation.answer("hello")) == ["é", "€", "ж", "😀", "!"]
        assert conversation.turns == [Turn("hello", "é€ж😀!")]
        assert conversation.stats.generated_tokens == 12
        assert conversation.stats.end == "stop"


def test_a_character_that_is_cut_off_shows_as_replaced(tmp_path):
    with a_model(tmp_path, saying("a😀")) as model:
        conversation = Conversation(model, sampling=Sampling(temp=0, max_tokens=3))
        assert "".join(conversation.answer("hello")) == "a�"
        assert conversation.turns[0].answer == "a�"


def test_leading_blanks_are_not_part_of_an_answer(tmp_path):
    with a_model(tmp_path, saying(" \nok")) as model:
        assert list(Conversation(model, sampling=GREEDY).answer("hi")) == ["o", "k"]


def test_the_next_turn_sees_the_history_and_evaluates_only_what_is_new(tmp_path):
    with a_model(tmp_path, saying("xyz")) as model:
        conversation = Conversation(model, system="be brief", sampling=GREEDY)
        list(conversation.answer("one"))
        list(conversation.answer("two"))
        seen = bytes(t for t in model.llama.input_ids[: model.llama.n_tokens].tolist() if t < 256)
        assert seen == b"be briefonexyztwoxyz"
        assert (conversation.stats.cached_tokens, conversation.stats.prompt_tokens) == (17, 23)
        assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_ctrl_c_keeps_what_was_said(tmp_path):
    with a_model(tmp_path, repeating("ab")) as model:
        conversation = Conversation(model, sampling=GREEDY)
        pieces = conversation.answer("go on")
        with pytest.raises(KeyboardInterrupt), contextlib.closing(pieces):
            for count, _ in enumerate(pieces, 1):
                if count == 5:
                    raise KeyboardInterrupt
        assert conversation.turns == [Turn("go on", "ababa")]
        assert conversation.stats.end == "interrupted"
        following = conversation.answer("and now")
        assert [next(following) for _ in range(3)] == ["a", "b", "a"]
        following.close()
        assert len(conversation.turns) == 2


def test_an_answer_that_never_began_leaves_no_trace(tmp_path):
    with a_model(tmp_path, saying("a")) as model:
        conversation = Conversation(model, sampling=GREEDY)
        conversation.answer("hello").close()
        assert conversation.turns == []


def test_the_oldest_turns_are_hidden_when_the_context_is_full_and_the_system_text_stays(tmp_path):
    with a_model(tmp_path, saying("ok"), ctx=256) as model:
        conversation = Conversation(model, system="SYSTEM", sampling=GREEDY)
        for number in range(8):
            list(conversation.answer(f"question {number} " + "." * 30))
        assert conversation.stats.turns_hidden > 0
        assert len(conversation.turns) == 8
        seen = bytes(t for t in model.llama.input_ids[: model.llama.n_tokens].tolist() if t < 256)
        assert seen.startswith(b"SYSTEMquestion")
        assert b"question 7" in seen and b"question 0" not in seen
        assert conversation.stats.ctx_used <= 256


def test_a_prompt_longer_than_the_context_is_refused_and_changes_nothing(tmp_path):
    with a_model(tmp_path, saying("ok"), ctx=256) as model:
        conversation = Conversation(model, sampling=GREEDY)
        list(conversation.answer("short"))
        with pytest.raises(UserError, match="402 tokens long, the context holds 256"):
            conversation.answer("x" * 400)
        assert len(conversation.turns) == 1
        list(conversation.answer("short again"))
        assert conversation.stats.turns_hidden == 0


def test_an_answer_ends_where_the_context_or_max_tokens_does(tmp_path):
    with a_model(tmp_path, repeating("ab"), ctx=256) as model:
        conversation = Conversation(model, sampling=GREEDY)
        list(conversation.answer("hello"))
        assert (conversation.stats.ctx_used, conversation.stats.end) == (256, "context")
        conversation.sampling = Sampling(temp=0, max_tokens=5)
        assert "".join(conversation.answer("hello")) == "ababa"
        assert conversation.stats.end == "length"


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(tmp_path, text):
    with a_model(tmp_path, saying("a")) as model, pytest.raises(UserError, match="prompt is empty"):
        Conversation(model).answer(text)


def test_the_token_that_a_template_writes_after_an_answer_ends_it(tmp_path):
    template = TEMPLATE.replace("<|end|>", "<|turn|>")
    with a_model(tmp_path, saying("xyz", end=TURN), template=template) as model:
        assert not model.vocab.ends_answer(TURN)
        conversation = Conversation(model, sampling=GREEDY)
        assert "".join(conversation.answer("hi")) == "xyz"
        assert (conversation.stats.end, conversation.stats.generated_tokens) == ("stop", 3)


def test_a_file_without_a_template_continues_the_text(tmp_path):
    with a_model(tmp_path, repeating("ab"), template=None) as model:
        conversation = Conversation(model, sampling=Sampling(temp=0, max_tokens=4))
        assert not conversation.has_template
        assert "".join(conversation.answer("start with a")) == "baba"


# --- templates ---


def talk(*contents: str, system: str = "") -> list[Message]:
    """Messages of user and assistant in turn, after a system message where one is given."""
    spoken = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ undefined.name }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate(source, "", "").prompt(talk("hello"))


def test_templates_may_use_what_transformers_gives_them():
    source = (
        "{% for m in messages %}{% if loop.first %}{{ strftime_now('%Y')|length }}{% endif %}{{ m | tojson }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endif %}"
        "{% endfor %}{% if tools is none %}!{% endif %}"
    )
    text = ChatTemplate(source, "", "").prompt(talk("é", "b", "c"))
    assert text.startswith('4{"role": "user", "content": "é"}') and text.endswith("!")


def test_a_system_text_goes_into_the_first_question_where_a_template_takes_none():
    refusing = ChatTemplate(MISTRAL_LIKE, "<s>", "</s>")
    assert not refusing.takes_system
    assert (
        refusing.prompt(talk("a", "b", "c", system="be kind")) == "<s>[INST] be kind\n\na [/INST]b</s>[INST] c [/INST]"
    )
    ignoring = ChatTemplate("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "", "")
    assert ignoring.prompt(talk("hello", system="be kind")) == "be kind\n\nhello"
    assert (
        ChatTemplate(TEMPLATE, "", "").prompt(talk("hi", system="be kind"))
        == "<|system|>be kind<|user|>hi<|assistant|>"
    )
    assert ChatTemplate(PLAIN, "", "").prompt(talk("a", "b", "c", system="be kind")) == "be kind\na\nb\nc"


def test_what_follows_an_answer_is_read_from_the_template():
    assert ChatTemplate(TEMPLATE, "", "").after_answer == "<|end|>"
    assert ChatTemplate(MISTRAL_LIKE, "<s>", "</s>").after_answer == "</s>"
    assert ChatTemplate(MISTRAL_LIKE, "<s>", " </s>").after_answer == "</s>"
    assert ChatTemplate("{{ raise_exception('no') }}", "", "").after_answer == ""


# --- files ---


def test_a_saved_conversation_loads_as_it_was(tmp_path):
    path = tmp_path / "talk.json"
    with a_model(tmp_path, saying("né")) as model:
        conversation = Conversation(model, system="sys", sampling=Sampling(temp=0, seed=3))
        list(conversation.answer("hello"))
        save(conversation, path)
        other = Conversation(model)
        load(other, path)
    assert (other.turns, other.system, other.sampling) == (conversation.turns, "sys", conversation.sampling)
    assert json.loads(path.read_text())["model"] == "m.gguf"


def test_saving_leaves_the_old_file_when_it_cannot_write_the_new_one(tmp_path):
    with a_model(tmp_path, saying("a")) as model:
        conversation = Conversation(model)
        model_bytes = (tmp_path / "m.gguf").read_bytes()
        for wrong in ("m.gguf", "talk", "missing/talk.json"):
            with pytest.raises(UserError):
                save(conversation, tmp_path / wrong)
        assert (tmp_path / "m.gguf").read_bytes() == model_bytes
        save(conversation, tmp_path / "talk.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "talk.md"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"settings": {}, "messages": [1]}',
        '{"settings": {"temp": -1}, "messages": []}',
        '{"settings": {}, "messages": [{"role": "assistant", "content": "a"}]}',
        '{"settings": {}, "messages": [{"role": "user", "content": "a"}]}',
        '{"settings": {}, "messages": [{"role": "system", "content": "\\ud800"}]}',
    ],
)
def test_a_file_that_is_no_saved_conversation_changes_nothing(tmp_path, text):
    path = tmp_path / "talk.json"
    path.write_text(text)
    with a_model(tmp_path, saying("a")) as model:
        conversation = Conversation(model, system="sys", sampling=GREEDY)
        list(conversation.answer("hello"))
        with pytest.raises(UserError):
            load(conversation, path)
        assert (conversation.turns, conversation.system) == ([Turn("hello", "a")], "sys")


# --- the command, in a pipe ---


def chat(path: Path, *arguments: str) -> int:
    return main(["chat", str(path), "--threads", "1", *arguments])


def test_one_prompt_gives_the_answer_and_nothing_else_on_stdout(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", saying("é€!"))
    assert chat(path, "--prompt", "hello", "--temp", "0", "--stats") == 0
    out, err = capfd.readouterr()
    assert out == "é€!\n"
    assert "prompt      7 tokens" in err and "answer      6 tokens" in err


def test_the_same_seed_gives_the_same_answer(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", babbling())

    def answer(seed: int) -> str:
        assert chat(path, "-p", "hi", "--seed", str(seed), "--temp", "1", "--max-tokens", "40") == 0
        return capfd.readouterr().out

    assert answer(5) == answer(5) != answer(6)


def test_settings_in_the_file_hold_unless_a_flag_says_otherwise(tmp_path, capfd):
    from gguf import GGUFValue, GGUFValueType

    greedy = {"general.sampling.temp": GGUFValue(0.0, GGUFValueType.FLOAT32)}
    path = write_gguf(tmp_path / "m.gguf", babbling(), extra=greedy)

    def answers(*flags: str) -> set[str]:
        said = set()
        for _ in range(3):
            assert chat(path, "-p", "hi", "--max-tokens", "30", *flags) == 0
            said.add(capfd.readouterr().out)
        return said

    assert len(answers()) == 1
    assert len(answers("--temp", "1")) == 3


@pytest.mark.parametrize("flag", [["--prompt", "-"], []])
def test_a_pipe_is_a_prompt(tmp_path, capfd, monkeypatch, flag):
    path = write_gguf(tmp_path / "m.gguf", saying("ok"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("schöne\nFrage".encode()), encoding="utf-8"))
    assert chat(path, *flag, "--temp", "0") == 0
    assert capfd.readouterr().out == "ok\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "\udcff"], "not valid UTF-8"),
        (["--prompt", "hi", "--temp", "hot"], "temp is 'hot'"),
        (["--prompt", "hi", "--top-p", "2"], "top_p is '2'"),
        (["--prompt", "hi", "--ctx", "0"], "--ctx 0: expected a whole number from 16"),
        (["--prompt", "hi", "--threads", "99999"], "--threads 99999: expected a whole number from 1 to 512"),
        (["--prompt", "hi", "--seed", "-1"], "seed is '-1'"),
        (["--prompt", "hi", "--gpu-layers", "some"], "--gpu-layers some: expected"),
        (["--prompt", "hi", "--experts-used", "1"], "gate-less mix runs all its 2 experts"),
        (["--prompt", "x" * 300], "the context holds 256"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path, capfd, flags, says):
    path = write_gguf(tmp_path / "m.gguf", saying("a"), card=card(router="gateless", k=2, names=("a", "b")))
    assert chat(path, *flags) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("moegguf: error: ") and err.count("\n") == 1 and says in err


def test_a_hostile_template_is_one_line_and_exit_code_2(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", saying("a"), template="{{ ''.__class__.__mro__ }}")
    assert chat(path, "--prompt", "hi") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "SecurityError" in err


def test_a_damaged_file_is_one_line_and_exit_code_2(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    path.write_bytes(path.read_bytes()[:-7])
    assert chat(path, "--prompt", "hi") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "corrupt or truncated" in err


def test_an_empty_pipe_is_an_empty_prompt(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    done = subprocess.run([*COMMAND, path, "--threads", "1"], input="", capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the prompt is empty (stdin)" in done.stderr


def test_gpu_layers_without_a_gpu_are_a_notice(tmp_path, capfd):
    from moegguf.runtime.machine import has_gpu

    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    assert chat(path, "--prompt", "hi", "--gpu-layers", "all") == 0
    assert ("sees no GPU" in capfd.readouterr().err) is not has_gpu()


def test_a_reader_that_leaves_early_ends_it_quietly(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", repeating("ab"), ctx=4096)
    script = f'set -o pipefail; "$@" --prompt hi --temp 0 2> {tmp_path}/err | head -c 10'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, path, "--threads", "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "ababababab"
    assert (tmp_path / "err").read_text() == ""


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", saying("a"))
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [*COMMAND, path, "--threads", "1"], input=b"\xff\xfe", capture_output=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 2
    assert b"not valid UTF-8" in done.stderr


# --- the command, at a terminal ---

pty = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")


class Terminal:
    """`moegguf chat` with a pseudo-terminal around it."""

    def __init__(self, *arguments: str | Path) -> None:
        import fcntl
        import termios

        self.keyboard, theirs = os.openpty()
        self._seen = ""
        self._process = subprocess.Popen(
            [*COMMAND, "--threads", "1", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200", "PYTHONUTF8": "1"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C typed here is a SIGINT there
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def until(self, text: str, *, pressing: str = "") -> str:
        """What has been written up to and including `text`, `pressing` a key each second that nothing comes.

        (Python overlooks a ^C that comes just before it waits for readline's first key.)
        """
        deadline = time.monotonic() + 60
        while text not in self._seen:
            ready, _, _ = select.select([self.keyboard], [], [], 1)
            if ready:
                self._seen += self._read()
            else:
                self.type(pressing)
            assert time.monotonic() < deadline, f"{text!r} never came; so far: {self._seen!r}"
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def leave(self) -> int:
        """Ctrl-D, and the exit code."""
        self.type("\x04")
        return self.exit_code()

    def exit_code(self) -> int:
        while self._read():
            pass
        return self._process.wait(timeout=30)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self.keyboard)

    def _read(self) -> str:
        try:
            return os.read(self.keyboard, 65536).decode("utf-8", errors="replace")
        except OSError:  # Linux's way to say that the other end is closed
            return ""


@pytest.fixture
def terminal():
    with contextlib.ExitStack() as stack:

        def start(*arguments) -> Terminal:
            opened = Terminal(*arguments)
            stack.callback(opened.close)
            return opened

        yield start


@pty
def test_a_session_at_the_terminal(tmp_path, terminal):
    mix = card(router="gateless", k=2, names=("math", "code"))
    path = write_gguf(tmp_path / "m.gguf", saying("né\x1b!"), card=mix)
    talk = terminal(path, "--temp", "0")
    header = talk.until("> ")
    assert "tiny: 2 experts (math, code) on hf:org/base" in header
    assert "router gateless, layout mixtral, context 256 tokens" in header

    talk.type("hello\n")
    answer = talk.until("tok/s")
    assert "né!" in answer, "a model's escape codes must not reach the terminal"
    assert "context 12/256" in talk.until("> ")
    talk.type("/system be kind\n")
    talk.until("system: be kind")
    talk.type("/set top_k 5\n")
    assert "5" in talk.until("min_p").split("top_k", 2)[2]
    talk.type("/set temp hot\n")
    talk.until("temp is 'hot'")
    talk.type("/nonsense\n")
    talk.until("there is no command /nonsense")
    os.write(talk.keyboard, b"/\xff\n")
    talk.until("there is no command /")
    talk.type("/stats\n")
    talk.until("answer      5 tokens")
    talk.type("one \\\ntwo\n")
    talk.until("tok/s")
    talk.type('"""\n/three\nfour\n"""\n')
    talk.until("tok/s")
    talk.type(f"/save {tmp_path}/talk.json\n")
    talk.until("saved 3 turns")
    talk.type(f"/save {tmp_path}/talk.json\n")
    talk.until("saved 3 turns")
    (tmp_path / "other.md").write_text("of another")
    talk.type(f"/save {tmp_path}/other.md\n")
    talk.until("other.md: exists already")
    talk.type("/reset\n")
    talk.until("forgotten")
    talk.type(f"/load {tmp_path}/talk.json\n")
    talk.until("loaded 3 turns")
    talk.type("/help\n")
    listed = talk.until("several lines")
    assert "/set [NAME VALUE]" in listed and "/save FILE" in listed
    talk.type("/exit\n")
    assert talk.exit_code() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == ["hello", "one \ntwo", "/three\nfour"]
    assert saved["messages"][0] == {"role": "system", "content": "be kind"}


@pty
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path, terminal):
    talk = terminal(write_gguf(tmp_path / "m.gguf", repeating("ab"), ctx=30_000), "--ctx", "30000", "--temp", "0")
    assert "not a mix: running it as a plain model" in talk.until("> ")
    talk.type("go\n")
    talk.until("abababab")
    talk.type("\x03")
    talk.until("stopped; what was said stays in the history")
    talk.until("> ")
    talk.type("\x03")
    talk.until("Ctrl-D leaves", pressing="\x03")
    talk.until("> ")
    assert talk.leave() == 0


@pty
def test_a_file_without_a_template_says_so(tmp_path, terminal):
    talk = terminal(write_gguf(tmp_path / "m.gguf", saying("a"), template=None))
    assert "no chat template in this file" in talk.until("> ")
    assert talk.leave() == 0
