"""The roles' promises that need no host."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from lora import Adapter, Served, Step, lora_plan, lora_problems

import role_tables
from function_gemma.adapters.files import FILES
from function_gemma.adapters.store import digest_of

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATIONS = role_tables.specifications()
ROLES = sorted(SPECIFICATIONS)
ENV_TEMPLATES = sorted(ROOT.glob("roles/*/templates/*.env.j2"))
# The file in server/ that reads what a template writes.
READERS = {
    "compose.env.j2": ["docker-compose.yml", "update.sh"],
    "entrypoint.env.j2": ["entrypoint.sh"],
    "gateway.env.j2": ["haproxy/haproxy.cfg"],
    "tailscale.env.j2": ["tailscale.sh"],
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


class Compose(yaml.SafeLoader):
    """YAML with the tag that takes back what a service has by `extends`."""


Compose.add_constructor("!reset", lambda _loader, _node: None)


def test_each_further_gpu_gets_a_vllm_of_its_own_that_the_gateway_and_its_health_check_know() -> None:
    template = ROOT / "roles/server/templates/docker-compose.gpus.yml.j2"
    further = ["nvidia.com/gpu=1", "nvidia.com/gpu=GPU-57a4d149"]
    lines = render(template, {"__server_gpus_further": further})
    services = yaml.load("\n".join(lines), Compose)["services"]  # noqa: S506 (it is a safe loader)
    assert services.pop("gateway") == {
        "environment": {"GATEWAY_VLLM_1": "enabled", "GATEWAY_VLLM_2": "enabled"}
    }
    assert list(services) == ["vllm-server-1", "vllm-server-2"]
    gateway = (ROOT / "server/haproxy/haproxy.cfg").read_text()
    for number, (gpu, service) in enumerate(zip(further, services.values(), strict=True), 1):
        socket = f"/run/vllm/vllm-{number}.sock"
        assert f'unix@{socket} check "${{GATEWAY_VLLM_{number}-disabled}}"' in gateway
        (device,) = service.pop("deploy")["resources"]["reservations"]["devices"]
        assert device == {"driver": "${GPU_DRIVER:-cdi}", "capabilities": ["gpu"], "device_ids": [gpu]}
        assert service == {
            "extends": {"file": "docker-compose.yml", "service": "vllm-server"},
            "build": None,
            "container_name": f"vllm-gemma-{number}",
            "environment": {"SERVER_SOCKET": socket},
            "healthcheck": {"test": ["CMD", "healthcheck.py", socket, "/ready"]},
        }


# What the host has by CDI, its engine, what is asked for, and the devices of one vLLM each.
CHOICES: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("all 0 1 2 GPU-a GPU-b", "26.1.5", {}, [f"nvidia.com/gpu={gpu}" for gpu in range(3)]),
    ("all 0 GPU-a", "26.1.5", {}, ["nvidia.com/gpu=0"]),
    ("all 0 1 GPU-b", "26.1.5", {"server_gpus": ["GPU-b", 0]}, ["nvidia.com/gpu=GPU-b", "nvidia.com/gpu=0"]),
    ("all 0 1", "26.1.5", {"server_gpus": 1}, ["nvidia.com/gpu=1"]),
    ("all", "26.1.5", {}, ["nvidia.com/gpu=all"]),  # WSL2
    ("all 0 1", "20.10.24", {}, ["0", "1"]),
    ("all 0 1", "26.1.5", {"server_accelerator": "cpu"}, []),
    ("", "26.1.5", {}, []),
]


def test_each_chosen_gpu_is_given_to_a_vllm_by_the_name_that_the_engine_knows(tmp_path: Path) -> None:
    tasks = []
    for there, engine, asked, names in CHOICES:
        lines = [f"engine {engine}", *(f"nvidia.com/gpu={gpu}" for gpu in there.split())]
        defaults = {"server_accelerator": "auto", "server_gpus": ["all"]}
        known = {"__server_devices": {"stdout_lines": lines}, "expected": names}
        found = "(__server_gpu_names[:1] if __server_on_gpu else []) + __server_gpus_further"
        task = {"name": there, "ansible.builtin.assert": {"that": f"{found} == expected"}}
        tasks.append({**task, "vars": {**defaults, **asked, **known}})
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
    (tmp_path / "play.yml").write_text(
        yaml.safe_dump([{**play, "vars_files": [f"{ROOT}/roles/server/vars/main.yml"]}])
    )
    ansible = Path(sys.executable).with_name("ansible-playbook")
    words: list[str | Path] = [ansible, "-i", "localhost,", tmp_path / "play.yml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", ENV_TEMPLATES, ids=lambda path: path.name)
def test_what_a_template_writes_is_read(template: Path) -> None:
    readers = "".join((ROOT / "server" / reader).read_text() for reader in READERS[template.name])
    assert [name for name in settings(template) if not re.search(rf"\b{name.upper()}\b", readers)] == []


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
    "playbook",
    [
        *("site.yml", "update.yml", "load_adapter.yml", "playbooks/connection_check.yml"),
        *("playbooks/doctor.yml", "playbooks/uninstall.yml"),
    ],
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


def test_the_page_of_variables_is_what_the_specifications_say() -> None:
    assert role_tables.README.read_text() == role_tables.text(), "run `make docs`"


# ── The declared adapters ────────────────────────────────────────────────────────────────────────

ADDRESS = f"hf://lab/docstring-lora@{'0123456789' * 4}"
OLDER, OLD = "a" * 12, "b" * 12


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Make an adapter's directory in the inventory `tmp_path`, good as far as it shows without a base."""

    def make(name: str, value: int = 0) -> Path:
        path = tmp_path / name
        path.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "google/functiongemma-270m-it",
            "r": 1,
            "lora_alpha": 1,
            "target_modules": ["q_proj"],
        }
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        header = json.dumps(
            {
                f"{module}.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
                f"{module}.lora_B.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        contents = json.dumps(config).encode(), struct.pack("<Q", len(header)) + header + bytes([value] * 16)
        for file, content in zip(FILES, contents, strict=True):
            (path / file).write_bytes(content)
        return path

    return make


def served(name: str, serves: str | None = OLD, **known: Any) -> Served:  # noqa: ANN401 (as the manager's JSON)
    """What the manager's history says of a name that served OLDER before OLD."""
    generations = [{"digest": digest, "kept": True} for digest in (OLDER, OLD)]
    return {
        "name": name,
        "serves": serves,
        "source": None,
        "quarantined": None,
        "generations": generations,
        **known,
    }


def plan(
    adapters: list[Adapter],
    on_host: list[Served],
    inventory: Path = Path("/nowhere"),
    *,
    only: tuple[str, ...] = (),
    state: str = "present",
    rollback: bool = False,
) -> list[Step]:
    return lora_plan(adapters, on_host, str(inventory), only=only, state=state, rollback=rollback)


def problems(adapters: list[Adapter], inventory: Path = Path("/inventory"), **narrowing: Any) -> list[str]:  # noqa: ANN401 (as after -e)
    arguments = {"only": (), "state": "present", "rollback": False, "base": "gemma", "max_cpu_loras": 16}
    return lora_problems(adapters, str(inventory), **{**arguments, **narrowing})


def test_what_a_host_lacks_is_loaded_and_what_is_not_declared_unloaded(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    new = digest_of(source("lint"))
    declared = [
        {"name": "lint", "source": "lint", "agent": "test"},
        {"name": "docstring", "source": ADDRESS},
    ]
    assert plan(declared, [served("lint"), served("gone")], tmp_path) == [
        {
            "name": "lint",
            "line": f"lint: {OLD} → {new}",
            "command": ["load", "lint", "-", "--agent", "test"],
            "directory": str(tmp_path / "lint"),
        },
        {
            "name": "docstring",
            "line": f"docstring: none → {ADDRESS}",
            "command": ["load", "docstring", ADDRESS],
            "directory": "",
        },
        {"name": "gone", "line": f"gone: {OLD} → none", "command": ["unload", "gone"], "directory": ""},
    ]


def test_an_adapter_is_unchanged_where_its_digest_or_its_address_is_served(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    directory = source("lint")
    on_host = [
        served("lint", digest_of(directory)),
        served("docstring", source=ADDRESS),
        served("past", None),
    ]
    # An absolute source stays as it is.
    declared = [{"name": "lint", "source": str(directory)}, {"name": "docstring", "source": ADDRESS}]
    assert plan(declared, on_host, tmp_path) == []


def test_another_commit_on_the_hub_is_another_adapter() -> None:
    other = ADDRESS[:-1] + "0"
    on_host = [served("docstring", source=other)]
    (step,) = plan([{"name": "docstring", "source": ADDRESS}], on_host)
    assert step["line"] == f"docstring: {OLD} → {ADDRESS}"


def test_a_quarantined_adapter_is_loaded_again_and_says_why() -> None:
    on_host = [served("docstring", source=ADDRESS, quarantined="it was changed")]
    (step,) = plan([{"name": "docstring", "source": ADDRESS}], on_host)
    assert step["line"] == f"docstring: {OLD} (quarantined: it was changed) → {ADDRESS}"
    assert step["command"] == ["load", "docstring", ADDRESS]


def test_a_run_for_one_name_leaves_the_others_alone() -> None:
    declared = [{"name": name, "source": ADDRESS} for name in ("lint", "docstring")]
    (step,) = plan(declared, [served("gone")], only=("docstring",))
    assert step["name"] == "docstring"


@pytest.mark.parametrize(
    ("on_host", "expected"),
    [([served("lint")], ["unload", "lint"]), ([served("lint", None)], None), ([], None)],
)
def test_absent_unloads_what_is_served_be_it_declared_or_not(
    on_host: list[Served], expected: list[str] | None
) -> None:
    steps = plan([], on_host, only=("lint",), state="absent")
    assert [step["command"] for step in steps] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("one", "line", "digest"),
    [
        (served("lint"), f"lint: {OLD} → {OLDER}", OLDER),
        (served("lint", None), f"lint: none → {OLD}", OLD),  # of one that was unloaded: what it served last
        (served("lint", OLDER), f"lint: {OLDER} → {OLD}", OLD),
    ],
)
def test_a_rollback_goes_to_the_generation_before(one: Served, line: str, digest: str) -> None:
    (step,) = plan([], [one], only=("lint",), rollback=True)
    assert (step["line"], step["command"]) == (line, ["rollback", "lint", "--to", digest])


def test_there_is_no_rollback_to_what_is_not_kept() -> None:
    pruned = [{"digest": OLDER, "kept": False}, {"digest": OLD, "kept": True}]
    assert plan([], [served("lint", generations=pruned)], only=("lint",), rollback=True) == []
    assert plan([], [], only=("lint",), rollback=True) == []


def test_good_adapters_have_no_problem(source: Callable[..., Path], tmp_path: Path) -> None:
    source("lint")
    declared = [
        {"name": "lint", "source": "lint", "agent": "test"},
        {"name": "docstring", "source": ADDRESS},
    ]
    assert problems(declared, tmp_path) == []


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"name": "../lint"}, "'../lint' cannot name an adapter"),
        ({"name": "Lint"}, "'Lint' cannot name an adapter"),
        ({"name": "gemma"}, "it is the base model's name: choose another"),
        ({"source": "nowhere"}, "its source /inventory/nowhere is no directory"),
        ({"source": "hf://lab/lint"}, "'hf://lab/lint' is no adapter on the Hub: write hf://ORG/REPO@COMMIT"),
        ({"source": "hf://lab/lint@main"}, "is no adapter on the Hub"),
        ({"source": f"{ADDRESS}0"}, "is no adapter on the Hub"),
        ({"source": f"hf://lab/lint@{'ABCDEF0123' * 4}"}, "is no adapter on the Hub"),
        ({"agent": "nobody"}, "its agent nobody has no "),
        ({"agent": "../agents/lint"}, "its agent ../agents/lint has no "),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_named_with_what_mends_it(adapter: Adapter, says: str) -> None:
    found = problems([{"name": "lint", "source": ADDRESS, **adapter}])
    assert [says in problem for problem in found] == [True]


@pytest.mark.parametrize(("file", "content"), [(FILES[0], "{"), (FILES[1], "no weights"), (FILES[1], None)])
def test_an_adapter_is_inspected_before_it_is_sent(
    source: Callable[..., Path], tmp_path: Path, file: str, content: str | None
) -> None:
    path = source("lint") / file
    path.unlink() if content is None else path.write_text(content)
    (problem,) = problems([{"name": "lint", "source": "lint"}], tmp_path)
    assert problem.startswith(f"Adapter 'lint' in lora_adapters ({tmp_path}): ")
    assert file in problem


def test_all_problems_are_told_at_once_and_a_name_that_stands_twice_once() -> None:
    twice = [{"name": "lint", "source": ADDRESS}, {"name": "lint", "source": "elsewhere"}]
    found = problems([*twice, {"name": "docstring", "source": "nowhere"}], only=())
    assert len(found) == 2
    assert "Adapter 'lint'" in found[0]
    assert "it is declared twice: remove one" in found[0]
    assert "nowhere is no directory" in found[1]


def test_a_broken_source_is_in_the_way_of_its_own_name_alone() -> None:
    declared = [{"name": "lint", "source": "nowhere"}, {"name": "docstring", "source": ADDRESS}]
    assert problems(declared, only=("docstring",)) == []
    assert problems(declared, only=("lint",), state="absent") == []
    assert problems(declared, only=("lint",), rollback="true") == []
    assert len(problems(declared, only=("lint",))) == 1


def test_only_a_declared_adapter_can_be_loaded_by_name_but_any_can_be_taken_away_or_back() -> None:
    assert (
        "test is not declared, only lint is: add it to lora_adapters in /inventory/group_vars"
        in problems([{"name": "lint", "source": ADDRESS}], only=("test",))[0]
    )
    assert problems([], only=("test",), state="absent") == []
    assert problems([], only=("test",), rollback="true") == []


@pytest.mark.parametrize(
    ("narrowing", "says"),
    [
        ({"state": "absent"}, "load_adapter.yml -e name=NAME -e state=absent"),
        ({"rollback": "true"}, "load_adapter.yml -e name=NAME -e rollback=true"),
        ({"only": ("lint",), "state": "gone"}, "state=gone is no choice, present and absent are"),
        ({"only": ("lint",), "rollback": "maybe"}, "rollback=maybe is no choice, true and false are"),
        ({"only": ("lint",), "state": "absent", "rollback": True}, "at once cannot be"),
    ],
)
def test_what_narrows_a_run_is_refused_with_the_right_command(narrowing: dict[str, Any], says: str) -> None:
    (problem,) = problems([{"name": "lint", "source": "nowhere"}], **narrowing)
    assert says in problem
    assert "ansible-playbook load_adapter.yml -e name=" in problem


def test_there_must_be_room_for_two_generations_of_each_adapter() -> None:
    declared = [{"name": f"lint-{number}", "source": ADDRESS} for number in range(3)]
    assert problems(declared, max_cpu_loras=6) == []
    assert "server_max_cpu_loras is 5, but" in problems(declared, max_cpu_loras=5)[0]
    assert "set it to 6 in /inventory/group_vars" in problems(declared, max_cpu_loras=5)[0]


def test_the_default_of_max_cpu_loras_is_found_where_it_stands() -> None:
    variable = load("roles/lora/vars/main.yml")["__lora_max_cpu_loras"]
    pattern = re.search(r"regex_search\('(.+?)'", variable)
    assert pattern
    assert re.search(pattern[1], (ROOT / "server/entrypoint.sh").read_text())


def test_ansible_looks_for_no_hosts_in_an_inventory_s_adapters(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "hosts.yml").write_text("inference_servers: {hosts: {box: {}}}")
    (tmp_path / "adapters").mkdir()
    source("adapters/lint")
    command: list[str | Path] = [
        Path(sys.executable).with_name("ansible-inventory"),
        "-i",
        tmp_path,
        "--graph",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.count("--box"), done.stderr) == (1, "")
