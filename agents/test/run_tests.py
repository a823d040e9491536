"""Run pytest on a file or folder of the workspace.

stdin: {"path": "tests/test_app.py", "keyword": "login and not slow"}
stdout: {"passed": 3, "failed": 1, "skipped": 0, "failures": [{"test", "message"}]},
    or {"error": …} and exit 1
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TIMEOUT = 600  # seconds
NO_TESTS = 5  # pytest's exit code


def inside(path: str) -> Path:
    """Return the existing path in full; refuse one that leads out of the workspace."""
    workspace = Path.cwd().resolve()
    found = (workspace / path).resolve(strict=True)
    if not found.is_relative_to(workspace):
        raise ValueError(f"{path} is outside the workspace")
    return found


def reason(problem: ElementTree.Element) -> str:
    """Return the lines that pytest marks as the reason, or its summary where it marks none."""
    marked = [line[1:].strip() for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return "\n".join(marked) or problem.get("message", "")


def run(path: Path, keyword: str | None) -> dict[str, Any]:
    """Return pytest's counts and the failures' messages (a collection error counts as a failure)."""
    if importlib.util.find_spec("pytest") is None:
        raise ValueError(f"{sys.executable} has no pytest: run the tool with the workspace's Python")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        select = [f"-k={keyword}"] if keyword else []
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *select, str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        if not report.exists():
            raise ValueError(f"pytest failed: {(ended.stderr or ended.stdout).strip()[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest wrote it a moment ago
    if ended.returncode == NO_TESTS:
        raise ValueError(f"no tests in {path.name}" + (f" match {keyword!r}" if keyword else ""))
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": reason(problem)}
        for case in cases
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = len({failure["test"] for failure in failures})
    return {
        "passed": len(cases) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "failures": failures,
    }


def main() -> int:
    """Read the inputs, print the result, return the exit code."""
    try:
        inputs = json.load(sys.stdin)
        result = run(inside(inputs["path"]), inputs.get("keyword"))
    except (OSError, KeyError, TypeError, ValueError, subprocess.TimeoutExpired) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
