"""site.yml and uninstall.yml on a bare host and back again; then where a Docker with a container was before.

The tests build on each other, for a site.yml on a bare host takes minutes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import (
    ANSWERS,
    BASE,
    CHECKOUT,
    NODE,
    PROMPT,
    Done,
    ask,
    away,
    bare_host,
    call,
    changes,
    forget,
    headscale,
    inventory_with,
    lab_up,
    playbook,
)

NAME = "lab-uninstall"
ADDRESS = "10.77.0.22"
VOLUMES = "/var/lib/docker/volumes"
KEPT = [f"{NODE}_{name}" for name in ("models-adapters", "models-base", "models-cache", "tailscale-state")]
# All that site.yml could have brought or changed, but for the data, and the links that apt leaves of a
# package that it removes.
LOOK = r"""
dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\n' | grep ^installed
apt-mark showhold
find /etc/apt /etc/systemd/system -not -type d | grep -vE '/(docker|containerd)[.]'
find /opt /usr/local/share/ca-certificates
cat /etc/docker/daemon.json
systemctl list-units --all --plain --no-legend '*function-gemma*'
ps -eo args | grep -E '[u]pdate\.sh|[h]eal\.sh|[v]llm|[h]aproxy|[t]ailscaled'
"""
# A container of somebody else's, made of what is there, without a restart policy.
FOREIGN = r"""
set -e -o pipefail
apt-get install --yes --no-install-recommends docker.io docker-cli docker-compose docker-buildx
mkdir -p /etc/docker
echo '{"max-concurrent-downloads":5}' >/etc/docker/daemon.json
systemctl restart docker
libraries=$(ldd /bin/sh /bin/sleep | grep -o '/lib[^ ]* (' | tr -d '( ' | sort -u)
tar -chf - /bin/sh /bin/sleep $libraries | docker import - web:1
docker run --detach --name web --volume web:/web web:1 /bin/sh -c 'echo mine >/web/file; exec sleep infinity'
"""
THEIRS = """
docker inspect -f '{{.State.Status}} {{.State.StartedAt}}' web
docker ps -aq; docker volume ls -q; docker image ls -q
"""
MANIFEST = "docker exec vllm-gemma adapter_manager.py list --json"


def inside(command: str, *, ok: bool | None = True, seconds: float = 180) -> Done:
    """Run a shell command on the host."""
    return call("docker", "exec", NAME, "bash", "-c", command, ok=ok, seconds=seconds)


def look() -> set[str]:
    """What LOOK says, a line each."""
    return set(inside(LOOK, ok=None).stdout.splitlines())


def volumes() -> list[str]:
    """The engine's volumes, be it there or not."""
    return inside(f"cd {VOLUMES} 2>/dev/null && ls -d */ | tr -d /", ok=None).stdout.split()


def address() -> str:
    """The node's address in the tailnet."""
    return inside("docker exec tailscale-vllm tailscale ip -4").last


def digests() -> dict[str, str]:
    """What is served, by name."""
    return {one["name"]: one["digest"] for one in json.loads(inside(MANIFEST).stdout)["adapters"]}


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's inventory with the host that comes and goes."""
    return inventory_with(NAME, tmp_path_factory.mktemp("inventory"))


@pytest.fixture(scope="module", autouse=True)
def before(inventory: Path) -> Iterator[set[str]]:
    """The bare host, and what was on it before site.yml."""
    lab_up()
    playbook("site.yml", seconds=900)
    with bare_host(NAME, ADDRESS):
        inside("apt-get update")
        found = look()
        site(inventory)
        yield found


def site(inventory: Path, *words: str) -> Done:
    """Run site.yml on the host."""
    return playbook("site.yml", "-i", str(inventory), *words, seconds=900)


def uninstall(inventory: Path, *words: str, ok: bool = True) -> Done:
    """Run the playbook on the host."""
    return playbook("playbooks/uninstall.yml", "-i", str(inventory), *words, ok=ok)


def answers() -> None:
    """Check that base model and adapters answer over the tailnet."""
    for model, who in ((BASE, "base"), ("lint", "lint"), ("docstring", "docstring")):
        assert ask(model) == ANSWERS[PROMPT][who]


def test_the_plan_names_what_goes_and_changes_nothing(inventory: Path) -> None:
    running = inside("docker ps --no-trunc -q").stdout
    plan = uninstall(inventory, "--check", "--diff", "-e", "uninstall_data=purge")
    assert changes(plan) > 0
    for named in (
        "function-gemma-heal.timer",
        "vllm-gemma",
        "haproxy:3.0.11",
        KEPT[0],
        CHECKOUT,
        "docker.io",
    ):
        assert named in plan.words, str(plan)
    assert inside("docker ps --no-trunc -q").stdout == running


def test_work_that_is_nowhere_else_is_refused_before_anything_changes(inventory: Path) -> None:
    inside(f"cd {CHECKOUT} && git -c user.name=n -c user.email=n commit --allow-empty -m mine")
    try:
        refused = uninstall(inventory, ok=False)
    finally:
        inside(f"git -C {CHECKOUT} reset --quiet --hard @{{upstream}}")
    assert "has what is nowhere else, commits on no remote" in refused.words
    assert "uninstall_force=true" in refused.words
    assert changes(refused) == 0
    answers()


def test_what_is_kept_serves_again_as_the_same_node_without_a_download(
    inventory: Path, before: set[str]
) -> None:
    known, served = address(), digests()
    marks = f"stat -c '%n %i %Y' $(find {VOLUMES} -name .complete)"
    model = inside(marks).stdout
    # An update that is at work: it waits for the lock.
    inside(f"cd {CHECKOUT}/server && flock .lock setsid ./update.sh --no-pull >/dev/null 2>&1 &")
    run = uninstall(inventory)
    assert f"{VOLUMES}/{KEPT[0]}" in run.words
    assert look() ^ before == set()
    assert volumes() == KEPT
    again = uninstall(inventory)
    assert changes(again) == 0, str(again)
    back = site(inventory, "-e", "tailscale_authkey=")  # the node has joined, and needs no key
    assert "lint: none" not in back.words
    assert (address(), digests(), inside(marks).stdout) == (known, served, model)
    answers()


def test_purge_leaves_the_host_bare_and_the_node_logged_out(inventory: Path, before: set[str]) -> None:
    run = uninstall(inventory, "-e", "uninstall_data=purge")
    assert "the node has logged out: the control plane still lists it as function-gemma-server" in run.words
    (node,) = [one for one in headscale("nodes list") if one["given_name"] == NODE]
    assert node["expiry"]
    assert not node.get("online")
    assert look() ^ before == set()
    # /var/lib/docker is a file system of its own here.
    left = "find /var/lib/docker /var/lib/containerd /var/lib/function-gemma-*"
    assert inside(left, ok=None).stdout.split() == ["/var/lib/docker"]
    again = uninstall(inventory, "-e", "uninstall_data=purge")
    assert changes(again) == 0, str(again)
    assert "nothing of function-gemma-server is left" in again.words
    forget()


def test_a_docker_that_was_there_before_stays_with_its_container(inventory: Path) -> None:
    inside(FOREIGN, seconds=300)
    before = look()
    theirs = inside(THEIRS).stdout
    site(inventory)
    answers()
    with away("lab-headscale"):
        run = uninstall(inventory, "-e", "uninstall_data=purge")
    assert "the node has not logged out" in run.words
    assert look() ^ before == set()
    assert inside(THEIRS).stdout == theirs
    again = uninstall(inventory, "-e", "uninstall_data=purge")
    assert changes(again) == 0, str(again)
