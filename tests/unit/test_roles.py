"""The roles' promises that need no host."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from lora import lora_digest

import role_tables
from function_gemma.adapters.source import from_directory
from function_gemma.adapters.store import Store

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATIONS = role_tables.specifications()
ROLES = sorted(SPECIFICATIONS)
ENV_TEMPLATES = sorted(ROOT.glob("roles/*/templates/*.env.j2"))
# The file in server/ that reads what a template writes.
READERS = {
    "compose.env.j2": "docker-compose.yml",
    "entrypoint.env.j2": "entrypoint.sh",
    "gateway.env.j2": "haproxy/haproxy.cfg",
    "tailscale.env.j2": "tailscale.sh",
}


def load(path: str) -> Any:  # noqa: ANN401 (YAML holds anything)
    return yaml.safe_load((ROOT / path).read_text())


def render(template: Path, variables: dict[str, Any]) -> list[str]:
    """The lines that Ansible would write, but for comments."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701 (no HTML)
    environment.globals["query"] = lambda _, pattern: [name for name in variables if re.search(pattern, name)]
    environment.globals["lookup"] = lambda _, name: variables[name]
    private = load(f"{template.parents[1]}/vars/main.yml")
    if "__server_compose_files" in private:
        private["__server_compose_files"] = ["docker-compose.yml"]
    lines = environment.from_string(template.read_text()).render(private | variables).splitlines()
    return [line for line in lines if not line.startswith("#")]


def settings(template: Path) -> list[str]:
    """The variables that a template knows: those that make it write a line."""
    role = template.parents[1].name
    names = role_tables.options(SPECIFICATIONS[role])
    return [
        name
        for name in names
        if any(line.startswith(f"{name.upper()}=") for line in render(template, {name: 1}))
    ]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_and_every_argument_is_described(role: str) -> None:
    entries = SPECIFICATIONS[role]
    assert all(entry.get("short_description") for entry in entries.values())
    assert all(
        option.get("description", "").endswith((".", ")", "`"))
        for option in role_tables.options(entries).values()
    )


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_those_of_the_specification(role: str) -> None:
    described = role_tables.options(SPECIFICATIONS[role])
    assert load(f"roles/{role}/defaults/main.yml") == {
        name: option["default"] for name, option in described.items() if "default" in option
    }


@pytest.mark.parametrize("role", ROLES)
def test_a_variable_without_a_default_stands_commented_in_defaults(role: str) -> None:
    described = role_tables.options(SPECIFICATIONS[role])
    commented = re.findall(
        r"^# (\w+):$", (ROOT / f"roles/{role}/defaults/main.yml").read_text(), re.MULTILINE
    )
    assert sorted(commented) == sorted(name for name, option in described.items() if "default" not in option)


@pytest.mark.parametrize("template", ENV_TEMPLATES, ids=lambda path: path.name)
def test_an_unset_variable_writes_no_line(template: Path) -> None:
    assert [line for line in render(template, {}) if not line.startswith("COMPOSE_FILE=")] == []


@pytest.mark.parametrize("template", ENV_TEMPLATES, ids=lambda path: path.name)
def test_a_variable_is_its_environment_name_in_small_letters(template: Path) -> None:
    names = settings(template)
    assert names
    for name in names:
        assert f"{name.upper()}='a $b'" in render(template, {name: "a $b"})


@pytest.mark.parametrize("template", ENV_TEMPLATES, ids=lambda path: path.name)
def test_what_a_template_writes_is_read(template: Path) -> None:
    reader = (ROOT / "server" / READERS[template.name]).read_text()
    assert [name for name in settings(template) if not re.search(rf"\b{name.upper()}\b", reader)] == []


@pytest.mark.parametrize("role", ["server", "tailscale"])
def test_a_variable_without_a_default_is_written_by_one_template(role: str) -> None:
    names = [
        name for name, option in role_tables.options(SPECIFICATIONS[role]).items() if "default" not in option
    ]
    written = [
        name for template in ENV_TEMPLATES if template.parents[1].name == role for name in settings(template)
    ]
    assert sorted(written) == sorted(
        set(names) - {"server_hf_token", "tailscale_authkey"}
    )  # files of their own


def test_every_setting_of_the_entrypoint_is_a_variable() -> None:
    read = set(re.findall(r"\$\{(SERVER_\w+)", (ROOT / "server/entrypoint.sh").read_text()))
    written = {name.upper() for name in settings(ROOT / "roles/server/templates/entrypoint.env.j2")}
    assert read - written == {"SERVER_SOCKET"}  # docker-compose.yml sets it


def test_the_preflight_knows_every_role() -> None:
    assert sorted(load("roles/preflight/vars/main.yml")["__preflight_roles"]) == ROLES


@pytest.mark.parametrize("playbook", ["site.yml", "update.yml", "load_adapter.yml"])
def test_a_playbook_begins_with_the_preflight_and_ends_with_a_reply(playbook: str) -> None:
    plays = load(playbook)
    assert plays[0]["ansible.builtin.import_playbook"] == "playbooks/preflight.yml"
    assert plays[-1]["ansible.builtin.import_playbook"] == "playbooks/connection_check.yml"


@pytest.mark.parametrize(
    "playbook", ["site.yml", "update.yml", "load_adapter.yml", "playbooks/connection_check.yml"]
)
def test_tags_are_the_names_of_roles(playbook: str) -> None:
    tasks = [task for play in load(playbook) for task in play.get("tasks", [])]
    assert tasks
    assert all(task["tags"] == task["ansible.builtin.import_role"]["name"] for task in tasks)


@pytest.mark.parametrize("inventory", ["lab", "example"])
def test_an_inventory_sets_only_what_a_role_knows(inventory: str) -> None:
    known = {name for entries in SPECIFICATIONS.values() for name in role_tables.options(entries)}
    files = (ROOT / "inventory" / inventory / "group_vars").rglob("*.yml")
    names = {name for file in files for name in yaml.safe_load(file.read_text()) or {}}
    assert names
    assert {name for name in names if not name.startswith("vault_")} <= known


def test_the_controller_knows_an_adapter_by_the_digest_of_the_store(
    adapter: Callable[..., Path], tmp_path: Path
) -> None:
    source = adapter("weights")
    store = tmp_path / "store"
    store.mkdir()
    with Store(store).stage(from_directory(source)) as staged:
        assert lora_digest(str(source)) == staged.digest


def test_the_page_of_variables_is_what_the_specifications_say() -> None:
    assert role_tables.README.read_text() == role_tables.text(), "run `make docs`"
