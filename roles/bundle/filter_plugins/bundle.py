"""Filters of the role bundle: what is wrong with a bundle, what a host lacks of it, what is to be collected.

A bundle is a directory with manifest.json: what it was collected from, and its parts, each with its files'
digests and sizes. A part's `identity` says whether it is still what the host serves.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
Part = dict[str, Any]  # kind, name, identity, bytes and, once it is collected, files

_AGAIN = "`make bundle` on the host that serves makes it anew, and keeps what is good"


def bundle_manifest(path: str) -> Manifest:
    """Return what a bundle says of itself; one without parts where there is none that can be read."""
    try:
        manifest: Manifest = json.loads(Path(path, "manifest.json").read_text())
    except (OSError, ValueError):
        return {"parts": []}
    return manifest


def bundle_problems(path: str, root: str, *, model: str, version: str) -> list[str]:
    """Say why nothing can be installed from a bundle, before any host is asked.

    `root` is this checkout, `model` the declared NAME@REVISION, `version` the declared checkout_version.
    """
    manifest = bundle_manifest(path)
    if not manifest["parts"]:
        return [f"bundle_path {path} is no bundle, it has no manifest.json: correct the path, or {_AGAIN}"]
    if not manifest["complete"]:
        return [f"the bundle {path} is not complete, its collection was cut short: {_AGAIN}"]
    problems = []
    for name, known in _files(manifest["parts"]):
        file = Path(path, name)
        size = file.stat().st_size if file.is_file() else None
        if size != known["size"]:
            has = "is missing" if size is None else f"has {size} bytes instead of {known['size']}"
            problems.append(f"{name} of the bundle {path} {has}: copy it anew, or {_AGAIN}")
    release = manifest["release"]
    code = {name: blob for name, blob in manifest["server"].items() if not name.endswith(".md")}
    if other := [name for name, blob in code.items() if _blob(Path(root, name)) != blob]:
        problems.append(
            f"the bundle {path} is of another release than these playbooks, {len(other)} files differ, "
            f"{other[0]} among them: `git checkout {release}` here, or {_AGAIN}"
        )
    if version != release and manifest["refs"].get(version) != release:
        names = [name for name, commit in manifest["refs"].items() if commit == release]
        problems.append(
            f"the bundle {path} has the release {release}, which is not checkout_version {version}: "
            f"set that to one of {', '.join([*names, release])}"
        )
    if manifest["model"] != model:
        problems.append(
            f"the bundle {path} has the model {manifest['model']}, and {model} is declared: set "
            "server_model and server_model_revision to what the bundle has"
        )
    return problems


def bundle_damage(path: str, lacks: Iterable[Part], host: dict[str, Any]) -> list[str]:
    """Say why this host cannot be given what it lacks. Reads all that would be sent, and the adapters.

    `host` is what look.py says.
    """
    manifest = bundle_manifest(path)
    if host["system"] != manifest["system"]:
        for_, here = _system(manifest["system"]), _system(host["system"])
        return [
            f"the bundle {path} is for {for_}, and this host is {here}: make a bundle on a host like this one"
        ]
    parts = [*lacks, *(part for part in manifest["parts"] if part["kind"] == "adapter")]
    problems = [
        f"{name} of the bundle {path} is damaged, its SHA-256 is another: copy it anew, or {_AGAIN}"
        for name, known in _files(parts)
        if _sha256(Path(path, name)) != known["sha256"]
    ]
    # Unpacked, and the largest file beside it.
    sizes = [known["size"] for _, known in _files(parts)]
    need = sum(2 * part["bytes"] if part["kind"] == "image" else part["bytes"] for part in parts) + max(
        sizes, default=0
    )
    if host["free"] < need:
        problems.append(
            f"{bundle_size(host['free'])} are free in /var/lib, "
            f"and what the bundle brings needs {bundle_size(need)}"
        )
    return problems


def bundle_question(manifest: Manifest) -> dict[str, Any]:
    """Return what look.py is asked."""
    by_kind: dict[str, list[Part]] = {}
    for part in manifest["parts"]:
        by_kind.setdefault(part["kind"], []).append(part)
    return {
        "images": [part["name"] for part in by_kind["image"]],
        "packages": by_kind["packages"][0]["roots"],
        "model": manifest["model"],
    }


def bundle_lacks(manifest: Manifest, host: dict[str, Any]) -> list[Part]:
    """Return the parts that a host lacks, in the order in which they are installed."""
    order = {"packages": 0, "image": 1, "model": 2, "code": 3}
    lacking: dict[str, Callable[[Part], bool]] = {
        "packages": lambda _: bool(host["packages"]),
        "image": lambda part: part["name"] in host["images"],
        "model": lambda _: bool(host["model"]),
        "code": lambda _: bool(host["release"] != manifest["release"]),
    }
    parts = [part for part in manifest["parts"] if part["kind"] in order and lacking[part["kind"]](part)]
    return sorted(parts, key=lambda part: order[part["kind"]])


def bundle_new(path: str, survey: dict[str, Any]) -> list[Part]:
    """Return the parts that are to be fetched: those that are not in the bundle as they are on the host."""
    kept = _kept(path, survey)
    return [part for part in survey["parts"] if bundle_key(part) not in kept]


def bundle_room(path: str, survey: dict[str, Any]) -> list[str]:
    """Say where there is no room for what is to be fetched, in words with the sizes."""
    sizes = [part["bytes"] for part in bundle_new(path, survey)]
    place = next(one for one in (Path(path), *Path(path).parents) if one.is_dir())
    free = shutil.disk_usage(place).free
    problems = []
    if free < sum(sizes):
        problems.append(
            f"{bundle_size(free)} are free in {place} on this machine "
            f"and the bundle may take {bundle_size(sum(sizes))}: set bundle_path"
        )
    if survey["free"] < max(sizes, default=0):
        problems.append(
            f"{bundle_size(survey['free'])} are free in /var/lib on the host, and its largest part takes "
            f"{bundle_size(max(sizes))} there: make room"
        )
    return problems


def bundle_with(path: str, survey: dict[str, Any], made: dict[str, Any]) -> Manifest:
    """Return the manifest: what is still good in it, and the files of the parts that were `made`, by key."""
    kept = _kept(path, survey)
    files = {**{key: part["files"] for key, part in kept.items()}, **made}
    parts = [
        {**part, "files": files[bundle_key(part)]} for part in survey["parts"] if bundle_key(part) in files
    ]
    known = {name: value for name, value in survey.items() if name not in ("parts", "free")}
    return {**known, "complete": len(parts) == len(survey["parts"]), "parts": parts}


def bundle_leftovers(path: str, manifest: Manifest) -> list[str]:
    """Return the files of parts that the bundle has no more."""
    known = {name for name, _ in _files(manifest["parts"])} | {"manifest.json"}
    found = (one for one in Path(path).rglob("*") if one.is_file())
    return [str(one) for one in found if one.relative_to(path).as_posix() not in known]


def _kept(path: str, survey: dict[str, Any]) -> dict[str, Part]:
    wanted = {bundle_key(part) for part in survey["parts"]}
    return {
        bundle_key(part): part
        for part in bundle_manifest(path)["parts"]
        if bundle_key(part) in wanted
        and all(
            Path(path, name).is_file() and Path(path, name).stat().st_size == known["size"]
            for name, known in _files([part])
        )
    }


def bundle_key(part: Part) -> str:
    """Return what names a part as it is now."""
    return f"{part['kind']} {part['name']} {part['identity']}"


def _files(parts: Iterable[Part]) -> list[tuple[str, dict[str, Any]]]:
    return [item for part in parts for item in part["files"].items()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blob(path: Path) -> str:
    """Return a file's name in git; empty where there is none."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _system(system: dict[str, str]) -> str:
    return f"{system['os']} {system['release']} on {system['architecture']}"


def bundle_size(size: int) -> str:
    """Return a size in bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file by name."""
        return {
            "bundle_damage": bundle_damage,
            "bundle_key": bundle_key,
            "bundle_lacks": bundle_lacks,
            "bundle_leftovers": bundle_leftovers,
            "bundle_manifest": bundle_manifest,
            "bundle_new": bundle_new,
            "bundle_problems": bundle_problems,
            "bundle_question": bundle_question,
            "bundle_room": bundle_room,
            "bundle_size": bundle_size,
            "bundle_with": bundle_with,
        }
