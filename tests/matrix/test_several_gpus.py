"""The lab's host with two stand-in GPUs: a real vLLM for each, one gateway, one store, and back to none.

The tests build on each other, for a start of vLLM costs a minute.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import common as lab
from function_gemma.adapters.store import digest_of
from stack import (
    ANSWERS,
    BASE,
    PROMPT,
    ROOT,
    URL,
    answers,
    ask,
    changes,
    containers,
    host,
    inspect,
    lab_up,
    laptop,
    playbook,
    replaced,
    started,
    until,
)

GPU = ROOT / "tests" / "molecule" / "shared" / "gpu"
VLLMS = ("vllm-gemma", "vllm-gemma-1")
DIGESTS = {name: digest_of(lab.CACHE / "model" / name) for name in ("lint", "docstring")}
MANAGER = "docker exec vllm-gemma adapter_manager.py"
CLIENTS = 4
STOP = "/run/clients-stop"

# Runs in a vLLM's container: what each socket serves.
ASK_EACH = """
import json, sys
sys.path.insert(0, "/usr/local/bin")
import adapter_manager as manager
print(json.dumps({
    one: {a["name"]: a["digest"] for a in manager.call("GET", "/v1/lora_adapters", address=one)["adapters"]}
    for one in manager.sockets()
}))
"""

# Runs on the laptop until the file appears: each client asks on and on; says when each has had an answer.
ASK_ON = f"""
import http.client, json, os, sys, threading, time
asked = []
model, prompt, stop = sys.argv[1:]
body = json.dumps({{"model": model, "temperature": 0, "messages": [{{"role": "user", "content": prompt}}]}})
first = threading.Barrier({CLIENTS} + 1)

def client():
    waits = True
    while not os.path.exists(stop):
        begun = time.time()
        try:
            connection = http.client.HTTPConnection("function-gemma-server", 8000, timeout=150)
            connection.request("POST", "/v1/chat/completions", body, {{"Content-Type": "application/json"}})
            answer = connection.getresponse()
            text = answer.read().decode()
            said = json.loads(text)["choices"][0]["message"]["content"] if answer.status == 200 else text
            asked.append([begun, answer.status, answer.getheader("x-served-by") or "", said])
            connection.close()
        except Exception as error:
            asked.append([begun, 0, "", repr(error)])
        if waits:
            waits = False
            first.wait()

clients = [threading.Thread(target=client) for _ in range({CLIENTS})]
for one in clients:
    one.start()
first.wait()
print("all clients are answered", flush=True)
for one in clients:
    one.join()
print(json.dumps(asked))
"""


def gpus(**settings: str) -> tuple[str, ...]:
    """Words of a playbook for a host with GPUs, with drivers and toolkit from the lab's repositories."""
    prints = json.loads((lab.CACHE / "apt" / "fingerprints.json").read_text())
    lent = {
        "nvidia_driver": "install",
        "nvidia_driver_repository": f"http://{lab.APT}/cuda",
        "nvidia_driver_key_fingerprint": prints["cuda"],
        "nvidia_repository": f"http://{lab.APT}/nvidia/libnvidia-container/stable/deb",
        "nvidia_key_fingerprint": prints["nvidia"],
        "vllm_image": "vllm/vllm-openai-cpu:v0.32.0",  # a stand-in of a GPU computes nothing
    }
    return ("-e", json.dumps({**lent, **settings}))


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    """A host with two GPUs on its bus and site.yml's work on it; afterwards the lab's host as it was."""
    lab_up()
    playbook("site.yml", seconds=900)
    host("sh -s 2", stdin=(GPU / "bus.sh").read_text())
    try:
        run = playbook("site.yml", *gpus(), seconds=1200)
        assert "SUCCESS: " in run.words
        yield
    finally:
        playbook("site.yml", *gpus(server_accelerator="cpu"), seconds=900)
        playbook("site.yml", "--tags", "nvidia", *gpus(nvidia_state="absent"), seconds=600)
        host("umount /sys/bus/pci/devices && rm -f /dev/nvidia[0-9]*")
        playbook("site.yml", seconds=900)
        answers()


def each(container: str = VLLMS[0]) -> dict[str, dict[str, str]]:
    """Names and digests that each vLLM serves, by its socket, as asked from within a container."""
    asked = host(f"docker exec -i {container} python3 -", stdin=ASK_EACH, ok=None)
    found: dict[str, dict[str, str]] = json.loads(asked.stdout) if asked.code == 0 else {}
    return found


def both_serve(adapters: dict[str, str]) -> bool:
    """Whether there are two vLLMs that serve these."""
    return list(each().values()) == [adapters] * 2


def counted() -> list[float]:
    """How many requests each vLLM counts."""
    pages = [laptop(f"curl -sS --fail {URL}{path}").stdout for path in ("/metrics", "/metrics/1")]
    lines = [re.findall(r"^function_gemma_requests_total\{.*\} (\S+)$", page, re.MULTILINE) for page in pages]
    return [sum(map(float, one)) for one in lines]


@dataclass
class Asked:
    """What clients were answered: when each began (seconds since 1970), status, maker and text."""

    answers: list[tuple[float, int, str, str]] = field(default_factory=list)

    def failures(self, *, begun_after: float = 0) -> list[tuple[float, int, str, str]]:
        """Those that were not answered with 200."""
        return [one for one in self.answers if one[1] != 200 and one[0] > begun_after]


@contextmanager
def clients(model: str, output: Path) -> Iterator[Asked]:
    """Four clients on the laptop that ask a model while the body runs; afterwards what they were answered."""
    asked = Asked()
    laptop(f"rm -f {STOP}")
    words = ["docker", "exec", "lab-laptop", "python3", "-c", ASK_ON, model, PROMPT, STOP]
    with started(words, output) as process:
        until("all clients are answered", lambda: "all clients are answered" in output.read_text())
        try:
            yield asked
        finally:
            laptop(f"touch {STOP}")
        assert process.wait(200) == 0, output.read_text()
    asked.answers += map(tuple, json.loads(output.read_text().splitlines()[-1]))


def kill(container: str) -> float:
    """End a container's vLLM; return a time at which it was dead."""
    init = host(f"docker inspect -f '{{{{.State.Pid}}}}' {container}").last  # Docker's, whose child is vLLM
    return float(host(f"kill -9 $(cat /proc/{init}/task/{init}/children) && date +%s.%N").last)


def test_each_gpu_has_a_vllm_of_its_own_and_a_second_site_changes_nothing() -> None:
    seen = inspect("function-gemma-server")
    assert {name for name in seen if name.startswith("vllm-")} == set(VLLMS)
    for number, name in enumerate(VLLMS):
        assert seen[name]["State"]["Health"]["Status"] == "healthy"
        devices = host(f"docker exec {name} sh -c 'ls /dev | grep nvidia'").stdout.split()
        assert devices == [f"nvidia{number}"]
    before = containers()
    run = playbook("site.yml", *gpus(), seconds=900)
    assert changes(run) == 0, str(run)
    assert not replaced(before)


def test_both_answer_through_the_gateway_and_each_counts_its_own() -> None:
    assert both_serve(DIGESTS)
    before = counted()
    said = Counter(ask("lint") for _ in range(6))
    assert said == {ANSWERS[PROMPT]["lint"]: 6}
    grown = [now - then for now, then in zip(counted(), before, strict=True)]
    assert sum(grown) == 6
    assert min(grown) > 0


def test_a_load_an_unload_and_a_rollback_reach_both() -> None:
    loaded = json.loads(host(f"{MANAGER} load fresh /models/adapters/lint/{DIGESTS['lint']} --json").stdout)
    assert loaded["changed"]
    assert both_serve({**DIGESTS, "fresh": DIGESTS["lint"]})
    assert {ask("fresh") for _ in range(4)} == {ANSWERS[PROMPT]["lint"]}
    host(f"{MANAGER} unload fresh")
    assert both_serve(DIGESTS)
    host(f"{MANAGER} rollback fresh")
    assert both_serve({**DIGESTS, "fresh": DIGESTS["lint"]})
    assert json.loads(host(f"{MANAGER} list --json").stdout)["differs"] == []
    host(f"{MANAGER} unload fresh")


def test_replacing_an_adapter_under_four_clients_fails_nobody_and_mixes_nothing(tmp_path: Path) -> None:
    names = sorted(DIGESTS)
    loads = [f"{MANAGER} load victim /models/adapters/{name}/{DIGESTS[name]}" for name in names]
    host(loads[1])
    with clients("victim", tmp_path / "asked") as asked:
        for load in loads * 3:
            host(load)
    host(f"{MANAGER} unload victim")
    assert asked.failures() == []
    content = {digest: ANSWERS[PROMPT][name] for name, digest in DIGESTS.items()}
    makers = {(maker.rpartition("@")[2], said) for _, _, maker, said in asked.answers}
    assert makers == set(content.items())


def test_a_vllm_that_is_killed_fails_no_request_that_had_not_begun_and_the_other_serves(
    tmp_path: Path,
) -> None:
    before = containers()
    load = f"docker exec {VLLMS[1]} adapter_manager.py load late /models/adapters/lint/{DIGESTS['lint']}"
    with clients("docstring", tmp_path / "asked") as asked:
        when = kill(VLLMS[0])
        # The other answers, and takes an adapter, while this one starts.
        said = [ask("lint") for _ in range(4)]
        host(load)
        assert ask("late") == ANSWERS[PROMPT]["lint"]
        meanwhile = each(VLLMS[1])
        assert laptop(f"curl -sS {URL}/health").last == "ok"
    # Without the clients, who leave a start too little of two cores.
    late = {**DIGESTS, "late": DIGESTS["lint"]}
    until("the killed one is back with what the other has", lambda: both_serve(late), 240)
    assert said == [ANSWERS[PROMPT]["lint"]] * 4
    assert list(meanwhile) == ["/run/vllm/vllm-1.sock"]
    assert asked.failures(begun_after=when) == []
    assert {said for _, status, _, said in asked.answers if status == 200} == {ANSWERS[PROMPT]["docstring"]}
    assert replaced(before) == {VLLMS[0]}
    host(f"{MANAGER} unload late")
    assert both_serve(DIGESTS)


def test_a_restart_of_both_serves_the_same_digests() -> None:
    host(f"docker restart {' '.join(VLLMS)}", seconds=300)
    until("both serve the same again", lambda: both_serve(DIGESTS), 300)
    assert ask(BASE) == ANSWERS[PROMPT]["base"]


def test_on_one_gpu_again_there_is_one_vllm_and_the_gateway_waits_for_no_other() -> None:
    run = playbook("site.yml", *gpus(server_gpus="0"), seconds=900)
    assert "SUCCESS: " in run.words
    assert VLLMS[1] not in containers()
    assert json.loads(laptop(f"curl -sS {URL}/metrics/1").stdout)["error"]["code"] == 503
    assert laptop(f"curl -sS {URL}/health").last == "ok"
    answers()
    since = host("date -u +%Y-%m-%dT%H:%M:%S.%NZ").last
    assert ask("lint") == ANSWERS[PROMPT]["lint"]
    log = host(f"docker logs --since {since} gateway-gemma")
    assert "vllm-1" not in log.stdout + log.stderr
    # The second vLLM left its socket: it is nobody's.
    assert each() == {"/run/vllm/vllm.sock": DIGESTS}
