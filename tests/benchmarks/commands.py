"""How long the commands that people type take, as a table in docs/benchmarks.md.

    commands.py          on the lab that is up: what is warm
    commands.py --cold   from nothing, in a fresh clone each: removes the lab and takes half an hour

Each figure is one run's wall-clock time on the machine that the table names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from report import machine

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "benchmarks.md"

# What is run, and the seconds that it may take.
WARM = [
    ("make demo", 120),
    ("ansible-playbook site.yml", 15),
    ("ansible-playbook load_adapter.yml -e name=lint", 10),
    ("ansible-playbook update.yml", 20),
    ("make unit", 60),
]
COLD = [("make demo", 720), ("make test", 2100)]


def seconds(command: str, folder: Path) -> float:
    """Wall-clock time of a command that must end well.

    Raises:
        SystemExit: it did not; the message says which and where its output is.
    """
    print(f"{datetime.now(UTC):%H:%M:%S} {command}", flush=True)
    environment = {**os.environ, "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        start = time.monotonic()
        code = subprocess.run(
            command.split(),
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode
        took = time.monotonic() - start
    if code:
        raise SystemExit(f"{command} ended with status {code}; its output: {log.name}")
    Path(log.name).unlink()
    return took


def measure(title: str, commands: list[tuple[str, int]], folder: Path) -> list[str]:
    """Rows of the table for commands run one after the other."""
    rows = []
    for command, limit in commands:
        took = seconds(command, folder)
        rows.append(f"| `{command}` | {title} | {took:.0f} | {limit} |")
        print(rows[-1], flush=True)
    return rows


def cold() -> list[str]:
    """Each long command in a fresh clone, after all that an earlier run left on the machine was removed."""
    rows = []
    for command in COLD:
        with tempfile.TemporaryDirectory() as scratch:
            clone = Path(scratch) / "clone"
            subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
            subprocess.run(["make", "-s", "clean"], cwd=clone, check=True)
            rows += measure("cold", [command], clone)
            subprocess.run(["make", "-s", "clean"], cwd=clone, check=True)
    return rows


def main() -> None:
    """Measure, print, and write the table."""
    rows = cold() if sys.argv[1:] == ["--cold"] else measure("warm", WARM, ROOT)
    kept = (
        []
        if not TABLE.exists()
        else [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    )
    measured = {row.rsplit("|", 3)[0] for row in rows}
    rows += [row for row in kept if row.rsplit("|", 3)[0] not in measured]
    TABLE.write_text(
        "# How long the commands take\n\n"
        "Written by `make bench`, and by `make bench-cold`, which takes half an hour; each figure is one run."
        "\n\n"
        f"Last written on {datetime.now(UTC):%F}: {machine()}.\n\n"
        "| command | state | seconds | wanted at most |\n|---|---|---:|---:|\n"
        + "\n".join(sorted(rows))
        + "\n"
    )
    print(f"\n{TABLE.read_text()}")


if __name__ == "__main__":
    main()
