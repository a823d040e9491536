"""Pulls subagents from the server, keeps them, and works from its copies while the server is away.

`python -m function_gemma.agents.client` lists the subagents, `… client lint` prints the definition of one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
from hishel import CacheOptions, SqliteStorage
from hishel.httpx import CacheClient, CacheTransport

from function_gemma.agents.definition import AgentsError, Definition, DefinitionError, Tool, parse, path_of

if TYPE_CHECKING:
    from types import TracebackType

BASE_URL = "http://function-gemma-server:8000"
AWAY = {500, 502, 503, 504}  # the answers that stale-if-error (RFC 5861) counts as no answer
logger = logging.getLogger(__name__)


class AgentNotFoundError(AgentsError):
    """The server has no such file."""


class ServerAwayError(AgentsError):
    """The server does not answer, and no copy of what was asked for is kept."""


class ServerRefusedError(AgentsError):
    """The server answered with a status that this client cannot use."""


def default_cache_dir() -> Path:
    """Return the folder of the user's caches that holds the copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "function-gemma" / "agents"


class AgentsClient:
    """Pulls a file once, asks at each use whether it still holds, and uses the copy where nobody answers.

    `base_url` is the server without a path, `timeout` seconds for the connection and for each answer. The use
    of a copy that could not be checked is logged as a warning. All methods raise AgentsError.
    """

    def __init__(
        self, base_url: str = BASE_URL, cache_dir: Path | None = None, *, timeout: float = 10.0
    ) -> None:
        """Open (or make) the cache in `cache_dir`, by default the user's."""
        self.base_url = base_url.rstrip("/")
        storage = SqliteStorage(database_path=(cache_dir or default_cache_dir()) / "agents.db")
        self._server = CacheClient(storage=storage, rfc=CacheOptions(shared=False), timeout=timeout)
        # The same copies without a server behind them: what is not kept is 504, as RFC 9111 5.2.1.7 has it.
        nobody = httpx.MockTransport(lambda _: httpx.Response(504))
        self._copies = httpx.Client(
            transport=CacheTransport(nobody, storage, rfc=CacheOptions(shared=False, allow_stale=True))
        )

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections and the cache."""
        self._server.close()
        self._copies.close()

    def names(self) -> list[str]:
        """Return the names of the subagents that the server has."""
        try:
            return [str(agent["name"]) for agent in json.loads(self._get(""))["agents"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerRefusedError(
                f"{self.base_url}/agents/ is no index: is it function-gemma-server?"
            ) from error

    def source(self, name: str) -> str:
        """Return the YAML text of a subagent's definition."""
        return self._get(path_of(name))

    def definition(self, name: str) -> Definition:
        """Return a subagent's definition, checked."""
        definition = parse(self.source(name), f"{self.base_url}/agents/{path_of(name)}")
        if definition.name != name:
            raise DefinitionError(f"{path_of(name)} defines {definition.name!r}: its name must be {name!r}")
        return definition

    def script(self, definition: Definition, tool: Tool) -> str:
        """Return the text of the script of one of the definition's tools."""
        return self._get(f"{definition.name}/{tool.script}")

    def _get(self, path: str) -> str:
        url = f"{self.base_url}/agents/{path}"
        try:
            response = self._server.get(url)
            away = f"HTTP {response.status_code}" if response.status_code in AWAY else None
        except httpx.RequestError as error:
            away = str(error) or type(error).__name__
        if away:
            response = self._copies.get(url)
            if response.status_code != 200:
                raise ServerAwayError(
                    f"{url}: {away}, and no copy is kept. Is this machine on the tailnet (tailscale status)? "
                    "On the server: docker compose ps agents gateway"
                )
            age = response.headers.get("age", "?")
            logger.warning("%s: %s; using the copy that was good %s s ago", url, away, age)
        if response.status_code == 404:
            raise AgentNotFoundError(f"{url}: no such file. What there is: {self.base_url}/agents/")
        if response.status_code != 200:
            raise ServerRefusedError(f"{url}: HTTP {response.status_code}: {response.text[:200]}")
        return response.text


def main(argv: list[str] | None = None) -> int:
    """List the subagents, or print the definition of one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m function_gemma.agents.client", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a subagent; without it, their names")
    parser.add_argument("--base-url", default=BASE_URL, metavar="URL", help="default: %(default)s")
    parser.add_argument("--cache-dir", type=Path, metavar="DIRECTORY", help=f"default: {default_cache_dir()}")
    args = parser.parse_args(argv)
    try:
        with AgentsClient(args.base_url, args.cache_dir) as client:
            if args.name:
                client.definition(args.name)  # a wrong one is refused, not printed
                text = client.source(args.name)
            else:
                text = "".join(f"{name}\n" for name in client.names())
    except AgentsError as error:
        print(error, file=sys.stderr)
        return 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
