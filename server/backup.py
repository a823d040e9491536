#!/usr/bin/env python3
"""The part of backup.sh that reads and writes: in a container of vLLM's image, with the volumes mounted.

    backup.py save NODE RELEASE >FILE   the adapters and the node's state, as a tar
    backup.py restore [identity] <FILE  check all of it, have the adapters served, lay the identity ready
    backup.py take                      give the node the identity that lies ready; tailscaled must not run
    backup.py undo                      give it back the former one
    backup.py settle                    forget the former one

Exit codes are those of adapter_manager.py.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from adapter_manager import call, served, sockets
from function_gemma.adapters import lock
from function_gemma.adapters.admission import admit
from function_gemma.adapters.base import Base
from function_gemma.adapters.errors import AdapterError, EngineError, NoAnswerError, StoreError
from function_gemma.adapters.files import FILES, show
from function_gemma.adapters.manifest import Entry, Manifest, edit
from function_gemma.adapters.store import LOCK, Store, check_name, digest_of, root, sync_directory

_VERSION = 1
_HEAD = "backup.json"  # the first member: what the backup is and the sha256 of each that follows
_MANIFEST = "adapters/manifest.json"
_STATE = "tailscaled.state"  # the node's key
_READY, _FORMER = ".restored", ".former"  # in the node's volume, while its identity is replaced
_SMALL = 16 << 20  # bytes; more than the head, the manifest or a file of the node's ever has
_CHUNK = 1 << 20  # bytes
_GENERATION = re.compile(rf"adapters/[a-z0-9][a-z0-9_-]{{0,62}}/[0-9a-f]{{12}}/({'|'.join(FILES)})")


def node() -> Path:
    """Where the node's state is mounted."""
    return Path(os.environ.get("TAILSCALE_STATE_DIR", "/var/lib/tailscale"))


@contextmanager
def _store(word: str) -> Iterator[Store]:
    """Give the store, as its owner and alone: nothing is loaded or pruned meanwhile."""
    owner = root().stat()
    user, group = os.geteuid(), os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        with lock.hold(root() / LOCK, f"backup.sh {word}", lambda line: print(line, file=sys.stderr)):
            yield Store(root())
    finally:
        os.seteuid(user)
        os.setegid(group)


def _node_files() -> dict[str, bytes]:
    """Read the node's state; tailscaled replaces its files and does not write into them."""
    files = {}
    for path in sorted(node().rglob("*")):
        name = path.relative_to(node())
        if not name.parts[0].startswith((_READY, _FORMER)) and path.is_file() and not path.is_symlink():
            files[f"node/{name}"] = path.read_bytes()
    if f"node/{_STATE}" not in files:
        raise StoreError(f"{node()} has no {_STATE}: the node has never joined, `docker logs tailscale-vllm`")
    return files


def save(output: IO[bytes], name: str, release: str) -> None:
    """Write the backup; what serves goes on, and a load does not wait for whoever reads slowly."""
    small = _node_files()
    large: dict[str, Path] = {}
    with ExitStack() as held:
        with _store("save") as store:
            manifest = Manifest.read(store.root)
            if manifest.path.exists():
                small[_MANIFEST] = manifest.path.read_bytes()
            for adapter, entry in sorted(manifest.adapters.items()):
                for one in entry.generations:
                    path = store.generation(adapter, one.digest)
                    if path.is_dir():
                        held.callback(os.close, store.hold(adapter, one.digest))  # never changed, nor pruned
                        large |= {f"adapters/{adapter}/{one.digest}/{file}": path / file for file in FILES}
        hashes = {member: hashlib.sha256(content).hexdigest() for member, content in small.items()}
        for member, path in large.items():
            with path.open("rb") as file:
                hashes[member] = hashlib.file_digest(file, "sha256").hexdigest()
        head = {
            "version": _VERSION,
            "release": release,
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "node": name,
            "adapters": {one: entry.serves for one, entry in manifest.adapters.items() if entry.serves},
            "files": hashes,
        }
        with tarfile.open(fileobj=output, mode="w|") as tar:
            for member, content in {_HEAD: json.dumps(head, indent=2).encode(), **small}.items():
                _add(tar, member, len(content), io.BytesIO(content))
            for member, path in large.items():
                with path.open("rb") as file:
                    _add(tar, member, os.fstat(file.fileno()).st_size, file)
    output.flush()


def _add(tar: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    tar.addfile(member, content)


def _refuse(what: str) -> AdapterError:
    return AdapterError(f"{what}; nothing was changed. Give a whole file that `backup.sh save` wrote")


def unpack(stream: IO[bytes], area: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Check the whole backup; leave adapters/ in `area`, return the head and the node's files.

    Nothing but what the head lists, under names that save() gives, is ever written.
    """
    head: dict[str, Any] | None = None
    files: Mapping[str, str] = {}
    state: dict[str, bytes] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise _refuse(f"{show(member.name)} in the backup is no file, but a link or the like")
                if head is None:
                    head = _head(member, content)
                    files = head["files"]
                    continue
                if member.name not in files or member.name in seen:
                    raise _refuse(f"the backup holds {show(member.name)}, which it does not list once")
                seen.add(member.name)
                if member.name.startswith("node/"):
                    if member.size > _SMALL:
                        raise _refuse(f"{show(member.name)} in the backup has {member.size} bytes")
                    data = content.read()
                    state[member.name.removeprefix("node/")] = data
                    sha256 = hashlib.sha256(data).hexdigest()
                else:
                    sha256 = _copy(content, area / member.name)
                if sha256 != files[member.name]:
                    raise _refuse(f"{show(member.name)} in the backup is damaged: its sha256 is another")
    except (tarfile.TarError, EOFError) as error:
        raise _refuse(f"this is no backup, or not all of it ({error})") from error
    if head is None:
        raise _refuse("the backup is empty")
    if missing := sorted(files.keys() - seen):
        raise _refuse(f"the backup ends before {show(missing[0])}")
    return head, state


def _head(member: tarfile.TarInfo, content: IO[bytes]) -> dict[str, Any]:
    if member.name != _HEAD or member.size > _SMALL:
        raise _refuse(f"this is no backup: it begins with {show(member.name)}")
    try:
        head: dict[str, Any] = json.loads(content.read())
        version, names = head["version"], list(head["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise _refuse(f"{_HEAD} in the backup cannot be read ({error!r})") from error
    if version != _VERSION:
        raise _refuse(f"the backup has version {version}, this release reads {_VERSION}")
    for name in names:
        path = PurePosixPath(name)
        of_node = path.parts[:1] == ("node",) and len(path.parts) > 1 and str(path) == name
        leads_out = ".." in path.parts or (of_node and path.parts[1].startswith((_READY, _FORMER)))
        if not (name == _MANIFEST or _GENERATION.fullmatch(name) or of_node) or leads_out:
            raise _refuse(f"the backup lists {show(name)}, which no backup has")
    if f"node/{_STATE}" not in names:
        raise _refuse(f"the backup lists no node/{_STATE}")
    return head


def _copy(content: IO[bytes], target: Path) -> str:
    """Write a file that lasts, and return its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb") as file:
        while chunk := content.read(_CHUNK):
            sha256.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def restore(stream: IO[bytes], *, identity: bool) -> None:
    """Check the backup, have its adapters served, and, if asked for, lay its identity ready for take()."""
    with _store("restore") as store, store.staging() as area:
        head, state = unpack(stream, area)
        wanted = _check(area / "adapters")
        print(f"backup.sh: {head['node']}, saved {head['time']} by {head['release']}: whole")
        for path in sorted((area / "adapters").glob("*/*")):
            store.install(path.parent.name, path.name, path)
        with edit(store.root) as manifest:
            _merge(manifest, wanted)
        _follow({name: entry.serves for name, entry in wanted.adapters.items() if entry.serves})
    if identity:
        _lay_ready(state)


def _check(adapters: Path) -> Manifest:
    """Refuse what could not be served here; return the backup's manifest."""
    wanted = Manifest.read(adapters)
    for path in adapters.glob("*/*"):
        if {one.name for one in path.iterdir()} != set(FILES) or digest_of(path) != path.name:
            raise _refuse(
                f"{path.parent.name} {path.name} in the backup has another digest, or not all files"
            )
    serving = {name: entry for name, entry in wanted.adapters.items() if entry.serves}
    if not serving:
        return wanted
    base = Base.read()
    if 2 * len(serving) > base.max_cpu_loras:
        raise AdapterError(
            f"{len(serving)} adapters need {2 * len(serving)} places, there are {base.max_cpu_loras}, and "
            "nothing was changed: raise SERVER_MAX_CPU_LORAS in server/entrypoint.env"
        )
    for name, entry in serving.items():
        check_name(name)
        if not (adapters / name / str(entry.serves)).is_dir():
            raise _refuse(f"{name} {entry.serves} is not in the backup")
        if not entry.quarantined:  # it was not served then either
            admit(adapters / name / str(entry.serves), base)
    return wanted


def _merge(manifest: Manifest, wanted: Manifest) -> None:
    """Let the manifest serve what the backup does; what served until now stays for a rollback."""
    manifest.next_id = max(manifest.next_id, wanted.next_id)
    for name, entry in manifest.adapters.items():
        if name not in wanted.adapters:
            manifest.adapters[name] = replace(entry, serves=None, quarantined=None)
    for name, entry in wanted.adapters.items():
        old = manifest.adapters[name].generations if name in manifest.adapters else ()
        ids = {one.digest: one.id for one in old}  # under which a vLLM here may have loaded one
        own = tuple(replace(one, id=ids.get(one.digest, one.id)) for one in entry.generations)
        digests = {one.digest for one in own}
        others = tuple(one for one in old if one.digest not in digests)
        manifest.adapters[name] = Entry(entry.serves, (*others, *own))


def _follow(wanted: Mapping[str, str]) -> None:
    """Have every vLLM serve what the manifest now names, as it does at a start."""
    try:
        for address in sockets():
            call("GET", "/ready", address=address)
        seen = served()
    except NoAnswerError as error:
        print(f"backup.sh: the adapters are there and will be served at vLLM's next start: {error}")
        return
    found = {one["name"]: one["digest"] for one in seen["adapters"]}
    broken = {one["name"]: one["reason"] for one in seen["quarantined"]}
    for name, digest in wanted.items():
        print(f"backup.sh: {name}  {digest}{'' if found.get(name) == digest else '  is not served'}")
    if found != wanted or seen["differs"]:
        raise EngineError(
            f"not all adapters are served as in the backup ({broken or seen['differs'] or found}): "
            "`adapter_manager.py list` shows which, `adapter_manager.py rollback NAME` goes back"
        )


def _lay_ready(state: Mapping[str, bytes]) -> None:
    """Write the identity beside the node's own, whole or not at all."""
    ready, new = node() / _READY, node() / f"{_READY}.new"
    if not ready.exists():  # else a run was killed while it moved files, and the former ones are still needed
        settle()
    for left in (ready, new):
        shutil.rmtree(left, ignore_errors=True)
    for name, content in state.items():
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    new.rename(ready)
    sync_directory(node())


def _move(source: Path) -> None:
    """Put the files of `source` in the place of the node's, each at once, that with the key last."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for name in sorted(files, key=lambda path: str(path) == _STATE):
        target = node() / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        (source / name).replace(target)
        sync_directory(target.parent)
    shutil.rmtree(source)


def take() -> None:
    """Give the node the identity that lies ready; the former one lies beside it until settle()."""
    former = node() / _FORMER
    for path in (node() / _READY).rglob("*"):
        name = path.relative_to(node() / _READY)
        if path.is_file() and (node() / name).exists():
            (former / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileExistsError):  # of a run that was killed: that one is the former
                (former / name).hardlink_to(node() / name)
    _move(node() / _READY)


def undo() -> None:
    """Give the node back its former identity."""
    if (node() / _FORMER).is_dir():
        _move(node() / _FORMER)


def settle() -> None:
    """Forget the former identity."""
    shutil.rmtree(node() / _FORMER, ignore_errors=True)


def main(words: list[str]) -> int:
    """Do what backup.sh says and return the exit code."""
    try:
        match words:
            case ["save", name, release]:
                save(sys.stdout.buffer, name, release)
            case ["restore", *rest]:
                restore(sys.stdin.buffer, identity=rest == ["identity"])
            case ["take"]:
                take()
            case ["undo"]:
                undo()
            case ["settle"]:
                settle()
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except AdapterError as error:
        print(f"backup.sh: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"backup.sh: {error}", file=sys.stderr)
        return StoreError.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the next run clears what was staged
    sys.exit(main(sys.argv[1:]))
