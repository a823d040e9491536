"""The plugin's logic with stand-ins for vLLM's engine and served models (tests/e2e has the real ones)."""

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from starlette.datastructures import State

from function_gemma.adapters.errors import (
    AdapterError,
    EngineError,
    GateError,
    NotServedError,
    RefusedError,
    StoreError,
)
from function_gemma.adapters.files import FILES
from function_gemma.adapters.manifest import Manifest, edit
from function_gemma.adapters.source import from_directory
from function_gemma.adapters.store import Store, digest_of
from function_gemma.vllm_plugin import AdaptersPlugin
from function_gemma.vllm_plugin.holder import Holder, Report
from function_gemma.vllm_plugin.trial import Passed, Trial
from function_gemma.vllm_plugin.usage import LoRARequests, Usage
from unit.stand_ins import BASE, Answers, FakeEngine, FakeModels, FakeRequest, make_app

if TYPE_CHECKING:
    from function_gemma.vllm_plugin.engine import Engine, Models

MakeAdapter = Callable[..., Path]
MakeBody = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("base")


@dataclass
class FakeTrial:
    """Lets all pass but as told; notes what was served meanwhile."""

    models: FakeModels
    proof: Exception | None = None
    gate: Exception | None = None
    seen: list[dict[str, str]] = field(default_factory=list)
    listed: list[list[str]] = field(default_factory=list)

    async def prove(self, model: str) -> None:
        assert self.models.lora_requests[model].lora_name == model
        self.seen.append({name: one.lora_name for name, one in self.models.lora_requests.items()})
        self.listed.append([card.id for card in (await self.models.show_available_models()).data])
        if self.proof:
            raise self.proof

    async def pass_gate(self, model: str) -> Passed | None:
        if self.gate:
            raise self.gate
        return Passed(1, 1, 1.0) if model else None


@dataclass
class Server:
    """One run of a server on a store that outlives it."""

    store: Store
    engine: FakeEngine
    models: FakeModels
    holder: Holder
    usage: Usage
    trial: FakeTrial

    def install(self, path: Path, name: str = "lint") -> str:
        return str(self.store.generation(name, install(self.store, path, name)))

    async def load(self, path: Path, name: str = "lint", source: str | None = None) -> Report:
        return await self.holder.load(name, self.install(path, name), source, cast("Trial", self.trial))

    def serving(self) -> dict[str, str]:
        return {name: request.lora_name for name, request in self.models.lora_requests.items()}

    def digests(self) -> dict[str, str]:
        return {one.name: one.digest for one, _ in self.holder.adapters()}


def install(store: Store, path: Path, name: str) -> str:
    digest = digest_of(path)
    with store.staging() as area:
        store.copy(from_directory(path), area)
        store.install(name, digest, area)
    return digest


Boot = Callable[[], Awaitable[Server]]


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    """Start a server on the same store each time."""
    root = tmp_path / "store"
    root.mkdir()

    async def start() -> Server:
        store, engine, models, usage = Store(root), FakeEngine(), FakeModels(), Usage("r1", BASE, "main")
        holder = Holder(store, cast("Engine", engine), cast("Models", models), FakeRequest, usage)
        await holder.start()
        return Server(store, engine, models, holder, usage, FakeTrial(models))

    return start


def held(path: Path) -> bool:
    """Whether a process keeps a generation from being pruned."""
    return Store(path.parents[1]).prune({}, [path.parent.name]) == []


async def test_a_name_serves_the_loaded_generation_under_its_inner_name(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    report = await server.load(adapter("one"))
    assert report.changed
    assert {"admission", "add_lora", "proof", "gate", "move"} == set(report.seconds)
    ((served, source),) = server.holder.adapters()
    assert source is None
    assert server.serving() == {"lint": f"lint@{served.digest}"}
    assert server.engine.loaded == {1: f"lint@{served.digest}"}


async def test_replies_and_the_list_of_models_show_public_names(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.models.lora_requests["lint"]
    with server.usage.of(server.usage.find(before)):
        await server.load(adapter("two"))
        for request in (before, server.models.lora_requests["lint"]):  # a reply may outlive its generation
            assert server.models.model_name(request) == "lint"
    assert server.models.model_name() == BASE
    assert [card.id for card in (await server.models.show_available_models()).data] == [BASE, "lint"]


async def test_a_generation_on_trial_is_not_listed_and_the_former_serves_meanwhile(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.serving()
    await server.load(adapter("two"))
    assert server.trial.seen[1].items() > before.items()
    assert server.trial.listed == [[BASE], [BASE, "lint"]]
    assert list(server.serving()) == ["lint"]


async def test_every_generation_gets_an_id_of_its_own_over_restarts(boot: Boot, adapter: MakeAdapter) -> None:
    ids: list[int] = []
    for word in ("one", "two", "three"):
        server = await boot()
        await server.load(adapter(word))
        ids += [request.lora_int_id for request in server.engine.added]
    assert ids == sorted(set(ids))
    assert Manifest.read(server.store.root).adapters["lint"].generations[-1].id == ids[-1]


async def test_ids_do_not_clash_with_those_of_lora_modules(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    server.models.lora_requests["static"] = FakeRequest("static", 5, "")
    engine, models = cast("Engine", server.engine), cast("Models", server.models)
    holder = Holder(server.store, engine, models, FakeRequest, server.usage)
    await holder.load("lint", server.install(adapter()), None, cast("Trial", server.trial))
    assert [request.lora_int_id for request in server.engine.added] == [6]


async def test_a_generation_that_serves_again_while_it_is_in_use_keeps_its_request(
    boot: Boot, adapter: MakeAdapter
) -> None:
    # One inner name with two ids would end the engine.
    server = await boot()
    one, two = adapter("one"), adapter("two")
    await server.load(one)
    first = server.models.lora_requests["lint"]
    with server.usage.of(server.usage.find(first)):
        await server.load(two)
        await server.load(one)
        assert server.models.lora_requests["lint"] is first
        await server.holder.unload("lint")
        await server.load(one)
        assert server.models.lora_requests["lint"] is first


async def test_a_generation_in_use_stays_loaded_with_its_files_until_its_last_request_ends(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    path = Path(server.install(adapter("one")))
    await server.load(adapter("one", "again"))
    first = server.usage.find(server.models.lora_requests["lint"])
    with server.usage.of(first):
        await server.load(adapter("two"))
        assert sorted(server.engine.loaded) == [1, 2]
        assert held(path)
    await asyncio.gather(*server.holder._retiring)
    assert list(server.engine.loaded) == [2]
    assert not held(path)


async def test_what_is_served_already_is_not_loaded_again(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter())
    manifest = Manifest.read(server.store.root)
    assert not (await server.load(adapter(name="copy"))).changed
    assert len(server.engine.added) == 1
    assert Manifest.read(server.store.root) == manifest


async def test_the_same_content_from_the_hub_is_remembered_with_its_address(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    await server.load(adapter())
    address = f"hf://lab/lint@{40 * '0'}"
    assert not (await server.load(adapter(name="copy"), source=address)).changed
    assert [source for _, source in server.holder.adapters()] == [address]
    assert len(Manifest.read(server.store.root).adapters["lint"].generations) == 1


async def test_the_old_generation_serves_until_the_new_one_is_in(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.serving()
    seen: list[dict[str, str]] = []

    async def look() -> None:
        seen.append(server.serving())

    server.engine.on_add = look
    await server.load(adapter("two"))
    assert seen == [before]
    assert server.serving() != before


async def test_loads_at_the_same_time_go_one_after_the_other(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    paths = [(name, server.install(adapter(name), name)) for name in ("lint", "docstring", "test")]
    trial = cast("Trial", server.trial)
    await asyncio.gather(*(server.holder.load(name, path, None, trial) for name, path in paths))
    assert sorted(server.engine.loaded) == [1, 2, 3]
    assert set(Manifest.read(server.store.root).adapters) == {"lint", "docstring", "test"}


@pytest.mark.parametrize("step", ["engine", "proof", "gate", "manifest", "admission"])
async def test_a_load_that_fails_changes_nothing_and_its_id_is_spent(
    boot: Boot, adapter: MakeAdapter, step: str
) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before, entries = server.serving(), Manifest.read(server.store.root).adapters
    path = Path(server.install(adapter("bad" if step == "engine" else "two")))
    new = server.store.root / "manifest.json.new"
    expected: type[AdapterError] = EngineError
    if step == "proof":
        server.trial.proof = EngineError("no answer")
    if step == "gate":
        server.trial.gate, expected = GateError("too few"), GateError
    if step == "manifest":

        async def fill() -> None:  # after the id was reserved
            new.mkdir()

        server.engine.on_add, expected = fill, StoreError
    if step == "admission":
        (path / FILES[0]).chmod(0o644)
        (path / FILES[0]).write_text("{}")
        expected = RefusedError
    with pytest.raises(expected):
        await server.holder.load("lint", str(path), None, cast("Trial", server.trial))
    assert server.serving() == before
    assert Manifest.read(server.store.root).adapters == entries
    assert list(server.engine.loaded) == [1]
    assert not held(path)
    server.trial.proof = server.trial.gate = server.engine.on_add = None
    if new.exists():
        new.rmdir()
    await server.load(adapter("three"))
    assert server.engine.added[-1].lora_int_id == 3


async def test_an_unload_that_cannot_be_written_leaves_what_serves(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.serving()
    (server.store.root / "manifest.json.new").mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        await server.holder.unload("lint")
    assert server.serving() == before


async def test_a_name_of_the_base_model_or_a_path_outside_is_refused(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    trial = cast("Trial", server.trial)
    with pytest.raises(AdapterError, match="not an installed generation"):
        await server.holder.load("lint", str(adapter()), None, trial)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        await server.holder.load(BASE, "/x", None, trial)
    server.models.is_base_model = lambda model_name: model_name == "lint"  # type: ignore[method-assign] # a stand-in
    with pytest.raises(AdapterError, match="base model's name"):
        await server.load(adapter("two"))
    assert server.engine.added == []


async def test_a_restart_serves_what_was_served(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    await server.load(adapter("two"))
    await server.load(adapter("three"), "docstring")
    again = await boot()
    assert again.serving() == server.serving()
    (lint,) = (one for one in again.engine.added if one.lora_name.startswith("lint"))
    assert lint.lora_int_id == Manifest.read(again.store.root).adapters["lint"].generations[-1].id == 5


async def test_the_manifest_says_what_served_before(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    await server.load(adapter("two"))
    old, new = (request.lora_name.removeprefix("lint@") for request in server.engine.added)
    entry = Manifest.read(server.store.root).adapters["lint"]
    assert (entry.serves, entry.before) == (new, [old])


async def test_what_was_unloaded_is_not_served_after_a_restart_and_its_history_stays(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    await server.load(adapter())
    digest = await server.holder.unload("lint")
    assert server.serving() == {}
    assert server.engine.loaded == {}
    assert (await boot()).serving() == {}
    assert Manifest.read(server.store.root).adapters["lint"].before == [digest]
    with pytest.raises(NotServedError, match="no adapter 'lint' is served"):
        await server.holder.unload("lint")


def quarantined() -> dict[str, str]:
    """Adapter and reason of each series of the metric."""
    metrics = (one for one in REGISTRY.collect() if one.name == "function_gemma_quarantined")
    return {one.labels["adapter"]: one.labels["reason"] for metric in metrics for one in metric.samples}


async def test_bad_adapters_are_quarantined_with_their_reason_and_the_others_served(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    with edit(server.store.root) as manifest:
        for name, word in (("bad", "bad"), ("changed", "one"), ("gone", "two"), ("lint", "three")):
            manifest.serve(name, install(server.store, adapter(word, name), name), 1, None)
        manifest.serve("Not-Plain", "0" * 12, 1, None)
    changed = server.store.generation("changed", str(manifest.adapters["changed"].serves)) / FILES[1]
    changed.chmod(0o644)
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x01")
    (server.store.generation("gone", str(manifest.adapters["gone"].serves)) / FILES[0]).unlink()
    again = await boot()
    assert list(again.digests()) == ["lint"]
    reasons = {name: reason for name, _, reason in again.holder.quarantined()}
    assert list(reasons) == ["Not-Plain", "bad", "changed", "gone"]
    assert "Worker failed" in reasons["bad"]
    assert "was changed" in reasons["changed"]
    assert "no adapter_config.json" in reasons["gone"]
    assert quarantined() == reasons
    # Each is tried again at the next start, and a load or an unload ends it.
    mended = Store(again.store.root)
    assert install(mended, adapter("one", "same"), "changed") == manifest.adapters["changed"].serves
    third = await boot()
    assert list(third.digests()) == ["changed", "lint"]
    await third.load(adapter("two", "same"), "gone")
    await third.holder.unload("bad")
    await third.holder.unload("Not-Plain")
    assert third.holder.quarantined() == []
    assert quarantined() == {}


async def test_a_start_raises_nothing_whatever_is_wrong(
    boot: Boot, adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await boot()
    await server.load(adapter())
    monkeypatch.setenv("SERVER_SOCKET", "/nowhere/vllm.sock")
    again = await boot()
    assert again.serving() == {}
    ((_, _, reason),) = again.holder.quarantined()
    assert "docker logs vllm-gemma" in reason


async def test_a_damaged_manifest_serves_the_base_and_is_left_alone(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    path = server.store.root / "manifest.json"
    path.write_text("{")
    again = await boot()
    assert again.serving() == {}
    for change in (again.load(adapter()), again.holder.unload("lint")):
        with pytest.raises(StoreError, match="restore it"):
            await change
    assert path.read_text() == "{"


# ── The routes, the trial and the counters, on an app that looks models up as vLLM does ────────────────


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An app with the plugin and stand-ins for vLLM's routes of completions."""
    root = tmp_path / "store"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(root))
    monkeypatch.setenv("SERVER_RELEASE", "r1")
    monkeypatch.setenv("SERVER_MODEL", BASE)
    return make_app()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)


@pytest.fixture
def body(adapter: MakeAdapter, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Install an adapter; return the body of its load."""

    def make(word: str = "one", name: str = "lint", **more: object) -> dict[str, Any]:
        store = Store(tmp_path / "store")
        path = store.generation(name, install(store, adapter(word, name), name))
        return {"lora_name": name, "lora_path": str(path), **more}

    return make


def count(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def test_the_routes_load_list_and_unload(client: TestClient, body: MakeBody) -> None:
    load = body(source=f"hf://lab/lint@{40 * '0'}")
    digest = Path(load["lora_path"]).name
    answer = client.post("/v1/load_lora_adapter", json=load).json()
    assert (answer["name"], answer["changed"], answer["gate"]) == ("lint", True, None)
    assert client.post("/v1/load_lora_adapter", json=load).json()["changed"] is False
    assert client.get("/v1/lora_adapters").json() == {
        "release": "r1",
        "base": BASE,
        "adapters": [{"name": "lint", "digest": digest, "id": 1, "source": load["source"]}],
        "quarantined": [],
    }
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "lint"})
    assert unloaded.json() == {"name": "lint", "previous": digest, "changed": True}
    assert client.get("/v1/lora_adapters").json()["adapters"] == []


def test_the_routes_refuse_in_openais_form(client: TestClient, body: MakeBody, tmp_path: Path) -> None:
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "lint", "lora_path": "/nowhere"})
    assert answer.status_code == answer.json()["error"]["code"] == 400
    assert "adapter_manager.py load lint PATH" in answer.json()["error"]["message"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "lint"}).status_code == 404
    load = body()
    config = Path(load["lora_path"]) / FILES[0]
    config.chmod(0o644)
    config.write_text("{}")
    refused = client.post("/v1/load_lora_adapter", json=load)
    assert (refused.status_code, refused.json()["error"]["type"]) == (422, "RefusedError")
    assert client.post("/v1/load_lora_adapter", json=body("bad")).status_code == 502
    (tmp_path / "store" / "manifest.json").write_text("{")
    assert client.get("/v1/lora_adapters").status_code == 500


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (Answers(tokens=()), "answers with nothing"),
        (Answers(tokens=(0, 0, 0)), "answers with nothing"),
        (Answers(status=500), "answers with HTTP 500"),
    ],
)
def test_a_generation_that_does_not_answer_is_not_served(
    app: FastAPI, client: TestClient, body: MakeBody, answers: Answers, says: str
) -> None:
    app.state.answers = answers
    answer = client.post("/v1/load_lora_adapter", json=body())
    assert answer.status_code == 502
    assert says in answer.json()["error"]["message"]
    assert client.get("/v1/lora_adapters").json()["adapters"] == []
    assert app.state.engine.loaded == {}


CALL = "<start_function_call>call:run_linter{path:<escape>a.py<escape>}<end_function_call>"


def gate(share: float, *paths: str) -> dict[str, Any]:
    prompts = [
        {
            "messages": [{"role": "user", "content": path}],
            "tools": [],
            "calls": [{"name": "run_linter", "arguments": {"path": path}}],
        }
        for path in paths
    ]
    return {"share": share, "prompts": prompts}


def test_a_gate_is_passed_by_the_stated_share_of_its_prompts(
    app: FastAPI, client: TestClient, body: MakeBody
) -> None:
    app.state.answers.text = CALL
    passed = client.post("/v1/load_lora_adapter", json=body(gate=gate(0.5, "a.py", "b.py")))
    assert passed.json()["gate"] == {"passed": 1, "of": 2, "share": 0.5}
    failed = client.post("/v1/load_lora_adapter", json=body("two", gate=gate(0.6, "a.py", "b.py")))
    assert failed.status_code == 412
    message = failed.json()["error"]["message"]
    assert "1 of its gate's 2 prompts" in message
    assert '"b.py" should call run_linter{"path": "b.py"}, not run_linter{"path": "a.py"}' in message
    app.state.answers.text = CALL[:-30]
    unread = client.post("/v1/load_lora_adapter", json=body("three", gate=gate(1, "a.py")))
    assert "a call that cannot be read" in unread.json()["error"]["message"]


def test_every_reply_names_its_maker_and_is_counted(client: TestClient, body: MakeBody) -> None:
    load = body()
    client.post("/v1/load_lora_adapter", json=load)
    maker = f"r1/lint@{Path(load['lora_path']).name}"
    before = {
        "requests": count("function_gemma_requests_total", adapter="lint", status="200"),
        "read": count("function_gemma_tokens_total", adapter="lint", kind="prompt"),
        "written": count("function_gemma_tokens_total", adapter="lint", kind="generation"),
        "seconds": count("function_gemma_request_seconds_total", adapter="lint"),
    }
    for stream in (False, True):
        answer = client.post("/v1/chat/completions", json={"model": "lint", "stream": stream})
        assert answer.headers["x-served-by"] == maker
    assert client.post("/v1/completions", json={"model": BASE}).headers["x-served-by"] == f"r1/{BASE}@main"
    assert client.post("/v1/completions", json={"model": "nobody"}).headers["x-served-by"] == "r1"
    assert count("function_gemma_requests_total", adapter="lint", status="200") == before["requests"] + 2
    assert count("function_gemma_tokens_total", adapter="lint", kind="prompt") == before["read"] + 4
    assert count("function_gemma_tokens_total", adapter="lint", kind="generation") == before["written"] + 6
    assert count("function_gemma_request_seconds_total", adapter="lint") > before["seconds"]
    assert "nobody" not in client.get("/gateway/metrics").text


async def test_a_request_that_runs_finishes_on_its_generation(app: FastAPI, body: MakeBody) -> None:
    engine = app.state.engine
    first, second = body("one"), body("two")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://plugin") as client:
        await client.post("/v1/load_lora_adapter", json=first)
        holder = app.state.adapter_holder
        engine.going.clear()
        table = app.state.openai_serving_models.lora_requests
        assert isinstance(table, LoRARequests)
        asking = asyncio.create_task(client.post("/v1/completions", json={"model": "lint"}))
        await engine.asked.wait()
        added = asyncio.Event()

        async def note() -> None:
            added.set()

        engine.on_add = note
        loading = asyncio.create_task(client.post("/v1/load_lora_adapter", json=second))
        await added.wait()
        engine.going.set()
        answer, loaded = await asking, await loading
        assert loaded.status_code == 200
        assert answer.headers["x-served-by"].endswith(Path(first["lora_path"]).name)
        await asyncio.gather(*holder._retiring)
        assert list(engine.loaded.values()) == [f"lint@{Path(second['lora_path']).name}"]


async def test_a_caller_who_hangs_up_is_counted_and_leaves_no_use(app: FastAPI, body: MakeBody) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://plugin") as client:
        await client.post("/v1/load_lora_adapter", json=body())
        before = count("function_gemma_requests_total", adapter="lint", status="499")
        app.state.engine.going.clear()
        asking = asyncio.create_task(client.post("/v1/completions", json={"model": "lint"}))
        (one,) = app.state.adapter_usage.loaded.values()
        await app.state.engine.asked.wait()
        assert one.uses == 2  # the HTTP request's and the engine's
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert one.uses == 0
        assert count("function_gemma_requests_total", adapter="lint", status="499") == before + 1


def test_metrics_leave_out_what_grows_without_bound(client: TestClient) -> None:
    from prometheus_client import Gauge  # noqa: PLC0415 - registers itself

    gauge = Gauge("vllm:lora_requests_info", "as vLLM has it", ["running"])
    try:
        gauge.labels("lint@0").set(1)
        text = client.get("/gateway/metrics").text
    finally:
        REGISTRY.unregister(gauge)
    assert "function_gemma_requests_total" in text
    assert "lora_requests_info" not in text


def test_ready_follows_the_engine(client: TestClient, app: FastAPI) -> None:
    assert client.get("/ready").status_code == 200
    app.state.engine.dead = True
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reason": "engine is dead"})


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("setting", ["unset VLLM_ALLOW_RUNTIME_LORA_UPDATING", "--api-server-count 1"])
def test_where_ids_would_clash_nothing_is_loaded_and_the_base_is_served(
    body: MakeBody, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    servers = 2 if "count" in setting else 1
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0" if servers > 1 else "True")
    client = TestClient(make_app(servers))
    answer = client.post("/v1/load_lora_adapter", json=body())
    assert answer.status_code == 400
    assert setting in answer.json()["error"]["message"]
    assert client.get("/ready").status_code == 200


def test_a_plugin_that_cannot_start_says_so_and_raises_nothing(app: FastAPI, client: TestClient) -> None:
    engine = cast("Engine", app.state.engine)
    state = State({"adapter_usage": app.state.adapter_usage})  # a vLLM without served models
    asyncio.run(AdaptersPlugin().init_state(engine, state, Namespace(api_server_count=1)))
    assert state.adapter_holder is None
    app.state.adapter_holder = None
    assert "docker logs vllm-gemma" in client.get("/ready").json()["reason"]
    assert client.get("/v1/lora_adapters").status_code == 502
