"""The host serves the declared adapters and no others, each as it is declared, and goes back when asked."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import common as lab
from function_gemma.adapters.files import FILES
from function_gemma.adapters.store import digest_of
from stack import (
    ANSWERS,
    BASE,
    CHECKOUT,
    PROMPT,
    ask,
    changes,
    clients,
    containers,
    host,
    laptop,
    nothing_failed,
    playbook,
    replaced,
    until,
)

MODEL = lab.CACHE / "model"
LINT, DOCSTRING = MODEL / "lint", MODEL / "docstring"
REPOSITORY = f"hf://{lab.ADAPTER}"
MANAGER = "docker exec vllm-gemma adapter_manager.py"
STAGE = ("site.yml", "--tags", "lora")
NOT_SERVED = 7  # of test_connection.py
REFUSALS = "/run/refusals"
# Found before the engine's: answers each `docker exec`, the first time, as where runc could start nothing.
REFUSING = f"""#!/bin/sh
mkdir -p {REFUSALS}
if [ "$1" = exec ] && mkdir "{REFUSALS}/$(echo "$*" | md5sum | cut -c1-32)" 2>/dev/null; then
    echo "OCI runtime exec failed: exec failed: unable to start container process"
    exit 126
fi
exec /usr/bin/docker "$@"
"""
ROUTE = re.compile(r'"[A-Z]+ /\S*lora\S* HTTP')


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The same containers serve throughout, and in the end what the lab's inventory declares."""
    before = containers()
    yield
    playbook(*STAGE)
    for name in ("lint", "docstring"):
        assert ask(name) == ANSWERS[PROMPT][name]
    assert not replaced(before)


def address() -> str:
    """Where the lab's inventory has docstring from."""
    return f"{REPOSITORY}@{(lab.CACHE / 'hub' / 'adapter_revision').read_text()}"


def declared(**sources: Path | str | None) -> tuple[str, str]:
    """Words that declare the lab's adapters with these sources instead or besides; None declares one not."""
    all_of_them = {"lint": LINT, "docstring": address(), **sources}
    adapters = [{"name": name, "source": str(source)} for name, source in all_of_them.items() if source]
    return ("-e", json.dumps({"lora_adapters": adapters}))


def history() -> dict[str, dict[str, Any]]:
    """What the manifest says of each name."""
    adapters = json.loads(host(f"{MANAGER} history --json").stdout)["adapters"]
    return {one["name"]: one for one in adapters}


def is_served(name: str) -> bool:
    """Whether the laptop is answered by an adapter, or told that it is not served."""
    done = laptop(f"uv run server/test_connection.py model={name}", ok=None)
    assert done.code in (0, NOT_SERVED), str(done)
    return done.code == 0


def test_a_second_run_of_the_stage_changes_nothing_and_asks_vllm_for_nothing() -> None:
    since = host("date -u +%Y-%m-%dT%H:%M:%S.%NZ").last

    def asked() -> list[str]:
        log = host(f"docker logs --since {since} vllm-gemma")
        return ROUTE.findall(log.stdout + log.stderr)

    run = playbook(*STAGE)
    assert changes(run) == 0, str(run)
    # The log has all that was asked before this, which asks the server.
    host(f"{MANAGER} list")
    assert len(until("the log shows the listing", asked)) == 1


def test_the_base_model_answers_as_itself_while_every_slot_has_an_adapter() -> None:
    for number in range(8):  # SERVER_MAX_LORAS
        host(f"{MANAGER} load full{number} {address()}")
    with clients(8, 0) as seen:
        for _ in range(20):
            ask(BASE)
    assert nothing_failed(seen)


def test_check_mode_shows_old_and_new_digest_and_what_would_be_unloaded_and_changes_nothing() -> None:
    before = history()
    plan = playbook(*STAGE, "--check", "--diff", *declared(lint=DOCSTRING, docstring=None))
    assert f"lint: {digest_of(LINT)} → {digest_of(DOCSTRING)}" in plan.words
    assert f"docstring: {digest_of(DOCSTRING)} → none" in plan.words
    assert changes(plan) == 1, str(plan)
    assert history() == before


def test_check_mode_shows_the_address_of_an_adapter_on_the_hub() -> None:
    plan = playbook(*STAGE, "--check", "--diff", *declared(lint=address()))
    assert f"lint: {digest_of(LINT)} → {address()}" in plan.words
    assert ask("lint") == ANSWERS[PROMPT]["lint"]


def test_a_changed_adapter_is_served_and_a_rollback_brings_the_former_back() -> None:
    run = playbook(*STAGE, *declared(lint=DOCSTRING))
    assert changes(run) == 1, str(run)
    assert ask("lint") == ANSWERS[PROMPT]["docstring"]
    assert host("ls -d /var/lib/function-gemma-lora-*", ok=None).code != 0  # nothing of what was sent stays

    back = playbook("load_adapter.yml", "-e", "name=lint", "-e", "rollback=true")
    assert f"lint: {digest_of(DOCSTRING)} → {digest_of(LINT)}" in back.words
    assert "lint stands in lora_adapters: as long as it does, site.yml loads it again" in back.words
    assert "SUCCESS: lint answered: " in back.words
    assert ask("lint") == ANSWERS[PROMPT]["lint"]


@pytest.fixture
def refusing() -> Iterator[None]:
    """The host's engine refuses each command in a container once."""
    host("install -m 755 /dev/stdin /usr/local/bin/docker", stdin=REFUSING)
    yield
    host(f"rm -rf /usr/local/bin/docker {REFUSALS}")


@pytest.mark.usefixtures("refusing")
def test_adapters_are_loaded_although_the_engine_does_not_start_a_command_at_once() -> None:
    swapped = playbook(*STAGE, *declared(lint=DOCSTRING, docstring=LINT))
    assert changes(swapped) == 1, str(swapped)
    assert ask("lint") == ANSWERS[PROMPT]["docstring"]
    gone = playbook("load_adapter.yml", "-e", "name=lint", "-e", "state=absent")
    assert "SUCCESS: " in gone.words
    assert not is_served("lint")
    # Asked what is served, checked both, loaded both, unloaded one.
    assert int(host(f"ls {REFUSALS} | wc -l").last) >= 6


def test_absent_unloads_one_and_site_brings_it_again_as_it_is_declared() -> None:
    gone = playbook("load_adapter.yml", "-e", "name=lint", "-e", "state=absent")
    assert f"lint: {digest_of(LINT)} → none" in gone.words
    assert "lint stands in lora_adapters: as long as it does, site.yml loads it again" in gone.words
    assert "SUCCESS: " in gone.words
    assert not is_served("lint")
    assert is_served("docstring")

    again = playbook("load_adapter.yml", "-e", "name=lint", "-e", "state=absent")
    assert changes(again) == 0, str(again)

    assert changes(playbook(*STAGE)) == 1
    assert is_served("lint")


def test_an_adapter_that_is_no_longer_named_is_unloaded_and_kept_for_a_rollback() -> None:
    run = playbook(*STAGE, *declared(lint=None))
    assert f"lint: {digest_of(LINT)} → none" in run.words
    assert not is_served("lint")
    past = history()["lint"]
    assert past["serves"] is None
    assert [one["kept"] for one in past["generations"] if one["digest"] == digest_of(LINT)] == [True]

    host(f"{MANAGER} rollback lint")
    assert ask("lint") == ANSWERS[PROMPT]["lint"]


def test_an_adapter_that_was_loaded_by_hand_is_unloaded_where_it_is_not_declared() -> None:
    host(f"{MANAGER} load fresh {address()}")
    assert is_served("fresh")
    run = playbook(*STAGE)
    assert f"fresh: {digest_of(DOCSTRING)} → none" in run.words
    assert not is_served("fresh")


def test_one_bad_adapter_among_two_that_changed_is_named_and_neither_is_loaded(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(DOCSTRING, bad)
    with (bad / FILES[1]).open("r+b") as file:  # its last value: only the manager reads values
        file.seek(-4, 2)
        file.write(b"\xff" * 4)
    before = history()
    run = playbook(*STAGE, *declared(docstring=LINT, lint=bad), ok=False)
    assert "failed: [function-gemma-server] (item=lint)" in run.words
    assert "failed: [function-gemma-server] (item=docstring)" not in run.words
    assert "expected finite values, found" in run.words
    assert changes(run) == 0, str(run)
    assert history() == before


def test_a_hub_address_without_a_commit_is_refused_before_anything_changes() -> None:
    run = playbook(*STAGE, *declared(fresh=f"{REPOSITORY}@main"), ok=False)
    assert f"{REPOSITORY}@main" in run.words
    assert "write hf://ORG/REPO@COMMIT" in run.words
    assert changes(run) == 0, str(run)


def test_a_commit_that_the_hub_does_not_have_is_named() -> None:
    run = playbook(*STAGE, *declared(fresh=f"{REPOSITORY}@{'0' * 40}"), ok=False)
    assert f"{lab.ADAPTER} has no commit {'0' * 40}: copy one that its page shows" in run.words
    assert not is_served("fresh")


def test_a_token_that_the_hub_needs_is_asked_for_with_the_command_that_places_it() -> None:
    token = f"{CHECKOUT}/server/secrets/huggingface/token"
    host(f"mv {token} {token}.away")
    try:
        run = playbook(*STAGE, *declared(fresh=address()), ok=False)
    finally:
        host(f"mv {token}.away {token}")
    assert f"{lab.ADAPTER} is private, gated or not there, and there is no token" in run.words
    assert "sudo install -D -m 0400 -o 10001 -g 10000 TOKENFILE server/secrets/huggingface/token" in run.words
    assert not is_served("fresh")
