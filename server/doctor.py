#!/usr/bin/env python3
"""Say whether this host serves, hop by hop from the name to a token, and what mends it where it does not.

    server/doctor           for people: each finding with the command that mends it
    server/doctor --json    for programs: one JSON object, as doctor.schema.json describes it

Run as root on the host, or `ssh root@function-gemma-server ./doctor`. It changes nothing but the counters of
requests, for it asks each model for a token, and waits for no answer longer than LIMIT.

Exit codes: 0 healthy, perhaps with notes; 1 degraded: callers are answered, but not all is as it should be;
2 down: http://function-gemma-server:8000 gives no token of the base model; 64 called wrongly.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

NAME = "function-gemma-server"
POD, SIDECAR, GATEWAY = "function-gemma-pod", "tailscale-vllm", "gateway-gemma"
VLLM, AGENTS = "vllm-gemma", "agents-gemma"
LIMIT = 15  # seconds for an answer
DISK = 5  # GiB that an update's layers, a model's or an adapter's next generation may need
KEY = timedelta(days=30)  # before a node's key expires, to act in
HEALTHY, NOTE, DEGRADED, DOWN = "healthy", "note", "degraded", "down"
EXITS = {HEALTHY: 0, NOTE: 0, DEGRADED: 1, DOWN: 2}
RESTART = "docker restart -t 30"  # what has hung would be waited for as long as a request may take
# The gateway's image has bash, but no HTTP client.
_TCP = "exec 3<>/dev/tcp/127.0.0.1/8000 && cat >&3 && cat <&3"
_TAGS = {"vllm-gemma": "FUNCTION_GEMMA_TAG", "tailscale-vllm": "TAILSCALE_VLLM_TAG"}  # by the image


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Why it failed, in its own last words."""
        return (self.err or self.out or f"exit status {self.code}").splitlines()[-1]


class Finding(NamedTuple):
    """Something that is not as it should be: how bad it is, what it is, and the command that mends it."""

    state: str
    what: str
    mend: str


Ask = Callable[..., Answer]


def ask(*words: str, stdin: str = "", seconds: float = LIMIT) -> Answer:
    """Run a command, which ends with all that it started when its time is up."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        return Answer(127, "", f"{words[0]}: {error.strerror}")
    try:
        out, err = process.communicate(stdin, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Answer(124, "", f"no answer within {seconds:g} s")
    return Answer(process.returncode, out.strip(), err.strip())


@dataclass
class Host:
    """Whom to ask, what Docker knows of each container, and what a report says beside findings."""

    ask: Ask
    server: Path
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    health: dict[str, Answer] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=lambda: {"addresses": [], "tokens": [], "adapters": []})

    def status(self, name: str) -> str:
        """Return a container's health; of one that does not run, or has no health check, its state."""
        if name in self.health:
            return "unhealthy" if self.health[name].code else HEALTHY
        return str(self.containers[name]["State"]["Status"]) if name in self.containers else "missing"

    def runs(self, name: str) -> bool:
        """Return whether a container can be asked, be it unhealthy."""
        return self.status(name) in ("running", HEALTHY, "unhealthy")

    @property
    def vllms(self) -> list[str]:
        """The containers with a vLLM, that of the first GPU first, which should be there at least."""
        return [VLLM, *sorted(name for name in self.containers if re.fullmatch(rf"{VLLM}-\d", name))]

    @property
    def vllm(self) -> str:
        """The first vLLM that is well; empty where none is."""
        return next((name for name in self.vllms if self.status(name) == HEALTHY), "")

    def get(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Ask the gateway from within the pod; return the status, 0 without an answer, and the text."""
        content = json.dumps(body) if body else ""
        request = f"{'POST' if body else 'GET'} {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
        request += f"Content-Length: {len(content)}\r\n\r\n{content}"
        answer = self.within(GATEWAY, "bash", "-c", _TCP, stdin=request)
        if not answer.out.startswith("HTTP/"):
            return 0, answer.reason
        head, _, text = answer.out.partition("\n\n")
        status = int(head.split()[1])
        return status, text if status == 200 else f"HTTP {status} {text}"

    def within(self, name: str, *words: str, stdin: str = "") -> Answer:
        """Run a command in a container, where the end of `docker exec` would leave it running."""
        limited = ("docker", "exec", "-i", name, "timeout", str(LIMIT), *words)
        for _ in range(3):
            answer = self.ask(*limited, stdin=stdin, seconds=LIMIT + 1)
            if answer.code != 126:  # nothing was started, see inside() in standby.sh
                break
        return answer._replace(err=f"no answer within {LIMIT} s") if answer.code == 124 else answer


def containers(host: Host) -> Iterator[Finding]:
    """Look whether each container runs and is healthy, in the words of its health check."""
    for name in (POD, SIDECAR, GATEWAY, *host.vllms, AGENTS):
        # Whether callers miss a vLLM the gateway knows: another one, or an update's standby, may answer.
        state = DOWN if name in (POD, SIDECAR, GATEWAY) else DEGRADED
        if not host.runs(name):
            yield Finding(state, f"{name} is {host.status(name)}", _mend(host, name))
        elif host.status(name) == "unhealthy":
            yield Finding(state, f"{name} is unhealthy: {host.health[name].reason}", _mend(host, name))


def _mend(host: Host, name: str) -> str:
    """Return what mends a container; its health check names it where it knows it."""
    heal, logs, restart = f"{host.server}/heal.sh", f"docker logs --tail 20 {name}", f"{RESTART} {name}"
    if not host.runs(name):
        mends = {"missing": f"{host.server}/update.sh --no-pull", "paused": f"docker unpause {name}"}
        return {**mends, "restarting": logs}.get(host.status(name), heal)
    said = host.health[name].reason
    if "/authkey is used at once" in said:
        return f"install -m 0400 /dev/stdin {host.server}/secrets/tailscale/authkey"
    if named := re.search(r"To mend it: (.*)|(docker logs [\w-]+)", said):
        return named[1] or named[2]
    if "the pod was restarted" in said:
        return heal
    return logs if said.startswith("waiting: ") else restart


def node(host: Host) -> Iterator[Finding]:
    """Ask the node for its name in the tailnet, and for how long it may stay."""
    if not host.runs(SIDECAR):
        return
    answer = host.within(SIDECAR, "tailscale", "status", "--json", "--peers=false")
    if answer.code:
        yield Finding(DOWN, f"tailscaled does not answer: {answer.reason}", f"{RESTART} {SIDECAR}")
        return
    me = json.loads(answer.out)["Self"]
    host.report["addresses"] = me.get("TailscaleIPs") or []
    where = "in Tailscale's admin console, or in headscale by the command"
    called = me["DNSName"].partition(".")[0]
    if called not in ("", NAME):
        what = f"the tailnet calls this node {called}, so another one is called {NAME}: remove that one, and"
        rename = f"headscale nodes rename --identifier {me['ID']} {NAME}"
        yield Finding(DOWN, f"{what} give this one the name {where}", rename)
    if expires := me.get("KeyExpiry"):
        end = datetime.strptime(expires[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
        left = end - datetime.now(timezone.utc)
        if left < KEY:
            what = f"the node's key expires on {end:%F}, as a user owns it: give it a tag {where}"
            tag = f"headscale nodes tag --identifier {me['ID']} --tags tag:inference"
            yield Finding(DEGRADED if left > timedelta(0) else DOWN, what, tag)


def tokens(host: Host) -> Iterator[Finding]:
    """Ask the gateway for a token of the base model, and then of each adapter."""
    if not host.runs(GATEWAY):
        return
    mend = f"{RESTART} {host.vllm}" if host.vllm else _mend(host, VLLM)
    status, text = host.get("/health")
    if not status:
        yield Finding(DOWN, f"the gateway does not answer: {text}", f"{RESTART} {GATEWAY}")
    elif status != 200:
        yield Finding(DOWN, "the gateway has no vLLM that is ready", mend)
    if status != 200:
        return
    status, text = host.get("/v1/models")
    if status != 200:
        yield Finding(DOWN, f"the gateway gets no models of vLLM: {text}", mend)
        return
    base, *names = (one["id"] for one in json.loads(text)["data"])  # vLLM lists the base model first
    if wrong := _token(host, base):
        yield Finding(DOWN, f"{base} gives no token: {wrong}", mend)
        return
    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(names, pool.map(partial(_token, host), names), strict=True))
    host.report["tokens"] = [base, *(name for name, wrong in answers.items() if not wrong)]
    for name, wrong in answers.items():
        if wrong:
            back = f"docker exec {VLLM} adapter_manager.py rollback {name}"
            yield Finding(DEGRADED, f"{name} gives no token: {wrong}", back)


def _token(host: Host, model: str) -> str:
    """Return why a model gives no token; empty where it does."""
    status, text = host.get("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1})
    return "" if status == 200 and json.loads(text)["usage"]["completion_tokens"] else text


def agents(host: Host) -> Iterator[Finding]:
    """Ask the agents service through the gateway, unless the health check of one has told already."""
    if host.status(AGENTS) == host.status(GATEWAY) == HEALTHY:
        status, text = host.get("/agents/")
        if status != 200:
            what = f"the gateway gets no answer of the agents service: {text}"
            yield Finding(DEGRADED, what, f"{RESTART} {AGENTS}")


def adapters(host: Host) -> Iterator[Finding]:
    """Compare what the manifest names with what each vLLM serves."""
    if not host.vllm:
        return
    answers = [host.within(host.vllm, "adapter_manager.py", word, "--json") for word in ("list", "history")]
    for answer in answers:
        if answer.code:
            what = f"what is served is not known: {answer.reason}"
            yield Finding(DEGRADED, what, f"{RESTART} {host.vllm}")
            return
    listed, past = (json.loads(answer.out) for answer in answers)
    keys = ("name", "serves", "source", "quarantined")
    host.report["adapters"] = [{key: one[key] for key in keys} for one in past["adapters"]]
    for one in listed["quarantined"]:
        what = f"{one['name']} {one['digest']} is quarantined: {one['reason']}"
        back = f"docker exec {host.vllm} adapter_manager.py rollback {one['name']}"
        yield Finding(DEGRADED, what, back)
    for one in listed["differs"]:
        what = f"{one['server']} differs: {one['name']} {one['digest'] or 'is not served'}"
        yield Finding(DEGRADED, what, f"{RESTART} {one['server']}")
    named = {one["name"]: one["serves"] for one in past["adapters"] if not one["quarantined"]}
    serving = {one["name"]: one["digest"] for one in listed["adapters"]}
    for name in sorted(named.keys() | serving.keys()):
        if named.get(name) != serving.get(name):
            what = f"{name}: the manifest names {named.get(name)}, served is {serving.get(name)}"
            yield Finding(DEGRADED, what, f"{RESTART} {host.vllm}")


def gpus(host: Host) -> Iterator[Finding]:
    """Compare the GPUs that each vLLM's container asks for with those that it sees."""
    for name in filter(host.runs, host.vllms):
        requests = host.containers[name]["HostConfig"].get("DeviceRequests") or []
        asked = [gpu for request in requests for gpu in request["DeviceIDs"] or ["all"]]
        if asked:
            seen, wanted = host.within(name, "nvidia-smi", "-L"), len(asked)
            if any(gpu.endswith("all") for gpu in asked):
                wanted = max(1, _gpus(host.ask("nvidia-smi", "-L")))
            if _gpus(seen) < wanted:
                what = f"{name} asks for {wanted} GPUs ({', '.join(asked)}) and sees {_gpus(seen)}"
                why = f": {seen.reason}" if seen.code else ""
                yield Finding(DEGRADED, what + why, f"{RESTART} {name}")


def _gpus(answer: Answer) -> int:
    return 0 if answer.code else len(re.findall(r"^GPU \d", answer.out, re.MULTILINE))


def checkout(host: Host) -> Iterator[Finding]:
    """Ask git for changes by hand, and update.sh for what it would pull, build and replace."""
    root, script = host.server.parent, f"{host.server}/update.sh"
    owner = pwd.getpwuid(root.stat().st_uid).pw_name
    as_owner = () if owner == "root" else ("runuser", "-u", owner, "--")  # git trusts its user's alone
    status = host.ask(*as_owner, "git", "--no-optional-locks", "-C", str(root), "status", "--porcelain")
    if status.code:
        yield Finding(DEGRADED, f"git says of the checkout: {status.reason}", f"git -C {root} status")
    elif status.out:
        files = ", ".join(line.split()[-1] for line in status.out.splitlines()[:5])
        what = f"the checkout has changes that are not committed, and a pull may refuse them: {files}"
        yield Finding(DEGRADED, what, f"git -C {root} stash --include-untracked")
    plan = host.ask(script, "--plan")
    if plan.code:  # a host without internet is as good
        yield Finding(NOTE, f"whether there is newer code is not known: {plan.reason}", f"{script} --plan")
        plan = host.ask(script, "--no-pull", "--plan")
    if plan.code:
        what = f"whether code and settings are what runs is not known: {plan.reason}"
        yield Finding(DEGRADED, what, f"{script} --no-pull --plan")
    if f"update.sh: {SIDECAR} differs" in plan.out:
        what = f"code or settings are not what runs: {SIDECAR} is replaced only when that is asked for"
        yield Finding(NOTE, what, f"{script} --no-pull tailscale")
    for would in re.findall(r"^update\.sh: would ([^;\n]*)", plan.out, re.MULTILINE):
        name = would.rpartition(": ")[2]
        if would.startswith("pull "):
            yield Finding(NOTE, f"an update would {would}", script)
        elif host.runs(name) or name not in (POD, SIDECAR, GATEWAY, *host.vllms, AGENTS):  # else said already
            what = f"code or settings are not what runs: update.sh would {would}"
            yield Finding(DEGRADED, what, f"{script} --no-pull")


def images(host: Host) -> Iterator[Finding]:
    """Compare the tags in server/.env, which a plain `docker compose up -d` would take, with what runs."""
    path = host.server / ".env"
    env = dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE)) if path.exists() else {}
    for name, one in host.containers.items():
        image, _, runs = one["Config"]["Image"].rpartition(":")
        variable = _TAGS.get(image, "")
        if name == GATEWAY:
            variable, runs = "GATEWAY_CONFIG_TAG", one["Config"]["Labels"].get("function-gemma.config")
        tag = env.get(variable, "dev")
        if variable and runs != tag:
            what = f"{name} is of {runs}, and server/.env has {variable}={tag}"
            yield Finding(DEGRADED, what, f"{host.server}/update.sh --no-pull")


def disk(host: Host) -> Iterator[Finding]:
    """Ask for the space that is left where the engine keeps images and models."""
    root = host.ask("docker", "info", "--format", "{{.DockerRootDir}}").out
    free = int(host.ask("df", "-Pk", root).out.splitlines()[-1].split()[3]) / 1024**2
    if free < DISK:
        what = f"{free:.1f} GiB are free for {root}, less than {DISK}"
        yield Finding(DEGRADED, what, "docker image prune -f && docker builder prune -f")


def healer(host: Host) -> Iterator[Finding]:
    """Ask whether the healer would mend what breaks."""
    if host.ask("systemctl", "is-active", "function-gemma-heal.timer").out != "active":
        units = " ".join(f"{host.server}/systemd/function-gemma-heal.{kind}" for kind in ("service", "timer"))
        yield Finding(DEGRADED, "the healer does not run", f"systemctl enable --now {units}")


CHECKS = (containers, node, tokens, agents, adapters, gpus, checkout, images, disk, healer)


def engine(host: Host) -> Iterator[Finding]:
    """Ask Docker for the stack's containers, which all other checks build on."""
    label = "label=com.docker.compose"
    filters = ("--filter", f"{label}.project={NAME}", "--filter", f"{label}.oneoff=False")
    listed = host.ask("docker", "ps", "-aq", *filters)
    seen = host.ask("docker", "inspect", *listed.out.split()) if listed.out else listed
    if not seen.out:
        if seen.code:
            yield Finding(DOWN, f"Docker does not answer: {seen.reason}", "systemctl restart docker")
        else:
            yield Finding(DOWN, "there is no container of the stack", f"{host.server}/update.sh --no-pull")
        return
    host.containers = {one["Name"][1:]: one for one in json.loads(seen.out)}
    # By the containers' own checks, but now: Docker asks every few seconds only.
    tests = {
        name: one["Config"]["Healthcheck"]["Test"][1:]
        for name, one in host.containers.items()
        if one["State"]["Status"] == "running" and "Healthcheck" in one["Config"]
    }
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        health = list(pool.map(lambda name: host.within(name, *tests[name]), tests))
    host.health = dict(zip(tests, health, strict=True))


def examine(host: Host) -> dict[str, Any]:
    """Run all checks at once and return the report."""
    found = _run(host, engine)
    if not found:
        with ThreadPoolExecutor(len(CHECKS)) as pool:
            found = [one for some in pool.map(partial(_run, host), CHECKS) for one in some]
    found.sort(key=lambda one: -EXITS[one["state"]])
    state = next((one["state"] for one in found if one["state"] != NOTE), HEALTHY)
    return {"state": state, "findings": found, **host.report}


def _run(host: Host, check: Callable[[Host], Iterator[Finding]]) -> list[dict[str, str]]:
    try:
        found = list(check(host))
    except (IndexError, KeyError, OSError, TypeError, ValueError) as error:
        what = f"an answer was not understood ({type(error).__name__}: {error})"
        state = DOWN if check in (engine, tokens) else DEGRADED  # nothing shows then that it serves
        found = [Finding(state, what, f"{host.server}/update.sh --no-pull")]
    return [{"check": check.__name__, **one._asdict()} for one in found]


def describe(report: dict[str, Any]) -> str:
    """Put a report in words."""
    lines = [f"{report['state']}: {', '.join(report['tokens']) or 'no model'} gave a token"]
    for one in report["findings"]:
        lines += [f"{one['state']}: {one['check']}: {one['what']}", f"    to mend it: {one['mend']}"]
    return "\n".join(lines)


def main(arguments: list[str], asking: Ask = ask) -> int:
    """Examine this host, print the report and return the exit code."""
    if arguments not in ([], ["--json"]) or os.geteuid() != 0:
        print(__doc__, file=sys.stderr)
        return 64
    report = examine(Host(asking, Path(__file__).resolve().parent))
    print(json.dumps(report) if arguments else describe(report))
    return EXITS[report["state"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
