"""The doctor tells a host that serves from one that does not, and names what mends it."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from stack import BASE, ROOT, Done, answers, containers, host, laptop, playbook, replaced, server, until

SCHEMA = json.loads((ROOT / "server" / "doctor.schema.json").read_text())
TIMER = "function-gemma-heal.timer"


@pytest.fixture
def unhealed() -> Iterator[None]:
    """The healer rests, and what the test takes away is back when it ends."""
    host(f"systemctl stop {TIMER}")
    yield
    server("./heal.sh")
    host(f"systemctl start {TIMER}")
    answers()


def report(done: Done) -> dict[str, Any]:
    """What the doctor said, which the schema describes."""
    said: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(said, SCHEMA)
    assert done.code == {"healthy": 0, "degraded": 1, "down": 2}[said["state"]]
    return said


def examine() -> dict[str, Any]:
    return report(server("./doctor --json", ok=None))


def findings(said: dict[str, Any]) -> dict[str, str]:
    """The mend of each finding that counts, by what was found."""
    return {one["what"]: one["mend"] for one in said["findings"] if one["state"] != "note"}


def mend(said: dict[str, Any]) -> None:
    for command in findings(said).values():
        host(command)
    until("the host is healthy", lambda: examine()["state"] == "healthy")


def test_a_host_that_serves_is_healthy_to_all_who_ask_and_nothing_of_it_changes() -> None:
    before = containers()
    said = examine()
    assert (said["state"], findings(said)) == ("healthy", {})
    assert set(said["tokens"]) == {BASE, "lint", "docstring"}
    assert server("./doctor").stdout.startswith(f"healthy: {BASE}, ")
    assert report(laptop("ssh root@function-gemma-server ./doctor --json"))["state"] == "healthy"
    assert f"healthy: {BASE}, " in playbook("playbooks/doctor.yml").words
    assert not replaced(before)


def test_stopped_agents_are_degraded_and_the_commands_that_it_names_mend_it(unhealed: None) -> None:  # noqa: ARG001
    host("docker stop agents-gemma")
    said = examine()
    assert said["state"] == "degraded"
    assert set(findings(said)) == {"agents-gemma is exited", "the healer does not run"}
    run = playbook("playbooks/doctor.yml", "--check", ok=False)
    assert "agents-gemma is exited. To mend it: " in run.words
    assert "function-gemma-server is degraded" in run.words
    mend(said)


def test_a_vllm_that_hangs_is_down_and_is_not_waited_for(unhealed: None) -> None:  # noqa: ARG001
    init = host("docker inspect -f '{{.State.Pid}}' vllm-gemma").last  # Docker's, whose child is vLLM
    vllm = host(f"cat /proc/{init}/task/{init}/children").last
    host(f"kill -STOP {vllm}")
    try:
        said = report(server("./doctor --json", ok=None, seconds=40))
    finally:
        host(f"kill -CONT {vllm}")
    assert said["state"] == "down"
    assert findings(said)["vllm-gemma is unhealthy: /run/vllm/vllm.sock: timed out"]
