"""From one release to the next: what the former deployed goes on serving, settings and all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import (
    CHECKOUT,
    REPOSITORY,
    ROOT,
    Done,
    address,
    answers,
    call,
    changes,
    clients,
    forge,
    host,
    lab_up,
    nothing_failed,
    server,
)

# Before adapters were declared, Docker and NVIDIA had their makers' packages, and updates had a standby.
FORMER = "de22d4172e7edec64dd2d43141ba02893824f4bd"
SETTINGS = {"server_max_loras": "4", "gateway_max_body": "2000000"}


@pytest.fixture
def former(tmp_path: Path) -> Iterator[Path]:
    """A bare host, a checkout of the former release, and both releases as tags on the forge."""
    call("docker", "rm", "-f", "-v", "lab-host")
    lab_up()
    checkout = tmp_path / "former"
    call("git", "worktree", "add", "--detach", checkout, FORMER)
    (checkout / ".cache").symlink_to(ROOT / ".cache")
    call("git", "push", "--force", REPOSITORY, f"{FORMER}:refs/tags/former")
    forge("tag", "--force", "this", "main")
    try:
        yield checkout
    finally:
        call("git", "worktree", "remove", "--force", checkout)
        forge("tag", "--delete", "former", "this")
        call("docker", "rm", "-f", "-v", "lab-host")


def site(checkout: Path, version: str) -> Done:
    """Run a release's site.yml, which has the host at that release."""
    programs = ROOT / ".venv" / "bin"
    settings = [word for item in SETTINGS.items() for word in ("-e", "=".join(item))]
    words = ["env", "-C", str(checkout), str(programs / "ansible-playbook"), "site.yml", *settings]
    words += ["-e", f"checkout_version={version}"]
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
    return call(*words, env=env, seconds=900)


def test_a_host_of_the_former_release_becomes_one_of_this_and_serves_throughout(former: Path) -> None:
    assert "SUCCESS" in site(former, "former").stdout
    before = address()
    with clients() as seen:
        site(ROOT, "this")
    assert nothing_failed(seen)
    assert host(f"git -C {CHECKOUT} describe --tags --exact-match").last == "this"
    assert address() == before
    assert "SERVER_MAX_LORAS='4'" in server("cat entrypoint.env").stdout
    assert "GATEWAY_MAX_BODY='2000000'" in server("cat gateway.env").stdout
    answers()
    assert changes(site(ROOT, "this")) == 0
