"""An update fails nobody's request, and one that does not work changes nothing."""

from collections.abc import Iterator

import pytest

from stack import (
    answers,
    changes,
    clients,
    commit,
    containers,
    host,
    host_head,
    laptop,
    nothing_failed,
    playbook,
    replaced,
    server,
    until,
)

UPDATE = "./update.sh --no-pull"
QUEUE = "echo UPDATE_STRATEGY=queue >>.env"
STANDBYS = "docker ps -a --format '{{.Names}}' --filter name=-standby"


@pytest.fixture(autouse=True)
def as_before(settings: None) -> Iterator[None]:  # noqa: ARG001
    """The settings are as before, what runs is of these settings, and no standby is left."""
    yield
    server(f"tar -xf /run/e2e.tar && {QUEUE} && {UPDATE}", seconds=400)
    assert host(STANDBYS).stdout == ""
    answers()


def new_setting(value: str) -> None:
    """Change vLLM's settings."""
    server(f"touch entrypoint.env && echo 'SERVER_EXTRA_ARGS={value}' >>entrypoint.env")


def listener() -> str:
    """The socket that listens on the gateway's port."""
    sockets = "/proc/$(docker inspect -f '{{.State.Pid}}' function-gemma-pod)/net/tcp6"
    return host(f"awk '$2 ~ /:1F40$/ && $4 == \"0A\" {{print $10}}' {sockets}").stdout.strip()


# That a standby answers meanwhile is seen where an update is made over SSH, in test_server_guide.py.
def test_requests_wait_at_the_gateway_where_the_settings_say_so_and_none_fails() -> None:
    before, port = containers(), listener()
    new_setting("--seed 1")
    server(f"touch gateway.env && echo GATEWAY_MAX_BODY=4000000 >>gateway.env && {QUEUE}")
    with clients() as seen:
        update = server(UPDATE, seconds=400)
    assert nothing_failed(seen)
    assert update.last == "changed=1"
    assert "the standby takes over" not in update.stdout
    assert replaced(before) == {"vllm-gemma", "gateway-gemma"}
    assert listener() == port  # who was connected to it and not accepted yet was not cut off


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


def test_an_image_that_is_not_there_changes_nothing_and_says_so() -> None:
    before = containers()
    server("echo VLLM_IMAGE=nobody/nothing:1 >>.env")
    update = server(UPDATE, ok=False, seconds=400)
    assert "nobody/nothing:1" in update.words
    assert "nothing was replaced" in update.words
    assert not replaced(before)


def test_where_nothing_else_answers_what_served_comes_back_by_itself() -> None:
    before = containers()
    server(QUEUE)
    server(UPDATE)
    new_setting("--no-such-argument")
    with clients() as seen:
        update = server(UPDATE, ok=False, seconds=400)
    assert "unrecognized arguments: --no-such-argument" in update.words
    assert "back to release" in update.words
    assert nothing_failed(seen)
    assert replaced(before) == {"vllm-gemma"}
    assert "no-such-argument" not in server("cat entrypoint.env").stdout


def test_a_commit_that_does_not_work_leaves_the_old_release_serving_and_a_rollback_ends_it() -> None:
    before, head = containers(), host_head()
    with commit("server/entrypoint.sh", "--api-server-count 1\n", "--no-such-argument\n"):
        update = playbook("update.yml", ok=False)
    assert "unrecognized arguments: --no-such-argument" in update.words
    assert "back to the code and settings that served last" in update.words
    assert host_head() != head
    assert changes(playbook("playbooks/rollback.yml", "--check")) == 1
    assert host_head() != head
    assert "SUCCESS" in playbook("playbooks/rollback.yml").stdout
    assert host_head() == head
    assert not replaced(before)


def test_a_rollback_brings_back_what_served_before_and_fails_no_request() -> None:
    server("./update.sh", seconds=400)  # it may be at a change that was taken back since
    head = host_head()
    with commit("server/haproxy/haproxy.cfg", "maxconn 2000", "maxconn 1999"):
        playbook("update.yml")
    assert host_head() != head
    before = containers()
    with clients() as seen:
        rollback = playbook("playbooks/rollback.yml")
    assert nothing_failed(seen)
    assert f"commit {head[:12]}" in rollback.words
    assert host_head() == head
    assert replaced(before) == {"gateway-gemma"}
    assert "maxconn 2000" in server("cat haproxy/haproxy.cfg").stdout


def test_a_sidecar_is_replaced_when_that_is_asked_for_also_by_a_session_that_ends_with_it() -> None:
    before = containers()
    server("echo TAILSCALE_EXTRA_ARGS=--accept-dns >>tailscale.env")
    unasked = server(UPDATE)
    assert "update.sh --no-pull tailscale" in unasked.stdout
    assert unasked.last == "changed=0"
    assert not replaced(before)
    laptop("ssh root@function-gemma-server ./update.sh --no-pull tailscale", ok=None)
    until("the run has ended", lambda: server("tail -n 1 .update.log").last == "changed=1")
    assert replaced(before) & before.keys() == {"tailscale-vllm"}  # the run's own container is left too
    server("tar -xf /run/e2e.tar && ./update.sh --no-pull --sidecar")


def test_a_sidecar_that_does_not_join_is_taken_back() -> None:
    server("./update.sh", seconds=400)  # it may be at a change that was taken back since
    before = containers()
    tag = server("grep TAILSCALE_VLLM_TAG .env").stdout
    try:
        with commit("server/tailscale.sh", "    containerboot &\n", "    sleep 600 &\n"):
            unasked = playbook("update.yml")
            assert "update.sh --no-pull tailscale" in unasked.words
            assert not replaced(before)
            asked = server("./update.sh --no-pull tailscale", ok=False, seconds=400)
    finally:
        server("./update.sh", seconds=400)
    assert "tailscale-vllm is not in the tailnet, and what was before returns" in asked.words
    assert replaced(before) == {"tailscale-vllm"}
    assert server("grep TAILSCALE_VLLM_TAG .env").stdout == tag
