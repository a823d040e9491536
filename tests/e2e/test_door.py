"""What the gateway lets in: of vLLM's own routes those on its list, of clients those that ask and listen."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from stack import CHECKOUT, ROOT, call, headscale, host, laptop, until

# HEAD is GET without the body.
LISTED = {
    ("HEAD", "/health"),
    ("HEAD", "/metrics"),
    ("HEAD", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "ANY")
# Runs on the laptop. Of each answer its status, and who gave it: uvicorn, or the gateway, which names nobody.
ASK = """
import http.client, json
connection = http.client.HTTPConnection("function-gemma-server", 8000, timeout=20)
for method, target, headers in {requests!r}:
    connection.request(method, target, "{{}}" if method == "POST" else None, headers)
    answer = connection.getresponse()
    answer.read()
    print(json.dumps([answer.status, answer.getheader("server", "")]))
"""
Request = tuple[str, str, dict[str, str]]


def asked(requests: list[Request]) -> list[tuple[int, str]]:
    """Status and server of the answer to each request, sent as it stands."""
    lines = laptop("python3 -", stdin=ASK.format(requests=requests)).stdout.splitlines()
    assert len(lines) == len(requests)
    return [(status, server) for status, server in map(json.loads, lines)]


def let_in(requests: list[Request]) -> list[tuple[Request, int, str]]:
    """The requests that the gateway did not refuse by itself."""
    answers = zip(requests, asked(requests), strict=True)
    return [(one, status, by) for one, (status, by) in answers if by or status not in (400, 404)]


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """Method and path of each route that the running vLLM says it has, with a name where one takes any."""
    _, _, log = host("docker logs vllm-gemma 2>&1").stdout.rpartition("Available routes are:")
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", log)
    return {
        (method, re.sub(r"\{.*?\}", "lint", path))
        for path, methods in found
        for method in methods.split(", ")
    }


def test_no_route_of_vllm_but_those_listed_answers_the_tailnet_by_any_method(
    routes: set[tuple[str, str]],
) -> None:
    # That they are those of the server, and that an answer of it would be seen.
    assert {("POST", "/tokenize"), ("POST", "/v1/load_lora_adapter"), ("GET", "/gateway/metrics")} <= routes
    assert asked([("GET", "/v1/models", {})]) == [(200, "uvicorn")]
    paths = {path for _, path in routes | LISTED}
    every: list[Request] = [(method, path, {}) for path in sorted(paths) for method in METHODS]
    assert let_in([one for one in every if one[:2] not in LISTED]) == []


def disguises(path: str) -> set[str]:
    """Other ways to write a path."""
    encoded = "".join(f"%{ord(letter):02x}" for letter in path[1:])
    return {
        f"/{encoded}",
        f"/{encoded.replace('%', '%25')}",
        path.replace("/", "%2F"),
        f"/{path[1:].replace('/', '%2f')}%20",
        path.replace("/", "\\"),
        path.upper(),
        path.title(),
        f"/{path}",
        path.replace("/", "//"),
        f"/.{path}",
        f"{path}/",
        f"{path}/.",
        f"{path};x=1",
        f"{path}%00",
        f"{path}%0a",
        f"/v1/models/../..{path}",
        f"/agents/..{path}",
        f"/agents/lint/../..{path}",
        f"/agents/..;{path}",
        f"/agents/%2e%2e{path}",
        f"/agents/..%2f{path[1:]}",
        f"/agents/..%5c{path[1:]}",
        f"http://function-gemma-server:8000{path}",
        f"http://127.0.0.1{path}",
        f"https://function-gemma-server{path}",
    }


def test_no_other_way_to_write_a_path_gets_in(routes: set[tuple[str, str]]) -> None:
    paths = sorted({path for _, path in routes | LISTED} - {"/"})
    wrong = sorted({other for path in paths for other in disguises(path)} - {path for _, path in LISTED})
    assert let_in([(method, other, {}) for other in wrong for method in ("GET", "POST")]) == []


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_no_header_makes_another_method_of_a_request(name: str) -> None:
    assert let_in([("GET", "/v1/completions", {name: "POST"}), ("POST", "/metrics", {name: "GET"})]) == []


@pytest.mark.parametrize("name", ["X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Uri", "X-Forwarded-Prefix"])
def test_no_header_makes_another_path_of_a_request(name: str) -> None:
    body = laptop(f"curl -sS -H '{name}: /version' http://function-gemma-server:8000/v1/models").stdout
    assert json.loads(body)["object"] == "list"
    assert let_in([("GET", "/version", {name: "/v1/models"})]) == []


# ── Clients ──────────────────────────────────────────────────────────────────────────────────────

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
# What a client sends, the status that it gets, and whether it then stays until the gateway hangs up.
CLIENTS: dict[str, tuple[bytes, int, bool]] = {
    "it says nothing": (b"", 408, True),
    "its headers do not end": (MODELS, 408, True),
    "its body does not come": (POST % 100 + b"\r\n{", 408, True),
    "its large body stops": (POST % 100_000 + b"\r\n" + 70_000 * b" ", 400, True),
    "its body is too large": (POST % 5_000_000 + b"\r\n" + 70_000 * b" ", 413, True),
    "it hides how long its body is": (
        POST % 4 + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + MODELS,
        411,
        False,
    ),
    "it has two lengths": (POST % 4 + b"Content-Length: 5\r\n\r\n12345", 400, False),
    "its headers are long": (MODELS + b"X: " + 20_000 * b"x" + b"\r\n\r\n", 431, False),
    "its headers are longer than the gateway's buffer": (
        MODELS + b"X: " + 90_000 * b"x" + b"\r\n\r\n",
        400,
        False,
    ),
    "its headers are many": (MODELS + 200 * b"X: x\r\n" + b"\r\n", 400, False),
    "it is a web page": (MODELS + b"Origin: http://example.invalid\r\n\r\n", 403, False),
    "it is a web page without a name": (POST % 2 + b"Origin: null\r\n\r\n{}", 403, False),
    "it speaks HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400, False),
    "it asks for HTTP/2": (
        MODELS + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        200,
        False,
    ),
    "it asks for a websocket": (
        MODELS
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        200,
        False,
    ),
    "it speaks TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, False),
}
MAX = 40  # connections of one caller: more than the clients above are together
# Runs on the host in the pod's network. Prints for each client its status and whether the gateway hung up.
CONNECT = """
import concurrent.futures, json, socket

def answer(end):
    said = end.recv(65536)
    return int(said.split()[1]) if said else 0

def client(what):
    sent, _, stays = what
    with socket.create_connection(("127.0.0.1", 8001), 30) as end:
        end.sendall(sent)
        status = answer(end)
        while stays and end.recv(65536):
            pass
    return status

clients = {clients!r}
with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
    print(json.dumps(dict(zip(clients, pool.map(client, clients.values())))))
"""
CROWD = """
import json, socket, time

def ask(end):
    end.sendall(b"GET /agents HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    return int(end.recv(65536).split()[1])

def connect():
    return socket.create_connection(("127.0.0.1", 8001), 30)

crowd = [connect() for _ in range({most})]
seen = [ask(end) for end in crowd]
with connect() as end:
    seen.append(ask(end))
    assert end.recv(65536) == b""  # it is hung up on, so that it counts no more
for end in crowd:
    end.close()
status, tries = 429, 0
while status == 429 and tries < 100:  # the gateway hears of each by itself
    with connect() as end:
        status = ask(end)
    tries += 1
    time.sleep(0.05)
print(json.dumps([*seen, status]))
"""


def in_the_pod(program: str) -> Any:  # noqa: ANN401 - what the program prints
    """Run a Python program of the host's in the pod's network; return the JSON that it prints."""
    pod = host("docker inspect -f '{{.State.Pid}}' function-gemma-pod").last
    return json.loads(host(f"nsenter -n -t {pod} python3 -", stdin=program).last)


@pytest.fixture(scope="module")
def impatient() -> Iterator[None]:
    """A second gateway beside the first, of the same image and configuration: it gives a client a second."""
    settings = {
        "BIND": "127.0.0.1:8001",
        "REQUEST_TIMEOUT": "1s",
        "MAX_PER_CALLER": MAX,
        "LONGEST_REQUEST": "60s",
    }
    words = " ".join(f"-e GATEWAY_{name}={value}" for name, value in settings.items())
    volumes = (
        "-v function-gemma-server_vllm-run:/run/vllm:ro -v function-gemma-server_agents-run:/run/agents:ro"
    )
    host(
        f"docker run -d --name e2e-gateway --network container:function-gemma-pod --user 10002:10000 {words}"
        f" {volumes} -v {CHECKOUT}/server/haproxy:/usr/local/etc/haproxy:ro --tmpfs /run/gateway:mode=1777"
        " --entrypoint haproxy $(docker inspect -f '{{.Config.Image}}' gateway-gemma)"
        " -W -db -f /usr/local/etc/haproxy/haproxy.cfg"
    )
    try:
        until("it listens", lambda: "Loading success" in host("docker logs e2e-gateway 2>&1").stdout)
        yield
    finally:
        host("docker rm -f e2e-gateway")


@pytest.fixture(scope="module")
def statuses(impatient: None) -> dict[str, int]:  # noqa: ARG001 - it is who answers
    """What each client is answered; those that stay have been hung up on."""
    seen: dict[str, int] = in_the_pod(CONNECT.format(clients=CLIENTS))
    return seen


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_answered_and_cut_where(client: str, statuses: dict[str, int]) -> None:
    assert statuses[client] == CLIENTS[client][1]


@pytest.mark.usefixtures("impatient")
def test_more_connections_than_a_caller_may_have_are_refused_until_there_are_fewer() -> None:
    assert in_the_pod(CROWD.format(most=MAX)) == [*MAX * [404], 429, 404]


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_takes_longer_than_a_client_may_be_silent_arrives() -> None:
    """The model's answer does not come within the second that `impatient` gives a client."""
    program = """
import http.client, json
body = {"model": "google/functiongemma-270m-it", "prompt": "x", "min_tokens": 400, "max_tokens": 400}
answer = http.client.HTTPConnection("127.0.0.1", 8001, timeout=60)
answer.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
print(json.dumps(answer.getresponse().status))
"""
    assert in_the_pod(program) == 200


# ── The policy ───────────────────────────────────────────────────────────────────────────────────

(POLICY,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "threat-model.md").read_text(), re.DOTALL)
SERVER = "tag:inference"


@pytest.mark.parametrize(
    ("group", "opens", "shut", "root"),
    [("operators", (22, 8000), (80, 8001), "accept"), ("callers", (8000,), (22, 80, 8001), "deny")],
)
def test_the_policy_of_the_threat_model_lets_each_group_in_where_it_says(
    group: str, opens: tuple[int, ...], shut: tuple[int, ...], root: str
) -> None:
    policy = json.loads(POLICY)
    assert policy["groups"].keys() == {"group:operators", "group:callers"}
    policy["groups"] = {name: ["ops@"] if name == f"group:{group}" else [] for name in policy["groups"]}
    (us,) = (one for one in headscale("nodes list") if one["given_name"] == "laptop")
    policy["tests"] = [
        {
            "src": "ops@",
            "proto": "tcp",
            "accept": [f"{SERVER}:{port}" for port in opens],
            "deny": [f"{SERVER}:{port}" for port in shut],
        },
        {"src": SERVER, "proto": "tcp", "deny": [f"{us['ip_addresses'][0]}:22"]},
    ]
    policy["sshTests"] = [{"src": "ops@", "dst": [SERVER], root: ["root"]}]
    check = "cat >/tmp/policy && headscale policy check -f /tmp/policy"
    call("docker", "exec", "-i", "lab-headscale", "sh", "-c", check, stdin=json.dumps(policy))
