"""Stand-ins for vLLM around the real plugin (tests/e2e has the real one).

stand_ins.py        serves the plugin on $SERVER_SOCKET
"""

import asyncio
import json
import os
import socket
import threading
from argparse import Namespace
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse

from function_gemma.adapters.files import FILES
from function_gemma.vllm_plugin import AdaptersPlugin
from function_gemma.vllm_plugin.engine import Engine, LoRA, ModelList

BASE = "google/functiongemma-270m-it"


@dataclass
class FakeRequest:
    """LoRARequest's three fields."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    @property
    def word(self) -> str:
        """The word that the weights were made from."""
        content = (Path(self.lora_path) / FILES[1]).read_bytes()
        size = int.from_bytes(content[:8], "little")
        return str(json.loads(content[8 : 8 + size])["__metadata__"]["word"])


@dataclass
class FakeEngine:
    """Loads all but those made from "bad"; answers with the word they were made from; told, it is dead."""

    loaded: dict[int, str] = field(default_factory=dict)
    added: list[FakeRequest] = field(default_factory=list)
    dead: bool = False
    on_add: Callable[[], Awaitable[None]] | None = None
    going: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: answers wait
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # set by a request that waits

    def __post_init__(self) -> None:
        self.going.set()
        self.generate = self._generate

    async def _generate(
        self, prompt: object, *_: object, lora_request: FakeRequest | None = None
    ) -> AsyncGenerator[Any, None]:
        for token in range(3):
            if not self.going.is_set():
                self.asked.set()
            await self.going.wait()
            assert lora_request is None or self.loaded[lora_request.lora_int_id] == lora_request.lora_name
            yield SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=[token])])

    async def add_lora(self, lora_request: LoRA) -> bool:
        request = cast("FakeRequest", lora_request)
        self.added.append(request)
        self.loaded[request.lora_int_id] = request.lora_name  # vLLM registers an id even where it fails
        if self.on_add:
            await self.on_add()
        if request.word == "bad":
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
class Answers:
    """What the stand-in for vLLM's routes answers."""

    text: str = ""
    tokens: tuple[int, ...] = (7, 0)
    status: int = 200


def make_app(api_server_count: int | None = None) -> FastAPI:
    """An app with the plugin, on routes of completions that look models up as vLLM does."""
    app = FastAPI()
    app.state.answers = Answers()

    async def complete(body: dict[str, Any]) -> Response:
        models, answers = app.state.openai_serving_models, app.state.answers
        if body["model"] != BASE and body["model"] not in models.lora_requests:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        request = None if body["model"] == BASE else models.lora_requests[body["model"]]

        async def stream() -> AsyncGenerator[str, None]:
            async for _ in app.state.engine.generate([1, 2], lora_request=request):
                yield "piece"

        if body.get("stream"):
            return StreamingResponse(stream())
        async for _ in stream():
            pass
        choice = {"message": {"content": answers.text}, "token_ids": answers.tokens}
        return JSONResponse({"choices": [choice]}, answers.status)

    app.add_api_route("/v1/completions", complete, methods=["POST"])
    app.add_api_route("/v1/chat/completions", complete, methods=["POST"])
    plugin = AdaptersPlugin()
    plugin.attach_router(app)
    app.state.engine = FakeEngine()
    app.state.openai_serving_models = FakeModels()
    vllm = SimpleNamespace(LoRARequest=FakeRequest, SamplingParams=SimpleNamespace)
    with patch("importlib.import_module", lambda _: vllm):
        engine = cast("Engine", app.state.engine)
        asyncio.run(plugin.init_state(engine, app.state, Namespace(api_server_count=api_server_count)))
    return app


def server(address: str = "") -> uvicorn.Server:
    """The app on that socket, by default $SERVER_SOCKET: it has begun and does not listen yet."""
    address = address or os.environ["SERVER_SOCKET"]
    config = uvicorn.Config(make_app(), uds=address, log_level="warning", lifespan="off")
    return uvicorn.Server(config)


@contextmanager
def listening(running: uvicorn.Server) -> Iterator[uvicorn.Server]:
    """Let a server listen, in a thread."""
    thread = threading.Thread(target=running.run)
    started = threading.Event()
    serve = running.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await serve(sockets)
        started.set()

    running.startup = startup  # type: ignore[method-assign] # to wait for it
    thread.start()
    started.wait()
    try:
        yield running
    finally:
        running.should_exit = True
        thread.join()


if __name__ == "__main__":
    server().run()
