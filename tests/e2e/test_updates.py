"""An update fails nobody's request, and one that does not work changes nothing."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack import (
    CHECKOUT,
    answers,
    clients,
    containers,
    host,
    replaced,
    server,
    ssh,
    started,
    until,
)

UPDATE = "./update.sh --no-pull"
STANDBYS = "docker ps -a --format '{{.Names}}' --filter name=-standby"


@pytest.fixture(autouse=True)
def as_before(settings: None) -> Iterator[None]:  # noqa: ARG001
    """The settings are as before, what runs is of these settings, and no standby is left."""
    yield
    server("tar -xf /run/e2e.tar && " + UPDATE, seconds=400)
    assert host(STANDBYS).stdout == ""
    answers()


def new_setting(value: str) -> None:
    """Change vLLM's settings."""
    server(f"touch entrypoint.env && echo 'SERVER_EXTRA_ARGS={value}' >>entrypoint.env")


def nothing_failed(seen: dict[str, Any]) -> bool:
    """Whether clients got their answers, all of them right; says what else they got."""
    assert seen["failures"] == {}, seen["failures"]
    return bool(seen["requests"])


def test_an_update_fails_no_request_be_it_that_a_standby_answers_or_that_requests_wait() -> None:
    before = containers()
    new_setting("--seed 1")
    server("touch gateway.env && echo GATEWAY_MAX_BODY=4000000 >>gateway.env")
    with clients() as seen:
        update = server(UPDATE, seconds=400)
    assert nothing_failed(seen)
    assert update.last == "changed=1"
    assert "vllm-gemma: the standby takes over" in update.stdout
    assert "vllm-gemma: takes over again" in update.stdout
    assert replaced(before) == {"vllm-gemma", "gateway-gemma"}

    before = containers()
    server("tar -xf /run/e2e.tar && echo UPDATE_STRATEGY=queue >>.env")
    with clients() as seen:
        update = server(UPDATE, seconds=400)
    assert nothing_failed(seen)
    assert "standby takes over" not in update.stdout
    assert replaced(before) == {"vllm-gemma", "gateway-gemma"}


def test_a_setting_that_does_not_work_leaves_the_old_release_serving_and_says_why() -> None:
    before = containers()
    new_setting("--no-such-argument")
    with clients() as seen:
        update = server(UPDATE, ok=False, seconds=400)
    assert "unrecognized arguments: --no-such-argument" in update.words
    assert "vllm-gemma serves as before" in update.words
    assert nothing_failed(seen)
    assert not replaced(before)
    assert host(STANDBYS).stdout == ""


def test_a_killed_update_is_ended_by_the_healer_and_fails_no_request(tmp_path: Path) -> None:
    new_setting("--seed 2")
    before = containers()
    with clients() as seen:
        with started(ssh(f"cd {CHECKOUT}/server && {UPDATE}"), tmp_path / "update"):
            until("the standby starts", lambda: host(STANDBYS).stdout)
            host(f"pkill -{signal.SIGKILL.value} -f '^/bin/bash ./update[.]sh'")
        until("no run holds the lock", lambda: server("flock -n .lock true", ok=None).code == 0)
        host("systemctl start function-gemma-heal.service", seconds=300)
    assert nothing_failed(seen)
    assert host(STANDBYS).stdout == ""
    assert not replaced(before)
