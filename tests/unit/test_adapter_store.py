"""Generations: whole, immutable, found by their content."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from adapter_files import tar_of
from function_gemma.adapters import source
from function_gemma.adapters.errors import AdapterError, RefusedError
from function_gemma.adapters.files import FILES
from function_gemma.adapters.source import from_directory, from_tar
from function_gemma.adapters.store import Store, check_name, digest_of

CONFIG, WEIGHTS = FILES

MakeAdapter = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    root = tmp_path / "store"
    root.mkdir()
    return Store(root)


def install(store: Store, path: Path, name: str = "lint") -> str:
    with store.staging() as area:
        copy = stage(store, from_directory(path), area)
        digest = digest_of(copy)
        store.install(name, digest, copy)
    return digest


def stage(store: Store, files: Iterable[tuple[str, Iterable[bytes]]], area: Path) -> Path:
    copy = area / "copy"
    copy.mkdir()
    store.copy(files, copy)
    return copy


def names_below(path: Path) -> set[str]:
    return {str(one.relative_to(path)) for one in path.rglob("*")}


def files_of(name: str, *digests: str) -> set[str]:
    generations = {f"{name}/{digest}" for digest in digests}
    return {name, *generations, *(f"{one}/{file}" for one in generations for file in FILES)}


def test_a_generation_holds_what_vllm_reads_and_nothing_else(store: Store, adapter: MakeAdapter) -> None:
    digest = install(store, adapter())
    assert names_below(store.root) == files_of("lint", digest)


def test_the_digest_is_of_the_content_alone(store: Store, adapter: MakeAdapter) -> None:
    one, two, other = adapter("one"), adapter("one", "copy"), adapter("two")
    (two / "README.md").write_text("other prose")
    assert install(store, one) == install(store, two)
    assert install(store, one) != install(store, other)


def test_a_tar_and_its_directory_are_the_same_generation(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    for arguments in (["-C", str(path.parent), "lint"], ["-C", str(path), "."], ["-z", "-C", str(path), "."]):
        packed = subprocess.run(["tar", "-c", *arguments], check=True, capture_output=True).stdout
        with store.staging() as area:
            assert digest_of(stage(store, from_tar(io.BytesIO(packed)), area)) == digest_of(path)


def test_a_second_install_of_the_same_content_is_not_new(store: Store, adapter: MakeAdapter) -> None:
    path, digest = adapter(), digest_of(adapter("one", "same"))
    for is_new in (True, False):
        with store.staging() as area:
            assert store.install("lint", digest, stage(store, from_directory(path), area)) is is_new


def test_the_files_of_a_generation_are_read_only(store: Store, adapter: MakeAdapter) -> None:
    path = store.generation("lint", install(store, adapter()))
    assert {(path / file).stat().st_mode & 0o777 for file in (CONFIG, WEIGHTS)} == {0o444}


def test_a_new_install_mends_a_changed_generation(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    digest = install(store, path)
    generation = store.generation("lint", digest)
    for spoil in ("rm", "truncate --size=9"):
        subprocess.run([*spoil.split(), generation / WEIGHTS], check=True)
        install(store, path)
        assert digest_of(generation) == digest


def test_what_is_no_adapter_is_refused_and_leaves_nothing(store: Store, adapter: MakeAdapter) -> None:
    path = adapter()
    (path / WEIGHTS).unlink()
    with (
        pytest.raises(RefusedError, match=r"no adapter_model\.safetensors"),
        store.staging() as area,
    ):
        stage(store, from_directory(path), area)
    assert names_below(store.root) == set()


def test_what_a_killed_manager_left_is_cleared_away(store: Store, adapter: MakeAdapter) -> None:
    left = store.root / ".staging" / "half"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_text("half")
    digest = install(store, adapter())
    assert names_below(store.root) == files_of("lint", digest)


def test_prune_leaves_what_is_kept_and_removes_the_rest(store: Store, adapter: MakeAdapter) -> None:
    one, two = install(store, adapter("one")), install(store, adapter("two"))
    other = install(store, adapter("one", "x"), "docstring")
    assert store.prune({"lint": {one}}, ["lint"]) == [("lint", two)]
    assert names_below(store.root) == files_of("lint", one) | files_of("docstring", other)
    assert sorted(store.prune({})) == [("docstring", other), ("lint", one)]
    assert names_below(store.root) == set()


def test_prune_leaves_what_a_process_has_loaded_until_it_ends(store: Store, adapter: MakeAdapter) -> None:
    digest = install(store, adapter())
    hold = "import sys; from pathlib import Path; from function_gemma.adapters.store import Store\n"
    hold += "Store(Path(sys.argv[1])).hold('lint', sys.argv[2]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, store.root, digest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(Path(source.__file__).parents[2])},
    ) as vllm:
        assert vllm.stdout
        vllm.stdout.readline()
        assert store.prune({}) == []
        vllm.kill()
    assert store.prune({}) == [("lint", digest)]


@pytest.mark.parametrize("name", ["lint", "0", "sample_data-2", "a" * 63])
def test_a_plain_name_is_taken(name: str) -> None:
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


def test_a_tar_larger_than_the_bound_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_BYTES", 10)
    packed = tar_of({f"lint/{CONFIG}": b"12345", "lint/optimizer.pt": b"678901"})
    with pytest.raises(AdapterError, match="GiB in the tar"), store.staging() as area:
        stage(store, from_tar(io.BytesIO(packed)), area)


def test_checkpoints_beside_the_adapter_are_passed_over(store: Store) -> None:
    packed = tar_of(
        {f"lint/{CONFIG}": b"{}", f"lint/{WEIGHTS}": b"one", f"lint/checkpoint-1/{WEIGHTS}": b"old"}
    )
    with store.staging() as area:
        assert (stage(store, from_tar(io.BytesIO(packed)), area) / WEIGHTS).read_bytes() == b"one"
