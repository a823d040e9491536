"""The manifest: whole at any time, and no id twice."""

import json
import threading
from pathlib import Path

import pytest

from function_gemma.adapters.errors import StoreError
from function_gemma.adapters.manifest import Entry, Manifest, edit

A, B = "a" * 12, "b" * 12


def digests(manifest: Manifest) -> list[str]:
    return [one.digest for one in manifest.adapters["lint"].generations]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    with edit(tmp_path) as manifest:
        manifest.take_ids(3)
        manifest.serve("lint", A, 2, "hf://lab/lint@0")
    assert Manifest.read(tmp_path) == manifest
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert data["adapters"]["lint"]["generations"][0]["since"].endswith("+00:00")
    del data["adapters"]["lint"]["generations"][0]["since"]
    assert data == {
        "version": 2,
        "next_id": 4,
        "adapters": {
            "lint": {
                "serves": A,
                "generations": [{"digest": A, "id": 2, "source": "hf://lab/lint@0"}],
                "quarantined": None,
            }
        },
    }


def test_history_keeps_what_served_before_each_once_and_not_without_bound(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    for number, digest in enumerate(("a", "b", "c", "a")):
        manifest.serve("lint", digest, number, None)
    assert digests(manifest) == ["b", "c", "a"]
    assert manifest.adapters["lint"].before == ["b", "c"]
    for number in range(30):
        manifest.serve("lint", str(number), number, None)
    assert digests(manifest) == [str(number) for number in range(10, 30)]


def test_what_serves_and_the_latest_before_it_are_kept(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    for digest in "abcd":
        manifest.serve("lint", digest, 1, None)
    assert manifest.adapters["lint"].kept(2) == {"b", "c", "d"}
    assert manifest.adapters["lint"].kept(0) == {"d"}
    manifest.unload("lint")
    assert manifest.adapters["lint"].kept(2) == {"c", "d"}
    assert manifest.adapters["lint"].serving is None


def test_a_start_notes_the_id_and_why_something_was_quarantined(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    manifest.serve("lint", A, 1, None)
    manifest.start("lint", A, 7, "rotten")
    entry = manifest.adapters["lint"]
    assert (entry.serves, entry.serving and entry.serving.id, entry.quarantined) == (A, 7, "rotten")
    manifest.serve("lint", B, 8, None)
    assert manifest.adapters["lint"].quarantined is None


def test_the_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({"version": 1, "next_id": 9, "adapters": {"lint": {"digest": B, "history": [A]}}})
    )
    manifest = Manifest.read(tmp_path)
    assert (manifest.next_id, manifest.adapters["lint"].serves, digests(manifest)) == (9, B, [A, B])


def test_ids_are_handed_out_once_over_restarts(tmp_path: Path) -> None:
    seen: list[int] = []
    for count in (2, 1, 3):
        with edit(tmp_path) as manifest:
            seen += manifest.take_ids(count)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_ids_are_handed_out_once_among_processes_at_the_same_time(tmp_path: Path) -> None:
    seen: list[int] = []

    def take() -> None:
        for _ in range(20):
            with edit(tmp_path) as manifest:
                seen.extend(manifest.take_ids(1))

    threads = [threading.Thread(target=take) for _ in range(3)]  # each opens the lock anew, as a process does
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [*range(1, 61)]


def test_ids_start_above_those_that_others_gave(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json", next_id=2)
    assert [*manifest.take_ids(1, above=7), *manifest.take_ids(1, above=7)] == [8, 9]


def test_ids_stay_below_what_vllm_can_hold(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json", next_id=2**31 - 2)
    manifest.take_ids(1)
    with pytest.raises(StoreError, match="used up"):
        manifest.take_ids(2)
    assert [*manifest.take_ids(1)] == [2**31 - 1]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "null", "{", '{"version": 2}', '{"version": 2, "next_id": 1, "adapters": {"a": "b"}}'),
        '{"version": 2, "next_id": 1, "adapters": {"a": {"serves": "b"}}}',
        '{"version": 1, "next_id": 1, "adapters": {"a": "b"}}',
    ],
)
def test_a_damaged_manifest_is_told_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(StoreError, match="restore it"):
        Manifest.read(tmp_path)
    with pytest.raises(StoreError, match="restore it"), edit(tmp_path):
        pass
    assert path.read_text() == content


def test_a_manifest_of_a_later_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 3, "next_id": 1, "adapters": {}}')
    with pytest.raises(StoreError, match="has version 3"):
        Manifest.read(tmp_path)


def test_a_change_that_fails_leaves_the_old_manifest(tmp_path: Path) -> None:
    with edit(tmp_path) as manifest:
        manifest.serve("lint", A, 1, None)
    before = manifest.adapters
    with pytest.raises(KeyError), edit(tmp_path) as manifest:
        manifest.adapters |= {"docstring": manifest.adapters["nobody"]}
    (tmp_path / "manifest.json.new").mkdir()
    with pytest.raises(StoreError, match="nothing was changed"), edit(tmp_path) as manifest:
        manifest.take_ids(1)
    assert Manifest.read(tmp_path).adapters == before


def test_an_unloaded_name_can_be_read(tmp_path: Path) -> None:
    with edit(tmp_path) as manifest:
        manifest.serve("lint", A, 1, None)
    with edit(tmp_path) as manifest:
        manifest.unload("lint")
    assert Manifest.read(tmp_path).adapters["lint"] == Entry(None, manifest.adapters["lint"].generations)
