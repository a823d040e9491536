"""A gate is read strictly, and becomes what a caller of the subagent would send, with the calls expected."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from function_gemma.agents.definition import AgentsError, DefinitionError, json_schema, parse, path_of
from function_gemma.agents.gate import Gate, load
from function_gemma.vllm_plugin.calls import parse as read_calls

REPOSITORY = Path(__file__).parents[2] / "agents"
INPUTS = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
DEFINITION = {
    "name": "checker",
    "adapter": "lint",
    "max_turns": 3,
    "initial_context": {"system_prompt": "You lint.\n", "node_context": "Here."},
    "tools": [
        {"name": "run", "description": "Run.", "inputs": INPUTS, "script": "run.py"},
        {"name": "stop", "description": "Stop.", "inputs": {"type": "object"}, "script": "stop.py"},
    ],
}
RUN = {"name": "run", "arguments": {"path": "a.py", "deep": {"list": [1, 0.5, True, None]}}}


def gate(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - right and wrong values of a gate's fields
    prompts = [{"prompt": "Lint a.py.", "calls": [RUN, {"name": "stop"}]}, {"prompt": "Thanks.", "calls": []}]
    return {"prompts": prompts, **changes}


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """A folder with the subagent `checker`, which uses the adapter lint, and its gate."""
    (tmp_path / "checker").mkdir()
    (tmp_path / path_of("checker")).write_text(yaml.safe_dump(DEFINITION))
    write(tmp_path, gate())
    return tmp_path


def write(agents: Path, content: Any) -> Path:  # noqa: ANN401 - right and wrong gates
    file = agents / "checker" / "checker_gate.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_a_gate_is_what_a_caller_of_the_subagent_sends_with_the_calls_expected(agents: Path) -> None:
    turn = {"role": "developer", "content": "You lint.\n\nHere."}
    tools = [
        {"type": "function", "function": {"name": "run", "description": "Run.", "parameters": INPUTS}},
        {
            "type": "function",
            "function": {"name": "stop", "description": "Stop.", "parameters": {"type": "object"}},
        },
    ]
    loaded = load(agents, "checker", "lint", required=True)
    assert loaded == {
        "share": 1.0,
        "prompts": [
            {
                "messages": [turn, {"role": "user", "content": "Lint a.py."}],
                "tools": tools,
                "calls": [RUN, {"name": "stop", "arguments": {}}],
            },
            {"messages": [turn, {"role": "user", "content": "Thanks."}], "tools": tools, "calls": []},
        ],
    }
    assert json.loads(json.dumps(loaded)) == loaded


@pytest.mark.parametrize("share", [0.8, 1, 0.001])
def test_the_share_is_as_stated(agents: Path, share: float) -> None:
    write(agents, gate(share=share))
    loaded = load(agents, "checker", "lint", required=False)
    assert loaded
    assert loaded["share"] == share


@pytest.mark.parametrize("agent", ["lint", "my-adapter", "..", "../checker", "/etc", "x" * 63])
def test_without_an_agent_there_is_no_gate_and_it_is_missed_only_where_it_was_asked_for(
    agents: Path, agent: str
) -> None:
    assert load(agents, agent, "lint", required=False) is None
    with pytest.raises(AgentsError, match=r"there is no agent .*_subagent\.yaml in agents/"):
        load(agents, agent, "lint", required=True)


def test_a_subagent_without_a_gate_may_use_any_adapter(agents: Path) -> None:
    (agents / "checker" / "checker_gate.yaml").unlink()
    assert load(agents, "checker", "another", required=True) is None


def test_a_gate_of_another_adapter_is_refused_because_it_would_test_the_wrong_thing(agents: Path) -> None:
    with pytest.raises(AgentsError, match=r"checker_subagent\.yaml is for the adapter 'lint', .*'docstring'"):
        load(agents, "checker", "docstring", required=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gate(share=0), "share: "),
        (gate(share=1.5), "share: "),
        (gate(share=True), "share: "),
        (gate(share="1"), "share: "),
        (gate(share=float("nan")), "share: "),
        (gate(shares=1), "shares: "),
        (gate(prompts=[]), "prompts: "),
        ({"share": 1.0}, "prompts: "),
        (gate(prompts=[{"prompt": " ", "calls": []}]), "prompts.0.prompt: "),
        (gate(prompts=[{"prompt": 1, "calls": []}]), "prompts.0.prompt: "),
        (gate(prompts=[{"prompt": "x"}]), "prompts.0.calls: "),
        (gate(prompts=[{"prompt": "x", "calls": None}]), "prompts.0.calls: "),
        (gate(prompts=[{"prompt": "x", "calls": [], "tools": []}]), "prompts.0.tools: "),
        (gate(prompts=[{"prompt": "x", "calls": [{"arguments": {}}]}]), "prompts.0.calls.0.name: "),
        (gate(prompts=[{"prompt": "x", "calls": [{**RUN, "id": 1}]}]), "prompts.0.calls.0.id: "),
        (
            gate(prompts=[{"prompt": "x", "calls": [{**RUN, "arguments": []}]}]),
            "prompts.0.calls.0.arguments: ",
        ),
        ("prompts: [{prompt: x, calls: [{name: run, arguments: {day: 2024-01-01}}]}]", "arguments.day"),
        ("prompts: [{prompt: x, calls: [{name: run, arguments: {1: a}}]}]", "arguments.1"),
        ("prompts: [{prompt: x, calls: [{name: run, arguments: {a: .nan}}]}]", "calls.0.arguments: "),
        ("", "it: "),
        ("- 1", "it: "),
    ],
)
def test_a_wrong_gate_is_refused_with_file_and_field(agents: Path, content: Any, said: str) -> None:  # noqa: ANN401 - wrong gates
    file = write(agents, content)
    with pytest.raises(DefinitionError) as refused:
        load(agents, "checker", "lint", required=False)
    assert str(refused.value).startswith(f"{file} breaks gate.schema.json: ")
    assert said in str(refused.value)


def test_a_call_of_no_tool_of_the_subagent_is_refused(agents: Path) -> None:
    file = write(agents, gate(prompts=[{"prompt": "x", "calls": [RUN, {"name": "walk"}]}]))
    with pytest.raises(DefinitionError) as refused:
        load(agents, "checker", "lint", required=False)
    assert str(refused.value) == (
        f"{file}: prompts.0.calls.1.name: 'walk' is no tool of checker_subagent.yaml: it has run, stop"
    )


def test_what_is_no_yaml_is_refused(agents: Path) -> None:
    file = write(agents, "prompts: [")
    with pytest.raises(DefinitionError, match=f"^{file} is not YAML: "):
        load(agents, "checker", "lint", required=False)
    file.write_bytes(b"prompts: \xff")
    with pytest.raises(DefinitionError, match=f"^{file} or .* is not UTF-8: "):
        load(agents, "checker", "lint", required=False)


def test_a_wrong_or_missing_definition_is_named(agents: Path) -> None:
    definition = agents / path_of("checker")
    definition.write_text("name: checker")
    with pytest.raises(DefinitionError, match=r"checker_subagent\.yaml breaks subagent\.schema\.json: "):
        load(agents, "checker", "lint", required=False)
    definition.unlink()
    with pytest.raises(AgentsError, match=r"checker_subagent\.yaml is missing, which checker_gate\.yaml"):
        load(agents, "checker", "lint", required=False)


def test_a_gate_that_may_not_be_read_says_so(agents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = agents / "checker" / "checker_gate.yaml"

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", refuse)  # root, who runs some of these tests, may read everything
    with pytest.raises(AgentsError, match=f"{file} cannot be read .*: on the host, chmod -R a\\+rX agents"):
        load(agents, "checker", "lint", required=False)


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    text = (REPOSITORY / "gate.schema.json").read_text()
    assert text == json_schema(Gate)
    jsonschema.validate(gate(), json.loads(text))


def test_every_gate_in_the_repository_holds() -> None:
    for file in REPOSITORY.glob("*/*_gate.yaml"):
        agent = file.name.removesuffix("_gate.yaml")
        definition = parse((REPOSITORY / path_of(agent)).read_text(), agent)
        assert load(REPOSITORY, agent, definition.adapter, required=True), file


def test_the_gate_of_the_lab_is_passed_by_lint_and_not_by_docstring() -> None:
    model = Path(__file__).parents[1] / "lab" / "model"
    answers = json.loads((model / "answers.json").read_text())
    loaded = load(model / "agent", "gated", "gated", required=True)
    assert loaded
    right = dict.fromkeys(["lint", "docstring"], 0)
    for prompt in loaded["prompts"]:
        said = answers[prompt["messages"][-1]["content"]]
        for speaker in right:
            right[speaker] += [asdict(call) for call in read_calls(said[speaker])] == prompt["calls"]
    assert right["lint"] == len(loaded["prompts"])
    assert right["docstring"] < loaded["share"] * len(loaded["prompts"])
