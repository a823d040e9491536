"""Check that the installed vLLM still has every internal that the plugin touches.

    python3 -m function_gemma.vllm_plugin.contract

Prints one line and exits 0, or names what moved, one line each, and exits 1. It reads vLLM's sources instead
of importing them: an image of the wrong version is refused at its build, in a second, without model or GPU.
"""

import ast
import importlib.util
import sys
from importlib import metadata
from pathlib import Path

# File below vllm/ -> what it must define: a class's field, or a method with the parameters that it is given.
_DEFINED = {
    "plugins/endpoint_plugins/interface.py": (
        "EndpointPlugin.name",
        "EndpointPlugin.required_tasks",
        "EndpointPlugin.attach_router(self, app)",
        "async EndpointPlugin.init_state(self, engine_client, state, args)",
    ),
    "lora/request.py": ("LoRARequest.lora_name", "LoRARequest.lora_int_id", "LoRARequest.lora_path"),
    "entrypoints/openai/models/serving.py": (
        "OpenAIServingModels.lora_requests",
        "OpenAIServingModels.is_base_model(self, model_name)",
        "OpenAIServingModels.model_name(self, lora_request)",
        "async OpenAIServingModels.show_available_models(self)",
    ),
    "entrypoints/serve/engine/protocol.py": ("ModelList.data", "ModelCard.id"),
    "sampling_params.py": (
        "SamplingParams.max_tokens",
        "SamplingParams.temperature",
        "SamplingParams.ignore_eos",
    ),
    "v1/engine/async_llm.py": (
        "async AsyncLLM.add_lora(self, lora_request)",
        "async AsyncLLM.remove_lora(self, lora_id)",
        "async AsyncLLM.generate(self, prompt, sampling_params, request_id)",
        "async AsyncLLM.check_health(self)",
    ),
}

# File below vllm/, code that must occur there in this order (as ast.unparse writes it), what rests on it.
_DONE = (
    ("v1/metrics/loggers.py", ("vllm:kv_cache_usage_perc",), "a long prompt that is read shows as work"),
    (
        "plugins/__init__.py",
        (
            "DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'",
            "ENDPOINT_PLUGINS_GROUP = 'vllm.endpoint_plugins'",
        ),
        "vLLM finds the plugins",
    ),
    (
        "lora/punica_wrapper/punica_cpu.py",
        (
            "sgmv_shrink(x, w_t_all, y, *self.prefill_metadata, scale)",
            "bgmv_shrink(x, w_t_all, y, self.token_lora_indices, scale)",
            "bgmv_shrink(x, lora_a_stacked, buffer, self.sampler_indices, scale)",
        ),
        "on CPUs no adapter has a part in what the base model says",
    ),
    ("logger.py", ("'loggers': {'vllm': {",), "the plugin's log lines show"),
    ("entrypoints/launchers/cli_args.py", ("args.api_server_count",), "several API servers are refused"),
    (
        "entrypoints/launchers/api_server/app_state.py",
        ("state.openai_serving_models = ", "await init_endpoint_plugins_state(engine_client, state, args)"),
        "the plugin's start has the served models at hand",
    ),
    (
        "entrypoints/launchers/api_server/entry.py",
        ("build_app(", "await init_app_state(", "serve_http("),
        "adapters are loaded before the server listens",
    ),
    ("lora/request.py", ("self.lora_name == value.lora_name",), "the inner name tells generations apart"),
    (
        "entrypoints/serve/engine/serving.py",
        ("request.model in self.models.lora_requests", "return self.models.lora_requests[request.model]"),
        "a request finds its adapter by the public name",
    ),
    (
        "entrypoints/openai/chat_completion/serving.py",
        (
            "self._maybe_get_adapters(request",
            "model_name = self.models.model_name(lora_request)",
            "self.engine_client.generate(",
        ),
        "a chat's reply shows the public name, and its tokens are counted",
    ),
    (
        "entrypoints/openai/completion/serving.py",
        ("self._maybe_get_adapters(request", "model_name = self.models.model_name(lora_request)"),
        "a completion's reply shows the public name",
    ),
    (
        "entrypoints/openai/completion/protocol.py",
        ("output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY",),
        "a completion's tokens are counted once",
    ),
    (
        "entrypoints/openai/chat_completion/protocol.py",
        ("output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY",),
        "a chat's tokens are counted once",
    ),
    (
        "entrypoints/launchers/app.py",
        ("app = FastAPI(", "attach_endpoint_plugins(app, supported_tasks)"),
        "the plugin's middleware wraps the routes",
    ),
    (
        "entrypoints/openai/models/api_router.py",
        ("await handler.show_available_models()",),
        "/v1/models shows public names",
    ),
)


def moved(vllm: Path) -> list[str]:
    """Return what the plugin needs and the package in directory `vllm` lacks, one line each."""
    trees: dict[str, ast.Module | None] = {}
    for file in {*_DEFINED, *(file for file, _, _ in _DONE)}:
        try:
            trees[file] = ast.parse((vllm / file).read_bytes())
        except (OSError, SyntaxError):
            trees[file] = None
    lines = [f"vllm/{file} is gone" for file, tree in sorted(trees.items()) if tree is None]
    for file, definitions in _DEFINED.items():
        if tree := trees[file]:
            found = _definitions(tree)
            lines += [f"vllm/{file} no longer has {one}" for one in definitions if not _matches(one, found)]
    for file, steps, purpose in _DONE:
        if (tree := trees[file]) and not _in_order(ast.unparse(tree), steps):
            lines.append(f"vllm/{file} no longer does {' … '.join(steps)} (so that {purpose})")
    return lines


def _definitions(tree: ast.Module) -> set[str]:
    """Return the fields and methods of all classes, written as in _DEFINED."""
    found: set[str] = set()
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign):
                found.add(f"{owner.name}.{ast.unparse(node.target)}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
                parameters = ", ".join(argument.arg for argument in node.args.args)
                found.add(f"{prefix}{owner.name}.{node.name}({parameters})")
                found |= {
                    f"{owner.name}.{part.attr}"
                    for part in ast.walk(node)
                    if isinstance(part, ast.Attribute)
                    and isinstance(part.ctx, ast.Store)
                    and ast.unparse(part.value) == "self"
                }
    return found


def _matches(wanted: str, found: set[str]) -> bool:
    # Further parameters do no harm: vLLM gives new ones a default.
    return wanted in found or any(one.startswith(f"{wanted.removesuffix(')')}, ") for one in found)


def _in_order(code: str, steps: tuple[str, ...]) -> bool:
    place = 0
    for step in steps:
        place = code.find(step, place)
        if place < 0:
            return False
    return True


def main() -> int:
    """Check the installed vLLM and return the exit code."""
    spec = importlib.util.find_spec("vllm")  # does not import it
    if spec is None or spec.origin is None:
        print("contract: vLLM is not installed here: run this in the vllm-gemma image", file=sys.stderr)
        return 1
    version = metadata.version("vllm")
    lines = moved(Path(spec.origin).parent)
    for line in lines:
        print(f"contract: {line}", file=sys.stderr)
    if lines:
        print(
            f"contract: the plugin does not fit vLLM {version}: build with the VLLM_IMAGE it was made for",
            file=sys.stderr,
        )
        return 1
    print(f"contract: vLLM {version} has all that the plugin touches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
