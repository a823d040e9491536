"""What the role docker makes of a host: daemon.json, packages, refusals. tests/molecule/docker does it on "
"a host."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from daemon_settings import daemon_settings, flags_by_key, wanted_settings
from docker_plan import Changes, Plan, docker_changes, docker_plan

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/docker"
VARS = yaml.safe_load((ROLE / "vars/main.yml").read_text())
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
SYSTEMS = {"debian-12": "bookworm", "debian-13": "trixie", "ubuntu-22.04": "jammy", "ubuntu-24.04": "noble"}
Tree = dict[str, Any]

NOTHING = {
    "server": "",
    "client": "",
    "compose": "",
    "buildx": "",
    "root": "",
    "swarm": False,
    "containerd_store": False,
}
GOOD = {**NOTHING, "server": "29.1.3", "client": "29.1.3", "compose": "v2.40.3", "buildx": "v0.30.1"}
DISTRIBUTION = {"docker.io": "26.1.5", "docker-cli": "26.1.5", "docker-compose": "2.26.1-4"}
DISTRIBUTION |= {"docker-buildx": "0.13.1", "containerd": "1.7.24", "runc": "1.1.15"}
DOCKER = {"docker-ce": "5:29.1.3-1~debian.13~trixie", "docker-ce-cli": "5:29.1.3-1~debian.13~trixie"}
DOCKER |= {
    "containerd.io": "2.2.0-1",
    "docker-compose-plugin": "2.40.3-1",
    "docker-buildx-plugin": "0.30.1-1",
}


def host(settings: Tree | str | None = None, **known: Any) -> Tree:  # noqa: ANN401 (what the probe says)
    """What the probe says of a bare Debian 13, but for what is `known`."""
    file = {"kind": "absent"}
    if settings is not None:
        file = {"kind": "file", "text": settings if isinstance(settings, str) else json.dumps(settings)}
    return {
        "os": "debian",
        "release": "13",
        "codename": "trixie",
        "packages": {},
        "held": [],
        "snap": False,
        "dockerd": bool(known.get("packages")),
        "docker": GOOD if known.get("packages") else NOTHING,
        "unit": bool(known.get("packages")),
        "active": bool(known.get("packages")),
        "enabled": bool(known.get("packages")),
        "masked": [],
        "flags": ["-H", "fd://", "--containerd=/run/containerd/containerd.sock"],
        "environment": {},
        "settings": file,
        "root": {"path": "/var/lib/docker", "data": []},
        "wanted_root": "",
        "running": [],
        "source": "",
        "pin": "",
        "record": {},
        **known,
    }


def arguments(**given: Any) -> Tree:  # noqa: ANN401 (the role's)
    """The role's arguments without their prefix: the defaults, but for what is `given`."""
    values = {name.removeprefix("docker_"): value for name, value in DEFAULTS.items()}
    return {
        **values,
        "systems": VARS["__docker_systems"],
        "proxy": "",
        "no_proxy": [],
        "data_root": "",
        "leaving": [],
        **given,
    }


def settings(facts: Tree, **given: Any) -> Tree:  # noqa: ANN401
    preferred = {"log-driver": "local", "log-opts": {"max-size": "10m"}}
    return {**daemon_settings(facts, wanted_settings(arguments(**given)), preferred)}


def written(facts: Tree, **given: Any) -> Tree:  # noqa: ANN401
    result = settings(facts, **given)
    assert result["problems"] == []
    tree: Tree = json.loads(result["text"])
    return tree


def later(facts: Tree, result: Tree, **changes: Any) -> Tree:  # noqa: ANN401
    """The host after a run that wrote `result`, and after somebody's `changes`."""
    record = {"settings": {"added": result["added"], "before": result["before"]}}
    text = json.dumps({**json.loads(result["text"]), **changes}) if changes else result["text"]
    return {**facts, "settings": {"kind": "file", "text": text}, "record": record}


def plan(facts: Tree, **given: Any) -> Plan:  # noqa: ANN401
    given = arguments(**given)
    wanted = {} if given["state"] == "absent" else wanted_settings(given)
    return docker_plan(facts, given, {**daemon_settings(facts, wanted)})


OURS = {"features": {"cdi": True}, "live-restore": True}
LOGS = {"log-driver": "local", "log-opts": {"max-size": "10m"}}


# ── daemon.json ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", [None, {}, "", " \n", {"debug": True, "max-concurrent-downloads": 5}])
def test_what_the_host_has_stays_and_ours_is_added(before: Tree | str | None) -> None:
    theirs = before if isinstance(before, dict) else {}
    assert written(host(before)) == {**theirs, **OURS, **LOGS}


def test_lists_are_united_and_features_merged_one_by_one() -> None:
    before = {"registry-mirrors": ["https://theirs"], "features": {"buildkit": True}}
    after = written(host(before), registry_mirrors=["https://theirs", "http://ours:5000"])
    assert after["registry-mirrors"] == ["https://theirs", "http://ours:5000"]
    assert after["insecure-registries"] == ["ours:5000"]
    assert after["features"] == {"buildkit": True, "cdi": True}


@pytest.mark.parametrize("theirs", [{"log-driver": "journald"}, {"log-opts": {"tag": "x"}}])
def test_the_hosts_own_log_settings_win(theirs: Tree) -> None:
    assert written(host(theirs)) == {**theirs, **OURS}


def test_a_log_driver_given_as_a_flag_wins() -> None:
    assert written(host(flags=["--log-driver=journald"])) == OURS


def test_a_second_run_changes_nothing() -> None:
    facts = host({"debug": True, "registry-mirrors": ["https://theirs"]})
    result = settings(facts, registry_mirrors=["https://ours"])
    again = settings(later(facts, result), registry_mirrors=["https://ours"])
    assert (again["changes"], again["restart"], again["lines"]) == (False, False, [])
    assert (again["added"], again["before"]) == (result["added"], result["before"])


def test_a_file_that_holds_all_already_is_left_as_it_is() -> None:
    result = settings(host(json.dumps({**OURS, **LOGS})))
    assert (result["changes"], result["added"]) == (False, {})


def test_what_is_wanted_no_longer_goes_and_theirs_stays() -> None:
    facts = host({"registry-mirrors": ["https://theirs"]})
    result = settings(facts, registry_mirrors=["https://ours", "http://plain"])
    after = written(later(facts, result), registry_mirrors=["https://other"])
    assert after["registry-mirrors"] == ["https://theirs", "https://other"]
    assert "insecure-registries" not in after


@pytest.mark.parametrize(
    "before",
    [
        None,
        '{"debug":true ,\n\t"registry-mirrors": ["https://theirs"]}',
        '{"features": {}}',
        '{"live-restore": true}',
        "\n",
    ],
)
def test_absent_gives_the_file_back_to_the_letter(before: str | None) -> None:
    facts = host(before)
    result = settings(facts, registry_mirrors=["http://ours"], proxy="http://proxy:3128")
    assert daemon_settings(later(facts, result), {})["text"] == before


def test_absent_keeps_what_somebody_else_has_changed_since() -> None:
    facts = host({"debug": True})
    changed = later(facts, settings(facts), debug=False, **{"log-driver": "journald"})
    text = daemon_settings(changed, {})["text"]
    assert text is not None
    assert json.loads(text) == {"debug": False, "log-driver": "journald"}


def test_absent_without_a_record_looks_at_nothing() -> None:
    result = daemon_settings(host("{ no JSON"), {})
    assert (result["problems"], result["changes"]) == ([], False)


@pytest.mark.parametrize(
    ("before", "given", "restart"),
    [
        ({"features": {"cdi": True}, **LOGS}, {}, False),  # live-restore
        ({**OURS, **LOGS}, {"settings": {"debug": True, "labels": ["a=b"], "shutdown-timeout": 30}}, False),
        ({"live-restore": True, **LOGS}, {}, True),  # features.cdi
        ({**OURS}, {}, True),  # the log driver
        ({**OURS, **LOGS}, {"registry_mirrors": ["https://ours"]}, True),  # BuildKit sees no reload
        ({**OURS, **LOGS}, {"proxy": "http://proxy:3128"}, True),
        ({**OURS, **LOGS}, {"data_root": "/srv/docker"}, True),
    ],
)
def test_the_engine_restarts_only_for_what_a_reload_does_not_bring(
    before: Tree, given: Tree, *, restart: bool
) -> None:
    result = settings(host(before), **given)
    assert (result["changes"], result["restart"]) == (True, restart)


def test_a_key_that_goes_needs_a_restart() -> None:
    facts = host({**OURS, **LOGS})
    result = settings(facts, settings={"debug": True})
    assert settings(later(facts, result))["restart"]


def test_proxy_data_root_and_further_keys_stand_where_the_engine_reads_them() -> None:
    after = written(
        host(),
        proxy="http://proxy:3128",
        no_proxy=["localhost", ".lan"],
        data_root="/srv/docker",
        settings={"bip": "10.9.0.1/24", "log-driver": "journald"},
    )
    proxies = {"http-proxy": "http://proxy:3128", "https-proxy": "http://proxy:3128"}
    assert after["proxies"] == {**proxies, "no-proxy": "localhost,.lan"}
    assert after["data-root"] == "/srv/docker"
    # Otherwise Engine 29 would keep its images in containerd's directory.
    assert after["features"] == {"cdi": True, "containerd-snapshotter": False}
    assert (after["bip"], after["log-driver"]) == ("10.9.0.1/24", "journald")
    assert "log-opts" not in after


@pytest.mark.parametrize(
    ("before", "given", "says"),
    [
        (
            {"live-restore": False},
            {},
            "has live-restore = false and true is needed: take it out there, or set docker_live_restore: "
            "false",
        ),
        ({"features": {"cdi": False}}, {}, "has features.cdi = false and true is needed"),
        (
            {"data-root": "/a"},
            {"data_root": "/b"},
            'has data-root = "/a" and "/b" is needed: take it out there, or set docker_data_root to it',
        ),
        (
            {"proxies": {"http-proxy": "http://a:1"}},
            {"proxy": "http://b:1"},
            'has proxies.http-proxy = "http://a:1" and "http://b:1" is needed',
        ),
        ({"debug": 1}, {"settings": {"debug": True}}, "has debug = 1 and true is needed"),
        ({"registry-mirrors": "x"}, {"registry_mirrors": ["https://o"]}, 'has registry-mirrors = "x" and'),
    ],
)
def test_a_key_that_contradicts_is_refused_with_both_sides_and_what_decides(
    before: Tree, given: Tree, says: str
) -> None:
    (problem,) = settings(host(before), **given)["problems"]
    assert problem.startswith("/etc/docker/daemon.json ")
    assert says in problem


@pytest.mark.parametrize(
    ("before", "given"),
    [
        ({"live-restore": False}, {"live_restore": False}),
        ({"features": {"cdi": False}}, {"settings": {"features": {"cdi": False}}}),
        ({"live-restore": False}, {"settings": {"live-restore": False}}),
    ],
)
def test_the_inventory_can_decide_for_what_the_host_has(before: Tree, given: Tree) -> None:
    assert {**written(host(before), **given), **before} == written(host(before), **given)


@pytest.mark.parametrize(
    ("known", "given", "says"),
    [
        ({"flags": ["--live-restore=false"]}, {}, "gives dockerd live-restore = false as a flag"),
        ({"flags": ["--data-root", "/a"]}, {"data_root": "/b"}, "gives dockerd data-root = /a as a flag"),
        ({"flags": ["-g", "/a"]}, {"data_root": "/b"}, "gives dockerd data-root = /a as a flag"),
        (
            {"flags": ["--registry-mirror=https://a"]},
            {"registry_mirrors": ["https://b"]},
            "gives dockerd registry-mirrors = https://a",
        ),
        ({"flags": ["--feature", "cdi=false"]}, {}, "gives dockerd features.cdi = false"),
        (
            {"environment": {"HTTPS_PROXY": "http://a:1"}},
            {"proxy": "http://b:1"},
            "gives dockerd proxies.https-proxy = http://a:1",
        ),
        ({"flags": ["--config-file=/srv/d.json"]}, {}, "with --config-file=/srv/d.json"),
        ({"docker": {**GOOD, "swarm": True}}, {}, "Swarm node and does not start with live-restore: set "),
    ],
)
def test_what_the_unit_or_the_swarm_contradicts_is_refused(known: Tree, given: Tree, says: str) -> None:
    (problem,) = settings(host(**known), **given)["problems"]
    assert says in problem


def test_what_a_flag_gives_already_is_not_written_for_the_engine_takes_no_key_twice() -> None:
    facts = host(flags=["--live-restore", "--registry-mirror=https://a", "--registry-mirror", "https://b"])
    assert written(facts, registry_mirrors=["https://b"]) == {"features": {"cdi": True}, **LOGS}


def test_flags_are_read_in_all_their_forms() -> None:
    assert flags_by_key(["-H", "fd://", "--live-restore", "--label=a=b", "--label", "c=d"], {}) == {
        "hosts": ["fd://"],
        "live-restore": ["true"],
        "labels": ["a=b", "c=d"],
    }


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ('{\n  "debug": true,\n}', "is no JSON: "),
        ('{\n  "debug": true,\n}', " in line 3, column 1. Correct it there; `python3 -m json.tool"),
        ("{} {}", "Extra data in line 1, column 4"),
        ('{"a": 1,\n"b": {},\n"a": 2}', "has the key a twice (lines 1, 3)"),
        ('["debug"]', "has a list at its top, line 1"),
        ("null", "has null at its top"),
        ({"kind": "link", "target": "/srv/daemon.json"}, "is a link to /srv/daemon.json"),
        ({"kind": "no file"}, "is a directory or something else that is no file: move it away"),
        ({"kind": "unreadable", "error": "position 3"}, "cannot be read as UTF-8 text: position 3"),
    ],
)
def test_a_file_that_the_engine_would_not_read_is_refused_with_the_place(file: Tree | str, says: str) -> None:
    facts = host(file) if isinstance(file, str) else {**host(), "settings": file}
    (problem,) = settings(facts)["problems"]
    assert problem.startswith("/etc/docker/daemon.json ")
    assert says in problem


# ── Packages ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_bare_host_gets_the_distributions_docker_where_its_compose_suffices(name: str) -> None:
    system, release = name.split("-")
    there = plan(host(os=system, release=release))
    assert there["problems"] == []
    own = VARS["__docker_systems"][name]["packages"]
    assert there["family"] == ("distribution" if own else "docker")
    assert there["install"] == (own or list(DOCKER))
    assert there["repository"] == ("" if own else "present")
    assert bool(own) == (name in {"debian-13", "ubuntu-24.04"})


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_systems_source_and_pin_can_be_written(name: str) -> None:
    system, release = name.split("-")
    facts = host(os=system, release=release, codename=SYSTEMS[name])
    tasks = yaml.safe_load((ROLE / "tasks/prepare.yml").read_text())
    source = next(task for task in tasks if "ansible.builtin.include_role" in task)["vars"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701 (no HTML)
    environment.filters["regex_replace"] = lambda text, _pattern, _by: text.rstrip("/")
    variables = {**DEFAULTS, "__docker_facts": facts}
    rendered = {
        key: environment.from_string(value).render(variables) if isinstance(value, str) else value
        for key, value in source.items()
    }
    assert rendered == {
        "apt_repository_name": "docker",
        "apt_repository_uri": f"https://download.docker.com/linux/{system}",
        "apt_repository_suite": SYSTEMS[name],
        "apt_repository_components": ["stable"],
        "apt_repository_key_url": f"https://download.docker.com/linux/{system}/gpg",
        "apt_repository_key_fingerprint": "9DC858229FC7DD38854AE2D88D81803C0EBFCD88",
    }
    pin = plan(facts, source="docker")["pin"].splitlines()
    assert pin[1:] == ["Package: docker-ce docker-ce-cli", "Pin: version 5:29.*", "Pin-Priority: 990"]


def test_preflight_and_docker_know_the_same_systems() -> None:
    preflight = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text())
    assert preflight["__preflight_systems"] == list(VARS["__docker_systems"]) == list(SYSTEMS)


@pytest.mark.parametrize(
    "known",
    [
        {"packages": DISTRIBUTION},
        {"packages": DOCKER},
        {"docker": GOOD, "dockerd": True, "unit": True, "active": True, "enabled": True},
        {"packages": {"moby-engine": "26.1"}},
        {"packages": DOCKER, "os": "arch", "release": ""},
    ],
)
def test_a_docker_that_is_good_enough_is_left_alone_whoever_installed_it(known: Tree) -> None:
    there = plan(host({**OURS}, **known))
    assert (there["problems"], there["lines"], there["moves"], there["pin"]) == ([], [], False, "")


def test_an_engine_that_does_not_run_is_started_and_nothing_else() -> None:
    stopped = {**GOOD, "server": ""}
    there = plan(host({**OURS}, packages=DOCKER, docker=stopped, active=False))
    assert there["lines"] == ["start the engine, now and at boot"]
    assert not there["moves"]


def test_a_docker_moves_only_where_the_inventory_names_the_other_source() -> None:
    there = plan(host(packages=DISTRIBUTION), source="docker")
    assert (there["family"], there["install"], there["remove"]) == (
        "docker",
        list(DOCKER),
        list(DISTRIBUTION),
    )
    back = plan(host(packages=DOCKER, source="Types: deb\n"), source="distribution")
    own = VARS["__docker_systems"]["debian-13"]["packages"]
    assert (back["family"], back["install"], back["remove"]) == ("distribution", own, list(DOCKER))
    assert (back["repository"], back["pin"]) == ("absent", "")


def test_what_the_role_holds_it_may_move_itself() -> None:
    facts = host(packages=DISTRIBUTION, held=["docker.io"], record={"held": ["docker.io"]})
    assert plan(facts, source="docker")["problems"] == []


def test_compose_1_is_in_nobodys_way() -> None:
    old = {"docker.io": "20.10.24", "docker-compose": "1.29.2-3", "runc": "1.1.5"}
    facts = host(packages=old, docker={**NOTHING, "server": "20.10.24"}, release="12")
    assert plan(facts, source="docker")["remove"] == ["docker.io", "runc"]


def test_what_the_role_held_is_held_again() -> None:
    record = {"packages": list(DOCKER), "held": ["docker-ce", "containerd.io"]}
    there = plan(host({**OURS}, packages=DOCKER, held=["docker-ce"], record=record, pin="x"))
    assert (there["hold"], there["moves"], there["problems"]) == (["containerd.io"], False, [])


def test_only_what_is_missing_or_too_old_is_installed() -> None:
    lacking = {name: version for name, version in DOCKER.items() if "compose" not in name}
    there = plan(host(packages=lacking, docker={**GOOD, "compose": ""}))
    assert (there["install"], there["upgrade"]) == (["docker-compose-plugin"], False)
    there = plan(host(packages=DOCKER, docker={**GOOD, "compose": "v2.10.0"}))
    assert (there["install"], there["upgrade"]) == (["docker-compose-plugin"], True)
    there = plan(host(packages=DOCKER, docker={**GOOD, "server": "20.10.24"}))
    assert (there["install"], there["upgrade"]) == (list(DOCKER), True)


def test_another_pin_upgrades_what_the_role_installed_and_nobody_elses() -> None:
    facts = host(packages=DOCKER, record={"packages": list(DOCKER)}, pin="old", source="URIs: x\n")
    there = plan(facts, version="5:30.*")
    assert (there["install"], there["upgrade"]) == (list(DOCKER), True)
    assert "5:30.*" in there["pin"]
    assert not plan(host(packages=DOCKER), version="5:30.*")["moves"]


def test_another_address_of_the_repository_is_written() -> None:
    facts = host(packages=DOCKER, source="URIs: https://old/debian\n", record={"packages": list(DOCKER)})
    assert plan(facts, repository="https://new/")["repository"] == "present"
    assert plan(facts, repository="https://old")["repository"] == ""


@pytest.mark.parametrize(
    ("known", "given", "says"),
    [
        (
            {"release": "12"},
            {"source": "distribution"},
            "debian 12 itself has no Docker Compose 2.24 (Engine none, Compose none, Buildx none): "
            "set docker_source: docker",
        ),
        (
            {
                "release": "12",
                "packages": {"docker.io": "20.10"},
                "docker": {**NOTHING, "server": "20.10.24"},
            },
            {},
            "set docker_source: docker, and the role installs from Docker's repository, with all containers",
        ),
        ({"os": "arch", "release": ""}, {}, "is not known here, and it has no Docker that is good enough"),
        (
            {"snap": True, "docker": GOOD},
            {},
            "Docker's snap is there (Engine 29.1.3, Compose v2.40.3, Buildx v0.30.1), and it does not",
        ),
        (
            {"dockerd": True, "unit": True, "docker": GOOD},
            {"source": "docker"},
            "Buildx v0.30.1), and docker_source is docker: remove it",
        ),
        ({"snap": True, "docker": {**GOOD, "compose": ""}}, {}, "snap remove docker"),
        (
            {"dockerd": True, "docker": {**GOOD, "buildx": ""}},
            {},
            "no package of the distribution's or Docker's",
        ),
        (
            {"packages": {"podman-docker": "5.4"}, "dockerd": False, "docker": NOTHING},
            {},
            "remove podman-docker",
        ),
        (
            {"masked": ["docker.service", "docker.socket"]},
            {},
            "systemctl unmask docker.service docker.socket",
        ),
        (
            {"packages": DISTRIBUTION, "held": ["docker.io", "vim"]},
            {"source": "docker"},
            "docker.io is held there and would have to change: apt-mark unhold docker.io",
        ),
        (
            {"packages": DOCKER, "docker": {**GOOD, "containerd_store": True}},
            {"source": "distribution"},
            "containerd's store, which it would no longer look into with the distribution: "
            "set docker_settings: {features: {containerd-snapshotter: true}}",
        ),
        (
            {"packages": DOCKER, "docker": {**GOOD, "containerd_store": True}},
            {"data_root": "/srv/docker"},
            "which it would no longer look into with docker_data_root",
        ),
        (
            {"packages": DOCKER, "root": {"path": "/var/lib/docker", "data": ["images", "volumes"]}},
            {"data_root": "/srv/docker"},
            "the data root would become /srv/docker, and the engine keeps images, volumes in "
            "/var/lib/docker, which it would no "
            "longer see. Leave it with docker_data_root: /var/lib/docker, or move all first: systemctl "
            "stop docker.socket docker",
        ),
        ({"wanted_root": "no directory"}, {"data_root": "/srv/docker"}, "which is no directory there"),
        ({}, {"data_root": "srv/docker"}, "give the absolute path"),
        ({}, {"data_root": "/"}, "give the absolute path"),
        ({}, {"data_root": "/srv/../etc"}, "give the absolute path"),
        ({}, {"proxy": "http://me:secret@proxy:3128"}, "docker_proxy has a user's name or password in it"),
        ({}, {"proxy": "proxy:3128"}, "docker_proxy is proxy:3128: give an address such as"),
        (
            {},
            {"registry_mirrors": ["m.example.org"]},
            "docker_registry_mirrors has m.example.org: give addresses",
        ),
        ({}, {"registry_mirrors": ["https://m/v2"]}, "without a path"),
    ],
)
def test_what_cannot_end_well_is_refused_with_what_mends_it(known: Tree, given: Tree, says: str) -> None:
    (problem,) = plan(host(**known), **given)["problems"]
    assert says in problem
    assert "secret" not in problem


def test_all_that_is_wrong_is_told_at_once() -> None:
    facts = host("{", masked=["docker.service"])
    assert len(plan(facts, registry_mirrors=["x"])["problems"]) == 3


@pytest.mark.parametrize("state", ["present", "absent"])
def test_a_data_root_that_is_asked_for_no_longer_is_not_left_behind(state: str) -> None:
    facts = host(packages=DOCKER)
    result = settings(facts, data_root="/srv/docker")
    full = {**later(facts, result), "root": {"path": "/srv/docker", "data": ["images"]}}
    (problem,) = plan(full, state=state)["problems"]
    assert "would become /var/lib/docker, and the engine keeps images in /srv/docker" in problem


def test_the_same_data_root_is_no_move() -> None:
    facts = host(packages=DOCKER, root={"path": "/srv/docker", "data": ["images"]})
    assert plan(facts, data_root="/srv/docker/")["problems"] == []


SIMULATED = """\
NOTE: This is only a simulation!
Remv docker.io [26.1.5]
Remv runc [1.1.15]
Inst libfresh (1.0 Debian:13/stable [amd64])
Inst docker-ce (5:29.1.3 Docker:trixie [amd64])
Inst libc6 [2.40] (2.41 Debian:13/stable [amd64])
Conf docker-ce (5:29.1.3 Docker:trixie [amd64])
"""


def changes(simulated: str, facts: Tree, remove: list[str], family: str = "docker") -> Changes:
    there = plan(host())
    return docker_changes(simulated, facts, {**there, "remove": remove, "family": family})


def test_the_record_tells_what_came_and_went_beside_the_plan_too() -> None:
    found = changes(SIMULATED, host(), ["docker.io", "runc"])
    assert found["problems"] == []
    assert found["packages"] == ["docker-ce", "libfresh"]
    assert found["removed"] == ["docker.io", "runc"]
    assert found["hold"] == ["docker-ce"]


def test_there_and_back_again_leaves_nothing_in_the_record() -> None:
    there = changes(SIMULATED, host(), ["docker.io", "runc"])
    record = {**there}
    back = "Remv docker-ce [1]\nRemv libfresh [1]\nInst docker.io (1 x)\nInst runc (1 x)\n"
    found = changes(back, host(record=record), ["docker-ce", "libfresh"], "distribution")
    assert (found["packages"], found["removed"]) == ([], [])


def test_what_apt_would_remove_besides_is_refused() -> None:
    (problem,) = changes(SIMULATED + "Remv kubelet [1.31]\n", host(), ["docker.io", "runc"])["problems"]
    assert "apt would also remove kubelet, which nobody asked for" in problem
    (problem,) = changes("Remv containerd [1.7]\n", host(), [])["problems"]
    assert "apt would also remove containerd" in problem


def test_a_package_held_by_somebody_else_is_not_changed() -> None:
    (problem,) = changes(
        SIMULATED, host(held=["libc6", "runc"], record={"held": ["runc"]}), ["runc", "docker.io"]
    )["problems"]
    assert problem == "libc6 is held there and would have to change: apt-mark unhold libc6"


# ── state: absent ────────────────────────────────────────────────────────────────────────────────

RECORD = {"packages": ["docker-ce", "tini"], "removed": [], "held": ["docker-ce"]}


def test_absent_on_a_host_where_nothing_was_done_does_nothing() -> None:
    there = plan(host("{ no JSON", packages=DOCKER, masked=["docker.service"]), state="absent")
    assert (there["problems"], there["lines"], there["moves"]) == ([], [], False)


def test_absent_removes_what_the_role_installed_and_is_still_there() -> None:
    facts = host(packages={"docker-ce": "5:29"}, record=RECORD, source="URIs: x\n", pin="x")
    there = plan(facts, state="absent")
    assert (there["problems"], there["remove"], there["stays"]) == ([], ["docker-ce"], False)
    assert (there["repository"], there["pin"]) == ("absent", "")


def test_absent_brings_the_former_family_back() -> None:
    record = {**RECORD, "removed": ["docker.io", "runc"]}
    there = plan(host(packages={"docker-ce": "5:29", "tini": "1"}, record=record), state="absent")
    assert (there["remove"], there["install"]) == (["docker-ce", "tini"], ["docker.io", "runc"])
    assert (there["family"], there["stays"]) == ("distribution", True)


def test_absent_takes_no_running_stack_down() -> None:
    running = [{"name": "vllm-gemma", "project": "function-gemma-server"}, {"name": "web", "project": ""}]
    first, second = plan(host(packages=DOCKER, record=RECORD, running=running), state="absent")["problems"]
    assert first == (
        "vllm-gemma runs there: take the stack down first, "
        "docker compose --project-name function-gemma-server down"
    )
    assert second == "web runs on the engine that would be removed: docker stop web"


def test_absent_leaves_an_engine_that_was_there_to_its_containers() -> None:
    facts = host(packages=DOCKER, running=[{"name": "web", "project": ""}])
    result = settings(facts)
    there = plan(later(facts, result), state="absent")
    assert (there["problems"], there["moves"], there["stays"]) == ([], False, True)
    assert not there["restart"]
    assert "not restart it, which would end containers" in there["lines"][-1]


def test_absent_restarts_an_engine_whose_own_live_restore_keeps_its_containers() -> None:
    facts = host({"live-restore": True}, packages=DOCKER, running=[{"name": "web", "project": ""}])
    there = plan(later(facts, settings(facts)), state="absent")
    assert (there["restart"], there["lines"][-1]) == (True, "restart the engine")


def test_absent_does_not_mind_what_an_uninstall_removes_first() -> None:
    facts = host(packages=DOCKER, running=[{"name": "vllm-gemma", "project": "function-gemma-server"}])
    there = plan(later(facts, settings(facts)), state="absent", leaving=["vllm-gemma"])
    assert (there["problems"], there["restart"]) == ([], True)
