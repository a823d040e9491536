#!/usr/bin/env python3
"""Check, load, unload and list the adapters of vLLM: of each, where there is one for each of several GPUs.

    docker compose exec vllm-server adapter_manager.py load lint /path/in/the/container
    tar c lint | docker compose exec -T vllm-server adapter_manager.py load lint -
    docker compose exec vllm-server adapter_manager.py load lint hf://ORG/REPO@COMMIT

The result goes to standard output (`--json`: one JSON object), all else to standard error.

Exit codes: 0 done; 1 cannot be done as asked; 2 called wrongly; 3 the adapter is refused; 4 nothing has that
name; 5 the gate is not passed; 6 no answer of the server; 7 the store is damaged or full; 8 vLLM refused it.
"""

import argparse
import errno
import http.client
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from function_gemma.adapters import errors, lock
from function_gemma.adapters.admission import admit
from function_gemma.adapters.base import Base, container, server_socket
from function_gemma.adapters.errors import AdapterError, NoAnswerError, NotServedError, StoreError
from function_gemma.adapters.manifest import Entry, Manifest
from function_gemma.adapters.source import from_directory, from_hub, from_tar
from function_gemma.adapters.store import KEEP, LOCK, Store, check_name, root

_TIMEOUT = 600  # seconds; a load takes milliseconds, its gate's prompts may take minutes
_HUB = "hf://"


class _Connection(http.client.HTTPConnection):
    """HTTP over vLLM's unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def sockets() -> list[str]:
    """Return where a vLLM listens, that of the first GPU first; where none does, this container's socket."""
    own = server_socket()
    found = sorted(own.parent.glob("*.sock"), key=lambda path: (len(path.name), path.name))
    return [str(path) for path in found if _listens(path)] or [str(own)]


def _listens(path: Path) -> bool:
    """Tell a vLLM from a socket that one left behind, or that one has made but does not serve yet."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0)
        return connection.connect_ex(str(path)) in (0, errno.EAGAIN)  # the second of one that has hung


def call(method: str, path: str, body: dict[str, Any] | None = None, address: str = "") -> dict[str, Any]:
    """Send a request to the plugin and return its JSON; AdapterError where it refuses or does not answer.

    `address` is a vLLM's socket, by default that of the first that listens.
    """
    address = address or sockets()[0]
    connection = _Connection(address)
    try:
        connection.request(
            method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        waiting = Path(address).with_suffix(".waiting")  # what entrypoint.sh does before vLLM listens
        reason = waiting.read_text().strip() if waiting.exists() else str(error) or type(error).__name__
        raise NoAnswerError(
            f"the server does not answer on {address} ({reason}): "
            f"see `docker logs {container(Path(address))}`, and try again once `docker ps` shows it healthy"
        ) from error
    finally:
        connection.close()
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        answer = {}
    if response.status == http.client.OK:
        return answer
    refusal = answer.get("error", {})
    kind = getattr(errors, str(refusal.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, AdapterError):
        raise kind(refusal["message"])
    if response.status == http.client.NOT_FOUND:
        raise AdapterError(
            "the server runs without the plugin: set VLLM_PLUGINS=function_gemma and restart it"
        )
    raise AdapterError(refusal.get("message") or f"{method} {path} was answered with {response.status}")


def _copy(store: Store, source: str, area: Path) -> Path:
    """Bring the adapter at `source` into the staging area; return its directory there."""
    copy = area / "copy"
    copy.mkdir()
    if source == "-":
        store.copy(from_tar(sys.stdin.buffer), copy)
    elif source.startswith(_HUB):
        print(f"adapter_manager.py: fetching {source}", file=sys.stderr, flush=True)
        fetched = area / "fetched"
        fetched.mkdir()
        store.copy(from_hub(source, fetched), copy)
    else:
        store.copy(from_directory(Path(source)), copy)
    return copy


def _check(name: str) -> Base:
    """Refuse a name that no adapter can have here; return what the base model expects of one."""
    check_name(name)
    base = Base.read()
    if name in base.names:
        raise AdapterError(f"'{name}' is the base model's name: choose another for the adapter")
    names = {name, *(one for one, entry in Manifest.read(root()).adapters.items() if entry.serves)}
    if 2 * len(names) > base.max_cpu_loras:
        raise AdapterError(
            f"{len(names)} adapters need {2 * len(names)} places, an old and a new generation of each; "
            f"there are {base.max_cpu_loras}: raise SERVER_MAX_CPU_LORAS in server/entrypoint.env"
        )
    return base


def validate(name: str, source: str) -> dict[str, Any]:
    """Say whether the adapter at `source` could be served as `name`; asks no server and keeps nothing."""
    base = _check(name)
    store = Store(root())
    with store.staging() as area:
        admitted = admit(_copy(store, source, area), base)
    return {"name": name, **asdict(admitted)}


def load(name: str, source: str, agent: str | None) -> dict[str, Any]:
    """Install the adapter at `source` and serve it as `name`, once it has passed the gate of `agent`."""
    base = _check(name)
    store = Store(root())
    gate = _gate(name, agent)
    for one in sockets():  # before anything is copied
        call("GET", "/ready", address=one)
    with store.staging() as area:
        copy = _copy(store, source, area)
        digest = admit(copy, base).digest
        is_new = store.install(name, digest, copy)
    try:
        return _activate(store, name, digest, source if source.startswith(_HUB) else None, gate)
    except NoAnswerError:
        raise  # it may be served by now: vLLM may need the files
    except AdapterError:
        if is_new:
            store.prune({name: _others(store, name, digest)}, [name])
        raise


def _others(store: Store, name: str, digest: str) -> set[str]:
    return {path.name for path in store.generation(name, digest).parent.iterdir()} - {digest}


def _gate(name: str, agent: str | None) -> dict[str, Any] | None:
    """Read the gate that the agent's folder has for the adapter, if it has one."""
    agents = Path(os.environ.get("SERVER_AGENTS_DIR", "/agents"))
    if agent is None and not (agents / name / f"{name}_gate.yaml").exists():
        return None
    # Pydantic takes longer to import than a load without a gate.
    from function_gemma.agents import definition, gate  # noqa: PLC0415

    try:
        return gate.load(agents, agent or name, name, required=agent is not None)
    except definition.AgentsError as error:
        raise AdapterError(str(error)) from error


def _activate(
    store: Store, name: str, digest: str, source: str | None, gate: dict[str, Any] | None
) -> dict[str, Any]:
    """Have every vLLM serve an installed generation, or none, then prune those of its name."""
    entry = Manifest.read(store.root).adapters.get(name)
    body = {"lora_name": name, "lora_path": str(store.generation(name, digest)), "source": source}
    reports: list[dict[str, Any]] = []
    passed = None  # of the gate, which one vLLM asks for all: the model is the same
    prepared: list[str] = []

    def tell(phase: str, one: str, gate: dict[str, Any] | None = None) -> dict[str, Any]:
        return call("POST", "/v1/load_lora_adapter", {**body, "phase": phase, "gate": gate}, one)

    try:
        for one in sockets():
            reports.append(tell("prepare", one, None if passed else gate))
            passed = passed or reports[-1]["gate"]
            prepared.append(one)
        # The first writes the manifest: from then on a vLLM that starts, or was missed, serves it by itself.
        reports += [tell("commit", one) for one in sockets()]
    except AdapterError:
        for one in prepared:
            with suppress(AdapterError):  # the first error is the one to tell
                tell("abort", one)
        raise
    seconds: dict[str, float] = {}
    for report in reports:
        for part, took in report["seconds"].items():
            seconds[part] = seconds.get(part, 0) + took
    return {
        "name": name,
        "digest": digest,
        "previous": entry.serves if entry else None,
        "changed": any(report["changed"] for report in reports),
        "seconds": seconds,
        "gate": passed,
        "pruned": [pruned for _, pruned in _prune(store, KEEP, [name])],
    }


def unload(name: str) -> dict[str, Any]:
    """Serve `name` no more; its generations stay for a rollback."""
    done: list[dict[str, Any]] = []
    refusal = None
    for one in sockets():
        try:
            done.append(call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, one))
        except NotServedError as error:  # of the first; another may have seen already what the first did
            refusal = error
    if refusal and not done:
        raise refusal
    return done[0]


def served() -> dict[str, Any]:
    """Return what the first vLLM serves, what any quarantined, and where another differs from the first."""
    found = {container(Path(one)): call("GET", "/v1/lora_adapters", address=one) for one in sockets()}
    digests = {
        server: {one["name"]: one["digest"] for one in answer["adapters"]} for server, answer in found.items()
    }
    first = next(iter(found))
    quarantined: list[dict[str, Any]] = []
    for answer in found.values():
        quarantined += [one for one in answer["quarantined"] if one not in quarantined]
    differs = [
        {"server": server, "name": name, "digest": those.get(name)}
        for server, those in digests.items()
        for name in sorted({*digests[first], *those})
        if those.get(name) != digests[first].get(name)
    ]
    return {**found[first], "quarantined": quarantined, "differs": differs}


def check() -> dict[str, Any]:
    """Have this container's vLLM answer as the base model and as each adapter; all must serve the same."""
    if differs := served()["differs"]:
        raise AdapterError(_differs(differs[0]))
    own = str(server_socket())
    names = [one["id"] for one in call("GET", "/v1/models", address=own)["data"]]
    for name in names:
        call("POST", "/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 1}, own)
    return {"answered": names}


def rollback(name: str, to: str | None) -> dict[str, Any]:
    """Serve the generation that `name` served before, or the one of digest `to`."""
    store = Store(root())
    entry = _entry(Manifest.read(store.root), name)
    there = [digest for digest in entry.before if store.generation(name, digest).is_dir()]
    if to is not None and to not in there:
        raise NotServedError(
            f"'{name}' has no earlier generation {to}: there {'is' if len(there) == 1 else 'are'} "
            f"{', '.join(there) or 'none'}; `adapter_manager.py history {name}` shows them"
        )
    if not there:
        raise NotServedError(f"'{name}' has no earlier generation: load one from its source")
    digest = to or there[-1]
    (source,) = (one.source for one in entry.generations if one.digest == digest)
    return _activate(store, name, digest, source, None)


def _entry(manifest: Manifest, name: str) -> Entry:
    if name not in manifest.adapters:
        raise NotServedError(f"'{name}' was never served: `adapter_manager.py history` shows what was")
    return manifest.adapters[name]


def history(name: str | None) -> dict[str, Any]:
    """Return what each name (or this one) serves and served, as the manifest says; no server is asked."""
    store = Store(root())
    manifest = Manifest.read(store.root)
    entries = sorted(manifest.adapters.items()) if name is None else [(name, _entry(manifest, name))]
    return {
        "adapters": [
            {
                "name": one,
                "serves": entry.serves,
                "source": entry.serving.source if entry.serving else None,
                "quarantined": entry.quarantined,
                "generations": [
                    {
                        "digest": generation.digest,
                        "id": generation.id,
                        "source": generation.source,
                        "since": generation.since,
                        "kept": store.generation(one, generation.digest).is_dir(),
                    }
                    for generation in entry.generations
                ],
            }
            for one, entry in entries
        ]
    }


def prune(keep: int) -> dict[str, Any]:
    """Remove the generations that neither serve nor are among the `keep` latest of their name."""
    return {
        "removed": [{"name": name, "digest": digest} for name, digest in _prune(Store(root()), keep, None)]
    }


def _prune(store: Store, keep: int, names: list[str] | None) -> list[tuple[str, str]]:
    manifest = Manifest.read(store.root)
    return store.prune({name: entry.kept(keep) for name, entry in manifest.adapters.items()}, names)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of generations")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends with exit code 2."""
    description, _, exit_codes = str(__doc__).rpartition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=exit_codes, formatter_class=formatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("name", metavar="NAME", help="the model's name in requests")
    sourced = argparse.ArgumentParser(add_help=False, parents=[named])
    sourced.add_argument(
        "source",
        metavar="SOURCE",
        help="its directory in this container, hf://ORG/REPO@COMMIT, or - for a tar on stdin",
    )
    commands.add_parser(
        "validate", parents=[common, sourced], help="say whether an adapter could be served; changes nothing"
    )
    loading = commands.add_parser(
        "load", parents=[common, sourced], help="serve an adapter, in place of one of its name"
    )
    loading.add_argument(
        "--agent", help="the folder in agents/ with the gate that it must pass (default: its name)"
    )
    commands.add_parser("unload", parents=[common, named], help="serve an adapter no more; its files stay")
    commands.add_parser("list", parents=[common], help="show what the server serves and quarantined")
    commands.add_parser(
        "check", parents=[common], help="have this container's server answer once as each model"
    )
    past = commands.add_parser("history", parents=[common], help="show what was served; asks no server")
    past.add_argument("name", metavar="NAME", nargs="?", help="only this one")
    back = commands.add_parser("rollback", parents=[common, named], help="serve what was served before")
    back.add_argument("--to", metavar="DIGEST", help="this generation, instead of the latest before")
    pruning = commands.add_parser(
        "prune", parents=[common], help="remove generations that are neither served nor kept"
    )
    pruning.add_argument(
        "--keep",
        type=_count,
        default=KEEP,
        metavar="N",
        help="of each name, for a rollback; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    if getattr(options, "source", None) == "-" and sys.stdin.isatty():
        parser.error("a tar is read on standard input: tar c NAME | adapter_manager.py load NAME -")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says and return the result."""
    if options.command == "list":
        return served()
    if options.command == "check":
        return check()
    if not root().is_dir():
        raise AdapterError(
            f"{root()} is not here: run this in the server's container, "
            f"`docker compose exec vllm-server adapter_manager.py {options.command} …`"
        )
    if options.command == "history":
        return history(options.name)
    holder = " ".join(filter(None, ("adapter_manager.py", options.command, getattr(options, "name", ""))))
    with lock.hold(root() / LOCK, holder, lambda line: print(line, file=sys.stderr, flush=True)):
        return {
            "validate": lambda: validate(options.name, options.source),
            "load": lambda: load(options.name, options.source, options.agent),
            "unload": lambda: unload(options.name),
            "rollback": lambda: rollback(options.name, options.to),
            "prune": lambda: prune(options.keep),
        }[options.command]()


def describe(command: str, result: dict[str, Any]) -> str:
    """Put a result in words."""
    if command == "list":
        lines = [f"{one['name']}  {one['digest']}" for one in result["adapters"]]
        lines += [
            f"{one['name']}  {one['digest']}  quarantined: {one['reason']}" for one in result["quarantined"]
        ]
        lines += map(_differs, result["differs"])
        text = "\n".join(lines) or "no adapter is served"
    elif command == "check":
        text = f"answered: {', '.join(result['answered'])}"
    elif command == "history":
        text = "\n".join(map(_past, result["adapters"])) or "no adapter was ever served"
    elif command == "validate":
        text = f"{result['name']}: good, {result['digest']}, rank {result['rank']}, {result['bytes']} bytes"
    elif command == "unload":
        text = f"{result['name']}: unloaded, {result['previous']} stays for `adapter_manager.py rollback`"
    elif command == "prune":
        removed = [f"removed {one['name']}  {one['digest']}" for one in result["removed"]]
        text = "\n".join(removed) or "nothing to remove"
    elif not result["changed"]:
        text = f"{result['name']}: unchanged, {result['digest']} is served"
    else:
        before = f" (before: {result['previous']})" if result["previous"] else ""
        gate = result["gate"]
        passed = f", {gate['passed']} of its gate's {gate['of']} prompts passed" if gate else ""
        text = f"{result['name']}: changed, {result['digest']} is served{before}{passed}"
    return text


def _differs(one: dict[str, Any]) -> str:
    return f"{one['server']} differs: {one['name']}  {one['digest'] or 'is not served'}"


def _past(one: dict[str, Any]) -> str:
    lines = []
    for generation in reversed(one["generations"]):
        state = (
            "serves" if generation["digest"] == one["serves"] else "kept" if generation["kept"] else "pruned"
        )
        if state == "serves" and one["quarantined"]:
            state = f"quarantined: {one['quarantined']}"
        words = (one["name"], generation["digest"], generation["since"], generation["source"], state)
        lines.append("  ".join(filter(None, words)))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    try:
        result = run(options)
    except AdapterError as error:
        print(f"adapter_manager.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"adapter_manager.py: {error}", file=sys.stderr)
        return StoreError.exit_code
    print(json.dumps(result) if options.json else describe(options.command, result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the next run clears what was staged
    sys.exit(main())
