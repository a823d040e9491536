"""server/doctor against a host whose answers to its commands are made up: each kind of finding once."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import doctor
from doctor import Answer, Host

SERVER = Path(doctor.__file__).parent
SCHEMA: dict[str, Any] = json.loads((SERVER / "doctor.schema.json").read_text())
BASE = "google/functiongemma-270m-it"
OLD, NEW = "a" * 12, "b" * 12
SILENT = Answer(124, "", "")


def container(name: str, image: str, *, check: bool = True) -> dict[str, Any]:
    """What `docker inspect` says of one that runs."""
    return {
        "Name": f"/{name}",
        "State": {"Status": "running"},
        "Config": {
            "Image": image,
            "Labels": {"function-gemma.config": "c1"} if name == "gateway-gemma" else {},
            **({"Healthcheck": {"Test": ["CMD", "check", name]}} if check else {}),
        },
        "HostConfig": {"DeviceRequests": None},
    }


class Fake:
    """A healthy host; `say` has a command, found by words of it, answer otherwise."""

    def __init__(self, server: Path) -> None:
        self.server = server
        self.inspected = {
            "function-gemma-pod": container("function-gemma-pod", "haproxy:3.0.11", check=False),
            "tailscale-vllm": container("tailscale-vllm", "tailscale-vllm:t1"),
            "gateway-gemma": container("gateway-gemma", "haproxy:3.0.11"),
            "vllm-gemma": container("vllm-gemma", "vllm-gemma:f1"),
            "agents-gemma": container("agents-gemma", "vllm-gemma:f1"),
        }
        self.me: dict[str, Any] = {
            "ID": "7",
            "DNSName": "function-gemma-server.tail.example.",
            "TailscaleIPs": ["100.64.0.1"],
        }
        adapter: dict[str, Any] = {
            "name": "lint",
            "serves": OLD,
            "source": None,
            "quarantined": None,
            "generations": [],
        }
        self.history: dict[str, Any] = {"adapters": [adapter]}
        self.listed: dict[str, Any] = {
            "adapters": [{"name": "lint", "digest": OLD}],
            "quarantined": [],
            "differs": [],
        }
        self.otherwise: dict[str, Answer] = {}

    def say(self, words: str, answer: Answer | str) -> None:
        self.otherwise[words] = Answer(0, answer, "") if isinstance(answer, str) else answer

    def __call__(self, *words: str, stdin: str = "", seconds: float = doctor.LIMIT) -> Answer:
        assert 0 < seconds <= doctor.LIMIT + 1
        asked = " ".join((*words, stdin.partition(" HTTP/")[0], stdin.rpartition("\n")[2]))
        for part, answer in self.otherwise.items():
            if part in asked:
                return answer
        ok = "HTTP/1.0 200 OK\ncontent-type: x\n\n"
        models = {"data": [{"id": BASE}, {"id": "lint"}]}
        answers = {
            "docker ps": "id1 id2",
            "docker inspect": json.dumps(list(self.inspected.values())),
            "tailscale status": json.dumps({"BackendState": "Running", "Self": self.me}),
            "adapter_manager.py list": json.dumps(self.listed),
            "adapter_manager.py history": json.dumps(self.history),
            "GET /v1/models": ok + json.dumps(models),
            "POST /v1/completions": ok + json.dumps({"usage": {"completion_tokens": 1}}),
            "GET /health": ok + "ok" if self.serves() else UNAVAILABLE,
            "GET /agents/": ok + "{}",
            "docker info": "/var/lib/docker",
            "df -Pk": f"Filesystem\n/dev/x 99 9 {90 * 1024**2} 9% /",
            "is-active": "active",
            " check ": "HTTP/1.1 200 OK",
            "update.sh": "changed=0",
        }
        return Answer(0, next((said for part, said in answers.items() if part in asked), ""), "")

    def serves(self) -> bool:
        """Whether a vLLM runs and has not been made unhealthy."""
        vllm = self.inspected["vllm-gemma"]["State"]["Status"] == "running"
        return vllm and " check vllm-gemma" not in self.otherwise

    def examine(self) -> dict[str, Any]:
        """The report, which the schema describes whatever it says."""
        report = doctor.examine(Host(self, self.server))
        jsonschema.validate(report, SCHEMA)
        return report


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    server = tmp_path / "server"
    server.mkdir()
    (server / ".env").write_text(
        "FUNCTION_GEMMA_TAG=f1\nTAILSCALE_VLLM_TAG=t1\nGATEWAY_CONFIG_TAG=c1\nCOMPOSE_FILE='x'\n"
    )
    return Fake(server)


def stop(name: str, status: str = "exited") -> Callable[[Fake], None]:
    return lambda fake: fake.inspected[name]["State"].update(Status=status)


def remove(name: str) -> Callable[[Fake], None]:
    def make(fake: Fake) -> None:
        del fake.inspected[name]

    return make


def ails(name: str, said: str) -> Callable[[Fake], None]:
    return lambda fake: fake.say(f" check {name}", Answer(1, said, ""))


def says(words: str, answer: Answer | str) -> Callable[[Fake], None]:
    return lambda fake: fake.say(words, answer)


def expires(days: int) -> Callable[[Fake], None]:
    at = datetime.now(UTC) + timedelta(days=days)
    return lambda fake: fake.me.update(KeyExpiry=f"{at:%Y-%m-%dT%H:%M:%S}.123456789Z")


def asks_for_gpus(*names: str) -> Callable[[Fake], None]:
    request = {"Driver": "cdi", "DeviceIDs": list(names)}
    return lambda fake: fake.inspected["vllm-gemma"]["HostConfig"].update(DeviceRequests=[request])


def quarantine(fake: Fake) -> None:
    fake.history["adapters"][0]["quarantined"] = "no such file"
    one = {"name": "lint", "digest": OLD, "reason": "no such file"}
    fake.listed.update(adapters=[], quarantined=[one])


def differ(fake: Fake) -> None:
    fake.listed["differs"] = [{"server": "vllm-gemma-1", "name": "lint", "digest": NEW}]


def second_gpu_down(fake: Fake) -> None:
    fake.inspected["vllm-gemma-1"] = container("vllm-gemma-1", "vllm-gemma:f1")
    stop("vllm-gemma-1")(fake)


def both(*makers: Callable[[Fake], None]) -> Callable[[Fake], None]:
    def make(fake: Fake) -> None:
        for one in makers:
            one(fake)

    return make


REFUSED = (
    "waiting: the tailnet did not take this node: see; a new key in server/secrets/tailscale/authkey "
    "is used at once"
)
NO_MODEL = "waiting: no model x@main: denied. To mend it: accept the licence, and: sudo install it"
LOSES = Answer(1, "", "fatal: cannot reach the forge")
UNAVAILABLE = "HTTP/1.0 503 Service Unavailable\n\naway"

# A fault, the state, words of the worst finding, and of what mends it.
CASES: dict[str, tuple[Callable[[Fake], None], str, str, str]] = {
    "no engine": (
        says("docker ps", Answer(1, "", "Cannot connect to the Docker daemon")),
        "down",
        "Docker does not answer: Cannot connect to the Docker daemon",
        "systemctl restart docker",
    ),
    "an engine that hangs": (
        says("docker inspect", Answer(124, "", "no answer within 15 s")),
        "down",
        "no answer within 15 s",
        "systemctl restart docker",
    ),
    "never started": (says("docker ps", ""), "down", "no container of the stack", "/update.sh --no-pull"),
    "a pod that is stopped": (stop("function-gemma-pod"), "down", "function-gemma-pod is exited", "/heal.sh"),
    "a container that is gone": (
        remove("gateway-gemma"),
        "down",
        "gateway-gemma is missing",
        "/update.sh --no-pull",
    ),
    "a container that is paused": (
        stop("vllm-gemma", "paused"),
        "down",
        "vllm-gemma is paused",
        "docker unpause vllm-gemma",
    ),
    "a container that crashes": (
        stop("vllm-gemma", "restarting"),
        "down",
        "vllm-gemma is restarting",
        "docker logs --tail 20 vllm-gemma",
    ),
    "agents that are stopped": (stop("agents-gemma"), "degraded", "agents-gemma is exited", "/heal.sh"),
    "one vLLM of two": (second_gpu_down, "degraded", "vllm-gemma-1 is exited", "/heal.sh"),
    "a vLLM that does not answer": (
        ails("vllm-gemma", "/run/vllm/vllm.sock: timed out"),
        "down",
        "vllm-gemma is unhealthy: /run/vllm/vllm.sock: timed out",
        "docker restart -t 30 vllm-gemma",
    ),
    "a vLLM without a model": (ails("vllm-gemma", NO_MODEL), "down", "no model x@main", "sudo install it"),
    "a vLLM that loads": (
        ails("vllm-gemma", "waiting: loading x@main"),
        "down",
        "loading x@main",
        "docker logs --tail 20 vllm-gemma",
    ),
    "a key that is refused": (
        ails("tailscale-vllm", REFUSED),
        "down",
        "did not take this node",
        "install -m 0400 /dev/stdin",
    ),
    "a login that is awaited": (
        ails("tailscale-vllm", "waiting: visit the login URL shown by: docker logs tailscale-vllm"),
        "down",
        "visit the login URL",
        "docker logs tailscale-vllm",
    ),
    "a namespace that is gone": (
        ails("tailscale-vllm", "no network: the pod was restarted under this container"),
        "down",
        "the pod was restarted",
        "/heal.sh",
    ),
    "a tailscaled that hangs": (
        says("tailscale status", SILENT),
        "down",
        "tailscaled does not answer: no answer within 15 s",
        "docker restart -t 30 tailscale-vllm",
    ),
    "another name": (
        lambda fake: fake.me.update(DNSName="function-gemma-server-1.tail.example."),
        "down",
        "calls this node function-gemma-server-1",
        "headscale nodes rename --identifier 7 function-gemma-server",
    ),
    "a key that expires": (expires(5), "degraded", "key expires on", "headscale nodes tag --identifier 7"),
    "a key that has expired": (expires(-1), "down", "key expires on", "headscale nodes tag --identifier 7"),
    "a gateway that hangs": (
        says("GET /health", SILENT),
        "down",
        "the gateway does not answer: no answer within 15 s",
        "docker restart -t 30 gateway-gemma",
    ),
    "a gateway that sees no vLLM": (
        says("GET /health", UNAVAILABLE),
        "down",
        "no vLLM that is ready",
        "docker restart -t 30 vllm-gemma",
    ),
    "no list of models": (
        says("GET /v1/models", SILENT),
        "down",
        "no models of vLLM: no answer within 15 s",
        "docker restart -t 30 vllm-gemma",
    ),
    "a base that gives no token": (
        says(f'"model": "{BASE}"', SILENT),
        "down",
        f"{BASE} gives no token: no answer within 15 s",
        "docker restart -t 30 vllm-gemma",
    ),
    "an adapter that gives no token": (
        says('"model": "lint"', "HTTP/1.0 500 x\n\nbroken"),
        "degraded",
        "lint gives no token: HTTP 500 broken",
        "adapter_manager.py rollback lint",
    ),
    "what is no JSON": (
        says("GET /v1/models", "HTTP/1.0 200 OK\n\nhello"),
        "down",
        "was not understood",
        "/update.sh --no-pull",
    ),
    "agents that the gateway does not reach": (
        says("GET /agents/", UNAVAILABLE),
        "degraded",
        "no answer of the agents service: HTTP 503 away",
        "docker restart -t 30 agents-gemma",
    ),
    "a manager that fails": (
        says("adapter_manager.py list", Answer(7, "", "the store is damaged")),
        "degraded",
        "what is served is not known: the store is damaged",
        "docker restart -t 30 vllm-gemma",
    ),
    "an adapter in quarantine": (
        quarantine,
        "degraded",
        f"lint {OLD} is quarantined: no such file",
        "adapter_manager.py rollback lint",
    ),
    "vLLMs that differ": (
        differ,
        "degraded",
        f"vllm-gemma-1 differs: lint {NEW}",
        "docker restart -t 30 vllm-gemma-1",
    ),
    "another generation than the manifest's": (
        lambda fake: fake.listed.update(adapters=[{"name": "lint", "digest": NEW}]),
        "degraded",
        f"lint: the manifest names {OLD}, served is {NEW}",
        "docker restart -t 30 vllm-gemma",
    ),
    "a GPU that the container lost": (
        both(
            asks_for_gpus("nvidia.com/gpu=0"),
            says("vllm-gemma timeout 15 nvidia-smi", Answer(255, "", "Failed to initialize NVML")),
        ),
        "degraded",
        "asks for 1 GPUs (nvidia.com/gpu=0) and sees 0: Failed to initialize NVML",
        "docker restart -t 30 vllm-gemma",
    ),
    "fewer GPUs than the host's": (
        both(
            asks_for_gpus("nvidia.com/gpu=all"),
            says("vllm-gemma timeout 15 nvidia-smi", "GPU 0: a"),
            says("nvidia-smi -L", "GPU 0: a\nGPU 1: b"),
        ),
        "degraded",
        "asks for 2 GPUs (nvidia.com/gpu=all) and sees 1",
        "docker restart -t 30 vllm-gemma",
    ),
    "changes by hand": (
        says("status --porcelain", " M server/update.sh\n?? server/new"),
        "degraded",
        "not committed, and a pull may refuse them: server/update.sh, server/new",
        "stash --include-untracked",
    ),
    "no git": (
        says("status --porcelain", Answer(128, "", "fatal: not a git repository")),
        "degraded",
        "not a git repository",
        " status",
    ),
    "settings newer than a container": (
        says("update.sh --plan", "update.sh: would replace or start: gateway-gemma\nchanged=1"),
        "degraded",
        "update.sh would replace or start: gateway-gemma",
        "/update.sh --no-pull",
    ),
    "code newer than an image": (
        says("update.sh --plan", "update.sh: would build: the image of vllm-server\nchanged=1"),
        "degraded",
        "update.sh would build: the image of vllm-server",
        "/update.sh --no-pull",
    ),
    "settings that are wrong": (
        both(says("update.sh --plan", LOSES), says("update.sh --no-pull", Answer(1, "", "wrong .env"))),
        "degraded",
        "whether code and settings are what runs is not known: wrong .env",
        "/update.sh --no-pull --plan",
    ),
    "another tag than the image's": (
        lambda fake: fake.inspected["agents-gemma"]["Config"].update(Image="vllm-gemma:f2"),
        "degraded",
        "agents-gemma is of f2, and server/.env has FUNCTION_GEMMA_TAG=f1",
        "/update.sh --no-pull",
    ),
    "another configuration of the gateway": (
        lambda fake: fake.inspected["gateway-gemma"]["Config"]["Labels"].clear(),
        "degraded",
        "gateway-gemma is of None, and server/.env has GATEWAY_CONFIG_TAG=c1",
        "/update.sh --no-pull",
    ),
    "a disk that is full": (
        says("df -Pk", "Filesystem\n/dev/x 99 98 1048576 99% /"),
        "degraded",
        "1.0 GiB are free for /var/lib/docker, less than 5",
        "docker image prune -f",
    ),
    "a healer that is stopped": (
        says("is-active", Answer(3, "inactive", "")),
        "degraded",
        "the healer does not run",
        "systemctl enable --now",
    ),
    "a branch that is behind": (
        says("update.sh --plan", "update.sh: would pull main: 1 → 2; what follows is the plan\nchanged=1"),
        "healthy",
        "an update would pull main: 1 → 2",
        "/update.sh",
    ),
    "a sidecar that differs": (
        says("update.sh --plan", "update.sh: tailscale-vllm differs and stays as it is\nchanged=0"),
        "healthy",
        "tailscale-vllm is replaced only when that is asked for",
        "/update.sh --no-pull tailscale",
    ),
    "a forge that is away": (
        says("update.sh --plan", LOSES),
        "healthy",
        "whether there is newer code is not known: fatal: cannot reach the forge",
        "/update.sh --plan",
    ),
}


def test_a_healthy_host_has_no_finding_and_names_what_gave_a_token(fake: Fake) -> None:
    assert fake.examine() == {
        "state": "healthy",
        "findings": [],
        "addresses": ["100.64.0.1"],
        "tokens": [BASE, "lint"],
        "adapters": [{"name": "lint", "serves": OLD, "source": None, "quarantined": None}],
    }


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_found_with_the_command_that_mends_it(case: str, fake: Fake) -> None:
    make, state, what, mend = CASES[case]
    make(fake)
    report = fake.examine()
    assert report["state"] == state
    (found,) = [one for one in report["findings"] if what in one["what"]]
    assert mend in found["mend"]
    assert report["findings"][0]["state"] == (state if state != "healthy" else "note")
    assert what in doctor.describe(report)
    # What else is found of a vLLM that is away is what callers have of it.
    others = {one["what"] for one in report["findings"] if one is not found and one["state"] != "note"}
    assert others <= {"the gateway has no vLLM that is ready"}


def test_a_command_that_the_engine_did_not_start_is_asked_again(fake: Fake) -> None:
    asked: set[str] = set()

    def ask(*words: str, stdin: str = "", seconds: float = doctor.LIMIT) -> Answer:
        command = " ".join((*words, stdin))
        if words[:2] == ("docker", "exec") and command not in asked:
            asked.add(command)
            return Answer(126, "OCI runtime exec failed", "")
        return fake(*words, stdin=stdin, seconds=seconds)

    assert doctor.examine(Host(ask, fake.server))["state"] == "healthy"
    assert asked


def test_no_question_waits_for_a_backend_that_is_known_to_be_away(fake: Fake) -> None:
    stop("vllm-gemma")(fake)
    stop("agents-gemma")(fake)
    for words in ("GET /v1", "POST ", "GET /agents/", "adapter_manager.py"):
        fake.say(words, "asked")
    report = fake.examine()
    assert [one["what"] for one in report["findings"]] == [
        "the gateway has no vLLM that is ready",
        "vllm-gemma is exited",
        "agents-gemma is exited",
    ]
    assert report["findings"][0]["mend"] == report["findings"][1]["mend"]
    assert report["tokens"] == []


def test_a_host_whose_standby_answers_in_an_update_is_not_down(fake: Fake) -> None:
    ails("vllm-gemma", "waiting: loading x@main")(fake)
    fake.say("GET /health", "HTTP/1.0 200 OK\n\nok")
    report = fake.examine()
    assert (report["state"], report["tokens"]) == ("degraded", [BASE, "lint"])


def test_a_plan_names_a_stopped_container_no_second_time(fake: Fake) -> None:
    stop("agents-gemma")(fake)
    fake.say("update.sh --plan", "update.sh: would replace or start: agents-gemma\nchanged=1")
    (finding,) = fake.examine()["findings"]
    assert finding["check"] == "containers"


def test_what_is_worse_comes_first(fake: Fake) -> None:
    stop("agents-gemma")(fake)
    fake.say("update.sh --plan", LOSES)
    fake.say("GET /health", SILENT)
    assert [one["state"] for one in fake.examine()["findings"]] == ["down", "degraded", "note"]


def test_every_check_is_one_that_the_schema_names() -> None:
    known = SCHEMA["properties"]["findings"]["items"]["properties"]["check"]["enum"]
    assert [check.__name__ for check in (doctor.engine, *doctor.CHECKS)] == known


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize(("case", "code"), [(None, 0), ("agents that are stopped", 1), ("no engine", 2)])
def test_the_exit_code_is_the_state(
    case: str | None,
    code: int,
    arguments: list[str],
    *,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(doctor, "__file__", str(fake.server / "doctor.py"))
    if case:
        CASES[case][0](fake)
    assert doctor.main(arguments, fake) == code
    state = {0: "healthy", 1: "degraded", 2: "down"}[code]
    said = capsys.readouterr().out
    assert json.loads(said)["state"] == state if arguments else said.startswith(f"{state}: ")


def test_a_wrong_call_is_told_from_a_host_that_is_down() -> None:
    done = subprocess.run(
        [sys.executable, str(SERVER / "doctor"), "--jsn"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert "server/doctor --json" in done.stderr


def test_a_command_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    answer = doctor.ask("sh", "-c", f"sleep 600 & echo $! > {pid}; wait", seconds=1)
    assert answer == Answer(124, "", "no answer within 1 s")
    until = time.monotonic() + 10
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < until


def test_a_command_that_is_not_there_is_an_answer() -> None:
    answer = doctor.ask("no-such-command")
    assert (answer.code, answer.reason) == (127, "no-such-command: No such file or directory")
