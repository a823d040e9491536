"""A backup comes back as it was saved, or not at all."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import backup
from backup import ADAPTERS, HEAD, SUMS
from function_gemma.adapters.manifest import Manifest
from function_gemma.adapters.store import LOCK

NODE = "tailscale-state"
VOLUMES = [ADAPTERS, NODE]


class Volumes:
    """Volumes of a host; backup.py's words with what they read and write."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = path, monkeypatch
        for volume in VOLUMES:
            (path / volume).mkdir(parents=True)
        monkeypatch.setattr(backup, "ROOT", path)

    def run(self, *words: str, stdin: bytes = b"") -> tuple[int, bytes]:
        output = io.BytesIO()
        for name, stream in (("stdin", io.BytesIO(stdin)), ("stdout", output)):
            self._monkeypatch.setattr(sys, name, io.TextIOWrapper(stream))
        self._monkeypatch.setattr(sys, "argv", ["backup.py", *words])
        return backup.main(), output.getvalue()

    def content(self) -> dict[str, str]:
        paths = [path for path in self.path.rglob("*") if path.name != LOCK]
        return {
            str(path.relative_to(self.path)): path.read_text() if path.is_file() else "/" for path in paths
        }

    def write(self, word: str) -> None:
        Manifest.read(self.path / ADAPTERS).write()
        generation = self.path / ADAPTERS / "lint" / word
        generation.mkdir(parents=True)
        (generation / "adapter_model.safetensors").write_text(word)
        (self.path / NODE / "tailscaled.state").write_text(f"key of {word}")


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    return Volumes(tmp_path / "volumes", monkeypatch)


@pytest.fixture
def saved(volumes: Volumes) -> bytes:
    """A backup; the volumes have another content now."""
    volumes.write("first")
    code, tar = volumes.run("save", *VOLUMES)
    assert code == 0
    for path in volumes.path.iterdir():
        subprocess.run(["find", path, "-mindepth", "1", "-delete"], check=True)
    volumes.write("second")
    return tar


def test_what_was_saved_comes_back(volumes: Volumes, saved: bytes) -> None:
    assert volumes.run("stage", *VOLUMES, stdin=saved)[0] == 0
    assert volumes.run("swap", *VOLUMES)[0] == 0
    now = volumes.content()
    assert now[f"{ADAPTERS}/lint/first/adapter_model.safetensors"] == "first"
    assert now[f"{NODE}/tailscaled.state"] == "key of first"
    assert not [name for name in now if "second" in name or backup.STAGED in name or backup.FORMER in name]


def test_owner_and_mode_come_back(volumes: Volumes) -> None:
    volumes.write("first")
    state = volumes.path / NODE / "tailscaled.state"
    state.chmod(0o600)
    (volumes.path / ADAPTERS / "lint").chmod(0o2750)
    _, tar = volumes.run("save", *VOLUMES)
    state.chmod(0o644)
    volumes.run("stage", *VOLUMES, stdin=tar)
    volumes.run("swap", *VOLUMES)
    assert state.stat().st_mode & 0o7777 == 0o600
    assert (volumes.path / ADAPTERS / "lint").stat().st_mode & 0o7777 == 0o2750


def test_the_node_stays_where_only_adapters_are_asked_for(volumes: Volumes, saved: bytes) -> None:
    volumes.run("stage", ADAPTERS, stdin=saved)
    volumes.run("swap", ADAPTERS)
    assert volumes.content()[f"{NODE}/tailscaled.state"] == "key of second"
    assert f"{ADAPTERS}/lint/first" in volumes.content()


def edited(tar: bytes, change: Callable[[tarfile.TarInfo, bytes], tuple[str, bytes] | None]) -> bytes:
    """The same tar with each member's name and content changed, or left out."""
    output = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=output, mode="w") as new:
        for member in old:
            file = old.extractfile(member)
            content = file.read() if file else b""
            if (changed := change(member, content)) is None:
                continue
            member.name, content = changed
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return output.getvalue()


def link(tar: bytes) -> bytes:
    """The same with a link before its end."""
    output = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=output, mode="w") as new:
        for member in old:
            if member.name == SUMS:
                one = tarfile.TarInfo(f"{ADAPTERS}/link")
                one.type, one.linkname = tarfile.SYMTYPE, "/etc/shadow"
                new.addfile(one)
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return output.getvalue()


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "no tar": lambda _: b"hello" * 1000,
    "cut in a file": lambda tar: tar[: len(tar) // 2],
    "cut after a file": lambda tar: edited(
        tar, lambda one, text: None if one.name == SUMS else (one.name, text)
    ),
    "a file is missing": lambda tar: edited(
        tar, lambda one, text: None if one.name.endswith(".state") else (one.name, text)
    ),
    "a file has other bytes": lambda tar: edited(
        tar, lambda one, text: (one.name, b"other" if one.name.endswith(".state") else text)
    ),
    "another tar": lambda tar: edited(tar, lambda one, text: None if one.name == HEAD else (one.name, text)),
    "of another format": lambda tar: edited(
        tar, lambda one, text: (one.name, b'{"backup": "2"}' if one.name == HEAD else text)
    ),
    "a way out": lambda tar: edited(
        tar, lambda one, text: (one.name.replace("lint/first", "../../etc"), text)
    ),
    "an absolute path": lambda tar: edited(
        tar, lambda one, text: ("/etc/state" if one.name.endswith(".state") else one.name, text)
    ),
    "a link": link,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_no_whole_backup_changes_nothing(
    volumes: Volumes, saved: bytes, wrong: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    before = volumes.content()
    assert volumes.run("stage", *VOLUMES, stdin=wrong(saved))[0] == 1
    assert "this is no whole backup" in capsys.readouterr().err
    assert volumes.content() == before


@pytest.mark.parametrize("renames", range(1, 6))
def test_a_swap_that_is_killed_is_completed_by_another_restore(
    volumes: Volumes, saved: bytes, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes.run("stage", *VOLUMES, stdin=saved)
    rename, done = Path.rename, 0

    def killed(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == renames:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            volumes.run("swap", *VOLUMES)
    everything = " ".join(volumes.content().values())
    assert "key of second" in everything
    assert "second" in everything
    assert volumes.run("stage", *VOLUMES, stdin=saved)[0] == 0
    assert volumes.run("swap", *VOLUMES)[0] == 0
    now = volumes.content()
    assert now[f"{NODE}/tailscaled.state"] == "key of first"
    assert not [name for name in now if "second" in name or backup.STAGED in name or backup.FORMER in name]
