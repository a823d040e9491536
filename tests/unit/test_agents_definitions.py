"""What lies in agents/: definitions that hold, and a schema that says what the code checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from function_gemma.agents.definition import Definition, DefinitionError, json_schema, parse, path_of

AGENTS = Path(__file__).parents[2] / "agents"
NAMES = ["docstring", "lint", "sample_data", "test"]


def example() -> dict[str, Any]:
    return {
        "name": "lint",
        "adapter": "lint",
        "max_turns": 3,
        "initial_context": {"system_prompt": "You lint.", "node_context": "Here."},
        "tools": [{"name": "run", "description": "Run.", "inputs": {"type": "object"}, "script": "run.py"}],
    }


def test_these_subagents_are_there() -> None:
    assert sorted(folder.name for folder in AGENTS.iterdir() if folder.is_dir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_holds(name: str) -> None:
    text = (AGENTS / path_of(name)).read_text()
    definition = parse(text, name)
    assert definition.name == name
    jsonschema.validate(yaml.safe_load(text), json.loads((AGENTS / "subagent.schema.json").read_text()))
    for tool in definition.tools:
        assert (AGENTS / name / tool.script).is_file()
        jsonschema.Draft202012Validator.check_schema(tool.inputs.model_dump())


@pytest.mark.parametrize(("name", "tool"), [("lint", "run_linter"), ("docstring", "write_docstring")])
def test_the_trained_call_fits_the_tool(name: str, tool: str) -> None:
    tools = {tool.name: tool for tool in parse((AGENTS / path_of(name)).read_text(), name).tools}
    jsonschema.validate({"path": "src/app.py"}, tools[tool].inputs.model_dump())


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    assert (AGENTS / "subagent.schema.json").read_text() == json_schema()


def test_the_inputs_of_a_tool_are_handed_on_unchanged() -> None:
    raw = example()
    raw["tools"][0]["inputs"] = {
        "type": "object",
        "properties": {"path": {"type": "string"}},
        "required": ["path"],
        "additionalProperties": False,
    }
    assert Definition.model_validate(raw).tools[0].inputs.model_dump() == raw["tools"][0]["inputs"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../lint"}, "name"),
        ({"adapter": "a/b"}, "adapter"),
        ({"max_turns": 0}, "max_turns"),
        ({"tools": []}, "tools"),
        ({"max_turn": 3}, "max_turn"),
        (
            {"initial_context": {"system_prompt": " ", "node_context": "x"}},
            "initial_context.system_prompt",
        ),
        ({"tools": example()["tools"] * 2}, "two tools have the same name"),
        ({"tools": [{**example()["tools"][0], "script": "../../etc/passwd"}]}, "tools.0.script"),
        ({"tools": [{**example()["tools"][0], "inputs": {"type": "array"}}]}, "tools.0.inputs.type"),
        (
            {"tools": [{**example()["tools"][0], "inputs": {"type": "object", "required": ["path"]}}]},
            "not in properties: path",
        ),
    ],
)
def test_a_wrong_definition_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    parse(yaml.safe_dump(example()), "the example")
    with pytest.raises(DefinitionError, match=r"^x\.yaml breaks subagent\.schema\.json: ") as refused:
        parse(yaml.safe_dump({**example(), **change}), "x.yaml")
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_definition_is_refused(text: str) -> None:
    with pytest.raises(DefinitionError, match=r"^x\.yaml "):
        parse(text, "x.yaml")
