"""`make bundle` from the lab's host, then a bare host that site.yml sets up from it with its network cut."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import common as lab
from stack import (
    ANSWERS,
    BASE,
    NODE,
    PROMPT,
    Done,
    answers,
    ask,
    bare_host,
    call,
    changes,
    inventory_with,
    lab_up,
    laptop,
    playbook,
)

NAME = "lab-offline"
ADDRESS = "10.77.0.21"
# What a host without internet does not reach; the control plane is in its LAN.
AWAY = (lab.REGISTRY, lab.FORGE, lab.HUB, lab.APT)


def collect(path: Path) -> Done:
    """Run what `make bundle` runs."""
    return playbook("playbooks/bundle.yml", "-e", f"bundle_path={path}", seconds=900)


def files(bundle: Path) -> dict[str, int]:
    """When each file of the bundle was written."""
    return {str(path): path.stat().st_mtime_ns for path in bundle.rglob("*") if path.suffix != ".json"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle of what the lab's host serves."""
    lab_up()
    playbook("site.yml", seconds=900)
    answers()
    path = tmp_path_factory.mktemp("bundle")
    collect(path)
    yield path
    shutil.rmtree(path)  # a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="module")
def inventory(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's inventory with another host, which has a bundle."""
    return inventory_with(NAME, tmp_path_factory.mktemp("inventory"), bundle_path=str(bundle))


@pytest.fixture(scope="module")
def site(inventory: Path) -> Iterator[Done]:
    """The run of site.yml on a bare host that reaches nothing but its LAN; the lab's host lends its name."""
    with bare_host(NAME, ADDRESS):
        cut = ["ip route delete default", *(f"ip route add unreachable {address}" for address in AWAY)]
        call("docker", "exec", NAME, "sh", "-ec", "; ".join(cut))
        yield run(inventory)


def run(inventory: Path, *, ok: bool = True) -> Done:
    """Run site.yml on the host without internet."""
    return playbook("site.yml", "-i", str(inventory), ok=ok, seconds=900)


def inside(command: str, *, ok: bool | None = True) -> Done:
    """Run a shell command on the host without internet."""
    return call("docker", "exec", NAME, "sh", "-c", command, ok=ok)


def test_a_bundle_is_complete_and_a_second_collection_fetches_nothing(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["complete"]
    kinds = [part["kind"] for part in manifest["parts"]]
    assert kinds == ["code", "packages", "image", "image", "image", "model", "adapter", "adapter"]
    before = files(bundle)
    again = collect(bundle)
    assert changes(again) == 0, str(again)
    assert files(bundle) == before


def test_a_host_without_internet_serves_from_a_bundle(site: Done) -> None:
    for address in ("192.0.2.1", *AWAY):
        inside(f"ip route get {address}", ok=False)
    assert f"SUCCESS: {BASE} answered: " in site.words
    # Over the tailnet, of that very host.
    there = inside("docker exec tailscale-vllm tailscale ip -4").last
    assert laptop(f"getent ahostsv4 {NODE}").stdout.split()[0] == there
    assert ask(BASE) == ANSWERS[PROMPT]["base"]


@pytest.mark.parametrize("adapter", ["lint", "docstring"])
def test_an_adapter_comes_from_the_bundle_be_it_of_the_hub(site: Done, adapter: str) -> None:
    assert f"{adapter}: none → " in site.words
    assert ask(adapter) == ANSWERS[PROMPT][adapter]


def test_nothing_is_built_and_the_host_has_the_release_of_the_bundle(site: Done, bundle: Path) -> None:
    assert "update.sh: build: " not in site.words
    release = json.loads((bundle / "manifest.json").read_text())["release"]
    assert inside("git -C /opt/function-gemma-server rev-parse HEAD").last == release


def test_what_was_sent_is_removed_and_apt_has_its_own_sources(site: Done) -> None:
    assert site.code == 0
    assert inside("ls /var/lib/function-gemma-server/bundle", ok=False)
    assert "function-gemma" not in inside("grep -r . /etc/apt/sources.list* || true").stdout


def test_a_second_site_sends_and_changes_nothing(site: Done, inventory: Path) -> None:
    assert site.code == 0
    again = run(inventory)
    assert changes(again) == 0, str(again)
    assert "SUCCESS: " in again.words


@pytest.mark.parametrize(
    "damage",
    [
        ("adapters/lint/adapter_config.json", None, "is missing: copy it anew"),
        ("adapters/lint/adapter_config.json", "flip", "is damaged, its SHA-256 is another"),
        ("model.tar", "cut", "bytes instead of"),
    ],
)
def test_a_damaged_bundle_is_refused_before_anything_changes(
    site: Done, inventory: Path, bundle: Path, damage: tuple[str, str | None, str]
) -> None:
    assert site.code == 0
    name, content, says = damage
    path, kept = bundle / name, bundle / "kept"
    path.rename(kept)
    good = kept.read_bytes()
    try:
        if content:
            path.write_bytes(good[:-1] + (b"?" if content == "flip" else b""))
        refused = run(inventory, ok=False)
    finally:
        kept.rename(path)
    assert f"{name} of the bundle {bundle} " in refused.words
    assert says in refused.words
    assert "Nothing has changed." in refused.words
    assert changes(refused) == 0
