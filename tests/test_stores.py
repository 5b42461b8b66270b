"""Models of Ollama and LM Studio as sources: stores of theirs, written by hand, with real models in them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType

from conftest import build_dense, build_report, make_recipe, read_metadata, read_tensors, rewrite
from moegguf.assembly import plan_build
from moegguf.cli import main
from moegguf.errors import UserError
from moegguf.gguf_header import read_header
from moegguf.metadata import read_card
from moegguf.runtime.template import ChatTemplate, template_of
from moegguf.runtime.vocab import open_vocab
from moegguf.sources import blob, open_source
from moegguf.stores import stores

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
PARAMETERS = {"temperature": 0.25, "top_k": 7, "repeat_penalty": 1.5, "stop": ["<|end|>"], "num_ctx": 512}


@pytest.fixture(scope="module")
def dense(family, tmp_path_factory) -> tuple[Path, Path]:
    """A base and an expert as GGUF files."""
    folder, models = tmp_path_factory.mktemp("dense"), family("tied")
    return build_dense(folder / "base.gguf", models.base), build_dense(folder / "expert.gguf", models.experts[0])


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home of its own, and no variable that points elsewhere."""
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path / "home"


@functools.cache
def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class OllamaStore:
    """A store in Ollama's form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)

    def blob(self, content: bytes | Path) -> tuple[str, int]:
        """Store bytes, or a link to a file; returns digest and size."""
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_digest(content)
        path = self.folder / "blobs" / f"sha256-{digest}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif not path.exists():
            os.link(content, path)
        return f"sha256:{digest}", path.stat().st_size

    def manifest(self, name: str) -> Path:
        """The manifest of HOST/NAMESPACE/NAME/TAG."""
        return self.folder / "manifests" / name

    def add(self, name: str, **layers: bytes | Path) -> Path:
        """Write a model with one layer of each kind; returns its manifest."""
        path = self.manifest(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries, config = [], {}
        for kind, content in layers.items():
            digest, size = self.blob(content)
            if kind == "config":
                config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": size}
            else:
                entries.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": size})
        path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": entries}))
        return path

    def blob_of(self, name: str, kind: str) -> Path:
        manifest = json.loads(self.manifest(name).read_text())
        layers = [{**manifest["config"], "mediaType": ".config"}, *manifest["layers"]]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"].endswith(f".{kind}"))
        return self.folder / "blobs" / digest.replace(":", "-")


BASE, EXPERT = "registry.ollama.ai/library/tiny/latest", "registry.ollama.ai/me/tiny-sums/v2"


@pytest.fixture
def store(home: Path, dense) -> OllamaStore:
    """`tiny`, with all that Ollama keeps beside a model, and `me/tiny-sums:v2`, with nothing."""
    store = OllamaStore(home / ".ollama" / "models")
    store.add(
        BASE, model=dense[0], template=b"{{ .Prompt }}", params=json.dumps(PARAMETERS).encode(),
        system=b"Be brief.", license=APACHE.encode(), config=b'{"model_family": "llama"}',
    )  # fmt: skip
    store.add(EXPERT, model=dense[1])
    return store


def fault(ref: str) -> str:
    with pytest.raises(UserError) as caught:
        open_source(ref)
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stores_are_counted_where_their_owners_keep_them(home: Path, tmp_path: Path, monkeypatch):
    for name in ("models--org--a", "models--org--b", "datasets--org--c"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    OllamaStore(tmp_path / "ollama").add(BASE, model=b"")
    model = home / ".lmstudio/models/org/name/model.gguf"
    model.parent.mkdir(parents=True)
    model.touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    found = {store.name: store.models for store in stores()}
    assert found == {"Hugging Face cache": 2, "Ollama": 1, "LM Studio": 1}


# ------------------------------------------------------------------------------------------------- Ollama


def test_models_of_ollama_mix_as_the_files_that_they_are(store: OllamaStore, dense, tmp_path: Path):
    built = build_report(tmp_path / "a.gguf", "ollama:tiny", [{"source": "ollama:me/tiny-sums:v2"}])
    plain = build_report(tmp_path / "b.gguf", dense[0], [dense[1]])
    assert read_tensors(built.plan.path) == read_tensors(plain.plan.path)
    assert read_metadata(built.plan.path, "llama.", "tokenizer.ggml.") == read_metadata(
        plain.plan.path, "llama.", "tokenizer.ggml."
    )
    card = read_card(read_header(built.plan.path))
    id = hashlib.sha256(store.manifest(BASE).read_bytes()).hexdigest()[:12]
    assert (card.base, card.base_licence) == (f"ollama:tiny:latest@{id}", "apache-2.0")
    assert card.experts[0].source.startswith("ollama:me/tiny-sums:v2@")
    assert card.experts[0].licence == ""


def test_parameters_go_where_gguf_has_keys_for_them_and_the_rest_is_told(store: OllamaStore):
    source = open_source("ollama:tiny")
    sampling = {key: value.value for key, value in source.metadata.items() if key.startswith("general.sampling.")}
    prefix = "general.sampling."
    assert sampling == {f"{prefix}temp": 0.25, f"{prefix}top_k": 7, f"{prefix}penalty_repeat": 1.5}
    assert [note for note in source.notes if "stop, num_ctx" in note] == [source.notes[-1]]


CHATML = (
    b"{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n"
    b"{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
ASKED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_mix_is_talked_to_as_ollama_talks_to_its_base(adds_bos: bool, store: OllamaStore, dense, tmp_path: Path):
    """Ollama renders its template with its system prompt, and the tokenizer adds what begins a text."""
    keys = {"tokenizer.ggml.add_bos_token": GGUFValue(adds_bos, GGUFValueType.BOOL)}
    store.add(BASE, model=rewrite(dense[0], tmp_path / "b.gguf", keys=keys), template=CHATML, system=b"Be brief.")
    path = build_report(tmp_path / "mix.gguf", "ollama:tiny", [{"source": "ollama:me/tiny-sums:v2"}]).plan.path
    vocab = open_vocab(path)
    template = template_of(read_header(path), vocab)
    text = template.prompt([{"role": "user", "content": "Why?"}])
    assert vocab.tokenize_prompt(text) == [vocab.bos] * adds_bos + vocab.tokenize(ASKED)
    assert text == vocab.name(vocab.bos) * adds_bos + ASKED  # for Transformers, which adds nothing to it
    assert template.after_answer == "<|im_end|>\n"


@pytest.mark.parametrize("own", ["{{ messages[-1].content }}", None])
@pytest.mark.parametrize(
    ("layers", "is_own", "note"),
    [
        ({"template": b"{{ .Prompt }}"}, False, "the chat template is Ollama's, translated from Go"),
        ({"prompt": b"{{ .Prompt }}"}, False, "the chat template is Ollama's, translated from Go"),
        ({"template": b"{{ .Weather }}"}, True, "it asks for .Weather: the mix has"),
        ({"template": b"{{ .Prompt }}", "config": b'{"renderer": "qwen9"}'}, True, "by a program, qwen9, and not"),
        ({"config": b'{"model_family": "llama"}'}, True, ""),
    ],
)
def test_the_chat_template_is_ollamas_where_it_has_one(
    own: str | None, layers: dict, is_own: bool, note: str, store: OllamaStore, dense, tmp_path: Path
):
    keys = {"tokenizer.chat_template": GGUFValue(own, GGUFValueType.STRING)} if own else {}
    file = rewrite(dense[0], tmp_path / "t.gguf", keys=keys, keep=lambda key: key != "tokenizer.chat_template")
    store.add(BASE, model=file, **layers)
    source = open_source("ollama:tiny")
    found = source.read_vocab().get("tokenizer.chat_template")
    assert (found.value if found else None) == own if is_own else "namespace" in found.value
    assert note in "".join(source.notes)
    assert bool(source.notes) is bool(note)


def test_messages_that_a_model_begins_with_begin_every_conversation(store: OllamaStore, dense):
    first = json.dumps([{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]).encode()
    store.add(BASE, model=dense[0], template=b"[{{ .Prompt }}]{{ .Response }}", messages=first)
    source = open_source("ollama:tiny")
    template = ChatTemplate(source.read_vocab()["tokenizer.chat_template"].value, "", "")
    assert template.prompt([{"role": "user", "content": "2+2"}]) == "[1+1]2[2+2]"
    assert "says its 2 first messages by itself" in source.notes[1]


def test_a_build_says_what_is_taken_from_ollama_and_what_is_not(store: OllamaStore, capsys):
    assert main(["build", "--base", "ollama:tiny", "--expert", "a=ollama:tiny", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "translated from Go" in said
    assert "no place for its system prompt: left out" in said  # the template has no .System
    assert "stop, num_ctx: they are not taken along" in said


NAMES = {
    "tiny": BASE,
    "tiny:latest": BASE,
    "library/tiny": BASE,
    "registry.ollama.ai/library/tiny:latest": BASE,
    "me/tiny-sums:v2": EXPERT,
    "hf.co/org/Tiny.GGUF:Q4_K_M": "hf.co/org/Tiny.GGUF/Q4_K_M",
    "localhost:5000/org/tiny": "localhost:5000/org/tiny/latest",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_means_to_ollama(name: str, store: OllamaStore, dense):
    if not store.manifest(NAMES[name]).exists():
        store.add(NAMES[name], model=dense[0])
    assert open_source(f"ollama:{name}").tensors.keys() == open_source(str(dense[0])).tensors.keys()


@pytest.mark.parametrize("name", ["", "../../etc", "a/b/c/d", "a b", "tiny:../../x", ".hidden", "a//b"])
def test_a_name_never_leads_out_of_the_store(name: str, store: OllamaStore):
    assert "is no name of an Ollama model" in fault(f"ollama:{name}")


def test_a_reference_with_an_id_means_that_version_or_none(store: OllamaStore):
    label = open_source("ollama:tiny").label
    assert open_source(label).label == label
    other = label[:-1] + ("0" if label[-1] != "0" else "1")
    assert f"has version {label[-12:]} of it" in fault(other)


def test_a_store_is_where_ollama_would_look(store: OllamaStore, home: Path, tmp_path: Path, monkeypatch):
    moved = tmp_path / "elsewhere"
    shutil.move(store.folder, moved)
    assert "there is no Ollama store in" in fault("ollama:tiny")
    monkeypatch.setenv("OLLAMA_MODELS", str(moved))
    assert open_source("ollama:tiny").files[0].parent == moved / "blobs"


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("ollama:tiny:v9", "has no tiny:v9, but tiny:latest; name one of these"),
        ("ollama:tiny-sum", "tiny:latest"),
        ("ollama:me/tinysums:v2", "me/tiny-sums:v2"),
        ("ollama:something-else-entirely", "but 2 others; run `ollama pull something-else-entirely:latest`"),
    ],
)
def test_a_model_that_is_not_there_is_answered_with_those_that_are(ref: str, expected: str, store: OllamaStore):
    assert expected in fault(ref)


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.unlink()  # it may be a link
    path.write_bytes(change(content))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "no json": (lambda store: spoil(store.manifest(BASE), lambda text: text[:50]), "malformed manifest: no JSON"),
    "no object": (lambda store: store.manifest(BASE).write_text("[]"), "malformed manifest: it has no list of layers"),
    "no layers": (lambda store: store.manifest(BASE).write_text("{}"), "it has no list of layers"),
    "bad digest": (
        lambda store: spoil(store.manifest(BASE), lambda text: text.replace(b"sha256:", b"sha256:../", 1)),
        "expected mediaType, a sha256 digest and size",
    ),
    "bad size": (
        lambda store: store.manifest(BASE).write_text(
            json.dumps({"layers": [{"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": "9"}]})
        ),
        "layers[0] is {",
    ),
    "missing weights": (lambda store: store.blob_of(BASE, "model").unlink(), "the blob of its model, is missing"),
    "missing text": (lambda store: store.blob_of(BASE, "params").unlink(), "the blob of its params, is missing"),
    "short weights": (lambda store: spoil(store.blob_of(BASE, "model"), lambda b: b[:-9]), "bytes, expected"),
    "changed text": (
        lambda store: spoil(store.blob_of(BASE, "system"), lambda b: b.replace(b"brief", b"quick")),
        "does not have the digest in its name",
    ),
    "bad parameters": (
        lambda store: store.add(BASE, params=b"[1]", model=store.blob_of(EXPERT, "model")),
        "its parameters are no JSON object",
    ),
    "parameter of another type": (
        lambda store: store.add(BASE, params=b'{"top_k": "many"}', model=store.blob_of(EXPERT, "model")),
        "its parameter top_k is 'many', expected a number",
    ),
    "changed configuration": (
        lambda store: spoil(store.blob_of(BASE, "config"), lambda b: b.replace(b"llama", b"gemma")),
        "(config) does not have the digest in its name",
    ),
    "bad configuration": (
        lambda store: store.add(BASE, model=store.blob_of(EXPERT, "model"), config=b"[]"),
        "its configuration is no JSON object",
    ),
    "bad messages": (
        lambda store: store.add(BASE, model=store.blob_of(EXPERT, "model"), messages=b'[{"role": "user"}]'),
        "its messages are no JSON list of texts with roles",
    ),
    "half a character": (
        lambda store: store.add(
            BASE, model=store.blob_of(EXPERT, "model"), messages=rb'[{"role": "user", "content": "\ud800"}]'
        ),
        "its messages are no JSON list of texts with roles",
    ),
    "endless manifest": (lambda store: pipe(store.manifest(BASE)), "latest: cannot be read (no regular file)"),
    "endless text": (lambda store: pipe(store.blob_of(BASE, "system")), "cannot be read (no regular file)"),
    "adapter": (lambda store: store.add(BASE, model=b"", adapter=b"x"), "has a layer of kind adapter"),
    "no weights": (lambda store: store.add(BASE, template=b"x"), "has 0 files of weights, expected one GGUF"),
    "no gguf": (lambda store: store.add(BASE, model=b"x" * 99), "not a GGUF file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_refused_in_one_line(kind: str, store: OllamaStore):
    damage, expected = DAMAGE[kind]
    damage(store)
    message = fault("ollama:tiny")
    assert expected in message
    others = ("adapter", "no weights", "no gguf", "endless manifest", "endless text")
    assert "`ollama pull tiny:latest`" in message or kind in others


def test_weights_are_verified_before_a_build_writes_and_not_before(store: OllamaStore, tmp_path: Path):
    blob = store.blob_of(EXPERT, "model")
    spoil(blob, lambda content: content[:-4] + b"\0\0\0\1")
    recipe = make_recipe(tmp_path / "mix.gguf", "ollama:tiny", [{"source": "ollama:me/tiny-sums:v2"}] * 2)
    plan = plan_build(recipe)
    assert [file.path for file in plan.to_verify] == [store.blob_of(BASE, "model"), blob]
    with pytest.raises(UserError, match=f"{blob.name}: its SHA-256 is .* the file is damaged"):
        build_report(tmp_path / "mix.gguf", "ollama:tiny", [{"source": "ollama:me/tiny-sums:v2"}])
    assert not (tmp_path / "mix.gguf").exists()


def test_a_file_is_read_once_for_its_digest_and_again_when_it_changed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(blob, "_CHUNK_BYTES", 4)
    path, heard = tmp_path / "x", []

    def digest_is_right() -> bool:
        os.utime(path, (0, 0))
        return blob.sha256_of(path, heard.append) == hashlib.sha256(path.read_bytes()).hexdigest()

    path.write_bytes(b"before")
    os.utime(path, (0, 0))
    assert [blob.sha256_of(path, heard.append) for _ in range(2)] == [hashlib.sha256(b"before").hexdigest()] * 2
    assert heard == [4, 2, 6]  # in pieces, then all that is known already
    path.write_bytes(b"behind")
    assert digest_is_right()
    path.write_bytes(b"longer than before")
    assert digest_is_right()
    path.unlink()
    path.write_bytes(b"before")
    assert digest_is_right()


def test_progress_hears_every_byte_that_is_verified_and_written(store: OllamaStore, tmp_path: Path):
    from moegguf.assembly import build

    plan = plan_build(make_recipe(tmp_path / "mix.gguf", "ollama:tiny", [{"source": "ollama:tiny"}]))
    heard: list[int] = []
    build(plan, threads=1, progress=heard.append)
    assert sum(heard) == plan.n_bytes_to_do > store.blob_of(BASE, "model").stat().st_size


# ---------------------------------------------------------------------------------------------- LM Studio


@pytest.fixture
def studio(home: Path, dense) -> Path:
    """A models folder of LM Studio: org/tiny, one file and a projector, and org/two, with two."""
    models = home / ".lmstudio" / "models"
    for name in ("org/tiny/tiny.gguf", "org/two/a.gguf", "org/two/b.gguf"):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(dense[0], models / name)
    (models / "org/tiny/mmproj-tiny.gguf").write_bytes(b"vision")
    return models


@pytest.mark.parametrize("ref", ["org/tiny", "org/tiny/tiny", "org/tiny/tiny.gguf"])
def test_a_model_of_lm_studio_is_its_file(ref: str, studio: Path):
    source = open_source(f"lmstudio:{ref}")
    assert source.label == "lmstudio:org/tiny/tiny.gguf"
    assert source.files == (studio / "org/tiny/tiny.gguf",)
    assert open_source(source.label).label == source.label


def test_shards_are_one_model(studio: Path, dense):
    (studio / "org/tiny/tiny.gguf").unlink()
    rewrite(dense[0], studio / "org/tiny/tiny.gguf", split_max_tensors=5)
    source = open_source("lmstudio:org/tiny")
    assert source.tensors.keys() == open_source(str(dense[0])).tensors.keys()


SETTINGS = {
    "pointer": (".lmstudio-home-pointer", "{home}/moved\n", "moved/models"),
    "settings": (".lmstudio/settings.json", '{{"downloadsFolder": "{home}/chosen"}}', "chosen"),
    "old place": (".cache/lm-studio/x", "", ".cache/lm-studio/models"),
    "broken settings": (".lmstudio/settings.json", "not json", ".lmstudio/models"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_models_folder_is_the_one_of_its_settings(kind: str, studio: Path, home: Path):
    file, content, folder = SETTINGS[kind]
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    (home / file).write_text(content.format(home=home.as_posix()))
    if home / folder != studio:
        (home / folder).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(studio, home / folder)
    assert open_source("lmstudio:org/tiny").files == (home / folder / "org/tiny/tiny.gguf",)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("org", "'org' is no name of a model in LM Studio"),
        ("../../etc/passwd", "is no name of a model in LM Studio"),
        ("org/two", "expected one GGUF in {studio}/org/two, found 2: a, b"),
        ("org/two/c", "has no c.gguf; its models are: a, b"),
        ("org/tyni", "there is no org/tyni in {studio}, but org/tiny"),
        ("nobody/anything-at-all", "there is no nobody/anything-at-all in {studio}; download it"),
    ],
)
def test_a_model_that_is_not_in_lm_studio_is_told_in_one_line(ref: str, expected: str, studio: Path):
    assert expected.format(studio=studio) in fault(f"lmstudio:{ref}")


def test_no_lm_studio_at_all_is_told_with_the_places(home: Path):
    assert f"LM Studio has no models folder here (looked for {home}/.lmstudio/models" in fault("lmstudio:org/tiny")
