"""Several vLLMs, one for each GPU, with one store and one manifest: they serve the same, or what they served.

tests/matrix/test_several_gpus.py has the real ones behind the gateway.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import adapter_manager
from function_gemma.adapters.errors import NoAnswerError
from function_gemma.adapters.manifest import Manifest
from unit.stand_ins import FakeEngine, FakeModels, listening, server
from unit.test_adapter_faults import KILLED, arm, die, end, fork, load, plugin, whole
from unit.test_adapter_manager import AGENT, GATED, installed, manager, refused, result

MakeAdapter = Callable[..., Path]


@dataclass
class Server:
    """One of the vLLMs."""

    address: str
    running: uvicorn.Server

    @property
    def state(self) -> Any:  # noqa: ANN401 - Starlette's, which holds anything
        return self.running.config.app.state  # type: ignore[union-attr] # it is the app itself

    @property
    def engine(self) -> FakeEngine:
        found: FakeEngine = self.state.engine
        return found

    def serving(self) -> dict[str, str]:
        """The inner name of what each name serves."""
        models: FakeModels = self.state.openai_serving_models
        return {name: request.lora_name for name, request in models.lora_requests.items()}


@pytest.fixture
def addresses(store: Path) -> list[str]:
    """The sockets of the vLLMs."""
    assert store.is_dir()
    first = os.environ["SERVER_SOCKET"]
    return [first, first.replace("vllm.sock", "vllm-1.sock")]


@pytest.fixture
def both(addresses: list[str]) -> Iterator[list[Server]]:
    """Two vLLMs that listen."""
    one, two = (Server(address, server(address)) for address in addresses)
    with listening(one.running), listening(two.running):
        yield [one, two]


def served(address: str) -> dict[str, str]:
    listed = adapter_manager.call("GET", "/v1/lora_adapters", address=address)["adapters"]
    return {one["name"]: one["digest"] for one in listed}


def test_a_load_a_rollback_and_an_unload_reach_every_vllm(
    both: list[Server], adapter: MakeAdapter, store: Path
) -> None:
    one = result("load", "lint", adapter("one"))["digest"]
    two = result("load", "lint", adapter("two"))
    assert (two["previous"], two["changed"]) == (one, True)
    assert two["seconds"].keys() == {"admission", "add_lora", "proof", "gate", "move"}
    assert [served(server.address) for server in both] == [{"lint": two["digest"]}] * 2
    assert not result("load", "lint", adapter("two", "again"))["changed"]
    assert result("rollback", "lint")["digest"] == one
    assert [server.serving() for server in both] == [{"lint": f"lint@{one}"}] * 2
    assert [list(server.engine.loaded.values()) for server in both] == [[f"lint@{one}"]] * 2
    assert result("unload", "lint")["previous"] == one
    assert [server.serving() for server in both] == [{}, {}]
    assert "no adapter 'lint' is served" in refused("unload", "lint", code=4)
    assert Manifest.read(store).adapters["lint"].serves is None


def test_an_id_is_never_given_twice_whichever_vllm_asks(both: list[Server], adapter: MakeAdapter) -> None:
    for word in ("one", "two", "one"):
        result("load", "lint", adapter(word))
    ids = [request.lora_int_id for server in both for request in server.engine.added]
    assert len(ids) == len(set(ids)) == 6


def test_no_name_moves_before_every_vllm_has_proven_the_new_generation(
    both: list[Server], adapter: MakeAdapter
) -> None:
    one = result("load", "lint", adapter("one"))["digest"]
    seen: list[dict[str, str]] = []

    async def look() -> None:
        seen.extend(server.serving() for server in both)

    for one_of_both in both:
        one_of_both.engine.on_add = look
    result("load", "lint", adapter("two"))
    assert seen == [{"lint": f"lint@{one}"}] * 4


@pytest.mark.parametrize("step", ["engine", "proof"])
def test_a_failure_on_the_second_leaves_what_served_on_both_and_nothing_of_the_new(
    both: list[Server], adapter: MakeAdapter, store: Path, step: str
) -> None:
    one = result("load", "lint", adapter("one"))["digest"]

    async def fail() -> None:
        raise RuntimeError("no memory")

    if step == "engine":
        both[1].engine.on_add = fail
    else:
        both[1].state.answers.tokens = ()
    refused("load", "lint", adapter("two"), code=8)
    assert [server.serving() for server in both] == [{"lint": f"lint@{one}"}] * 2
    assert list(both[0].engine.loaded.values()) == [f"lint@{one}"]
    assert installed(store) == {one}
    both[1].engine.on_add, both[1].state.answers.tokens = None, (7,)
    two = result("load", "lint", adapter("two", "again"))["digest"]
    assert [served(server.address) for server in both] == [{"lint": two}] * 2


def test_a_gate_is_asked_once(both: list[Server], adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = tmp_path / "agents" / "lint"
    folder.mkdir(parents=True)
    (folder / "lint_subagent.yaml").write_text(AGENT)
    (folder / "lint_gate.yaml").write_text(GATED)
    # The second would not pass it.
    both[
        0
    ].state.answers.text = (
        "<start_function_call>call:run_linter{path:<escape>a.py<escape>}<end_function_call>"
    )
    assert result("load", "lint", adapter())["gate"] == {"passed": 1, "of": 1, "share": 1.0}
    assert both[0].serving() == both[1].serving()


def test_a_gate_that_is_not_passed_leaves_nothing_prepared_for_the_next_load(
    both: list[Server], adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = tmp_path / "agents" / "lint"
    folder.mkdir(parents=True)
    (folder / "lint_subagent.yaml").write_text(AGENT)
    (folder / "lint_gate.yaml").write_text(GATED)
    for _ in range(2):
        assert "0 of its gate's 1 prompts" in refused("load", "lint", adapter(), code=5)
    assert [server.engine.loaded for server in both] == [{}, {}]


@pytest.mark.parametrize("change", ["load", "unload"])
def test_one_that_was_starting_meanwhile_follows_the_manifest_before_it_is_ready(
    addresses: list[str], adapter: MakeAdapter, change: str
) -> None:
    with listening(server(addresses[0])):
        one = result("load", "lint", adapter("one"))["digest"]
        late = Server(addresses[1], server(addresses[1]))  # it has loaded what the manifest names
        assert late.serving() == {"lint": f"lint@{one}"}
        result(*(("load", "lint", adapter("two")) if change == "load" else ("unload", "lint")))
        with listening(late.running):
            adapter_manager.call("GET", "/ready", address=addresses[1])
            assert served(addresses[1]) == served(addresses[0]) != {"lint": one}
            assert len(late.engine.loaded) == len(served(addresses[1]))


def test_a_listing_shows_a_vllm_that_serves_something_else_until_it_has_followed(
    both: list[Server], adapter: MakeAdapter, store: Path
) -> None:
    one, two = (result("load", "lint", adapter(word))["digest"] for word in ("one", "two"))
    assert result("list")["differs"] == []
    body = {"lora_name": "lint", "lora_path": str(store / "lint" / one)}
    adapter_manager.call("POST", "/v1/load_lora_adapter", body, both[1].address)
    assert result("list")["differs"] == [{"server": "vllm-gemma-1", "name": "lint", "digest": one}]
    assert f"lint  {two}\nvllm-gemma-1 differs: lint  {one}" in manager("list").stdout
    adapter_manager.call("GET", "/ready", address=both[0].address)
    assert result("list")["differs"] == []
    assert served(both[0].address) == {"lint": one}


def test_what_a_follower_cannot_load_is_told_and_tried_once_and_what_it_served_stays(
    both: list[Server], adapter: MakeAdapter, store: Path
) -> None:
    one, two = (result("load", "lint", adapter(word))["digest"] for word in ("one", "two"))

    async def fail() -> None:
        raise RuntimeError("no memory")

    both[1].engine.on_add = fail
    body = {"lora_name": "lint", "lora_path": str(store / "lint" / one)}
    adapter_manager.call("POST", "/v1/load_lora_adapter", body, both[0].address)
    tries = len(both[1].engine.added)
    for _ in range(3):
        adapter_manager.call("GET", "/ready", address=both[1].address)
    assert len(both[1].engine.added) == tries + 1
    listed = manager("list").stdout
    assert "quarantined: vLLM refuses 'lint'" in listed
    assert f"vllm-gemma-1 differs: lint  {two}" in listed
    both[1].engine.on_add = None
    assert result("load", "lint", adapter("one", "again"))["changed"]
    assert (result("list")["differs"], result("list")["quarantined"]) == ([], [])
    assert result("history")["adapters"][0]["quarantined"] is None


def test_a_vllm_is_ready_while_another_changes_the_manifest_and_it_loads_itself(
    both: list[Server], adapter: MakeAdapter, store: Path
) -> None:
    # The gateway would take it for away for as long as a gate lasts.
    async def look() -> None:
        with Manifest.read(store).path.open("a") as file:
            file.write("\n")
        await asyncio.wait_for(both[0].state.adapter_holder.follow(), 5)

    both[0].engine.on_add = look
    assert result("load", "lint", adapter())["changed"]


def test_a_socket_that_an_earlier_vllm_left_is_nobodys(addresses: list[str], adapter: MakeAdapter) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(addresses[1])
    with listening(server(addresses[0])):
        assert result("load", "lint", adapter())["changed"]
        assert result("list")["differs"] == []


def test_the_container_of_one_that_does_not_answer_is_named(
    addresses: list[str], adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_SOCKET", addresses[1])
    Path(addresses[0]).with_suffix(".base").rename(Path(addresses[1]).with_suffix(".base"))
    assert "docker logs vllm-gemma-1" in refused("load", "lint", adapter(), code=6)


def die_at(step: int) -> None:
    """From now on kill this process before its `step`-th connection. There is no way back."""
    seen = 0

    def hook(event: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "socket.connect":
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_manager_killed_before_any_of_its_words_to_a_vllm_is_completed_by_one_more_run(
    addresses: list[str], adapter: MakeAdapter, store: Path
) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin(address=addresses[0]), plugin(address=addresses[1]):
        digests = [load(path)["digest"] for path in paths]
        step, killed = 0, KILLED
        while killed == KILLED:
            step += 1
            path, digest = paths[(step + 1) % 2], digests[(step + 1) % 2]
            before = digests[step % 2]

            def run(path: Path = path, step: int = step) -> int:
                die_at(step)
                return 0 if load(path) else 1

            adapter_manager.prune(0)
            killed = end(fork(run))
            assert {served(address)["lint"] for address in addresses} <= {before, digest}
            load(path)
            assert [served(address)["lint"] for address in addresses] == [digest] * 2
            assert whole(store)
        assert killed == 0
        assert step > 10


def test_a_vllm_killed_at_any_step_of_a_load_is_completed_by_one_more_run(
    addresses: list[str], adapter: MakeAdapter, store: Path
) -> None:
    paths = [adapter("one"), adapter("two")]
    with plugin(address=addresses[0]):
        with plugin(address=addresses[1]):
            digests = [load(path)["digest"] for path in paths]
        step, died = 0, True
        while died:
            step += 1
            path, digest = paths[(step + 1) % 2], digests[(step + 1) % 2]
            before = digests[step % 2]
            with plugin(lambda step=step: arm(step, store, die), addresses[1]):  # type: ignore[misc] # a default binds it
                try:
                    load(path)
                    died = False
                except NoAnswerError:
                    assert served(addresses[0]) == {"lint": before}
            with plugin(address=addresses[1]):
                assert {served(address)["lint"] for address in addresses} <= {before, digest}
                load(path)
                assert [served(address)["lint"] for address in addresses] == [digest] * 2
                assert whole(store)
        assert step > 3
