"""Updates of a code change under callers, and what the gateway costs, as tables in docs/updates.md.

Runs on the lab that is up. What an update costs callers is taken from the standby's proof to
the end; its start, which takes both cores of a small machine, is a column of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import machine
from stack import answers, clients, commit, host, server, ssh

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "updates.md"
CHANGED = "server/function_gemma/__init__.py"
UPDATES, CLIENTS, PAUSE, BEFORE = 5, 8, 0.25, 20  # the last: seconds of calls before an update
ROUNDS, REQUESTS = 10, 40
TAKES_OVER = "the standby takes over"

TOP = """# Updates under callers

Made by `make bench` on {date}: {machine}.
{clients} clients on the laptop ask the base model and two adapters by turns, every other time for a stream,
and pause {pause} ms. Each answer is compared with what its model says. An update pulls a commit that changes
vLLM's image, builds it, and replaces vLLM and the agents service. Clients, both vLLMs and the build share the
cores.

Wanted: 0 failed of at least 2,000 requests; p99 while the roles change hands, from the standby's proof to the
end, at most 2 times that before.

| update | requests | failed | seconds | until the proof | p99 before, ms | p99 meanwhile, ms | ratio |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
BOTTOM = """
## The gateway against vLLM's own socket

{rounds} rounds of each way by turns, {requests} requests a round, one after the other, then eight at a time;
medians.

| | socket | gateway | wanted |
|---|---:|---:|---:|
| requests a second, eight at a time | {socket[rate]:.1f} | {gateway[rate]:.1f} ({share:.3f}) | ≥ 0.97 of it |
| an answer, one at a time, ms | {socket[p50]:.2f} | {gateway[p50]:.2f} ({p50:+.2f}) | ≤ +0.5 |
| first byte of a stream, ms | {socket[first]:.2f} | {gateway[first]:.2f} ({first:+.2f}) | ≤ +1 |
"""


def say(line: str) -> None:
    """Show what is being done."""
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def p99(times: list[list[float]], start: float, end: float) -> float:
    """Milliseconds that 99 of 100 requests which began between two moments took at most."""
    took = sorted(seconds for began, seconds, _ in times if start <= began < end)
    return 1000 * took[int(0.99 * len(took))]


def update() -> tuple[float, float, float]:
    """Update the host; return when that began, when the standby was proven, and when it ended."""
    start, proven = time.time(), 0.0
    with subprocess.Popen(
        ssh("/opt/function-gemma-server/server/update.sh"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if TAKES_OVER in line:
                proven = time.time()
    if process.returncode or not proven:
        raise SystemExit("the update failed or used no standby: server/.update.log on the host")
    return start, proven, time.time()


def measure_update(number: int) -> str:
    """Update once under callers; return the table's row."""
    say(f"update {number} of {UPDATES}")
    with commit(CHANGED, '"""', f'"""Benchmark {time.time():.0f}: '), clients(CLIENTS, PAUSE) as seen:
        time.sleep(BEFORE)  # what is measured: calls without an update
        start, proven, end = update()
    before, meanwhile = p99(seen["times"], 0, start), p99(seen["times"], proven, end)
    failed = sum(seen["failures"].values())
    row = (
        f"| {number} | {seen['requests']:,} | {failed} | {end - start:.0f} | {proven - start:.0f} "
        f"| {before:.0f} | {meanwhile:.0f} | {meanwhile / before:.2f} |"
    )
    say(row)
    if failed:
        say(f"failed: {seen['failures']}")
    return row


def measure_gateway() -> dict[str, dict[str, float]]:
    """Ask vLLM through the gateway and without it, by turns."""
    say("the gateway against the socket")
    program = (ROOT / "tests" / "benchmarks" / "doorway.py").read_text()
    done = host(f"docker exec -i vllm-gemma python3 - {ROUNDS} {REQUESTS}", stdin=program, seconds=600)
    figures: dict[str, dict[str, float]] = json.loads(done.last)
    return {
        way: {name: value if name == "rate" else 1000 * value for name, value in those.items()}
        for way, those in figures.items()
    }


def main() -> None:
    """Measure, and write the page."""
    rows = [measure_update(number + 1) for number in range(int(sys.argv[1]) if sys.argv[1:] else UPDATES)]
    server("./update.sh", seconds=400)  # the last commit was taken back
    answers()
    ways: dict[str, Any] = measure_gateway()
    socket, gateway = ways["socket"], ways["gateway"]
    top = TOP.format(
        date=datetime.now(UTC).date(), machine=machine(), clients=CLIENTS, pause=f"{1000 * PAUSE:.0f}"
    )
    bottom = BOTTOM.format(
        rounds=ROUNDS,
        requests=REQUESTS,
        **ways,
        share=gateway["rate"] / socket["rate"],
        p50=gateway["p50"] - socket["p50"],
        first=gateway["first"] - socket["first"],
    )
    PAGE.write_text(top + "\n".join(rows) + "\n" + bottom)
    print(f"\n{PAGE.read_text()}")


if __name__ == "__main__":
    main()
