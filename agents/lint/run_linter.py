"""Lint a Python file or folder of the workspace.

stdin: {"path": "src/app.py", "fix": false}
stdout: {"linter": "ruff", "problems": [{"path", "line", "column", "code", "message"}]},
    or {"error": …} and exit 1
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds


def inside(path: str) -> Path:
    """Return the existing path in full; refuse one that leads out of the workspace."""
    workspace = Path.cwd().resolve()
    found = (workspace / path).resolve(strict=True)
    if not found.is_relative_to(workspace):
        raise ValueError(f"{path} is outside the workspace")
    return found


def relative(path: str | Path) -> str:
    """Return a path as the workspace's user writes it."""
    return str(Path(path).relative_to(Path.cwd().resolve()))


def by_ruff(ruff: str, path: Path, *, fix: bool) -> list[dict[str, Any]]:
    """Return what ruff finds under the workspace's own settings."""
    command = [ruff, "check", "--output-format=json", *(["--fix"] if fix else []), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if ended.returncode not in {0, 1}:  # 1: there are problems
        raise ValueError(f"ruff failed: {ended.stderr.strip()}")
    return [
        {
            "path": relative(problem["filename"]),
            "line": problem["location"]["row"],
            "column": problem["location"]["column"],
            "code": problem["code"],
            "message": problem["message"],
        }
        for problem in json.loads(ended.stdout)
    ]


def by_compiler(path: Path) -> list[dict[str, Any]]:
    """Return the syntax errors that Python itself finds."""
    problems = []
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        try:
            ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte
            place = (error.lineno, error.offset) if isinstance(error, SyntaxError) else (1, 1)
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            problems.append(
                {
                    "path": relative(file),
                    "line": place[0],
                    "column": place[1],
                    "code": "syntax",
                    "message": message,
                }
            )
    return problems


def main() -> int:
    """Read the inputs, print the result, return the exit code."""
    try:
        inputs = json.load(sys.stdin)
        path, fix = inside(inputs["path"]), bool(inputs.get("fix", False))
        ruff = shutil.which("ruff")
        problems = by_ruff(ruff, path, fix=fix) if ruff else by_compiler(path)
    except (OSError, KeyError, TypeError, ValueError, subprocess.TimeoutExpired) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps({"linter": "ruff" if ruff else "python", "problems": problems}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
