"""What the agents service answers, and what it never hands out."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from function_gemma.agents.server import create_app, listen

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = Path(__file__).parents[2] / "server"
LINT = b"name: lint\n"
SECRET = "not for the tailnet"  # what no answer may contain


def make_agents(tmp_path: Path) -> Path:
    """A folder with subagents, hidden files and links; secrets beside it."""
    folder = tmp_path / "agents"
    for name in ("lint", "test", ".git", "empty"):
        (folder / name).mkdir(parents=True)
    (folder / "lint" / "lint_subagent.yaml").write_bytes(LINT)
    (folder / "lint" / "run_linter.py").write_text("print('ä')\n", encoding="utf-8")
    (folder / "lint" / ".env").write_text(SECRET)
    (folder / "lint" / "lint_gate.yaml").write_bytes(b"prompts: []\n")
    (folder / "test" / "test_subagent.yaml").write_bytes(b"name: test\n")
    (folder / "subagent.schema.json").write_text("{}")
    (folder / ".git" / ".git_subagent.yaml").write_text(SECRET)
    (folder / ".git" / "config").write_text(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "outside_subagent.yaml").write_text(SECRET)
    (tmp_path / "agents-of-others").mkdir()
    (tmp_path / "agents-of-others" / "file").write_text(SECRET)
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "lint" / "out.yaml").symlink_to(tmp_path / "outside" / "outside_subagent.yaml")
    (folder / "lint" / "hidden.yaml").symlink_to(folder / ".git" / "config")
    (folder / "lint" / "same.yaml").symlink_to("lint_subagent.yaml")
    (folder / "lint" / "loop.yaml").symlink_to("loop.yaml")
    return folder


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    return make_agents(tmp_path)


def ask(
    agents: Path, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(agents))
        async with httpx.AsyncClient(transport=transport, base_url="http://agents") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def test_a_file_is_served_as_it_is_with_the_etag_of_its_content(agents: Path) -> None:
    answer = ask(agents, "/agents/lint/lint_subagent.yaml")
    assert (answer.status_code, answer.content) == (200, LINT)
    assert answer.headers["etag"] == f'"{hashlib.sha256(LINT).hexdigest()}"'
    assert answer.headers["cache-control"] == "max-age=0"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "application/json"),
        ("lint/lint_subagent.yaml", "application/yaml"),
        ("lint/lint_gate.yaml", "application/yaml"),
        ("lint/run_linter.py", "text/x-python; charset=utf-8"),
        ("subagent.schema.json", "application/json"),
    ],
)
def test_the_content_type_is_the_files(path: str, kind: str, agents: Path) -> None:
    assert ask(agents, f"/agents/{path}").headers["content-type"] == kind


def test_the_index_lists_the_subagents_alone(agents: Path) -> None:
    answer = ask(agents, "/agents/")
    listed = answer.json()["agents"]
    assert [(agent["name"], agent["path"]) for agent in listed] == [
        ("lint", "/agents/lint/lint_subagent.yaml"),
        ("test", "/agents/test/test_subagent.yaml"),
    ]
    for agent in listed:
        assert ask(agents, agent["path"]).headers["etag"] == agent["etag"]
    assert ask(agents, "/agents/", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', '"other",W/{} , "more"', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_copy_that_still_holds_is_304(form: str, method: str, agents: Path) -> None:
    etag = ask(agents, "/agents/lint/lint_subagent.yaml").headers["etag"]
    answer = ask(agents, "/agents/lint/lint_subagent.yaml", method, {"If-None-Match": form.format(etag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert (answer.headers["etag"], answer.headers["cache-control"]) == (etag, "max-age=0")


def test_a_changed_file_is_served_anew_without_a_restart(agents: Path) -> None:
    old = ask(agents, "/agents/lint/lint_subagent.yaml")
    (agents / "lint" / "lint_subagent.yaml").write_bytes(b"name: lynt\n")
    answer = ask(agents, "/agents/lint/lint_subagent.yaml", headers={"If-None-Match": old.headers["etag"]})
    assert (answer.status_code, answer.content) == (200, b"name: lynt\n")


def test_head_says_what_get_would(agents: Path) -> None:
    for path in ("/agents/", "/agents/lint/run_linter.py"):
        got, head = ask(agents, path), ask(agents, path, "HEAD")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers == got.headers
        assert got.headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize(
    "path",
    [
        "../outside/outside_subagent.yaml",
        "lint/../../outside/outside_subagent.yaml",
        "%2e%2e/outside/outside_subagent.yaml",
        "..%2foutside%2foutside_subagent.yaml",
        "%252e%252e/outside/outside_subagent.yaml",
        "..%5coutside%5coutside_subagent.yaml",
        "../agents-of-others/file",
        "..%2fagents-of-others%2ffile",
        "{outside}",
        "/{outside}",
        "%2f{outside}",
        "outside/outside_subagent.yaml",
        "lint/out.yaml",
        "lint/hidden.yaml",
        "lint/loop.yaml",
        "lint/.env",
        "lint/%2eenv",
        ".git/config",
        ".git/.git_subagent.yaml",
        "lint/lint_subagent.yaml/",
        "lint//lint_subagent.yaml",
        "lint/./lint_subagent.yaml",
        "lint/%2e/lint_subagent.yaml",
        "lint/x/../lint_subagent.yaml",
        "lint/lint_subagent.yaml/x",
        "lint",
        "lint/",
        "lint/lint_subagent.yaml%00",
        "absent.yaml",
        "x" * 5000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_nothing_else_is_found(path: str, method: str, served: Path) -> None:
    path = path.format(outside=served.parent / "outside" / "outside_subagent.yaml")
    answer = ask_raw(served, f"/agents/{path}", method)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert SECRET.encode() not in answer


def ask_raw(sock: Path, path: str, method: str = "GET") -> bytes:
    """Ask for the path just as it stands: an HTTP client would tidy it first."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(sock))
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: agents\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def start(sock: Path, directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "AGENTS_SERVER_SOCKET": str(sock), "AGENTS_SERVER_DIRECTORY": str(directory)}
    return subprocess.Popen(
        [sys.executable, SERVER / "agents_server.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started(process: subprocess.Popen[str]) -> str:
    """Wait for the first line: the socket listens by then."""
    assert process.stdout
    return process.stdout.readline()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a real server."""
    folder = tmp_path_factory.mktemp("served")
    with start(folder / "agents.sock", make_agents(folder)) as process:
        assert started(process) == f"serving {folder}/agents on {folder}/agents.sock\n"
        yield folder / "agents.sock"
        process.terminate()


def test_it_serves_on_its_socket_to_its_group_alone(served: Path) -> None:
    assert stat.filemode(served.stat().st_mode) == "srwxrwx---"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(served)), base_url="http://agents") as client:
        assert client.get("/agents/lint/lint_subagent.yaml").content == LINT
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/agents/lint/lint_subagent.yaml").status_code == 405
        assert client.get("/openapi.json").status_code == 404


def test_a_killed_server_leaves_a_socket_that_the_next_one_replaces(agents: Path, tmp_path: Path) -> None:
    sock = tmp_path / "agents.sock"
    with start(sock, agents) as killed:
        started(killed)
        killed.kill()
    assert sock.exists()
    with start(sock, agents) as process:
        started(process)
        assert LINT in ask_raw(sock, "/agents/lint/lint_subagent.yaml")
        process.terminate()
    assert process.returncode in {0, -signal.SIGTERM}


def test_a_socket_that_is_served_is_not_taken_over(served: Path) -> None:
    with pytest.raises(SystemExit, match="is served already"):
        listen(served)
    assert LINT in ask_raw(served, "/agents/lint/lint_subagent.yaml")


def test_what_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / "agents.sock"
    file.write_text("precious")
    with pytest.raises(SystemExit, match="cannot bind AGENTS_SERVER_SOCKET"):
        listen(file)
    assert file.read_text() == "precious"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with start(tmp_path / "agents.sock", tmp_path / "absent") as process:
        assert "AGENTS_SERVER_DIRECTORY" in started(process)
    assert process.returncode == 1


def test_a_folder_that_disappears_is_not_healthy(agents: Path) -> None:
    app = create_app(agents)
    agents.rename(agents.with_name("moved"))

    async def health() -> int:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://agents") as client:
            return (await client.get("/health")).status_code

    assert asyncio.run(health()) == 500


@pytest.mark.parametrize("path", ["/agents/lint/lint_subagent.yaml", "/agents/", "/health"])
def test_a_file_that_may_not_be_read_is_named_as_such(
    path: str, agents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who runs some of these tests, may read everything
    answer = ask(agents, path)
    assert answer.status_code == 403
    assert "chmod -R a+rX agents" in answer.json()["detail"]
