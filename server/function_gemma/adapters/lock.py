"""One change of the adapters at a time, and whoever waits learns for whom."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path


@contextmanager
def hold(path: Path, holder: str, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file at `path` as `holder` (one line, shown to whoever waits) while the body runs.

    Where another process holds it, `notify` gets one line that says who and since when, and the call waits.
    The kernel drops the lock with its process, so that no dead holder is ever in the way.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            notify(f"waiting for {path}, held by {file.read().strip() or 'a process that has just started'}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        note = f"{holder} (process {os.getpid()}) since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
        with suppress(OSError):  # what makes room on a full disk needs the lock too
            os.write(file.fileno(), note.encode())
        try:
            yield
        finally:
            file.truncate(0)
