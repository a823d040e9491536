"""Generations: whole, immutable, found by their content."""

import io
import runpy
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from function_gemma.adapters import source
from function_gemma.adapters.errors import AdapterError, StoreError
from function_gemma.adapters.source import from_directory, from_tar
from function_gemma.adapters.store import FILES, Store, check_name, digest_of

CONFIG, WEIGHTS = FILES

MakeAdapter = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    root = tmp_path / "store"
    root.mkdir()
    return Store(root)


def tar_of(members: dict[str, bytes | tarfile.TarInfo]) -> io.BytesIO:
    """Pack contents (or ready members without content) under these names."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    stream.seek(0)
    return stream


def install(store: Store, path: Path, name: str = "lint") -> str:
    with store.stage(from_directory(path)) as staged:
        store.install(name, staged)
    return staged.digest


def names_below(path: Path) -> set[str]:
    return {str(one.relative_to(path)) for one in path.rglob("*")}


def test_a_generation_holds_what_vllm_reads_and_nothing_else(store: Store, adapter: MakeAdapter) -> None:
    digest = install(store, adapter())
    assert names_below(store.root) == {
        "lint",
        f"lint/{digest}",
        f"lint/{digest}/{CONFIG}",
        f"lint/{digest}/{WEIGHTS}",
    }


def test_the_digest_is_of_the_content_alone(store: Store, adapter: MakeAdapter) -> None:
    one, two, other = adapter("one"), adapter("one", "copy"), adapter("two")
    (two / "README.md").write_text("other prose")
    assert install(store, one) == install(store, two)
    assert install(store, one) != install(store, other)


def test_a_tar_and_its_directory_are_the_same_generation(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    for arguments in (["-C", str(path.parent), "lint"], ["-C", str(path), "."], ["-z", "-C", str(path), "."]):
        packed = subprocess.run(["tar", "-c", *arguments], check=True, capture_output=True).stdout
        with store.stage(from_tar(io.BytesIO(packed))) as staged:
            assert staged.digest == install_digest(store, path)


def install_digest(store: Store, path: Path) -> str:
    other = Store(store.root / "other")
    other.root.mkdir(exist_ok=True)
    return install(other, path)


def test_ansible_and_the_store_agree_on_the_digest(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    lora = runpy.run_path(str(Path(__file__).parents[2] / "roles" / "lora" / "filter_plugins" / "lora.py"))
    assert lora["lora_digest"](str(path)) == digest_of(path) == install(store, path)


def test_a_second_install_of_the_same_content_is_not_new(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    with store.stage(from_directory(path)) as staged:
        assert store.install("lint", staged)
    with store.stage(from_directory(path)) as staged:
        assert not store.install("lint", staged)


def test_the_files_of_a_generation_are_read_only(store: Store, adapter: MakeAdapter) -> None:
    path = store.generation("lint", install(store, adapter()))
    assert {(path / file).stat().st_mode & 0o777 for file in (CONFIG, WEIGHTS)} == {0o444}


def test_a_changed_generation_is_refused_and_a_new_install_mends_it(
    store: Store, adapter: MakeAdapter
) -> None:
    path = adapter()
    digest = install(store, path)
    weights = store.generation("lint", digest) / WEIGHTS
    weights.chmod(0o644)
    weights.write_text("rotten")
    with pytest.raises(StoreError, match="changed after it was installed"):
        store.verify("lint", digest)
    install(store, path)
    store.verify("lint", digest)


def test_a_generation_that_lacks_a_file_is_refused(store: Store, adapter: MakeAdapter) -> None:
    digest = install(store, adapter())
    (store.generation("lint", digest) / CONFIG).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        store.verify("lint", digest)


def test_what_cannot_be_an_adapter_is_refused_and_leaves_nothing(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    (path / WEIGHTS).unlink()
    with (
        pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"),
        store.stage(from_directory(path)),
    ):
        pass
    with pytest.raises(AdapterError, match="not a directory"), store.stage(from_directory(path / CONFIG)):
        pass
    assert names_below(store.root) == set()


def test_what_a_killed_manager_left_is_cleared_away(store: Store, adapter: MakeAdapter) -> None:
    left = store.root / ".staging" / "half"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_text("half")
    digest = install(store, adapter())
    assert names_below(store.root) == {
        "lint",
        f"lint/{digest}",
        f"lint/{digest}/{CONFIG}",
        f"lint/{digest}/{WEIGHTS}",
    }


@pytest.mark.parametrize("name", ["lint", "0", "sample_data-2", "a" * 63])
def test_a_plain_name_is_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "Lint", "-a", "_a", ".a", "a b", "a@b", "a\n", "ä", "a" * 64]
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        check_name(name)


def test_only_a_generation_of_that_name_is_located(store: Store, adapter: MakeAdapter) -> None:
    digest = install(store, adapter())
    inside = store.generation("lint", digest)
    assert store.locate("lint", str(inside)) == digest
    (store.root / "docstring").mkdir()
    (store.root / "docstring" / digest).symlink_to(inside)
    for path in (
        "lint",
        str(adapter("elsewhere")),
        str(store.root),
        str(store.root / "lint"),
        f"{inside}/../..",
        str(store.root / "lint" / "0123456789ab"),
        str(store.root / "docstring" / digest),
    ):
        with pytest.raises(AdapterError, match=r"adapter_manager\.py load"):
            store.locate("docstring" if "docstring" in path else "lint", path)


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({f"lint/{CONFIG}": link(tarfile.SYMTYPE)}, "a link or a device"),
        ({f"lint/{CONFIG}": link(tarfile.LNKTYPE)}, "a link or a device"),
        ({"lint/null": link(tarfile.CHRTYPE)}, "a link or a device"),
        ({"lint/fifo": link(tarfile.FIFOTYPE)}, "a link or a device"),
        ({f"../{CONFIG}": b""}, "leads out of it"),
        ({f"/lint/{CONFIG}": b""}, "leads out of it"),
        ({"lint/../../x": b""}, "leads out of it"),
        ({f"lint/{CONFIG}": b"", f"docstring/{WEIGHTS}": b""}, "pack the directory of one adapter"),
        ({CONFIG: b"", f"checkpoint-1/{CONFIG}": b""}, "pack the directory of one adapter"),
        ({f"lint/{CONFIG}": b"", f"./lint/{CONFIG}": b""}, "pack the directory of one adapter"),
        ({f"x{number}": b"" for number in range(1001)}, "1000 files"),
    ],
)
def test_a_tar_that_is_not_one_adapter_is_refused(
    store: Store, members: dict[str, bytes | tarfile.TarInfo], message: str
) -> None:
    with pytest.raises(AdapterError, match=message), store.stage(from_tar(tar_of(members))):
        pass
    assert names_below(store.root) == set()


def test_a_tar_larger_than_the_bound_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_BYTES", 10)
    packed = tar_of({f"lint/{CONFIG}": b"12345", "lint/optimizer.pt": b"678901"})
    with pytest.raises(AdapterError, match="GiB in the tar"), store.stage(from_tar(packed)):
        pass


@pytest.mark.parametrize(
    "packed", [b"", b"not a tar", tar_of({f"lint/{WEIGHTS}": b"x" * 9999}).getvalue()[:4000]]
)
def test_a_broken_tar_is_refused(store: Store, packed: bytes) -> None:
    with pytest.raises(AdapterError, match="no whole tar"), store.stage(from_tar(io.BytesIO(packed))):
        pass


def test_checkpoints_beside_the_adapter_are_passed_over(store: Store) -> None:
    files = {CONFIG: b"{}", WEIGHTS: b"one"}
    members: dict[str, bytes | tarfile.TarInfo] = {f"lint/{name}": content for name, content in files.items()}
    with store.stage(from_tar(tar_of({**members, f"lint/checkpoint-1/{WEIGHTS}": b"old"}))) as staged:
        store.install("lint", staged)
    assert (store.generation("lint", staged.digest) / WEIGHTS).read_bytes() == b"one"
