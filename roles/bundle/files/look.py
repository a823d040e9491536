"""What a host lacks of a bundle, as one JSON object; changes nothing. It needs Python 3.9 alone.

python3 look.py '{"images": [NAME, …], "model": "NAME@REVISION", "packages": {KIND: [NAME, …]}, …}'
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


def output(*words: str) -> str:
    """Return what a command prints, empty where it fails or is not there."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def has_gpu() -> bool:
    """Whether a card of NVIDIA is built in."""
    return any(path.read_text().strip() == "0x10de" for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def missing_packages(wanted: dict[str, list[str]]) -> list[str]:
    """Return the packages to install; a Docker that is good enough is left alone, whosever it is."""
    kinds = dict(wanted)
    if output("docker", "buildx", "version") and output("docker", "compose", "version"):
        kinds.pop("docker", None)
    if not has_gpu():
        kinds.pop("nvidia", None)
    state = ("dpkg-query", "-W", "-f", "${db:Status-Status}")
    return [name for names in kinds.values() for name in names if output(*state, name) != "installed"]


def main() -> None:
    """Answer."""
    wanted = json.loads(sys.argv[1])
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    name, _, _ = wanted["model"].rpartition("@")
    base = output("docker", "volume", "inspect", "-f", "{{.Mountpoint}}", "function-gemma-server_models-base")
    mark = Path(base or "/nowhere", name, ".complete")
    git = ("git", "-c", f"safe.directory={wanted['checkout']}", "-C", wanted["checkout"])
    print(
        json.dumps(
            {
                "system": {
                    "os": release["ID"].strip('"'),
                    "release": release.get("VERSION_ID", "").strip('"'),
                    "architecture": output("dpkg", "--print-architecture"),
                },
                "images": [one for one in wanted["images"] if not output("docker", "image", "ls", "-q", one)],
                "packages": missing_packages(wanted["packages"]),
                "model": not (mark.is_file() and mark.read_text().strip() == wanted["model"]),
                "release": output(*git, "rev-parse", "HEAD"),
                "free": shutil.disk_usage("/var/lib").free,
            }
        )
    )


if __name__ == "__main__":
    main()
