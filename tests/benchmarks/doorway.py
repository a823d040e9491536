"""The gateway against vLLM's own socket, in vLLM's container: `doorway.py ROUNDS REQUESTS`.

Prints one JSON object. Rounds alternate between the two, so that what else the machine does meets both alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from statistics import median

import httpx

CLIENTS = 8
BODY = {"model": os.environ.get("SERVER_MODEL", "google/functiongemma-270m-it"), "temperature": 0}
MESSAGES = [{"role": "user", "content": "Who are you?"}]


def ways() -> dict[str, httpx.AsyncClient]:
    """A client of each way to vLLM, with connections that stay open."""
    limits = httpx.Limits(max_connections=CLIENTS)
    socket = httpx.AsyncHTTPTransport(uds=os.environ["SERVER_SOCKET"], limits=limits)
    return {
        "socket": httpx.AsyncClient(transport=socket, base_url="http://vllm", timeout=60),
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


async def main() -> None:
    """Measure one request after another, then eight at a time."""
    rounds, requests = map(int, sys.argv[1:])
    clients = ways()
    alone: dict[str, list[float]] = {name: [] for name in clients}
    first: dict[str, list[float]] = {name: [] for name in clients}
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(rounds + 1):
        for name, client in clients.items():
            single = [await ask(client, stream=False) for _ in range(requests)]
            streamed = [await ask(client, stream=True) for _ in range(requests)]
            start = time.perf_counter()
            for _ in range(requests // CLIENTS):
                await asyncio.gather(*(ask(client, stream=False) for _ in range(CLIENTS)))
            rate = requests // CLIENTS * CLIENTS / (time.perf_counter() - start)
            if number:  # the first round warms up
                alone[name] += [last for _, last in single]
                first[name] += [one for one, _ in streamed]
                rates[name].append(rate)
    for client in clients.values():
        await client.aclose()
    print(
        json.dumps(
            {
                name: {
                    "p50": median(alone[name]),
                    "first": median(first[name]),
                    "rate": median(rates[name]),
                }
                for name in clients
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
