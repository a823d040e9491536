"""What the files of server/ promise that can be said without Docker."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

SERVER = Path(__file__).parents[2] / "server"
SCRIPTS = sorted(SERVER.glob("*.sh"))
DOCKERFILES = sorted(SERVER.glob("Dockerfile*"))
COMPOSE: dict[str, Any] = yaml.safe_load((SERVER / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
GATEWAY = (SERVER / "haproxy" / "haproxy.cfg").read_text()
FURTHER = range(1, 8)  # GPUs that the gateway knows beyond the first


def copied(dockerfile: Path) -> set[str]:
    lines = (line.split() for line in dockerfile.read_text().splitlines())
    return {source for words in lines if words[:1] == ["COPY"] for source in words[1:-1]}


def test_the_services_have_the_names_that_people_type() -> None:
    assert COMPOSE["name"] == "function-gemma-server"
    assert {name: service["container_name"] for name, service in SERVICES.items()} == {
        "pod": "function-gemma-pod",
        "tailscale": "tailscale-vllm",
        "vllm-server": "vllm-gemma",
        "gateway": "gateway-gemma",
        "agents": "agents-gemma",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES.keys() - {"vllm-server"})
def test_all_but_vllm_have_a_limit_of_processes_and_memory(name: str) -> None:
    assert SERVICES[name].keys() >= {"pids_limit", "mem_limit"}


@pytest.mark.parametrize("name", SERVICES.keys() - {"pod"})
def test_a_service_has_a_health_check(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_nothing_is_published_on_the_host() -> None:
    assert not [name for name, service in SERVICES.items() if "ports" in service]


def test_what_faces_the_tailnet_shares_the_pods_network_and_the_agents_have_none() -> None:
    networks = {name: service.get("network_mode") for name, service in SERVICES.items() if name != "pod"}
    assert networks.pop("agents") == "none"
    assert set(networks.values()) == {"service:pod"}
    assert SERVICES["pod"]["hostname"] == "function-gemma-server"


def test_only_tailscale_runs_as_root() -> None:
    users = {name: service.get("user") for name, service in SERVICES.items()}
    assert {name for name, user in users.items() if user is None} == {"tailscale", "vllm-server"}
    assert re.findall(r"^USER (.*)$", (SERVER / "Dockerfile").read_text(), re.M)[-1] == "10001:10000"


def test_a_secret_is_mounted_where_it_is_used_and_nowhere_else() -> None:
    mounts = {
        name: [volume.split(":")[0] for volume in service.get("volumes", []) if "secrets" in volume]
        for name, service in SERVICES.items()
    }
    assert {name: where for name, where in mounts.items() if where} == {
        "tailscale": ["./secrets/tailscale"],
        "vllm-server": ["./secrets/huggingface"],
    }


def test_vllm_knows_its_release_and_reads_the_gates_of_adapters() -> None:
    service = SERVICES["vllm-server"]
    tag = service["image"].partition(":")[2]
    assert service["environment"]["SERVER_RELEASE"] == tag == "${FUNCTION_GEMMA_TAG:-dev}"
    assert "../agents:/agents:ro" in service["volumes"]


def test_settings_are_optional_files_so_that_a_changed_one_replaces_one_service() -> None:
    files = [entry for service in SERVICES.values() for entry in service.get("env_file", [])]
    assert sorted(entry["path"] for entry in files) == [
        "agents_server.env",
        "entrypoint.env",
        "gateway.env",
        "tailscale.env",
    ]
    assert all(entry["required"] is False for entry in files)


def test_images_are_pinned() -> None:
    for path in [*DOCKERFILES, *SERVER.glob("docker-compose*.yml")]:
        assert ":latest" not in path.read_text(), path.name
    for dockerfile in DOCKERFILES:
        assert re.search(r"^ARG \w+_IMAGE=\S+:v[\d.]+$", dockerfile.read_text(), re.M), dockerfile.name


def test_a_default_stands_in_one_place() -> None:
    names = re.compile(r"\b(SERVER|GATEWAY|TAILSCALE)_[A-Z_]+(?=:?-\S)|presetenv (\w+)|\w+_IMAGE(?=[=:]\S)")
    places: dict[str, list[str]] = {}
    files = [SERVER / "haproxy" / "haproxy.cfg", SERVER / "docker-compose.yml", *SCRIPTS, *DOCKERFILES]
    for path in files:
        for match in names.finditer(path.read_text()):
            places.setdefault(match[2] or match[0], []).append(path.name)
    del places["SERVER_HF_ENDPOINT"]  # only ever named as the Hub in a message
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
    assert {"SERVER_MODEL", "GATEWAY_LONGEST_REQUEST", "VLLM_IMAGE"} <= places.keys()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_is_there_and_allowed(dockerfile: Path) -> None:
    allowed = (SERVER / ".dockerignore").read_text().splitlines()
    for source in copied(dockerfile):
        assert (SERVER / source).exists()
        assert f"!{source}" in allowed


def test_the_build_context_is_an_allow_list_of_what_is_copied() -> None:
    rules = [line for line in (SERVER / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert allowed == set().union(*map(copied, DOCKERFILES))


def test_the_gateway_lists_what_it_serves() -> None:
    paths = re.findall(r" path(?:_beg)? (/[^}\n]*)", GATEWAY)
    assert {path for found in paths for path in found.split()} == {
        "/health",
        "/metrics",
        *(f"/metrics/{gpu}" for gpu in FURTHER),
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/agents/",
    }


def test_the_gateway_knows_a_vllm_for_each_further_gpu_that_costs_nothing_where_there_is_none() -> None:
    servers = re.findall(r"^ +server vllm-(\d) (\S+) check \"(.*)\"$", GATEWAY, re.M)
    assert servers == [
        (str(gpu), f"unix@/run/vllm/vllm-{gpu}.sock", f"${{GATEWAY_VLLM_{gpu}-disabled}}") for gpu in FURTHER
    ]
    assert re.findall(r"acl serving srv_is_up\(vllm/(.*)\)", GATEWAY) == [
        "main",
        "standby",
        *(f"vllm-{gpu}" for gpu in FURTHER),
    ]


def test_no_caller_names_a_path_of_the_plugin_himself() -> None:
    # /metrics becomes the plugin's path only when the list has let it in.
    listed, _, behind = GATEWAY.partition("http-request deny deny_status 404 unless ")
    assert "/gateway/metrics" not in listed
    assert re.findall(r"(\S+) (/gateway/\S+) (.*)", behind) == [
        ("set-path", "/gateway/metrics", "if metrics")
    ]


def test_the_gateways_own_errors_are_in_openais_form() -> None:
    said = r"(?:http-error|return) status (\d+) content-type application/json string '(.*?)'"
    errors = dict(re.findall(said, GATEWAY))
    assert errors.keys() == set("400 403 404 408 411 413 429 431 500 502 503 504".split())
    for status, body in errors.items():
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == int(status)


COMMANDS = [path for path in [*SCRIPTS, SERVER / "healthcheck.py"] if path.read_text().startswith("#!")]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_a_command_can_be_run(script: Path) -> None:
    assert script.stat().st_mode & 0o111
