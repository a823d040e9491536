"""All that the role wants to know of a host, as one JSON object. Changes nothing; Python 3.9 is enough.

    python3 probe.py [DATA_ROOT]

The argument is the data root that is wanted.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/docker/daemon.json")
RECORD = Path("/var/lib/function-gemma-server/docker/record.json")
PIN = Path("/etc/apt/preferences.d/function-gemma-docker")
SOURCE = Path("/etc/apt/sources.list.d/function-gemma-docker.sources")
PACKAGES = ("docker*", "containerd*", "runc", "moby-*", "podman-docker", "lxc-docker*")
UNITS = ("docker.service", "docker.socket", "containerd.service")
# Debian's packages mask their units when they are removed, and unmask them when they come back: nobody's
# decision.
MASKED_BY_DPKG = Path("/var/lib/systemd/deb-systemd-helper-masked")


def run(*command: str, **environment: str) -> str:
    """Return what a command says, or nothing."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def assignments(text: str) -> dict[str, str]:
    """Return the NAME=value lines of a file such as os-release."""
    pairs = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): "".join(shlex.split(value)) for name, mark, value in pairs if mark}


def installed(recorded: list[str]) -> dict[str, str]:
    """Return the versions of what is installed of Docker's packages and of those that the record names."""
    show = "${db:Status-Status} ${Package} ${Version}\n"
    lines = run("dpkg-query", "-W", "-f", show, *PACKAGES, *recorded).splitlines()
    return {line.split()[1]: line.split()[2] for line in lines if line.startswith("installed ")}


def units() -> dict[str, dict[str, str]]:
    """Return what systemd knows of each of UNITS."""
    said = run(
        "systemctl",
        "show",
        *UNITS,
        "-p",
        "Id,LoadState,UnitFileState,ActiveState,ExecStart,Environment,EnvironmentFiles",
    )
    blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in said.split("\n\n")]
    found = {block["Id"]: block for block in blocks if "Id" in block}
    for name, unit in found.items():
        unit["masked"] = (
            "yes" if unit["LoadState"] == "masked" and not (MASKED_BY_DPKG / name).exists() else ""
        )
    return found


def start(unit: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the flags and the environment that the unit starts dockerd with, drop-ins included."""
    environment = assignments("\n".join(shlex.split(unit.get("Environment", ""))))
    file = Path(unit.get("EnvironmentFiles", "").partition(" (")[0])
    if file.is_file():
        environment.update(assignments(file.read_text(errors="replace")))
    words = unit.get("ExecStart", "").partition("argv[]=")[2].partition(" ; ")[0].split()[1:]
    flags: list[str] = []
    for word in words:
        flags += environment.get(word.strip("${}"), "").split() if word.startswith("$") else [word]
    return flags, environment


def settings() -> dict[str, Any]:
    """Return what stands at the place of the engine's settings."""
    if SETTINGS.is_symlink():
        return {"kind": "link", "target": str(SETTINGS.readlink())}
    if not SETTINGS.exists():
        return {"kind": "absent"}
    if not SETTINGS.is_file():
        return {"kind": "no file"}
    try:
        return {"kind": "file", "text": SETTINGS.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        return {"kind": "unreadable", "error": str(error)}


def named_root(settings_text: str) -> str:
    """Return the data root that the engine's settings name, for an engine that does not run."""
    try:
        return str(json.loads(settings_text)["data-root"])
    except (ValueError, LookupError, TypeError):
        return ""


def data(root: Path) -> list[str]:
    """Return what an engine keeps in a data root: the kinds of things of which it has any."""
    kinds = {
        "containers": "containers/*",
        "images": "image/*/imagedb/content/sha256/*",
        "volumes": "volumes/*/_data",
    }
    return [kind for kind, pattern in kinds.items() if next(root.glob(pattern), None)]


def containers() -> list[dict[str, str]]:
    """Return the containers that run: name and Compose project."""
    lines = run(
        "docker", "ps", "--format", '{{.Names}}\t{{.Label "com.docker.compose.project"}}'
    ).splitlines()
    pairs = (line.partition("\t") for line in lines)
    return [{"name": name, "project": project} for name, _, project in pairs]


def engine(*, active: bool) -> dict[str, Any]:
    """Return what `docker info` says; asking the socket of an engine that is not active would start it."""
    elsewhere = {} if active else {"DOCKER_HOST": "unix:///nonexistent"}
    try:
        info = json.loads(run("docker", "info", "--format", "{{json .}}", **elsewhere) or "{}")
    except ValueError:
        info = {}
    client = info.get("ClientInfo") or {}
    plugins = {plugin["Name"]: plugin.get("Version", "") for plugin in client.get("Plugins") or []}
    return {
        "server": info.get("ServerVersion", ""),
        "client": client.get("Version", ""),
        "compose": plugins.get("compose", ""),
        "buildx": plugins.get("buildx", ""),
        "root": info.get("DockerRootDir", ""),
        "swarm": (info.get("Swarm") or {}).get("LocalNodeState", "inactive") not in ("", "inactive"),
        "containerd_store": ["driver-type", "io.containerd.snapshotter.v1"]
        in (info.get("DriverStatus") or []),
    }


def text(file: Path) -> str:
    """Return a small file's content; nothing where there is no file."""
    return file.read_text(errors="replace") if file.is_file() else ""


def main() -> None:
    """Print the object."""
    record = json.loads(text(RECORD) or "{}")
    system = assignments(Path("/etc/os-release").read_text())
    known = units()
    service = known.get("docker.service", {})
    active = service.get("ActiveState") == "active"
    # An engine without systemd's unit (Docker's snap, for one) is asked all the same.
    docker = engine(active=active or service.get("LoadState") != "loaded")
    flags, environment = start(service)
    wanted = Path(sys.argv[1]) if sys.argv[1:] and sys.argv[1] else None
    there = settings()
    root = Path(docker["root"] or named_root(there.get("text", "")) or "/var/lib/docker")
    print(
        json.dumps(
            {
                "os": system.get("ID", ""),
                "release": system.get("VERSION_ID", ""),
                "codename": system.get("VERSION_CODENAME", ""),
                "packages": installed(record.get("packages", []) + record.get("removed", [])),
                "held": run("apt-mark", "showhold").split(),
                "snap": Path("/snap/docker").exists(),
                "dockerd": bool(shutil.which("dockerd")),
                "docker": docker,
                "unit": service.get("LoadState", "not-found") != "not-found",
                "active": active,
                "enabled": service.get("UnitFileState") == "enabled",
                "masked": [name for name, unit in known.items() if unit["masked"]],
                "flags": flags,
                "environment": environment,
                "settings": there,
                "root": {"path": str(root), "data": data(root)},
                "wanted_root": ""
                if not wanted or not wanted.exists()
                else "directory"
                if wanted.is_dir()
                else "no directory",
                "running": containers() if docker["server"] else [],
                "source": text(SOURCE),
                "pin": text(PIN),
                "record": record,
            }
        )
    )


if __name__ == "__main__":
    main()
