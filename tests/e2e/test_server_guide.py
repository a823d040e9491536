"""The user's server guide: each line that verifies it, as written, on the host and on the laptop."""

import re
from collections.abc import Iterator

import pytest

from stack import (
    ANSWERS,
    BASE,
    CHECKOUT,
    PROMPT,
    ask,
    clients,
    commit,
    containers,
    host,
    host_head,
    laptop,
    nothing_failed,
    replaced,
    server,
)

CHECK_PROMPT = "Which tool should run next for src/app.py?"  # the connection check's own
LISTENS = "serving it at http://function-gemma-server:8000/v1"
CURL = "curl http://function-gemma-server:8000/agents/lint/lint_subagent.yaml"
MANAGER = "docker compose exec -T vllm-server adapter_manager.py"


@pytest.fixture
def unload() -> Iterator[list[str]]:
    """The adapters named in it are unloaded when the test ends."""
    names: list[str] = []
    yield names
    for name in names:
        server(f"{MANAGER} unload {name}")


def test_docker_compose_config_passes() -> None:
    assert "container_name: vllm-gemma" in server("docker compose config").stdout


def test_the_vllm_image_builds_with_its_entrypoint_set() -> None:
    server("docker build -t vllm-gemma -f Dockerfile .")
    image = host("docker inspect -f '{{json .Config.Entrypoint}}' vllm-gemma:latest")
    assert image.last == '["entrypoint.sh"]'
    host("docker rmi vllm-gemma:latest")


def test_the_tailscale_image_builds_with_git_and_docker_and_workdir_app() -> None:
    server("docker build -t tailscale-vllm -f Dockerfile.tailscale .")
    assert "git version" in host("docker run --rm tailscale-vllm git --version").stdout
    assert "Docker version" in host("docker run --rm tailscale-vllm docker --version").stdout
    assert host("docker inspect -f '{{.Config.WorkingDir}}' tailscale-vllm:latest").last == "/app"
    host("docker rmi tailscale-vllm:latest")


def test_compose_up_builds_and_both_containers_run() -> None:
    before = containers()
    server("docker compose up -d --build")
    assert {"vllm-gemma", "tailscale-vllm"} <= set(server("docker ps --format '{{.Names}}'").stdout.split())
    assert not replaced(before)  # it is what update.sh had built


def test_the_log_of_vllm_shows_the_base_model_loading_and_where_it_listens() -> None:
    log = server("docker logs vllm-gemma 2>&1").stdout
    assert f"base model: {BASE}@" in log
    assert LISTENS in log


def test_the_connection_check_prints_success_and_the_reply_on_a_tailnet_machine() -> None:
    reply = ANSWERS[CHECK_PROMPT]["base"]
    assert laptop("uv run server/test_connection.py").last == f"SUCCESS: {BASE} answered: {reply}"


def test_update_over_ssh_pulls_and_replaces_the_server_and_shows_its_log() -> None:
    before, head = containers(), host_head()
    with commit("server/function_gemma/__init__.py", '"""', '"""e2e: '), clients() as seen:
        update = laptop("ssh root@function-gemma-server ./update.sh", seconds=400)
    assert nothing_failed(seen)
    assert "vllm-gemma: the standby takes over" in update.words
    assert "vllm-gemma: serves" in update.words
    assert f"pulled main: {head[:12]} → {host_head()[:12]}" in update.words
    assert LISTENS in update.words
    assert "SUCCESS: " in update.words
    assert update.last == "changed=1"
    assert replaced(before) == {"vllm-gemma", "agents-gemma"}
    assert ask("lint") == ANSWERS[PROMPT]["lint"]


def test_the_lint_definition_over_the_tailnet_equals_its_source() -> None:
    assert laptop(CURL).stdout == host(f"cat {CHECKOUT}/agents/lint/lint_subagent.yaml").stdout


def test_the_caching_client_pulls_the_definition_once() -> None:
    since = host("date +%s.%N").last
    python = "uv run -q --no-project --with './server[client]' python"
    client = f"{python} -m function_gemma.agents.client --cache-dir cache lint"
    # A copy, because the laptop has the repository read-only and an installation builds there.
    work = "here=$(mktemp -d) && cp -r server $here && cd $here"
    twice = laptop(f"{work} && {client} && {client} && rm -r $here").stdout
    log = host(f"docker logs --since {since} gateway-gemma").stdout
    statuses = re.findall(r" (\d{3}) .*\"GET /agents/lint/lint_subagent.yaml", log)
    assert statuses[0] == "200"
    assert set(statuses[1:]) == {"304"}
    assert twice == 2 * laptop(CURL).stdout


def test_the_manager_loads_an_adapter_which_then_answers(unload: list[str]) -> None:
    inside = server("docker compose exec -T vllm-server sh -c 'echo /models/adapters/docstring/*/'")
    unload.append("guide")
    assert "guide: changed" in server(f"{MANAGER} load guide {inside.last.split()[0]}").stdout
    reply = ANSWERS[CHECK_PROMPT]["docstring"]
    check = laptop("uv run server/test_connection.py model=guide")
    assert check.last == f"SUCCESS: guide answered: {reply}"


def test_a_new_adapter_from_the_laptop_is_live_without_a_restart_of_the_stack(
    adapters: str, unload: list[str]
) -> None:
    before = containers()
    unload.append("fresh")
    load = "tar c lint | ssh root@function-gemma-server ./adapter_manager.py load fresh -"
    laptop(f"cd {adapters} && {load}")
    assert ask("fresh") == ANSWERS[PROMPT]["lint"]
    assert not replaced(before)
