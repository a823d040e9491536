"""adapter_manager.py against a real HTTP server on a unix socket."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from function_gemma.adapters import lock
from function_gemma.adapters.store import FILES, LOCK

MakeAdapter = Callable[..., Path]
SERVER = Path(lock.__file__).parents[2]
COMMAND = SERVER / "adapter_manager.py"


class Plugin(ThreadingUnixStreamServer):
    """The plugin's routes: what is served is what was loaded last."""

    def __init__(self, path: str) -> None:
        self.served: dict[str, str] = {}
        self.calls: list[tuple[str, Any]] = []
        self.refusal: tuple[int, Any] | None = None  # of every POST; of every GET too where it is a 404
        super().__init__(path, Handler)


class Handler(BaseHTTPRequestHandler):
    server: Plugin

    def answer(self, status: int, body: object) -> None:
        if not status:
            self.close_connection = True
            return
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.server.refusal and self.server.refusal[0] == 404:
            self.answer(*self.server.refusal)
            return
        adapters = [{"name": name, "digest": digest, "id": 1} for name, digest in self.server.served.items()]
        self.answer(
            200, {"adapters": adapters, "set_aside": [{"name": "bad", "digest": "0", "reason": "rotten"}]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body))
        if self.server.refusal:
            self.answer(*self.server.refusal)
            return
        if self.path == "/v1/load_lora_adapter":
            assert sorted(path.name for path in Path(body["lora_path"]).iterdir()) == sorted(FILES)
            self.server.served[body["lora_name"]] = Path(body["lora_path"]).name
        self.answer(200, {})

    def address_string(self) -> str:
        return "a unix socket has no address"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    (tmp_path / "store").mkdir()
    path = str(tmp_path / "vllm.sock")
    monkeypatch.setenv("SERVER_SOCKET", path)
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(SERVER))
    with Plugin(path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def manager(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, COMMAND, *arguments], input=stdin, capture_output=True, check=False
    )


def result(*arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    done = manager(*arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def refused(*arguments: str, code: int = 1) -> str:
    done = manager(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert b"Traceback" not in done.stderr
    return done.stderr.decode()


def test_a_load_installs_the_generation_and_says_what_served_before(
    plugin: Plugin, adapter: MakeAdapter
) -> None:
    one = result("load", "lint", str(adapter("one")))
    assert one == {"name": "lint", "digest": plugin.served["lint"], "previous": None, "changed": True}
    two = result("load", "lint", str(adapter("two")))
    assert (two["previous"], two["changed"], two["digest"]) == (one["digest"], True, plugin.served["lint"])


def test_a_tar_from_standard_input_is_the_same_adapter_as_its_directory(
    plugin: Plugin, adapter: MakeAdapter
) -> None:
    path = adapter()
    packed = subprocess.run(["tar", "c", "lint"], cwd=path.parent, check=True, capture_output=True).stdout
    assert result("load", "lint", "-", stdin=packed)["changed"]
    assert not result("load", "lint", str(path))["changed"]
    assert len(plugin.calls) == 1


def test_what_is_served_already_is_unchanged_and_the_server_only_read(
    plugin: Plugin, adapter: MakeAdapter
) -> None:
    path = str(adapter())
    assert b"lint: changed" in manager("load", "lint", path).stdout
    plugin.calls.clear()
    assert b"lint: unchanged" in manager("load", "lint", path).stdout
    assert plugin.calls == []


def test_a_refused_load_fails_with_the_reason_and_leaves_no_generation(
    plugin: Plugin, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plugin.refusal = (400, {"error": {"message": "rank 64 is more than 32"}})
    assert "rank 64 is more than 32" in refused("load", "lint", str(adapter()))
    assert [path.name for path in (tmp_path / "store").iterdir()] == [LOCK]


def test_a_refused_load_leaves_a_generation_that_was_there_before(
    plugin: Plugin, adapter: MakeAdapter
) -> None:
    path = str(adapter("one"))
    digest = result("load", "lint", path)["digest"]
    result("load", "lint", str(adapter("two")))
    plugin.refusal = (500, {"error": {"message": "not now"}})
    assert "not now" in refused("load", "lint", path)
    assert (Path(os.environ["SERVER_ADAPTERS_DIR"]) / "lint" / digest).is_dir()


def test_an_unload_is_passed_on(plugin: Plugin) -> None:
    assert result("unload", "lint") == {"name": "lint", "changed": True}
    assert plugin.calls == [("/v1/unload_lora_adapter", {"lora_name": "lint"})]


@pytest.mark.usefixtures("plugin")
def test_the_list_shows_what_is_served_and_what_was_set_aside(adapter: MakeAdapter) -> None:
    digest = result("load", "lint", str(adapter()))["digest"]
    assert result("list")["adapters"] == [{"name": "lint", "digest": digest, "id": 1}]
    assert manager("list").stdout.decode() == f"lint  {digest}\nbad  0  set aside: rotten\n"


def test_a_server_without_the_plugin_is_told(plugin: Plugin) -> None:
    plugin.refusal = (404, {"error": {"message": "Not Found"}})
    assert "VLLM_PLUGINS=function_gemma" in refused("list")


@pytest.mark.usefixtures("plugin")
def test_a_server_that_does_not_answer_is_told_with_what_to_do(
    adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(stale)
    for path in (stale, str(tmp_path / "none.sock")):
        monkeypatch.setenv("SERVER_SOCKET", path)
        message = refused("load", "lint", str(adapter(path[-9:-5])))
        assert path in message
        assert "docker logs vllm-gemma" in message
    assert [path.name for path in (tmp_path / "store").iterdir()] == [LOCK]


def test_a_load_that_nobody_answered_leaves_the_generation(plugin: Plugin, adapter: MakeAdapter) -> None:
    plugin.refusal = (0, None)
    assert "does not answer" in refused("load", "lint", str(adapter()))
    ((_, body),) = plugin.calls
    assert Path(body["lora_path"]).is_dir()


@pytest.mark.usefixtures("plugin")
def test_a_server_that_waits_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_SOCKET", str(tmp_path / "none.sock"))
    (tmp_path / "waiting").write_text("a token for google/functiongemma-270m-it\n")
    assert "(a token for google/functiongemma-270m-it)" in refused("list")


@pytest.mark.usefixtures("plugin")
def test_a_run_outside_the_container_is_told_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(tmp_path / "none"))
    assert "docker compose exec vllm-server adapter_manager.py load" in refused("load", "lint", str(tmp_path))


@pytest.mark.usefixtures("plugin")
def test_bad_input_is_refused(tmp_path: Path) -> None:
    assert "cannot name an adapter" in refused("load", "../lint", str(tmp_path))
    assert "is not a directory" in refused("load", "lint", str(tmp_path / "none"))
    assert "no adapter_config.json" in refused("load", "lint", str(tmp_path))
    assert "no whole tar" in refused("load", "lint", "-")
    assert "usage" in refused("load", "lint", code=2)
    assert "usage" in refused(code=2)


@pytest.mark.usefixtures("plugin")
def test_a_second_manager_waits_and_says_who_holds_the_lock(adapter: MakeAdapter, tmp_path: Path) -> None:
    path = str(adapter())
    with lock.hold(tmp_path / "store" / LOCK, "adapter_manager.py load docstring", print):
        second = subprocess.Popen([sys.executable, COMMAND, "load", "lint", path], stderr=subprocess.PIPE)
        assert isinstance(second.stderr, io.BufferedReader)
        line = second.stderr.readline().decode()
    with second:
        assert "held by adapter_manager.py load docstring (process" in line
        assert second.wait() == 0


def test_the_command_starts_without_anything_heavy() -> None:
    code = f"import runpy, sys; runpy.run_path({str(COMMAND)!r}); print(*sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=SERVER
    ).stdout.split()
    assert not {b"fastapi", b"pydantic", b"torch", b"vllm", b"httpx"} & set(modules)
