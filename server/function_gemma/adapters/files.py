"""The two files of an adapter, written by strangers: how they are opened, read as JSON, shown and named."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import RefusedError

# All that vLLM reads of an adapter. Nothing else gets into a generation, so that a README or a checkpoint
# beside them neither makes a new one nor fills the volume.
FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG, WEIGHTS = FILES

# More than any adapter's, in bytes.
LIMITS = {CONFIG: 1 << 20, WEIGHTS: 4 << 30}


def digest(hashes: Mapping[str, str]) -> str:
    """Return an adapter's digest, 12 hex digits, from the sha256 (hex) of each of `FILES`."""
    lines = "".join(f"{file} {hashes[file]}\n" for file in FILES)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def check_size(name: str, size: int) -> None:
    """Refuse a file of `size` bytes that is larger than any adapter's."""
    if size > (limit := LIMITS[name]):
        raise RefusedError(
            f"{name} has {size} bytes, expected at most {limit}: give what peft's save_pretrained() wrote"
        )


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open one of `FILES` and give its size in bytes; refuse one that changes before the body is done.

    A FIFO, device or link is refused without waiting for it or following it.
    """
    name = path.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise RefusedError(f"no {name}: give the directory that peft's save_pretrained() wrote") from error
    except PermissionError as error:
        raise RefusedError(
            f"{path} cannot be read ({error.strerror}): let uid {os.getuid()} read it, `chmod a+r`"
        ) from error
    except OSError as error:  # ELOOP of a link, ENXIO of a socket
        raise RefusedError(_not_regular(name)) from error
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        os.close(descriptor)
        raise RefusedError(_not_regular(name))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        check_size(name, before.st_size)
        yield file, before.st_size
        if _state(os.fstat(descriptor)) != _state(before):
            raise RefusedError(f"{name} changed while it was read: try again when its writer is done")


def _not_regular(name: str) -> str:
    return f"{name} is a link, a directory, a FIFO or a device, expected a file: copy with `cp -rL`"


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_exactly(file: IO[bytes], buffer: memoryview, name: str) -> None:
    """Fill `buffer` from `file`, which promised to have as much."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]  # IO[bytes] lacks what FileIO has
        if not count:
            raise RefusedError(f"{name} became shorter while it was read: try again when its writer is done")
        filled += count


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Read a JSON object, and nothing that JSON does not have; readers differ on what that would mean."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_pairs_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RefusedError(f"{where} is not UTF-8 at byte {error.start}: save the adapter again") from error
    except RecursionError as error:
        raise RefusedError(f"{where} nests deeper than any adapter's: save the adapter again") from error
    except ValueError as error:
        raise RefusedError(f"{where} is not JSON ({error}): save the adapter again") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{where} holds {show(value)}, expected an object: save the adapter again")
    return value


def _pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {show(twice)} stands twice")
    return found


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def show(value: object) -> str:
    """Return a stranger's value for a message: one short line that no terminal takes for a command."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "what nests too deep"
    return text if len(text) <= 120 else f"{text[:117]}..."
