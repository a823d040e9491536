"""The manifest: which digest each name serves, what served before, and the next integer id for vLLM.

Only the plugin writes it, for only it knows what is served.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from .errors import StoreError
from .store import sync_directory

_VERSION = 1
_ID_LIMIT = 1 << 31  # vLLM keeps ids in 32 signed bits


@dataclass(frozen=True)
class Entry:
    """What one name serves."""

    digest: str
    history: tuple[str, ...] = ()  # digests that it served before, the latest last


@dataclass
class Manifest:
    """The content of `path`, in memory until write()."""

    path: Path
    next_id: int = 1
    adapters: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> "Manifest":
        """Read `root`'s manifest; an empty one where there is none yet."""
        path = root / "manifest.json"
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != _VERSION:
                raise StoreError(
                    f"{path} has version {data['version']}, this release reads {_VERSION}: update it"
                )
            adapters = {
                str(name): Entry(str(entry["digest"]), tuple(map(str, entry["history"])))
                for name, entry in data["adapters"].items()
            }
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

    def serve(self, name: str, digest: str) -> None:
        """Let `name` serve `digest`; what it served becomes history."""
        old = self.adapters.get(name)
        before = (*old.history, old.digest) if old else ()
        self.adapters[name] = Entry(digest, tuple(past for past in before if past != digest))

    def write(self) -> None:
        """Replace the file, whole and lasting: after a crash there is the old one or the new one."""
        data = {
            "version": _VERSION,
            "next_id": self.next_id,
            "adapters": {
                name: {"digest": entry.digest, "history": list(entry.history)}
                for name, entry in sorted(self.adapters.items())
            },
        }
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            with new.open("w") as file:
                json.dump(data, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise StoreError(f"{new} cannot be written ({error.strerror}): nothing was changed") from error
