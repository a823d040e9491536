"""What test_connection.py says about each hop, against a real server on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import test_connection

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = "google/functiongemma-270m-it"
SCRIPT = Path(test_connection.__file__)
Answer = tuple[int, str | dict[str, Any]]


def models(*names: str) -> Answer:
    return 200, {
        "object": "list",
        "data": [{"id": n, "object": "model", "created": 0, "owned_by": "x"} for n in names],
    }


def completion(text: str | None) -> Answer:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": BASE, "choices": [choice]}


@dataclass
class Server:
    """Answers that the test sets, and the requests that came: (method and path, headers, body)."""

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    hang: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(
        answers={"GET /v1/models": models(BASE, "lint"), "POST /v1/chat/completions": completion("Hi.")}
    )

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.path}"
            state.requests.append((request, dict(self.headers), json.loads(body or "{}")))
            if state.hang:
                state.ended.wait()
                return
            status, content = state.answers.get(request, (404, {"error": {"message": "no such path"}}))
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    thread = threading.Thread(target=httpd.serve_forever, args=[0.01])
    thread.start()
    yield state
    state.ended.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def full_port() -> Iterator[int]:
    """A port whose queue is full: the kernel drops what else knocks, as a firewall does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            yield port


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("FAILED: ")
    return line


def test_the_base_model_answers_when_none_is_named(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert test_connection.main(["--base-url", server.url]) == 0
    assert capsys.readouterr().out == f"SUCCESS: {BASE} answered: Hi.\n"
    body = server.requests[-1][2]
    assert (body["model"], body["temperature"]) == (BASE, 0)
    assert body["messages"] == [{"role": "user", "content": "Which tool should run next for src/app.py?"}]


@pytest.mark.parametrize("named", [["model=lint"], ["--model", "lint"], ["--model=lint"]])
def test_the_named_model_answers(
    named: list[str], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["POST /v1/chat/completions"] = completion("call:run_linter{path:\nsrc/app.py}")
    assert test_connection.main([*named, "--base-url", server.url, "--prompt", "Now?"]) == 0
    assert capsys.readouterr().out == "SUCCESS: lint answered: call:run_linter{path: src/app.py}\n"
    assert server.requests[-1][2]["model"] == "lint"
    assert server.requests[-1][2]["messages"][0]["content"] == "Now?"


def test_a_key_of_the_environment_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody")
    assert test_connection.main(["--base-url", server.url]) == 0
    assert "sk-of-somebody" not in str(server.requests)


def test_a_name_that_does_not_resolve_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert test_connection.main(["--base-url", "http://nosuch.invalid:8000/v1"]) == 3
    line = failure(capsys)
    assert "name: nosuch.invalid does not resolve" in line
    assert "tailscale status" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_refused_connection_is_named(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else can take it
        where = f"{host}:{unused.getsockname()[1]}"
        assert test_connection.main(["--base-url", f"http://{where}/v1"]) == 4
    assert f"connection: {where} refused it" in failure(capsys)


def test_a_connection_that_nobody_takes_is_named(full_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert test_connection.main(["--base-url", f"http://127.0.0.1:{full_port}/v1", "--timeout", "0.3"]) == 4
    assert f"connection: 127.0.0.1:{full_port} did not accept one within 0.3 s" in failure(capsys)


def test_a_connection_that_breaks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        code = test_connection.main(["--base-url", f"http://127.0.0.1:{listener.getsockname()[1]}/v1"])
        thread.join()
    assert code == 4
    assert "connection: 127.0.0.1" in failure(capsys)


def test_an_answer_that_does_not_come_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.hang = True
    assert test_connection.main(["--base-url", server.url, "--timeout", "0.3"]) == 5
    assert "nothing came within 0.3 s" in failure(capsys)


def test_an_http_error_is_named_and_tried_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/models"] = 503, {"error": {"message": "no backend is up", "type": "unavailable"}}
    assert test_connection.main(["--base-url", server.url]) == 6
    assert f"HTTP 503 from {server.url}/models: no backend is up." in failure(capsys)
    assert len(server.requests) == 1


def test_an_http_error_without_openais_form_is_named(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["POST /v1/chat/completions"] = 502, "<html>proxy\nerror</html>"
    assert test_connection.main(["--base-url", server.url]) == 6
    assert "HTTP 502" in failure(capsys)


def test_a_base_url_without_v1_is_hinted_at(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert test_connection.main(["--base-url", server.url.removesuffix("/v1")]) == 6
    assert "Does --base-url end in /v1?" in failure(capsys)


def test_a_model_that_is_not_served_is_named_with_those_served(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert test_connection.main(["model=docstring", "--base-url", server.url]) == 7
    line = failure(capsys)
    assert f"model: docstring is not served; served: {BASE}, lint." in line
    assert "load_adapter.yml" in line
    assert [request for request, _, _ in server.requests] == ["GET /v1/models"]


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_reply_is_no_success(
    text: str | None, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["POST /v1/chat/completions"] = completion(text)
    assert test_connection.main(["--base-url", server.url]) == 8
    assert "answered with nothing" in failure(capsys)


@pytest.mark.parametrize("answer", ["<html>router</html>", {"object": "list"}])
def test_another_kind_of_server_is_no_success(
    answer: str | dict[str, Any], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET /v1/models"] = 200, answer
    assert test_connection.main(["--base-url", server.url]) == 8
    assert "no OpenAI server" in failure(capsys)


@pytest.mark.parametrize(
    "arguments",
    [["name=x"], ["model="], ["model=a", "--model", "b"], ["--timeout", "0"], ["--timeout", "soon"]]
    + [
        ["--base-url", url]
        for url in ("function-gemma-server:8000", "ftp://x/v1", "http://x:99999/v1", "http:///v1")
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        test_connection.main(arguments)
    assert stopped.value.code == 2


def test_an_impossible_address_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert test_connection.main(["--base-url", "http://256.1.1.1:8000/v1"]) == 2
    assert "--base-url http://256.1.1.1:8000/v1: " in failure(capsys)


def test_it_runs_without_uv_where_openai_is_importable(server: Server) -> None:
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--base-url", server.url], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"SUCCESS: {BASE} answered: Hi.\n", "")
