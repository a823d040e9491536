"""The caching client, against a real server that is then stopped or breaks."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn
from starlette.responses import Response

from function_gemma.agents import client as client_module
from function_gemma.agents.client import (
    AgentNotFoundError,
    AgentsClient,
    ServerAwayError,
    ServerRefusedError,
)
from function_gemma.agents.definition import AgentsError, DefinitionError
from function_gemma.agents.server import create_app

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from starlette.requests import Request

AGENTS = Path(__file__).parents[2] / "agents"


class Server:
    """The agents service on a TCP port of loopback, as callers see it behind the gateway."""

    def __init__(self, directory: Path) -> None:
        self.answers: list[tuple[str, int]] = []  # path and status of each answer
        self.breaks_with: int | None = None  # a status for every answer, as the gateway gives it
        self.app = create_app(directory)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

        @self.app.middleware("http")
        async def record(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            if self.breaks_with:
                return Response(status_code=self.breaks_with)
            response = await call_next(request)
            self.answers.append((request.url.path, response.status_code))
            return response

    @contextmanager
    def running(self) -> Iterator[None]:
        server = uvicorn.Server(uvicorn.Config(self.app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [self.socket]})
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()
            self.socket.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A folder with one subagent that a test may change."""
    folder = tmp_path / "agents" / "lint"
    folder.mkdir(parents=True)
    for file in (AGENTS / "lint").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder.parent


LINT = "/agents/lint/lint_subagent.yaml"


def test_a_definition_is_pulled_once_and_then_only_checked(directory: Path, tmp_path: Path) -> None:
    server = Server(directory)
    with server.running():
        for _ in range(3):  # a new client each time: the copy is on disk
            with AgentsClient(server.url, tmp_path / "cache") as client:
                definition = client.definition("lint")
    assert definition.tools[0].name == "run_linter"
    assert server.answers == [(LINT, 200), (LINT, 304), (LINT, 304)]


def test_a_changed_definition_is_pulled_anew(directory: Path, tmp_path: Path) -> None:
    server = Server(directory)
    with server.running(), AgentsClient(server.url, tmp_path / "cache") as client:
        assert client.definition("lint").max_turns == 6
        file = directory / "lint" / "lint_subagent.yaml"
        file.write_text(file.read_text().replace("max_turns: 6", "max_turns: 7"))
        assert client.definition("lint").max_turns == 7


def test_a_script_is_pulled_once_and_is_the_servers(directory: Path, tmp_path: Path) -> None:
    server = Server(directory)
    with server.running(), AgentsClient(server.url, tmp_path / "cache") as client:
        definition = client.definition("lint")
        for _ in range(2):
            script = client.script(definition, definition.tools[0])
    assert script == (AGENTS / "lint" / "run_linter.py").read_text()
    assert [status for path, status in server.answers if path.endswith("run_linter.py")] == [200, 304]


def test_the_names_are_the_indexs(tmp_path: Path) -> None:
    server = Server(AGENTS)
    with server.running(), AgentsClient(server.url, tmp_path / "cache") as client:
        assert client.names() == ["docstring", "lint", "sample_data", "test"]


def test_the_copy_is_used_with_a_warning_when_the_server_is_stopped(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(directory)
    with AgentsClient(server.url, tmp_path / "cache") as client:
        with server.running():
            pulled = client.definition("lint")
        assert caplog.messages == []
        assert client.definition("lint") == pulled
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert LINT in record.getMessage()
    assert "using the copy" in record.getMessage()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_the_copy_is_used_when_the_gateway_has_no_backend(
    status: int, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(directory)
    with server.running(), AgentsClient(server.url, tmp_path / "cache") as client:
        pulled = client.definition("lint")
        server.breaks_with = status
        for _ in range(2):  # the broken answer did not take the copy's place
            assert client.definition("lint") == pulled
        server.breaks_with = None
        caplog.clear()
        assert client.definition("lint") == pulled
        assert caplog.messages == []


def test_the_copy_is_used_when_the_server_does_not_answer_in_time(directory: Path, tmp_path: Path) -> None:
    server = Server(directory)
    with AgentsClient(server.url, tmp_path / "cache", timeout=0.3) as client:
        with server.running():
            pulled = client.definition("lint")
        port = int(server.url.rpartition(":")[2])
        with socket.create_server(("127.0.0.1", port)):  # takes connections and says nothing
            assert client.definition("lint") == pulled


def test_without_a_copy_an_absent_server_is_an_error_that_helps(tmp_path: Path) -> None:
    server = Server(AGENTS)
    server.socket.close()
    with (
        AgentsClient(server.url, tmp_path / "cache") as client,
        pytest.raises(ServerAwayError, match=r"no copy is kept.*tailscale status"),
    ):
        client.definition("lint")


def test_an_unknown_subagent_is_an_error_that_helps(tmp_path: Path) -> None:
    server = Server(AGENTS)
    with (
        server.running(),
        AgentsClient(server.url, tmp_path / "cache") as client,
        pytest.raises(AgentNotFoundError, match=f"What there is: {server.url}/agents/"),
    ):
        client.definition("lynt")


def test_another_status_is_an_error_and_the_copy_is_not_used(directory: Path, tmp_path: Path) -> None:
    server = Server(directory)
    with server.running(), AgentsClient(server.url, tmp_path / "cache") as client:
        client.definition("lint")
        server.breaks_with = 403
        with pytest.raises(ServerRefusedError, match="HTTP 403"):
            client.definition("lint")


def test_a_broken_definition_is_an_error_with_its_address(directory: Path, tmp_path: Path) -> None:
    (directory / "lint" / "lint_subagent.yaml").write_text("name: lint\n")
    server = Server(directory)
    with (
        server.running(),
        AgentsClient(server.url, tmp_path / "cache") as client,
        pytest.raises(DefinitionError, match=f"{server.url}{LINT} breaks subagent.schema.json: adapter"),
    ):
        client.definition("lint")


def test_a_definition_of_another_name_is_refused(directory: Path, tmp_path: Path) -> None:
    file = directory / "lint" / "lint_subagent.yaml"
    file.write_text(file.read_text().replace("name: lint", "name: lynt"))
    server = Server(directory)
    with (
        server.running(),
        AgentsClient(server.url, tmp_path / "cache") as client,
        pytest.raises(DefinitionError, match="lynt"),
    ):
        client.definition("lint")


def test_all_errors_are_of_one_family() -> None:
    for kind in (AgentNotFoundError, ServerAwayError, ServerRefusedError, DefinitionError):
        assert issubclass(kind, AgentsError)


def test_the_command_prints_names_and_definitions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(AGENTS)
    options = ["--base-url", server.url, "--cache-dir", str(tmp_path / "cache")]
    with server.running():
        assert client_module.main(options) == 0
        assert capsys.readouterr().out == "docstring\nlint\nsample_data\ntest\n"
        assert client_module.main(["lint", *options]) == 0
        assert capsys.readouterr().out == (AGENTS / "lint" / "lint_subagent.yaml").read_text()
        assert client_module.main(["lynt", *options]) == 1
        assert "no such file" in capsys.readouterr().err
