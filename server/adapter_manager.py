#!/usr/bin/env python3
"""Load, unload and list the adapters of the vLLM server that listens in this container.

    docker compose exec vllm-server adapter_manager.py load lint /path/in/the/container
    tar c lint | docker compose exec -T vllm-server adapter_manager.py load lint -

Exits 0 when done, 1 when refused or failed, 2 when called wrongly. The result goes to standard output
(`--json`: one JSON object), all else to standard error.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from function_gemma.adapters import lock
from function_gemma.adapters.errors import AdapterError, NoAnswerError
from function_gemma.adapters.source import from_directory, from_tar
from function_gemma.adapters.store import LOCK, Store, check_name, root

_TIMEOUT = 120  # seconds; a load takes milliseconds, but waits for the engine's running step


class _Connection(http.client.HTTPConnection):
    """HTTP over vLLM's unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def call(method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    """Send a request to the plugin and return its JSON; AdapterError where it refuses or does not answer."""
    address = os.environ.get("SERVER_SOCKET", "/run/vllm/vllm.sock")
    connection = _Connection(address)
    try:
        connection.request(
            method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        waiting = Path(address).with_name("waiting")  # what entrypoint.sh does before vLLM listens
        reason = waiting.read_text().strip() if waiting.exists() else str(error) or type(error).__name__
        raise NoAnswerError(
            f"the server does not answer on {address} ({reason}): "
            "see `docker logs vllm-gemma`, and try again once `docker ps` shows it healthy"
        ) from error
    finally:
        connection.close()
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        answer = {}
    if response.status == http.client.OK:
        return answer
    if response.status == http.client.NOT_FOUND and method == "GET":
        raise AdapterError(
            "the server runs without the plugin: set VLLM_PLUGINS=function_gemma and restart it"
        )
    message = answer.get("error", {}).get("message")
    raise AdapterError(message or f"{method} {path} was answered with {response.status}")


def load(name: str, source: str) -> dict[str, Any]:
    """Install the adapter at `source` and serve it as `name`."""
    check_name(name)
    store = Store(root())
    files = from_tar(sys.stdin.buffer) if source == "-" else from_directory(Path(source))
    served = {one["name"]: one["digest"] for one in call("GET", "/v1/lora_adapters")["adapters"]}
    with store.stage(files) as staged:
        result = {"name": name, "digest": staged.digest, "previous": served.get(name)}
        is_new = store.install(name, staged)
    if served.get(name) == staged.digest:
        return {**result, "changed": False}
    body = {"lora_name": name, "lora_path": str(store.generation(name, staged.digest))}
    try:
        call("POST", "/v1/load_lora_adapter", body)
    except NoAnswerError:
        raise  # it may be served by now: vLLM may need the files
    except AdapterError:
        if is_new:
            store.discard(name, staged.digest)
        raise
    return {**result, "changed": True}


def unload(name: str) -> dict[str, Any]:
    """Serve `name` no more."""
    call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
    return {"name": name, "changed": True}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends with exit code 2."""
    parser = argparse.ArgumentParser(description="Load, unload and list the server's adapters.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    loading = commands.add_parser(
        "load", parents=[common], help="serve an adapter, in place of one of its name"
    )
    loading.add_argument("name", metavar="NAME", help="the model's name in requests")
    loading.add_argument(
        "path", metavar="PATH", help="its directory in this container, or - for a tar on stdin"
    )
    unloading = commands.add_parser("unload", parents=[common], help="serve an adapter no more")
    unloading.add_argument("name", metavar="NAME", help="the model's name in requests")
    commands.add_parser("list", parents=[common], help="show what is served")
    options = parser.parse_args(arguments)
    if options.command == "load" and options.path == "-" and sys.stdin.isatty():
        parser.error(
            "`load NAME -` reads a tar on standard input: tar c NAME | adapter_manager.py load NAME -"
        )
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says and return the result."""
    if options.command == "list":
        return call("GET", "/v1/lora_adapters")
    if not root().is_dir():
        raise AdapterError(
            f"{root()} is not here: run this in the server's container, "
            f"`docker compose exec vllm-server adapter_manager.py {options.command} …`"
        )
    holder = f"adapter_manager.py {options.command} {options.name}"
    with lock.hold(root() / LOCK, holder, lambda line: print(line, file=sys.stderr, flush=True)):
        return load(options.name, options.path) if options.command == "load" else unload(options.name)


def describe(command: str, result: dict[str, Any]) -> str:
    """Put a result in words."""
    if command == "list":
        lines = [f"{one['name']}  {one['digest']}" for one in result["adapters"]]
        lines += [
            f"{one['name']}  {one['digest']}  set aside: {one['reason']}" for one in result["set_aside"]
        ]
        return "\n".join(lines) or "no adapter is served"
    if command == "unload":
        return f"{result['name']}: unloaded"
    if not result["changed"]:
        return f"{result['name']}: unchanged, {result['digest']} is served"
    before = f" (before: {result['previous']})" if result["previous"] else ""
    return f"{result['name']}: changed, {result['digest']} is served{before}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    try:
        result = run(options)
    except (AdapterError, OSError) as error:
        print(f"adapter_manager.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if options.json else describe(options.command, result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the next run clears what was staged
    sys.exit(main())
