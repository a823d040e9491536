"""The store: every adapter's generations, `<root>/<name>/<digest>/`, written once and never changed.

vLLM may read a generation again at any time (it keeps only some of them in memory), so that one which has
been served is not deleted while the server runs.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import AdapterError, StoreError

# All that vLLM reads of an adapter. Nothing else gets into a generation, so that a README or a checkpoint
# beside them neither makes a new one nor fills the volume.
FILES = ("adapter_config.json", "adapter_model.safetensors")
LOCK = ".lock"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{12}")


def root() -> Path:
    """Where adapters live: $SERVER_ADAPTERS_DIR."""
    return Path(os.environ.get("SERVER_ADAPTERS_DIR", "/models/adapters"))


def check_name(name: str) -> None:
    """Refuse a name that could not be a directory of the store and a model's name in a request."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"'{name}' cannot name an adapter: use 1 to 63 of a-z, 0-9, - and _, not - or _ first"
        )


@dataclass(frozen=True)
class Staged:
    """An adapter's files in the store's staging area, not a generation yet."""

    path: Path
    digest: str  # 12 hex digits of the content


class Store:
    """The generations under one directory. Whoever writes holds the lock (`LOCK` in `root`)."""

    def __init__(self, root: Path) -> None:
        """`root` exists when something is installed; before that the store is empty."""
        self.root = root.resolve()

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

    def verify(self, name: str, digest: str) -> None:
        """Refuse a generation whose files are not those that were installed."""
        path = self.generation(name, digest)
        try:
            found = digest_of(path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}): load '{name}' again from its source"
            ) from error
        if found != digest:
            raise StoreError(
                f"{path} was changed after it was installed: load '{name}' again from its source"
            )

    @contextmanager
    def stage(self, files: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[Staged]:
        """Copy `files` (name and content, each of `FILES` once) in; what is not installed goes again."""
        area = self.root / ".staging"
        try:
            # Whatever lies there was left by a process that died: the lock says that nobody else is at work.
            shutil.rmtree(area, ignore_errors=True)
            area.mkdir()
            path = Path(tempfile.mkdtemp(dir=area))
            path.chmod(0o755)
            hashes = {file: _copy(content, path / file) for file, content in files}
            sync_directory(path)
            if missing := [file for file in FILES if file not in hashes]:
                raise AdapterError(
                    f"no {' and no '.join(missing)}: give the directory that peft's save_pretrained() wrote"
                )
            yield Staged(path, _digest(hashes))
        finally:
            shutil.rmtree(area, ignore_errors=True)

    def install(self, name: str, staged: Staged) -> bool:
        """Make `staged` a generation of `name`, whole or not at all; whether that is new to the store."""
        target = self.generation(name, staged.digest)
        if target.exists():
            try:
                self.verify(name, staged.digest)
            except StoreError:
                # Damaged on disk: this is the content that it had.
                target.rename(staged.path.with_name("damaged"))
            else:
                return False
        target.parent.mkdir(exist_ok=True)
        staged.path.rename(target)
        sync_directory(target.parent)
        sync_directory(self.root)
        return True

    def discard(self, name: str, digest: str) -> None:
        """Remove a generation that was never served."""
        path = self.generation(name, digest)
        shutil.rmtree(path)
        with suppress(OSError):  # others of its name stay
            path.parent.rmdir()


def digest_of(directory: Path) -> str:
    """Return the digest of the adapter in `directory`; OSError where a file of it is missing."""
    hashes = {}
    for name in FILES:
        with (directory / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digest(hashes)


def _digest(hashes: dict[str, str]) -> str:
    lines = "".join(f"{file} {hashes[file]}\n" for file in FILES)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _copy(content: Iterable[bytes], target: Path) -> str:
    sha256 = hashlib.sha256()
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb") as file:
        for chunk in content:
            sha256.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` last over a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
