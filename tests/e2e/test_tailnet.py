"""The node as the tailnet has it."""

import json

import pytest

from stack import CHECKOUT, address, answers, headscale, host, laptop, node, reaches, until

OTHERS = {21, 25, 53, 80, 443, 2375, 2376, 5000, 8001, 8080, 9002, 9090, 29500}


@pytest.mark.usefixtures("settings")
def test_an_expired_key_does_not_lock_out_a_node_that_has_its_state() -> None:
    before = address()
    made = headscale("preauthkeys create --tags tag:inference")
    host(f"cat >{CHECKOUT}/server/secrets/tailscale/authkey", stdin=made["key"])
    headscale(f"preauthkeys expire -i {made['id']}")
    host("docker restart tailscale-vllm")
    until("the node has joined", lambda: node("tailscale.sh health", ok=None).code == 0)
    until("the laptop reaches it", lambda: reaches("/health"))
    assert address() == before
    answers()


def test_a_tag_owns_the_node_and_no_person() -> None:
    peers = json.loads(laptop("tailscale status --json").stdout)["Peer"].values()
    (peer,) = (peer for peer in peers if peer["HostName"] == "function-gemma-server")
    assert peer["Tags"] == ["tag:inference"]
    assert "KeyExpiry" not in peer


def listening(program: str = "") -> set[tuple[str, int]]:
    """Address and port of every TCP socket that listens in the pod's network namespace, or of a program's."""
    pod = host("docker inspect -f '{{.State.Pid}}' function-gemma-pod").last
    lines = host(f"nsenter -n -t {pod} ss -Hltnp").stdout.splitlines()
    ends = [line.split()[3] for line in lines if program in line]
    return {(where.strip("[]"), int(port)) for where, _, port in (end.rpartition(":") for end in ends)}


def test_the_gateway_alone_listens_where_the_tailnet_reaches() -> None:
    # Whatever the policy allows: in kernel mode the tailnet does not reach loopback.
    reachable = {end for end in listening() if not end[0].startswith("127.") and end[0] != "::1"}
    # tailscaled takes :22 without a listener; PeerAPI is its one listener on each of the node's addresses.
    ours = node("tailscale ip").stdout.split()
    peerapi = {end for end in reachable if end[0] in ours}
    assert len(peerapi) == 2
    assert {port for _, port in reachable - peerapi} == {8000}


def test_nothing_but_ssh_the_gateway_and_peerapi_answers_the_laptop() -> None:
    us, ends = address(), listening()
    program = f"""
import concurrent.futures, socket

def answers(port):
    with socket.socket() as end:
        end.settimeout(2)
        return end.connect_ex(("{us}", port)) == 0

ports = {sorted({22, *OTHERS, *(port for _, port in ends)})}
with concurrent.futures.ThreadPoolExecutor(len(ports)) as pool:
    print(*(port for port, open in zip(ports, pool.map(answers, ports)) if open))
"""
    # In userspace mode it listens on every address.
    peerapi = {port for where, port in listening("tailscaled") if where in {us, "0.0.0.0", "*"}}  # noqa: S104
    assert set(map(int, laptop("python3 -", stdin=program).last.split())) == {22, 8000} | peerapi
