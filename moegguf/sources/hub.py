"""A model on the Hugging Face Hub as a Source: `hf:org/name@rev`.

`huggingface_hub` does the talking and keeps the cache (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE mean what they
mean everywhere). First the small files (config, tokenizer, index; of an adapter its config) go into the cache, which
turns the revision into a commit; everything after that is read at that commit, so a push cannot change a model under a
build, and the commit is what a mix records. Weight files follow one by one as the checkpoint opens them, after its
config has been found usable: downloaded whole into the cache, or, when streaming, left where they are and read by HTTP
ranges. Pickles, GGUF files and anything else are never fetched.

A streamed file is one HEAD at the Hub, which answers with the address of its content store, and then one GET per
range, straight to that address. The address is signed and lasts about an hour; the Hub's token is only ever sent to
the Hub. Whatever fails is tried again a few times, from the HEAD on, which also renews an address that has expired.
Nothing is read ahead: the caller's threads are what keeps several ranges on their way at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that it uses: httpx in version 1, httpx2 in version 2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from moegguf.errors import UserError
from moegguf.sources.blob import Blob, LocalFile
from moegguf.sources.hf import INDEX, Checkpoint, open_checkpoint
from moegguf.sources.model_card import README
from moegguf.tensor import Source

SMALL_FILES = (
    "config.json", "generation_config.json", INDEX,
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", README,
)  # fmt: skip
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try of a read that failed for a passing reason."""
MAX_PAUSE_S = 60.0
"""The longest that a server may ask us to wait (Retry-After)."""

T = TypeVar("T")


def open_hub(repo_id: str, revision: str, ref: str, *, stream: bool, pre: str | None) -> Source:
    """The model `repo_id` at `revision` (a branch, a tag or a commit), labelled `hf:repo_id@commit`.

    Raises UserError when the model does not exist, is not ours to read, or cannot be used.
    """
    return open_checkpoint(hub_checkpoint(repo_id, revision, ref, stream=stream), pre)


def hub_checkpoint(
    repo_id: str, revision: str, ref: str, *, stream: bool, small_files: tuple[str, ...] = SMALL_FILES
) -> Checkpoint:
    """The files of `repo_id` at `revision`, of which those of `small_files` that there are have been fetched.

    `stream` reads tensors by HTTP ranges instead of downloading weight files; files that the cache holds already are
    read from there.
    """
    repo = Repo(repo_id, revision, ref)
    with repo.user_errors():
        folder = _small_files(repo, small_files)
        commit = folder.name
        names = _file_names(repo, commit, folder)
    _refuse_gguf_only(repo, names)

    def download(name: str) -> Blob:
        with repo.user_errors():
            return LocalFile(Path(hf_hub_download(repo_id, name, revision=commit)))

    def remote(name: str) -> Blob:
        cached = try_to_load_from_cache(repo_id, name, revision=commit)
        return LocalFile(Path(cached)) if isinstance(cached, str) else RemoteFile(repo, commit, name)

    files = tuple(folder / name for name in names if name.endswith(".safetensors"))
    return Checkpoint(ref, f"hf:{repo_id}@{commit}", folder, names, remote if stream else download, files)


@dataclass(frozen=True)
class Repo:
    """A model of the Hub, as the user asked for it."""

    id: str
    revision: str
    ref: str

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Whatever huggingface_hub raises within, told as a UserError about this model."""
        try:
            yield
        except LocalEntryNotFoundError as error:  # neither in the cache nor to be had; the cause says why
            raise self._told(error.__cause__ or error) from error
        except tuple(_REASONS) as error:
            raise self._told(error) from error

    def _told(self, error: BaseException) -> UserError:
        what, mend = next(texts for kind, texts in _REASONS.items() if isinstance(error, kind))
        words = {
            "repo": self.id,
            "revision": self.revision,
            "endpoint": constants.ENDPOINT,
            "cache": constants.HF_HUB_CACHE,
            "why": _first_line(error),
        }
        return UserError(f"{self.ref}: {what.format(**words)}", mend.format(**words))


_REASONS: dict[type[BaseException], tuple[str, str]] = {
    HFValidationError: ("{repo!r} is no name of a Hub model", "write hf:org/name or hf:org/name@revision"),
    GatedRepoError: (
        "is gated: its licence has to be accepted before it can be read",
        "accept it at {endpoint}/{repo}, then set HF_TOKEN or run `hf auth login`",
    ),
    RepositoryNotFoundError: (
        "{endpoint} has no model of that name, or it is private",
        "check the name; for a private model set HF_TOKEN or run `hf auth login`",
    ),
    RevisionNotFoundError: ("the model has no revision {revision!r}", "choose one of {endpoint}/{repo}/tree/main"),
    HfHubHTTPError: (
        "{endpoint} answered {why}",
        "try again later; if it is about your token, set HF_TOKEN or run `hf auth login`",
    ),
    HTTPError: ("the connection to {endpoint} failed ({why})", "check the network, the proxy and HF_ENDPOINT"),
    OfflineModeIsEnabled: (
        "is not in the cache, and HF_HUB_OFFLINE forbids fetching it",
        "unset HF_HUB_OFFLINE, or build once while online",
    ),
    FileMetadataError: ("{endpoint} does not answer as a Hub does ({why})", "check HF_ENDPOINT and the proxy"),
    ValueError: ("{endpoint} does not answer as a Hub does ({why})", "check HF_ENDPOINT and the proxy"),
    OSError: ("cannot be fetched ({why})", "check the space and the permissions of {cache}"),
    RuntimeError: ("cannot be fetched ({why})", "try again"),  # of hf_xet, which transfers large files
}
"""Kind of error, the more special first → what is wrong, and how to mend it."""


def _first_line(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):  # its own text holds the address, which may be signed
        response = error.response
        text = f"{response.status_code} {response.reason_phrase}. {error.server_message or ''}"
    else:
        text = str(error)
    return next(iter(text.strip().rstrip(".").splitlines()), type(error).__name__)


def _small_files(repo: Repo, names: tuple[str, ...]) -> Path:
    """The cache folder that holds them; it is named after the commit that the revision stands for."""
    patterns = list(names)
    return Path(snapshot_download(repo.id, revision=repo.revision, allow_patterns=patterns, tqdm_class=_NoBar))


class _NoBar(tqdm):
    """No progress for files that take no time; the bar of a weight file shows itself on a terminal only."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _file_names(repo: Repo, commit: str, folder: Path) -> tuple[str, ...]:
    """The files at the top of the repo; those in the cache where the Hub is out of reach."""
    try:
        info = model_info(repo.id, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        raise
    except (HTTPError, OfflineModeIsEnabled):
        names = tuple(sorted(path.name for path in folder.iterdir()))
        if not any(name.endswith(".safetensors") for name in names):
            raise
        return names
    return tuple(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)


def _refuse_gguf_only(repo: Repo, names: tuple[str, ...]) -> None:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{repo.ref}: holds GGUF files and no safetensors",
            f"run `hf download {repo.id} {ggufs[0]}` and give the path that it prints",
        )


class RemoteFile:
    """A file of a Hub repo at one commit, read by HTTP ranges; one request for each read."""

    def __init__(self, repo: Repo, commit: str, name: str) -> None:
        self.name = f"{repo.ref}/{name}"
        self._repo = repo
        self._url = hf_hub_url(repo.id, name, revision=commit)
        with repo.user_errors():
            metadata = _retried(lambda: get_hf_file_metadata(self._url))
        if metadata.size is None:
            raise UserError(f"{self.name}: the server does not tell its size", "leave out --stream")
        self.size: int = metadata.size
        self._etag = metadata.etag
        self._location: str | None = metadata.location

    def read(self, offset: int, size: int) -> np.ndarray:
        buffer = np.empty(size, np.uint8)
        if size:
            with self._repo.user_errors():
                _retried(lambda: self._fill(memoryview(buffer), offset))
        return buffer

    def _fill(self, view: memoryview, offset: int) -> None:
        location = self._location or self._locate()
        try:
            self._get(location, view, offset)
        except HTTPError:
            self._location = None
            raise

    def _locate(self) -> str:
        """The address of the content, asked for anew. Other threads may be doing the same, which does no harm."""
        metadata = get_hf_file_metadata(self._url)
        if (metadata.size, metadata.etag) != (self.size, self._etag):
            raise UserError(f"{self.name}: changed on the server during the build", "build again")
        self._location = metadata.location
        return metadata.location

    def _get(self, location: str, view: memoryview, offset: int) -> None:
        last = offset + len(view) - 1
        is_hub = urlsplit(location)[:2] == urlsplit(self._url)[:2]
        headers = build_hf_headers() if is_hub else {}
        headers |= {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", location, headers=headers, timeout=timeout) as response:
            if response.status_code == 403 and not is_hub:
                raise _Interrupted("the content store answered 403, as it does for an expired address")
            hf_raise_for_status(response)
            self._require_range(response.status_code, response.headers.get("Content-Range"), offset, last)
            n = 0
            for chunk in response.iter_raw():
                room = view[n:]
                room[: len(chunk)] = chunk[: len(room)]
                n += len(chunk)
        if n != len(view):
            raise _Interrupted(f"{n} bytes came, {len(view)} were asked for")

    def _require_range(self, status: int, content_range: str | None, first: int, last: int) -> None:
        expected = f"bytes {first}-{last}/{self.size}"
        if (status, content_range) != (206, expected):
            raise UserError(
                f"{self.name}: the server does not serve byte ranges as asked: expected status 206 with {expected}, "
                f"found {status} with {content_range}",
                "leave out --stream to download the whole file",
            )


class _Interrupted(HTTPError):
    """A transfer that went wrong in a way that another try may cure."""


def _retried(action: Callable[[], T]) -> T:
    """The result of `action`, tried again after each of PAUSES_S while it fails for a passing reason."""
    for pause in PAUSES_S:
        try:
            return action()
        except HTTPError as error:
            if not _may_pass(error):
                raise
            time.sleep(_wanted_pause(error, pause))
    return action()


def _may_pass(error: HTTPError) -> bool:
    """Connections that broke, overloaded servers and rate limits; not what a server refuses for good."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in (408, 429, 500, 502, 503, 504)


def _wanted_pause(error: HTTPError, otherwise: float) -> float:
    wanted = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(wanted), MAX_PAUSE_S) if wanted.isdecimal() else otherwise
