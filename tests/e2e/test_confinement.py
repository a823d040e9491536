"""What each container may, as Docker says, and not as the compose files do."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from stack import CHECKOUT, host, inspect

GIB, MIB = 2**30, 2**20
SERVER = f"{CHECKOUT}/server"


@dataclass(frozen=True)
class Confined:
    """How a container differs from the others: whose user, what it has of the host, how much it may take."""

    user: str
    network: str
    pids: int | None = None
    memory: int = 0
    capabilities: set[str] = field(default_factory=set)
    devices: set[str] = field(default_factory=set)
    host: set[str] = field(default_factory=set)


CONTAINERS = {
    "function-gemma-pod": Confined("65534:65534", "bridge", 32, 64 * MIB),
    "tailscale-vllm": Confined(
        "",  # root: Tailscale SSH
        "pod",
        1024,
        2 * GIB,
        {
            "CAP_SETGID",
            "CAP_DAC_OVERRIDE",
            "CAP_NET_ADMIN",
            "CAP_NET_RAW",
        },  # the last two in kernel mode alone
        {"/dev/net/tun"},
        {"/var/run/docker.sock rw", f"{CHECKOUT} rw", f"{SERVER}/secrets/tailscale ro"},
    ),
    "gateway-gemma": Confined("10002:10000", "pod", 64, GIB, host={f"{SERVER}/haproxy ro"}),
    "vllm-gemma": Confined(
        "10001:10000", "pod", host={f"{CHECKOUT}/agents ro", f"{SERVER}/secrets/huggingface ro"}
    ),
    "agents-gemma": Confined("10003:10000", "none", 256, GIB, host={f"{CHECKOUT}/agents ro"}),
}


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    """What Docker says of each container."""
    return inspect("function-gemma-server")


def test_these_are_all_containers(seen: dict[str, dict[str, Any]]) -> None:
    assert seen.keys() == CONTAINERS.keys()


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_what_it_needs_and_no_more(name: str, seen: dict[str, dict[str, Any]]) -> None:
    one = seen[name]
    may = one["HostConfig"]
    network = may["NetworkMode"].replace(f"container:{seen['function-gemma-pod']['Id']}", "pod")
    capabilities = {f"CAP_{name.removeprefix('CAP_')}" for name in may["CapAdd"] or []}
    mounts = {
        f"{mount['Source']} {'rw' if mount['RW'] else 'ro'}"
        for mount in one["Mounts"]
        if mount["Type"] == "bind"
    }
    assert CONTAINERS[name] == Confined(
        one["Config"]["User"],
        network.replace("function-gemma-server_default", "bridge"),
        may["PidsLimit"] or None,
        may["Memory"],
        capabilities,
        {device["PathOnHost"] for device in may["Devices"] or []},
        mounts,
    )


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_shut_in(name: str, seen: dict[str, dict[str, Any]]) -> None:
    may = seen[name]["HostConfig"]
    assert may["CapDrop"] == ["ALL"]
    assert may["ReadonlyRootfs"] is True
    assert may["SecurityOpt"] == ["no-new-privileges:true"]
    assert may["Privileged"] is False
    assert may["PidMode"] == may["UTSMode"] == may["UsernsMode"] == ""
    assert may["IpcMode"] == "private"
    assert not may["PortBindings"]
    assert not may["DeviceCgroupRules"]
    assert not may["DeviceRequests"]
    assert "/proc/kcore" in may["MaskedPaths"]
    assert "/proc/sys" in may["ReadonlyPaths"]


def test_the_processes_run_as_docker_was_told(seen: dict[str, dict[str, Any]]) -> None:
    """What the kernel says of each container's first process."""
    for name, one in seen.items():
        status = host(f"cat /proc/{one['State']['Pid']}/status").stdout
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        user = CONTAINERS[name].user.partition(":")[0] or "0"
        assert set(fields["Uid"].split()) == {user}, name
        assert fields["NoNewPrivs"] == "1", name
        assert bool(int(fields["CapBnd"], 16)) == bool(CONTAINERS[name].capabilities), name


def test_the_sidecar_alone_has_docker_and_a_secret_has_one_reader() -> None:
    mounted = [(name, mount.split()[0]) for name, one in CONTAINERS.items() for mount in one.host]
    assert [name for name, mount in mounted if mount.endswith("docker.sock")] == ["tailscale-vllm"]
    secrets = [mount for _, mount in mounted if "/secrets/" in mount]
    assert len(secrets) == len(set(secrets))
