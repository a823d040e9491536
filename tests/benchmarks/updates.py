"""Updates of a code change under callers, and what the gateway costs, as tables in docs/updates.md.

Runs on the lab that is up. What an update costs callers is taken from the standby's proof to
the end. Until then it computes, which on a small machine takes what callers need as well: that time is
compared with as long of a program that only computes, with the same share of the CPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import machine
from stack import CHECKOUT, answers, clients, commit, host, playbook, server, ssh

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "updates.md"
CHANGED = "server/function_gemma/__init__.py"
UPDATES, CLIENTS, PAUSE, BEFORE = 5, 8, 0.25, 20  # the last: seconds of calls before an update
ROUNDS, REQUESTS = 60, 8
PULLED, TAKES_OVER, DONE = "update.sh: pulled", "the standby takes over", "changed="  # as .update.log says
HOG = """
image=$(docker inspect -f '{{{{.Image}}}}' vllm-gemma)
docker run --rm --network none --cpu-shares 512 --entrypoint sh "$image" -c '
    for core in $(seq $(nproc)); do timeout {seconds} python3 -c "while True: pass" & done; wait'
"""

TOP = """# Updates under callers

Made by `make bench` on {date}: {machine}.
{clients} clients on the laptop ask the base model and two adapters by turns, every other time for a stream,
and pause {pause} ms. Each answer is compared with what its model says. An update is update.yml, which pulls a
commit that changes vLLM's image, builds it, and replaces vLLM and the agents service. Clients, vLLMs, the
build and Ansible share the cores. *Seconds* are the host's own, from the pull to the last check.

Wanted: 0 failed of at least 2,000 requests; p99 while the roles change hands, from the standby's proof to the
end, at most 2 times that before. Until the proof the standby starts; *a hog* is a program that only computes,
on all cores, for as long and with the same share of them (512 to the others' 1024).

| update | requests | failed | seconds | until proof | p99, ms: before | change | ratio | start | hog |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""
BOTTOM = """
## The gateway against vLLM's own socket

{rounds} rounds of each way by turns, {requests} requests a round for each figure, for the first two one after
the other. Medians of the rounds; *compared* is the median of what the gateway has more in a round.

| | socket | gateway | compared | wanted |
|---|---:|---:|---:|---:|
| an answer, ms | {socket[p50]:.2f} | {gateway[p50]:.2f} | {more[p50]:+.2f} | ≤ +0.5 |
| first byte of a stream, ms | {socket[first]:.2f} | {gateway[first]:.2f} | {more[first]:+.2f} | ≤ +1 |
| requests a second, eight at a time | {socket[rate]:.1f} | {gateway[rate]:.1f} | {more[share]:.3f} | ≥ 0.97 |
"""


def say(line: str) -> None:
    """Show what is being done."""
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def p99(times: list[list[float]], start: float, end: float) -> float:
    """Milliseconds that 99 of 100 requests which began between two moments took at most."""
    took = sorted(seconds for began, seconds, _ in times if start <= began < end)
    return 1000 * took[int(0.99 * len(took))]


def update() -> tuple[float, float, float]:
    """Run update.yml; return when the host began, when the standby was proven, and when the host was done."""
    moments: dict[str, float] = {}
    follow = ssh(f"cd {CHECKOUT}/server && exec timeout 600 tail -n 0 -F .update.log")
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as log:
        assert log.stdout
        lines = log.stdout

        def watch() -> None:
            for line in lines:
                moment = next((one for one in (PULLED, TAKES_OVER, DONE) if one in line), "")
                if moment:
                    moments[moment] = time.time()
                if moment == DONE:
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        playbook("update.yml", seconds=600)
        watcher.join(10)
        log.kill()
    if moments.keys() != {PULLED, TAKES_OVER, DONE}:
        raise SystemExit("the update used no standby: server/.update.log on the host")
    return moments[PULLED], moments[TAKES_OVER], moments[DONE]


def measure_update(number: int) -> str:
    """Update once under callers; return the table's row."""
    say(f"update {number} of {UPDATES}")
    with commit(CHANGED, '"""', f'"""Benchmark {time.time():.0f}: '), clients(CLIENTS, PAUSE) as seen:
        time.sleep(BEFORE)  # what is measured: calls without an update
        begun = time.time()
        start, proven, end = update()
        hogged = time.time()
        host(HOG.format(seconds=round(proven - start)))
        done = time.time()
    times = seen["times"]
    before, meanwhile = p99(times, 0, begun), p99(times, proven, end)
    failed = sum(seen["failures"].values())
    row = (
        f"| {number} | {seen['requests']:,} | {failed} | {end - start:.0f} | {proven - start:.0f} "
        f"| {before:.0f} | {meanwhile:.0f} | {meanwhile / before:.2f} "
        f"| {p99(times, start, proven):.0f} | {p99(times, hogged, done):.0f} |"
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
        way: {name: 1000 * value if name in ("p50", "first") else value for name, value in those.items()}
        for way, those in figures.items()
    }


def main() -> None:
    """Measure, and write the page."""
    rows = [measure_update(number + 1) for number in range(int(sys.argv[1]) if sys.argv[1:] else UPDATES)]
    server("./update.sh", seconds=400)  # the last commit was taken back
    answers()
    top = TOP.format(
        date=datetime.now(UTC).date(), machine=machine(), clients=CLIENTS, pause=f"{1000 * PAUSE:.0f}"
    )
    ways: dict[str, Any] = measure_gateway()
    bottom = BOTTOM.format(rounds=ROUNDS, requests=REQUESTS, **ways)
    PAGE.write_text(top + "\n".join(rows) + "\n" + bottom)
    print(f"\n{PAGE.read_text()}")


if __name__ == "__main__":
    main()
