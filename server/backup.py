#!/usr/bin/env python3
"""What cannot be made again, as a tar: backup.sh runs this where the volumes are mounted, each below ROOT.

    backup.py save VOLUME…  >FILE      write them to standard output
    backup.py stage VOLUME… <FILE      read and check all of the backup, and put these beside what is there
    backup.py swap VOLUME…             have what was staged in the place of what is there

The first member says what it is, the last one has every file's SHA-256: without it the backup is incomplete.
Exit codes: 0 done; 1 cannot be done, and nothing has changed; 2 called wrongly.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from function_gemma.adapters.errors import AdapterError
from function_gemma.adapters.lock import hold
from function_gemma.adapters.manifest import Manifest
from function_gemma.adapters.store import LOCK, sync_directory

ROOT = Path("/volumes")
ADAPTERS = "models-adapters"
FORMAT = "function-gemma-server backup, format 1"
HEAD, SUMS = "backup.json", "sha256.json"
STAGED, FORMER = ".restore", ".former"
NOT_SAVED = {LOCK, ".staging", STAGED, FORMER}


class BackupError(Exception):
    """Why it cannot be done, and what to do."""


@contextmanager
def locked(doing: str) -> Iterator[None]:
    """Nobody else changes the adapters meanwhile."""
    with hold(ROOT / ADAPTERS / LOCK, f"backup.py {doing}", lambda line: print(line, file=sys.stderr)):
        yield


def save(volumes: list[str]) -> None:
    """Write the volumes' files and directories; nothing else lies in them but sockets."""
    manifest = Manifest.read(ROOT / ADAPTERS)
    head = {
        "backup": FORMAT,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapters": {name: entry.serves for name, entry in sorted(manifest.adapters.items())},
    }
    sums = {}
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, HEAD, head)
        for path in _files(volumes):
            member = tar.gettarinfo(path, str(path.relative_to(ROOT)))
            content = path.read_bytes() if path.is_file() else b""
            member.size = len(content)  # of what was read: tailscaled may write meanwhile
            tar.addfile(member, io.BytesIO(content))
            if path.is_file():
                sums[member.name] = hashlib.sha256(content).hexdigest()
        _add(tar, SUMS, sums)


def _files(volumes: list[str]) -> Iterator[Path]:
    for volume in volumes:
        for directory, directories, files in os.walk(ROOT / volume):
            here = Path(directory)
            directories[:] = sorted(set(directories) - NOT_SAVED)
            for name in [*directories, *sorted(set(files) - NOT_SAVED)]:
                if (here / name).is_file() or (here / name).is_dir():
                    yield here / name


def _add(tar: tarfile.TarFile, name: str, content: object) -> None:
    text = json.dumps(content).encode()
    member = tarfile.TarInfo(name)
    member.size = len(text)
    tar.addfile(member, io.BytesIO(text))


def stage(volumes: list[str]) -> None:
    """Check the whole backup and lay these volumes' part of it ready; BackupError leaves nothing behind."""
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
            head = _stage(tar, volumes)
    except (tarfile.TarError, EOFError, UnicodeDecodeError, ValueError) as error:
        _clear(volumes, STAGED)
        raise BackupError(f"this is no whole backup ({error}): save it again, or take another") from error
    except BaseException:
        _clear(volumes, STAGED)
        raise
    adapters = ", ".join(f"{name} {digest}" for name, digest in head["adapters"].items() if digest)
    print(f"backup.py: saved {head['saved']}, adapters: {adapters or 'none'}", file=sys.stderr)


def _stage(tar: tarfile.TarFile, volumes: list[str]) -> dict[str, dict[str, str]]:
    _clear(volumes, STAGED)
    head, found = None, dict[str, str]()
    for member in tar:
        content = tar.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr] # a file's
        if head is None:
            head = json.loads(content) if member.name == HEAD else {}
            if head.get("backup") != FORMAT:
                raise ValueError("it does not begin as one")
        elif member.name == SUMS:
            if json.loads(content) != found:
                raise ValueError("a file is missing, or another than when it was saved")
            return dict(head)
        else:
            _lay(member, content, volumes)
            if member.isfile():
                found[member.name] = hashlib.sha256(content).hexdigest()
    raise ValueError("it ends too early")


def _lay(member: tarfile.TarInfo, content: bytes, volumes: list[str]) -> None:
    volume, *parts = PurePosixPath(member.name).parts
    if not (member.isfile() or member.isdir()) or not parts or {"..", "/"} & {volume, *parts}:
        raise ValueError(f"{member.name!r} is neither a file nor a directory of a volume")
    if volume not in volumes:
        return
    target = (ROOT / volume / STAGED).joinpath(*parts)
    if member.isdir():
        target.mkdir(parents=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(content)
            os.fsync(file.fileno())
    os.chown(target, member.uid, member.gid)
    target.chmod(member.mode & 0o7777)


def _clear(volumes: list[str], name: str) -> None:
    for volume in volumes:
        shutil.rmtree(ROOT / volume / name, ignore_errors=True)


def swap(volumes: list[str]) -> None:
    """Exchange what is there for what was staged; what was there is kept until all of it is."""
    for volume in volumes:
        here, former = ROOT / volume, ROOT / volume / FORMER
        former.mkdir(
            exist_ok=True
        )  # one that is there was left by a run that was killed: it has what was there first
        for path in [path for path in here.iterdir() if path.name not in NOT_SAVED]:
            path.rename(former / path.name) if not (former / path.name).exists() else _remove(path)
        for path in (here / STAGED).iterdir():
            path.rename(here / path.name)
        sync_directory(here)
    for volume in volumes:
        _clear([volume], STAGED)
        _clear([volume], FORMER)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    """Run the word, and return the exit code."""
    words = {"save": save, "stage": stage, "swap": swap}
    if len(sys.argv) < 3 or sys.argv[1] not in words:
        print(__doc__, file=sys.stderr)
        return 2
    word, *volumes = sys.argv[1:]
    try:
        with locked(word):
            words[word](volumes)
    except (BackupError, AdapterError, OSError) as error:
        print(f"backup.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
