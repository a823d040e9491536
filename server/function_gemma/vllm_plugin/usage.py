"""Who answers what: the header that names it, the counters of /metrics, and which generations are in use.

A request's generation is the one that it found when it looked its model up, whatever the name serves later.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from math import inf
from time import monotonic, perf_counter
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine, LoRA

REQUESTS = Counter(
    "function_gemma_requests",
    "Completions asked of an adapter or of the base model, by HTTP status (499: the caller hung up)",
    ["adapter", "status"],
)
SECONDS = Counter(
    "function_gemma_request_seconds", "Seconds from such a request to the end of its answer", ["adapter"]
)
TOKENS = Counter(
    "function_gemma_tokens", "Tokens that were read (prompt) and written (generation)", ["adapter", "kind"]
)
QUARANTINED = Gauge(
    "function_gemma_quarantined",
    "1 for an adapter that could not be loaded at the start",
    ["adapter", "digest", "reason"],
)
_PATHS = ("/v1/chat/completions", "/v1/completions")
# One series for each combination of adapters that ever ran together: without bound.
_DROPPED = "vllm:lora_requests_info"


@dataclass(eq=False)
class Loaded:
    """A generation that this process has loaded."""

    name: str
    digest: str
    request: LoRA
    files: int  # the descriptor that holds its files
    uses: int = 0  # requests that found it and have not ended


class Usage:
    """Which generations are loaded, and for how many requests each is in use."""

    def __init__(self, release: str, base: str, revision: str) -> None:
        """Name the release of this project and the base model, as answers show them."""
        self.release = release
        self.base = base
        self.revision = revision
        self.loaded: dict[str, Loaded] = {}  # by inner name
        self.idle: Callable[[Loaded], None] = lambda _: None  # told of a generation that is in use no more
        self.heard = -inf  # when the engine last gave a token, as monotonic() tells

    def hear(self, output: Any) -> None:  # noqa: ANN401 - vLLM's RequestOutput
        """Note when there was a token; not the first of the vocabulary, which is what scores of NaN give."""
        if any(any(part.token_ids) for part in output.outputs):
            self.heard = monotonic()

    def find(self, request: LoRA | None) -> Loaded | None:
        """Return the generation of vLLM's LoRARequest; None for the base model and --lora-modules."""
        return self.loaded.get(request.lora_name) if request else None

    @contextmanager
    def of(self, one: Loaded | None) -> Iterator[None]:
        """Hold a generation in use while the body runs."""
        if one:
            one.uses += 1
        try:
            yield
        finally:
            if one:
                one.uses -= 1
                if not one.uses:
                    self.idle(one)


# What the HTTP request of this task has found, and what ends with it.
_found: ContextVar[tuple[list[Loaded], ExitStack] | None] = ContextVar("found", default=None)


class LoRARequests(dict[str, LoRA]):
    """vLLM's table from a model's name to its LoRARequest, which notes who looked up what."""

    def __init__(self, entries: dict[str, LoRA], usage: Usage) -> None:
        """Take over the entries of vLLM's own table."""
        super().__init__(entries)
        self._usage = usage

    def __getitem__(self, name: str) -> LoRA:
        """Look up, and hold the generation in use until the HTTP request that asks has ended."""
        request = super().__getitem__(name)
        if (found := _found.get()) and (one := self._usage.find(request)) and one not in found[0]:
            found[0].append(one)
            found[1].enter_context(self._usage.of(one))
        return request


class ServedBy:
    """ASGI middleware around vLLM's completions: names the maker of each answer, and counts."""

    def __init__(self, app: ASGIApp, usage: Usage) -> None:
        """Wrap `app`."""
        self._app = app
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        found: list[Loaded] = []
        start, status = perf_counter(), 499

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-served-by", self._maker(found, status)),
                ]
            await send(message)

        with ExitStack() as uses:
            token = _found.set((found, uses))
            try:
                await self._app(scope, receive, send_named)
            finally:
                _found.reset(token)
                # A model that is not served is nobody's, and its name the caller's invention.
                name = found[-1].name if found else self._usage.base
                if found or status < HTTPStatus.BAD_REQUEST:
                    REQUESTS.labels(name, status).inc()
                    SECONDS.labels(name).inc(perf_counter() - start)

    def _maker(self, found: list[Loaded], status: int) -> bytes:
        """Return `<release>/<model>@<digest>`; the release alone where no model was found."""
        usage, maker = self._usage, ""
        if found:
            maker = f"/{found[-1].name}@{found[-1].digest}"
        elif status < HTTPStatus.BAD_REQUEST:
            maker = f"/{usage.base}@{usage.revision}"
        return f"{usage.release}{maker}".encode()


def count_tokens(engine: Engine, usage: Usage) -> None:
    """Have the engine count the tokens that it reads and writes, and hold generations until it has stopped.

    The second, because a caller who hangs up ends the HTTP request before the engine has dropped its own.
    """
    original = engine.generate

    async def generate(
        *arguments: object, lora_request: LoRA | None = None, **options: object
    ) -> AsyncGenerator[Any, None]:
        one = usage.find(lora_request)
        name = one.name if one else usage.base
        written, read = TOKENS.labels(name, "generation"), 0
        with usage.of(one):
            outputs = original(*arguments, lora_request=lora_request, **options)
            try:
                async with aclosing(outputs):
                    async for output in outputs:
                        # Each output has only what is new (DELTA), or is the only one (FINAL_ONLY).
                        written.inc(sum(len(part.token_ids) for part in output.outputs))
                        read = len(output.prompt_token_ids or ())
                        usage.hear(output)
                        yield output
            finally:
                TOKENS.labels(name, "prompt").inc(read)

    engine.generate = generate


class Bounded(Collector):
    """The default registry's metrics without the one whose series grow without bound."""

    def collect(self) -> Iterator[Metric]:
        """Yield the others."""
        return (metric for metric in REGISTRY.collect() if metric.name != _DROPPED)
