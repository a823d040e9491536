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
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from report import machine
from stack import CHECKOUT, answers, clients, commit, host, playbook, server, ssh

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "updates.md"
CHANGED = "server/function_gemma/__init__.py"
UPDATES, CLIENTS, PAUSE, BEFORE = 5, 8, 0.25, 20  # the last: seconds of calls before an update
ROUNDS, REQUESTS = 100, 8
PULLED, TAKES_OVER, DONE = "update.sh: pulled", "the standby takes over", "changed="  # as .update.log says
HOG = """
image=$(docker inspect -f '{{{{.Image}}}}' vllm-gemma)
docker run --rm --network none --cpu-shares 512 --entrypoint sh "$image" -c '
    for core in $(seq $(nproc)); do timeout {seconds} python3 -c "while True: pass" & done; wait'
"""
RELAY = """
global
    nbthread 1
defaults
    mode tcp
    timeout client 300s
    timeout server 300s
    timeout connect 5s
listen relay
    bind 127.0.0.1:8001
    server main unix@/run/vllm/vllm.sock
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

{rounds} rounds, in each the ways by turns: {requests} answers, {requests} streams one after the other, then
{requests} answers to each of eight callers. Medians of the rounds; in brackets the median of what a round
took more than by the socket, or of its share. *A relay* is HAProxy that passes bytes on and reads no HTTP:
what anything between a caller and vLLM costs on this machine.

| | an answer, ms | first byte of a stream, ms | requests a second, eight at a time |
|---|---:|---:|---:|
{ways}
| wanted of the gateway | (≤ +0.5) | (≤ +1) | (≥ 0.97) |
"""
WAY = "| {name} | {p50:.2f} ({more_p50:+.2f}) | {first:.2f} ({more_first:+.2f}) | {rate:.1f} ({share:.3f}) |"


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


@contextmanager
def relay() -> Iterator[str]:
    """HAProxy beside the gateway, as it is run, that only passes bytes on; yields its address."""
    host(
        "docker run -d --rm --name relay --network container:function-gemma-pod "
        "--volumes-from gateway-gemma:ro --user 10002:10000 --cpu-shares 16384 --init --entrypoint bash "
        "$(docker inspect -f '{{.Image}}' gateway-gemma) "
        f"-c 'echo \"{RELAY}\" >/tmp/relay.cfg; exec haproxy -db -f /tmp/relay.cfg'"
    )
    try:
        host(
            "until docker exec relay bash -c 'exec 3<>/dev/tcp/127.0.0.1/8001'; do sleep 0.1; done",
            seconds=10,
        )
        yield "http://127.0.0.1:8001"
    finally:
        host("docker stop -t 1 relay")


def measure_gateway() -> str:
    """Ask vLLM through the gateway and without it, by turns; return the table's rows."""
    say("the gateway against the socket")
    program = (ROOT / "tests" / "benchmarks" / "doorway.py").read_text()
    with relay() as address:
        command = f"docker exec -i vllm-gemma python3 - {address} {ROUNDS} {REQUESTS}"
        figures: dict[str, dict[str, float]] = json.loads(host(command, stdin=program, seconds=900).last)
    return "\n".join(WAY.format(name=way, **those) for way, those in figures.items())


def main() -> None:
    """Measure, and write the page."""
    rows = [measure_update(number + 1) for number in range(int(sys.argv[1]) if sys.argv[1:] else UPDATES)]
    server("./update.sh", seconds=400)  # the last commit was taken back
    answers()
    top = TOP.format(
        date=datetime.now(UTC).date(), machine=machine(), clients=CLIENTS, pause=f"{1000 * PAUSE:.0f}"
    )
    bottom = BOTTOM.format(rounds=ROUNDS, requests=REQUESTS, ways=measure_gateway())
    PAGE.write_text(top + "\n".join(rows) + "\n" + bottom)
    print(f"\n{PAGE.read_text()}")


if __name__ == "__main__":
    main()
