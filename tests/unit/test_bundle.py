"""A bundle on the controller: what is refused before anything changes, what is sent, what is fetched."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from bundle import (
    bundle_damage,
    bundle_lacks,
    bundle_leftovers,
    bundle_manifest,
    bundle_new,
    bundle_problems,
    bundle_question,
    bundle_room,
    bundle_with,
)
from lora import lora_plan

from function_gemma.adapters.store import digest_of

ADDRESS = f"hf://lab/docstring-lora@{'0123456789' * 4}"
MODEL = "google/gemma@main"
RELEASE = "a" * 40
SYSTEM = {"os": "debian", "release": "13", "architecture": "amd64"}
CODE = b"echo one\n"
FILES = {
    "code": "code.bundle",
    "packages": "packages.tar",
    "image": "images/vllm.tar.gz",
    "model": "model.tar",
    "adapter": "adapters/docstring/adapter_config.json",
}


def survey() -> dict[str, Any]:
    """What collect.py says of a host that serves."""
    names = {"image": "vllm-gemma:1", "adapter": "docstring"}
    parts = [{"kind": kind, "name": names.get(kind, kind), "identity": "1", "bytes": 10} for kind in FILES]
    parts[1]["roots"] = {"docker": ["docker.io"], "tools": ["git"]}
    parts[4]["source"] = ADDRESS
    return {
        "release": RELEASE,
        "refs": {"main": RELEASE, "v1": "b" * 40},
        "server": {"server/update.sh": hashlib.sha1(b"blob 9\0" + CODE, usedforsecurity=False).hexdigest()},
        "system": SYSTEM,
        "model": MODEL,
        "parts": parts,
        "free": 1 << 40,
    }


def collect(path: Path, part: dict[str, Any], content: bytes = b"content") -> dict[str, Any]:
    """Do what part.yml does with one part."""
    name = FILES[part["kind"]]
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
    files = {name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}
    key = f"{part['kind']} {part['name']} {part['identity']}"
    manifest = bundle_with(str(path), survey(), {key: files})
    (path / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle in `bundle`, beside the checkout that it is of."""
    bundle = tmp_path / "bundle"
    for part in survey()["parts"]:
        collect(bundle, part)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "update.sh").write_bytes(CODE)
    return bundle


def problems(path: Path, model: str = MODEL, version: str = "main") -> list[str]:
    return bundle_problems(str(path), str(path.parent), model=model, version=version)


def host(**other: Any) -> dict[str, Any]:  # noqa: ANN401 (as in look.py's JSON)
    """What look.py says of a host that has everything."""
    nothing = {"images": [], "packages": [], "model": False, "release": RELEASE}
    return {"system": SYSTEM, "free": 1 << 40, **nothing, **other}


def test_a_whole_bundle_has_no_problem(path: Path) -> None:
    assert problems(path) == []
    assert bundle_damage(str(path), bundle_manifest(str(path))["parts"], host()) == []


def test_a_release_is_named_by_its_branch_its_tag_or_its_commit(path: Path) -> None:
    assert problems(path, version=RELEASE) == []
    (problem,) = problems(path, version="v1")
    assert f"has the release {RELEASE}, which is not checkout_version v1" in problem
    assert f"set that to one of main, {RELEASE}" in problem


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "nowhere")
    assert "is no bundle, it has no manifest.json: correct the path, or `make bundle`" in problem


def test_a_collection_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    collect(tmp_path, survey()["parts"][0])
    (problem,) = problems(tmp_path)
    assert "is not complete, its collection was cut short" in problem


def test_missing_and_shortened_files_are_named(path: Path) -> None:
    (path / FILES["model"]).unlink()
    (path / FILES["image"]).write_bytes(b"con")
    shortened, missing = problems(path)
    assert shortened.startswith(f"images/vllm.tar.gz of the bundle {path} has 3 bytes instead of 7")
    assert missing.startswith(f"model.tar of the bundle {path} is missing: copy it anew")


def test_playbooks_of_another_release_are_refused(path: Path) -> None:
    (path.parent / "server" / "update.sh").write_text("echo two\n")
    (problem,) = problems(path)
    assert (
        "is of another release than these playbooks, 1 files differ, server/update.sh among them" in problem
    )
    assert f"`git checkout {RELEASE}` here" in problem


def test_another_model_is_refused(path: Path) -> None:
    (problem,) = problems(path, model="google/other@main")
    assert f"has the model {MODEL}, and google/other@main is declared" in problem


@pytest.mark.parametrize("other", [{"architecture": "arm64"}, {"release": "12"}, {"os": "ubuntu"}])
def test_a_bundle_of_another_system_is_refused(path: Path, other: dict[str, str]) -> None:
    (problem,) = bundle_damage(str(path), [], host(system=SYSTEM | other))
    assert "is for debian 13 on amd64, and this host is " in problem


def test_damage_is_found_in_what_would_be_sent_alone(path: Path) -> None:
    (path / FILES["image"]).write_bytes(b"CONTENT")  # as long as it was
    manifest = bundle_manifest(str(path))
    lacks = bundle_lacks(manifest, host(images=["vllm-gemma:1"]))
    (problem,) = bundle_damage(str(path), lacks, host())
    assert problem.startswith(f"images/vllm.tar.gz of the bundle {path} is damaged")
    assert bundle_damage(str(path), [], host()) == []


def test_a_host_without_room_is_refused_with_both_sizes(path: Path) -> None:
    lacks = bundle_lacks(bundle_manifest(str(path)), host(images=["vllm-gemma:1"]))
    (problem,) = bundle_damage(str(path), lacks, host(free=20))
    assert "0.0 MiB are free in /var/lib, and what the bundle brings needs 0.0 MiB" in problem


def test_a_host_gets_what_it_lacks_in_the_order_of_installation(path: Path) -> None:
    manifest = bundle_manifest(str(path))
    assert bundle_lacks(manifest, host()) == []
    all_of_it = host(packages=["git"], images=["vllm-gemma:1"], model=True, release="")
    assert [part["kind"] for part in bundle_lacks(manifest, all_of_it)] == [
        "packages",
        "image",
        "model",
        "code",
    ]


def test_the_host_is_asked_for_images_packages_and_model(path: Path) -> None:
    assert bundle_question(bundle_manifest(str(path))) == {
        "images": ["vllm-gemma:1"],
        "packages": {"docker": ["docker.io"], "tools": ["git"]},
        "model": MODEL,
    }


def test_only_what_is_new_or_lost_is_fetched_again(path: Path) -> None:
    assert bundle_new(str(path), survey()) == []
    (path / FILES["model"]).unlink()
    (path / FILES["packages"]).write_bytes(b"con")  # cut short while it was fetched
    now = survey()
    now["parts"][2]["identity"] = "2"
    assert [part["kind"] for part in bundle_new(str(path), now)] == ["packages", "image", "model"]


def test_what_is_done_is_noted_part_by_part(tmp_path: Path) -> None:
    parts = survey()["parts"]
    assert [collect(tmp_path, part)["complete"] for part in parts] == [False, False, False, False, True]
    assert [part["kind"] for part in bundle_manifest(str(tmp_path))["parts"]] == list(FILES)


def test_files_of_former_parts_are_leftovers(path: Path) -> None:
    (path / "images" / "old.tar.gz").write_bytes(b"old")
    assert bundle_leftovers(str(path), bundle_manifest(str(path))) == [str(path / "images" / "old.tar.gz")]


def test_too_little_room_is_refused_with_the_sizes(tmp_path: Path) -> None:
    now = survey()
    now["parts"][3]["bytes"] = 1 << 60
    here, there = bundle_room(str(tmp_path / "bundle"), now)
    assert f"are free in {tmp_path} on this machine and the bundle may take 1073741824.0 GiB" in here
    assert "1024.0 GiB are free in /var/lib on the host, and its largest part takes 1073741824.0 GiB" in there


def test_an_adapter_of_the_hub_is_taken_from_the_bundle(path: Path) -> None:
    directory = path / "adapters" / "docstring"
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    declared = [{"name": "docstring", "source": ADDRESS}]

    def plan(*served: dict[str, Any]) -> list[Any]:
        arguments: dict[str, Any] = {"only": (), "state": "present", "rollback": False, "bundle": str(path)}
        return list(lora_plan(declared, served, "/inventory", **arguments))

    (step,) = plan()
    assert step["command"] == ["load", "docstring", "-"]
    assert step["directory"] == str(directory)
    one: dict[str, Any] = {"name": "docstring", "quarantined": None, "generations": []}
    assert plan({**one, "serves": digest_of(directory), "source": None}) == []
    assert plan({**one, "serves": "c" * 12, "source": ADDRESS}) == []  # fetched when there was a way out
