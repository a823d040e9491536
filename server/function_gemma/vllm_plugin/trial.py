"""What a new generation has to do before its name moves: answer one completion, then its gate's prompts.

It is asked under its inner name by the very routes that callers use, within this process.
"""

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp

from function_gemma.adapters.base import container
from function_gemma.adapters.errors import EngineError, GateError

from .calls import Call, CallError, parse

_PATIENCE = 120  # seconds for all of it


class ExpectedCall(BaseModel):
    """A call of a tool, with exactly these arguments."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    arguments: dict[str, Any]


class GatePrompt(BaseModel):
    """A chat, the tools that may be called in it, and the calls that the answer must be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]]
    calls: list[ExpectedCall]


class Gate(BaseModel):
    """The prompts, and which share of them must be answered as expected."""

    model_config = ConfigDict(extra="forbid", strict=True)

    share: float = Field(gt=0, le=1)
    prompts: list[GatePrompt] = Field(min_length=1)


@dataclass(frozen=True)
class Passed:
    """How a gate was passed."""

    passed: int
    of: int
    share: float  # that was asked for


class Trial:
    """Asks a generation of the server that this process is."""

    def __init__(self, app: ASGIApp, authorization: str | None, gate: Gate | None) -> None:
        """Take over the header of whoever asked for the load, for a server that has --api-key."""
        self._app = app
        self._headers = {"Authorization": authorization} if authorization else {}
        self._gate = gate

    async def prove(self, model: str) -> None:
        """Ask for one completion; EngineError where it has no token, or only the one that NaN gives."""
        body = {
            "model": model,
            "prompt": "Who are you?",
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,  # not logprobs, which vLLM compiles at their first use
        }
        tokens = (await self._ask("/v1/completions", body))["choices"][0].get("token_ids")
        # The largest of scores that are all NaN is the first.
        if not tokens or not any(tokens):
            raise EngineError(
                f"'{model}' was loaded but answers with nothing, as where weights overflow: train it again"
            )

    async def pass_gate(self, model: str) -> Passed | None:
        """Ask the gate's prompts, if there is a gate; GateError where too few answers are as expected."""
        gate = self._gate
        if gate is None:
            return None
        failures = [failure for prompt in gate.prompts if (failure := await self._fails(model, prompt))]
        passed, of = len(gate.prompts) - len(failures), len(gate.prompts)
        if passed < gate.share * of:
            raise GateError(
                f"'{model}' answers {passed} of its gate's {of} prompts as expected, and the share is "
                f"{gate.share:g}. The first that fails: {failures[0]}. What served before still serves: "
                "train it further, or correct the gate's file"
            )
        return Passed(passed, of, gate.share)

    async def _fails(self, model: str, prompt: GatePrompt) -> str | None:
        """Ask one prompt; return what was expected and found where they differ."""
        body = {
            "model": model,
            "messages": prompt.messages,
            "tools": prompt.tools,
            # As text, marks and all: vLLM's own parser loses arguments.
            "tool_choice": "none",
            "skip_special_tokens": False,
            "temperature": 0,
        }
        text = (await self._ask("/v1/chat/completions", body))["choices"][0]["message"].get("content") or ""
        expected = _words([Call(call.name, call.arguments) for call in prompt.calls])
        try:
            found = _words(parse(text))
        except CallError as error:
            return f"{_last(prompt)} was answered with a call that cannot be read ({error})"
        return None if found == expected else f"{_last(prompt)} should call {expected}, not {found}"

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=self._headers
        ) as client:
            try:
                async with asyncio.timeout(_PATIENCE):
                    response = await client.post(path, json=body)
            except TimeoutError as error:
                raise EngineError(
                    f"'{body['model']}' did not answer within {_PATIENCE} s: see `docker logs {container()}`"
                ) from error
        if response.status_code != HTTPStatus.OK:
            raise EngineError(
                f"'{body['model']}' was loaded but answers with HTTP {response.status_code}: "
                f"{response.text[:300]}"
            )
        answer: dict[str, Any] = response.json()
        return answer


def _last(prompt: GatePrompt) -> str:
    return json.dumps(prompt.messages[-1].get("content"), ensure_ascii=False)


def _words(calls: list[Call]) -> str:
    """Put calls in words, which differ where a type does: for Python True is 1."""
    return (
        ", ".join(
            f"{call.name}{json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)}" for call in calls
        )
        or "nothing"
    )
