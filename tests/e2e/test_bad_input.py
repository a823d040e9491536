"""Each kind of wrong adapter goes the whole way to the real server, and none reaches the engine.

tests/unit/test_admission.py has those that are wrong only where they lie, on disk or on a hub.
"""

import io
import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

from adapter_cases import CASES, Attempt
from adapter_files import make_base, make_config, make_tensors, pack, write
from stack import answers, containers, host, replaced, ssh

# Runs beside the server, once for all: sends each tar of a tar to the manager and tells how that ended.
SEND = """
import json, subprocess, sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as attempts:
    for attempt in attempts:
        manager = ["adapter_manager.py", "load", attempt.pax_headers["name"], "-"]
        content = attempts.extractfile(attempt).read()
        done = subprocess.run(manager, input=content, capture_output=True, timeout=60)
        print(json.dumps([done.returncode, done.stderr.decode()]), flush=True)
"""
# What a tar cannot carry to the server, or what is wrong only on disk.
ON_DISK = re.compile("while it is read|no permission|socket|5 GiB")


def packed(attempt: Attempt) -> bytes:
    """What `tar c NAME` sends of it."""
    if isinstance(attempt.source, bytes):
        return attempt.source
    assert isinstance(attempt.source, Path)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(attempt.source, "lint")
    return stream.getvalue()


def next_id() -> str:
    """The next id for vLLM, which each adapter that gets as far as the engine takes away."""
    return host("docker exec vllm-gemma grep next_id /models/adapters/manifest.json").last


def send(tars: list[tuple[str, bytes]], area: Path) -> list[tuple[int, str]]:
    """Send each tar under its name; return the exit code and what was said of each."""
    with tarfile.open(area / "attempts.tar", "w", format=tarfile.PAX_FORMAT) as attempts:
        for number, (name, content) in enumerate(tars):
            attempt = tarfile.TarInfo(str(number))
            attempt.size, attempt.pax_headers = len(content), {"name": name}
            attempts.addfile(attempt, io.BytesIO(content))
    with (area / "attempts.tar").open("rb") as file:
        inside = f"docker exec -i vllm-gemma python3 -c {shlex.quote(SEND)}"
        run = subprocess.run(ssh(inside), stdin=file, capture_output=True, text=True, timeout=600, check=True)
    return [(code, said) for code, said in map(json.loads, run.stdout.splitlines())]


def test_every_wrong_adapter_is_refused_and_none_reaches_the_engine(tmp_path: Path) -> None:
    before, first = containers(), next_id()
    sent, tars = [], []
    for number, case in enumerate(CASES):
        area = tmp_path / str(number)
        area.mkdir()
        attempt = case.make(area)
        if not isinstance(attempt.source, str) and not ON_DISK.search(case.name):
            sent.append(case)
            tars.append((attempt.name, packed(attempt)))
    ended = send(tars, tmp_path)
    assert len(sent) > 100
    wrong = [
        (case.group, case.name, code, said)
        for case, (code, said) in zip(sent, ended, strict=True)
        if code not in (1, 2, 3) or "Traceback" in said
    ]
    assert wrong == []
    assert next_id() == first
    assert not replaced(before)
    answers()


def test_finite_weights_that_overflow_together_fail_their_proof_and_poison_nobody(tmp_path: Path) -> None:
    """Only the engine can find these: what served goes on, the base included."""
    tensors = {
        name: (dtype, shape, b"\x49\x71" * (len(values) // 2))  # 1e30
        for name, (dtype, shape, values) in make_tensors(make_base(tmp_path / "base")).items()
    }
    write(tmp_path / "lint", make_config(), pack(tensors))
    ((code, said),) = send([("huge", packed(Attempt(tmp_path / "lint")))], tmp_path)
    assert code == 8, said
    assert "as where weights overflow" in said
    answers()
