"""What every part of the lab uses: its places and addresses, Docker's command, digests of inputs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from steps import StepError, call

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab"
CACHE = ROOT / ".cache" / "lab"
LOGS = CACHE / "log"
LABEL = "function-gemma-lab"
UV = ROOT / ".venv" / "bin" / "uv"

SUITE = "trixie"
MODEL = "google/functiongemma-270m-it"
ADAPTER = "lab/docstring-lora"
REGISTRY, FORGE, HUB, HEADSCALE, APT, HOST = (f"10.77.0.{last}" for last in (10, 11, 12, 13, 14, 20))
# A host without an address of its own gets one from the upper half, never a service's.
NETWORKS = {
    "lab-internet": ("--subnet", "10.77.0.0/24", "--ip-range", "10.77.0.128/25"),
    "lab-home": ("--subnet", "10.78.0.0/24", "--ip-range", "10.78.0.128/25"),
}
HEADSCALE_AT_HOME = "10.78.0.13"
READY_SECONDS = 90


def sudo() -> list[str]:
    """What goes before a command that needs root."""
    return [] if os.geteuid() == 0 else ["sudo"]


def digest(*inputs: Path | str) -> str:
    """Twelve hex digits of the content of files and folders and of plain strings."""
    total = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            total.update(f"str {item}\0".encode())
            continue
        for path in sorted(item.rglob("*")) if item.is_dir() else [item]:
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"file {path.relative_to(item.parent)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def docker(*words: str | Path) -> str:
    """Standard output of a docker command; an empty string where it fails."""
    done = subprocess.run(["docker", *map(str, words)], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


_apt = threading.Lock()  # steps run side by side, apt does not


def need(program: str, package: str, log: TextIO) -> None:
    """Install Debian's ``package`` where ``program`` is missing.

    Raises:
        StepError: there is no apt-get to do it.
    """
    with _apt:
        # Debian keeps daemons where a user's PATH does not look.
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            return
        if not shutil.which("apt-get"):
            raise StepError(f"{program} is missing, and there is no apt-get: install it, then run this again")
        call(log, *sudo(), "apt-get", "update")
        install = (
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
        )
        call(log, *sudo(), *install, *package.split())


def wait_until(what: str, ready: Callable[[], bool], log: TextIO) -> None:
    """Ask ``ready`` until it says yes.

    Raises:
        StepError: it did not within READY_SECONDS.
    """
    end = time.monotonic() + READY_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise StepError(f"{what} is not ready after {READY_SECONDS} s")
        print("waiting for", what, file=log, flush=True)
        time.sleep(0.3)


def is_current(folder: Path, key: str) -> bool:
    """Whether ``folder`` was finished from the inputs with this digest."""
    return (folder / ".key").is_file() and (folder / ".key").read_text() == key


def remade(folder: Path) -> Path:
    """An empty ``folder``, whatever it held: the same one, for containers have it mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*sudo(), "find", str(folder), "-mindepth", "1", "-delete"], check=True)
    return folder
