"""List the functions and classes of a Python file that have no docstring.

stdin: {"path": "src/app.py"}
stdout: {"undocumented": [{"name", "line", "signature"}]}, or {"error": …} and exit 1
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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


def signature(node: Documented) -> str:
    """Return the first line of the definition, without its body."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def main() -> int:
    """Read the inputs, print the result, return the exit code."""
    try:
        tree = ast.parse(inside(json.load(sys.stdin)["path"]).read_bytes())
    except (OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    undocumented = [
        {"name": name, "line": node.lineno, "signature": signature(node)}
        for name, node in definitions(tree)
        if ast.get_docstring(node) is None
    ]
    print(json.dumps({"undocumented": undocumented}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
