"""Where an adapter comes from: a directory, or a tar on a stream that nobody has looked at yet."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import AdapterError
from .store import FILES

# More than any adapter: what a tar may hold in all, unpacked.
_MAX_MEMBERS = 1_000
_MAX_BYTES = 4 << 30
_CHUNK = 1 << 20  # bytes


def from_directory(path: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield name and content, in chunks, of the adapter's files in `path`."""
    if not path.is_dir():
        raise AdapterError(
            f"{path} is not a directory in this container: `-` as PATH reads a tar on standard input"
        )
    for name in FILES:
        file = path / name
        if file.is_file():
            with file.open("rb") as content:
                yield name, _chunks(content)


def from_tar(stream: IO[bytes]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield name and content, in chunks, of the adapter's files in a tar, flat or with one directory on top.

    Nothing is ever written under a name of the tar's. Links, devices and paths that lead out are refused
    all the same, for what holds them is not what `tar c NAME` packs.
    """
    taken: list[PurePosixPath] = []
    members = total = 0
    with _whole(), tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            members += 1
            total += member.size
            if members > _MAX_MEMBERS or total > _MAX_BYTES:
                raise AdapterError(
                    f"over {_MAX_MEMBERS} files or {_MAX_BYTES >> 30} GiB in the tar: pack the adapter"
                )
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise AdapterError(f"the tar holds {path}, which leads out of it: pack with `tar c NAME`")
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise AdapterError(f"{path} in the tar is a link or a device: `tar ch NAME` follows links")
            if path.name not in FILES or len(path.parts) > 2:
                continue
            if any(path == other or path.parent != other.parent for other in taken):
                raise AdapterError(f"the tar holds {taken[0]} and {path}: pack the directory of one adapter")
            taken.append(path)
            yield path.name, _chunks(content)


@contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise AdapterError(f"standard input is no whole tar ({error}): send it with `tar c NAME`") from error


def _chunks(content: IO[bytes]) -> Iterator[bytes]:
    with _whole():
        while chunk := content.read(_CHUNK):
            yield chunk
