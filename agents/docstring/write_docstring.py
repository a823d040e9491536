"""Insert a docstring into a function or class of a Python file; nothing else in the file changes.

stdin: {"path": "src/app.py", "name": "Class.function", "docstring": "Return …"}; the last two may be left out
stdout: {"name", "line", "docstring"}, or {"error": …} and exit 1
"""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def inside(path: str) -> Path:
    """Return the existing path in full; refuse one that leads out of the workspace."""
    workspace = Path.cwd().resolve()
    found = (workspace / path).resolve(strict=True)
    if not found.is_relative_to(workspace):
        raise ValueError(f"{path} is outside the workspace")
    return found


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Yield each function and class with its dotted name, in the file's order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Documented):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def choose(tree: ast.AST, wanted: str | None) -> tuple[str, Documented]:
    """Return the definition that is named, or the first that lacks a docstring."""
    found = [(name, node) for name, node in definitions(tree) if wanted in {None, name}]
    if wanted and not found:
        raise ValueError(f"there is no function or class {wanted}")
    for name, node in found:
        if ast.get_docstring(node) is None:
            return name, node
    raise ValueError(f"{wanted or 'everything'} has a docstring already")


def insert(source: str, node: Documented, text: str) -> tuple[str, int]:
    """Return the source with the docstring before the first statement of the body, and its line (from 1)."""
    first = node.body[0]
    # A decorated definition begins at its first decorator.
    line = min([first.lineno, *(item.lineno for item in getattr(first, "decorator_list", []))])
    lines = io.StringIO(source, newline="").readlines()  # lines as Python counts them: no form feeds
    margin = lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]
    if first.lineno == node.lineno or len(margin.encode()) != first.col_offset:
        raise ValueError(f"{node.name} has its body on the line of its signature: break the line first")
    newline = "\r\n" if lines[0].endswith("\r\n") else "\n"
    escaped = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    if escaped.endswith('"'):
        escaped = escaped[:-1] + '\\"'
    body = [f"{margin}{part}".rstrip() for part in escaped.splitlines()]
    quoted = f'{margin}"""' + newline.join(body).lstrip()
    quoted += f'{newline}{margin}"""' if len(body) > 1 else '"""'
    lines.insert(line - 1, quoted + newline)
    return "".join(lines), line


def run(inputs: dict[str, Any]) -> dict[str, Any]:
    """Write the docstring and return what was written."""
    path = inside(inputs["path"])
    source = path.read_bytes().decode()
    name, node = choose(ast.parse(source), inputs.get("name"))
    words = node.name.strip("_").replace("_", " ").capitalize()
    text = (inputs.get("docstring") or f"{words}.").strip()
    changed, line = insert(source, node, text)
    _, documented = next(item for item in definitions(ast.parse(changed)) if item[0] == name)
    path.write_bytes(changed.encode())
    return {"name": name, "line": line, "docstring": ast.get_docstring(documented)}


def main() -> int:
    """Read the inputs, print the result, return the exit code."""
    try:
        result = run(json.load(sys.stdin))
    except (OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
