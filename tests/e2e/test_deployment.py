"""What site.yml, update.yml and load_adapter.yml leave on the host, and what the laptop sees of it."""

import ipaddress
import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest

import common as lab
from function_gemma.adapters.store import digest_of
from stack import (
    ANSWERS,
    BASE,
    CHECKOUT,
    PROMPT,
    URL,
    answers,
    ask,
    away,
    call,
    changes,
    commit,
    containers,
    forge_head,
    host,
    host_head,
    laptop,
    playbook,
    replaced,
    server,
    ssh,
    started,
    until,
)

TAILNET = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
LOCK = f"{CHECKOUT}/server/.lock"
REFUSED = """
    POST /v1/load_lora_adapter
    POST /v1/unload_lora_adapter
    GET /v1/lora_adapters
    GET //v1/lora_adapters
    POST /adapters
    DELETE /adapters/lint
    GET /ready
    GET /gateway/metrics
    GET /metrics/
    GET /metrics/8
    GET //metrics
    GET /%6detrics
    GET /METRICS
    POST /metrics
    GET /version
    GET /load
    GET /ping
    GET /docs
    GET /openapi.json
    POST /tokenize
    POST /invocations
    POST /v1/models
    GET /v1/models/
    GET /v1/chat/completions
    POST /agents/
    GET /
"""
COUNT = "Count from one to forty."
# How many pieces the answer came in, and what it said.
STREAM = f"""
import http.client, json
messages = [{{"role": "user", "content": "{COUNT}"}}]
body = {{"model": "lint", "stream": True, "temperature": 0, "messages": messages}}
connection = http.client.HTTPConnection("function-gemma-server", 8000)
connection.request("POST", "/v1/chat/completions", json.dumps(body), {{"Content-Type": "application/json"}})
answer, pieces = connection.getresponse(), []
while piece := answer.read1():
    pieces.append(piece.decode())
events = [json.loads(line[6:]) for line in "".join(pieces).splitlines() if line.startswith("data: {{")]
said = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
print(len(pieces), "".join(said))
"""


def test_a_second_site_changes_nothing_and_every_container_is_the_same() -> None:
    before = containers()
    run = playbook("site.yml")
    assert changes(run) == 0, str(run)
    assert "SUCCESS: " in run.words
    assert not replaced(before)


def test_the_plan_of_a_host_that_is_as_declared_is_empty() -> None:
    before = containers()
    plan = playbook("site.yml", "--check", "--diff")
    assert changes(plan) == 0, str(plan)
    assert not replaced(before)


def test_update_ends_in_a_reply() -> None:
    assert f"SUCCESS: {BASE} answered: " in playbook("update.yml").words


def test_load_adapter_ends_in_a_reply_of_the_adapter_without_a_restart() -> None:
    before = containers()
    assert "SUCCESS: docstring answered: " in playbook("load_adapter.yml", "-e", "name=docstring").words
    assert not replaced(before)


def test_a_check_from_a_client_with_uv_makes_its_environment_once() -> None:
    environments = "ls /root/.cache/uv/environments-v2"
    playbook("playbooks/connection_check.yml")
    before = laptop(environments).stdout
    playbook("playbooks/connection_check.yml")
    assert laptop(environments).stdout == before


@pytest.mark.parametrize("prompt", ANSWERS)
def test_base_and_adapters_answer_the_same_prompt_each_in_its_own_way(prompt: str) -> None:
    said = {name: ask(BASE if name == "base" else name, prompt) for name in ("base", "lint", "docstring")}
    assert said == ANSWERS[prompt]
    assert len(set(said.values())) == 3


def test_the_laptop_reaches_the_server_through_the_tailnet_alone() -> None:
    curl = laptop(f"curl -sS -o /dev/null -w '%{{local_ip}} %{{remote_ip}}' {URL}/health")
    for end in map(ipaddress.ip_address, curl.last.split()):
        assert any(end in network for network in TAILNET), str(curl)

    def networks(container: str) -> set[str]:
        shown = call("docker", "inspect", "-f", "{{json .NetworkSettings.Networks}}", container)
        return set(json.loads(shown.stdout))

    assert not networks("lab-laptop") & networks("lab-host")


def test_health_answers_the_tailnet() -> None:
    assert laptop(f"curl -sS {URL}/health").last == "ok"


@pytest.mark.parametrize("line", [line.strip() for line in REFUSED.strip().splitlines()])
def test_the_gateway_refuses_what_is_not_on_its_list_in_the_form_of_openai(line: str) -> None:
    method, path = line.split()
    body = "" if method == "GET" else "-H 'Content-Type: application/json' -d '{}'"
    answer = laptop(f"curl -sS --path-as-is -X {method} {body} -w '\\n%{{http_code}}' {URL}{path}")
    assert answer.last == "404"
    error = json.loads(answer.stdout.rpartition("\n")[0])["error"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_a_streamed_answer_arrives_in_pieces() -> None:
    answers = [laptop("python3 -", stdin=STREAM).last.partition(" ") for _ in range(3)]
    assert {said for _, _, said in answers} == {ANSWERS[COUNT]["lint"]}
    # All of it fits the gateway's buffer: one that held it back would hand on a single piece, or two.
    assert max(int(pieces) for pieces, _, _ in answers) > 2


def served_by(model: str, path: str = "chat/completions", *, stream: bool = False) -> str:
    """What the header x-served-by of an answer says."""
    question = (
        {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    )
    body = json.dumps({"model": model, "max_tokens": 4, "stream": stream, **question})
    curl = "curl -sS --fail -o /dev/null -D - -H 'Content-Type: application/json' -d @-"
    headers = laptop(f"{curl} {URL}/v1/{path}", stdin=body).stdout
    (maker,) = re.findall(r"^x-served-by: (.*?)\r?$", headers, re.MULTILINE | re.IGNORECASE)
    return str(maker)


def setting(name: str) -> str:
    """What a line of the host's settings files says."""
    (value,) = re.findall(rf"^{name}='?([^'\n]+)", server("cat .env entrypoint.env").stdout, re.MULTILINE)
    return str(value)


def test_every_reply_names_release_adapter_and_content_that_made_it() -> None:
    release = setting("FUNCTION_GEMMA_TAG")
    makers = {BASE: f"{release}/{BASE}@{setting('SERVER_MODEL_REVISION')}"}
    for name in ("lint", "docstring"):
        makers[name] = f"{release}/{name}@{digest_of(lab.CACHE / 'model' / name)}"
    for model, maker in makers.items():
        assert served_by(model) == maker
        assert served_by(model, stream=True) == maker
        assert served_by(model, "completions") == maker


def test_the_models_are_listed_in_vllms_form_by_their_public_names_alone() -> None:
    listed = json.loads(laptop(f"curl -sS {URL}/v1/models").stdout)
    assert listed["object"] == "list"
    assert {one["object"] for one in listed["data"]} == {"model"}
    assert listed["data"][0]["id"] == BASE
    assert sorted(one["id"] for one in listed["data"][1:]) == ["docstring", "lint"]
    assert {one["parent"] for one in listed["data"][1:]} == {BASE}


def metrics() -> str:
    """What the gateway says at /metrics."""
    return laptop(f"curl -sS --fail {URL}/metrics").stdout


def counted(adapter: str) -> float:
    """How many requests the metrics count for an adapter."""
    line = rf'^function_gemma_requests_total\{{[^}}\n]*adapter="{adapter}"[^}}\n]*\}} (\S+)$'
    return sum(map(float, re.findall(line, metrics(), re.MULTILINE)))


def test_metrics_count_the_requests_of_each_adapter() -> None:
    ask("lint")  # a counter may have no line before its first request
    before = counted("lint"), counted("docstring")
    ask("lint")
    assert (counted("lint"), counted("docstring")) == (before[0] + 1, before[1])


def test_metrics_are_vllms_without_the_series_that_grow_without_bound() -> None:
    ask("lint")  # vLLM's own /metrics has such a series now
    served = metrics()
    assert "\nvllm:num_requests_running{" in served
    assert "vllm:lora_requests_info" not in served


def test_the_adapters_are_served_again_after_a_restart_of_vllm() -> None:
    before = containers()
    host("docker restart vllm-gemma")
    assert ask("lint") == ANSWERS[PROMPT]["lint"]  # the gateway lets it wait
    assert ask("docstring") == ANSWERS[PROMPT]["docstring"]
    assert replaced(before) == {"vllm-gemma"}


def test_update_brings_what_is_new_on_the_forge_and_replaces_only_what_it_concerns() -> None:
    before = containers()
    with (
        commit("agents/lint/lint_subagent.yaml", "\n", "\n# news\n"),
        commit("server/haproxy/haproxy.cfg", "Not served here.", "Not served here (news)."),
    ):
        run = playbook("update.yml")
        assert host_head() == forge_head()
    assert changes(run) == 1, str(run)
    assert "SUCCESS: " in run.words
    assert "\n# news\n" in laptop(f"curl -sS {URL}/agents/lint/lint_subagent.yaml").stdout
    assert "Not served here (news)." in laptop(f"curl -sS {URL}/nowhere").stdout
    assert replaced(before) == {"gateway-gemma"}


def test_a_checkout_at_a_tag_is_not_pulled_and_says_so() -> None:
    git = f"git -C {CHECKOUT}"
    before = host_head()
    host(f"{git} tag -f e2e && {git} checkout -q e2e")
    try:
        with commit("agents/README.md", "\n", "\nnews\n"):
            update = server("./update.sh")
        assert "the checkout is at e2e, on no branch: nothing is pulled" in update.words
        assert host_head() == before
    finally:
        host(f"{git} checkout -q main && {git} tag -d e2e")


def updates() -> bool:
    """Whether a run of update.sh holds the lock."""
    return host(f"flock -n {LOCK} true", ok=None).code == 1


def test_a_second_update_waits_and_says_for_whom(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    command = f"{CHECKOUT}/server/update.sh"
    with ExitStack() as running:
        with away("lab-forge", "pause", "unpause"):  # the first cannot end before the second has begun
            one = running.enter_context(started(ssh(command), first))
            until("the first update holds the lock", updates)
            other = running.enter_context(started(ssh(f"{command} --no-pull"), second))
            says = until("the second update says something", second.read_text)
            assert "update.sh: waiting for the run of root, process " in says
        assert one.wait(120) == 0, first.read_text()
        assert other.wait(120) == 0, second.read_text()
    answers()


def test_an_update_over_ssh_survives_the_end_of_its_session(tmp_path: Path) -> None:
    said = tmp_path / "said"
    session = "echo $$ >/run/session; exec ssh root@function-gemma-server ./update.sh"
    with commit("agents/README.md", "\n", "\nnews\n"):
        with (
            away("lab-forge", "pause", "unpause"),
            started(["docker", "exec", "lab-laptop", "sh", "-c", session], said) as process,
        ):
            until("the update is at work", updates)
            laptop("kill -9 $(cat /run/session)")
            process.wait(30)
        host(f"flock -w 60 {LOCK} true")
        assert host_head() == forge_head(), said.read_text()
    assert server("tail -n 1 .update.log").last == "changed=1"
