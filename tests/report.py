"""What the pages that the suites write have in common: the machine, and tables that keep their rows."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def machine() -> str:
    """This machine in a few words: cores, memory, system, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {system}"


class Table:
    """A page with the last result of each row, written anew after every one."""

    def __init__(self, path: Path, heads: Sequence[str], top: str, bottom: str = "") -> None:
        """Take the results that the page has already.

        A head is a row's first cells, such as `| a | b |`, by which the page knows it; `top` is what stands
        before the rows, with the table's own head as its end.
        """
        self.path, self.top, self.bottom = path, top, bottom
        known = path.read_text().splitlines() if path.exists() else []
        ends = top.splitlines()[-1].count("|")
        self.lines = {
            head: next(
                (line for line in known if line.startswith(head)),
                f"{head} not run{' |' * (ends - head.count('|'))}",
            )
            for head in heads
        }

    def note(self, head: str, *cells: str) -> None:
        """Write down a row's further cells."""
        self.lines[head] = f"{head} {' | '.join(cells)} |"
        self.path.write_text("\n".join([self.top, *self.lines.values(), self.bottom]))
