"""The lab: the internet in a box that the demo and the tests run in.

    python3 tests/lab/lab.py up|demo|down|clean
    python3 tests/lab/lab.py host bookworm|trixie

Every part is built from its inputs' digest: what has not changed is not built again. Docker images and
containers carry the label ``function-gemma-lab``; files lie under ``.cache/lab``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    ADAPTER,
    APT,
    CACHE,
    FORGE,
    HEADSCALE,
    HOST,
    HUB,
    LAB,
    LABEL,
    LOGS,
    MODEL,
    REGISTRY,
    ROOT,
    UV,
    docker,
    need,
    sudo,
    wait_until,
)
from images import (
    GO_PROGRAMS,
    build_apt,
    build_base,
    build_go,
    build_image,
    build_vllm,
    go_binaries,
    push,
    push_vllm,
    tag_of,
    train,
)
from machines import (
    container,
    forge_command,
    headscale_ready,
    host_options,
    host_pulls,
    host_ready,
    hub_ready,
    hub_token,
    laptop_joins,
    networks,
    snapshot,
    ssh_keys,
)
from steps import Step, StepError, call, fail, run, say

if TYPE_CHECKING:
    from collections.abc import Callable


def engine_answers() -> bool:
    """Whether a Docker engine takes commands."""
    return bool(docker("info", "--format", "{{.ServerVersion}}"))


def engine(log: TextIO) -> str:
    """Start a Docker engine where none answers, installing Debian's where there is none."""
    if engine_answers():
        return "answers"
    need("dockerd", "docker.io iptables", log)
    if Path("/run/systemd/system").is_dir():
        call(log, *sudo(), "systemctl", "start", "docker")
    elif not engine_answers():
        subprocess.run(
            [*sudo(), "rm", "-f", "/var/run/docker.pid"], check=True
        )  # of an engine that was killed
        with (LOGS / "dockerd.log").open("w") as out:
            process = subprocess.Popen(
                [*sudo(), "dockerd"], stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        (CACHE / "dockerd.pid").write_text(str(process.pid))
    wait_until("the Docker engine", engine_answers, log)
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


def plan() -> list[Step]:
    """Every step of the lab and what it needs; what is on the longest way stands first."""
    ssh = CACHE / "ssh"
    go = {name: go_binaries(name) for name in GO_PROGRAMS}
    return [
        Step("engine", engine),
        Step("controller", controller),
        Step("base", build_base(), ["engine"]),
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
                ssh / "known_hosts",
                network="lab-internet",
                ip=FORGE,
            ),
            ["networks", "image-services", "ssh-keys", "snapshot"],
        ),
        Step("apt", build_apt, ["base"]),
        Step(
            "apt-server",
            container(
                "lab-apt",
                "services",
                ["-v", f"{CACHE}/apt:/srv/apt:ro"],
                ["python3", "-m", "http.server", "80", "--directory", "/srv/apt"],
                network="lab-internet",
                ip=APT,
            ),
            ["networks", "image-services", "apt"],
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
                    f"mkdir -p /hub/{Path(MODEL).parent} && ln -sfn /model/base /hub/{MODEL} && "
                    f"mkdir -p /hub/{Path(ADAPTER).parent} && ln -sfn /model/docstring /hub/{ADAPTER} && "
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
            container(
                "lab-host", "host", host_options(), [], ssh / "known_hosts", network="lab-internet", ip=HOST
            ),
            ["networks", "image-host", "ssh-keys"],
        ),
        Step("host-pulls", host_pulls, ["host-ready", "forge"]),
        Step("host-ready", host_ready, ["host", "headscale-ready"]),
    ]


def up() -> None:
    """Build what is missing and start what does not run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    run(plan(), LOGS, workers=4)
    say("the lab is up")


def host(suite: str) -> None:
    """Have the image of a bare host with this Debian; print the words after `docker run` that boot it."""
    base, image = f"base-{suite}", f"host-{suite}"
    steps = [Step(base, build_base(suite)), Step(image, build_image("host", suite=suite), [base])]
    run(steps, LOGS, workers=1)
    words = [*host_options(), "--network", "lab-internet", "--label", LABEL, tag_of("host", suite)]
    print(json.dumps(words))


def play(*words: str) -> list[str]:
    """Run a playbook on the lab; return the lines in which a model answered.

    Raises:
        StepError: it failed; the message ends with the log's end and path.
    """
    task = "starts"

    def run_playbook(log: TextIO) -> str:
        nonlocal task
        process = subprocess.Popen(
            [ROOT / ".venv" / "bin" / "ansible-playbook", *words],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},  # an answer on one line
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
    return re.findall(r'"(SUCCESS: .*)"', (LOGS / f"{name}.log").read_text())


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


def remove() -> None:
    """Remove every container, network and volume of the lab."""
    for kind, command in (
        ("container", ["rm", "-f", "-v"]),
        ("network", ["network", "rm"]),
        ("volume", ["volume", "rm"]),
    ):
        all_of_them = ["-a"] if kind == "container" else []
        listed = docker(kind, "ls", *all_of_them, "-q", "--filter", f"label={LABEL}").split()
        if listed:
            subprocess.run(["docker", *command, *listed], check=True, stdout=subprocess.DEVNULL)
            say(f"removed {len(listed)} {kind}{'s' if len(listed) > 1 else ''}")


def stop_engine() -> None:
    """Stop the Docker engine if the lab started it."""
    pid = CACHE / "dockerd.pid"
    if pid.exists():
        stop(int(pid.read_text()))
        pid.unlink()
        # It leaves its bridge; one that was killed, also the mount of its root upon itself.
        subprocess.run([*sudo(), "ip", "link", "delete", "docker0"], check=False, stderr=subprocess.DEVNULL)
        root = ["/var/lib/docker"] * 2
        while any(
            line.split()[3:5] == root for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ):
            subprocess.run([*sudo(), "umount", root[0]], check=True)
        say("stopped the Docker engine that the lab had started")


def down() -> None:
    """Remove what the lab runs, its engine included; images and the cache stay."""
    remove()
    stop_engine()


def stop(pid: int) -> None:
    """End the engine with this pid and wait for it, if it still is one."""
    command = Path(f"/proc/{pid}/cmdline")
    if not command.exists() or "dockerd" not in command.read_text():
        return
    subprocess.run([*sudo(), "kill", f"-{signal.SIGTERM.value}", str(pid)], check=True)
    while command.exists() and command.read_text():
        time.sleep(0.2)


def clean() -> None:
    """All of ``down``, and the images and the git-ignored cache."""
    running = engine_answers()
    remove()
    if images := docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", f"{LABEL}/*").split():
        subprocess.run(["docker", "image", "rm", *images], check=True, stdout=subprocess.DEVNULL)
    stop_engine()
    subprocess.run([*sudo(), "rm", "-rf", str(ROOT / ".cache"), str(ROOT / ".venv")], check=True)
    say(
        "removed .cache, .venv"
        + (" and the lab's images" if running else "; no Docker engine runs: images stay")
    )


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (up, demo, down, clean, host)
}

if __name__ == "__main__":
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except StepError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here, `make down` removes what runs")
