"""What the tools of the subagents do, run as a caller runs them: JSON in, JSON out, in a workspace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

AGENTS = Path(__file__).parents[2] / "agents"
ALL = sorted(str(script.relative_to(AGENTS)) for script in AGENTS.glob("*/*.py"))
WITH_PATH = [script for script in ALL if not script.startswith("sample_data/")]


def call(script: str, inputs: object, workspace: Path, *, ruff: bool = True) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent) if ruff else "/nowhere"}
    ended = subprocess.run(
        [sys.executable, AGENTS / script],
        input=json.dumps(inputs),
        capture_output=True,
        text=True,
        check=False,
        cwd=workspace,
        env=environment,
    )
    assert ended.stderr == ""
    return ended.returncode, json.loads(ended.stdout)


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("inputs", [{}, [], None, {"path": 3, "schema": 3}])
def test_wrong_inputs_end_in_an_error_that_the_model_can_read(
    script: str, inputs: object, tmp_path: Path
) -> None:
    code, result = call(script, inputs, tmp_path)
    assert code == 1
    assert list(result) == ["error"]


@pytest.mark.parametrize("script", WITH_PATH)
@pytest.mark.parametrize("path", ["../outside.py", "/etc/hostname", "link.py", "absent.py"])
def test_a_path_outside_the_workspace_is_refused(script: str, path: str, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    outside = tmp_path / "outside.py"
    outside.write_text("def f():\n    return 1\n")
    (workspace / "link.py").symlink_to(outside)
    code, result = call(script, {"path": path}, workspace)
    assert code == 1
    assert "outside the workspace" in result["error"] or "FileNotFoundError" in result["error"]
    assert outside.read_text() == "def f():\n    return 1\n"


def test_the_linter_lists_and_mends(tmp_path: Path) -> None:
    file = tmp_path / "src" / "app.py"
    file.parent.mkdir()
    (tmp_path / "ruff.toml").write_text("lint.select = ['F']\n")
    file.write_text("import os\nprint(nothing)\n")
    code, result = call("lint/run_linter.py", {"path": "src/app.py"}, tmp_path)
    assert (code, result["linter"]) == (0, "ruff")
    assert [(p["path"], p["line"], p["code"]) for p in result["problems"]] == [
        ("src/app.py", 1, "F401"),
        ("src/app.py", 2, "F821"),
    ]
    code, result = call("lint/run_linter.py", {"path": "src", "fix": True}, tmp_path)
    assert [problem["code"] for problem in result["problems"]] == ["F821"]
    assert file.read_text() == "print(nothing)\n"


def test_the_linter_finds_syntax_errors_without_ruff(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "wrong.py").write_text("x = 1\ndef f(:\n")
    code, result = call("lint/run_linter.py", {"path": "."}, tmp_path, ruff=False)
    assert (code, result["linter"]) == (0, "python")
    assert [(p["path"], p["line"], p["code"]) for p in result["problems"]] == [("wrong.py", 2, "syntax")]


def test_the_tests_are_counted_and_their_failures_told(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 + 1 == 3, 'arithmetic'\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
    )
    code, result = call("test/run_tests.py", {"path": "test_app.py"}, tmp_path)
    assert code == 0
    assert (result["passed"], result["failed"], result["skipped"]) == (1, 1, 1)
    (failure,) = result["failures"]
    assert failure["test"] == "test_app::test_wrong"
    assert "arithmetic" in failure["message"]
    assert call("test/run_tests.py", {"path": ".", "keyword": "right"}, tmp_path)[1]["passed"] == 1


def test_a_test_file_that_does_not_import_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text("import no_such_module\n")
    code, result = call("test/run_tests.py", {"path": "test_app.py"}, tmp_path)
    assert (code, result["passed"], result["failed"]) == (0, 0, 1)
    assert "no_such_module" in result["failures"][0]["message"]


def test_no_tests_are_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text("")
    code, result = call("test/run_tests.py", {"path": "test_app.py"}, tmp_path)
    assert code == 1
    assert "no tests" in result["error"]


SOURCE = '''\
"""A module."""


class Store:
    """A store."""

    @property
    def size(self) -> int:
        # how many
        return 1

    def load(
        self, path: str
    ) -> None:
        def check():
            pass


def main():
    """Run."""


async def poll(): return 1
'''


def test_what_has_no_docstring_is_listed(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SOURCE)
    code, result = call("docstring/list_undocumented.py", {"path": "app.py"}, tmp_path)
    assert code == 0
    assert [(item["name"], item["line"]) for item in result["undocumented"]] == [
        ("Store.size", 8),
        ("Store.load", 12),
        ("Store.load.check", 15),
        ("poll", 23),
    ]
    assert result["undocumented"][1]["signature"] == "def load(self, path: str) -> None"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("text", ["Load it.", 'Say "no"', "Two.\n\nMore.", r"See \d and \n.", 'A """ and \\'])
def test_a_docstring_is_inserted_and_nothing_else_changes(text: str, newline: str, tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_bytes(SOURCE.replace("\n", newline).encode())
    code, result = call(
        "docstring/write_docstring.py", {"path": "app.py", "name": "Store.load", "docstring": text}, tmp_path
    )
    assert (code, result) == (0, {"name": "Store.load", "line": 15, "docstring": text})
    lines = file.read_bytes().decode().split(newline)
    added = len(text.splitlines()) + (1 if "\n" in text else 0)
    assert newline.join(lines[:14] + lines[14 + added :]) == SOURCE.replace("\n", newline)


def test_a_call_with_the_path_alone_documents_the_first(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SOURCE)
    code, result = call("docstring/write_docstring.py", {"path": "app.py"}, tmp_path)
    assert (code, result) == (0, {"name": "Store.size", "line": 10, "docstring": "Size."})


@pytest.mark.parametrize(
    ("name", "said"),
    [("main", "has a docstring"), ("other", "no function"), ("poll", "break the line")],
)
def test_a_docstring_that_cannot_be_inserted_is_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SOURCE)
    code, result = call("docstring/write_docstring.py", {"path": "app.py", "name": name}, tmp_path)
    assert code == 1
    assert said in result["error"]
    assert (tmp_path / "app.py").read_text() == SOURCE


ROW = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "mail": {"type": "string", "format": "email"},
        "since": {"type": "string", "format": "date-time"},
        "day": {"type": "string", "format": "date", "maxLength": 10},
        "name": {"type": "string", "minLength": 2, "maxLength": 3},
        "age": {"type": "integer", "minimum": 17.5, "maximum": 19},
        "debt": {"type": "number", "maximum": -5},
        "level": {"enum": ["a", "b", None]},
        "kind": {"const": "row"},
        "tags": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 4},
        "where": {"properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False},
    },
}


def test_rows_satisfy_their_schema_and_a_seed_repeats_them(tmp_path: Path) -> None:
    code, result = call("sample_data/generate_rows.py", {"schema": ROW, "count": 200, "seed": 7}, tmp_path)
    assert (code, len(result["rows"])) == (0, 200)
    validator = jsonschema.Draft202012Validator(ROW, format_checker=jsonschema.FormatChecker())
    for row in result["rows"]:
        validator.validate(row)
        assert set(row) == set(ROW["properties"])
    again = call("sample_data/generate_rows.py", {"schema": ROW, "count": 200, "seed": 7}, tmp_path)[1]
    other = call("sample_data/generate_rows.py", {"schema": ROW, "count": 200, "seed": 8}, tmp_path)[1]
    assert again == result
    assert other != result


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"pattern": "a+"}, "pattern"),
        ({"type": "date"}, "'date'"),
        ({"format": "ipv4"}, "'ipv4'"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "no integer"),
        ({"type": "number", "minimum": 2, "maximum": 1}, "above maximum"),
        ({"minLength": 5, "maxLength": 4}, "above maxLength"),
        ({"format": "uuid", "maxLength": 4}, "uuid has 36 characters"),
        ({"properties": {}, "required": ["a"]}, "not in properties"),
    ],
)
def test_an_impossible_schema_is_refused(schema: dict[str, Any], said: str, tmp_path: Path) -> None:
    code, result = call("sample_data/generate_rows.py", {"schema": schema}, tmp_path)
    assert code == 1
    assert said in result["error"]
