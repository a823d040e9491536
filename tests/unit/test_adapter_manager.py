"""adapter_manager.py against the real plugin on a unix socket, with stand-ins for vLLM."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import uvicorn

import adapter_manager
from function_gemma.adapters import errors, lock
from function_gemma.adapters.files import FILES
from function_gemma.adapters.manifest import Manifest
from function_gemma.adapters.store import LOCK, digest_of
from unit.stand_ins import BASE, FakeEngine, listening, server

MakeAdapter = Callable[..., Path]
SERVER = Path(lock.__file__).parents[2]
COMMAND = SERVER / "adapter_manager.py"
GATED = """
prompts:
  - prompt: Lint a.py
    calls: [{name: run_linter, arguments: {path: a.py}}]
"""
AGENT = """
name: lint
adapter: lint
max_turns: 1
initial_context: {system_prompt: You lint., node_context: Here.}
tools:
  - name: run_linter
    description: Lint a file.
    inputs: {type: object, properties: {path: {type: string}}}
    script: run_linter.py
"""


@pytest.fixture
def plugin(store: Path) -> Iterator[uvicorn.Server]:
    """A server that has begun to listen."""
    assert store.is_dir()
    with listening(server()) as running:
        yield running


@pytest.fixture
def engine(plugin: uvicorn.Server) -> FakeEngine:
    found: FakeEngine = plugin.config.app.state.engine  # type: ignore[union-attr] # it is the app itself
    return found


@dataclass(frozen=True)
class Done:
    """A run of the command."""

    returncode: int
    stdout: str
    stderr: str


def manager(*arguments: str | Path, stdin: bytes = b"") -> Done:
    """Run the command in this process, which has imported already what it needs."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = adapter_manager.main(list(map(str, arguments)))
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def result(*arguments: str | Path, stdin: bytes = b"") -> dict[str, Any]:
    done = manager(*arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def refused(*arguments: str | Path, code: int = 1, stdin: bytes = b"") -> str:
    done = manager(*arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    return done.stderr


def served() -> dict[str, str]:
    return {one["name"]: one["digest"] for one in result("list")["adapters"]}


def installed(store: Path, name: str = "lint") -> set[str]:
    return {path.name for path in (store / name).iterdir()} if (store / name).exists() else set()


@pytest.mark.usefixtures("plugin")
def test_a_load_serves_it_and_says_what_served_before_and_how_long_each_part_took(
    adapter: MakeAdapter,
) -> None:
    one = result("load", "lint", adapter("one"))
    seconds = one.pop("seconds")
    assert one == {
        "name": "lint",
        "digest": served()["lint"],
        "previous": None,
        "changed": True,
        "gate": None,
        "pruned": [],
    }
    assert seconds.keys() == {"admission", "add_lora", "proof", "gate", "move"}
    two = result("load", "lint", adapter("two"))
    assert (two["previous"], two["changed"], two["digest"]) == (one["digest"], True, served()["lint"])


@pytest.mark.usefixtures("plugin")
def test_a_tar_from_standard_input_is_the_same_adapter_as_its_directory(adapter: MakeAdapter) -> None:
    path = adapter()
    packed = subprocess.run(["tar", "c", "lint"], cwd=path.parent, check=True, capture_output=True).stdout
    assert result("load", "lint", "-", stdin=packed)["changed"]
    assert not result("load", "lint", path)["changed"]


def test_what_is_served_already_is_unchanged(engine: FakeEngine, adapter: MakeAdapter) -> None:
    path = adapter()
    assert "lint: changed" in manager("load", "lint", path).stdout
    assert "lint: unchanged" in manager("load", "lint", path).stdout
    assert len(engine.added) == 1


def test_what_is_refused_never_reaches_the_engine_and_leaves_no_generation(
    engine: FakeEngine, adapter: MakeAdapter, store: Path
) -> None:
    path = adapter()
    (path / FILES[0]).write_text("{}")
    assert "peft_type" in refused("load", "lint", path, code=3)
    assert engine.added == []
    assert {one.name for one in store.iterdir()} == {LOCK}


def test_what_vllm_refuses_leaves_no_generation_but_those_that_were_there(
    engine: FakeEngine, adapter: MakeAdapter, store: Path
) -> None:
    one = result("load", "lint", adapter("one"))["digest"]
    assert "Worker failed" in refused("load", "lint", adapter("bad"), code=8)
    assert installed(store) == {one}
    assert served() == {"lint": one}
    two = result("load", "lint", adapter("two"))["digest"]

    async def fail() -> None:
        raise RuntimeError("no memory")

    engine.on_add = fail
    assert "no memory" in refused("load", "lint", adapter("one", "again"), code=8)
    assert installed(store) == {one, two}


@pytest.mark.usefixtures("store")
def test_validate_says_what_is_there_and_asks_no_server(adapter: MakeAdapter, store: Path) -> None:
    path = adapter()
    size = sum((path / file).stat().st_size for file in FILES)
    facts = {
        "name": "lint",
        "digest": digest_of(path),
        "rank": 8,
        "alpha": 16.0,
        "tensors": 28,
        "bytes": size,
    }
    assert result("validate", "lint", path) == facts
    assert f"lint: good, {facts['digest']}, rank 8" in manager("validate", "lint", path).stdout
    assert installed(store) == set()


@pytest.mark.usefixtures("plugin")
def test_an_unload_and_a_rollback(adapter: MakeAdapter) -> None:
    one, two = (result("load", "lint", adapter(word))["digest"] for word in ("one", "two"))
    back = result("rollback", "lint")
    assert (back["digest"], back["previous"], back["changed"]) == (one, two, True)
    assert served() == {"lint": one}
    assert result("rollback", "lint")["digest"] == two
    assert result("unload", "lint") == {"name": "lint", "previous": two, "changed": True}
    assert served() == {}
    assert "no adapter 'lint' is served" in refused("unload", "lint", code=4)
    assert result("rollback", "lint", "--to", one)["digest"] == one
    assert f"no earlier generation {'0' * 12}" in refused("rollback", "lint", "--to", "0" * 12, code=4)
    assert "'docstring' was never served" in refused("rollback", "docstring", code=4)


@pytest.mark.usefixtures("plugin")
def test_history_says_what_served_and_what_is_kept(adapter: MakeAdapter, store: Path) -> None:
    words = ("one", "two", "three", "four", "five")
    digests = [result("load", "lint", adapter(word))["digest"] for word in words]
    assert installed(store) == set(digests[1:])  # the one that serves and three before it
    (entry,) = result("history")["adapters"]
    assert (entry["name"], entry["serves"], entry["source"], entry["quarantined"]) == (
        *("lint", digests[-1]),
        *(None, None),
    )
    assert [(one["digest"], one["id"], one["kept"]) for one in entry["generations"]] == [
        (digest, number, number > 1) for number, digest in enumerate(digests, 1)
    ]
    assert result("history", "lint") == result("history")
    lines = manager("history", "lint").stdout.splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["serves", "kept", "kept", "kept", "pruned"]
    assert "was never served" in refused("history", "docstring", code=4)


def test_history_and_prune_ask_no_server(store: Path) -> None:
    assert result("history") == {"adapters": []}
    assert manager("history").stdout == "no adapter was ever served\n"
    (store / "lint" / ("0" * 12)).mkdir(parents=True)
    assert result("prune") == {"removed": [{"name": "lint", "digest": "0" * 12}]}
    assert manager("prune").stdout == "nothing to remove\n"


@pytest.mark.usefixtures("plugin")
def test_prune_keeps_what_serves_and_the_stated_number_before_it(adapter: MakeAdapter, store: Path) -> None:
    digests = [result("load", "lint", adapter(word))["digest"] for word in ("one", "two", "three")]
    assert result("prune") == {"removed": []}
    assert result("prune", "--keep", "1")["removed"] == [{"name": "lint", "digest": digests[0]}]
    result("unload", "lint")
    assert result("prune")["removed"] == []  # for a rollback
    assert len(result("prune", "--keep", "0")["removed"]) == 2
    assert not (store / "lint").exists()


def test_a_gate_of_the_agents_folder_is_passed_or_what_served_stays(
    plugin: uvicorn.Server, adapter: MakeAdapter, tmp_path: Path
) -> None:
    result("load", "lint", adapter("one"))
    before = served()
    folder = tmp_path / "agents" / "lint"
    folder.mkdir(parents=True)
    (folder / "lint_subagent.yaml").write_text(AGENT)
    (folder / "lint_gate.yaml").write_text(GATED)
    says = refused("load", "lint", adapter("two"), code=5)
    assert "0 of its gate's 1 prompts" in says
    assert 'should call run_linter{"path": "a.py"}, not nothing' in says
    assert served() == before
    plugin.config.app.state.answers.text = (  # type: ignore[union-attr] # it is the app itself
        "<start_function_call>call:run_linter{path:<escape>a.py<escape>}<end_function_call>"
    )
    assert result("load", "lint", adapter("two", "again"))["gate"] == {"passed": 1, "of": 1, "share": 1.0}
    assert "1 of its gate's 1 prompts passed" in manager("load", "lint", adapter("three")).stdout
    assert "nobody" in refused("load", "docstring", adapter("one", "x"), "--agent", "nobody")
    (folder / "lint_gate.yaml").write_text("prompts: 1")
    assert "lint_gate.yaml" in refused("load", "lint", adapter("four"))


def test_the_list_shows_what_is_served_and_what_was_quarantined(
    store: Path, adapter: MakeAdapter, request: pytest.FixtureRequest
) -> None:
    (store / "manifest.json").write_text(
        json.dumps({"version": 1, "next_id": 7, "adapters": {"bad": {"digest": "0" * 12, "history": []}}})
    )
    request.getfixturevalue("plugin")
    digest = result("load", "lint", adapter())["digest"]
    assert result("list")["adapters"] == [{"name": "lint", "digest": digest, "id": 8, "source": None}]
    listed = manager("list").stdout
    assert f"lint  {digest}\nbad  {'0' * 12}  quarantined: {store}/bad/{'0' * 12} cannot be read" in listed
    assert "quarantined: " in manager("history", "bad").stdout


def test_more_adapters_than_fit_twice_are_refused_before_anything_is_copied(
    tmp_path: Path, adapter: MakeAdapter, store: Path
) -> None:
    facts = tmp_path / "vllm.base"
    facts.write_text(facts.read_text().replace("MAX_CPU_LORAS=16", "MAX_CPU_LORAS=1"))
    says = refused("load", "lint", adapter())
    assert "1 adapters need 2 places" in says
    assert "SERVER_MAX_CPU_LORAS" in says
    assert installed(store) == set()


@pytest.mark.usefixtures("store")
def test_a_server_that_does_not_answer_is_told_with_what_to_do(
    adapter: MakeAdapter, tmp_path: Path, store: Path
) -> None:
    says = refused("load", "lint", adapter(), code=6)
    assert "docker logs vllm-gemma" in says
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "vllm.sock"))
    assert str(tmp_path / "vllm.sock") in refused("load", "lint", adapter("two"), code=6)
    (tmp_path / "vllm.waiting").write_text("a token for google/functiongemma-270m-it\n")
    assert "(a token for google/functiongemma-270m-it)" in refused("list", code=6)
    assert {one.name for one in store.iterdir()} == {LOCK}


def test_a_run_outside_the_container_is_told_where_to_run(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(store / "none"))
    assert "docker compose exec vllm-server adapter_manager.py load" in refused("load", "lint", tmp_path)


@pytest.mark.usefixtures("plugin")
def test_bad_input_is_refused(tmp_path: Path, adapter: MakeAdapter) -> None:
    assert "cannot name an adapter" in refused("load", "../lint", tmp_path)
    assert "cannot name an adapter" in refused("load", BASE, adapter())
    assert "is not a directory" in refused("load", "lint", tmp_path / "none")
    assert "no adapter_config.json" in refused("load", "lint", tmp_path / "sources", code=3)
    assert "no whole tar" in refused("load", "lint", "-", code=3)
    assert "COMMIT" in refused("load", "lint", "hf://lab/lint@main")
    assert "usage" in refused("load", "lint", code=2)
    assert "usage" in refused("prune", "--keep", "-1", code=2)
    assert "usage" in refused(code=2)


@pytest.mark.usefixtures("plugin")
def test_a_second_manager_waits_and_says_who_holds_the_lock(adapter: MakeAdapter, store: Path) -> None:
    path = str(adapter())
    with lock.hold(store / LOCK, "adapter_manager.py load docstring", print):
        second = subprocess.Popen([sys.executable, COMMAND, "load", "lint", path], stderr=subprocess.PIPE)
        assert isinstance(second.stderr, io.BufferedReader)
        line = second.stderr.readline().decode()
    with second:
        assert "held by adapter_manager.py load docstring (process" in line
        assert second.wait() == 0


@pytest.mark.usefixtures("plugin")
def test_two_loads_at_once_are_both_served_and_no_id_is_given_twice(
    adapter: MakeAdapter, store: Path
) -> None:
    words = [[sys.executable, str(COMMAND), "load", name, str(adapter(name, name))] for name in ("a", "b")]
    both = [subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in words]
    assert [one.wait() for one in both] == [0, 0]
    assert served().keys() == {"a", "b"}
    entries = Manifest.read(store).adapters.values()
    assert sorted(one.id for entry in entries for one in entry.generations) == [1, 2]


@pytest.mark.parametrize("command", [[], ["history"]])
@pytest.mark.usefixtures("store")
def test_the_command_starts_without_anything_heavy(command: list[str]) -> None:
    code = (
        f"import runpy, sys; module = runpy.run_path({str(COMMAND)!r}); "
        f"module['main']({command}) if {command} else None; print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=SERVER)
    heavy = {b"fastapi", b"pydantic", b"torch", b"vllm", b"httpx", b"numpy", b"regex", b"huggingface_hub"}
    assert not heavy & set(done.stdout.split())


def test_every_exit_code_is_told(store: Path) -> None:
    assert store.is_dir()
    usage = manager("--help").stdout
    family = [one for one in vars(errors).values() if isinstance(one, type)]
    codes = {one.exit_code for one in family if issubclass(one, errors.AdapterError)}
    assert codes == {1, 3, 4, 5, 6, 7, 8}
    assert all(f"{code} " in usage.rpartition("Exit codes")[2] for code in codes | {0, 2})
    assert os.access(COMMAND, os.X_OK)
