"""What the role nvidia wants to know of a host, as one JSON object; it changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

PCI = Path("/sys/bus/pci/devices")
RECORD = Path("/var/lib/function-gemma-server/nvidia/record.json")
PINS = Path("/etc/apt/preferences.d/function-gemma-nvidia")
ORDER = Path("/etc/systemd/system/nvidia-cdi-refresh.service.d/function-gemma.conf")
SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
TOOLKIT = [
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
]
UNITS = ["nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"]


def run(*command: str) -> tuple[int, str, str]:
    """Return a command's status, output and complaint; 127 where there is no such command."""
    if not shutil.which(command[0]):
        return 127, "", ""
    done = subprocess.run(
        command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def read(path: Path) -> str:
    """Return a file's text, or nothing."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def driver(*, wsl: bool) -> dict[str, Any]:
    """Return the driver's version and the GPUs that it knows, or what is wrong with it."""
    command = "/usr/lib/wsl/lib/nvidia-smi" if wsl and not shutil.which("nvidia-smi") else "nvidia-smi"
    status, output, complaint = run(command, "--query-gpu=index,uuid,driver_version", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()] if status == 0 else []
    return {
        "driver": rows[0][2] if rows else "",
        "gpus": [{"index": index, "uuid": uuid} for index, uuid, _ in rows],
        "driver_problem": "" if rows or status == 127 else f"nvidia-smi: {complaint or output or status}",
    }


def installed(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return those of the packages that are installed, with their versions and whether they are held."""
    form = "${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\n"
    lines = run("dpkg-query", "-W", "-f", form, *names)[1].splitlines() if names else []
    rows = [line.split() for line in lines]
    return {row[0]: {"version": row[1], "held": row[2] == "hold"} for row in rows if row[-1] == "installed"}


def devices() -> list[str]:
    """Return the full names of the CDI devices of NVIDIA's kind."""
    listed = run("nvidia-ctk", "cdi", "list")[1].splitlines()
    return sorted({line.strip() for line in listed if line.strip().startswith("nvidia.com/gpu=")})


def engine() -> dict[str, Any]:
    """Return Docker's version, whether it knows CDI, and the containers that have a GPU."""
    status, output, _ = run("docker", "info", "--format", "{{json .}}")
    info = json.loads(output) if status == 0 and output else {}
    if not info.get("ServerVersion"):
        return {"engine": "", "engine_cdi": False, "users": []}
    ids = run("docker", "ps", "-q")[1].split()
    form = (
        "{{.Name}} {{json .HostConfig.DeviceRequests}} {{.HostConfig.Runtime}} {{json .HostConfig.Devices}}"
    )
    lines = run("docker", "inspect", "--format", form, *ids)[1].splitlines() if ids else []
    users = [
        line.split()[0].lstrip("/") for line in lines if re.search(r"nvidia|\bgpu\b", line.partition(" ")[2])
    ]
    return {
        "engine": info["ServerVersion"],
        "engine_cdi": bool(info.get("CDISpecDirs")),
        "users": sorted(users),
    }


def main() -> None:
    """Print it."""
    release = dict(re.findall(r'^(\w+)="?(.*?)"?$', read(Path("/etc/os-release")), re.MULTILINE))
    kernel = os.uname().release
    wsl = Path("/dev/dxg").exists() and "microsoft" in kernel.lower()
    found = driver(wsl=wsl)
    record = json.loads(read(RECORD) or "{}")
    on_bus = [
        device.name
        for device in (sorted(PCI.iterdir()) if PCI.is_dir() else [])
        if read(device / "vendor") == "0x10de" and read(device / "class").startswith("0x03")
    ]
    # WSL shows no GPU on its bus, and its driver is that of Windows.
    count = (len(found["gpus"]) or int(found["driver_problem"] != "")) if wsl else len(on_bus)
    states = {unit: run("systemctl", "is-enabled", unit)[1] for unit in UNITS}
    print(
        json.dumps(
            {
                "system": f"{release.get('ID')}-{release.get('VERSION_ID')}",
                "architecture": run("dpkg", "--print-architecture")[1],
                "kernel": kernel,
                "headers": Path(f"/lib/modules/{kernel}/build").exists(),
                "nouveau": Path("/sys/module/nouveau").exists(),
                # An EFI variable's first four bytes are its attributes.
                "secure_boot": SECURE_BOOT.exists() and SECURE_BOOT.read_bytes()[4:5] == b"\x01",
                "wsl": wsl,
                "count": count,
                **found,
                "packages": installed(TOOLKIT),
                "ours": sorted(installed(record.get("packages", []))),
                "cli": (re.findall(r"version ([\d.]+)", run("nvidia-ctk", "--version")[1]) or [""])[0],
                "units": {unit: state for unit, state in states.items() if state not in {"", "not-found"}},
                "devices": devices(),
                "pins": read(PINS),
                "ordered": ORDER.exists(),
                "record": record,
                # Asking the engine takes long, and without a GPU its answer is of no use.
                **(engine() if count or record else {"engine": "", "engine_cdi": False, "users": []}),
            }
        )
    )


if __name__ == "__main__":
    main()
