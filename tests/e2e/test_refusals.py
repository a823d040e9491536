"""Bad input that only a running part can know: the message says what mends it, and what served still serves.

What the preflight refuses is in tests/unit/test_preflight.py and tests/molecule/preflight.
"""

from collections.abc import Iterator

import pytest

from stack import (
    BASE,
    CONTROL_PLANE,
    answers,
    away,
    containers,
    headscale,
    host,
    node,
    playbook,
    replaced,
    server,
    until,
)

NAME = "function-gemma-server"
REFUSED = "the tailnet did not take this node"


@pytest.fixture(autouse=True)
def still_serving() -> Iterator[None]:
    """Whatever is refused, the same containers go on and answer."""
    before = containers()
    yield
    assert not replaced(before)
    answers()


@pytest.fixture
def newcomers() -> Iterator[None]:
    """Nodes that the test brings into the tailnet leave it at the end."""
    before = {one["id"] for one in headscale("nodes list")}
    yield
    host("docker rm -f e2e-1 e2e-2; rm -rf /run/e2e")
    for one in headscale("nodes list"):
        if one["id"] not in before:
            headscale(f"nodes delete -i {one['id']} --force")


def join(container: str, key: str) -> str:
    """Start the sidecar's image on its own with a key; return what its health check says in the end."""
    host(f"umask 077 && mkdir -p /run/e2e/{container} && cat >/run/e2e/{container}/authkey", stdin=key)
    host(
        f"docker run -d --name {container} -e TAILSCALE_LOGIN_SERVER={CONTROL_PLANE}"
        f" -v /run/e2e/{container}:/run/secrets/tailscale:ro"
        " $(docker inspect -f '{{.Config.Image}}' tailscale-vllm)"
    )

    def says() -> str:
        health = host(f"docker exec {container} tailscale.sh health", ok=None)
        return "joined" if health.code == 0 else health.last if health.last.startswith("waiting:") else ""

    return until("the node has joined or says what it waits for", says)


@pytest.mark.usefixtures("newcomers")
def test_a_key_that_is_wrong_is_refused_without_a_crash_loop() -> None:
    says = join("e2e-1", "hskey-auth-wrongwrongwr-" + 64 * "w")
    assert REFUSED in says
    assert "a new key in server/secrets/tailscale/authkey is used at once" in says
    assert host("docker inspect -f '{{.State.Running}} {{.RestartCount}}' e2e-1").last == "true 0"


@pytest.mark.usefixtures("newcomers")
def test_a_key_that_is_used_up_is_refused() -> None:
    key = headscale("preauthkeys create --tags tag:inference")["key"]
    assert join("e2e-1", key) == "joined"
    assert REFUSED in join("e2e-2", key)


def test_a_node_name_that_is_taken_is_refused_with_what_frees_it() -> None:
    (us,) = (one for one in headscale("nodes list") if one["given_name"] == NAME)

    def is_called(name: str) -> bool:
        return f'"DNSName": "{name}.' in node("tailscale status --json --peers=false").stdout

    try:
        headscale(f"nodes rename {NAME}-1 -i {us['id']}")
        until("the node knows its other name", lambda: is_called(f"{NAME}-1"))
        run = playbook("site.yml", "--tags", "tailscale", ok=False)
        assert f"The tailnet calls this node {NAME}-1, so another one is called {NAME}" in run.words
        assert "headscale nodes delete" in run.words
    finally:
        headscale(f"nodes rename {NAME} -i {us['id']}")
        until("the node has its name again", lambda: is_called(NAME))


def test_a_forge_that_is_away_is_named() -> None:
    with away("lab-forge"):
        run = playbook("update.yml", ok=False)
    assert "nothing was pulled and nothing has changed" in run.words
    assert "server/update.sh --no-pull" in run.words


@pytest.mark.usefixtures("settings")
def test_an_image_tag_that_does_not_exist_is_named() -> None:
    run = playbook("update.yml", "-e", "vllm_image=vllm/vllm-openai-cpu:v0.0.0", ok=False)
    assert "vllm/vllm-openai-cpu:v0.0.0" in run.words
    assert "nothing was replaced" in run.words


@pytest.mark.usefixtures("settings")
def test_a_model_that_does_not_exist_is_named() -> None:
    run = playbook("update.yml", "-e", "server_model=google/nothing", ok=False)
    assert "no model google/nothing@" in run.words
    assert "name a model that exists" in run.words
    assert "nothing was replaced" in run.words


@pytest.mark.usefixtures("settings")
def test_a_token_that_is_needed_is_asked_for_with_the_command_that_places_it() -> None:
    # A revision that the host does not hold yet: the inventory names a commit.
    server("rm secrets/huggingface/token && echo SERVER_MODEL_REVISION=main >>entrypoint.env")
    update = server("./update.sh --no-pull", ok=False).words
    assert f"no model {BASE}@main" in update
    assert "make a read token, and: sudo install -D -m 0400 -o 10001 -g 10000 TOKENFILE" in update
    assert "nothing was replaced" in update
