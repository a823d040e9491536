"""Filter `daemon_settings`: what /etc/docker/daemon.json becomes, and what stands in the way.

Ours is added to what is there: lists are united, objects merged key by key, and what somebody else wrote is
never changed, so that taking ours out again leaves exactly what was there before.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypedDict
from urllib.parse import urlsplit

PATH = "/etc/docker/daemon.json"
Tree = dict[str, Any]

# What the engine takes over at a reload. It takes mirrors and insecure registries over as well, but its
# BuildKit does not.
RELOADED = {
    "debug",
    "labels",
    "live-restore",
    "max-concurrent-downloads",
    "max-concurrent-uploads",
    "max-download-attempts",
}
RELOADED |= {"shutdown-timeout"}
# Flags of dockerd whose key in daemon.json is not the flag's own name.
FLAGS = {
    "-D": "debug",
    "-H": "hosts",
    "-g": "data-root",
    "-l": "log-level",
    "-s": "storage-driver",
    "--add-runtime": "runtimes",
    "--authorization-plugin": "authorization-plugins",
    "--default-ulimit": "default-ulimits",
    "--dns-opt": "dns-opts",
    "--exec-opt": "exec-opts",
    "--feature": "features",
    "--graph": "data-root",
    "--host": "hosts",
    "--http-proxy": "proxies.http-proxy",
    "--https-proxy": "proxies.https-proxy",
    "--insecure-registry": "insecure-registries",
    "--label": "labels",
    "--log-opt": "log-opts",
    "--no-proxy": "proxies.no-proxy",
    "--registry-mirror": "registry-mirrors",
    "--storage-opt": "storage-opts",
}
# What decides for the other side, in the inventory.
INVENTORY = {
    "live-restore": "set docker_live_restore: false (containers then stop while the engine restarts)",
    "data-root": "set docker_data_root to it",
    "proxies": "set docker_proxy and docker_no_proxy to what stands there",
    "features.cdi": "where no GPU is used, set docker_settings: {features: {cdi: false}}",
}


class SettingsError(Exception):
    """daemon.json cannot be read as the engine reads it."""


class Settings(TypedDict):
    """What `daemon_settings` returns."""

    problems: list[str]
    found: str | None  # the file's content; None where there is no file
    text: str | None  # its new content
    changes: bool
    restart: bool  # a change that a reload does not bring
    lines: list[str]  # what changes, for a reader
    added: Tree  # what of it is ours
    before: str | None  # the file as it was before it had anything of ours
    merged: Tree
    moved_root: str  # where the data root goes, if this changes it


def daemon_settings(facts: Tree, wanted: Tree, preferred: Tree | None = None) -> Settings:
    """Add `wanted` to the settings that the probe's `facts` show, and `preferred` where no such key is there.

    An empty `wanted` takes out again what a former run added.
    """
    record = facts["record"].get("settings") or {"added": {}, "before": None}
    result = Settings(
        problems=[],
        found=None,
        text=None,
        changes=False,
        restart=False,
        lines=[],
        added={},
        before=None,
        merged={},
        moved_root="",
    )
    if not wanted and not record["added"]:
        return result
    try:
        text, found = read(facts["settings"])
    except SettingsError as error:
        result["problems"] = [str(error)]
        return result
    base = without(found, record["added"])
    flags = flags_by_key(facts["flags"], facts["environment"])
    if preferred and not any(key in {**base, **wanted} or key in flags for key in preferred):
        wanted = {**preferred, **wanted}
    problems: list[str] = []
    if "--config-file" in flags and wanted:
        problems.append(
            f"docker.service starts dockerd with --config-file={flags['--config-file'][0]}, so that {PATH} "
            "is not read: move that file there and take the flag out (systemctl edit --full docker.service)"
        )
    problems += flag_problems(wanted, flags)
    if facts["docker"]["swarm"] and wanted.get("live-restore"):
        problems.append(
            "the engine is a Swarm node and does not start with live-restore: set docker_live_restore: false"
        )

    def keep(path: str, theirs: object, ours: object) -> object:
        problems.append(
            f"{PATH} has {path} = {_shown(theirs)} and {_shown(ours)} is needed: take it out "
            f"there{_or_inventory(path)}"
        )
        return theirs

    merged = merge(base, pruned(wanted, flags), keep)
    added = without(merged, base)
    # The file of somebody else's comes back as it was, blanks and all.
    before = record["before"] if record["added"] else text
    if merged == found:
        after = text
    elif merged == base and before is not None and base == without(_object(before), record["added"]):
        after = before
    else:
        after = json.dumps(merged, indent=4) + "\n" if merged or before is not None else None
    changed = [key for key in {**found, **merged} if found.get(key) != merged.get(key)]
    return Settings(
        problems=problems,
        found=text,
        text=after,
        changes=after != text,
        restart=any(key not in RELOADED or key not in merged for key in changed),
        lines=[f"{key}: {_shown(found.get(key))} → {_shown(merged.get(key))}" for key in changed],
        added=added,
        before=before if added else None,
        merged=merged,
        moved_root=merged.get("data-root", "/var/lib/docker") if "data-root" in changed else "",
    )


def wanted_settings(arguments: Tree) -> Tree:
    """Return the settings that the role's arguments (without their prefix) ask for.

    `settings` has the last word, so that it can decide for what the host has.
    """
    # Engines 25 to 28.1 know CDI and have it off; GPUs come by it, and without one it is harmless.
    wanted: Tree = {"features": {"cdi": True}}
    if arguments["live_restore"]:
        wanted["live-restore"] = True
    mirrors = arguments["registry_mirrors"]
    if mirrors:
        wanted["registry-mirrors"] = mirrors
        # The engine takes a mirror's http:// as it is, but its BuildKit only where the host is named here
        # as well.
        plain = [urlsplit(mirror).netloc for mirror in mirrors if mirror.startswith("http://")]
        if plain:
            wanted["insecure-registries"] = plain
    if arguments["proxy"]:
        wanted["proxies"] = {"http-proxy": arguments["proxy"], "https-proxy": arguments["proxy"]}
        if arguments["no_proxy"]:
            wanted["proxies"]["no-proxy"] = ",".join(arguments["no_proxy"])
    if arguments["data_root"]:
        wanted["data-root"] = arguments["data_root"]
        # Engine 29 starts with containerd's image store, which lies outside the data root.
        wanted["features"]["containerd-snapshotter"] = False
    return merge(wanted, arguments["settings"], lambda _path, _wanted, last: last)


def read(file: Tree) -> tuple[str | None, Tree]:
    """Return the file's text and what it says, from what the probe found in its place.

    Raises:
        SettingsError: the engine would not read it, or would drop a part of it.

    """
    kind = file["kind"]
    if kind == "absent":
        return None, {}
    if kind == "link":
        raise SettingsError(
            f"{PATH} is a link to {file['target']}, which the role would replace by a file: put the file "
            "itself there"
        )
    if kind == "no file":
        raise SettingsError(
            f"{PATH} is a directory or something else that is no file: move it away (Docker makes a "
            "directory of a file that it is told to mount and that is not there)"
        )
    if kind == "unreadable":
        raise SettingsError(f"{PATH} cannot be read as UTF-8 text: {file['error']}")
    text = file["text"]
    if not text.strip():
        return text, {}
    try:
        return text, _object(text)
    except json.JSONDecodeError as error:
        raise SettingsError(
            f"{PATH} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}. Correct it "
            f"there; `python3 -m json.tool {PATH}` checks it"
        ) from None


def _object(text: str) -> Tree:
    def unique(pairs: list[tuple[str, Any]]) -> Tree:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                places = [
                    text.count("\n", 0, match.start()) + 1
                    for match in re.finditer(rf"{re.escape(json.dumps(name))}\s*:", text)
                ]
                raise SettingsError(
                    f"{PATH} has the key {name} twice (lines {', '.join(map(str, places))}), and the "
                    "engine takes one of them: remove the other"
                )
        return dict(pairs)

    if not text.strip():
        return {}
    found = json.loads(text, object_pairs_hook=unique)
    if not isinstance(found, dict):
        raise SettingsError(
            f"{PATH} has {_kind(found)} at its top, line 1, where the engine wants an object {{…}}: "
            "correct it there"
        )
    return found


def flags_by_key(words: list[str], environment: dict[str, str]) -> dict[str, list[str]]:
    """Return what dockerd's command line and environment give, by the keys of daemon.json."""
    found: dict[str, list[str]] = {}
    for at, word in enumerate(words):
        if not word.startswith("-"):
            continue
        name, mark, value = word.partition("=")
        if not mark:
            after = words[at + 1 : at + 2]
            value = after[0] if after and not after[0].startswith("-") else "true"
        key = name if name == "--config-file" else FLAGS.get(name, name.lstrip("-"))
        found.setdefault(key, []).append(value)
    for name, value in environment.items():
        if name.upper() in {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}:
            found.setdefault(f"proxies.{name.lower().replace('_', '-')}", []).append(value)
    return found


def _leaves(tree: Tree, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _flag_values(path: str, flags: dict[str, list[str]]) -> list[str] | None:
    """Return what a flag says for a path such as features.cdi; None where none says anything."""
    if path in flags:
        return flags[path]
    top, _, key = path.partition(".")
    if not key or top not in flags:
        return None
    pairs = (value.partition("=") for value in flags[top])
    return [value for name, _, value in pairs if name == key] or [""]


def _as_flag(value: Any) -> list[str]:  # noqa: ANN401 (as JSON)
    values = value if isinstance(value, list) else [value]
    return [str(one).lower() if isinstance(one, bool) else str(one) for one in values]


def flag_problems(wanted: Tree, flags: dict[str, list[str]]) -> list[str]:
    """Return a sentence for each wanted key that dockerd gets another value for from its unit."""
    problems = []
    for path, value in _leaves(wanted):
        given = _flag_values(path, flags)
        if given is not None and not set(_as_flag(value)) <= set(given):
            problems.append(
                f"docker.service gives dockerd {path} = {', '.join(given) or 'other values'} as a flag or "
                f"in its environment, and {_shown(value)} is needed: the engine does not start with both. "
                f"Take it out (`systemctl cat docker.service` shows where it stands){_or_inventory(path)}"
            )
    return problems


def pruned(wanted: Tree, flags: dict[str, list[str]], above: str = "") -> Tree:
    """Return `wanted` without what a flag gives already: a key in both places stops the engine."""
    rest: Tree = {}
    for key, value in wanted.items():
        if isinstance(value, dict):
            inner = pruned(value, flags, f"{above}{key}.")
            rest |= {key: inner} if inner else {}
        elif _flag_values(f"{above}{key}", flags) is None:
            rest[key] = value
    return rest


def merge(base: Tree, ours: Tree, settle: Callable[[str, Any, Any], Any], above: str = "") -> Tree:
    """Return `base` with `ours` added; what contradicts it becomes what `settle` makes of path and both."""
    merged = dict(base)
    for key, value in ours.items():
        theirs = base.get(key)
        if key not in base:
            merged[key] = value
        elif isinstance(theirs, dict) and isinstance(value, dict):
            merged[key] = merge(theirs, value, settle, f"{above}{key}.")
        elif isinstance(theirs, list) and isinstance(value, list):
            merged[key] = theirs + [one for one in value if one not in theirs]
        elif theirs != value or isinstance(theirs, bool) != isinstance(value, bool):
            merged[key] = settle(f"{above}{key}", theirs, value)
    return merged


def without(tree: Tree, added: Tree) -> Tree:
    """Return `tree` without what was added to it; what has been changed since is somebody else's."""
    rest: Tree = {}
    for key, value in tree.items():
        ours = added.get(key)
        if key not in added:
            rest[key] = value
        elif isinstance(value, dict) and isinstance(ours, dict):
            inner = without(value, ours)
            rest |= {key: inner} if inner else {}
        elif isinstance(value, list) and isinstance(ours, list):
            left = [one for one in value if one not in ours]
            rest |= {key: left} if left else {}
        elif value != ours:
            rest[key] = value
    return rest


def _or_inventory(path: str) -> str:
    line = INVENTORY.get(path) or INVENTORY.get(path.partition(".")[0])
    return f", or {line}" if line else ", or change docker_settings"


def _shown(value: Any) -> str:  # noqa: ANN401 (as JSON)
    return "unset" if value is None else json.dumps(value)


def _kind(value: Any) -> str:  # noqa: ANN401 (as JSON)
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


class FilterModule:
    """Tells Ansible of the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them by name."""
        return {"daemon_settings": daemon_settings, "wanted_settings": wanted_settings}
