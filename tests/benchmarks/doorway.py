"""The gateway against vLLM's own socket, in vLLM's container: `doorway.py ROUNDS REQUESTS`.

Prints one JSON object. The two take turns, and each figure is compared within its round: what else the
machine does meets both alike.
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
FIGURES = ("p50", "first", "rate")


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


async def measure(client: httpx.AsyncClient, requests: int) -> dict[str, float]:
    """Ask one after another, for whole answers and for streams, then eight at a time."""
    single = [(await ask(client, stream=False))[1] for _ in range(requests)]
    streamed = [(await ask(client, stream=True))[0] for _ in range(requests)]
    start = time.perf_counter()
    for _ in range(requests // CLIENTS):
        await asyncio.gather(*(ask(client, stream=False) for _ in range(CLIENTS)))
    rate = requests // CLIENTS * CLIENTS / (time.perf_counter() - start)
    return {"p50": median(single), "first": median(streamed), "rate": rate}


async def main() -> None:
    """Measure in rounds, and print the medians of each way and of what one way has more than the other."""
    rounds, requests = map(int, sys.argv[1:])
    clients = ways()
    seen: list[dict[str, dict[str, float]]] = []
    for number in range(rounds + 1):
        names = list(clients) if number % 2 else list(clients)[::-1]
        seen.append({name: await measure(clients[name], requests) for name in names})
    seen = seen[1:]  # the first warms up
    for client in clients.values():
        await client.aclose()
    result = {
        name: {figure: median(one[name][figure] for one in seen) for figure in FIGURES} for name in clients
    }
    result["more"] = {
        figure: median(one["gateway"][figure] - one["socket"][figure] for one in seen) for figure in FIGURES
    }
    result["more"]["share"] = median(one["gateway"]["rate"] / one["socket"]["rate"] for one in seen)
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
