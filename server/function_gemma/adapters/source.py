"""Where an adapter comes from: a directory, a tar on a stream, or a repository of the Hub at one commit.

Nobody has looked at it yet. What is copied are the files of `FILES` alone; what people keep beside them (a
README, a tokenizer, checkpoints, an optimizer's state) is passed over.
"""

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import AdapterError, RefusedError
from .files import FILES, check_size, opened, show

# More than any adapter: how many entries a source may have, and what a tar may hold in all, unpacked.
_MAX_ENTRIES = 1_000
_MAX_BYTES = 4 << 30
_MAX_TAR_HEADER = 1 << 20  # bytes of a member's long name and the like, which tarfile reads into memory
_CHUNK = 1 << 20  # bytes
_HUB_TIMEOUT = 30  # seconds

_PICKLE = re.compile(r"adapter_model\.(bin|pt|pth|ckpt|pkl)")
_ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})", re.ASCII)

Files = Iterator[tuple[str, Iterator[bytes]]]


def from_directory(path: Path) -> Files:
    """Yield name and content, in chunks, of the adapter's files in `path`."""
    if not path.is_dir():
        raise AdapterError(
            f"{path} is not a directory in this container: `-` as PATH reads a tar on standard input"
        )
    present = survey(path)
    for name in FILES:
        if name in present:
            with opened(path / name) as (content, size):
                yield name, _chunks(content, size)


def survey(path: Path) -> set[str]:
    """Return the names in the directory `path`; refuse one that is more, or other, than an adapter's."""
    names: set[str] = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                names.add(entry.name)
                _check_count(len(names), f"{path} holds")
                if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
                    raise RefusedError(
                        f"{show(entry.name)} in {path} is a link or a device: `cp -rL {path} COPY` "
                        "follows links"
                    )
                _check_pickle(entry.name)
    except PermissionError as error:
        raise RefusedError(
            f"{path} cannot be read ({error.strerror}): let uid {os.getuid()} read it, `chmod -R a+rX`"
        ) from error
    return names


class _Member(tarfile.TarInfo):
    """A member, of which a sender cannot make the reader hold more than a name in memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if not member.isfile() and member.size > _MAX_TAR_HEADER:
            raise RefusedError(
                f"the tar has a header of {member.size} bytes, expected at most {_MAX_TAR_HEADER}: "
                "pack with `tar c NAME`"
            )
        return member


def from_tar(stream: IO[bytes]) -> Files:
    """Yield name and content, in chunks, of the adapter's files in a tar, flat or with one directory on top.

    Nothing is ever written under a name of the tar's. Links, devices and paths that lead out are refused
    all the same, for what holds them is not what `tar c NAME` packs.
    """
    taken: list[PurePosixPath] = []
    members = total = 0
    with _whole(), tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            members += 1
            total += member.size
            _check_count(members, "the tar holds")
            if total > _MAX_BYTES:
                raise RefusedError(f"over {_MAX_BYTES >> 30} GiB in the tar: pack the adapter alone")
            path, shown = PurePosixPath(member.name), show(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise RefusedError(f"the tar holds {shown}, which leads out of it: pack with `tar c NAME`")
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise RefusedError(f"{shown} in the tar is a link or a device: `tar ch NAME` follows links")
            if len(path.parts) > 2:
                continue
            _check_pickle(path.name)
            if path.name not in FILES:
                continue
            if any(path == other or path.parent != other.parent for other in taken):
                raise RefusedError(
                    f"the tar holds {show(str(taken[0]))} and {shown}: pack the directory of one adapter"
                )
            check_size(path.name, member.size)
            taken.append(path)
            yield path.name, _chunks(content, member.size)


def parse_address(address: str) -> tuple[str, str]:
    """Return the repository and the commit of an address on the Hub; refuse one that names no commit."""
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise AdapterError(
            f"{show(address)} is no adapter on the Hub: write hf://ORG/REPO@COMMIT with the commit's 40 hex "
            "digits, for a branch may change; the repository's page shows them under `Files`, `History`"
        )
    return match[1], match[2]


def from_hub(address: str, area: Path) -> Files:
    """Download the adapter at hf://ORG/REPO@COMMIT into `area`, a new directory, and yield it from there.

    Nothing is downloaded of a repository that lists what would be refused. The token is read from
    $HF_TOKEN_PATH, by default the secret of the container.
    """
    repository, commit = parse_address(address)
    # Only whoever loads from the Hub waits for these.
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub import RepoFile, constants  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    # The server runs with HF_HUB_OFFLINE=1, so that vLLM downloads nothing by itself; this is asked for.
    constants.HF_HUB_OFFLINE = False
    disable_progress_bars()
    endpoint = os.environ.get("SERVER_HF_ENDPOINT") or os.environ.get("HF_ENDPOINT") or None
    token = Path(os.environ.get("HF_TOKEN_PATH") or "/run/secrets/huggingface/token")
    with _hub_errors(repository, commit, endpoint, token):
        # False: no token, not even one that lies elsewhere.
        secret: str | bool = os.access(token, os.R_OK) and token.read_text().strip()
        hub = huggingface_hub.HfApi(endpoint, secret)
        # Fails at once where the Hub does not answer; the listing would try for half a minute.
        hub.model_info(repository, revision=commit, timeout=_HUB_TIMEOUT)
        present = set()
        for count, entry in enumerate(hub.list_repo_tree(repository, recursive=True, revision=commit), 1):
            _check_count(count, f"{repository} holds")
            _check_pickle(entry.path)
            if isinstance(entry, RepoFile) and entry.path in FILES:
                check_size(entry.path, entry.size)
                present.add(entry.path)
        if missing := [name for name in FILES if name not in present]:
            raise RefusedError(
                f"{repository} holds no {' and no '.join(missing)} at {commit}: push what peft's "
                "save_pretrained() wrote"
            )
        for name in FILES:
            huggingface_hub.hf_hub_download(
                repository, name, revision=commit, local_dir=area, endpoint=endpoint, token=secret
            )
    yield from from_directory(area)


@contextmanager
def _hub_errors(repository: str, commit: str, endpoint: str | None, token: Path) -> Iterator[None]:
    """Say in words of our own what the Hub refuses: its client's may hold an address with a signature."""
    from huggingface_hub import errors  # noqa: PLC0415 (as above)

    put = (
        "set server_hf_token in the inventory, or: sudo install -D -m 0400 -o 10001 -g 10000 TOKENFILE "
        "server/secrets/huggingface/token"
    )
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise AdapterError(
            f"{repository} has no commit {commit}: copy one that its page shows under `Files`, `History`"
        ) from error
    except AdapterError:
        raise
    except Exception as error:  # of whatever library it speaks HTTP with
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if token.exists() and not os.access(token, os.R_OK):
            raise AdapterError(
                f"uid {os.getuid()} cannot read server/secrets/huggingface/token: "
                "sudo chown 10001:10000 server/secrets/huggingface/token"
            ) from error
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            have = "the token may not read it" if token.exists() else "there is no token"
            raise AdapterError(
                f"{repository} is private, gated or not there, and {have}: accept its licence on its "
                f"page, make a read token, and {put}"
            ) from error
        if status == 404:
            raise AdapterError(
                f"{repository} is not on the Hub: correct the address, hf://ORG/REPO@COMMIT"
            ) from error
        hub = endpoint or "https://huggingface.co"
        raise AdapterError(
            f"{hub} did not give {repository} ({status or type(error).__name__}): see whether this container "
            f"gets through, then try again: curl -I {hub}"
        ) from error


def _check_count(count: int, holder: str) -> None:
    if count > _MAX_ENTRIES:
        raise RefusedError(f"{holder} over {_MAX_ENTRIES} files: give the directory of one adapter alone")


def _check_pickle(name: str) -> None:
    if _PICKLE.fullmatch(name):
        raise RefusedError(
            f"{name} is a pickle, which can run code; expected safetensors only: save the adapter with "
            "save_pretrained(safe_serialization=True) and remove the pickle"
        )


@contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise RefusedError(f"standard input is no whole tar ({error}): send it with `tar c NAME`") from error


def _chunks(content: IO[bytes], size: int) -> Iterator[bytes]:
    """Read `size` bytes and not more, for a file may grow without end."""
    with _whole():
        while size and (chunk := content.read(min(size, _CHUNK))):
            size -= len(chunk)
            yield chunk
