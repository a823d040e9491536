"""The manifest: whole at any time, and no id twice."""

import json
from pathlib import Path

import pytest

from function_gemma.adapters.errors import StoreError
from function_gemma.adapters.manifest import Entry, Manifest


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    manifest.take_ids(3)
    manifest.serve("lint", "a" * 12)
    manifest.write()
    assert Manifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "version": 1,
        "next_id": 4,
        "adapters": {"lint": {"digest": "a" * 12, "history": []}},
    }


def test_history_keeps_what_served_before_each_once(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    for digest in ("a", "b", "c", "a"):
        manifest.serve("lint", digest)
    assert manifest.adapters["lint"] == Entry("a", ("b", "c"))


def test_ids_are_handed_out_once_over_restarts(tmp_path: Path) -> None:
    seen: list[int] = []
    for count in (2, 1, 3):
        manifest = Manifest.read(tmp_path)
        seen += manifest.take_ids(count)
        manifest.write()
    assert seen == [1, 2, 3, 4, 5, 6]


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
    ["", "[]", "null", "{", '{"version": 1}', '{"version": 1, "next_id": 1, "adapters": {"a": "b"}}'],
)
def test_a_damaged_manifest_is_told_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(StoreError, match="restore it"):
        Manifest.read(tmp_path)
    assert path.read_text() == content


def test_a_manifest_of_a_later_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 2, "next_id": 1, "adapters": {}}')
    with pytest.raises(StoreError, match="has version 2"):
        Manifest.read(tmp_path)


def test_a_write_that_fails_leaves_the_old_manifest(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    manifest.serve("lint", "a" * 12)
    manifest.write()
    (tmp_path / "manifest.json.new").mkdir()
    manifest.serve("lint", "b" * 12)
    with pytest.raises(StoreError, match="nothing was changed"):
        manifest.write()
    assert Manifest.read(tmp_path).adapters == {"lint": Entry("a" * 12)}
