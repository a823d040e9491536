"""The lab: the internet in a box that the demo and the tests run in.

    python3 tests/lab/lab.py up|demo|down|clean

Every part is built from its inputs' digest: what has not changed is not built again. Docker images and
containers carry the label ``function-gemma-lab``; files lie under ``.cache/lab``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

sys.path.insert(0, str(Path(__file__).parent))
from steps import Step, StepError, call, fail, run, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab"
CACHE = ROOT / ".cache" / "lab"
LOGS = CACHE / "log"
LABEL = "function-gemma-lab"
UV = ROOT / ".venv" / "bin" / "uv"

SUITE = "trixie"
MODEL = "google/functiongemma-270m-it"
REGISTRY, FORGE, HUB, HEADSCALE, HOST = (f"10.77.0.{last}" for last in (10, 11, 12, 13, 20))
NETWORKS = {"lab-internet": "10.77.0.0/24", "lab-home": "10.78.0.0/24"}
HEADSCALE_AT_HOME = "10.78.0.13"
CONTAINERS = ("lab-registry", "lab-forge", "lab-hub", "lab-headscale", "lab-host", "lab-laptop")
READY_SECONDS = 90

# The parts of tailscaled that neither the lab nor containerboot uses: half of its compile time.
TAILSCALE_OMIT = """
    appconnectors aws bird captiveportal capture clientupdate cloud completion conn25 dbus debug
    desktop_sessions doctor drive identityfederation kube linuxdnsfight logtail netlog networkmanager
    oauthkey posture relayserver resolved sdnotify synology syspolicy systray tailnetlock taildrop tap tpm
    usermetrics wakeonlan webbrowser webclient
""".split()
GO_PROGRAMS = {
    "tailscale": (
        "ts_include_cli," + ",".join(f"ts_omit_{part}" for part in TAILSCALE_OMIT),
        ("tailscale.com/cmd/tailscaled", "tailscale.com/cmd/containerboot"),
    ),
    "headscale": ("", ("github.com/juanfont/headscale/cmd/headscale",)),
    "crane": ("", ("github.com/google/go-containerregistry/cmd/crane",)),
}


def sudo() -> list[str]:
    """What goes before a command that needs root."""
    return [] if os.geteuid() == 0 else ["sudo"]


def digest(*inputs: Path | str) -> str:
    """Twelve hex digits of the content of files and folders and of plain strings."""
    total = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            total.update(f"str {item}\0".encode())
            continue
        for path in sorted(item.rglob("*")) if item.is_dir() else [item]:
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"file {path.relative_to(item.parent)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def docker(*words: str | Path) -> str:
    """Standard output of a docker command; an empty string where it fails."""
    done = subprocess.run(["docker", *map(str, words)], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def wait_until(what: str, ready: Callable[[], bool], log: TextIO) -> None:
    """Ask ``ready`` until it says yes.

    Raises:
        StepError: it did not within READY_SECONDS.
    """
    end = time.monotonic() + READY_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise StepError(f"{what} is not ready after {READY_SECONDS} s")
        print("waiting for", what, file=log, flush=True)
        time.sleep(0.3)


def is_current(folder: Path, key: str) -> bool:
    """Whether ``folder`` was finished from the inputs with this digest."""
    return (folder / ".key").is_file() and (folder / ".key").read_text() == key


def remade(folder: Path) -> Path:
    """An empty ``folder``, whatever it held: the same one, for containers have it mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*sudo(), "find", str(folder), "-mindepth", "1", "-delete"], check=True)
    return folder


# ── Docker itself ────────────────────────────────────────────────────────────────────────────────


def engine(log: TextIO) -> str:
    """Start a Docker engine where none answers, installing Debian's where there is none."""
    if docker("info", "--format", "{{.ServerVersion}}"):
        return "answers"
    if not (shutil.which("dockerd") or Path("/usr/sbin/dockerd").exists()):
        if not shutil.which("apt-get"):
            raise StepError(
                "no Docker here and no apt-get to install it: install Docker, then run this again"
            )
        call(log, *sudo(), "apt-get", "update")
        call(
            log,
            *sudo(),
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
            "docker.io",
            "iptables",
        )
    if Path("/run/systemd/system").is_dir():
        call(log, *sudo(), "systemctl", "start", "docker")
    elif not docker("info", "--format", "{{.ServerVersion}}"):
        subprocess.run(
            [*sudo(), "rm", "-f", "/var/run/docker.pid"], check=True
        )  # of an engine that was killed
        with (LOGS / "dockerd.log").open("w") as out:
            process = subprocess.Popen(
                [*sudo(), "dockerd"], stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        (CACHE / "dockerd.pid").write_text(str(process.pid))
    wait_until("the Docker engine", lambda: bool(docker("info", "--format", "{{.ServerVersion}}")), log)
    if (
        os.geteuid()
        and not docker("ps", "--format", "x{{.ID}}")
        and "permission denied"
        in subprocess.run(["docker", "ps"], capture_output=True, text=True, check=False).stderr
    ):
        raise StepError("Docker refuses this user: run `sudo usermod -aG docker $USER`, log in again")
    return "started"


def controller(log: TextIO) -> str:
    """Make .venv."""
    call(log, ROOT / "tests" / "controller.sh")
    return "ready"


# ── Images ───────────────────────────────────────────────────────────────────────────────────────

CERTIFICATES = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))


def key_of(image: str) -> str:
    """Digest of all that ``image`` is made from, known before it is built."""
    dockerfile = LAB / "images" / f"{image}.Dockerfile"
    if image == "base":
        return digest(dockerfile, SUITE, *CERTIFICATES)
    context: dict[str, list[Path | str]] = {
        "builder": [ROOT / "requirements.txt"],
        "headscale": [go_key("headscale")],
        "laptop": [go_key("tailscale"), ROOT / "requirements.txt"],
        "tailscale": [go_key("tailscale"), LAB / "images" / "apk"],
    }
    return digest(dockerfile, key_of("base"), *context.get(image, []))


def tag_of(image: str) -> str:
    """Name under which Docker holds ``image``."""
    return f"{LABEL}/{image}:{key_of(image)}"


def build_image(image: str, context: Callable[[], Iterable[Path]] = lambda: ()) -> Callable[[TextIO], str]:
    """A step that builds ``image`` from its Dockerfile, with ``context()`` beside it."""

    def build(log: TextIO) -> str:
        tag = tag_of(image)
        if docker("image", "inspect", "-f", "{{.Id}}", tag):
            return "reused"
        folder = remade(CACHE / "context" / image)
        for path in context():
            shutil.copy(path, folder)
        # Debian 12's engine has no buildx beside it: the classic builder does all that is needed here.
        call(
            log,
            "docker",
            "build",
            "-t",
            tag,
            "--label",
            LABEL,
            "--build-arg",
            f"BASE={tag_of('base')}",
            "-f",
            LAB / "images" / f"{image}.Dockerfile",
            folder,
            env={**os.environ, "DOCKER_BUILDKIT": "0"},
        )
        return "built"

    return build


def base(log: TextIO) -> str:
    """Debian from its own packages where mmdebstrap can be had, else from its official image."""
    tag = tag_of("base")
    if docker("image", "inspect", "-f", "{{.Id}}", tag):
        return "reused"
    debian = f"{LABEL}/debian:{SUITE}"
    folder = remade(CACHE / "context" / "base")
    if shutil.which("apt-get"):
        if not shutil.which("mmdebstrap"):
            call(log, *sudo(), "apt-get", "update")
            call(
                log,
                *sudo(),
                "apt-get",
                "install",
                "-y",
                "--no-install-recommends",
                "mmdebstrap",
                "debian-archive-keyring",
            )
        call(
            log,
            *sudo(),
            "mmdebstrap",
            "--variant=minbase",
            "--include=ca-certificates",
            SUITE,
            folder / "root.tar",
        )
        call(log, "docker", "import", folder / "root.tar", debian)
        call(log, *sudo(), "rm", "-f", folder / "root.tar")
    else:
        debian = f"debian:{SUITE}-slim"
        call(log, "docker", "pull", debian)
    (folder / "ca").mkdir()
    for certificate in CERTIFICATES:
        shutil.copy(certificate, folder / "ca")
    call(
        log,
        "docker",
        "build",
        "-t",
        tag,
        "--label",
        LABEL,
        "--build-arg",
        f"DEBIAN={debian}",
        "-f",
        LAB / "images" / "base.Dockerfile",
        folder,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    return "built"


def in_builder(log: TextIO, mounts: dict[Path, str], *command: str) -> None:
    """Run ``command`` in the builder image; it ends with the command and leaves nothing behind."""
    for folder in mounts:
        if not folder.exists():
            folder.mkdir(parents=True)
    volumes = [word for path, inside in mounts.items() for word in ("-v", f"{path}:{inside}")]
    call(log, "docker", "run", "--rm", "--label", LABEL, *volumes, tag_of("builder"), *command)


# ── Programs ─────────────────────────────────────────────────────────────────────────────────────


def go_key(module: str) -> str:
    """Digest of a Go module's pins and build flags."""
    return digest(LAB / "go" / module, json.dumps(GO_PROGRAMS[module]))


def go_binaries(module: str) -> list[Path]:
    """Where the programs of a Go module lie once built."""
    return [CACHE / "bin" / module / Path(program).name for program in GO_PROGRAMS[module][1]]


def build_go(module: str) -> Callable[[TextIO], str]:
    """A step that builds the programs of a Go module, pinned by its go.sum."""

    def build(log: TextIO) -> str:
        out = CACHE / "bin" / module
        if is_current(out, go_key(module)):
            return "reused"
        tags, programs = GO_PROGRAMS[module]
        remade(out)
        in_builder(
            log,
            {
                LAB / "go" / module: "/src:ro",
                CACHE / "go": "/root/go",
                CACHE / "go-build": "/root/.cache/go-build",
                out: "/out",
            },
            "sh",
            "-euc",
            'cd /src; CGO_ENABLED=0 go build -mod=readonly -trimpath -tags "$1" -ldflags "-s -w" -o /out/ $2',
            "sh",
            tags,
            " ".join(programs),
        )
        (out / ".key").write_text(go_key(module))
        return "built"

    return build


# ── vLLM and the model ───────────────────────────────────────────────────────────────────────────

# Three image layers of similar size: unpacked side by side, they take the host half the time of one.
SITE = "opt/venv/lib/python3.13/site-packages"
VLLM_LAYERS = {
    "torch": [f"{SITE}/torch"],
    "vllm": [
        f"{SITE}/{name}" for name in "vllm transformers sympy openai mistral_common numpy numpy.libs".split()
    ],
}
VLLM_REFERENCE = "vllm/vllm-openai-cpu:v0.32.0"


def vllm_key() -> str:
    """Digest of what the stand-in of vLLM is made from."""
    return digest(LAB / "vllm", key_of("vllm"), json.dumps(VLLM_LAYERS))


def build_vllm(log: TextIO) -> str:
    """Install vLLM into .cache/lab/vllm/venv and pack it as layers of an image."""
    out = CACHE / "vllm"
    if is_current(out, vllm_key()):
        return "reused"
    remade(out)
    rest = "".join(f" --exclude={path}" for paths in VLLM_LAYERS.values() for path in paths)
    pack = [
        f"tar -C / -c {' '.join(paths)} | zstd -q -1 -T2 -o /out/{name}.tar.zst"
        for name, paths in VLLM_LAYERS.items()
    ]
    in_builder(
        log,
        {LAB / "vllm": "/src:ro", CACHE / "uv": "/root/.cache/uv", out: "/out", out / "venv": "/opt/venv"},
        "bash",
        "-euo",
        "pipefail",
        "-c",
        "; ".join(
            [
                "/src/build.sh /opt/venv",
                *pack,
                f"tar -C / -c{rest} opt/venv | zstd -q -1 -T2 -o /out/rest.tar.zst",
            ]
        ),
    )
    (out / ".key").write_text(vllm_key())
    return "built"


def push_vllm(log: TextIO) -> str:
    """Append the layers to the stand-in's Debian and put both into the registry."""
    mark = push_key("vllm")
    if mark.is_file() and mark.read_text() == vllm_key():
        return "reused"
    archive = CACHE / "context" / "vllm.tar"
    call(log, "docker", "save", "-o", archive, tag_of("vllm"))
    call(log, crane(), "push", "--insecure", archive, f"{REGISTRY}:5000/{VLLM_REFERENCE}-base")
    archive.unlink()
    layers = [word for name in (*VLLM_LAYERS, "rest") for word in ("-f", CACHE / "vllm" / f"{name}.tar.zst")]
    call(
        log,
        crane(),
        "append",
        "--insecure",
        "-b",
        f"{REGISTRY}:5000/{VLLM_REFERENCE}-base",
        "-t",
        f"{REGISTRY}:5000/{VLLM_REFERENCE}",
        *layers,
    )
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(vllm_key())
    return "pushed"


def train(log: TextIO) -> str:
    """Train the tiny model and its adapters with the stand-in's own torch."""
    out = CACHE / "model"
    key = digest(LAB / "model", vllm_key())
    if is_current(out, key):
        return "reused"
    remade(out)
    in_builder(
        log,
        {LAB / "model": "/src:ro", CACHE / "vllm" / "venv": "/opt/venv:ro", out: "/out"},
        "/opt/venv/bin/python",
        "/src/train.py",
        "/out",
    )
    (out / ".key").write_text(key)
    return "trained"


# ── The registry's content: stand-ins under the real names ───────────────────────────────────────


def push_key(name: str) -> Path:
    """Where the key of the pushed image ``name`` is kept: beside the registry's data."""
    return CACHE / "registry" / "keys" / name


def push(image: str, reference: str) -> Callable[[TextIO], str]:
    """A step that puts a built image into the registry as ``reference``."""

    def work(log: TextIO) -> str:
        mark = push_key(image)
        if mark.is_file() and mark.read_text() == key_of(image) + reference:
            return "reused"
        archive = CACHE / "context" / f"{image}.tar"
        call(log, "docker", "save", "-o", archive, tag_of(image))
        call(log, crane(), "push", "--insecure", archive, f"{REGISTRY}:5000/{reference}")
        archive.unlink()
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(key_of(image) + reference)
        return "pushed"

    return work


def crane() -> Path:
    """The program that writes images into a registry."""
    return CACHE / "bin" / "crane" / "crane"


# ── Containers ───────────────────────────────────────────────────────────────────────────────────


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
    for name, subnet in NETWORKS.items():
        if name not in made:
            call(log, "docker", "network", "create", "--label", LABEL, "--subnet", subnet, name)
    return "ready"


def ssh_keys(log: TextIO) -> str:
    """One key for the operator, one read-only deploy key, and host keys that known_hosts names."""
    folder = CACHE / "ssh"
    if is_current(folder, "1"):
        return "reused"
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
    """Write down the commit that the hub serves: the inventory pins it."""
    revision = ""

    def ask() -> bool:
        nonlocal revision
        try:
            with urllib.request.urlopen(f"http://{HUB}:8080/api/models/{MODEL}", timeout=5) as answer:
                revision = json.load(answer)["sha"]
        except OSError:
            return False
        return True

    wait_until("the hub", ask, log)
    (CACHE / "hub" / "revision").write_text(revision)
    return f"serves commit {revision[:12]}"


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


def host_ready(log: TextIO) -> str:
    """Wait until the bare host has booted and lets the operator in by SSH."""
    folder = CACHE / "ssh"
    if not docker("exec", "lab-host", "ls", "/root/.ssh/authorized_keys"):
        call(log, "docker", "cp", folder / "host_key", "lab-host:/etc/ssh/ssh_host_ed25519_key")
        call(
            log,
            "docker",
            "exec",
            "lab-host",
            "sh",
            "-ec",
            "chown root: /etc/ssh/ssh_host_ed25519_key; mkdir -p -m 700 /root/.ssh",
        )
        call(log, "docker", "cp", folder / "id_ed25519.pub", "lab-host:/root/.ssh/authorized_keys")
        call(
            log,
            "docker",
            "exec",
            "lab-host",
            "sh",
            "-ec",
            "chown root: /root/.ssh/authorized_keys; systemctl restart ssh --no-block",
        )
    wait_until(
        "the bare host's SSH",
        lambda: (
            subprocess.run(
                [
                    "ssh",
                    "-i",
                    folder / "id_ed25519",
                    "-o",
                    f"UserKnownHostsFile={folder / 'known_hosts'}",
                    "-o",
                    "ConnectTimeout=2",
                    "-o",
                    "BatchMode=yes",
                    f"root@{HOST}",
                    "true",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                check=False,
            ).returncode
            == 0
        ),
        log,
    )
    return "answers"


# ── The commands ─────────────────────────────────────────────────────────────────────────────────


def plan() -> list[Step]:
    """Every step of the lab and what it needs; what is on the longest way stands first."""
    ssh = CACHE / "ssh"
    go = {name: go_binaries(name) for name in GO_PROGRAMS}
    return [
        Step("engine", engine),
        Step("controller", controller),
        Step("base", base, ["engine"]),
        Step("builder", build_image("builder", lambda: [UV]), ["base", "controller"]),
        Step("vllm", build_vllm, ["builder"]),
        Step("go-crane", build_go("crane"), ["builder"]),
        Step("go-tailscale", build_go("tailscale"), ["builder"]),
        Step("go-headscale", build_go("headscale"), ["builder"]),
        Step("model", train, ["vllm"]),
        Step("image-services", build_image("services"), ["base"]),
        Step("image-vllm", build_image("vllm"), ["base"]),
        Step("image-haproxy", build_image("haproxy"), ["base"]),
        Step("image-host", build_image("host"), ["base"]),
        Step(
            "image-tailscale",
            build_image("tailscale", lambda: [*go["tailscale"], LAB / "images" / "apk"]),
            ["go-tailscale"],
        ),
        Step("image-laptop", build_image("laptop", lambda: [go["tailscale"][0], UV]), ["go-tailscale"]),
        Step("image-headscale", build_image("headscale", lambda: go["headscale"]), ["go-headscale"]),
        Step("networks", networks, ["engine"]),
        Step("ssh-keys", ssh_keys),
        Step("snapshot", snapshot),
        Step(
            "registry",
            container(
                "lab-registry",
                "services",
                ["-v", f"{CACHE}/registry/data:/var/lib/registry", "-v", f"{LAB}/registry:/etc/registry:ro"],
                ["docker-registry", "serve", "/etc/registry/config.yml"],
                network="lab-internet",
                ip=REGISTRY,
            ),
            ["networks", "image-services"],
        ),
        Step("push-vllm", push_vllm, ["registry", "go-crane", "image-vllm", "vllm"]),
        Step(
            "push-tailscale",
            push("tailscale", "tailscale/tailscale:v1.102.3"),
            ["registry", "go-crane", "image-tailscale"],
        ),
        Step(
            "push-haproxy",
            push("haproxy", "library/haproxy:3.0.11"),
            ["registry", "go-crane", "image-haproxy"],
        ),
        Step(
            "forge",
            container(
                "lab-forge",
                "services",
                ["-v", f"{ssh}:/ssh:ro", "-v", f"{CACHE}/forge:/srv/git:ro"],
                ["sh", "-c", forge_command()],
                CACHE / "ssh" / ".key",
                network="lab-internet",
                ip=FORGE,
            ),
            ["networks", "image-services", "ssh-keys", "snapshot"],
        ),
        Step("hub-token", hub_token),
        Step(
            "hub",
            container(
                "lab-hub",
                "services",
                [
                    "-v",
                    f"{CACHE}/model:/model:ro",
                    "-v",
                    f"{CACHE}/hub:/secret:ro",
                    "-v",
                    f"{LAB}/hub:/src:ro",
                ],
                [
                    "sh",
                    "-c",
                    f"mkdir -p /hub/{MODEL} && rmdir /hub/{MODEL} && ln -s /model/base /hub/{MODEL} && "
                    "exec python3 -u /src/hub.py /hub /secret/token 8080",
                ],
                LAB / "hub",
                network="lab-internet",
                ip=HUB,
            ),
            ["networks", "image-services", "hub-token", "model"],
        ),
        Step("hub-ready", hub_ready, ["hub"]),
        Step(
            "headscale",
            container(
                "lab-headscale",
                "headscale",
                ["-v", f"{LAB}/headscale:/etc/headscale:ro", "-v", "/var/lib/headscale"],
                ["headscale", "serve"],
                LAB / "headscale",
                network="lab-internet",
                ip=HEADSCALE,
            ),
            ["networks", "image-headscale"],
        ),
        Step("headscale-ready", headscale_ready, ["headscale"]),
        Step(
            "laptop",
            container(
                "lab-laptop",
                "laptop",
                [
                    "--cap-add=NET_ADMIN",
                    "--device=/dev/net/tun",
                    "-e",
                    "TS_DEBUG_USE_DERP_HTTP=1",
                    "-v",
                    f"{ROOT}:/home/checkout:ro",
                ],
                ["tailscaled", "--state=/var/lib/tailscaled.state"],
                network="lab-home",
            ),
            ["networks", "image-laptop", "headscale-ready"],
        ),
        Step("laptop-joins", laptop_joins, ["laptop"]),
        Step(
            "host",
            container("lab-host", "host", host_options(), network="lab-internet", ip=HOST),
            ["networks", "image-host", "ssh-keys"],
        ),
        Step("host-ready", host_ready, ["host"]),
    ]


def up() -> None:
    """Build what is missing and start what does not run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    run(plan(), LOGS, workers=4)
    say("the lab is up")


def play(*words: str) -> list[str]:
    """Run a playbook on the lab; return the lines in which a model answered.

    Raises:
        StepError: it failed; the message ends with the log's end and path.
    """
    said: list[str] = []
    task = "starts"

    def run_playbook(log: TextIO) -> str:
        nonlocal task
        process = subprocess.Popen(
            [ROOT / ".venv" / "bin" / "ansible-playbook", *words],
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout
        for line in process.stdout:
            print(line, end="", file=log, flush=True)
            if line.startswith("TASK ["):
                task = line[6 : line.index("]")]
        if process.wait():
            raise StepError(f"ansible-playbook {' '.join(words)} ended with status {process.returncode}")
        return "done"

    name = words[0].removesuffix(".yml")
    run([Step(name, run_playbook, detail=lambda: task)], LOGS, workers=1)
    text = " ".join((LOGS / f"{name}.log").read_text().split())
    said += re.findall(r"'(SUCCESS: .*?)'(?= *(?:- '|$|PLAY RECAP|,))", text)
    return said


def demo() -> None:
    """The lab, site.yml on its bare host, an adapter, and what to try next."""
    up()
    answers = play("site.yml") + play("load_adapter.yml", "-e", "name=lint")
    print("", *answers, sep="\n")
    print(NEXT)


NEXT = """
Try next, from here:
  . .venv/bin/activate
  ansible-playbook site.yml --check --diff           # what would change: nothing
  ansible-playbook load_adapter.yml -e name=docstring
  ansible-playbook update.yml
and from the laptop on the tailnet (make shell):
  curl http://function-gemma-server:8000/v1/models
  uv run /home/checkout/server/test_connection.py model=docstring
  ssh root@function-gemma-server ./update.sh
`make down` removes it all again."""


def down() -> None:
    """Remove every container, network, volume and process of the lab; images and the cache stay."""
    if docker("info", "--format", "{{.ServerVersion}}"):
        for kind, remove in (
            ("container", ["rm", "-f", "-v"]),
            ("network", ["network", "rm"]),
            ("volume", ["volume", "rm"]),
        ):
            listed = docker(
                kind, "ls", *(["-a"] if kind == "container" else []), "-q", "--filter", f"label={LABEL}"
            ).split()
            if listed:
                subprocess.run(["docker", *remove, *listed], check=True, stdout=subprocess.DEVNULL)
                say(f"removed {len(listed)} {kind}{'s' if len(listed) > 1 else ''}")
    pid = CACHE / "dockerd.pid"
    if pid.exists():
        stop(int(pid.read_text()))
        pid.unlink()
        say("stopped the Docker engine that the lab had started")


def stop(pid: int) -> None:
    """End the engine with this pid and wait for it, if it still is one."""
    command = Path(f"/proc/{pid}/cmdline")
    if not command.exists() or "dockerd" not in command.read_text():
        return
    subprocess.run([*sudo(), "kill", f"-{signal.SIGTERM.value}", str(pid)], check=True)
    while command.exists() and command.read_text():
        time.sleep(0.2)


def clean() -> None:
    """All of ``down``, then the images and the git-ignored cache."""
    images = docker("image", "ls", "-q", "--filter", f"label={LABEL}").split()
    images += docker("image", "ls", "-q", f"{LABEL}/*").split()
    if images:
        subprocess.run(["docker", "rmi", "-f", *dict.fromkeys(images)], check=True, stdout=subprocess.DEVNULL)
    down()
    subprocess.run([*sudo(), "rm", "-rf", str(ROOT / ".cache"), str(ROOT / ".venv")], check=True)
    say("removed .cache, .venv and the lab's images")


if __name__ == "__main__":
    try:
        {"up": up, "demo": demo, "down": down, "clean": clean}[sys.argv[1]]()
    except StepError as error:
        fail(error)
