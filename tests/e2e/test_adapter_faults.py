"""Adapters over restarts, kills and rot: the same digests are served, or what is wrong is set apart."""

import json
import random
from collections.abc import Iterator

import pytest

import common as lab
from function_gemma.adapters.files import FILES
from function_gemma.adapters.store import digest_of
from stack import ANSWERS, BASE, CHECKOUT, PROMPT, URL, answers, ask, host, laptop, playbook, until

MANAGER = "docker exec vllm-gemma adapter_manager.py"
DIGESTS = {name: digest_of(lab.CACHE / "model" / name) for name in ("lint", "docstring")}
VOLUMES = "/var/lib/docker/volumes"
STORE = f"{VOLUMES}/function-gemma-server_models-adapters/_data"
SEED = 4

# Runs on the host. In each round: begin a load, kill -9 at a random moment, see what is served, load again.
KILLS = """
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

seed, rounds, victim, digests = json.loads(sys.argv[1])
chance = random.Random(seed)
manager = ["docker", "exec", "vllm-gemma", "adapter_manager.py"]

def run(*words):
    for _ in range(3):
        done = subprocess.run([*manager, *words], capture_output=True, text=True, timeout=120)
        if done.returncode != 126:  # the engine started nothing, see inside() in server/standby.sh
            break
    return done

def processes():
    if victim == "vllm":
        pid = ["docker", "inspect", "-f", "{{.State.Pid}}", "vllm-gemma"]
        init = subprocess.check_output(pid, text=True).strip()
        return [int(one) for one in Path(f"/proc/{init}/task/{init}/children").read_text().split()]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().replace(b"\\0", b" ").find(b"adapter_manager.py load victim") >= 0:
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found

def served():
    listed = run("list", "--json")
    assert listed.returncode == 0 and listed.stdout, listed
    return {one["name"]: one["digest"] for one in json.loads(listed.stdout)["adapters"]}.get("victim")

def serves():
    # From the inside, because Docker's own word is seconds late.
    return run("list").returncode == 0

def load(name):
    return "load", "victim", f"/models/adapters/{name}/{digests[name]}"

names = sorted(digests)
took = []
for name in names * 2:
    start = time.monotonic()
    assert run(*load(name)).returncode == 0
    took.append(time.monotonic() - start)
for number in range(rounds):
    name, before = names[number % 2], served()
    at = chance.uniform(0, max(took))
    nowhere = subprocess.DEVNULL
    with subprocess.Popen([*manager, *load(name)], stdout=nowhere, stderr=nowhere):
        time.sleep(at)
        for process in processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
    end = time.monotonic() + 120
    while not serves() and time.monotonic() < end:
        time.sleep(0.2)
    now = served()
    assert now in (before, digests[name]), (number, at, now)
    again = run(*load(name))
    assert again.returncode == 0, (number, at, again.stderr)
    assert served() == digests[name], (number, at)
    print(f"{victim} killed after {at:.2f} s: {'the former' if now == before else 'the new one'} was served, "
          "one more run completed it", flush=True)
"""


@pytest.fixture
def victim() -> Iterator[None]:
    """An adapter of the test's own is gone when it ends."""
    yield
    host(f"{MANAGER} unload victim", ok=None)
    host(f"{MANAGER} prune --keep 0")


@pytest.mark.usefixtures("victim")
@pytest.mark.parametrize(("killed", "rounds"), [("manager", 17), ("vllm", 3)])
def test_a_kill_at_random_points_of_a_load_is_completed_by_one_more_run(killed: str, rounds: int) -> None:
    arguments = json.dumps([random.Random(f"{SEED} {killed}").random(), rounds, killed, DIGESTS])  # noqa: S311 - no secret
    host("cat >/run/kills.py", stdin=KILLS)
    run = host(f"python3 /run/kills.py '{arguments}'", seconds=600)
    print(run.stdout)
    assert run.stdout.count("one more run completed it") == rounds
    answers()


def served() -> dict[str, str]:
    adapters = json.loads(host(f"{MANAGER} list --json").stdout)["adapters"]
    return {one["name"]: one["digest"] for one in adapters}


@pytest.mark.parametrize(
    "command",
    [
        "docker restart vllm-gemma",
        "systemctl restart docker",
        f"cd {CHECKOUT}/server && docker compose down && docker compose up -d",
    ],
)
def test_the_same_digests_are_served_after(command: str) -> None:
    assert served() == DIGESTS
    host(command, seconds=300)
    until("vLLM answers again", lambda: host(f"{MANAGER} list", ok=None).code == 0, 240)
    assert served() == DIGESTS
    until("the gateway answers again", lambda: laptop(f"curl -sS {URL}/health", ok=None).last == "ok")
    answers()


def test_a_rotten_adapter_is_quarantined_with_its_reason_while_the_rest_is_served() -> None:
    weights = f"{STORE}/lint/{DIGESTS['lint']}/{FILES[1]}"
    host(f"chmod u+w {weights} && truncate --size=-1 {weights} && docker restart vllm-gemma", seconds=120)
    assert ask("docstring") == ANSWERS[PROMPT]["docstring"]  # the gateway lets it wait
    assert ask(BASE) == ANSWERS[PROMPT]["base"]
    listed = json.loads(host(f"{MANAGER} list --json").stdout)
    assert [one["name"] for one in listed["adapters"]] == ["docstring"]
    (one,) = listed["quarantined"]
    assert (one["name"], one["digest"]) == ("lint", DIGESTS["lint"])
    assert FILES[1] in one["reason"]
    metrics = laptop(f"curl -sS {URL}/metrics").stdout
    assert f'function_gemma_quarantined{{adapter="lint",digest="{DIGESTS["lint"]}",reason="' in metrics
    run = playbook("site.yml", "--tags", "lora")
    assert "lint: " in run.words
    assert "quarantined" in run.words
    answers()
    assert json.loads(host(f"{MANAGER} list --json").stdout)["quarantined"] == []


@pytest.fixture
def gated() -> Iterator[None]:
    """A subagent with a gate, in the folder that the host's checkout has of them."""
    folder = f"{CHECKOUT}/agents/gated"
    files = sorted((lab.LAB / "model" / "agent" / "gated").iterdir())
    host(f"mkdir {folder}")
    for file in files:
        host(f"cat >{folder}/{file.name}", stdin=file.read_text())
    yield
    host(f"rm -r {folder}")
    host(f"{MANAGER} unload gated", ok=None)


@pytest.mark.usefixtures("gated")
def test_an_adapter_that_fails_its_gate_does_not_take_over() -> None:
    load = f"{MANAGER} load gated /models/adapters"
    passed = json.loads(host(f"{load}/lint/{DIGESTS['lint']} --json").stdout)
    assert passed["gate"] == {"passed": 4, "of": 4, "share": 0.75}
    failed = host(f"{load}/docstring/{DIGESTS['docstring']}", ok=False)
    assert failed.code == 5
    assert "of its gate's 4 prompts as expected, and the share is 0.75" in failed.words
    assert ask("gated") == ANSWERS[PROMPT]["lint"]


def test_what_the_manager_says_over_ssh_is_what_it_says_on_the_host() -> None:
    over = laptop("ssh root@function-gemma-server ./adapter_manager.py history --json")
    assert json.loads(over.stdout) == json.loads(host(f"{MANAGER} history --json").stdout)
    refused = laptop("ssh root@function-gemma-server ./adapter_manager.py rollback nobody", ok=None)
    assert refused.code == 4
    assert "'nobody' was never served" in refused.words
