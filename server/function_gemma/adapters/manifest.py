"""The manifest: what each name serves and served before, what was quarantined, and vLLM's next integer id.

Only the plugin writes it, for only it knows what is served. Several vLLMs share one manifest.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import StoreError
from .store import sync_directory

_FILE = "manifest.json"
_VERSION = 2
_ID_LIMIT = 1 << 31  # vLLM keeps ids in 32 signed bits
_HISTORY = 20  # generations of a name that the manifest remembers


@dataclass(frozen=True)
class Generation:
    """One content that a name has served."""

    digest: str
    id: int  # under which a vLLM had it last
    source: str | None  # its hf:// address; None for a directory or a tar
    since: str  # UTC


@dataclass(frozen=True)
class Entry:
    """What one name serves and has served."""

    serves: str | None  # a digest; None when it was unloaded
    generations: tuple[Generation, ...]  # the latest last, the one that serves among them
    quarantined: str | None = None  # why the one that should serve could not be loaded at the last start

    @property
    def serving(self) -> Generation | None:
        """The generation that serves."""
        return next((one for one in self.generations if one.digest == self.serves), None)

    @property
    def before(self) -> list[str]:
        """Digests of the other generations, the latest last."""
        return [one.digest for one in self.generations if one.digest != self.serves]

    def kept(self, keep: int) -> set[str]:
        """Digests that are not pruned: the one that serves and the `keep` latest before it."""
        return {*self.before[max(0, len(self.before) - keep) :], *([self.serves] if self.serves else [])}


@dataclass
class Manifest:
    """The content of `path`, in memory until write()."""

    path: Path
    next_id: int = 1
    adapters: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> "Manifest":
        """Read `root`'s manifest; an empty one where there is none yet."""
        path = root / _FILE
        try:
            data = json.loads(path.read_bytes())
            if data["version"] not in (1, _VERSION):
                raise StoreError(
                    f"{path} has version {data['version']}, this release reads {_VERSION}: update it"
                )
            entry = _entry if data["version"] == _VERSION else _first_entry
            adapters = {str(name): entry(value) for name, value in data["adapters"].items()}
            return cls(path, int(data["next_id"]), adapters)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} cannot be read ({error!r}): restore it, or remove it, restart and load the adapters"
            ) from error

    def take_ids(self, count: int, above: int = 0) -> range:
        """Hand out `count` ids, each greater than `above` and never handed out before."""
        first = max(self.next_id, above + 1)
        if first + count > _ID_LIMIT:
            raise StoreError(
                f"{self.path}: the ids for vLLM are used up: stop the server, set next_id to 1, start it"
            )
        self.next_id = first + count
        return range(first, self.next_id)

    def serve(self, name: str, digest: str, lora_int_id: int, source: str | None) -> None:
        """Let `name` serve `digest`; what it served becomes history."""
        old = self.adapters.get(name)
        others = [one for one in old.generations if one.digest != digest] if old else []
        now = datetime.now(UTC).isoformat(timespec="seconds")
        generations = [*others, Generation(digest, lora_int_id, source, now)]
        self.adapters[name] = Entry(digest, tuple(generations[-_HISTORY:]))

    def unload(self, name: str) -> None:
        """Let `name` serve nothing; its history stays."""
        self.adapters[name] = Entry(None, self.adapters[name].generations)

    def start(self, name: str, digest: str, lora_int_id: int, quarantined: str | None) -> None:
        """Note under which id a process has loaded `digest`, or why not; nothing where it serves no more."""
        entry = self.adapters[name]
        if entry.serves == digest:
            generations = tuple(
                replace(one, id=lora_int_id) if one.digest == digest else one for one in entry.generations
            )
            self.adapters[name] = Entry(digest, generations, quarantined)

    def write(self) -> None:
        """Replace the file, whole and lasting: after a crash there is the old one or the new one."""
        data = {
            "version": _VERSION,
            "next_id": self.next_id,
            "adapters": {name: asdict(entry) for name, entry in sorted(self.adapters.items())},
        }
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            with new.open("w") as file:
                json.dump(data, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            raise StoreError(f"{new} cannot be written ({error.strerror}): nothing was changed") from error
        # It is replaced by now: should this fail, a loss of power may bring back the old one, as whole.
        with suppress(OSError):
            sync_directory(self.path.parent)


def read(root: Path) -> bytes | None:
    """Return the manifest's file as it is, to see whether it was changed; None where it cannot be read."""
    try:
        return (root / _FILE).read_bytes()
    except OSError:
        return None


@contextmanager
def edit(root: Path) -> Iterator[Manifest]:
    """Read the manifest, let the body change it, write it; other processes wait meanwhile.

    An exception of the body leaves the file as it was.
    """
    try:
        lock = os.open(root / ".manifest.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise StoreError(f"{root} cannot be written ({error.strerror}): nothing was changed") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = Manifest.read(root)
        yield manifest
        manifest.write()
    finally:
        os.close(lock)


def _entry(value: dict[str, Any]) -> Entry:
    generations = tuple(Generation(**one) for one in value["generations"])
    return Entry(value["serves"], generations, value["quarantined"])


def _first_entry(value: dict[str, Any]) -> Entry:
    """Read an entry of version 1, which knew digests alone."""
    digests = [*value["history"], value["digest"]]
    return Entry(value["digest"], tuple(Generation(digest, 0, None, "") for digest in digests))
