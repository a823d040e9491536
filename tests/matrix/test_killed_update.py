"""An update that is killed: the healer, or the next run, makes good what was left."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import (
    CHECKOUT,
    answers,
    clients,
    host,
    lab_up,
    nothing_failed,
    playbook,
    server,
    ssh,
    started,
    until,
)
from test_updates import STANDBYS, UPDATE, new_setting


@pytest.fixture(autouse=True, scope="module")
def as_before() -> Iterator[None]:
    """The lab's stack, before and after."""
    lab_up()
    playbook("site.yml", seconds=900)
    yield
    playbook("site.yml", seconds=900)
    answers()


# What update.sh says as it begins with each step.
STEPS = [
    "replace or start: vllm-gemma",
    "gateway-gemma: a second one takes over",
    "vllm-gemma: starts a standby",
    "vllm-gemma: the standby takes over",
    "vllm-gemma: is replaced",
    "vllm-gemma: serves",
    "ends the standby",
    "agents-gemma: a second one takes over",
    "tailscale-vllm: is replaced",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_update_fails_no_request_and_another_run_completes_it(step: str, tmp_path: Path) -> None:
    number = STEPS.index(step)
    new_setting(f"--seed {2 + number}")
    for line, file in (
        (f"GATEWAY_MAX_BODY={4000000 + number}", "gateway"),
        (f"READ_BY_NOTHING={number}", "agents_server"),
        (f"READ_BY_NOTHING={number}", "tailscale"),
    ):
        server(f"echo {line} >>{file}.env")
    output = tmp_path / "update"
    with clients() as seen:
        with started(ssh(f"cd {CHECKOUT}/server && {UPDATE} --sidecar"), output):
            until(step, lambda: step in output.read_text(), seconds=600)
            host(f"pkill -{signal.SIGKILL.value} -f '^/bin/bash ./update[.]sh'")
        until("no run holds the lock", lambda: server("flock -n .lock true", ok=None).code == 0)
        host("systemctl start function-gemma-heal.service", seconds=300)
        server(f"{UPDATE} --sidecar", seconds=400)
    assert nothing_failed(seen)
    assert host(STANDBYS).stdout == ""
    assert server("./update.sh --no-pull --plan --sidecar").last == "changed=0"
