"""apt's proxy and the CAs that the host trusts beside its own; nothing of either where none is declared.

    python3 outbound.py '{"apt": CONTENT, "certificates": [PEM, …], "check": false}'

Prints as JSON whether something changed (or would), lines that say what, and what is wrong (empty: nothing).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

APT = Path("/etc/apt/apt.conf.d/90function-gemma-server")
CERTIFICATES = Path("/usr/local/share/ca-certificates/function-gemma-server")
# Written when all that reads the certificates has them, so that a run that was cut short is made up for.
DONE = Path("/var/lib/function-gemma-server/outbound/certificates")


def output(*words: str) -> str:
    """Return what a command prints, empty where it fails or is not there."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(*words: str) -> None:
    """Run a command; end with what it says where it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def put(path: Path, content: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")  # apt and update-ca-certificates pass over such names
    new.write_text(content)
    new.chmod(0o644)
    new.rename(path)


def trusted() -> list[str]:
    """Return the certificates that an earlier run gave the host."""
    return [path.read_text() for path in sorted(CERTIFICATES.glob("*.crt"))]


def engine_runs() -> bool:
    """Whether Docker's engine is there and at work."""
    return output("systemctl", "is-active", "docker.service") == "active"


def engine_problem() -> str:
    """Say why the engine must not be restarted; empty where nothing that runs would end."""
    if not engine_runs():
        return ""
    if output("docker", "info", "--format", "{{.LiveRestoreEnabled}}") == "true" or not output(
        "docker", "ps", "-q"
    ):
        return ""
    return (
        "the engine must start anew to trust another CA, which would end the containers that run, "
        'for live-restore is off: put "live-restore": true into /etc/docker/daemon.json, '
        "`systemctl reload docker`, and run the same command again; nothing has changed"
    )


def trust(certificates: list[str]) -> None:
    """Have the host, and an engine that runs, trust these and none of earlier runs."""
    if not shutil.which("update-ca-certificates"):
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-q", "-y", "--no-install-recommends", "ca-certificates")
    shutil.rmtree(CERTIFICATES, ignore_errors=True)
    for number, certificate in enumerate(certificates):
        put(CERTIFICATES / f"function-gemma-{number:02}.crt", certificate)
    run("update-ca-certificates", "--fresh")  # without it the link to one that is gone stays
    if engine_runs():  # it reads them once, at its start
        run("systemctl", "restart", "docker.service")


def main() -> None:
    """Compare, and change what differs."""
    wanted = json.loads(sys.argv[1])
    mark = (
        hashlib.sha256("".join(wanted["certificates"]).encode()).hexdigest() if wanted["certificates"] else ""
    )
    lines, problem = [], ""
    other_proxy = (APT.read_text() if APT.exists() else "") != wanted["apt"]
    other_ca = trusted() != wanted["certificates"] or (DONE.read_text() if DONE.exists() else "") != mark
    would = "would " if wanted["check"] else ""
    if other_proxy:
        lines.append(f"{would}{'write' if wanted['apt'] else 'remove'} apt's proxy, {APT}")
    if other_ca:
        lines.append(
            f"{would}{'trust' if mark else 'no longer trust'} the declared CA, {CERTIFICATES}; "
            f"{would}restart the engine where one runs"
        )
        problem = engine_problem()
    if lines and not problem and not wanted["check"]:
        if other_proxy and wanted["apt"]:
            put(APT, wanted["apt"])
        elif other_proxy:
            APT.unlink()
        if other_ca:
            trust(wanted["certificates"])
            if mark:
                put(DONE, mark)
            else:
                DONE.unlink(missing_ok=True)
    print(json.dumps({"changed": bool(lines) and not problem, "lines": lines, "problem": problem}))


if __name__ == "__main__":
    main()
