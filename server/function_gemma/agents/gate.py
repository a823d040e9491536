"""The gate of an adapter: prompts and the calls that its answers must be, before it takes over from another.

It lies in the folder of the agent that uses the adapter, as <agent>_gate.yaml. agents/gate.schema.json says
what it may hold (a test compares them). After a change here, in server/:
`python -m function_gemma.agents.gate > ../agents/gate.schema.json`
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from function_gemma.agents.definition import (
    AgentsError,
    Definition,
    DefinitionError,
    Name,
    Text,
    json_schema,
    parse,
    path_of,
    read,
)

if TYPE_CHECKING:
    from pathlib import Path


class _Part(BaseModel):
    # Strict, unlike a definition: `share: yes` is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Call(_Part):
    """One call that is expected."""

    name: Name = Field(description="one of the agent's tools")
    arguments: dict[str, JsonValue] = Field(default={}, description="exactly these, with their types")

    @field_validator("arguments")
    @classmethod
    def _no_nan(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(arguments, allow_nan=False)  # YAML has .nan and .inf, JSON and the model have not
        return arguments


class Prompt(_Part):
    """What a user asks, and what the model must call then."""

    prompt: Text
    calls: list[Call] = Field(description="exactly these, in this order; [] means an answer without a call")


class Gate(_Part):
    """An adapter takes over when enough of the prompts are answered with the calls expected."""

    share: float = Field(default=1.0, gt=0, le=1, description="of the prompts, how many must be right")
    prompts: list[Prompt] = Field(min_length=1)


def load(agents: Path, agent: str, adapter: str, *, required: bool) -> dict[str, Any] | None:
    """Return the gate of `agent` for `adapter`, None where it has none; `required`: of the agent itself.

    `agents` is the folder of all of them. The result is {"share": 0 < float ≤ 1, "prompts": [{"messages",
    "tools", "calls"}]}: messages and tools in OpenAI's form, as a caller of the subagent sends them, and
    calls a list of {"name", "arguments"}. AgentsError where the gate could not test this adapter.
    """
    file = agents / agent / f"{agent}_gate.yaml"
    definition_file = agents / path_of(agent)
    try:
        if "/" in agent or not file.is_file():
            if required and ("/" in agent or not definition_file.is_file()):
                raise AgentsError(
                    f"there is no agent {agent!r}: write {agent}/{agent}_subagent.yaml in agents/"
                )
            return None
        gate = read(Gate, file.read_text(encoding="utf-8"), str(file), "gate.schema.json")
        definition = parse(definition_file.read_text(encoding="utf-8"), str(definition_file))
    except FileNotFoundError as error:
        raise AgentsError(f"{error.filename} is missing, which {file.name} needs beside it") from error
    except OSError as error:
        raise AgentsError(
            f"{error.filename} cannot be read ({error.strerror}): on the host, chmod -R a+rX agents"
        ) from error
    except UnicodeDecodeError as error:
        raise DefinitionError(f"{file} or {definition_file.name} beside it is not UTF-8: {error}") from error
    if definition.adapter != adapter:
        raise AgentsError(
            f"{definition_file} is for the adapter {definition.adapter!r}, so that its gate cannot test "
            f"{adapter!r}: name the agent that uses it, or change the line `adapter:`"
        )
    tools = {tool.name for tool in definition.tools}
    for number, prompt in enumerate(gate.prompts):
        for position, call in enumerate(prompt.calls):
            if call.name not in tools:
                raise DefinitionError(
                    f"{file}: prompts.{number}.calls.{position}.name: {call.name!r} is no tool of "
                    f"{definition_file.name}: it has {', '.join(sorted(tools))}"
                )
    return {"share": gate.share, "prompts": [_request(definition, prompt) for prompt in gate.prompts]}


def _request(definition: Definition, prompt: Prompt) -> dict[str, Any]:
    """Return what a caller of the subagent sends for the prompt, and the calls expected."""
    context = definition.initial_context
    instructions = f"{context.system_prompt}\n\n{context.node_context}"
    functions = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.inputs.model_dump(exclude_unset=True),  # as it is written
        }
        for tool in definition.tools
    ]
    return {
        "messages": [
            {"role": "developer", "content": instructions},
            {"role": "user", "content": prompt.prompt},
        ],
        "tools": [{"type": "function", "function": function} for function in functions],
        "calls": [call.model_dump() for call in prompt.calls],
    }


if __name__ == "__main__":
    print(json_schema(Gate), end="")
