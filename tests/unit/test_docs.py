"""What the pages for readers say is true of the code, and no file names what only one machine has."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

import role_tables
from function_gemma.adapters.files import FILES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "server/README.md",
    "agents/README.md",
    "roles/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/threat-model.md",
]
EXTENSIONS = r"\.(?:cfg|conf|env|hujson|json|md|py|safetensors|sh|toml|txt|ya?ml)"
# Whose hosts only a machine's own configuration may name. In pieces, or this file would name them.
REGISTRIES = [
    *(("pypi", "org"), ("pythonhosted", "org"), ("deb.debian", "org"), ("security.debian", "org")),
    *(("archive.ubuntu", "com"), ("ports.ubuntu", "com"), ("alpinelinux", "org"), ("proxy.golang", "org")),
    *(
        ("sum.golang", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("galaxy.ansible", "com"),
        ("rubygems", "org"),
    ),
    *(
        ("pkgs.tailscale", "com"),
        ("ghcr", "io"),
        ("quay", "io"),
    ),  # Docker's and NVIDIA's own are defaults here
]
# Where a person's files lie on one machine; those that the lab's laptop has are the same everywhere.
PLACE = re.compile(r"(?<![\w.}])/(?:home/(?!checkout\b)|Users/|work/|tmp/shared)\w")


@cache
def files() -> frozenset[str]:
    """Every file of the project, uncommitted ones too."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(name for name in names if (ROOT / name).is_file())


def read(name: str) -> str:
    return (ROOT / name).read_text(errors="replace")


def code(page: str) -> list[str]:
    """The page's code: each block, and each span between backticks."""
    blocks = re.compile(r"^ *```.*?^ *```|(?<=\n\n)(?: {4}.*\n)+", re.MULTILINE | re.DOTALL)
    text = read(page)
    return blocks.findall(text) + re.findall(r"`([^`]+)`", blocks.sub("", text))


def exists(name: str) -> bool:
    """Whether the project has it, whole or as a path's end, or git ignores it: a file that a host makes."""
    name = name.removeprefix("./").rstrip("/")
    if any(f"/{file}".endswith(f"/{name}") or f"/{name}/" in f"/{file}" for file in files()):
        return True
    ignored = ("git", "check-ignore", name, f"{name}/", f"server/{name}")
    return name in FILES or bool(subprocess.run(ignored, cwd=ROOT, capture_output=True, check=False).stdout)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def hujson(text: str) -> Any:  # noqa: ANN401 - a policy holds lists, strings and mappings
    """Read JSON with comments that stand on lines of their own, and commas at the end."""
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)))


def meaning(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy without the name that its control plane gives to those who may."""
    (who,) = {name for rule in policy["grants"] + policy["ssh"] for name in rule["src"]}
    renamed: dict[str, Any] = json.loads(json.dumps(policy).replace(json.dumps(who), '"administrators"'))
    return renamed


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in map(
            slug, re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        ), target


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert {target for part in code(page) for target in re.findall(r"\bmake ([a-z]+)", part)} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_playbook_exists(page: str) -> None:
    named = {
        name for part in code(page) for name in re.findall(r"ansible-playbook (?:-\S+ )*(\S+\.yml)", part)
    }
    assert not [name for name in named if name not in files()]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_exists_or_is_one_that_a_host_makes(page: str) -> None:
    folders = "|".join(sorted({PurePosixPath(name).parts[0] for name in files() if "/" in name}))
    named = re.compile(
        rf"(?<![\w/:.<>~$\"-])(?:(?:{folders})/[\w./-]*\w/?|[\w./-]*\w{EXTENSIONS})(?![\w/<>…-])"
    )
    assert not [
        name
        for part in code(page)
        for name in named.findall(part)
        if not name.startswith("/") and not exists(name)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_exists(page: str) -> None:
    server = "\n".join(
        read(name) for name in files() if name.startswith("server/") and not name.endswith(".md")
    )
    specifications = role_tables.specifications()
    variables = {name for entries in specifications.values() for name in role_tables.options(entries)}
    known = variables | set(specifications)
    owners = "|".join([*specifications, "gateway", "vllm", "haproxy"])
    for part in code(page):
        for name in re.findall(
            r"\b(?:SERVER|TAILSCALE|GATEWAY|AGENTS_SERVER|VLLM|HAPROXY)_[A-Z_]*[A-Z]\b", part
        ):
            assert re.search(rf"\b{name}\b", server), name
        for name in re.findall(rf"(?<![\w./-])(?:{owners})_\w+\b(?![./])", part):
            assert name in known, name
        for default in re.findall(r"\$\{\w+:-[^}]*\}", part):
            assert default in server, default


def test_the_picture_shows_every_container() -> None:
    services = yaml.safe_load(read("server/docker-compose.yml"))["services"]
    picture = code("README.md")[0]
    assert not [name for name in services if name not in picture]
    assert not [
        one["container_name"]
        for name, one in services.items()
        if name != "pod" and one["container_name"] not in picture
    ]


def test_what_is_tested_names_the_versions_that_are_pinned() -> None:
    _, table = read("README.md").split("## What is tested, on what")
    pins = "".join(
        map(read, ("server/Dockerfile", "server/Dockerfile.tailscale", "server/docker-compose.yml"))
    )
    versions = re.findall(r"(?:vllm-openai-cpu|tailscale/tailscale|haproxy):v?([\d.]+)", pins)
    versions += re.findall(r"juanfont/headscale v([\d.]+)", read("tests/lab/go/headscale/go.mod"))
    assert len(set(versions)) == 4
    assert not [version for version in versions if version not in table]


def test_the_hosts_prerequisites_are_those_of_the_preflight() -> None:
    private, page = yaml.safe_load(read("roles/preflight/vars/main.yml")), read("README.md")
    disk = private["__preflight_disk"]
    systems = [system.split("-") for system in private["__preflight_systems"]]
    releases = {name: " or ".join(one for own, one in systems if own == name) for name, _ in systems}
    assert f"- Debian {releases['debian']}, Ubuntu {releases['ubuntu']}, x86-64" in page
    assert f"Compose ≥ {private['__preflight_compose_minimum']}" in page
    assert f"Python {private['__preflight_python_minimum']} or newer as `python3`" in page
    assert f"{disk['cpu']} GiB free" in page
    assert f"{disk['gpu']} GiB with a GPU" in page
    assert f"{disk['cpu']} GiB free" in read("server/README.md")


def test_every_message_of_the_troubleshooting_table_is_one_that_the_code_says() -> None:
    _, table = read("README.md").split("## When something is wrong")
    rows = re.findall(r"^\| (?!you see|---)(.*?) \|", table, re.MULTILINE)
    said = " ".join(
        " ".join(read(name).split())
        for name in files()
        if not name.endswith(".md") and "tests/unit" not in name
    )
    fragments = [
        piece.strip() for row in rows for span in re.findall(r"`([^`]+)`", row) for piece in span.split("…")
    ]
    assert len(rows) > 10
    assert not [piece for piece in fragments if piece not in said and not piece.startswith("make ")]


def test_the_policies_shown_parse_and_mean_what_the_labs_means() -> None:
    shown = [hujson(text) for text in re.findall(r"```hujson\n(.*?)```", read("README.md"), re.DOTALL)]
    lab = hujson(read("tests/lab/headscale/policy.hujson"))
    assert len(shown) == 2
    assert [meaning(policy) for policy in shown] == [meaning(lab)] * 2
    assert lab in shown


def test_the_example_inventory_uses_the_tag_of_the_policy() -> None:
    (tag,) = hujson(read("tests/lab/headscale/policy.hujson"))["tagOwners"]
    assert tag in read("inventory/example/group_vars/inference_servers/main.yml")


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = re.compile("|".join(rf"(?<![\w-]){re.escape('.'.join(host))}\b" for host in REGISTRIES))
    assert {name: hosts.findall(read(name)) for name in files() if hosts.search(read(name))} == {}


def test_no_file_names_a_place_of_one_machine() -> None:
    assert [name for name in files() if PLACE.search(read(name))] == []
