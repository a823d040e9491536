"""Filters `docker_plan` and `docker_changes`: what becomes of Docker's packages, and what stands in the way.

A Docker belongs to a family: the distribution's packages or those of Docker's own repository. One that is
good enough is left alone.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypedDict
from urllib.parse import urlsplit

Tree = dict[str, Any]

PIN = """\
# Written by the role docker of function-gemma-server, which also takes it away.
Package: docker-ce docker-ce-cli
Pin: version {version}
Pin-Priority: 990
"""
STACK = "function-gemma-server"  # the Compose project
NOT_RESTARTED = (
    "not restart it, which would end containers: it keeps till its next start what a reload does not bring"
)
# The least that is good enough: Compose reads our files, and dockerd can check its settings (`--validate`).
MINIMUM = {"compose": (2, 24), "engine": (23, 0)}
DOCKER = ("docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin", "docker-buildx-plugin")
# All that belongs to a family, so that it goes when the other comes.
FAMILIES = {
    "docker": (*DOCKER, "docker-ce-rootless-extras", "docker-model-plugin", "docker-scan-plugin"),
    "distribution": (
        "docker.io",
        "docker-cli",
        "docker-compose",
        "docker-compose-v2",
        "docker-buildx",
        "containerd",
        "runc",
    ),
}
ENGINES = {"docker": "docker-ce", "distribution": "docker.io"}
WHOSE = {"docker": "Docker's repository", "distribution": "the distribution"}
# Nobody's family: they hold the places of files that ours bring, or are an engine of their own.
CONFLICTING = ("docker-engine", "lxc-docker", "podman-docker", "moby-engine", "moby-cli", "moby-compose")


class Plan(TypedDict):
    """What `docker_plan` returns."""

    problems: list[str]
    lines: list[str]  # what is done, for a reader
    family: str  # that the host has afterwards; empty for none, and for one that is left alone as it is
    install: list[str]
    remove: list[str]
    upgrade: bool  # what is to be installed is there, and too old
    hold: list[str]  # held by the role, and no longer
    moves: bool  # packages are installed or removed
    repository: str  # present: it is added or proven again; absent: what we wrote goes
    pin: str  # the apt preferences' content; empty where there are none
    stays: bool  # an engine is there afterwards
    restart: bool  # it starts anew, to read its settings


class Changes(TypedDict):
    """What `docker_changes` returns."""

    problems: list[str]
    packages: list[str]  # on the host by this role
    removed: list[str]  # that were there before
    hold: list[str]


def docker_plan(facts: Tree, arguments: Tree, settings: Tree) -> Plan:
    """Decide from what the probe found, the role's arguments without prefix, and `daemon_settings`."""
    plan = Plan(
        problems=list(settings["problems"]),
        lines=[],
        family="",
        install=[],
        remove=[],
        upgrade=False,
        hold=[],
        moves=False,
        repository="",
        pin="",
        stays=True,
        restart=settings["restart"],
    )
    running = [one for one in facts["running"] if one["name"] not in arguments["leaving"]]
    if arguments["state"] == "absent":
        _give_back(facts, running, plan)
    else:
        plan["problems"] += argument_problems(arguments)
        _packages(facts, arguments, plan)
        plan["problems"] += store_problems(facts, settings["merged"], plan)
        if facts["masked"]:
            plan["problems"].append(
                f"{', '.join(facts['masked'])} is masked, so that the engine cannot be started: systemctl "
                f"unmask {' '.join(facts['masked'])}"
            )
    recorded = facts["record"].get("held", [])
    held = [
        name for name in facts["held"] if name in {*plan["install"], *plan["remove"]} and name not in recorded
    ]
    if held:
        plan["problems"].append(
            f"{', '.join(held)} is held there and would have to change: apt-mark unhold {' '.join(held)}"
        )
    after = plan["family"] or family_of(facts)
    if arguments["state"] == "present":
        plan["hold"] = [name for name in recorded if name in facts["packages"] and name not in facts["held"]]
    plan["moves"] = bool(plan["install"] or plan["remove"])
    if arguments["state"] == "absent":
        plan["stays"] = after != "" and (plan["family"] != "" or ENGINES[after] not in plan["remove"])
        # A start without our live-restore would end them.
        plan["restart"] &= not running or bool(settings["merged"].get("live-restore"))
    if plan["stays"]:
        plan["problems"] += root_problems(facts, arguments["data_root"], settings["moved_root"])
    if arguments["state"] == "absent" or after != "docker":
        plan["repository"] = "absent" if facts["source"] else ""
    else:
        moved = (
            facts["source"]
            and f"URIs: {arguments['repository'].rstrip('/')}/{facts['os']}\n" not in facts["source"]
        )
        plan["repository"] = "present" if plan["install"] or moved else ""
        ours = plan["install"] or facts["pin"]
        plan["pin"] = PIN.format(version=arguments["version"]) if ours else ""
    would = [
        (plan["remove"], "remove"),
        (plan["install"], f"install from {WHOSE.get(plan['family'], 'where it was')}"),
    ]
    plan["lines"] += [f"{verb}: {', '.join(names)}" for names, verb in would if names]
    plan["lines"] += [f"hold: {', '.join(plan['hold'])}"] if plan["hold"] else []
    plan["lines"] += [f"daemon.json: {line}" for line in settings["lines"]]
    if facts["source"] and plan["repository"]:
        plan["lines"].append(
            "change the apt source" if plan["repository"] == "present" else "remove the apt source"
        )
    if settings["changes"] and facts["active"] and not plan["remove"]:
        plan["lines"].append("restart the engine" if plan["restart"] else "reload the engine")
        plan["lines"] += [NOT_RESTARTED] if plan["restart"] != settings["restart"] else []
    elif arguments["state"] == "present" and not (facts["active"] and facts["enabled"]):
        plan["lines"].append("start the engine, now and at boot")
    return plan


def is_good(facts: Tree) -> bool:
    """Whether the Docker there is good enough: an engine that runs or is installed, Compose and Buildx."""
    docker = facts["docker"]
    engine = docker["server"] or (docker["client"] if family_of(facts) else "")
    return (
        version(engine) >= MINIMUM["engine"]
        and version(docker["compose"]) >= MINIMUM["compose"]
        and docker["buildx"] != ""
    )


def family_of(facts: Tree) -> str:
    """Return the family of the engine that is installed, or nothing."""
    return next((family for family, engine in ENGINES.items() if engine in facts["packages"]), "")


def version(text: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version: v2.26.1-4 is (2, 26, 1)."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


def _packages(facts: Tree, arguments: Tree, plan: Plan) -> None:
    there, source = family_of(facts), arguments["source"]
    good = is_good(facts)
    system = f"{facts['os']} {facts['release']}"
    own = arguments["systems"].get(f"{facts['os']}-{facts['release']}")
    stranger = not there and (facts["snap"] or facts["dockerd"] or facts["docker"]["server"] != "")
    family = source
    if source == "auto":
        family = there or ("distribution" if own and own["packages"] else "docker")
    ours = there in ENGINES and ENGINES[there] in facts["record"].get("packages", [])
    outdated = (
        family == there == "docker"
        and ours
        and not _matches(facts["packages"]["docker-ce"], arguments["version"])
    )
    if good and not outdated and source in ("auto", there) and (there or facts["unit"]):
        return
    if stranger:
        plan["problems"].append(stranger_problem(facts, source, good=good))
        return
    if not own:
        plan["problems"].append(
            f"{system} is not known here, and it has no Docker that is good enough ({_summary(facts)}): "
            "install Engine 23, Compose 2.24 and Buildx yourself, or use Debian 12 or 13, Ubuntu 22.04 or "
            "24.04"
        )
        return
    if family == "distribution" and not own["packages"]:
        plan["problems"].append(
            f"{system} itself has no Docker Compose 2.24 ({_summary(facts)}): set docker_source: docker, "
            "and the role installs "
            "from Docker's repository" + (", with all containers, images and volumes kept" if there else "")
        )
        return
    wanted = own["packages"] if family == "distribution" else list(DOCKER)
    moves = there not in ("", family)
    plan["family"] = family
    old = {*wanted} if outdated else too_old(facts, wanted)
    plan["install"] = [name for name in wanted if name not in facts["packages"] or name in old]
    plan["upgrade"] = bool(old)
    if moves:
        plan["remove"] = [
            name for name in FAMILIES[there] if name in facts["packages"] and not _old_compose(name, facts)
        ]
    conflicting = [name for name in CONFLICTING if name in facts["packages"]]
    if conflicting:
        plan["problems"].append(
            f"{', '.join(conflicting)} is in the way of {WHOSE[family]}'s packages: apt-get remove "
            f"{' '.join(conflicting)}"
        )


def stranger_problem(facts: Tree, source: str, *, good: bool) -> str:
    """Return why an engine that is no package of either family cannot stay, and what mends it."""
    what, mend = "an engine that is no package of the distribution's or Docker's", "remove it"
    if facts["snap"]:
        what, mend = "Docker's snap", "snap remove docker"
    why = "Engine 23, Compose 2.24 and Buildx are needed"
    if good:
        why = f"docker_source is {source}" if facts["unit"] else "it does not run as docker.service"
    return f"{what} is there ({_summary(facts)}), and {why}: {mend}, and the role installs Docker"


def _old_compose(name: str, facts: Tree) -> bool:
    """Whether a package is Compose 1, which is no plugin of the engine's and in nobody's way."""
    return name == "docker-compose" and version(facts["packages"][name]) < (2,)


def too_old(facts: Tree, wanted: list[str]) -> set[str]:
    """Return those of the packages that are there and bring less than is good enough."""
    docker = facts["docker"]
    if version(docker["server"] or docker["client"]) < MINIMUM["engine"]:
        return {*wanted} & {*facts["packages"]}
    if version(docker["compose"]) < MINIMUM["compose"]:
        return {name for name in wanted if "compose" in name} & {*facts["packages"]}
    return set()


def _matches(found: str, pattern: str) -> bool:
    """Whether a version is one of a pin such as 5:29.*."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), found) is not None


def _summary(facts: Tree) -> str:
    docker = facts["docker"]
    parts = {
        "Engine": docker["server"] or docker["client"],
        "Compose": docker["compose"],
        "Buildx": docker["buildx"],
    }
    return ", ".join(f"{name} {known or 'none'}" for name, known in parts.items())


def argument_problems(arguments: Tree) -> list[str]:
    """Return a sentence for each argument that the engine would not start with."""
    problems = []
    # The engine ignores such a mirror at a reload and does not start with it afterwards.
    wrong = [
        mirror for mirror in arguments["registry_mirrors"] if not re.fullmatch(r"https?://[^/?#]+/?", mirror)
    ]
    if wrong:
        problems.append(
            f"docker_registry_mirrors has {', '.join(wrong)}: give addresses such as "
            "https://mirror.example.org, without a path"
        )
    proxy = arguments["proxy"]
    if proxy and (urlsplit(proxy).username or urlsplit(proxy).password):
        problems.append(
            "docker_proxy has a user's name or password in it, and daemon.json is there for all to read: "
            "use a proxy that asks for none"
        )
    elif proxy and not re.fullmatch(r"https?://[^/?#\s]+/?", proxy):
        problems.append(f"docker_proxy is {proxy}: give an address such as http://proxy.example.org:3128")
    root = arguments["data_root"]
    if root and (not root.startswith("/") or not root.strip("/") or ".." in root.split("/")):
        problems.append(
            f"docker_data_root is {root}: give the absolute path of a directory of its own, such as "
            "/srv/docker"
        )
    return problems


def root_problems(facts: Tree, wanted: str, moved: str) -> list[str]:
    """Return what is wrong with the data root that is `wanted`, and with one that is `moved`."""
    problems = []
    if wanted and facts["wanted_root"] == "no directory":
        problems.append(
            f"docker_data_root is {wanted}, which is no directory there: move it away, or choose another"
        )
    root = facts["root"]
    if moved and moved.rstrip("/") != root["path"].rstrip("/") and root["data"]:
        problems.append(
            f"the data root would become {moved}, and the engine keeps {', '.join(root['data'])} in "
            f"{root['path']}, which it would no longer see. "
            f"Leave it with docker_data_root: {root['path']}, or move all first: systemctl stop "
            "docker.socket docker && "
            f"rsync -aHAXS {root['path']}/ {moved}/, then set data-root to {moved} in "
            "/etc/docker/daemon.json and systemctl start docker"
        )
    return problems


def store_problems(facts: Tree, settings: Tree, plan: Plan) -> list[str]:
    """Return a sentence where the engine would no longer see the images of containerd's store."""
    store = settings.get("features", {}).get("containerd-snapshotter")
    older = plan["family"] == "distribution" and bool(plan["remove"]) and not store
    if facts["docker"]["containerd_store"] and (older or store is False):
        return [
            "the engine keeps its images in containerd's store, which it would no longer look into with "
            f"{'the distribution' if older else 'docker_data_root'}: set docker_settings: "
            f"{{features: {{containerd-snapshotter: true}}}}, or leave "
            f"{'docker_source at auto' if older else 'docker_data_root out'}"
        ]
    return []


def _give_back(facts: Tree, running: list[dict[str, str]], plan: Plan) -> None:
    record = facts["record"]
    there = facts["packages"]
    plan["remove"] = [name for name in record.get("packages", []) if name in there]
    plan["install"] = [name for name in record.get("removed", []) if name not in there]
    plan["family"] = next((family for family, engine in ENGINES.items() if engine in plan["install"]), "")
    if not record:
        return
    stack = [one["name"] for one in running if one["project"] == STACK]
    if stack:
        plan["problems"].append(
            f"{', '.join(sorted(stack))} runs there: take the stack down first, docker compose "
            f"--project-name {STACK} down"
        )
    others = [one["name"] for one in running if one["project"] != STACK]
    if others and set(plan["remove"]) & set(ENGINES.values()) and not plan["family"]:
        plan["problems"].append(
            f"{', '.join(sorted(others))} runs on the engine that would be removed: docker stop "
            f"{' '.join(sorted(others))}"
        )


def docker_changes(simulated: str, facts: Tree, plan: Plan) -> Changes:
    """Read what `apt-get --simulate` said, and what follows for the record.

    What is installed beside the plan is recorded as well; what would be removed beside it is refused.
    """
    installed = re.findall(r"^Inst (\S+) \(", simulated, re.MULTILINE)
    upgraded = re.findall(r"^Inst (\S+) \[", simulated, re.MULTILINE)
    removed = re.findall(r"^(?:Remv|Purg) (\S+)", simulated, re.MULTILINE)
    record = facts["record"]
    problems = []
    unasked = [name for name in removed if name not in _either(plan["remove"], plan["family"])]
    if unasked:
        problems.append(
            f"apt would also remove {', '.join(unasked)}, which nobody asked for: see `apt-get --simulate "
            f"install {' '.join(plan['install'])}` there, and remove it yourself if nothing needs it"
        )
    held = [name for name in facts["held"] if name in {*removed, *upgraded} - {*record.get("held", [])}]
    if held:
        problems.append(
            f"{', '.join(held)} is held there and would have to change: apt-mark unhold {' '.join(held)}"
        )
    before, gone = record.get("packages", []), record.get("removed", [])
    packages = [name for name in [*before, *installed] if name not in removed and name not in gone]
    return Changes(
        problems=problems,
        packages=sorted(set(packages)),
        removed=sorted({*gone, *removed} - {*before, *installed}),
        # An upgrade of runc alone restarts nothing.
        hold=sorted({*packages} & {name for family in FAMILIES.values() for name in family} - {"runc"}),
    )


def _either(planned: Iterable[str], family: str) -> set[str]:
    """Return what may go: what is planned, and when a family comes what is left of the other."""
    names = set(planned)
    return (
        names | {name for other in FAMILIES if other != family for name in FAMILIES[other]}
        if names
        else names
    )


class FilterModule:
    """Tells Ansible of the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them by name."""
        return {"docker_plan": docker_plan, "docker_changes": docker_changes}
