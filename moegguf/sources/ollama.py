"""A model of the local Ollama store as a Source: `ollama:[HOST/][NAMESPACE/]NAME[:TAG][@ID]`.

The store is manifests, `manifests/HOST/NAMESPACE/NAME/TAG`, and blobs, `blobs/sha256-HEX`. A manifest lists layers: the
weights (a GGUF file), and beside them what Ollama keeps outside of it: chat template, parameters, system prompt and
licence.

Everything that is small is read and checked by its digest now; of the weights the size is, and their digest when a
build is about to read them anyway. Parameters become the `general.sampling.*` keys that GGUF has for them; template,
system prompt and first messages become the chat template (`ollama_chat`). What becomes of them, and what stays behind,
is told in `Source.notes`. ID is what `ollama list` shows, the first digits of the manifest's digest: a mix records it,
and with it a reference means that version or none.

Nothing is pulled, and nothing in the store is ever written. Source of the format: ollama, manifest/*.go,
types/model/name.go and server/images.go.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from gguf import GGUFValue, GGUFValueType, Keys

from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.licences import recognise
from moegguf.sources.gguf_file import open_gguf
from moegguf.sources.ollama_chat import Chat, Message, Told, chat_of
from moegguf.stores import is_folder, ollama_folders
from moegguf.tensor import Expected, Metadata, Source
from moegguf.texts import is_unicode

F32, I32 = GGUFValueType.FLOAT32, GGUFValueType.INT32
SAMPLING = {
    "temperature": (Keys.General.SAMPLING_TEMP, F32),
    "top_k": (Keys.General.SAMPLING_TOP_K, I32),
    "top_p": (Keys.General.SAMPLING_TOP_P, F32),
    "min_p": (Keys.General.SAMPLING_MIN_P, F32),
    "repeat_last_n": (Keys.General.SAMPLING_PENALTY_LAST_N, I32),
    "repeat_penalty": (Keys.General.SAMPLING_PENALTY_REPEAT, F32),
    "mirostat": (Keys.General.SAMPLING_MIROSTAT, I32),
    "mirostat_tau": (Keys.General.SAMPLING_MIROSTAT_TAU, F32),
    "mirostat_eta": (Keys.General.SAMPLING_MIROSTAT_ETA, F32),
}
"""Ollama's parameter → GGUF's key and type. Ollama's others have no key."""

TEMPLATE = Keys.Tokenizer.CHAT_TEMPLATE

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_NAME = re.compile(
    r"(?:(?:(?P<host>\w[\w.:-]{0,349})/)?(?P<namespace>\w[\w-]{0,79})/)?(?P<model>\w[\w.-]{0,79})"
    r"(?::(?P<tag>\w[\w.-]{0,79}))?",
    re.ASCII,
)
_ID = re.compile(r"[0-9a-f]{12,64}")
_DIGEST = re.compile(r"sha256[:-](?P<hex>[0-9a-fA-F]{64})")
_KIND = "application/vnd.ollama.image."
_REFUSED = {
    "adapter": "give the adapter in PEFT form, as lora:ADAPTER::SOURCE",
    "tensor": "pull a GGUF version of the model",
}
"""Kinds of layers that change what the weights mean → what to do instead."""
_MAX_SMALL_BYTES = 16 << 20
_MAX_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class Name:
    """A model as Ollama names it. The parts are checked: none of them leads out of a folder."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """The shortest form: what is the default is left out, but for the tag."""
        parts = [self.host, self.namespace] if self.host != _HOST else [self.namespace] * (self.namespace != _NAMESPACE)
        return "/".join([*parts, f"{self.model}:{self.tag}"])


@dataclass(frozen=True)
class Layer:
    """A blob that a manifest names. `kind` is the end of its media type: model, template, params, …, or "config"."""

    kind: str
    path: Path
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model of the store, its manifest read."""

    name: Name
    ref: str
    id: str
    layers: tuple[Layer, ...]

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.ref}: {what}", f"run `ollama pull {self.name}` again")

    def text(self, kind: str) -> str:
        """The layers of that kind as one text; empty where there is none. Raises UserError for a damaged blob."""
        return "\n\n".join(self._read(layer) for layer in self.layers if layer.kind == kind)

    def last(self, kind: str) -> str:
        """The last layer of that kind, which is the one that counts; empty where there is none."""
        return next((self._read(layer) for layer in reversed(self.layers) if layer.kind == kind), "")

    def _read(self, layer: Layer) -> str:
        if layer.n_bytes > _MAX_SMALL_BYTES:
            raise self.fault(f"its {layer.kind} has {layer.n_bytes} bytes, expected a small text")
        content = layer.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != layer.sha256:
            raise self.fault(f"{layer.path} ({layer.kind}) does not have the digest in its name")
        return content.decode("utf-8", errors="replace")

    @cached_property
    def parameters(self) -> Mapping[str, object]:
        return self._json("params", "its parameters are no JSON object", {}, dict)

    @cached_property
    def told(self) -> Told:
        """What is there of how to talk to it."""
        fault = "its messages are no JSON list of texts with roles"
        examples = tuple(self._json("messages", fault, [], list))
        if not all(map(_is_message, examples)):
            raise self.fault(fault)
        renderer = self._json("config", "its configuration is no JSON object", {}, dict).get("renderer")
        template = self.last("template") or self.last("prompt")
        return Told(template, self.last("system"), examples, renderer if isinstance(renderer, str) else "")

    def _json(self, kind: str, fault: str, default: Any, type: type) -> Any:
        try:
            found = json.loads(self.last(kind)) if self.last(kind) else default
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, type):
            raise self.fault(fault)
        return found


def _is_message(value: object) -> TypeGuard[Message]:
    texts = [value.get(key) for key in ("role", "content")] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) and is_unicode(text) for text in texts)


def open_ollama(target: str, ref: str) -> Source:
    """The model `target` of the store. Raises UserError when it is not there, damaged, or no model of one GGUF."""
    named, _, id = target.partition("@")
    model = _find(parse_name(named, ref, "write ollama:NAME or ollama:NAME:TAG"), ref)
    if id and not (_ID.fullmatch(id) and model.id.startswith(id)):
        raise UserError(f"{ref}: the store has version {model.id[:12]} of it, not {id}", "leave out @ for that one")
    for layer in model.layers:
        if layer.kind in _REFUSED:
            raise UserError(f"{ref}: has a layer of kind {layer.kind}, which cannot be mixed", _REFUSED[layer.kind])
        _check_size(model, layer)
    weights = [layer for layer in model.layers if layer.kind == "model"]
    if len(weights) != 1:
        raise UserError(f"{ref}: has {len(weights)} files of weights, expected one GGUF", "use another model")
    source = open_gguf(weights[0].path, ref, f"ollama:{model.name}@{model.id[:12]}")
    metadata = source.metadata | _sampling(model)
    if "general.license" not in metadata and (licence := recognise(model.text("license"))):
        metadata["general.license"] = GGUFValue(licence, GGUFValueType.STRING)
    expected = (Expected(weights[0].path, weights[0].n_bytes, weights[0].sha256),)
    chat = _chat(model, read_header(weights[0].path))
    notes = (*(f"{ref}: {note}" for note in chat.notes), *_notes(model))

    def read_vocab() -> Metadata:
        keys = source.read_vocab()
        return keys if chat.template is None else keys | {TEMPLATE: GGUFValue(chat.template, GGUFValueType.STRING)}

    return replace(source, metadata=metadata, read_vocab=read_vocab, expected=expected, notes=notes)


def parse_name(text: str, where: str, mend: str) -> Name:
    """`text` with Ollama's defaults filled in. Raises UserError, about `where`, when it is no name."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: {text!r} is no name of an Ollama model", mend)
    host, namespace, model, tag = match.groups()
    return Name(host or _HOST, namespace or _NAMESPACE, model, tag or _TAG)


def _find(name: Name, ref: str) -> Model:
    folders = [folder for folder in ollama_folders() if is_folder(folder)]
    for folder in folders:
        path = folder / "manifests" / name.host / name.namespace / name.model / name.tag
        try:
            if (n_bytes := _size(path)) > _MAX_SMALL_BYTES:
                raise UserError(f"{path}: has {n_bytes} bytes, expected a manifest", f"run `ollama pull {name}` again")
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
        id = hashlib.sha256(content).hexdigest()
        return Model(name, ref, id, tuple(_layers(path, folder, content, name)))
    raise _not_there(name, ref, folders)


def _not_there(name: Name, ref: str, folders: Sequence[Path]) -> UserError:
    if not folders:
        looked = " and ".join(map(str, ollama_folders()))
        return UserError(f"{ref}: there is no Ollama store in {looked}", "set OLLAMA_MODELS to the folder that it has")
    known = sorted(str(each) for folder in folders for each in _known(folder))
    message = f"{ref}: the store in {' and '.join(map(str, folders))} has no {name}"
    versions = [each for each in known if each.rpartition(":")[0] == str(name).rpartition(":")[0]]
    if like := versions or difflib.get_close_matches(str(name), known, cutoff=0.5):
        return UserError(f"{message}, but {', '.join(like)}", "name one of these")
    return UserError(f"{message}, but {len(known)} others", f"run `ollama pull {name}`")


def _known(folder: Path) -> Iterator[Name]:
    """The models of a store."""
    for path in (folder / "manifests").glob("*/*/*/*"):
        if path.is_file():
            yield Name(*path.relative_to(folder / "manifests").parts)


def _layers(path: Path, folder: Path, content: bytes, name: Name) -> Iterator[Layer]:
    """The layers of a manifest. Raises UserError where it is malformed."""

    def malformed(what: str) -> UserError:
        return UserError(f"{path}: malformed manifest: {what}", f"run `ollama pull {name}` again")

    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise malformed(f"no JSON ({error})") from error
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list):
        raise malformed("it has no list of layers")
    entries = {f"layers[{i}]": layer for i, layer in enumerate(layers)}
    if manifest.get("config"):
        entries["config"] = manifest["config"]
    for where, layer in entries.items():
        entry = layer if isinstance(layer, dict) else {}
        kind, digest, size = (entry.get(key) for key in ("mediaType", "digest", "size"))
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if match is None or not isinstance(kind, str) or type(size) is not int or size < 0:
            raise malformed(f"{where} is {json.dumps(layer)[:200]}, expected mediaType, a sha256 digest and size")
        hex, kind = match["hex"].lower(), "config" if where == "config" else kind.removeprefix(_KIND)
        yield Layer(kind, folder / "blobs" / f"sha256-{hex}", size, hex)


def _check_size(model: Model, layer: Layer) -> None:
    try:
        found = _size(layer.path)
    except FileNotFoundError:
        raise model.fault(f"{layer.path}, the blob of its {layer.kind}, is missing") from None
    except OSError as error:
        raise UserError(f"{layer.path}: cannot be read ({error.strerror})", "check its permissions") from error
    if found != layer.n_bytes:
        raise model.fault(f"{layer.path} ({layer.kind}) has {found} bytes, expected {layer.n_bytes}")


def _size(path: Path) -> int:
    """Bytes of a regular file; reading another kind may never end. Raises OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    return status.st_size


def _sampling(model: Model) -> Metadata:
    """The parameters that GGUF has keys for."""
    keys: Metadata = {}
    for name, value in model.parameters.items():
        if name in SAMPLING:
            key, type = SAMPLING[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
            if not is_number:
                raise model.fault(f"its parameter {name} is {value!r}, expected a number")
            keys[key] = GGUFValue(int(value) if type is I32 else float(value), type)
    return keys


def _chat(model: Model, header: Header) -> Chat:
    """The chat template: that of the GGUF, or what Ollama has beside it."""
    own, tokens = header.get(TEMPLATE), header.get(Keys.Tokenizer.LIST)
    bos = header.get(Keys.Tokenizer.BOS_ID)
    is_added = header.get(Keys.Tokenizer.ADD_BOS, header.get(Keys.Tokenizer.MODEL) == "llama")
    has_bos = is_added and isinstance(tokens, list) and isinstance(bos, int) and 0 <= bos < len(tokens)
    return chat_of(model.told, own if isinstance(own, str) else None, tokens[bos] if has_bos else "")


def _notes(model: Model) -> Iterator[str]:
    """What else Ollama has of this model and a mix cannot take along."""
    if left := [name for name in model.parameters if name not in SAMPLING]:
        yield f"{model.ref}: GGUF has no keys for its parameters {', '.join(left)}: they are not taken along"
    if any(layer.kind == "projector" for layer in model.layers):
        yield f"{model.ref}: its projector is left out: a mix takes text only"
