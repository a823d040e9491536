"""What of this project is on a host, and what an uninstall takes of it, as one JSON object. Changes nothing.

    python3 installed.py '{"checkout": PATH, "data_root": PATH, "purge": BOOL}'

Python 3.9 is enough. `data_root` is the one that the inventory names, or empty.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = "function-gemma-server"
LABEL = "com.docker.compose.project"
STATE = Path("/var/lib/function-gemma-server")
SENT = Path("/var/lib")  # where the role lora puts weights on their way, which a run that broke off leaves
UNITS = Path("/etc/systemd/system")
SETTINGS = Path("/etc/docker/daemon.json")
ENGINES = {"docker.io", "docker-ce"}
BUILT = {"vllm-gemma", "tailscale-vllm"}
# A base image as .env, a compose file or a Dockerfile names it.
BASE = re.compile(r"\b(?:VLLM|TAILSCALE|HAPROXY)_IMAGE(?::-|=)['\"]?([^'\"}\s]+)")


def output(*words: str) -> str:
    """Return what a command prints, also where it fails; empty where it is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def engine_says(*words: str) -> str:
    """Return what the engine answers to a command."""
    return output("docker", *words)


def read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ── The checkout ─────────────────────────────────────────────────────────────────────────────────


def work(checkout: Path) -> list[str]:
    """Return what is in a checkout and nowhere else, but for what the roles write there."""
    git = ("git", "-c", f"safe.directory={checkout}", "-C", str(checkout))
    words = (*git, "status", "--porcelain", "--ignored")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"what git cannot tell ({done.stderr.strip()})"]
    # An inventory and a bundle are ignored, and a person's all the same.
    files = re.findall(r"^(?!!!).. (.+)|^!! ((?:inventory|bundle)/.*)", done.stdout, re.MULTILINE)
    found = [changed or ignored for changed, ignored in files]
    commits = output(*git, "rev-list", "--all", "--not", "--remotes", "--tags").split()
    return found + (
        [f"commits on no remote ({', '.join(one[:12] for one in commits[:5])})"] if commits else []
    )


def bases(server: Path) -> set[str]:
    """Return the names of the images that ours are built on, or run as they are."""
    files = [server / ".env", *server.glob("Dockerfile*"), *server.glob("docker-compose*.yml")]
    return {name for file in files if file.is_file() for name in BASE.findall(file.read_text())}


# ── What Docker has ──────────────────────────────────────────────────────────────────────────────


@dataclass
class Engine:
    """What an engine has of ours, and names of what it has of others."""

    state: str = (
        ""  # none is there; "silent"; "ours", which the role docker takes away; "theirs", which stays
    )
    root: Path = Path("/var/lib/docker")
    containers: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def engine(checkout: Path, wanted_root: str) -> Engine:
    """Ask the engine; without one, look into its data root."""
    found = Engine(root=Path(wanted_root or read(SETTINGS).get("data-root") or Engine.root))
    root = engine_says("info", "--format", "{{.DockerRootDir}}")
    if not root:
        if shutil.which("dockerd"):
            found.state = "silent"
            return found
        kept = sorted(path.parent.name for path in found.root.glob("volumes/*/_data"))
        found.volumes = [name for name in kept if name.startswith(f"{PROJECT}_")]
        found.others = [f"the volume {name}" for name in kept if name not in found.volumes]
        found.others += sorted(f"the container {path.name[:12]}" for path in found.root.glob("containers/*"))
        return found
    found.root = Path(root)
    record = read(STATE / "docker" / "record.json")
    gone, back = ENGINES & {*record.get("packages", [])}, ENGINES & {*record.get("removed", [])}
    found.state = "ours" if gone and not back else "theirs"
    _containers(found, checkout)
    found.networks = engine_says("network", "ls", "-q", "--filter", f"label={LABEL}={PROJECT}").split()
    return found


def _containers(found: Engine, checkout: Path) -> None:
    ids = engine_says("ps", "-aq").split()
    inspected: list[dict[str, Any]] = json.loads(engine_says("inspect", *ids) or "[]") if ids else []
    used, own_volumes = set(), set()
    for one in inspected:
        name, labels = one["Name"].lstrip("/"), one["Config"]["Labels"] or {}
        if labels.get(LABEL) == PROJECT or "function-gemma.update" in labels:
            found.containers.append(name)
            own_volumes |= {mount.get("Name") for mount in one["Mounts"]}
        else:
            found.others.append(f"the container {name}")
            used.add(one["Image"])
    for name in engine_says("volume", "ls", "--format", "{{.Name}}").splitlines():
        if name.startswith(f"{PROJECT}_"):
            found.volumes.append(name)
        elif name not in own_volumes:
            found.others.append(f"the volume {name}")
    ours = {
        *bases(checkout / "server"),
        *engine_says("image", "ls", "-q", "--filter", f"label={LABEL}={PROJECT}", "--no-trunc").split(),
    }
    listed = engine_says("image", "ls", "--no-trunc", "--format", "{{.ID}} {{.Repository}} {{.Tag}}")
    for image, repository, tag in map(str.split, listed.splitlines()):
        named = f"{repository}:{tag}" if tag != "<none>" else image
        if repository not in BUILT and not {named, image} & ours:
            found.others += [f"the image {named}"] if named != image else []
        elif image not in used:
            found.images.append(named)


def in_memory(volumes: list[str]) -> list[str]:
    """Return those of the engine's volumes that hold sockets alone."""
    form = '{{.Name}} {{index .Options "type"}}'
    lines = engine_says("volume", "inspect", "--format", form, *volumes).splitlines() if volumes else []
    return [line.split()[0] for line in lines if line.endswith(" tmpfs")]


# ── All of it ────────────────────────────────────────────────────────────────────────────────────


def directories(found: Engine) -> list[str]:
    """Return where an engine that is ours alone keeps its data, or kept it."""
    if found.others:
        return []
    if found.state:
        packages = read(STATE / "docker" / "record.json").get("packages", [])
        store = ["/var/lib/containerd"] if {"containerd", "containerd.io"} & {*packages} else []
        return [str(found.root), *store] if found.state == "ours" else []
    return [
        one
        for one in read(STATE / "data.json").get("directories", [])
        if Path(one).is_dir() and any(Path(one).iterdir())
    ]


def survey(checkout: Path, data_root: str, *, purge: bool) -> dict[str, Any]:
    """Return what is there, `lines` that say what of it goes, and `problems` that stand in the way."""
    found = engine(checkout, data_root)
    there = checkout.exists() or checkout.is_symlink()
    ours = (checkout / ".git").exists() and (checkout / "server").is_dir()
    units = sorted(
        {path.name for path in UNITS.rglob("function-gemma-*") if path.suffix in (".service", ".timer")}
    )
    sent = sorted(map(str, SENT.glob("function-gemma-lora-*")))
    volumes = found.volumes if purge else in_memory(found.volumes)
    roots = directories(found)
    problems = []
    if there and not ours:
        problems.append(
            f"checkout_path is {checkout}, which is no checkout of this project: correct it in the inventory"
        )
    if found.state == "silent":
        problems.append(
            "Docker is there and does not answer: systemctl start docker, or see journalctl -u docker -n 20"
        )
    parts = {
        "the units": units,
        "the containers": found.containers,
        "the images": found.images,
        "the volumes": volumes,
        "the checkout, with its settings and secrets,": [str(checkout)] if there else [],
        "what was sent": sent,
        "the engine's data in": roots if purge else [],
    }
    return {
        "engine": found.state,
        "units": units,
        "sent": sent,
        "containers": found.containers,
        "networks": found.networks,
        "images": found.images,
        "volumes": volumes,
        "kept": [str(found.root / "volumes" / name) for name in found.volumes if name not in volumes],
        "state": f"{PROJECT}_tailscale-state" in found.volumes,
        "others": found.others,
        "root": str(found.root),
        "roots": roots,
        "work": work(checkout) if ours else [],
        # A link of the path's, and where it leads.
        "checkout": sorted({str(checkout), str(checkout.resolve())}) if there else [],
        "lines": [f"remove {what} {', '.join(names)}" for what, names in parts.items() if names],
        "problems": problems,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(survey(Path(given["checkout"]), given["data_root"], purge=given["purge"])))
