"""From a bare host to a reply, stage by stage, beside what nothing can spare: docs/deployment.md.

Makes the lab's host anew twice: on the first one the downloads alone are timed, on the second one site.yml.
What cannot be spared is the sum of those downloads and of vLLM's own start.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from common import HUB, MODEL, REGISTRY, ROOT, docker
from images import VLLM_REFERENCE
from report import machine

TABLE = ROOT / "docs" / "deployment.md"
WANTED = 1.3  # times what cannot be spared
IMAGES = ["haproxy:3.0.11", "tailscale/tailscale:v1.102.3", VLLM_REFERENCE]
STAGES = {
    "preflight": "preflight: what can be known beforehand",
    "outbound": "outbound: proxy and CA",
    "docker": "docker: packages and settings",
    "nvidia": "nvidia: looks for a GPU",
    "checkout": "checkout: git, the repository",
    "tailscale": "tailscale: pod and sidecar up, joined; vLLM's image is pulled meanwhile",
    "server": "server: what is left of the image, model, containers, vLLM's start",
    "lora": "lora: two adapters",
    "connection_check": "connection_check: the reply",
}


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def command(*words: str | Path, **more: str) -> tuple[float, str]:
    """Seconds and output of a command that must end well.

    Raises:
        SystemExit: it did not.
    """
    start = time.monotonic()
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{' '.join(map(str, words))} ended with {done.returncode}")
    return time.monotonic() - start, done.stdout


def on_host(script: str) -> float:
    """Seconds of a script on the bare host."""
    return command("docker", "exec", "lab-host", "sh", "-euc", script)[0]


def bare_host() -> None:
    """The lab with a host on which nothing was done yet."""
    say("a bare host")
    docker("rm", "-f", "-v", "lab-host")
    command("python3", "tests/lab/lab.py", "up")


def downloads() -> dict[str, float]:
    """Seconds of each download that a bare host needs, on its own."""
    bare_host()
    variables = yaml.safe_load((ROOT / "roles/docker/vars/main.yml").read_text())
    packages = [*variables["__docker_systems"]["debian-13"]["packages"], "git", "openssh-client"]
    install = f"apt-get install -y -q --no-install-recommends {' '.join(packages)}"
    say("the downloads alone")
    took = {
        "Debian's lists, the packages of Docker and git": on_host(
            f"apt-get update -q && {install} --download-only"
        ),
    }
    mirror = f'{{"registry-mirrors": ["http://{REGISTRY}:5000"]}}'
    on_host(f"mkdir -p /etc/docker; echo '{mirror}' >/etc/docker/daemon.json; {install}")
    for image in IMAGES:
        took[f"the image {image}"] = on_host(f"docker pull -q {image}")
    # What `hf download` fetches, without Python's start. The token comes by a file, never in a command.
    header = ROOT / ".cache/lab/hub/header"
    header.touch(0o600)
    header.write_text(f"Authorization: Bearer {(ROOT / '.cache/lab/hub/token').read_text()}")
    command("docker", "cp", header, "lab-host:/root/header")
    header.unlink()
    files = " ".join(path.name for path in (ROOT / ".cache/lab/model/base").glob("[!.]*"))
    fetch = f"curl -sSf -H @/root/header -o /dev/null http://{HUB}:8080/{MODEL}/resolve/main"
    took["the model"] = on_host(f"for file in {files}; do {fetch}/$file; done")
    return took


def vllm_start() -> float:
    """Seconds of vLLM's first start, its cache empty, until it answers, with nothing else to do."""
    say("vLLM's own start")
    docker("exec", "lab-host", "docker", "exec", "vllm-gemma", "sh", "-c", "rm -rf /models/cache/*")
    docker("exec", "lab-host", "docker", "stop", "vllm-gemma")
    return on_host(
        "docker start vllm-gemma >/dev/null; "
        "until docker exec vllm-gemma healthcheck.py /run/vllm/vllm.sock /ready >/dev/null 2>&1; "
        "do sleep 0.2; done"
    )


def main() -> None:
    """Measure, print, and write the table."""
    needed = downloads()
    bare_host()
    say("site.yml")
    total, log = command(
        Path(sys.executable).with_name("ansible-playbook"),
        "site.yml",
        ANSIBLE_CALLBACKS_ENABLED="ansible.posix.profile_roles",
    )
    roles = {name: float(seconds) for name, seconds in re.findall(r"^(\w+) -+ ([\d.]+)s$", log, re.MULTILINE)}
    stages = {text: roles[name] for name, text in STAGES.items() if name in roles}
    needed["vLLM's own first start"] = vllm_start()
    floor = sum(needed.values())

    def table(title: str, rows: dict[str, float]) -> str:
        lines = "".join(f"| {name} | {seconds:.1f} |\n" for name, seconds in rows.items())
        return f"| {title} | seconds |\n|---|---:|\n{lines}\n"

    TABLE.write_text(
        "# From a bare host to a reply\n\n"
        "Written by `make bench`: the lab's bare Debian 13 host, its registry and its hub on one machine; "
        "one run.\n\n"
        f"Last written on {datetime.now(UTC):%F}: {machine()}.\n\n"
        f"`ansible-playbook site.yml` took {total:.0f} s, {total / floor:.2f} times the {floor:.0f} s "
        f"that nothing can spare; wanted: at most {WANTED}. "
        "Registry, hub and host share this machine's cores, which a pull keeps busy, so that what is done "
        "beside one saves little here.\n\n"
        + table(
            "`site.yml`, stage by stage",
            {**stages, "Ansible itself": total - sum(stages.values()), "**together**": total},
        )
        + table("what cannot be spared, each alone", {**needed, "**together**": floor}).rstrip()
        + "\n"
    )
    print(f"\n{TABLE.read_text()}")


if __name__ == "__main__":
    main()
