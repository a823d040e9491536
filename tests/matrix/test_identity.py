"""A node that was lost and made anew gets its name and its address back from a backup."""

from collections.abc import Iterator

import pytest

from stack import (
    address,
    answers,
    containers,
    headscale,
    host,
    lab_up,
    node,
    playbook,
    replaced,
    server,
    until,
)

BACKUP = "/run/matrix-backup.tar"
STATE = "$(docker volume inspect -f '{{.Mountpoint}}' function-gemma-server_tailscale-state)"
HOST_KEYS = f"sha256sum {STATE}/ssh/*"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The lab's stack, before and after, and no node more than before."""
    lab_up()
    playbook("site.yml", seconds=900)
    known = {one["id"] for one in headscale("nodes list")}
    yield
    host(f"rm -f {BACKUP}")
    for one in headscale("nodes list"):
        if one["id"] not in known:
            headscale(f"nodes delete --force -i {one['id']}")
    answers()


def test_a_backup_gives_a_new_node_the_identity_of_the_old_one_and_replaces_no_other_container() -> None:
    old = address()
    keys = host(HOST_KEYS).stdout
    server(f"umask 077 && ./backup.sh save >{BACKUP}")
    server(
        "exec 9>>.lock && flock 9 && docker stop tailscale-vllm "
        f"&& find {STATE} -mindepth 1 -delete && docker start tailscale-vllm"
    )
    until("a new node joins", lambda: node("tailscale.sh health", ok=None).code == 0)
    assert address() != old
    before = containers()
    server(f"./backup.sh restore --identity <{BACKUP}")
    assert address() == old
    assert host(HOST_KEYS).stdout == keys
    assert replaced(before) == {"tailscale-vllm"}
    answers()
