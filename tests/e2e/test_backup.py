"""What is saved comes back, while callers are answered."""

from collections.abc import Iterator

import pytest

from stack import clients, containers, host, laptop, nothing_failed, replaced, server

MANAGER = "docker exec -i vllm-gemma adapter_manager.py"
SSH = "ssh root@function-gemma-server"
BACKUP = "/run/e2e-backup.tar"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Nothing of the test's stays, and every container is the same throughout."""
    before = containers()
    yield
    laptop(f"rm -f {BACKUP}")
    host(f"rm -f {BACKUP}; {MANAGER} prune")
    assert not replaced(before)


def listed() -> str:
    """Names and digests of what is served."""
    return host(f"{MANAGER} list").stdout


def test_a_restore_serves_what_was_served_when_the_backup_was_saved_and_no_request_fails(
    adapters: str,
) -> None:
    before = listed()
    laptop(f"{SSH} ./backup.sh save >{BACKUP}")
    more = f"tar c -C {adapters} lint | {SSH} ./adapter_manager.py load extra -"
    laptop(more)
    host(f"{MANAGER} unload docstring")
    assert listed() != before
    laptop(f"{SSH} ./backup.sh restore <{BACKUP}")
    assert listed() == before
    laptop(more)
    with clients() as seen:
        laptop(f"{SSH} ./backup.sh restore <{BACKUP}")
        assert listed() == before
    assert nothing_failed(seen)


def test_half_a_backup_changes_nothing() -> None:
    before = listed()
    server(f"umask 077 && ./backup.sh save | head -c 20000 >{BACKUP}", ok=None)
    refused = server(f"./backup.sh restore <{BACKUP}", ok=False)
    assert "nothing was changed" in refused.words
    assert listed() == before
