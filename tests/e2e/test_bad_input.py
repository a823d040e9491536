"""Each kind of wrong adapter goes the whole way to the real server, and none reaches the engine.

tests/unit/test_admission.py has those that are wrong only where they lie, on disk or on a hub.
"""

import io
import json
import re
import tarfile
from pathlib import Path

from adapter_cases import CASES, Attempt
from adapter_files import make_base, make_config, make_tensors, pack, write
from stack import answers, call, containers, host, replaced

MANAGER = ["docker", "exec", "-i", "vllm-gemma", "adapter_manager.py", "load"]
FOLDER = "/var/tmp/bad-input"  # noqa: S108 - of a host that is the tests' own
# Runs on the host: sends each tar in turn and tells how the manager ended.
SEND = f"""
import json, pathlib, subprocess
folder = pathlib.Path("{FOLDER}")
for number, name in enumerate(json.loads((folder / "names.json").read_text())):
    words = [*{MANAGER}, name, "-"]
    with (folder / f"{{number}}.tar").open("rb") as tar:
        done = subprocess.run(words, stdin=tar, capture_output=True, text=True, timeout=60)
    print(json.dumps([done.returncode, done.stderr]), flush=True)
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
    folder = area / Path(FOLDER).name
    folder.mkdir()
    (folder / "names.json").write_text(json.dumps([name for name, _ in tars]))
    for number, (_, content) in enumerate(tars):
        (folder / f"{number}.tar").write_bytes(content)
    call("docker", "cp", folder, f"lab-host:{Path(FOLDER).parent}")
    try:
        run = host("python3 -", stdin=SEND, seconds=600)
    finally:
        host(f"rm -r {FOLDER}")
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
