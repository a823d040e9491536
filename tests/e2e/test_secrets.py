"""The secrets that the stack was deployed with are found where they belong, and nowhere else.

The lab made each at random, and it went the whole way: through the inventory and site.yml to the host, and
from there to the control plane, the model hub and the forge.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from shlex import quote

import pytest

import common as lab
from stack import CHECKOUT, host, playbook, server, ssh

FILES = ("headscale/authkey", "hub/token", "ssh/deploy_key")
PLACED = "secrets/tailscale/authkey secrets/huggingface/token secrets/git/deploy_key"
# Prints each set of arguments and variables that a process had until the input ended.
WATCH = """
import pathlib, select, sys
seen = set()
while not select.select([sys.stdin], [], [], 0.05)[0]:
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                seen.add((process / name).read_bytes())
            except OSError:  # it has ended, or is another user's
                pass
sys.stdout.buffer.write(b"\\n".join(seen))
"""
# The folders of the topmost layers, as many as the Dockerfile makes: the base images lie below.
LAYERS = f"""
for name in vllm-gemma:Dockerfile tailscale-vllm:Dockerfile.tailscale; do
    docker image inspect -f '{{{{.GraphDriver.Data.UpperDir}}}}:{{{{.GraphDriver.Data.LowerDir}}}}' \\
        $(docker inspect -f '{{{{.Image}}}}' ${{name%:*}}) | tr : '\\n' |
        head -n $(grep -cE '^(COPY|RUN|WORKDIR)' {CHECKOUT}/server/${{name#*:}})
done"""
PLACES = {
    "what Docker says": "docker inspect $(docker ps -aq; docker image ls -q; docker volume ls -q)",
    "how the images were made": "docker image ls -q | xargs -n 1 docker history --no-trunc",
    "what the containers said": "for one in $(docker ps -aq); do docker logs $one 2>&1; done",
    "the journal": "journalctl --output json --all",
    "arguments and environments": "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ || :",  # some end meanwhile
    "what update.sh said": f"cat {CHECKOUT}/server/.update.log",
    "the settings": f"cat {CHECKOUT}/server/.env {CHECKOUT}/server/*.env {CHECKOUT}/.git/config",
}
FOLDERS = f"/tmp /var/tmp /dev/shm /run/lock /root /var/log /etc /home {CHECKOUT}"  # noqa: S108 - searched
PLANTED = "/tmp/e2e-planted"  # noqa: S108 - of a host that is the tests' own


def parts() -> set[str]:
    """The lines of the secrets, without a key's frame and without the line that begins every key alike."""
    lines: set[str] = set()
    for name in FILES:
        text = (lab.CACHE / name).read_text().splitlines()
        body = [line for line in text if line and not line.startswith("-----")]
        lines |= set(body[1:] or body)
    return lines


PARTS = parts()


def found(command: str) -> set[str]:
    """The parts of secrets in what a shell command on the host prints; no argument tells them there."""
    search = f"exec 3<&0; {{ {command}\n}} </dev/null | grep --text -Fo -f /dev/fd/3"
    status = "exit $((10 * PIPESTATUS[0] + PIPESTATUS[1]))"
    done = host(f"bash -c {quote(f'{search}; {status}')}", stdin="\n".join(PARTS), ok=None)
    assert done.code in (0, 1), str(done)
    return set(done.stdout.split())


def test_the_search_finds_each_part_of_a_secret_where_it_belongs() -> None:
    assert len(PARTS) > len(FILES)
    assert found(f"cd {CHECKOUT}/server && cat {PLACED}") == PARTS


@pytest.mark.parametrize("place", PLACES)
def test_no_secret_is_in(place: str) -> None:
    assert found(PLACES[place]) == set()


def test_no_secret_is_in_a_file_of_the_host_or_a_containers_tmp() -> None:
    pids = "docker inspect -f '{{.State.Pid}}' $(docker ps -q)"
    tmp = f"$({pids} | sed 's|.*|/proc/&/root/tmp|')"
    host(f"cat >{PLANTED}", stdin=min(PARTS))
    try:
        search = f"grep -rlsF -f - --exclude-dir=secrets {FOLDERS} {tmp}"
        files = host(search, stdin="\n".join(PARTS), ok=None).stdout.split()
    finally:
        host(f"rm {PLANTED}")
    assert files == [PLANTED]


def test_no_secret_is_in_a_layer_of_the_images() -> None:
    assert "/update.sh" in host(f"find $({LAYERS}) -name update.sh").stdout
    done = host(f"grep -rlsF -f - $({LAYERS})", stdin="\n".join(PARTS), ok=None)
    assert (done.code, done.stdout) == (1, "")


@contextmanager
def watched(words: list[str]) -> Iterator[list[str]]:
    """Run WATCH meanwhile; afterwards the list has what it saw."""
    seen: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, errors="replace") as process:
        yield seen
        seen.append(process.communicate()[0])
        assert process.returncode == 0


@pytest.mark.usefixtures("settings")
def test_a_run_that_places_the_secrets_shows_them_to_nobody() -> None:
    server("rm secrets/huggingface/token secrets/git/deploy_key")  # another key would restart the sidecar
    with ExitStack() as watch:
        seen = [
            watch.enter_context(watched(words))
            for words in ([sys.executable, "-c", WATCH], ssh(f"python3 -c {quote(WATCH)}"))
        ]
        run = playbook("site.yml", "-vvv", "--diff", "--tags", "checkout,server")
    assert found(f"cd {CHECKOUT}/server && cat {PLACED}") == PARTS
    controller, inference = ("".join(one) for one in seen)
    assert "site.yml" in controller
    assert "update.sh" in inference
    assert found(PLACES["the journal"]) == set()
    texts = {"-vvv": run.stdout + run.stderr, "controller": controller, "host": inference}
    assert [where for where, text in texts.items() if any(part in text for part in PARTS)] == []
