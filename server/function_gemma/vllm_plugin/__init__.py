"""The endpoint plugin for vLLM: routes that load, unload and list adapters, and one that says if all is well.

They exist on vLLM's own socket; the gateway lets no caller reach them. vLLM's own routes of these names stay
off (VLLM_ALLOW_RUNTIME_LORA_UPDATING).
"""

import importlib
import os
from argparse import Namespace

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import State

from function_gemma.adapters.errors import AdapterError, NotServedError, StoreError
from function_gemma.adapters.store import Store, root

from .holder import Engine, Holder

_router = APIRouter()


class LoadRequest(BaseModel):
    """Body of a load, as vLLM has it."""

    lora_name: str
    lora_path: str


class UnloadRequest(BaseModel):
    """Body of an unload, as vLLM has it."""

    lora_name: str


class AdaptersPlugin:
    """What vLLM asks of an endpoint plugin."""

    name = "function_gemma"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(_router)

    async def init_state(self, engine_client: Engine, state: State, args: Namespace) -> None:
        """Load what the manifest names; vLLM listens only afterwards."""
        # Either would give ids of its own, and an adapter would answer with the weights of another.
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() in ("1", "true"):
            raise RuntimeError(
                "adapters are loaded by this plugin alone: unset VLLM_ALLOW_RUNTIME_LORA_UPDATING"
            )
        if (args.api_server_count or 1) > 1:
            raise RuntimeError(
                "adapters are loaded by one API server alone: start vLLM with --api-server-count 1"
            )
        request_type = importlib.import_module("vllm.lora.request").LoRARequest
        holder = Holder(Store(root()), engine_client, state.openai_serving_models, request_type)
        await holder.start()
        state.adapter_holder = holder


def _holder(request: Request) -> Holder:
    holder: Holder = request.app.state.adapter_holder
    return holder


def _refuse(error: AdapterError) -> JSONResponse:
    """Answer in OpenAI's form."""
    status = 404 if isinstance(error, NotServedError) else 500 if isinstance(error, StoreError) else 400
    body = {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
    return JSONResponse({"error": body}, status_code=status)


@_router.post("/v1/load_lora_adapter")
async def load(body: LoadRequest, request: Request) -> JSONResponse:
    """Serve an installed generation under its adapter's name, in place of the one that served before."""
    try:
        changed = await _holder(request).load(body.lora_name, body.lora_path)
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse({"name": body.lora_name, "changed": changed})


@_router.post("/v1/unload_lora_adapter")
async def unload(body: UnloadRequest, request: Request) -> JSONResponse:
    """Serve an adapter no more."""
    try:
        await _holder(request).unload(body.lora_name)
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse({"name": body.lora_name, "changed": True})


@_router.get("/v1/lora_adapters")
async def adapters(request: Request) -> JSONResponse:
    """List what is served, and what was set aside at the start and why."""
    holder = _holder(request)
    try:
        set_aside = holder.set_aside()
    except AdapterError as error:
        return _refuse(error)
    return JSONResponse(
        {
            "adapters": [
                {"name": one.name, "digest": one.digest, "id": one.request.lora_int_id}
                for one in holder.adapters()
            ],
            "set_aside": [
                {"name": name, "digest": digest, "reason": reason} for name, digest, reason in set_aside
            ],
        }
    )


@_router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Answer 200 when the plugin has done its part of the start and the engine lives."""
    try:
        await _holder(request).check_health()
    except Exception as error:  # whatever the engine says, a server that cannot answer is not ready
        return JSONResponse({"ready": False, "reason": str(error)}, status_code=503)
    return JSONResponse({"ready": True})
