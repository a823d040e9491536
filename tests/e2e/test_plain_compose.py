"""`docker compose up -d --build` in a new clone with nothing set."""

import re
from collections.abc import Iterator

import pytest

from stack import CHECKOUT, CONTROL_PLANE, HUB, host, inspect, until

CLONE = "/var/lib/e2e/clone"
# Beside the deployed stack it needs names of its own, and the test has no two minutes until "unhealthy".
BESIDE = """
services:
  pod: {container_name: plain-pod}
  tailscale: {container_name: plain-tailscale}
  gateway: {container_name: plain-gateway}
  agents: {container_name: plain-agents}
  vllm-server: {container_name: plain-vllm-server, healthcheck: {start_period: 0s, interval: 1s}}
"""
COMPOSE = f"cd {CLONE}/server && docker compose -p plain -f docker-compose.yml -f ../../beside.yml"
IMAGES = "vllm-gemma:dev tailscale-vllm:dev"


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """The stack of a new clone; the lab's control plane and hub stand for the internet's."""
    remove = f"({COMPOSE} down -v); rm -rf /var/lib/e2e; docker rmi -f {IMAGES}"
    host(remove, ok=None)
    host(f"mkdir -p {CLONE} && git clone -q {CHECKOUT} {CLONE} && cat >{CLONE}/../beside.yml", stdin=BESIDE)
    host(f"cat >{CLONE}/server/tailscale.env", stdin=f"TAILSCALE_LOGIN_SERVER={CONTROL_PLANE}\n")
    host(f"cat >{CLONE}/server/entrypoint.env", stdin=f"SERVER_HF_ENDPOINT={HUB}\n")
    host(f"{COMPOSE} up -d --build")
    yield
    host(remove)


def test_the_server_stays_up_unhealthy_and_logs_the_one_command_that_mends_it() -> None:
    def unhealthy() -> bool:
        return bool(inspect("plain")["plain-vllm-server"]["State"]["Health"]["Status"] == "unhealthy")

    until("vLLM's container is unhealthy", unhealthy)
    log = host("docker logs plain-vllm-server 2>&1").stdout
    assert log.count("To mend it: ") == 1, log
    assert "install -D -m 0400 -o 10001 -g 10000 TOKENFILE server/secrets/huggingface/token" in log


def test_the_sidecar_shows_one_login_url_that_lasts() -> None:
    def urls() -> list[str]:
        log = host("docker logs plain-tailscale 2>&1").stdout
        return re.findall(rf"{re.escape(CONTROL_PLANE)}/register/\S+", log)

    (url,) = set(until("the sidecar shows a login URL", urls))
    sidecar = "docker exec plain-tailscale"
    assert "waiting: visit the login URL" in host(f"{sidecar} tailscale.sh health", ok=False).stdout
    assert f'"AuthURL": "{url}"' in host(f"{sidecar} tailscale status --json --peers=false").stdout


def test_nothing_crash_loops() -> None:
    seen = inspect("plain")
    assert len(seen) == 5
    for name, one in seen.items():
        assert (one["State"]["Running"], one["RestartCount"]) == (True, 0), name
