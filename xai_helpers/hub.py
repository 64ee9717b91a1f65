"""Files of a repository on the hub: from the cache, else from the network, or an error that says why not."""

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm.auto import tqdm

#: Seconds in which a server answers, all tries together; in one try; and which may pass without a byte of a file.
ANSWER, TRY, SILENCE = 15.0, 4.0, 30.0
TRIES = 3  # without a new byte, before a file is given up

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
#: Where weights are, the best first. An index names other files.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PICTURES = {".arrow", ".jpeg", ".jpg", ".parquet", ".png", ".webp"}
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # a file's name in the hub's cache


class DamagedError(OSError):
    """A file that came is not the one that was announced."""


def checkpoint(repo: str, texts: bool = False) -> Path:
    """The folder of a model on the hub, in transformers' format.

    Where the cache has all of it, nobody is asked: what is published may be newer.

    Args:
        repo: "owner/name".
        texts: whether its tokenizer is needed, too.

    Returns:
        A folder in the hub's cache.

    Raises:
        OSError: it is not there and cannot be fetched; the first sentence says why.
    """
    known = huggingface_hub.try_to_load_from_cache(repo, "config.json")
    if isinstance(known, str) and not lacks(Path(known).parent, texts):
        return Path(known).parent

    def fetch(progress):
        folder, commit = _fetch(repo, "config.json", progress)

        def has(name):
            try:
                return bool(_fetch(repo, name, progress, commit))
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise
                return False

        for name in (*PROCESSORS, *(TOKENIZERS if texts else ())):
            has(name)
        any(has(name) for name in WEIGHTS)  # the first that it has
        for name in _shards(folder):
            _fetch(repo, name, progress, commit)
        return folder

    folder = _explained(f"The checkpoint {repo}", fetch)
    if missing := lacks(folder, texts):
        raise OSError(f"The checkpoint {repo} is incomplete: {_host()} has no {missing} of it. Choose another one")
    return folder


def dataset(repo: str) -> Path:
    """The folder of a small data set of pictures on the hub, for `datasets.load_dataset`.

    Args, returns and raises as in `checkpoint`.
    """
    root = _root(repo, "dataset")
    with contextlib.suppress(OSError):
        folder = root / "snapshots" / (root / "refs" / "main").read_text(encoding="utf-8").strip()
        if any(path.suffix in PICTURES and path.is_file() for path in folder.rglob("*")):
            return folder

    def fetch(progress):
        about = _asked(lambda: huggingface_hub.dataset_info(repo, timeout=TRY), progress)
        names = [one.rfilename for one in about.siblings or [] if one.rfilename != ".gitattributes"]
        names.sort(key=lambda name: Path(name).suffix in PICTURES)  # last: where they are, the rest is
        for name in names:
            _fetch(repo, name, progress, kind="dataset")
        if not names or Path(names[-1]).suffix not in PICTURES:
            raise EntryNotFoundError(f"it has no picture: {', '.join(names) or 'it is empty'}")
        return root / "snapshots" / str(about.sha)

    return _explained(f"The picture {repo}", fetch)


def weights_file(url: str, path: Path, sha256: str) -> None:
    """Fetch a file that lies elsewhere than on the hub, if it is not there.

    Args:
        url: where it is published.
        path: where it goes.
        sha256: the first digits of its hash.

    Raises:
        OSError: it cannot be fetched; the first sentence says why.
    """
    if not path.is_file():

        def fetch(progress):
            _download(url, path, sha256, None, progress)

        _explained(f"The file {path.name}", fetch, urlsplit(url).hostname or url, path.parent)


def lacks(folder: Path, texts: bool = False) -> str:
    """What a folder lacks to be a checkpoint, such as "config.json"; "" if nothing.

    Args:
        folder: where the files are.
        texts: whether a tokenizer is needed, too.
    """
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" not in there:
        return "config.json"
    inside = b'"pretrained_cfg"' in (folder / "config.json").read_bytes()  # timm's way
    if not inside and there.isdisjoint(PROCESSORS):
        return " or ".join(PROCESSORS)
    if texts and "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        return "tokenizer.json"
    if there.isdisjoint(WEIGHTS):
        return f"weights that are read here, {WEIGHTS[0]} or {WEIGHTS[2]}"
    return ", ".join(name for name in _shards(folder) if name not in there)


def damaged(folder: Path) -> str:
    """What is wrong with a file of a checkpoint, and what to do; "" if nothing is found.

    In the hub's cache, where files are links to ones that have their hash as a name, any other byte is found; elsewhere
    JSON and safetensors that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.iterdir()):
        held = Path(os.path.normpath(folder / os.readlink(path))) if path.is_symlink() else path
        fault = ""
        if HASH.fullmatch(held.name) and held.is_file() and not _has(held, held.name):
            fault = "is not the one that was published"
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            fault = f"cannot be read ({error})"
        if fault:
            cached = held.is_relative_to(constants.HF_HUB_CACHE) or path.is_relative_to(constants.HF_HUB_CACHE)
            cure = f"Delete {held}, and it is fetched anew" if cached else "Save the checkpoint anew"
            return f"The file {path} {fault}. {cure}"
    return ""


def _root(repo, kind):
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type=kind))


def _host():
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT  # without a password that may stand before it


def _shards(folder):
    """The files that the index of the weights names; none if one file has them all."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None or first.suffix != ".json":
        return []
    try:
        return sorted(set(json.loads(first.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # `damaged` says so


def _has(path, digest):
    """Whether a file has a hash, or one that begins so: a git blob's of 40 digits, else its SHA-256."""
    known = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if len(digest) == 40 else hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: known).hexdigest().startswith(digest)


class _Progress:
    """What a thread that fetches tells the one that waits for it."""

    def __init__(self):
        self.received, self.expected, self.part, self.stopped = 0, 0, None, False
        self.wait(ANSWER, "did not answer")

    def wait(self, limit, otherwise):
        """From now on, `limit` seconds may pass without another word; else `otherwise` is what happened."""
        if self.stopped:
            raise InterruptedError("nobody waits for it any more")
        self.limit, self.otherwise, self.last = limit, otherwise, time.monotonic()

    def receive(self, size=0):
        self.wait(SILENCE, "sent no byte")
        self.received += size


def _watched(what, work):
    """Do work in a thread, so that no server, resolver of names or library makes anybody wait for longer than said."""
    progress, ended, done, failed = _Progress(), threading.Event(), [], []

    def run():
        try:
            done.append(work(progress))
        except BaseException as error:
            failed.append(error)
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    began, bar = time.monotonic(), None
    try:
        while not ended.wait(0.2):
            now = time.monotonic()
            if now - progress.last > progress.limit:
                raise TimeoutError(f"{progress.otherwise} for {progress.limit:g} s")
            if now - began > 2 and not os.environ.get("TQDM_DISABLE"):  # which tqdm's bar for notebooks does not read
                if bar is None:
                    bar = tqdm(desc=what, initial=progress.received, unit="B", unit_scale=True, leave=False)
                bar.n, bar.total = progress.received, progress.expected or None
                bar.refresh()
    finally:
        progress.stopped = True  # the thread ends with the next byte, or with the process, which leaves it no time
        if progress.part and not ended.is_set():
            with contextlib.suppress(OSError):
                progress.part.unlink(missing_ok=True)
        if bar is not None:
            bar.close()
    if failed:
        raise failed[0]
    return done[0]


def _asked(question, progress):
    """What a server answers; it is asked once more where the fault may pass."""
    progress.wait(ANSWER, "did not answer")
    try:
        return question()
    except Exception as error:
        if progress.stopped or not _may_pass(error):
            raise
    time.sleep(1)
    return question()


def _may_pass(error):
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, HTTPError)  # the network's


def _fetch(repo, name, progress, commit=None, kind="model"):
    """Bring a file into the hub's cache: (the folder with all files of its commit, the commit)."""
    url = huggingface_hub.hf_hub_url(repo, name, repo_type=kind, revision=commit)
    about = _asked(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=TRY), progress)
    if about.commit_hash and HASH.fullmatch(about.etag or ""):
        # Into the place where the hub's own client looks first: it checks no hash, and waits for a minute in silence.
        blob = _root(repo, kind) / "blobs" / about.etag
        if not (blob.is_file() and _has(blob, about.etag)):
            _download(url, blob, about.etag, about.size, progress, build_hf_headers())
        progress.receive()
    else:
        progress.wait(10 * SILENCE, "sent nothing")  # its client has limits of its own
    huggingface_hub.hf_hub_download(repo, name, repo_type=kind, revision=commit, etag_timeout=TRY)
    return _root(repo, kind) / "snapshots" / str(about.commit_hash), about.commit_hash


def _download(url, path, digest, size, progress, headers=None):
    """Fetch a file whole, going on where it stops, or leave nothing behind."""
    progress.receive()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")  # another process may fetch it, too
    progress.part, progress.expected = part, progress.expected + (size or 0)
    try:
        with part.open("wb") as file:
            furthest = tries = 0
            while True:
                try:
                    _receive(url, file, progress, headers or {})
                    if size is None or file.tell() >= size:
                        break
                    error = DamagedError(f"the file ends after {file.tell():,} of {size:,} bytes")
                except Exception as raised:
                    if not _may_pass(raised):
                        raise
                    error = raised
                tries = 1 if file.tell() > furthest else tries + 1
                furthest = max(furthest, file.tell())
                if tries == TRIES:
                    raise error
                time.sleep(1)
        progress.receive()
        if not _has(part, digest):
            raise DamagedError(f"other bytes came than its hash {digest[:8]}... says")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _receive(url, file, progress, headers):
    """Append what a file lacks."""
    at = file.tell()
    headers = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={at}-"} if at else {})}
    with get_session().stream("GET", url, headers=headers, timeout=SILENCE / TRIES) as response:
        if response.status_code == 416:  # there is no more of it
            return
        hf_raise_for_status(response)
        if response.status_code != 206:
            file.seek(0)
            file.truncate()
        for chunk in response.iter_bytes():
            file.write(chunk)
            progress.receive(len(chunk))


def _explained(what, work, host="", cache=""):
    """What `_watched` returns; or an OSError whose first sentence names the cause, and the second what to do."""
    if huggingface_hub.is_offline_mode():
        raise OSError(f"{what} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it. Unset that variable")
    if not host and not re.match("https?://.", constants.ENDPOINT):
        raise OSError(
            f"{what} is not on this machine, and HF_ENDPOINT is no address: {_host()!r}. It begins with https://, or "
            "leave it unset"
        )
    try:
        return _watched(what, work)
    except Exception as error:
        cause, cure = _cause(error, host or _host(), cache or constants.HF_HUB_CACHE)
        raise OSError(f"{what} is not on this machine and could not be fetched: {cause}. {cure}") from error


def _cause(error, host, cache):
    """(the true cause of an error, what to do)"""
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the hub's client names it there
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, host)
    if isinstance(error, HTTPError):  # the network's
        kind = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()  # such as "connect timeout"
        fault = "did not answer" if "timeout" in kind else "cannot be reached"
        return f"{host} {fault} ({kind}: {error})".replace(": )", ")"), "Check the network and its proxy"
    if isinstance(error, TimeoutError):
        return f"{host} {error}", "Check the network and its proxy, or try again later"
    if isinstance(error, DamagedError):
        return f"{error}", "Nothing of it was kept: try again"
    if isinstance(error, EntryNotFoundError):
        return f"{error}", "Choose another one"
    if isinstance(error, (FileMetadataError, ValueError)):
        return f"what answers as {host} is not the hub", "Log in to the network, or check HF_ENDPOINT and the proxy"
    return unwritable(error, cache) or (f"{type(error).__name__}: {error}", "Try again")


def unwritable(error: Exception, folder: str | Path) -> tuple[str, str] | None:
    """The cause and what to do, if an error says that a folder takes no file; else None."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no room in {folder} ({error.strerror})", "Make room, or set HF_HOME to a folder elsewhere"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{folder} cannot be written ({error.strerror})", "Allow it, or set HF_HOME to a folder of your own"
    return None


def _refusal(error, host):
    """`_cause` of an answer that is a refusal."""
    status, login = error.response.status_code, "log in: hf auth login"
    if isinstance(error, GatedRepoError):
        return "it is gated", f"Ask for access on its page at {host}, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{host} has no such repository, or it is private", f"Check the name; for a private one, {login}"
    if isinstance(error, EntryNotFoundError):
        name = urlsplit(str(error.response.url)).path.rpartition("/")[2]
        return f"{host} has no {name} of it", "Choose another one"
    if status == 401:
        return f"{host} does not accept this machine's token", f"Unset HF_TOKEN, or {login}"
    if status == 403:
        return f"{host} forbids it (403)", f"If the token is to allow it, {login}; it may be your network, too"
    if status == 404:
        return f"{host} does not have it (404)", "Check the name"
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        return f"{host} has had too many questions (429)", f"Wait {f'{wait} s' if wait.isdigit() else 'a while'}"
    if status >= 500:
        return f"{host} is out of order ({status})", "Try again later"
    return f"{host} answers {status}", "Check HF_ENDPOINT and the proxy"
