"""The store: every adapter's generations, `<root>/<name>/<digest>/`, written once and never changed.

vLLM may read a generation again at any time (it keeps only some of them in memory). So each process that has
loaded one holds a shared lock on its directory, which ends with the process, and prune() leaves it alone.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import AdapterError, RefusedError, StoreError
from .files import FILES, digest, show

LOCK = ".lock"
KEEP = 3  # generations of a name that stay for a rollback

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{12}")


def root() -> Path:
    """Where adapters live: $SERVER_ADAPTERS_DIR."""
    return Path(os.environ.get("SERVER_ADAPTERS_DIR", "/models/adapters"))


def check_name(name: str) -> None:
    """Refuse a name that could not be a directory of the store and a model's name in a request."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"{show(name)} cannot name an adapter: use 1 to 63 of a-z, 0-9, - and _, not - or _ first"
        )


class Store:
    """The generations under one directory. Whoever writes holds the lock (`LOCK` in `root`)."""

    def __init__(self, root: Path) -> None:
        """`root` exists when something is installed; before that the store is empty."""
        self.root = root.resolve()
        self._area = self.root / ".staging"

    def generation(self, name: str, digest: str) -> Path:
        """Where that generation lies, or would."""
        return self.root / name / digest

    def locate(self, name: str, path: str) -> str:
        """Return the digest of the generation of `name` at `path`; anywhere else is refused."""
        resolved = Path(path).resolve()
        if (
            resolved.parent != self.root / name
            or not _DIGEST.fullmatch(resolved.name)
            or not resolved.is_dir()
        ):
            raise AdapterError(
                f"{path} is not an installed generation of '{name}' ({self.root / name}/<digest>): "
                f"`adapter_manager.py load {name} PATH` installs and loads one"
            )
        return resolved.name

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Give an empty directory beside the generations; it goes again, with what was not installed."""
        try:
            # Whatever lies there was left by a process that died: the lock says that nobody else is at work.
            with _writing(self.root):
                shutil.rmtree(self._area, ignore_errors=True)
                self._area.mkdir()
                path = Path(tempfile.mkdtemp(dir=self._area))
                path.chmod(0o755)
            yield path
        finally:
            shutil.rmtree(self._area, ignore_errors=True)

    def copy(self, files: Iterable[tuple[str, Iterable[bytes]]], path: Path) -> None:
        """Copy `files` (name and content, each of `FILES` once) into the empty directory `path`."""
        copied = set()
        for file, content in files:
            _copy(content, path / file)
            copied.add(file)
        with _writing(path):
            sync_directory(path)
        if missing := [file for file in FILES if file not in copied]:
            raise RefusedError(
                f"no {' and no '.join(missing)}: give the directory that peft's save_pretrained() wrote"
            )

    def install(self, name: str, digest: str, staged: Path) -> bool:
        """Make `staged` the generation of `name`, whole or not at all; whether that is new to the store."""
        target = self.generation(name, digest)
        with _writing(self.root):
            if target.exists():
                with suppress(OSError):
                    if digest_of(target) == digest:
                        return False
                # Damaged on disk: this is the content that it had.
                target.rename(staged.with_name("damaged"))
            target.parent.mkdir(exist_ok=True)
            staged.rename(target)
            sync_directory(target.parent)
            sync_directory(self.root)
        return True

    def hold(self, name: str, digest: str) -> int:
        """Keep a generation's files from being pruned until the descriptor returned is closed.

        OSError where there is none.
        """
        descriptor = os.open(self.generation(name, digest), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def prune(
        self, kept: Mapping[str, set[str]], names: Iterable[str] | None = None
    ) -> list[tuple[str, str]]:
        """Remove the generations (of `names`, or of all) that are not in `kept` and that no process holds.

        Returns name and digest of each.
        """
        removed: list[tuple[str, str]] = []
        for directory in sorted(self.root.iterdir()):
            name = directory.name
            if not _NAME.fullmatch(name) or (names is not None and name not in names):
                continue
            removed += [
                (name, generation.name)
                for generation in sorted(directory.iterdir())
                if generation.name not in kept.get(name, set()) and self._remove(generation)
            ]
            with suppress(OSError):  # others of its name stay
                directory.rmdir()
        return removed

    def _remove(self, generation: Path) -> bool:
        """Remove a generation at once or not at all; whether nobody held it."""
        descriptor = os.open(generation, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            with _writing(self.root):
                self._area.mkdir(exist_ok=True)
                generation.rename(self._area / generation.name)
            shutil.rmtree(self._area)
            return True
        finally:
            os.close(descriptor)


def digest_of(directory: Path) -> str:
    """Return the digest of the adapter in `directory`, 12 hex digits; OSError where it lacks a file."""
    hashes = {}
    for name in FILES:
        with (directory / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest(hashes)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell what mends an error of the disk."""
    try:
        yield
    except OSError as error:
        mend = "see whether the volume is mounted, and writable for uid 10001"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "make room (`adapter_manager.py prune --keep 0`, `docker system df`) and try again"
        raise StoreError(
            f"{path} cannot be written ({error.strerror}), what served before still serves: {mend}"
        ) from error


def _copy(content: Iterable[bytes], target: Path) -> None:
    with _writing(target):
        file = os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb")
    try:
        for chunk in content:  # its own errors are the source's
            with _writing(target):
                file.write(chunk)
        with _writing(target):
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):  # the first error is the one to tell
            file.close()


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` last over a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
