"""One change at a time; whoever waits learns for whom."""

import re
import resource
import subprocess
import sys
from pathlib import Path

from function_gemma.adapters import lock

HOLD = """
import sys
from pathlib import Path
from function_gemma.adapters import lock
with lock.hold(Path(sys.argv[1]), "adapter_manager.py load lint", print):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(lock.__file__).parents[2])},
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_waits_and_learns_who_holds_it_since_when(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path / ".lock") as first:
        lines: list[str] = []

        def notify(line: str) -> None:
            lines.append(line)
            assert first.stdin
            first.stdin.close()  # only now may it end

        with lock.hold(tmp_path / ".lock", "me", notify):
            assert first.wait() == 0
    (line,) = lines
    assert re.search(
        rf"held by adapter_manager\.py load lint \(process {first.pid}\) since 2\d{{3}}-.* UTC", line
    )


def test_a_killed_holder_is_not_in_the_way(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path / ".lock") as first:
        first.kill()
        first.wait()
    lines: list[str] = []
    with lock.hold(tmp_path / ".lock", "me", lines.append):
        assert lines == []
        assert "me (process" in (tmp_path / ".lock").read_text()
        assert "load lint" not in (tmp_path / ".lock").read_text()


def test_where_there_is_no_room_for_its_note_the_lock_is_held_without(tmp_path: Path) -> None:
    size = resource.RLIMIT_FSIZE
    before = resource.getrlimit(size)
    resource.setrlimit(size, (0, before[1]))
    try:
        with lock.hold(tmp_path / ".lock", "adapter_manager.py prune", print):
            assert (tmp_path / ".lock").read_text() == ""
    finally:
        resource.setrlimit(size, before)
