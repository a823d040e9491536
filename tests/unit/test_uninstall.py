"""What an uninstall takes and leaves, from what git, systemd and Docker say of a host."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import installed
import pytest

PROJECT = "function-gemma-server"
KEPT = [f"{PROJECT}_{name}" for name in ("models-adapters", "tailscale-state")]
SOCKETS = f"{PROJECT}_vllm-run"
Docker = Callable[..., None]


def git(*words: str, at: Path) -> None:
    author = ("-c", "user.name=n", "-c", "user.email=n@example.invalid", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *author, *words], cwd=at, check=True, capture_output=True)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without anything, below a directory."""
    for name in ("STATE", "SENT", "UNITS", "SETTINGS"):
        monkeypatch.setattr(installed, name, tmp_path / name.lower())
    monkeypatch.setattr(installed.Engine, "root", tmp_path / "docker")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(installed, "engine_says", lambda *_: "")
    return tmp_path


@pytest.fixture
def checkout(host: Path) -> Path:
    """A clone as the role checkout leaves it, with what the roles write there."""
    origin, path = host / "origin", host / "checkout"
    (origin / "server").mkdir(parents=True)
    (origin / "inventory").mkdir()
    (origin / "inventory" / "lab").write_text("its hosts\n")
    (origin / ".gitignore").write_text("/server/.env\n/server/secrets/\n/inventory/production/\n")
    (origin / "server" / "Dockerfile").write_text(
        "ARG VLLM_IMAGE=vllm/vllm-openai-cpu:v0\nFROM $VLLM_IMAGE\n"
    )
    (origin / "server" / "docker-compose.yml").write_text("image: ${HAPROXY_IMAGE:-haproxy:3}\n")
    git("init", "-q", "-b", "main", at=origin)
    git("add", "-A", at=origin)
    git("commit", "-q", "-m", "all", at=origin)
    git("clone", "-q", str(origin), str(path), at=host)
    (path / "server" / ".env").write_text("TAILSCALE_IMAGE='tailscale/tailscale:v1'\n")
    return path


@pytest.fixture
def docker(host: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    """Have an engine with the stack; `ours` if the role docker installed it."""

    def have(*, ours: bool = True, foreign: bool = False) -> None:
        label = {"com.docker.compose.project": PROJECT}
        containers: list[dict[str, Any]] = [
            {
                "Name": "/vllm-gemma",
                "Config": {"Labels": label},
                "Image": "sha256:1",
                "Mounts": [{"Name": "anonymous"}],
            },
            {
                "Name": "/helper",
                "Config": {"Labels": {"function-gemma.update": ""}},
                "Image": "sha256:2",
                "Mounts": [],
            },
        ]
        volumes = [*KEPT, SOCKETS, "anonymous"]
        images = [
            "sha256:1 vllm-gemma new",
            "sha256:2 tailscale-vllm new",
            "sha256:3 haproxy 3",
            "sha256:4 <none> <none>",
            "sha256:5 <none> <none>",
        ]
        if foreign:
            containers.append({"Name": "/web", "Config": {"Labels": None}, "Image": "sha256:3", "Mounts": []})
            volumes.append("web")
            images.append("sha256:6 web 1")
        says = {
            "info": str(host / "docker"),
            "ps": "1 2",
            "inspect": json.dumps(containers),
            "network": "1234",
            "volume ls": "\n".join(volumes),
            "volume inspect": f"{KEPT[0]} \n{KEPT[1]} \n{SOCKETS} tmpfs",
            "image ls -q": "sha256:1\nsha256:4",
            "image ls": "\n".join(images),
        }
        monkeypatch.setattr(
            installed,
            "engine_says",
            lambda *words: next(said for start, said in says.items() if " ".join(words).startswith(start)),
        )
        (host / "state" / "docker").mkdir(parents=True)
        record = {"packages": ["docker.io", "containerd"] if ours else []}
        (host / "state" / "docker" / "record.json").write_text(json.dumps(record))

    return have


def survey(host: Path, *, purge: bool = False) -> dict[str, Any]:
    return installed.survey(host / "checkout", "", purge=purge)


def test_on_a_bare_host_there_is_nothing(host: Path) -> None:
    found = survey(host)
    assert (found["lines"], found["problems"], found["work"], found["kept"]) == ([], [], [], [])


def test_keep_leaves_the_volumes_but_those_of_sockets(host: Path, checkout: Path, docker: Docker) -> None:
    docker()
    found = survey(host)
    assert found["containers"] == ["vllm-gemma", "helper"]
    assert found["volumes"] == [SOCKETS]
    assert found["kept"] == [f"{host}/docker/volumes/{name}" for name in KEPT]
    assert found["checkout"] == [str(checkout)]
    assert not any("the engine's data" in line for line in found["lines"])


def test_purge_leaves_no_volume_and_nothing_of_an_engine_of_ours(
    host: Path, checkout: Path, docker: Docker
) -> None:
    docker()
    found = survey(host, purge=True)
    assert checkout.exists()
    assert found["volumes"] == [*KEPT, SOCKETS]
    assert found["roots"] == [f"{host}/docker", "/var/lib/containerd"]
    assert found["lines"][-1] == f"remove the engine's data in {host}/docker, /var/lib/containerd"


def test_images_that_were_built_or_are_named_go_and_those_of_others_stay(
    host: Path, checkout: Path, docker: Docker
) -> None:
    assert installed.bases(checkout / "server") == {
        "vllm/vllm-openai-cpu:v0",
        "haproxy:3",
        "tailscale/tailscale:v1",
    }
    docker()
    assert survey(host)["images"] == ["vllm-gemma:new", "tailscale-vllm:new", "haproxy:3", "sha256:4"]


def test_what_others_have_on_an_engine_of_ours_stays_and_its_data_with_it(
    host: Path, checkout: Path, docker: Docker
) -> None:
    docker(foreign=True)
    found = survey(host, purge=True)
    assert checkout.exists()
    assert "haproxy:3" not in found["images"]  # the container web runs on it
    assert found["others"] == ["the container web", "the volume web", "the image web:1"]
    assert found["roots"] == []


def test_an_engine_that_was_there_keeps_its_data(host: Path, checkout: Path, docker: Docker) -> None:
    docker(ours=False)
    found = survey(host, purge=True)
    assert checkout.exists()
    assert (found["engine"], found["roots"], found["volumes"]) == ("theirs", [], [*KEPT, SOCKETS])


def test_after_keep_took_the_engine_purge_finds_what_it_left(host: Path) -> None:
    for name in KEPT:
        (host / "docker" / "volumes" / name / "_data").mkdir(parents=True)
    (host / "state").mkdir()
    (host / "state" / "data.json").write_text(json.dumps({"directories": [f"{host}/docker", f"{host}/gone"]}))
    kept, purged = survey(host), survey(host, purge=True)
    assert (kept["lines"], len(kept["kept"])) == ([], 2)
    assert (purged["volumes"], purged["roots"], purged["state"]) == (KEPT, [f"{host}/docker"], True)


def test_a_data_root_in_which_another_has_put_something_since_stays(host: Path) -> None:
    for name in (KEPT[0], "web"):
        (host / "docker" / "volumes" / name / "_data").mkdir(parents=True)
    (host / "state").mkdir()
    (host / "state" / "data.json").write_text(json.dumps({"directories": [f"{host}/docker"]}))
    found = survey(host, purge=True)
    assert (found["volumes"], found["roots"], found["others"]) == ([KEPT[0]], [], ["the volume web"])


def test_an_engine_that_does_not_answer_is_refused(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/sbin/dockerd")
    (problem,) = survey(host)["problems"]
    assert "systemctl start docker" in problem


def test_a_clean_checkout_has_no_work_in_it(host: Path, checkout: Path) -> None:
    assert (checkout / "server" / ".env").exists()
    assert survey(host)["work"] == []


def changed_file(path: Path) -> None:
    (path / "server" / "Dockerfile").write_text("FROM scratch\n")


def new_file(path: Path) -> None:
    (path / "note").write_text("mine\n")


def an_inventory(path: Path) -> None:
    (path / "inventory" / "production").mkdir(parents=True)
    (path / "inventory" / "production" / "vault.yml").write_text("x\n")


def stashed(path: Path) -> None:
    changed_file(path)
    git("stash", at=path)


def a_commit_beside_the_branch(path: Path) -> None:
    git("checkout", "-q", "--detach", at=path)
    git("commit", "-q", "--allow-empty", "-m", "mine", at=path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_file, "server/Dockerfile"),
        (new_file, "note"),
        (an_inventory, "inventory/production/"),
        (stashed, "commits on no remote"),
        (a_commit_beside_the_branch, "commits on no remote"),
        (lambda path: (path / ".git" / "HEAD").write_text("broken"), "what git cannot tell"),
    ],
    ids=["changed", "new", "inventory", "stash", "commit", "broken"],
)
def test_work_that_is_nowhere_else_is_found(
    host: Path, checkout: Path, change: Callable[[Path], object], says: str
) -> None:
    change(checkout)
    (work,) = survey(host)["work"]
    assert says in work


def test_a_path_that_is_no_checkout_is_never_removed(host: Path) -> None:
    (host / "checkout" / "mine").mkdir(parents=True)
    (problem,) = survey(host)["problems"]
    assert "no checkout of this project" in problem
