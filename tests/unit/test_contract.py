"""The contract names what moved in vLLM. (That the real vLLM keeps it is checked at the image's build.)"""

import textwrap
from pathlib import Path

import pytest

from function_gemma.vllm_plugin import contract

# A vLLM of nothing but what the plugin touches.
SOURCES = {
    "plugins/__init__.py": """
        DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"
        ENDPOINT_PLUGINS_GROUP = "vllm.endpoint_plugins"
    """,
    "lora/punica_wrapper/punica_cpu.py": """
        class PunicaWrapperCPU:
            def _shrink_prefill(self, y, x, w_t_all, scale):
                sgmv_shrink(x, w_t_all, y, *self.prefill_metadata, scale)
            def _shrink_decode(self, y, x, w_t_all, scale):
                bgmv_shrink(x, w_t_all, y, self.token_lora_indices, scale)
            def add_lora_logits(self, y, x, lora_a_stacked, scale, buffer):
                bgmv_shrink(x, lora_a_stacked, buffer, self.sampler_indices, scale)
    """,
    "plugins/endpoint_plugins/interface.py": """
        class EndpointPlugin:
            name: str
            required_tasks: tuple
            def attach_router(self, app): ...
            async def init_state(self, engine_client, state, args): ...
    """,
    "logger.py": "CONFIG = {'loggers': {'vllm': {'level': 'INFO'}}}",
    "lora/request.py": """
        class LoRARequest:
            lora_name: str
            lora_int_id: int
            lora_path: str = ""
            def __eq__(self, value): return self.lora_name == value.lora_name
    """,
    "entrypoints/launchers/cli_args.py": "def check(args): return args.api_server_count",
    "entrypoints/launchers/api_server/app_state.py": """
        async def init_app_state(engine_client, state, args):
            state.openai_serving_models = 1
            await init_endpoint_plugins_state(engine_client, state, args)
    """,
    "entrypoints/launchers/api_server/entry.py": """
        async def build_and_serve():
            app = build_app()
            await init_app_state()
            return await serve_http()
    """,
    "entrypoints/openai/models/serving.py": """
        class OpenAIServingModels:
            def __init__(self): self.lora_requests: dict = {}
            def is_base_model(self, model_name): ...
            def model_name(self, lora_request=None, more=None): ...
            async def show_available_models(self): ...
    """,
    "entrypoints/openai/models/api_router.py": """
        async def show(handler): return await handler.show_available_models()
    """,
    "entrypoints/serve/engine/protocol.py": """
        class ModelCard:
            id: str
        class ModelList:
            data: list
    """,
    "entrypoints/serve/engine/serving.py": """
        def _maybe_get_adapters(self, request):
            if request.model in self.models.lora_requests:
                return self.models.lora_requests[request.model]
    """,
    "entrypoints/openai/chat_completion/serving.py": """
        def create(self, request):
            lora_request = self._maybe_get_adapters(request, supports_default_mm_loras=True)
            model_name = self.models.model_name(lora_request)
            return self.engine_client.generate(lora_request=lora_request)
    """,
    "entrypoints/openai/chat_completion/protocol.py": """
        def to_sampling_params(self):
            return dict(output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY)
    """,
    "entrypoints/openai/completion/protocol.py": """
        def to_sampling_params(self):
            return dict(output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY)
    """,
    "entrypoints/launchers/app.py": """
        def build_app(supported_tasks):
            app = FastAPI()
            attach_endpoint_plugins(app, supported_tasks)
    """,
    "entrypoints/openai/completion/serving.py": """
        def create(self, request):
            lora_request = self._maybe_get_adapters(request)
            model_name = self.models.model_name(lora_request)
    """,
    "sampling_params.py": """
        class SamplingParams:
            temperature: float = 1.0
            ignore_eos: bool = False
            max_tokens: int | None = 16
    """,
    "v1/metrics/loggers.py": 'NAME = "vllm:kv_cache_usage_perc"',
    "v1/engine/async_llm.py": """
        class AsyncLLM:
            async def add_lora(self, lora_request): ...
            async def remove_lora(self, lora_id): ...
            async def generate(self, prompt, sampling_params, request_id, *, lora_request=None): ...
            async def check_health(self): ...
    """,
}


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return tmp_path


def test_a_vllm_with_all_that_is_touched_passes(vllm: Path) -> None:
    assert contract.moved(vllm) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("lora/request.py", "lora_int_id", "lora_id", "no longer has LoRARequest.lora_int_id"),
        ("lora/request.py", "== value.lora_name", "== value.lora_path", "tells generations apart"),
        ("v1/engine/async_llm.py", "async def remove_lora", "def remove_lora", "async AsyncLLM.remove_lora"),
        ("v1/engine/async_llm.py", "self, lora_id", "self, request", "AsyncLLM.remove_lora(self, lora_id)"),
        ("v1/engine/async_llm.py", "class AsyncLLM", "class Engine", "AsyncLLM.check_health"),
        (
            "entrypoints/openai/models/serving.py",
            "lora_requests",
            "loras",
            "OpenAIServingModels.lora_requests",
        ),
        ("entrypoints/launchers/api_server/entry.py", "serve_http", "listen", "before the server listens"),
        ("entrypoints/openai/completion/serving.py", "model_name(lora", "name(lora", "a completion's reply"),
        ("entrypoints/openai/completion/protocol.py", "FINAL_ONLY", "CUMULATIVE", "tokens are counted once"),
        ("entrypoints/openai/chat_completion/serving.py", "generate(", "run(", "its tokens are counted"),
        ("entrypoints/launchers/app.py", "attach_endpoint", "add_endpoint", "middleware wraps the routes"),
        ("plugins/__init__.py", "endpoint_plugins", "plugins", "vLLM finds the plugins"),
        ("lora/punica_wrapper/punica_cpu.py", "token_lora_indices", "slots", "what the base model says"),
    ],
)
def test_what_moved_is_named(vllm: Path, file: str, old: str, new: str, named: str) -> None:
    path = vllm / file
    path.write_text(path.read_text().replace(old, new))
    lines = contract.moved(vllm)
    assert any(f"vllm/{file}" in line and named in line for line in lines), lines


def test_the_order_of_the_start_counts(vllm: Path) -> None:
    path = vllm / "entrypoints/launchers/api_server/entry.py"
    path.write_text(
        "async def build_and_serve():\n    build_app()\n    serve_http()\n    await init_app_state()\n"
    )
    assert len(contract.moved(vllm)) == 1


def test_a_file_that_is_gone_is_named_once(vllm: Path) -> None:
    (vllm / "v1/engine/async_llm.py").unlink()
    assert contract.moved(vllm) == ["vllm/v1/engine/async_llm.py is gone"]


def test_no_vllm_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert contract.main() == 1
    assert "vLLM is not installed here" in capsys.readouterr().err
