"""Breaks the lab's stack in one way after another, and writes how long it was away in docs/faults.md.

    faults.py            every fault
    faults.py PATTERN    those whose names it is found in; the others keep their last result

site.yml deploys the stack on the lab's host first. Each fault ends with the stack as it was before, or with a
row that says what stayed broken.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import clients as callers
from common import LOGS, ROOT
from report import Table, machine
from stack import BASE, CHECKOUT, answers, call, clients, host, playbook, reaches, until
from steps import Step, run, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import TextIO

PAGE = ROOT / "docs" / "faults.md"
SLOW = 2.0  # seconds from which on a request was held up by the fault
SETTLED = 3.0  # seconds in which every request was answered at once: the service is back
LONGEST = 300  # seconds until a fault that does not heal is given up
CLIENTS, PAUSE, OWN_LIMIT = 12, 1.0, callers.SECONDS
POD, SIDECAR, GATEWAY = "function-gemma-pod", "tailscale-vllm", "gateway-gemma"
VLLM, AGENTS = "vllm-gemma", "agents-gemma"

TOP = """# Faults

Written by `make faults`: what happens to callers on the tailnet when a part breaks, and what mends it, on
{machine}.
{clients} clients ask the base model and two adapters by turns, each about once a second, and nobody helps.
*Away* is the time from the fault until the last request that failed or took more than {slow:.0f} s had ended.
*Failed* are those with an error or a wrong answer, streams cut off included; those that the gateway let wait
and then answered are not. A caller whose connection ends with the node is not told: it waits for a time limit
of its own, here {own} s, and counts as failed, not as away.

| fault | mended by | away, s | failed of all | when |
|---|---|---:|---:|---|"""
BOTTOM = """
Wanted: away for at most 2 s where the gateway is killed, 10 s the sidecar, 5 s where the engine is restarted
with live-restore, and where the host is restarted no longer than it takes to end and boot and vLLM to start.

The full disk is one that the engine's containers and volumes and the checkout are put on; a change of the
adapters that it has no room for is refused, and vLLM and gateway, killed then, are back before there is room.
"""


@dataclass(frozen=True)
class Fault:
    """A way to break the stack: a shell command on the host, or a function."""

    name: str
    mended: str
    command: str | Callable[[], object]
    before: str = "true"  # what the fault needs
    after: str = "true"  # what takes that back

    @property
    def head(self) -> str:
        """Its first cells, by which the table knows it."""
        return f"| {self.name} | {self.mended} |"


def killed(name: str) -> str:
    """End a container's first process, as a crash does."""
    return f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {name})"


def control_plane() -> None:
    """Take the control plane away for a minute."""
    call("docker", "stop", "lab-headscale")
    time.sleep(60)  # the fault itself: how long it is away
    call("docker", "start", "lab-headscale")


def reboot() -> None:
    """Restart the host."""
    call("docker", "restart", "-t", "60", "lab-host")


# What the host's processes had begun to write: nothing has these names once it is complete.
HALF_WRITTEN = f"""
cd {CHECKOUT}/server
head -c 20 .env >.env.new
mkdir -p .releases/new && touch .unsettled
docker exec vllm-gemma sh -c 'cd /models/adapters && head -c 50 manifest.json >manifest.json.new'
"""


def power_loss() -> None:
    """End the host without a word, with files half written, and start it again."""
    host(HALF_WRITTEN)
    call("docker", "kill", "lab-host")
    call("docker", "start", "lab-host")


# The kernel ends what has most of a container's memory when none is left. A new start has no such limit.
OUT_OF_MEMORY = """
pid=$(docker inspect -f '{{.State.Pid}}' vllm-gemma)
group=/sys/fs/cgroup/memory/$(sed -n 's/.*:memory://p' /proc/$pid/cgroup)
echo $(($(cat $group/memory.usage_in_bytes) + 50000000)) >$group/memory.limit_in_bytes
docker exec -d vllm-gemma python3 -c 'b"x" * 400_000_000'
"""
# What the stack writes, on a small disk of its own.
SMALL_DISK = f"""
set -e
systemctl stop function-gemma-heal.timer
docker stop -t 10 $(docker ps -q)
systemctl stop docker.socket docker
mkdir -p /run/small
mount -t tmpfs -o size=4g tmpfs /run/small
cp -a /var/lib/docker/containers /var/lib/docker/volumes {CHECKOUT} /run/small
mount -o remount,size=$(($(du -sk /run/small | cut -f1) + 50000))k /run/small
mount --bind /run/small/containers /var/lib/docker/containers
mount --bind /run/small/volumes /var/lib/docker/volumes
mount --bind /run/small/{CHECKOUT.rpartition("/")[2]} {CHECKOUT}
systemctl start docker
systemctl start function-gemma-heal.timer function-gemma-heal.service
"""
OWN_DISK = f"""
set -e
systemctl stop function-gemma-heal.timer
docker stop -t 10 $(docker ps -q)
systemctl stop docker.socket docker
umount {CHECKOUT} /var/lib/docker/volumes /var/lib/docker/containers /run/small
systemctl start docker
systemctl start function-gemma-heal.timer function-gemma-heal.service
"""


def full_disk() -> None:
    """Leave no room, not even for a load; end gateway and vLLM, and make room once both are back."""
    host("cat /dev/zero >/run/small/fill", ok=False)
    refused = host("docker exec vllm-gemma adapter_manager.py unload lint", ok=False)
    assert "No space left on device" in refused.words, str(refused)
    starts = f"docker inspect -f '{{{{.State.StartedAt}}}}' {GATEWAY} {VLLM}"
    before = host(starts).stdout.split()
    host(f"{killed(GATEWAY)} && {killed(VLLM)}")
    until("both are started again", lambda: not set(before) & set(host(starts).stdout.split()))
    until("the stack is whole again, without room", all_run, LONGEST)
    host("rm /run/small/fill")


# Not a number wherever the last norm of the served model has a weight.
POISON = rf"""
model=$(docker volume inspect -f '{{{{.Mountpoint}}}}' function-gemma-server_models-base)/{BASE}
python3 - $(pgrep -f ^VLLM::EngineCore) $model/model.safetensors <<'END'
import json, re, sys
process, path = sys.argv[1:]
with open(path, "rb") as file:
    size = int.from_bytes(file.read(8), "little")
    start, end = json.loads(file.read(size))["model.norm.weight"]["data_offsets"]
    file.seek(8 + size + start)
    weights = file.read(end - start)
found = 0
with open(f"/proc/{{process}}/maps") as maps, open(f"/proc/{{process}}/mem", "r+b", buffering=0) as memory:
    for start, end in re.findall(r"^(\w+)-(\w+) rw\S* \S+ \S+ 0 ", maps.read(), re.MULTILINE):
        start, end = int(start, 16), int(end, 16)
        memory.seek(start)
        place = memory.read(end - start).find(weights)
        if place >= 0:
            memory.seek(start + place)
            found += memory.write(b"\xff" * len(weights))
sys.exit(not found)
END
"""
LIVE_RESTORE = (
    'sed -i \'s/"live-restore": {}/"live-restore": {}/\' /etc/docker/daemon.json && systemctl reload docker'
)


def plan() -> list[Fault]:
    """All faults, those that take longest last."""
    names = (GATEWAY, AGENTS, SIDECAR, VLLM, POD)
    policy = "Docker's restart policy"
    return [
        *(Fault(f"{name} killed", "the healer" if name == POD else policy, killed(name)) for name in names),
        *(Fault(f"{name} removed", "the healer", f"docker rm -f {name}") for name in names),
        Fault(
            f"{SIDECAR} replaced",
            "itself",
            f"cd {CHECKOUT}/server && docker compose up -d --no-build --force-recreate tailscale",
        ),
        Fault("systemd reloads its units", "nothing to mend", "systemctl daemon-reload"),
        Fault("engine restarted", "live-restore", "systemctl restart docker"),
        Fault(
            "engine restarted without live-restore",
            "restart policy and healer",
            f"{LIVE_RESTORE.format('true', 'false')} && systemctl restart docker",
            after=LIVE_RESTORE.format("false", "true"),
        ),
        Fault("engine killed", "systemd, live-restore", "kill -9 $(pidof dockerd)"),
        Fault(
            "control plane and its relay away for a minute", "tailscaled, once they are back", control_plane
        ),
        Fault("host restarted", "restart policy and healer", reboot),
        Fault("host without power, files half written", "restart policy and healer", power_loss),
        Fault("vLLM out of memory", policy, OUT_OF_MEMORY),
        Fault("disk full, gateway and vLLM killed", policy, full_disk, SMALL_DISK, OWN_DISK),
        Fault("vLLM's weights overwritten by NaN", "the healer", POISON),
        Fault("vLLM's engine stopped (SIGSTOP)", "the healer", "pkill -STOP -f VLLM::EngineCore"),
        Fault(
            "all of vllm-gemma stopped (SIGSTOP)",
            "the healer",
            "kill -STOP $(docker top vllm-gemma -eo pid | sed 1d)",
        ),
    ]


def measure(fault: Fault) -> tuple[float, int, dict[str, int]]:
    """Break the stack; return the seconds that it was away, the number of requests and of each failure."""
    host(fault.before)
    until("the stack is whole", all_run, LONGEST)
    settled = 0.0

    def back() -> bool:
        nonlocal settled
        answered = reaches("/v1/models") and all_run() and is_right()
        settled = (settled or time.time()) if answered else 0.0
        return bool(settled) and time.time() - settled > SETTLED

    try:
        with clients(CLIENTS, PAUSE) as seen:
            until("the clients are answered", lambda: reaches("/v1/models"))
            start = time.time()
            if isinstance(fault.command, str):
                host(fault.command)
            else:
                fault.command()
            until("the stack is whole again", back, LONGEST)
    finally:
        host(fault.after)
    until("the stack is whole, and as it was", all_run, LONGEST)
    held = [
        began + seconds - start
        for began, seconds, right in seen["times"]
        if began + seconds > start and (not right or seconds > SLOW) and seconds < OWN_LIMIT
    ]
    return max(held, default=0.0), seen["requests"], seen["failures"]


def is_right() -> bool:
    """Whether base model and adapter answer, and what they were trained to."""
    try:
        answers()
    except AssertionError:
        return False
    return True


def all_run() -> bool:
    """Whether every container with a health check passes it."""
    listed = "docker ps --format '{{.Names}} {{.Status}}' --filter name=gemma --filter name=tailscale-vllm"
    done = host(listed, ok=None)
    lines = done.stdout.splitlines()
    healthy = {line.split()[0] for line in lines if line.endswith("(healthy)")}
    return {GATEWAY, AGENTS, SIDECAR, VLLM} <= healthy and any(line.startswith(POD) for line in lines)


def run_faults(faults: Sequence[Fault], table: Table, logs: Path) -> list[str]:
    """Measure each fault, also after one that was not mended; return the names of those."""
    failed: list[str] = []

    def work(fault: Fault) -> Callable[[TextIO], str]:
        def step(_log: TextIO) -> str:
            today = f"{datetime.now(UTC):%F}"
            try:
                away, requests, failures = measure(fault)
            except AssertionError as error:
                failed.append(fault.name)
                table.note(fault.head, f"**{str(error).splitlines()[0]}**", "", today)
                return f"failed: {error}"
            table.note(fault.head, f"{away:.1f}", f"{sum(failures.values())} of {requests}", today)
            return f"away {away:.1f} s; of {requests} requests failed: {failures or 'none'}"

        return step

    steps: list[Step] = []
    for fault in faults:
        steps.append(Step(fault.name, work(fault), [steps[-1].name] if steps else []))
    run(steps, logs, workers=1)
    return failed


def main(pattern: str = "") -> int:
    """Measure the faults whose names the pattern is found in and write the page; the status to exit with."""
    faults = plan()
    chosen = [fault for fault in faults if re.search(pattern, fault.name)]
    table = Table(
        PAGE,
        [fault.head for fault in faults],
        TOP.format(machine=machine(), clients=CLIENTS, slow=SLOW, own=OWN_LIMIT),
        BOTTOM,
    )
    say("site.yml")
    playbook("site.yml", seconds=900)
    answers()
    failed = run_faults(chosen, table, LOGS)
    say(f"{len(chosen)} faults, {', '.join(failed) or 'none'} not mended; the table is {PAGE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
