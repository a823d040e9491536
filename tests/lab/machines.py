"""What the lab runs: networks, the internet's services, the bare host and the laptop."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import urllib.request
from typing import TYPE_CHECKING, TextIO

from common import (
    ADAPTER,
    CACHE,
    FORGE,
    HEADSCALE,
    HEADSCALE_AT_HOME,
    HOST,
    HUB,
    LABEL,
    MODEL,
    NETWORKS,
    ROOT,
    digest,
    docker,
    is_current,
    need,
    remade,
    wait_until,
)
from images import tag_of
from steps import StepError, call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


def container(
    name: str,
    image: str,
    options: Iterable[str | Path],
    command: Iterable[str] = (),
    *inputs: Path | str,
    network: str,
    ip: str = "",
) -> Callable[[TextIO], str]:
    """A step that has the container ``name`` running from exactly these inputs."""

    def start(log: TextIO) -> str:
        words = [
            "--network",
            network,
            *(["--ip", ip] if ip else []),
            *map(str, options),
            tag_of(image),
            *command,
        ]
        key = digest(*inputs, json.dumps(words))
        state, _, now = docker(
            "inspect", "-f", '{{.State.Running}} {{index .Config.Labels "key"}}', name
        ).partition(" ")
        if now == key:
            if state == "true":
                return "runs"
            call(log, "docker", "start", name)
            return "started again"
        if now:
            call(log, "docker", "rm", "-f", "-v", name)
        call(
            log,
            "docker",
            "run",
            "-d",
            "--name",
            name,
            "--hostname",
            name,
            "--label",
            LABEL,
            "--label",
            f"key={key}",
            *words,
        )
        return "started"

    return start


def networks(log: TextIO) -> str:
    """The internet and the home network; only headscale is in both."""
    made = docker("network", "ls", "--filter", f"label={LABEL}", "--format", "{{.Name}}").split()
    for name, addresses in NETWORKS.items():
        if name not in made:
            call(log, "docker", "network", "create", "--label", LABEL, *addresses, name)
    return "ready"


def ssh_keys(log: TextIO) -> str:
    """One key for the operator, one read-only deploy key, and host keys that known_hosts names."""
    folder = CACHE / "ssh"
    if is_current(folder, "1"):
        return "reused"
    need("ssh-keygen", "openssh-client", log)
    remade(folder)
    for name in ("id_ed25519", "deploy_key", "host_key", "forge_key"):
        call(log, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab {name}", "-f", folder / name)
    lines = [
        f"{ip} {(folder / f'{name}.pub').read_text()}"
        for ip, name in ((HOST, "host_key"), (FORGE, "forge_key"))
    ]
    (folder / "known_hosts").write_text("".join(lines))
    allowed = (folder / "deploy_key.pub").read_text()
    (folder / "forge_authorized_keys").write_text(
        f'restrict,command="git-upload-pack {FORGE_PATH}" {allowed}'
    )
    (folder / ".key").write_text("1")
    return "made"


def hub_token(_log: TextIO) -> str:
    """The token that the gated hub asks for."""
    token = CACHE / "hub" / "token"
    if token.exists():
        return "reused"
    token.parent.mkdir(exist_ok=True)
    token.touch(0o600)
    token.write_text("hf_" + secrets.token_hex(16))
    return "made"


def hub_ready(log: TextIO) -> str:
    """Write down the commits that the hub serves: the inventory pins them."""
    commits: dict[str, str] = {}

    def ask() -> bool:
        try:
            for name in (MODEL, ADAPTER):
                with urllib.request.urlopen(f"http://{HUB}:8080/api/models/{name}", timeout=5) as answer:
                    commits[name] = json.load(answer)["sha"]
        except OSError:
            return False
        return True

    wait_until("the hub", ask, log)
    (CACHE / "hub" / "revision").write_text(commits[MODEL])
    (CACHE / "hub" / "adapter_revision").write_text(commits[ADAPTER])
    return f"serves commits {commits[MODEL][:12]} and {commits[ADAPTER][:12]}"


FORGE_PATH = "/srv/git/function-gemma-server.git"


def snapshot(log: TextIO) -> str:
    """Commit the working tree as it is, uncommitted changes included, to the forge's main."""
    repository = CACHE / "forge" / "function-gemma-server.git"
    if not (repository / "HEAD").exists():
        call(log, "git", "init", "-q", "--bare", "-b", "main", remade(repository))
        call(log, "git", "-C", repository, "config", "gc.auto", "0")

    def git(*words: str) -> str:
        env = {
            **os.environ,
            "GIT_INDEX_FILE": str(CACHE / "forge" / "index"),
            "GIT_DIR": str(repository),
            "GIT_WORK_TREE": str(ROOT),
        } | {
            f"GIT_{who}_{what}": value
            for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "Lab"), ("EMAIL", "lab@example.invalid"))
        }
        done = subprocess.run(
            ["git", *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )
        if done.returncode and words[0] != "rev-parse":
            raise StepError(f"git {words[0]} ended with status {done.returncode}")
        return done.stdout.strip()

    git("add", "-A")
    tree = git("write-tree")
    parent = git("rev-parse", "-q", "--verify", "refs/heads/main")
    if parent and git("rev-parse", f"{parent}^{{tree}}") == tree:
        return "has this tree"
    commit = git(
        "commit-tree", tree, *(["-p", parent] if parent else []), "-m", "Snapshot of the working tree"
    )
    git("update-ref", "refs/heads/main", commit)
    return f"snapshot {commit[:12]}"


def forge_command() -> str:
    """What the forge's container runs: sshd for the user git with one read-only key."""
    return (
        "install -m 644 /ssh/forge_authorized_keys /etc/ssh/git_keys && "
        "install -m 600 /ssh/forge_key /etc/ssh/ssh_host_ed25519_key && "
        "git config --system safe.directory '*' && "
        "exec /usr/sbin/sshd -D -e -o AuthorizedKeysFile=/etc/ssh/git_keys"
    )


def headscale_ready(log: TextIO) -> str:
    """Attach headscale to the home network, make the user ops and the keys of host and laptop."""
    if HEADSCALE_AT_HOME not in docker(
        "inspect", "-f", "{{json .NetworkSettings.Networks}}", "lab-headscale"
    ):
        call(log, "docker", "network", "connect", "--ip", HEADSCALE_AT_HOME, "lab-home", "lab-headscale")
    wait_until("headscale", lambda: bool(docker("exec", "lab-headscale", "headscale", "users", "list")), log)
    folder = CACHE / "headscale"
    born = docker("inspect", "-f", "{{.Id}}", "lab-headscale")
    if is_current(folder, born):
        return "reused"
    remade(folder)
    call(log, "docker", "exec", "lab-headscale", "headscale", "users", "create", "ops")
    for name, owner in (("authkey", ("--tags", "tag:inference")), ("laptop_key", ("-u", "1"))):
        answer = docker(
            "exec",
            "lab-headscale",
            "headscale",
            "preauthkeys",
            "create",
            "--reusable",
            "--expiration",
            "90d",
            "-o",
            "json",
            *owner,
        )
        key = folder / name
        key.touch(0o600)
        key.write_text(json.loads(answer)["key"])
    (folder / ".key").write_text(born)
    return "keys made"


def forget(machine: str, log: TextIO) -> None:
    """Remove a machine from the tailnet, as its owner does before another takes its name."""
    nodes = json.loads(docker("exec", "lab-headscale", "headscale", "nodes", "list", "-o", "json")) or []
    delete = ("docker", "exec", "lab-headscale", "headscale", "nodes", "delete", "--force", "-i")
    for node in nodes:
        if node["name"] == machine:
            call(log, *delete, str(node["id"]))


def laptop_joins(log: TextIO) -> str:
    """Bring the laptop onto the tailnet."""
    # Only headscale is reachable from home, by its address on the internet, as any control plane is.
    call(log, "docker", "exec", "lab-laptop", "ip", "route", "replace", HEADSCALE, "via", HEADSCALE_AT_HOME)
    wait_until(
        "tailscaled on the laptop",
        lambda: "BackendState" in docker("exec", "lab-laptop", "tailscale", "status", "--json"),
        log,
    )
    if '"BackendState": "Running"' in docker("exec", "lab-laptop", "tailscale", "status", "--json"):
        return "is on the tailnet"
    call(log, "docker", "cp", CACHE / "headscale" / "laptop_key", "lab-laptop:/root/key")
    call(
        log,
        "docker",
        "exec",
        "lab-laptop",
        "tailscale",
        "up",
        f"--login-server=http://{HEADSCALE}:8080",
        "--authkey=file:/root/key",
        "--hostname=laptop",
        "--timeout=60s",
    )
    return "joined"


# systemd wants most capabilities; the ones left out are not to be had on every machine.
CAPABILITIES = """
    AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID
    IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE
    NET_BROADCAST NET_RAW SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE
    SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_TIME SYS_TTY_CONFIG WAKE_ALARM
""".split()


def host_options() -> list[str]:
    """Options of `docker run` under which a bare systemd host boots and runs an engine of its own."""
    return [
        "--cap-drop=ALL",
        *(f"--cap-add={name}" for name in CAPABILITIES),
        "--security-opt=seccomp=unconfined",
        "--security-opt=apparmor=unconfined",
        "--security-opt=systempaths=unconfined",
        "--device-cgroup-rule=a *:* rwm",
        "--device=/dev/net/tun",
        "--cgroupns=host",
        "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw",
        "--tmpfs=/run",
        "--tmpfs=/tmp:exec",
        "--volume=/var/lib/docker",
    ]


def ssh() -> list[str]:
    """The words before a command that the operator runs on the bare host."""
    folder = CACHE / "ssh"
    options = (f"UserKnownHostsFile={folder / 'known_hosts'}", "ConnectTimeout=2", "BatchMode=yes")
    return ["ssh", "-i", str(folder / "id_ed25519"), *(f"-o{option}" for option in options), f"root@{HOST}"]


def host_pulls(log: TextIO) -> str:
    """Bring a checkout that an earlier run left on the host to the snapshot, which site.yml never does."""
    checkout = "/opt/function-gemma-server"
    keys = f"{checkout}/server/secrets/git"
    command = f"ssh -i {keys}/deploy_key -o UserKnownHostsFile={keys}/known_hosts"
    pull = f"git -C {checkout} -c core.sshCommand='{command}' pull -q --ff-only"
    call(log, *ssh(), f"[ ! -d {keys} ] || {pull}")
    return "has today's code, or none"


def host_ready(log: TextIO) -> str:
    """Wait until the bare host has booted and lets the operator in by SSH."""
    folder = CACHE / "ssh"
    if not docker("exec", "lab-host", "ls", "/root/.ssh/authorized_keys"):
        forget("function-gemma-server", log)
        inside = ("docker", "exec", "lab-host")
        call(log, *inside, "mkdir", "-p", "-m", "700", "/root/.ssh")
        for source, target in (
            ("host_key", "/etc/ssh/ssh_host_ed25519_key"),
            ("id_ed25519.pub", "/root/.ssh/authorized_keys"),
        ):
            call(log, "docker", "cp", folder / source, f"lab-host:{target}")
            call(log, *inside, "chown", "root:", target)
        # Without a host key it may have failed so often by now that systemd starts it no more.
        call(log, *inside, "sh", "-c", "systemctl reset-failed ssh; systemctl restart --no-block ssh")

    def lets_in() -> bool:
        done = subprocess.run([*ssh(), "true"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False)
        return done.returncode == 0

    wait_until("the bare host's SSH", lets_in, log)
    return "answers"
