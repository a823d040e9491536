"""Whether the engine still gives tokens. Where nobody got one lately it is asked for some.

vLLM's own health says that the engine's process lives, be it stopped, stuck or full of NaN.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import Any
from uuid import uuid4

from prometheus_client import REGISTRY

from function_gemma.adapters.errors import EngineError

from .usage import Usage

QUIET = 10  # seconds without a token until one is asked for
LIMIT = 30  # seconds until the engine that gives none counts as stuck
# Changes with each step of a prompt that is read, which may take longer than that.
_STEP = "vllm:kv_cache_usage_perc"
_logger = logging.getLogger("vllm.function_gemma")


class Pulse:
    """Asks for tokens while nobody else does."""

    def __init__(
        self,
        generate: Callable[..., AsyncGenerator[Any, None]],
        parameters: Callable[..., object],
        usage: Usage,
    ) -> None:
        """Take the engine's own generate(), which counts nothing, and vLLM's SamplingParams."""
        self._generate, self._parameters = generate, parameters
        self._usage = usage
        self._moved = monotonic()  # when the engine was last seen at work
        self._work: list[float] = []
        self._question: asyncio.Task[None] | None = None
        self._mute = False  # whether the last question was answered, and by no token

    def check(self) -> None:
        """Raise EngineError where the engine gives no tokens; waits for none."""
        now, heard = monotonic(), max(self._usage.heard, self._moved)
        if now - heard <= QUIET:
            return
        if self._question is None or self._question.done():
            self._work = _work()
            self._question = asyncio.create_task(self._ask())
        elif not self._mute and (work := _work()) != self._work:
            self._work, self._moved = work, now
            return
        if self._mute:
            raise EngineError(f"the engine answers, and has given no token for {now - heard:.0f} s")
        if now - heard > QUIET + LIMIT:
            raise EngineError(f"the engine has given no token for {now - heard:.0f} s")

    async def _ask(self) -> None:
        parameters = self._parameters(max_tokens=4, temperature=0.0, ignore_eos=True)
        before = self._usage.heard
        try:
            async for output in self._generate({"prompt_token_ids": [2]}, parameters, f"pulse-{uuid4()}"):
                self._usage.hear(output)
        except Exception as error:  # whatever it is, it is no token
            _logger.warning("The engine gives no token: %s", error)
        else:
            self._mute = self._usage.heard == before


def _work() -> list[float]:
    return [
        sample.value for metric in REGISTRY.collect() if metric.name == _STEP for sample in metric.samples
    ]
