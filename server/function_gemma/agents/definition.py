"""What <name>_subagent.yaml may say.

agents/subagent.schema.json says the same in JSON Schema, for editors and other languages (a test compares
them). After a change here, in server/:
`python -m function_gemma.agents.definition > ../agents/subagent.schema.json`
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
# A file beside the definition: one component, so that no definition leads out of its own folder.
Script = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}\.py$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Model = TypeVar("Model", bound=BaseModel)


class AgentsError(Exception):
    """Anything that goes wrong with subagents; the message says what to do."""


class DefinitionError(AgentsError):
    """A definition or a gate that is not YAML or breaks its schema."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Inputs(BaseModel):
    """The JSON Schema of what a tool reads; keywords other than these three are JSON Schema's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["object"]
    properties: dict[str, dict[str, Any]] = {}
    required: list[str] = []

    @model_validator(mode="after")
    def _required_are_described(self) -> Inputs:
        if unknown := set(self.required) - set(self.properties):
            raise ValueError(f"required but not in properties: {', '.join(sorted(unknown))}")
        return self


class Tool(_Part):
    """One function that the model may call."""

    name: Name = Field(description="the function's name in the model's call")
    description: Text = Field(description="what the model is told that it does")
    inputs: Inputs = Field(description="JSON Schema of the call's arguments, an object")
    script: Script = Field(
        description="file beside the definition, run by Python in the workspace: "
        "arguments as JSON on stdin, result as JSON on stdout"
    )


class InitialContext(_Part):
    """What the model reads before its first turn."""

    system_prompt: Text = Field(description="who it is and how it works")
    node_context: Text = Field(
        description="where it works: what the caller's workspace looks like to its tools"
    )


class Definition(_Part):
    """A subagent: an adapter, what it is told first, and the tools that it may call."""

    name: Name = Field(description="also its folder, and the beginning of its file's name")
    adapter: AdapterName = Field(description="the model to ask for at the server")
    max_turns: int = Field(ge=1, le=100, description="answers of the model before the caller stops it")
    initial_context: InitialContext
    tools: list[Tool] = Field(min_length=1)

    @model_validator(mode="after")
    def _tools_differ(self) -> Definition:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        return self


def path_of(name: str) -> str:
    """Say where a subagent's definition lies, below agents/ and below the server's /agents/ alike."""
    return f"{name}/{name}_subagent.yaml"


def parse(text: str, where: str) -> Definition:
    """Read a definition; `where` names it in the DefinitionError."""
    return read(Definition, text, where, "subagent.schema.json")


def read(model: type[Model], text: str, where: str, schema: str) -> Model:
    """Read YAML as a model; the DefinitionError names the text by `where`, and the file of its schema."""
    try:
        return model.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise DefinitionError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = (
            f"{'.'.join(str(part) for part in problem['loc']) or 'it'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise DefinitionError(f"{where} breaks {schema}: {'; '.join(problems)}") from error


def json_schema(model: type[BaseModel] = Definition) -> str:
    """Return the text of subagent.schema.json, or of another model's schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
