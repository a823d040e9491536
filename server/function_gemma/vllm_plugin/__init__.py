"""The endpoint plugin for vLLM: routes that load, unload and list adapters, and one that says if all is well.

They exist on vLLM's own socket; the gateway lets no caller reach them but the metrics. vLLM's own routes of
these names stay off (VLLM_ALLOW_RUNTIME_LORA_UPDATING).
"""

import importlib
import logging
import os
from argparse import Namespace
from dataclasses import asdict

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.datastructures import State

from function_gemma.adapters.base import container
from function_gemma.adapters.errors import AdapterError, EngineError
from function_gemma.adapters.store import Store, root

from .engine import Engine
from .holder import Holder, Phase
from .pulse import Pulse
from .trial import Gate, Trial
from .usage import Bounded, ServedBy, Usage

_router = APIRouter()
_logger = logging.getLogger("vllm.function_gemma")


class LoadRequest(BaseModel):
    """Body of a load: as vLLM has it, with where the adapter came from and what it must answer first.

    Without a phase it does all at once, which is right for a vLLM that serves alone.
    """

    lora_name: str
    lora_path: str
    source: str | None = None
    gate: Gate | None = None
    phase: Phase | None = None


class UnloadRequest(BaseModel):
    """Body of an unload, as vLLM has it."""

    lora_name: str


class AdaptersPlugin:
    """What vLLM asks of an endpoint plugin."""

    name = "function_gemma"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the middleware that names the maker of each answer."""
        app.include_router(_router)
        app.state.adapter_usage = Usage(
            os.environ.get("SERVER_RELEASE", "dev"),
            os.environ.get("SERVER_MODEL", "base"),
            os.environ.get("SERVER_MODEL_REVISION", "main"),
        )
        app.add_middleware(ServedBy, usage=app.state.adapter_usage)

    async def init_state(self, engine_client: Engine, state: State, args: Namespace) -> None:
        """Load what the manifest names; vLLM listens only afterwards. Raises nothing: there is the base."""
        refusal = None
        # Either would give ids of its own, and an adapter would answer with the weights of another.
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true"):
            refusal = "adapters are loaded by this plugin alone: unset VLLM_ALLOW_RUNTIME_LORA_UPDATING"
        if (args.api_server_count or 1) > 1:
            refusal = "adapters are loaded by one API server alone: start vLLM with --api-server-count 1"
        state.adapter_holder = None
        try:
            request_type = importlib.import_module("vllm.lora.request").LoRARequest
            parameters = importlib.import_module("vllm.sampling_params").SamplingParams
            models, usage = state.openai_serving_models, state.adapter_usage
            state.pulse = Pulse(engine_client.generate, parameters, usage)
            holder = Holder(Store(root()), engine_client, models, request_type, usage)
            await holder.start(refusal)
            state.adapter_holder = holder
        except Exception:
            _logger.critical("No adapter can be served", exc_info=True)


def _holder(request: Request) -> Holder:
    holder: Holder | None = request.app.state.adapter_holder
    if holder is None:
        raise EngineError(f"the plugin could not start: `docker logs {container()}` says why")
    return holder


def _refuse(error: AdapterError) -> JSONResponse:
    """Answer in OpenAI's form."""
    body = {"message": str(error), "type": type(error).__name__, "param": None, "code": error.status}
    return JSONResponse({"error": body}, status_code=error.status)


@_router.post("/v1/load_lora_adapter")
async def load(body: LoadRequest, request: Request) -> JSONResponse:
    """Serve an installed generation under its adapter's name, in place of the one that served before."""
    trial = Trial(request.app, request.headers.get("authorization"), body.gate)
    try:
        report = await _holder(request).load(body.lora_name, body.lora_path, body.source, trial, body.phase)
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse({"name": body.lora_name, **asdict(report)})


@_router.post("/v1/unload_lora_adapter")
async def unload(body: UnloadRequest, request: Request) -> JSONResponse:
    """Serve an adapter no more."""
    try:
        previous = await _holder(request).unload(body.lora_name)
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse({"name": body.lora_name, "previous": previous, "changed": True})


@_router.get("/v1/lora_adapters")
async def adapters(request: Request) -> JSONResponse:
    """List what is served, and what was quarantined at the start and why."""
    usage: Usage = request.app.state.adapter_usage
    try:
        holder = _holder(request)
        served, quarantined = holder.adapters(), holder.quarantined()
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse(
        {
            "release": usage.release,
            "base": usage.base,
            "adapters": [
                {"name": one.name, "digest": one.digest, "id": one.request.lora_int_id, "source": source}
                for one, source in served
            ],
            "quarantined": [
                {"name": name, "digest": digest, "reason": reason} for name, digest, reason in quarantined
            ],
        }
    )


@_router.get("/gateway/metrics")
async def metrics() -> Response:
    """Answer what vLLM's /metrics does, without the metric whose series grow without bound."""
    return Response(generate_latest(Bounded()), media_type=CONTENT_TYPE_LATEST)


@_router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Answer 200 when the engine gives tokens and serves what the manifest names, as it may have changed."""
    try:
        holder = _holder(request)
        await holder.check_health()
        request.app.state.pulse.check()
        await holder.follow()
    except Exception as error:  # whatever the engine says, a server that cannot answer is not ready
        return JSONResponse({"ready": False, "reason": str(error)}, status_code=503)
    return JSONResponse({"ready": True})
