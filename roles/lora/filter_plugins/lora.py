"""Filters `lora_problems` and `lora_plan`: what is wrong with the declared adapters, what a host lacks.

Each looks at all of them in one go: a hundred unchanged adapters are one task, not a hundred.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

# The rules for names, files and digests stand once, in the server's package; no controller installs it.
sys.path.append(str(Path(__file__).resolve().parents[3] / "server"))
from function_gemma.adapters.admission import inspect
from function_gemma.adapters.errors import AdapterError
from function_gemma.adapters.source import parse_address
from function_gemma.adapters.store import check_name, digest_of

_AGENTS = Path(__file__).resolve().parents[3] / "agents"

Adapter = dict[str, Any]  # one of lora_adapters: name, source, perhaps agent
Served = dict[str, Any]  # one of what `adapter_manager.py history --json` lists


class Step(TypedDict):
    """What brings one name on the host to what is declared."""

    name: str
    line: str  # for a reader: name, old → new
    command: list[str]  # the adapter manager's words
    directory: str  # what is sent to the manager's standard input; empty where nothing is


def lora_problems(  # noqa: PLR0913 (they are the role's arguments)
    adapters: Sequence[Adapter],
    inventory: str,
    *,
    only: Sequence[str],
    state: str,
    rollback: bool | str,
    base: str,
    max_cpu_loras: int,
) -> list[str]:
    """Return a sentence for each thing that cannot end well, with what mends it.

    `only`, `state` and `rollback` narrow the run and are as given after -e. Directories count from
    `inventory`. `base` is the base model's name in requests.
    """
    back = str(rollback).lower()
    if wrong := _narrowing_problem(only, state, back):
        return [wrong]
    # What is taken away or brought back need not be declared, and its source need not exist.
    loads = state == "present" and back == "false"
    names = Counter(str(one["name"]) for one in adapters)
    problems = []
    unknown = [name for name in only if name not in names]
    if loads and unknown:
        problems.append(
            f"{', '.join(unknown)} is not declared, only {', '.join(names) or 'nothing'} is: "
            f"add it to lora_adapters in {inventory}/group_vars, with its source."
        )
    if 2 * len(names) > max_cpu_loras:
        problems.append(
            f"{len(names)} adapters are declared and server_max_cpu_loras is {max_cpu_loras}, but a new "
            f"generation is loaded beside the one that serves: set it to {2 * len(names)} in "
            f"{inventory}/group_vars."
        )
    for one in adapters:
        name = str(one["name"])
        try:
            check_name(name)
            problem = ""
            if name == base:
                problem = "it is the base model's name: choose another"
            elif names[name] > 1:
                problem = "it is declared twice: remove one"
            elif loads and (not only or name in only):
                problem = _source_problem(one, inventory)
        except AdapterError as error:
            problem = str(error)
        if problem:
            problems.append(f"Adapter '{name}' in lora_adapters ({inventory}): {problem}.")
    return list(dict.fromkeys(problems))


def _narrowing_problem(only: Sequence[str], state: str, back: str) -> str:
    """Say what is wrong with what was given after -e; empty where nothing is."""
    command = f"ansible-playbook load_adapter.yml -e name={only[0] if only else 'NAME'}"
    if state not in ("present", "absent"):
        return f"state={state} is no choice, present and absent are: {command} -e state=absent"
    if back not in ("true", "false"):
        return f"rollback={back} is no choice, true and false are: {command} -e rollback=true"
    if state == "absent" and back == "true":
        return f"state=absent and rollback=true at once cannot be: {command}, with one of the two"
    if not only and state == "absent":
        return f"state=absent needs the adapter's name: {command} -e state=absent"
    if not only and back == "true":
        return f"rollback=true needs the adapter's name: {command} -e rollback=true"
    return ""


def _source_problem(adapter: Adapter, inventory: str) -> str:
    """Say why an adapter cannot be loaded, as far as it shows without the base model; empty if it can."""
    agent, source = str(adapter.get("agent") or ""), str(adapter["source"])
    if agent and not (_AGENTS / agent / f"{agent}_subagent.yaml").is_file():
        return f"its agent {agent} has no {_AGENTS}/{agent}/{agent}_subagent.yaml: correct one or the other"
    if _is_hub(adapter):
        parse_address(source)
        return ""
    directory = _directory(adapter, inventory)
    if not directory.is_dir():
        return f"its source {directory} is no directory: correct the path, which counts from the inventory"
    inspect(directory)
    return ""


def lora_plan(  # noqa: PLR0913 (they are the role's arguments)
    adapters: Sequence[Adapter],
    served: Sequence[Served],
    inventory: str,
    *,
    only: Sequence[str],
    state: str,
    rollback: bool,
    bundle: str = "",
) -> list[Step]:
    """Return what brings the host from `served` to `adapters`, or what the names in `only` ask for.

    Nothing for an unchanged adapter, and nothing for a rollback of a name that has no earlier generation.
    What `bundle`, a directory, has of a hub's adapters is taken from there.
    OSError where a file of an adapter is missing.
    """
    on_host = {one["name"]: one for one in served}
    if rollback:
        return [step for name in only if name in on_host and (step := _rollback(on_host[name]))]
    serving = {name: one for name, one in on_host.items() if one["serves"] or one["quarantined"]}
    if state == "absent":
        return [_unload(serving[name]) for name in only if name in serving]
    wanted = {str(one["name"]): one for one in adapters if not only or one["name"] in only}
    bundled = _bundled(Path(bundle)) if bundle else {}
    local = {
        name: {**one, "source": bundled.get(str(one["source"]), one["source"])}
        for name, one in wanted.items()
    }
    with ThreadPoolExecutor() as pool:  # hashing lets the other threads run
        contents = dict(
            zip(local, pool.map(lambda one: _content(one, inventory), local.values()), strict=True)
        )
    steps = [
        _load(one, serving.get(name), contents[name], inventory)
        for name, one in local.items()
        if not _is_served(serving.get(name), contents[name], str(wanted[name]["source"]))
    ]
    if only:
        return steps
    return steps + [_unload(one) for name, one in sorted(serving.items()) if name not in wanted]


def _bundled(bundle: Path) -> dict[str, str]:
    """Return the directories of a bundle's adapters by the addresses on the hub that they came from."""
    return {
        part["source"]: str(bundle / "adapters" / part["name"])
        for part in json.loads((bundle / "manifest.json").read_text())["parts"]
        if part["kind"] == "adapter"
    }


def _directory(adapter: Adapter, inventory: str) -> Path:
    """Return where an adapter lies that is not on a hub; an absolute source stays as it is."""
    return Path(inventory, str(adapter["source"]))


def _is_hub(adapter: Adapter) -> bool:
    return str(adapter["source"]).startswith("hf:")


def _content(adapter: Adapter, inventory: str) -> str:
    """Return what an adapter should be: the digest of its directory, or its address on a hub."""
    return str(adapter["source"]) if _is_hub(adapter) else digest_of(_directory(adapter, inventory))


def _is_served(one: Served | None, content: str, source: str) -> bool:
    return (
        one is not None and not one["quarantined"] and (content == one["serves"] or source == one["source"])
    )


def _now(one: Served | None) -> str:
    if one is None:
        return "none"
    return (
        f"{one['serves']} (quarantined: {one['quarantined']})" if one["quarantined"] else str(one["serves"])
    )


def _load(adapter: Adapter, one: Served | None, content: str, inventory: str) -> Step:
    name, hub = str(adapter["name"]), _is_hub(adapter)
    agent = ["--agent", str(adapter["agent"])] if adapter.get("agent") else []
    return {
        "name": name,
        "line": f"{name}: {_now(one)} → {content}",
        "command": ["load", name, content if hub else "-", *agent],
        "directory": "" if hub else str(_directory(adapter, inventory)),
    }


def _unload(one: Served) -> Step:
    name = one["name"]
    return {"name": name, "line": f"{name}: {_now(one)} → none", "command": ["unload", name], "directory": ""}


def _rollback(one: Served) -> Step | None:
    name = one["name"]
    earlier = [
        past["digest"] for past in one["generations"] if past["kept"] and past["digest"] != one["serves"]
    ]
    if not earlier:
        return None
    line = f"{name}: {_now(one if one['serves'] else None)} → {earlier[-1]}"
    return {"name": name, "line": line, "command": ["rollback", name, "--to", earlier[-1]], "directory": ""}


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file by name."""
        return {"lora_problems": lora_problems, "lora_plan": lora_plan}
