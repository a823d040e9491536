"""A kill and a full disk at every step of a load: what served goes on, and one more run completes it.

The steps are found, not listed: a hook counts what the process does to the store's files, and lets the n-th
fail. tests/e2e/test_adapters.py kills the real ones.
"""

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapter_manager
from function_gemma.adapters.errors import AdapterError, NoAnswerError, StoreError
from function_gemma.adapters.manifest import Manifest
from unit.stand_ins import server

MakeAdapter = Callable[..., Path]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fsync")
KILLED = -signal.SIGKILL


def arm(step: int, root: Path, fail: Callable[[str], None]) -> None:
    """From now on call `fail` before this process's `step`-th change below `root`. There is no way back."""
    seen = 0
    fsync = os.fsync

    def synced(fd: Any) -> None:  # noqa: ANN401 - as the one that it wraps
        sys.audit("fsync", Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if (is_write or event in CHANGES) and str(arguments[0]).startswith(str(root)):
            seen += 1
            if seen == step:
                fail(event)

    os.fsync = synced
    sys.addaudithook(hook)


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill(event: str) -> None:
    if event in ("open", "os.mkdir", "os.rename", "fsync"):  # what needs room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fork(run: Callable[[], int]) -> int:
    """Run it in a child; return the child's id."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = run()
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def plugin(armed: Callable[[], None] = lambda: None, address: str = "") -> Iterator[int]:
    """The plugin in a child that listens on that socket, by default $SERVER_SOCKET, armed then."""
    address = address or os.environ["SERVER_SOCKET"]
    ready, started = os.pipe()

    def run() -> int:
        running = server(address)
        startup = running.startup

        async def tell(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets)
            armed()
            os.write(started, b"1")

        running.startup = tell  # type: ignore[method-assign] # to tell
        running.run()
        return 0

    Path(address).unlink(missing_ok=True)
    child = fork(run)
    os.close(started)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    try:
        yield child
    finally:
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            end(child)


def load(path: Path) -> dict[str, Any]:
    return adapter_manager.run(adapter_manager.parse(["load", "lint", str(path)]))


def served() -> str:
    ((one),) = adapter_manager.call("GET", "/v1/lora_adapters")["adapters"]
    return str(one["digest"])


def whole(store: Path) -> bool:
    """Whether nothing half-done lies about: each generation is one that the manifest names."""
    known = {one.digest for one in Manifest.read(store).adapters["lint"].generations}
    return {path.name for path in (store / "lint").iterdir()} <= known and not (store / ".staging").exists()


def test_a_manager_killed_at_any_step_is_completed_by_one_more_run(store: Path, adapter: MakeAdapter) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin():
        digests = [load(path)["digest"] for path in paths]
        step, killed = 0, KILLED
        while killed == KILLED:
            step += 1
            path, digest = paths[(step + 1) % 2], digests[(step + 1) % 2]

            def run(path: Path = path, step: int = step) -> int:
                arm(step, store, die)
                return 0 if load(path) else 1

            # The content is new to the store each time, so that each step is there to be killed in.
            adapter_manager.prune(0)
            before = served()
            killed = end(fork(run))
            assert served() in (before, digest)
            load(path)
            assert served() == digest
            assert whole(store)
        assert killed == 0
        assert step > 12


def test_a_plugin_killed_at_any_step_is_completed_by_one_more_run(store: Path, adapter: MakeAdapter) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin():
        digests = [load(path)["digest"] for path in paths]
    step, died = 0, True
    while died:
        step += 1
        path, digest = paths[(step + 1) % 2], digests[(step + 1) % 2]
        before = str(Manifest.read(store).adapters["lint"].serves)
        with plugin(lambda step=step: arm(step, store, die)):  # type: ignore[misc] # a default binds it
            try:
                load(path)
                died = False
            except NoAnswerError:
                pass
        with plugin():
            assert served() in (before, digest)
            load(path)
            assert served() == digest
            assert whole(store)
    assert step > 6


def test_a_disk_full_at_any_step_leaves_what_served_and_says_how_to_make_room(
    store: Path, adapter: MakeAdapter
) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin():
        digests = [load(path)["digest"] for path in paths]
        step, refused = 0, True
        while refused:
            step += 1
            path, digest = paths[(step + 1) % 2], digests[(step + 1) % 2]
            said = store.parent / "said"

            def run(path: Path = path, step: int = step, said: Path = said) -> int:
                arm(step, store, fill)
                try:
                    load(path)
                except (AdapterError, OSError) as error:
                    said.write_text(str(error))
                    return getattr(error, "exit_code", 7)
                return 0

            adapter_manager.prune(0)
            before = served()
            said.unlink(missing_ok=True)
            code = end(fork(run))
            refused = said.exists()
            assert code == (7 if refused else 0)
            if refused:
                assert "No space left" in said.read_text()
                assert served() in (before, digest)
            load(path)
            assert served() == digest
            assert whole(store)
            refused = refused or step < 25  # a step that only removes needs no room


def test_a_plugin_without_room_refuses_and_what_served_serves(store: Path, adapter: MakeAdapter) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin():
        digests = [load(path)["digest"] for path in paths]
    said = []
    for step in range(1, 13):
        before = str(Manifest.read(store).adapters["lint"].serves)
        with plugin(lambda step=step: arm(step, store, fill)):  # type: ignore[misc] # a default binds it
            try:
                load(paths[1 - digests.index(before)])
            except StoreError as error:
                said.append(str(error))
                assert served() == before
                assert str(Manifest.read(store).adapters["lint"].serves) == before
    assert len(said) == 8  # the id's and the name's write of the manifest: lock, open, fsync, rename
    assert all("No space left" in one for one in said)
