"""Runs what `make test` is too short for, one after the other, and writes the table in docs/systems.md.

    matrix.py            every row
    matrix.py PATTERN    those whose names it is found in; the others keep their last result

The lab is up: a molecule scenario boots a bare host of its own, the tests in tests/matrix use the lab's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from common import LOGS, ROOT
from report import Table, machine
from steps import Step, run, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PAGE = ROOT / "docs" / "systems.md"
SYSTEMS = {"bookworm": "Debian 12", "trixie": "Debian 13"}
BIN = ROOT / ".venv" / "bin"

TOP = """# Systems

Written by `make matrix`. A molecule scenario boots a bare host of its own; a file of `tests/matrix` uses the
lab's host, with the whole stack on it.

On {machine}; each row was run alone or beside other work, so its seconds are no benchmark.

| system | source of Docker | GPUs | what | result | seconds | when |
|---|---|---|---|---|---:|---|"""
BOTTOM = """
## What is not run

- **Ubuntu 22.04 and 24.04**: nothing boots them. The unit tests go through the roles' variables and templates
  with the facts of Ubuntu, and no further.
- **Real GPUs**: a GPU above is a stand-in: an entry of the PCI bus, a device node and an `nvidia-smi`. The
  CDI specification is real, and so are the units that renew it and the engine that gives the device to a
  container.
- **The makers' own packages**: the lab's repositories are signed and laid out as theirs; the packages have
  their names, versions and dependencies, and Debian's engine or a stand-in inside.
"""


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a command, what it runs on, and what it is told by its environment."""

    system: str
    docker: str
    gpus: str
    what: str
    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is called in lines of progress and by its log."""
        return "-".join(["matrix", Path(self.what.split()[-1]).stem, *self.environment.values()])

    @property
    def head(self) -> str:
        """Its first cells, by which the table knows it."""
        return f"| {self.system} | {self.docker} | {self.gpus} | {self.what} |"


def molecule(scenario: str, suite: str, docker: str, gpus: str = "none", **environment: str) -> Row:
    """A scenario on a bare host of its own."""
    command = (BIN / "molecule", "test", "-s", scenario)
    told = {"MOLECULE_SUITE": suite, **environment}
    return Row(SYSTEMS[suite], docker, gpus, f"molecule {scenario}", command, told)


def plan() -> list[Row]:
    """All that is run, the tests on the lab's host last."""
    sources = (("bookworm", "docker"), ("trixie", "distribution"), ("trixie", "docker"))
    return [
        *(molecule("docker", suite, source, DOCKER_SOURCE=source) for suite, source in sources),
        molecule("outbound", "trixie", "distribution"),
        *(molecule("nvidia", suite, "auto", gpus, GPUS=gpus) for suite, gpus in product(SYSTEMS, "01")),
        *(
            Row(
                SYSTEMS["trixie"],
                "distribution",
                "the test's",
                f"tests/matrix/{path.name}",
                (BIN / "pytest", path),
            )
            for path in sorted((ROOT / "tests" / "matrix").glob("test_*.py"))
        ),
    ]


def run_rows(rows: Sequence[Row], table: Table, logs: Path) -> list[str]:
    """Run every row, also after one that fails; return the names of those that failed."""
    failed: list[str] = []

    def work(row: Row) -> Callable[[TextIO], str]:
        def step(log: TextIO) -> str:
            say(f"{row.name} starts, its output is in {log.name}")
            start = time.monotonic()
            code = subprocess.run(
                row.command,
                cwd=ROOT,
                env={
                    **os.environ,
                    # molecule looks for ansible beside itself.
                    "PATH": f"{BIN}:{os.environ['PATH']}",
                    "MOLECULE_GLOB": "tests/molecule/*/molecule.yml",
                    **row.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
            result = "**failed**" if code else "passed"
            table.note(row.head, result, f"{time.monotonic() - start:.0f}", f"{datetime.now(UTC):%F}")
            if code:
                failed.append(row.name)
            return f"failed with status {code}, see {log.name}" if code else "passed"

        return step

    steps: list[Step] = []
    for row in rows:
        steps.append(Step(row.name, work(row), [steps[-1].name] if steps else []))
    run(steps, logs, workers=1)
    return failed


def main(rows: Sequence[Row], path: Path, logs: Path, pattern: str = "") -> int:
    """Run the rows whose names the pattern is found in and write the page; the status to exit with."""
    chosen = [row for row in rows if re.search(pattern, row.name)]
    table = Table(path, [row.head for row in rows], TOP.format(machine=machine()), BOTTOM)
    failed = run_rows(chosen, table, logs)
    say(f"{len(chosen)} run, {', '.join(failed) or 'none'} failed; the table is {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(plan(), PAGE, LOGS, *sys.argv[1:2]))
