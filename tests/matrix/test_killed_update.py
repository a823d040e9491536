"""An update that is killed: it takes minutes, in which the healer makes good what was left."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import (
    CHECKOUT,
    answers,
    clients,
    containers,
    host,
    lab_up,
    nothing_failed,
    playbook,
    replaced,
    server,
    ssh,
    started,
    until,
)
from test_updates import STANDBYS, UPDATE, new_setting


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The lab's stack, before and after."""
    lab_up()
    playbook("site.yml", seconds=900)
    yield
    playbook("site.yml", seconds=900)
    answers()


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
