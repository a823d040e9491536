"""The engine counts as stuck when it gives no tokens, and only then."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Gauge

from function_gemma.adapters.errors import EngineError
from function_gemma.vllm_plugin import pulse, usage
from function_gemma.vllm_plugin.pulse import LIMIT, QUIET, Pulse
from function_gemma.vllm_plugin.usage import Usage

STEP = 0.5  # seconds, as often as the gateway asks


class Engine:
    """Gives the tokens that it is told to, at once, or none and does not end."""

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] | None = (7,)
        self.asked: list[dict[str, Any]] = []
        self.usage = Usage("release", "base", "main")

    async def generate(
        self, prompt: dict[str, Any], _parameters: object, _name: str
    ) -> AsyncGenerator[Any, None]:
        self.asked.append(prompt)
        if self.tokens is None:
            await asyncio.Event().wait()
        yield self.output()

    def output(self) -> SimpleNamespace:
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.tokens)])


class Clock:
    """Goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (pulse, usage):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)

    async def watch(self, heart: Pulse, seconds: float) -> None:
        """Have somebody ask whether all is well, again and again."""
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            heart.check()
            await asyncio.sleep(0)
            await asyncio.sleep(0)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def heart(engine: Engine, clock: Clock) -> Pulse:  # noqa: ARG001 - set before
    return Pulse(engine.generate, SimpleNamespace, engine.usage)


@pytest.fixture
def step() -> Iterator[Gauge]:
    gauge = Gauge("vllm:kv_cache_usage_perc", "as vLLM has it")
    yield gauge
    REGISTRY.unregister(gauge)


async def test_an_idle_engine_is_asked_now_and_then(engine: Engine, clock: Clock, heart: Pulse) -> None:
    await clock.watch(heart, 20 * QUIET)
    assert 15 < len(engine.asked) <= 20


async def test_a_busy_engine_is_asked_for_nothing(engine: Engine, clock: Clock, heart: Pulse) -> None:
    for _ in range(10):
        engine.usage.hear(engine.output())
        await clock.watch(heart, QUIET)
    assert engine.asked == []


async def test_one_that_gives_no_token_is_stuck_and_asked_once(
    engine: Engine, clock: Clock, heart: Pulse
) -> None:
    engine.tokens = None
    await clock.watch(heart, QUIET + LIMIT)
    with pytest.raises(EngineError, match="no token for 40 s"):
        await clock.watch(heart, 2 * STEP)
    assert len(engine.asked) == 1


async def test_one_that_goes_on_is_well_again(engine: Engine, clock: Clock, heart: Pulse) -> None:
    engine.tokens = None
    with pytest.raises(EngineError):
        await clock.watch(heart, 2 * LIMIT)
    engine.tokens = (7,)
    engine.usage.hear(engine.output())
    await clock.watch(heart, QUIET)


async def test_what_nan_answers_is_no_token_be_it_given_to_callers(
    engine: Engine, clock: Clock, heart: Pulse, step: Gauge
) -> None:
    async def answer_callers(seconds: int) -> None:
        for _ in range(seconds):
            engine.usage.hear(engine.output())
            step.inc()
            await clock.watch(heart, 1)

    engine.tokens = (0, 0)
    with pytest.raises(EngineError, match="answers, and has given no token"):
        await answer_callers(QUIET + 2)
    engine.tokens = (7,)
    await answer_callers(2 * QUIET)


async def test_an_engine_that_reads_a_long_prompt_is_not_stuck(
    engine: Engine, clock: Clock, heart: Pulse, step: Gauge
) -> None:
    engine.tokens = None
    for _ in range(10):
        step.inc()
        await clock.watch(heart, LIMIT)
    with pytest.raises(EngineError):
        await clock.watch(heart, QUIET + LIMIT)


async def test_a_question_that_fails_is_asked_again(
    clock: Clock, engine: Engine, monkeypatch: pytest.MonkeyPatch, heart: Pulse
) -> None:
    async def refuse(*_: object) -> AsyncGenerator[Any, None]:
        engine.asked.append({})
        raise RuntimeError("the engine is dead")
        yield

    monkeypatch.setattr(heart, "_generate", refuse)
    with pytest.raises(EngineError):
        await clock.watch(heart, 2 * LIMIT)
    assert len(engine.asked) > 1
