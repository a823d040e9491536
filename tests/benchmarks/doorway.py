"""The gateway against vLLM's own socket, in vLLM's container: `doorway.py RELAY ROUNDS REQUESTS`.

RELAY is the address of a proxy that only passes bytes on to the socket: what anything in between costs here.
Prints one JSON object. The ways take turns, and each figure is compared with the socket's within its round:
what else the machine does meets all alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from statistics import median

import httpx

CLIENTS = 8
BODY = {"model": os.environ.get("SERVER_MODEL", "google/functiongemma-270m-it"), "temperature": 0}
MESSAGES = [{"role": "user", "content": "Who are you?"}]


def ways(relay: str) -> dict[str, httpx.AsyncClient]:
    """A client of each way to vLLM, with connections that stay open."""
    limits = httpx.Limits(max_connections=CLIENTS)
    socket = httpx.AsyncHTTPTransport(uds=os.environ["SERVER_SOCKET"], limits=limits)
    return {
        "socket": httpx.AsyncClient(transport=socket, base_url="http://vllm", timeout=60),
        "relay": httpx.AsyncClient(base_url=relay, limits=limits, timeout=60),
        "gateway": httpx.AsyncClient(base_url="http://127.0.0.1:8000", limits=limits, timeout=60),
    }


async def ask(client: httpx.AsyncClient, *, stream: bool) -> tuple[float, float]:
    """Return the seconds until the first byte of the answer, and until its last."""
    start = time.perf_counter()
    body = {**BODY, "messages": MESSAGES, "stream": stream}
    first = 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_raw():
            first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


async def measure(client: httpx.AsyncClient, requests: int) -> dict[str, float]:
    """Ask one after another, for whole answers and for streams, then eight at a time."""
    single = [(await ask(client, stream=False))[1] for _ in range(requests)]
    streamed = [(await ask(client, stream=True))[0] for _ in range(requests)]

    async def caller() -> None:
        for _ in range(requests):
            await ask(client, stream=False)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CLIENTS)))
    rate = requests * CLIENTS / (time.perf_counter() - start)
    return {"p50": median(single), "first": median(streamed), "rate": rate}


def figures(way: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians of the rounds (times in ms), and of what each took more than by the socket, or its share."""
    pairs = [(one[way], one["socket"]) for one in rounds]
    times = {name: 1000 * median(own[name] for own, _ in pairs) for name in ("p50", "first")}
    more = {f"more_{name}": 1000 * median(own[name] - bare[name] for own, bare in pairs) for name in times}
    share = median(own["rate"] / bare["rate"] for own, bare in pairs)
    return {**times, **more, "rate": median(own["rate"] for own, _ in pairs), "share": share}


async def main() -> None:
    """Measure in rounds, and print the medians of each way and of what it has more than the socket."""
    relay, rounds, requests = sys.argv[1], *map(int, sys.argv[2:])
    clients = ways(relay)
    seen: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds + 1):
        names = random.sample(sorted(clients), len(clients))
        seen.append({name: await measure(clients[name], requests) for name in names})
    seen = seen[1:]  # the first warms up
    for client in clients.values():
        await client.aclose()
    print(json.dumps({name: figures(name, seen) for name in clients}))


if __name__ == "__main__":
    asyncio.run(main())
