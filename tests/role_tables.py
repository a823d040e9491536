#!/usr/bin/env python3
"""Writes roles/README.md, the variables of all roles, from their argument specifications: `make docs`."""

import json
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[1] / "roles"
README = ROLES / "README.md"

HEAD = """\
# The variables of the roles

Written by `make docs` from each role's `meta/argument_specs.yml`, which is where to change it. Set them in
the inventory's `group_vars/inference_servers` (those of connection_check in `group_vars/tailnet_clients`).

A variable without a default here writes no line: the default lies in `server/`, in the file that reads it.
"""


def specifications() -> dict[str, dict[str, Any]]:
    """Return each role's entry points by name."""
    files = sorted(ROLES.glob("*/meta/argument_specs.yml"))
    return {file.parts[-3]: yaml.safe_load(file.read_text())["argument_specs"] for file in files}


def options(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables of all entry points of a role."""
    return {name: option for entry in entries.values() for name, option in entry.get("options", {}).items()}


def default(option: dict[str, Any]) -> str:
    """Return the table's cell for a default: as it would stand in an inventory, in JSON's form."""
    if option.get("required"):
        return "must be set"
    if "default" not in option:
        return ""
    value = option["default"]
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def kind(option: dict[str, Any]) -> str:
    """Return the table's cell for a type."""
    if "choices" in option:
        return ", ".join(f"`{choice}`" for choice in option["choices"])
    return f"list of {option['elements']}" if option["type"] == "list" else str(option["type"])


def table(role: str, entries: dict[str, Any]) -> str:
    """Return a role's section."""
    lines = [f"\n## {role}: {entries['main']['short_description']}", ""]
    lines += entries["main"]["description"]
    lines += ["", "| variable | type | default | meaning |", "|---|---|---|---|"]
    for name, option in options(entries).items():
        lines.append(f"| `{name}` | {kind(option)} | {default(option)} | {option['description']} |")
        lines += [
            f"| `{name}[].{key}` | {kind(inner)} | {default(inner)} | {inner['description']} |"
            for key, inner in option.get("options", {}).items()
        ]
    return "\n".join(lines) + "\n"


def text() -> str:
    """Return the whole page."""
    return HEAD + "".join(table(role, entries) for role, entries in specifications().items())


if __name__ == "__main__":
    README.write_text(text())
