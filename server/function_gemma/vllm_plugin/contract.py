"""Does the installed vLLM still have every internal that the plugin touches?

    python3 -m function_gemma.vllm_plugin.contract

Prints one line and exits 0, or names what moved, one line each, and exits 1. It reads vLLM's sources instead of
importing them: an image of the wrong version is refused at its build, in a second, without a model or a GPU.
"""

import ast
import importlib.util
import sys
from importlib import metadata
from pathlib import Path

# File below vllm/ -> what must be in it. A name alone must be defined; `name(a, b)` with these parameters in this
# order (more may follow); `Class.name: field` is assigned in the class or in its __init__.
_DEFINED = {
    "plugins/endpoint_plugins/interface.py": (
        "EndpointPlugin.name",
        "EndpointPlugin.required_tasks",
        "EndpointPlugin.attach_router(self, app)",
        "EndpointPlugin.init_state(self, engine_client, state, args)",
    ),
    "lora/request.py": (
        "LoRARequest.lora_name",
        "LoRARequest.lora_int_id",
        "LoRARequest.lora_path",
    ),
    "entrypoints/openai/models/serving.py": (
        "OpenAIServingModels.lora_requests",
        "OpenAIServingModels.is_base_model(self, model_name)",
        "OpenAIServingModels.model_name(self, lora_request)",
        "async OpenAIServingModels.show_available_models(self)",
    ),
    "entrypoints/serve/engine/protocol.py": ("ModelList.data", "ModelCard.id"),
    "v1/engine/async_llm.py": (
        "async AsyncLLM.add_lora(self, lora_request)",
        "async AsyncLLM.remove_lora(self, lora_id)",
        "async AsyncLLM.check_health(self)",
    ),
}
# File below vllm/ -> an expression or statement that must occur, and what rests on it.
_OCCURS = (
    ("plugins/__init__.py", "ENDPOINT_PLUGINS_GROUP = 'vllm.endpoint_plugins'", "vLLM finds the plugin"),
    ("lora/request.py", "self.lora_name == value.lora_name", "a generation is told apart by its inner name"),
    (
        "entrypoints/serve/engine/serving.py",
        "request.model in self.models.lora_requests",
        "a public name is known to vLLM",
    ),
    (
        "entrypoints/serve/engine/serving.py",
        "self.models.lora_requests[request.model]",
        "a request finds the adapter of its public name",
    ),
    (
        "entrypoints/openai/chat_completion/serving.py",
        "self.models.model_name(lora_request)",
        "a chat's reply shows the public name",
    ),
    (
        "entrypoints/openai/completion/serving.py",
        "self.models.model_name(lora_request)",
        "a completion's reply shows the public name",
    ),
    (
        "entrypoints/openai/models/api_router.py",
        "handler.show_available_models()",
        "/v1/models shows public names",
    ),
    ("entrypoints/launchers/cli_args.py", "args.api_server_count", "one API server is told from several"),
)
# File below vllm/, function, and two calls or assignments of which the first comes first in it.
_ORDER = (
    (
        "entrypoints/launchers/api_server/app_state.py",
        "init_app_state",
        "state.openai_serving_models",
        "init_endpoint_plugins_state",
    ),
    ("entrypoints/launchers/api_server/entry.py", "build_and_serve", "build_app", "init_app_state"),
    ("entrypoints/launchers/api_server/entry.py", "build_and_serve", "init_app_state", "serve_http"),
)
