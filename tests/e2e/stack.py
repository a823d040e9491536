"""Hands for the end-to-end tests: commands on the lab's machines, the forge, and what the stack now is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

import common as lab
from images import tag_of
from machines import host_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

ROOT = lab.ROOT
CHECKOUT = "/opt/function-gemma-server"
CONTROL_PLANE = f"http://{lab.HEADSCALE}:8080"
HUB = f"http://{lab.HUB}:8080"
URL = "http://function-gemma-server:8000"
BASE = "google/functiongemma-270m-it"
ANSWERS: dict[str, dict[str, str]] = json.loads((lab.LAB / "model" / "answers.json").read_text())
PROMPT = "Who are you?"
MODELS = {BASE: "base", "lint": "lint", "docstring": "docstring"}  # whose answers each gives

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    command: str
    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"{self.command}\n→ status {self.code}\n{self.stdout}{self.stderr}"

    def ended(self, *, ok: bool | None) -> Done:
        """Return itself, which must have ended well (`ok`), have failed (False), or either (None)."""
        assert ok is None or ok == (self.code == 0), str(self)
        return self

    @property
    def words(self) -> str:
        """All it said with single spaces, as programs wrap their lines."""
        return " ".join(f"{self.stdout} {self.stderr}".split())

    @property
    def last(self) -> str:
        """Its last line."""
        return self.stdout.rstrip().rpartition("\n")[2]


def call(
    *words: str | Path,
    ok: bool | None = True,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    seconds: float = 180,
) -> Done:
    """Run a command that must end as `ok` says, see Done.ended."""
    done = subprocess.run(
        list(map(str, words)),
        input=stdin,
        env={**os.environ, **(env or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Done(" ".join(map(str, words)), done.returncode, done.stdout, done.stderr).ended(ok=ok)


def lab_up() -> None:
    """Bring up what is down of the lab; a host that was removed is bare again."""
    call(sys.executable, lab.LAB / "lab.py", "up", seconds=2400)


def ssh(command: str) -> list[str]:
    """Words that run `command` on the host as the lab's inventory reaches it."""
    keys = lab.CACHE / "ssh"
    known = f"UserKnownHostsFile={keys / 'known_hosts'}"
    options = ["-o", known, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes"]
    return ["ssh", "-i", str(keys / "id_ed25519"), *options, f"root@{lab.HOST}", command]


def host(command: str, *, ok: bool | None = True, stdin: str = "", seconds: float = 180) -> Done:
    """Run a shell command on the host."""
    for _ in range(3):  # where its engine started nothing, see inside() in server/standby.sh
        done = call(*ssh(command), ok=None, stdin=stdin, seconds=seconds)
        if done.code != 126:
            break
    return done.ended(ok=ok)


def server(command: str, *, ok: bool | None = True, seconds: float = 180) -> Done:
    """Run a shell command on the host in the deployed checkout's server/."""
    return host(f"cd {CHECKOUT}/server && {command}", ok=ok, seconds=seconds)


def laptop(command: str, *, ok: bool | None = True, stdin: str = "", seconds: float = 180) -> Done:
    """Run a shell command on the laptop, in its copy of the repository."""
    shell = ("docker", "exec", "-i", "-w", "/home/checkout", "lab-laptop", "sh", "-c")
    return call(*shell, command, ok=ok, stdin=stdin, seconds=seconds)


def headscale(command: str) -> Any:  # noqa: ANN401 - each of its commands answers with JSON of its own
    """Run a command of the control plane and return its JSON."""
    done = call("docker", "exec", "lab-headscale", "headscale", *command.split(), "-o", "json")
    return json.loads(done.stdout)


def playbook(*words: str, ok: bool | None = True, seconds: float = 600) -> Done:
    """Run ansible-playbook from the repository's root, with the lab as its inventory."""
    programs = ROOT / ".venv" / "bin"
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
    return call(programs / "ansible-playbook", *words, ok=ok, env=env, seconds=seconds)


def changes(run: Done) -> int:
    """How many changes all hosts of a playbook's recap count."""
    recap = run.stdout.rpartition("PLAY RECAP")[2]
    return sum(map(int, re.findall(r"\bchanged=(\d+)", recap)))


def until(what: str, ready: Callable[[], T], seconds: float = 120) -> T:
    """Ask `ready` until it gives something true, and return that."""
    end = time.monotonic() + seconds
    while not (seen := ready()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return seen


@contextmanager
def started(words: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that runs while the test goes on; what it says is in `output`."""
    none = subprocess.DEVNULL
    with output.open("wb") as file, subprocess.Popen(words, stdin=none, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


# ── What runs ────────────────────────────────────────────────────────────────────────────────────


def inspect(project: str) -> dict[str, dict[str, Any]]:
    """What Docker on the host knows of each container of a Compose project, by name."""
    listed = f"docker ps -aq --filter label=com.docker.compose.project={project}"
    return {one["Name"][1:]: one for one in json.loads(host(f"docker inspect $({listed})").stdout)}


def containers() -> dict[str, tuple[str, str]]:
    """Id and start of each of the stack's containers: the same while none is replaced or restarted."""
    seen = inspect("function-gemma-server")
    return {name: (one["Id"], one["State"]["StartedAt"]) for name, one in seen.items()}


def replaced(before: Mapping[str, tuple[str, str]]) -> set[str]:
    """Names of the containers that were made, replaced or restarted since `before`."""
    return {name for name, identity in containers().items() if before.get(name) != identity}


def ask(model: str, prompt: str = PROMPT) -> str:
    """A model's answer to the laptop. While the server is away the gateway lets the request wait."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    curl = "curl -sS --fail-with-body --max-time 150 -H 'Content-Type: application/json' -d @-"
    done = laptop(f"{curl} {URL}/v1/chat/completions", stdin=json.dumps(body))
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def answers() -> None:
    """Check that base model and adapter say over the tailnet what they were trained to say."""
    assert ask(BASE) == ANSWERS[PROMPT]["base"]
    assert ask("lint") == ANSWERS[PROMPT]["lint"]


@contextmanager
def clients(number: int = 2, pause: float = 0.5) -> Iterator[dict[str, Any]]:
    """Have the laptop ask without end; what came of it (see clients.py) is in the dictionary afterwards."""
    words = ["docker", "exec", "-i", "-w", "/home/checkout", "lab-laptop", "python3", "tests/e2e/clients.py"]
    pipe, seen = subprocess.PIPE, dict[str, Any]()
    with subprocess.Popen([*words, str(number), str(pause)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        process.stdin.write(json.dumps({name: ANSWERS[PROMPT][one] for name, one in MODELS.items()}) + "\n")
        process.stdin.flush()
        try:
            yield seen
        finally:
            output, _ = process.communicate(timeout=400)
    seen.update(json.loads(output))


def nothing_failed(seen: Mapping[str, Any]) -> bool:
    """Whether clients got their answers, all of them right; says what else they got."""
    assert seen["failures"] == {}, seen["failures"]
    return bool(seen["requests"])


def reaches(path: str) -> bool:
    """Whether the laptop gets an answer from the gateway, whatever it says."""
    return laptop(f"curl -sS -m 5 {URL}{path}", ok=None).code == 0


def node(command: str, *, ok: bool | None = True) -> Done:
    """Run a command in the sidecar."""
    return host(f"docker exec tailscale-vllm {command}", ok=ok)


def address() -> str:
    """The node's IPv4 address on the tailnet."""
    return node("tailscale ip -4").last


# ── Another host ─────────────────────────────────────────────────────────────────────────────────

NODE = "function-gemma-server"
ASIDE = "lab-host"


def nodes() -> dict[str, str]:
    """Ids of the tailnet's nodes by the names under which they are reached."""
    return {node["given_name"]: str(node["id"]) for node in headscale("nodes list")}


def forget() -> None:
    """Remove the node from the tailnet, as its owner does before another takes its name."""
    known = nodes()
    if NODE in known:
        headscale(f"nodes delete --force -i {known[NODE]}")


@contextmanager
def bare_host(name: str, address: str) -> Iterator[None]:
    """Another host, bare, to which the lab's own lends the node's name."""
    headscale(f"nodes rename -i {nodes()[NODE]} {ASIDE}")
    options = [*host_options(), "--label", lab.LABEL, "--network", "lab-internet", "--ip", address]
    call("docker", "run", "-d", "--name", name, "--hostname", name, *options, tag_of("host"))
    try:
        call("docker", "exec", name, "sh", "-c", "systemctl is-system-running --wait || true")
        yield
    finally:
        call("docker", "rm", "-f", "-v", name)
        forget()
        headscale(f"nodes rename -i {nodes()[ASIDE]} {NODE}")


def inventory_with(name: str, path: Path, **variables: str) -> Path:
    """The lab's inventory in a folder, with another host in place of its own."""
    shutil.copytree(ROOT / "inventory" / "lab" / "group_vars", path / "group_vars")
    docker = {"ansible_connection": "community.docker.docker"}
    hosts: dict[str, Any] = {
        "inference_servers": {"hosts": {name: {**docker, "ansible_host": name, **variables}}},
        "tailnet_clients": {"hosts": {"laptop": {**docker, "ansible_host": "lab-laptop"}}},
    }
    groups = {"all": {"vars": {"lab_cache": str(lab.CACHE)}, "children": hosts}}
    (path / "hosts.yml").write_text(yaml.safe_dump(groups))
    return path


# ── The forge ────────────────────────────────────────────────────────────────────────────────────

REPOSITORY = lab.CACHE / "forge" / "function-gemma-server.git"


def forge(*words: str, stdin: str = "") -> str:
    """Run git in the forge's repository."""
    env = {"GIT_DIR": str(REPOSITORY), "GIT_INDEX_FILE": str(REPOSITORY.parent / "e2e-index")}
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_NAME": "e2e", f"GIT_{role}_EMAIL": "e2e@example.invalid"}
    return call("git", *words, stdin=stdin, env=env).stdout


def forge_head() -> str:
    """The commit that the forge's main is at."""
    return forge("rev-parse", "main").strip()


def host_head() -> str:
    """The commit that the deployed checkout is at."""
    return host(f"git -C {CHECKOUT} rev-parse HEAD").last


def push(tree: str, message: str) -> None:
    """Put a tree on top of the forge's main."""
    made = forge("commit-tree", tree, "-p", "main", "-m", message).strip()
    forge("update-ref", "refs/heads/main", made)


@contextmanager
def commit(path: str, old: str, new: str) -> Iterator[None]:
    """A commit on the forge that replaces `old` in a file by `new`; afterwards another takes it back.

    A host that pulled the change keeps it until its next update: what it serves meanwhile is as good.
    """
    content = forge("show", f"main:{path}")
    assert old in content, f"{path} has no {old!r}"
    tree = forge("rev-parse", "main^{tree}").strip()
    mode = forge("ls-tree", "main", path).split()[0]
    blob = forge("hash-object", "-w", "--stdin", stdin=content.replace(old, new, 1)).strip()
    forge("read-tree", "main")
    forge("update-index", "--cacheinfo", f"{mode},{blob},{path}")
    push(forge("write-tree").strip(), f"Change {path}")
    try:
        yield
    finally:
        push(tree, f"Take back the change of {path}")


@contextmanager
def away(container: str, leave: str = "stop", back: str = "start") -> Iterator[None]:
    """Take a part of the lab away (`docker stop` or `docker pause`) for a while."""
    call("docker", leave, container)
    try:
        yield
    finally:
        call("docker", back, container)
