"""backup.py: what is saved comes back whole, and a file that is not whole changes nothing."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adapter_manager
import backup
from function_gemma.adapters import lock
from function_gemma.adapters.errors import AdapterError
from function_gemma.adapters.manifest import Manifest
from function_gemma.adapters.store import LOCK
from unit.stand_ins import listening, server

MakeAdapter = Callable[..., Path]
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of a node that has joined."""
    path = tmp_path / "node"
    (path / "ssh").mkdir(parents=True)
    (path / "tailscaled.state").write_text("old key")
    (path / "ssh" / "host_key").write_text("old host key")
    monkeypatch.setenv("TAILSCALE_STATE_DIR", str(path))
    return path


@pytest.fixture
def saved(store: Path, node: Path, adapter: MakeAdapter) -> Iterator[bytes]:
    """A backup in which lint serves "one"; now it serves "two", and another serves besides."""
    assert store.is_dir()
    assert node.is_dir()
    with listening(server()):
        adapter_manager.load("lint", str(adapter("one")), None)
        output = io.BytesIO()
        backup.save(output, "node.example", "release")
        adapter_manager.load("lint", str(adapter("two")), None)
        adapter_manager.load("other", str(adapter("two", "other")), None)
        yield output.getvalue()


def serves() -> dict[str, str]:
    return {one["name"]: one["digest"] for one in adapter_manager.served()["adapters"]}


def members(content: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = []
        for member in tar:
            file = tar.extractfile(member)
            assert file
            found.append((member, file.read()))
        return found


def pack(content: Members) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w|") as tar:
        for member, data in content:
            tar.addfile(member, io.BytesIO(data))
    return output.getvalue()


def head(content: bytes) -> Any:  # noqa: ANN401 - JSON
    return json.loads(members(content)[0][1])


def with_head(content: bytes, **changes: Any) -> bytes:  # noqa: ANN401 - JSON
    (first, data), *others = members(content)
    changed = json.dumps({**json.loads(data), **changes}).encode()
    first.size = len(changed)
    return pack([(first, changed), *others])


def with_member(content: bytes, member: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """The backup with one more member, which the head lists too."""
    member.size = len(data)
    listed = {**head(content)["files"], member.name: hashlib.sha256(data).hexdigest()}
    return pack([*members(with_head(content, files=listed)), (member, data)])


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("node/link")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def damaged(content: bytes) -> bytes:
    *others, (member, data) = members(content)
    return pack([*others, (member, bytes([data[0] ^ 1]) + data[1:])])


def test_the_first_member_says_what_the_backup_is_and_holds_no_secret(saved: bytes) -> None:
    first = members(saved)[0]
    assert first[0].name == "backup.json"
    assert (head(saved)["version"], head(saved)["node"], head(saved)["release"]) == (
        1,
        "node.example",
        "release",
    )
    assert head(saved)["adapters"].keys() == {"lint"}
    assert b"old key" not in first[1]


def test_the_adapters_are_served_as_they_were_and_what_served_since_is_kept_for_a_rollback(
    saved: bytes, store: Path, node: Path
) -> None:
    since = serves()
    backup.restore(io.BytesIO(saved), identity=False)
    assert serves() == head(saved)["adapters"]
    assert (node / "tailscaled.state").read_text() == "old key"
    manifest = Manifest.read(store)
    assert manifest.adapters["other"].before == [since["other"]]
    adapter_manager.rollback("lint", since["lint"])
    assert serves() == {"lint": since["lint"]}


def test_what_is_unloaded_and_pruned_while_the_backup_is_written_is_in_it_whole(
    saved: bytes, store: Path, tmp_path: Path
) -> None:
    class Reader(io.BytesIO):
        pruned = False

        def write(self, data: Any) -> int:  # noqa: ANN401 - BytesIO's own
            if not self.pruned:
                self.pruned = True
                adapter_manager.unload("other")
                with lock.hold(store / LOCK, "the test", pytest.fail):
                    adapter_manager.prune(0)
            return super().write(data)

    assert saved
    output = Reader()
    backup.save(output, "node.example", "release")
    assert output.pruned
    _, state = backup.unpack(io.BytesIO(output.getvalue()), tmp_path / "area")
    assert state.keys() == {"tailscaled.state", "ssh/host_key"}
    assert len(list((tmp_path / "area" / "adapters" / "other").iterdir())) == 1


def test_a_store_that_has_nothing_gets_all_and_a_second_restore_changes_nothing(
    saved: bytes, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.is_dir()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(fresh))
    monkeypatch.setenv("SERVER_SOCKET", str(tmp_path / "fresh.sock"))
    (tmp_path / "fresh.base").write_bytes((tmp_path / "vllm.base").read_bytes())
    (tmp_path / "vllm.sock").unlink()  # the former host's
    with listening(server()):
        backup.restore(io.BytesIO(saved), identity=False)
        first = (fresh / "manifest.json").read_bytes()
        assert serves() == head(saved)["adapters"]
        backup.restore(io.BytesIO(saved), identity=False)
        assert (fresh / "manifest.json").read_bytes() == first


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "this is no backup, or not all of it"),
    "no tar": (lambda _: b"a letter\n" * 1000, "this is no backup, or not all of it"),
    "another tar": (lambda tar: pack(members(tar)[1:]), "it begins with"),
    "cut in a file": (lambda tar: tar[: len(tar) // 2], "not all of it|ends before"),
    "cut after a file": (lambda tar: pack(members(tar)[:-1]), "ends before"),
    "a changed byte": (damaged, "is damaged"),
    "another version": (lambda tar: with_head(tar, version=2), "version 2, this release reads 1"),
    "a file twice": (lambda tar: pack([*members(tar), members(tar)[-1]]), "does not list once"),
    "a file not listed": (
        lambda tar: pack([*members(tar), (tarfile.TarInfo("node/more"), b"")]),
        "does not list once",
    ),
    "a path that leads out": (lambda tar: with_member(tar, tarfile.TarInfo("node/../x")), "no backup has"),
    "an absolute path": (lambda tar: with_member(tar, tarfile.TarInfo("/etc/x")), "no backup has"),
    "a symbolic link": (lambda tar: with_member(tar, link(tarfile.SYMTYPE)), "is no file"),
    "a hard link": (lambda tar: with_member(tar, link(tarfile.LNKTYPE)), "is no file"),
    "a device": (lambda tar: with_member(tar, link(tarfile.CHRTYPE)), "is no file"),
    "half a generation": (
        lambda tar: with_member(tar, tarfile.TarInfo(f"adapters/x/{12 * '0'}/adapter_config.json")),
        "not all files",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD.keys())
def test_a_file_that_is_no_whole_backup_changes_nothing_and_the_message_says_why(
    saved: bytes, store: Path, node: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    before = {path: path.read_bytes() for top in (store, node) for path in top.rglob("*") if path.is_file()}
    served = serves()
    with pytest.raises(AdapterError, match=says) as caught:
        backup.restore(io.BytesIO(change(saved)), identity=True)
    assert "nothing was changed" in str(caught.value)
    after = {path: path.read_bytes() for top in (store, node) for path in top.rglob("*") if path.is_file()}
    assert after == before
    assert serves() == served


def test_an_identity_is_taken_and_given_back(saved: bytes, node: Path) -> None:
    (node / "tailscaled.state").write_text("new key")
    backup.restore(io.BytesIO(saved), identity=True)
    assert (node / "tailscaled.state").read_text() == "new key"
    backup.take()
    assert (node / "tailscaled.state").read_text() == "old key"
    backup.undo()
    assert (node / "tailscaled.state").read_text() == "new key"
    assert sorted(path.name for path in node.iterdir()) == ["ssh", "tailscaled.state"]


def test_a_killed_change_of_identity_is_completed_by_the_next_run_and_can_still_be_undone(
    saved: bytes, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node / "tailscaled.state").write_text("new key")
    (node / "ssh" / "host_key").write_text("new host key")
    backup.restore(io.BytesIO(saved), identity=True)
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "tailscaled.state":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            backup.take()
    assert (node / "tailscaled.state").read_text() == "new key"
    backup.restore(io.BytesIO(saved), identity=True)
    backup.take()
    assert (node / "tailscaled.state").read_text() == "old key"
    assert (node / "ssh" / "host_key").read_text() == "old host key"
    backup.undo()
    assert (node / "tailscaled.state").read_text() == "new key"
    assert (node / "ssh" / "host_key").read_text() == "new host key"
