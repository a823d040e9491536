"""The plugin's logic with stand-ins for vLLM's engine and served models (tests/e2e has the real ones)."""

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import State

from function_gemma.adapters.errors import AdapterError, NotServedError, StoreError
from function_gemma.adapters.manifest import Entry, Manifest
from function_gemma.adapters.source import from_directory
from function_gemma.adapters.store import FILES, Store
from function_gemma.vllm_plugin import AdaptersPlugin
from function_gemma.vllm_plugin.holder import Engine, Holder, LoRA, ModelList, Models

MakeAdapter = Callable[..., Path]
BASE = "google/functiongemma-270m-it"


@dataclass
class FakeRequest:
    """LoRARequest's three fields."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class FakeEngine:
    """Loads all but those whose weights say "bad"; told, it is dead."""

    loaded: dict[int, str] = field(default_factory=dict)
    added: list[FakeRequest] = field(default_factory=list)
    dead: bool = False
    on_add: Callable[[], Awaitable[None]] | None = None

    async def add_lora(self, lora_request: LoRA) -> bool:
        request = cast("FakeRequest", lora_request)
        self.added.append(request)
        self.loaded[request.lora_int_id] = request.lora_name  # vLLM registers an id even where it fails
        if self.on_add:
            await self.on_add()
        if (Path(request.lora_path) / FILES[1]).read_text().startswith("bad"):
            raise RuntimeError("Worker failed")
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self.loaded.pop(lora_id, None) is not None

    async def check_health(self) -> None:
        if self.dead:
            raise RuntimeError("engine is dead")


class FakeModels:
    """Shows the inner names, as vLLM does by itself."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, LoRA] = {}

    def is_base_model(self, model_name: str) -> bool:
        return model_name == BASE

    def model_name(self, lora_request: LoRA | None = None) -> str:
        return lora_request.lora_name if lora_request else BASE

    async def show_available_models(self) -> ModelList:
        names = [BASE, *(request.lora_name for request in self.lora_requests.values())]
        return cast("ModelList", SimpleNamespace(data=[SimpleNamespace(id=name) for name in names]))


@dataclass
class Server:
    """One run of a server on a store that outlives it."""

    store: Store
    engine: FakeEngine
    models: FakeModels
    holder: Holder

    def install(self, path: Path, name: str = "lint") -> str:
        return str(self.store.generation(name, install(self.store, path, name)))

    async def load(self, path: Path, name: str = "lint") -> bool:
        return await self.holder.load(name, self.install(path, name))

    def serving(self) -> dict[str, str]:
        return {name: request.lora_name for name, request in self.models.lora_requests.items()}


def install(store: Store, path: Path, name: str) -> str:
    with store.stage(from_directory(path)) as staged:
        store.install(name, staged)
    return staged.digest


Boot = Callable[[], Awaitable[Server]]


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    """Start a server on the same store each time."""
    root = tmp_path / "store"
    root.mkdir()

    async def start() -> Server:
        store, engine, models = Store(root), FakeEngine(), FakeModels()
        holder = Holder(store, cast("Engine", engine), cast("Models", models), FakeRequest)
        await holder.start()
        return Server(store, engine, models, holder)

    return start


async def test_a_name_serves_the_loaded_generation_under_its_inner_name(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    assert await server.load(adapter("one"))
    (served,) = server.holder.adapters()
    assert server.serving() == {"lint": f"lint@{served.digest}"}
    assert server.engine.loaded == {1: f"lint@{served.digest}"}


async def test_replies_and_the_list_of_models_show_public_names(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.models.lora_requests["lint"]
    await server.load(adapter("two"))
    for request in (before, server.models.lora_requests["lint"]):  # a reply may outlive its generation
        assert server.models.model_name(request) == "lint"
    assert server.models.model_name() == BASE
    assert [card.id for card in (await server.models.show_available_models()).data] == [BASE, "lint"]


async def test_every_generation_gets_an_id_of_its_own_over_restarts(boot: Boot, adapter: MakeAdapter) -> None:
    ids: list[int] = []
    for weights in ("one", "two", "three"):
        server = await boot()
        await server.load(adapter(weights))
        ids += [request.lora_int_id for request in server.engine.added]
    assert ids == sorted(set(ids))


async def test_ids_do_not_clash_with_those_of_lora_modules(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    server.models.lora_requests["static"] = FakeRequest("static", 5, "")
    holder = Holder(server.store, cast("Engine", server.engine), cast("Models", server.models), FakeRequest)
    await holder.load("lint", server.install(adapter()))
    assert [request.lora_int_id for request in server.engine.added] == [6]


async def test_a_generation_that_serves_again_keeps_its_request(boot: Boot, adapter: MakeAdapter) -> None:
    # Requests of its first time may still run, and one inner name with two ids would end the engine.
    server = await boot()
    one, two = adapter("one"), adapter("two")
    await server.load(one)
    first = server.models.lora_requests["lint"]
    await server.load(two)
    await server.load(one)
    assert server.models.lora_requests["lint"] is first
    await server.holder.unload("lint")
    await server.load(one)
    assert server.models.lora_requests["lint"] is first


async def test_what_is_served_already_is_not_loaded_again(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    assert await server.load(adapter())
    manifest = Manifest.read(server.store.root)
    assert not await server.load(adapter(name="copy"))
    assert len(server.engine.added) == 1
    assert Manifest.read(server.store.root) == manifest


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
    await asyncio.gather(*(server.holder.load(name, path) for name, path in paths))
    assert sorted(server.engine.loaded) == [1, 2, 3]
    assert set(Manifest.read(server.store.root).adapters) == {"lint", "docstring", "test"}


async def test_a_refused_load_changes_nothing_and_its_id_is_spent(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before, entries = server.serving(), Manifest.read(server.store.root).adapters
    with pytest.raises(AdapterError, match="Worker failed"):
        await server.load(adapter("bad"))
    assert server.serving() == before
    assert Manifest.read(server.store.root).adapters == entries
    assert list(server.engine.loaded) == [1]
    await server.load(adapter("two"))
    assert [request.lora_int_id for request in server.engine.added] == [1, 2, 3]


async def test_a_manifest_that_cannot_be_written_leaves_what_serves(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    before = server.serving()
    (server.store.root / "manifest.json.new").mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        await server.load(adapter("two"))
    with pytest.raises(StoreError, match="cannot be written"):
        await server.holder.unload("lint")
    assert server.serving() == before


async def test_a_name_of_the_base_model_or_a_path_outside_is_refused(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    with pytest.raises(AdapterError, match="not an installed generation"):
        await server.holder.load("lint", str(adapter()))
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        await server.holder.load(BASE, "/x")
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
    assert Manifest.read(again.store.root).adapters == Manifest.read(server.store.root).adapters


async def test_the_manifest_says_what_served_before(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter("one"))
    await server.load(adapter("two"))
    old, new = (request.lora_name.removeprefix("lint@") for request in server.engine.added)
    assert Manifest.read(server.store.root).adapters == {"lint": Entry(new, (old,))}


async def test_what_was_unloaded_is_not_served_after_a_restart(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    await server.load(adapter())
    await server.holder.unload("lint")
    assert server.serving() == {}
    assert (await boot()).serving() == {}
    with pytest.raises(NotServedError, match="no adapter 'lint' is served"):
        await server.holder.unload("lint")


async def test_bad_adapters_are_set_aside_and_the_others_served(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    manifest = Manifest.read(server.store.root)
    for name, weights in (("bad", "bad"), ("changed", "one"), ("gone", "two"), ("lint", "three")):
        manifest.serve(name, install(server.store, adapter(weights, name), name))
    manifest.serve("Not-Plain", "0" * 12)
    manifest.write()
    changed = server.store.generation("changed", manifest.adapters["changed"].digest) / FILES[1]
    changed.chmod(0o644)
    changed.write_text("other")
    (server.store.generation("gone", manifest.adapters["gone"].digest) / FILES[0]).unlink()
    again = await boot()
    assert [one.name for one in again.holder.adapters()] == ["lint"]
    reasons = {name: reason for name, _, reason in again.holder.set_aside()}
    assert list(reasons) == ["Not-Plain", "bad", "changed", "gone"]
    assert "Worker failed" in reasons["bad"]
    assert "was changed" in reasons["changed"]
    assert "cannot be read" in reasons["gone"]
    assert (
        Manifest.read(again.store.root).adapters == manifest.adapters
    )  # each is tried again at the next start


async def test_what_was_set_aside_can_be_loaded_or_unloaded(boot: Boot, adapter: MakeAdapter) -> None:
    server = await boot()
    manifest = Manifest.read(server.store.root)
    for name in ("lint", "docstring"):
        digest = install(server.store, adapter(name, name), name)
        manifest.serve(name, digest)
        (server.store.generation(name, digest) / FILES[0]).unlink()
    manifest.write()
    again = await boot()
    assert len(list(again.holder.set_aside())) == 2
    assert await again.load(adapter("lint", "same"))
    await again.holder.unload("docstring")
    assert list(again.holder.set_aside()) == []
    assert list(again.serving()) == ["lint"]


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


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The routes on an app whose state holds stand-ins."""
    root = tmp_path / "store"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(root))
    monkeypatch.setattr("importlib.import_module", lambda _: SimpleNamespace(LoRARequest=FakeRequest))
    app = FastAPI()
    plugin = AdaptersPlugin()
    plugin.attach_router(app)
    app.state.engine = FakeEngine()
    app.state.openai_serving_models = FakeModels()
    asyncio.run(plugin.init_state(app.state.engine, app.state, Namespace(api_server_count=None)))
    return TestClient(app)


def test_the_routes_load_list_and_unload(client: TestClient, adapter: MakeAdapter, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = install(store, adapter(), "lint")
    body = {"lora_name": "lint", "lora_path": str(store.generation("lint", digest))}
    assert client.post("/v1/load_lora_adapter", json=body).json() == {"name": "lint", "changed": True}
    assert client.post("/v1/load_lora_adapter", json=body).json() == {"name": "lint", "changed": False}
    listed = {"adapters": [{"name": "lint", "digest": digest, "id": 1}], "set_aside": []}
    assert client.get("/v1/lora_adapters").json() == listed
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "lint"}).status_code == 200
    assert client.get("/v1/lora_adapters").json() == {"adapters": [], "set_aside": []}


def test_the_routes_refuse_in_openais_form(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "lint", "lora_path": "/nowhere"})
    assert answer.status_code == answer.json()["error"]["code"] == 400
    assert "adapter_manager.py load lint PATH" in answer.json()["error"]["message"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "lint"}).status_code == 404
    (tmp_path / "store" / "manifest.json").write_text("{")
    assert client.get("/v1/lora_adapters").status_code == 500


def test_ready_follows_the_engine(client: TestClient) -> None:
    assert client.get("/ready").status_code == 200
    cast("FastAPI", client.app).state.engine.dead = True
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reason": "engine is dead"})


async def test_a_generation_that_fails_to_load_again_keeps_its_request(
    boot: Boot, adapter: MakeAdapter
) -> None:
    server = await boot()
    one = adapter("one")
    await server.load(one)
    first = server.models.lora_requests["lint"]
    await server.holder.unload("lint")

    async def fail() -> None:
        raise RuntimeError("no memory")

    server.engine.on_add = fail
    with pytest.raises(AdapterError, match="no memory"):
        await server.load(one)
    server.engine.on_add = None
    await server.load(one)
    assert server.models.lora_requests["lint"] is first


async def test_vllms_own_loading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with pytest.raises(RuntimeError, match="unset VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await AdaptersPlugin().init_state(
            cast("Engine", FakeEngine()), State(), Namespace(api_server_count=1)
        )


async def test_several_api_servers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="--api-server-count 1"):
        await AdaptersPlugin().init_state(
            cast("Engine", FakeEngine()),
            State(),
            Namespace(api_server_count=2),
        )
