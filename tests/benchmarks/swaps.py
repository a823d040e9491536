"""Replace adapters under load: by the adapter manager, and by each way that vLLM has by itself.

    swaps.py DIRECTORY

Runs in a container of the server's image with nothing else in it. DIRECTORY has answers.json, the trained
adapters lint and docstring, agents/ with the gate of an adapter named gated, and `real`, an adapter of the
shape in shape.json. Starts and stops the servers itself; what it does goes to standard error, the figures, as
one JSON object, to standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import time
from asyncio.subprocess import DEVNULL
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

import adapter_manager
from function_gemma.adapters.files import FILES
from function_gemma.adapters.store import digest_of, root

CONFIG, WEIGHTS = FILES
CONTENTS = ("lint", "docstring")
NAMES = [f"swapped{number}" for number in range(6)]  # more than GPU slots: SERVER_MAX_LORAS is 2
CLIENTS = 8
SWAPS, REQUESTS = 200, 1500  # of a phase
RESTARTS, RESTART_REQUESTS = 3, 400  # a restart takes as long as a hundred swaps
# A phase ends then, whatever it has done; the second is for what must be done.
PHASE_SECONDS, LONG_PHASE_SECONDS = 90, 240
START_SECONDS = 180
REAL_LOADS = 5
MODEL = "google/functiongemma-270m-it"
PAUSE = 0.1  # seconds that a client waits after a request that failed
SOCKET = os.environ.get("SERVER_SOCKET", "/run/vllm/vllm.sock")
HERE = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
LOG = (HERE / "server.log").open("ab")

Swap = Callable[[str, "Generation"], Awaitable[None]]


def say(line: str) -> None:
    """Show what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Generation:
    """An adapter of new content that answers as `content` does."""

    content: str
    path: Path
    digest: str


def renewed(source: Path, path: Path) -> Path:
    """Copy an adapter to `path`, with that path in its metadata: new content that answers the same."""
    path.mkdir(parents=True)
    (path / CONFIG).write_bytes((source / CONFIG).read_bytes())
    data = (source / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = {**header.get("__metadata__", {}), "path": str(path)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return path


class Served:
    """What each name serves: its generations in their order, and how many of them are known to be live."""

    def __init__(self, title: str) -> None:
        self.begun: dict[str, list[Generation]] = {name: [] for name in NAMES}
        self.live = dict.fromkeys(NAMES, -1)  # index of the latest that a load has reported
        self.folder = HERE / title.replace(" ", "-")

    def make(self, name: str) -> Generation:
        """The next generation of a name: the other content, as nobody has seen it."""
        number = len(self.begun[name])
        content = CONTENTS[number % len(CONTENTS)]
        path = renewed(HERE / content, self.folder / f"{name}-{number}")
        return Generation(content, path, digest_of(path))

    async def swap(self, name: str, swap: Swap) -> None:
        """Replace what a name serves."""
        one = self.make(name)
        self.begun[name].append(one)
        await swap(name, one)
        self.live[name] = len(self.begun[name]) - 1


class Server:
    """vLLM as a process of this one, on its unix socket."""

    def __init__(self, words: list[str], ready: str, **environment: str) -> None:
        self.words, self.ready = words, ready
        self.environment = {**os.environ, **environment}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *more: str) -> float:
        """Start it and wait until it answers; seconds that it took."""
        begin = time.perf_counter()
        self.process = await asyncio.create_subprocess_exec(
            *self.words, *more, env=self.environment, stdin=DEVNULL, stdout=LOG, stderr=LOG
        )
        async with connection() as client:
            while True:
                try:
                    if (await client.get(self.ready)).status_code == httpx.codes.OK:
                        return time.perf_counter() - begin
                except httpx.TransportError:
                    pass
                if self.ended or time.perf_counter() - begin > START_SECONDS:
                    raise SystemExit(f"the server did not start: {HERE}/server.log in the container")
                await asyncio.sleep(0.1)

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.returncode is not None

    async def stop(self) -> None:
        """End it as Docker does, and wait."""
        if self.process and not self.ended:
            self.process.terminate()
            await self.process.wait()
        # vLLM leaves it behind and would not bind over it.
        await asyncio.to_thread(Path(SOCKET).unlink, missing_ok=True)

    def memory(self) -> int:
        """Bytes of memory of the engine's processes, shared pages in their parts."""
        total = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cmdline").read_bytes().startswith(b"VLLM::"):
                    rollup = (process / "smaps_rollup").read_text()
                    total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
            except OSError:
                continue  # it has ended meanwhile
        return total

    def held(self) -> int:
        """How many generations the server holds the files of."""
        assert self.process
        directory = Path(f"/proc/{self.process.pid}/fd")
        return sum(link.readlink().parent.parent == root() for link in directory.iterdir())


def connection() -> httpx.AsyncClient:
    """A client of the server's socket, with one connection at a time."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=SOCKET), base_url="http://localhost", timeout=60
    )


@dataclass
class Phase:
    """What the clients saw."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds of each request that was answered
    failed: Counter[str] = field(default_factory=Counter)  # by HTTP status, or what happened instead
    wrong: int = 0  # answers of no generation that the name can have had, or not of the one in x-served-by
    stale: int = 0  # answers of a generation that was replaced before the request was sent
    swaps: list[float] = field(default_factory=list)  # seconds until the new generation was live
    failed_swaps: Counter[str] = field(default_factory=Counter)
    engine_died: bool = False

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        percentiles = quantiles(self.latencies, n=100) if len(self.latencies) > 1 else [0.0] * 99
        return {
            "seconds": self.seconds,
            "requests": len(self.latencies) + self.failed.total(),
            "failed": dict(self.failed),
            "wrong": self.wrong,
            "stale": self.stale,
            "swaps": len(self.swaps),
            "failed_swaps": dict(self.failed_swaps),
            "live": median(self.swaps) if self.swaps else None,
            "p50": percentiles[49],
            "p99": percentiles[98],
            "engine_died": self.engine_died,
        }


class Load:
    """Eight clients that ask without a pause, each another name and prompt every time."""

    def __init__(self, server: Server, served: Served) -> None:
        self.server = server
        self.served = served
        self.answers: dict[str, dict[str, str]] = json.loads((HERE / "answers.json").read_text())
        self.over = asyncio.Event()
        self.phase = Phase()

    async def run(
        self,
        title: str,
        swap: Swap | None = None,
        swaps: int = SWAPS,
        requests: int = REQUESTS,
        seconds: float = PHASE_SECONDS,
    ) -> dict[str, Any]:
        """Ask until there are enough answers and, with `swap`, as many swaps spread evenly over them."""
        say(f"{title}: {requests} requests of {CLIENTS} clients" + (f", {swaps} swaps" if swap else ""))
        self.phase, self.over = Phase(), asyncio.Event()
        begin = time.perf_counter()
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        try:
            async with asyncio.timeout(seconds):
                for number in range(swaps if swap else 0):
                    await self._answered((number + 0.5) * requests / swaps)
                    if not await self._swap(NAMES[number % len(NAMES)], swap):
                        break
                if not self.phase.engine_died:
                    await self._answered(requests)
        except TimeoutError:
            say(f"{title}: ended after {seconds} s")
        self.over.set()
        await asyncio.gather(*clients)
        self.phase.seconds = time.perf_counter() - begin
        figures = self.phase.figures()
        say(f"{title}: {json.dumps(figures)}")
        return figures

    async def _answered(self, count: float) -> None:
        # The end of a server sets no event.
        while len(self.phase.latencies) < count and not self.server.ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _swap(self, name: str, swap: Swap | None) -> bool:
        """Whether the server lives on."""
        assert swap
        begin = time.perf_counter()
        if not self.server.ended:
            try:
                await self.served.swap(name, swap)
                self.phase.swaps.append(time.perf_counter() - begin)
            except httpx.HTTPError as error:
                self.phase.failed_swaps[kind(error)] += 1
        self.phase.engine_died = self.server.ended
        return not self.server.ended

    async def _client(self, number: int) -> None:
        choose = random.Random(number)  # noqa: S311 - the same requests in each phase
        prompts = list(self.answers)
        async with connection() as client:
            while not self.over.is_set():
                name, prompt = choose.choice(NAMES), choose.choice(prompts)
                streams = choose.random() < 0.5
                known = self.served.live[name]
                begin = time.perf_counter()
                try:
                    maker, answer = await ask(client, name, prompt, streams=streams)
                except (httpx.HTTPError, ValueError) as error:
                    self.phase.failed[kind(error)] += 1
                else:
                    self.phase.latencies.append(time.perf_counter() - begin)
                    self._judge(name, known, maker, self.answers[prompt], answer)
                    continue
                await asyncio.sleep(PAUSE)

    def _judge(self, name: str, known: int, maker: str, right: dict[str, str], answer: str) -> None:
        """Count an answer that is not of the name's generation of its time."""
        generations = self.served.begun[name]
        if maker:  # <release>/<name>@<digest>
            digest = maker.rpartition(f"/{name}@")[2]
            found = [number for number, one in enumerate(generations) if one.digest == digest]
            possible = {generations[number].content for number in found}
            is_late = bool(found) and found[0] < known
        else:
            possible = {one.content for one in generations}
            is_late = all(right[one.content] != answer for one in generations[max(known, 0) :])
        if answer not in {right[content] for content in possible}:
            say(f"an answer of no generation of {name}: {answer!r}")
            self.phase.wrong += 1
        elif is_late:
            self.phase.stale += 1


def kind(error: Exception) -> str:
    """How a request failed, in a word or two."""
    if isinstance(error, httpx.HTTPStatusError):
        return str(error.response.status_code)
    return "no connection" if isinstance(error, httpx.ConnectError) else "broken off"


async def ask(client: httpx.AsyncClient, name: str, prompt: str, *, streams: bool) -> tuple[str, str]:
    """Who answered, if the server says so, and what; ValueError for an answer without its end."""
    body = {
        "model": name,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "stream": streams,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        maker = response.headers.get("x-served-by", "")
        if not streams:
            answer = json.loads(await response.aread())
            return maker, str(answer["choices"][0]["message"]["content"])
        words, last = [], ""
        async for line in response.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "choices" not in chunk:
                    raise ValueError(line)  # an error after the beginning of an answer
                words += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        if last != "data: [DONE]":
            raise ValueError(last)
        return maker, "".join(words)


# ── Ways to replace ──────────────────────────────────────────────────────────────────────────────


def manage(*words: str) -> dict[str, Any]:
    """What adapter_manager.py does with these words, in a process that has it imported."""
    return adapter_manager.run(adapter_manager.parse(list(words)))


@contextmanager
def manager(reports: list[dict[str, float]]) -> Iterator[Swap]:
    """The adapter manager, in a process of its own; what it says of its seconds goes to `reports`."""
    with ProcessPoolExecutor(max_workers=1) as process:

        async def swap(name: str, one: Generation) -> None:
            loop = asyncio.get_running_loop()
            report = await loop.run_in_executor(process, manage, "load", name, str(one.path))
            reports.append(report["seconds"])

        yield swap


async def post(path: str, **body: object) -> None:
    async with connection() as client:
        (await client.post(path, json=body)).raise_for_status()


async def load(name: str, one: Generation) -> None:
    await post("/v1/load_lora_adapter", lora_name=name, lora_path=str(one.path))


async def unload_and_load(name: str, one: Generation) -> None:
    await post("/v1/unload_lora_adapter", lora_name=name)
    await load(name, one)


async def load_in_place(name: str, one: Generation) -> None:
    await post("/v1/load_lora_adapter", lora_name=name, lora_path=str(one.path), load_inplace=True)


async def served_right(served: Served, answers: dict[str, dict[str, str]]) -> bool:
    """Whether every name answers as the latest generation that was reported to be live."""
    prompt, right = next(iter(answers.items()))
    async with connection() as client:
        for name, live in served.live.items():
            try:
                _, answer = await ask(client, name, prompt, streams=False)
            except httpx.HTTPError:
                return False
            if answer != right[served.begun[name][live].content]:
                return False
    return True


async def settled(server: Server) -> int:
    """How many generations are held once those that were replaced are let go: soon after the last answer."""
    for _ in range(100):
        if (held := server.held()) <= len(NAMES):
            break
        await asyncio.sleep(0.05)
    return held


async def measure_manager() -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Our server's figures, and the words and the environment that it has started vLLM with."""
    server = Server(["entrypoint.sh"], "/ready")
    say("our server starts")
    try:
        await server.start()
        assert server.process
        proc = Path(f"/proc/{server.process.pid}")
        words = (proc / "cmdline").read_bytes().decode().split("\0")[:-1]
        variables = (line.split("=", 1) for line in (proc / "environ").read_bytes().decode().split("\0")[:-1])
        served, reports = Served("manager"), list[dict[str, float]]()
        load = Load(server, served)
        with manager(reports) as swap:
            for name in NAMES:
                await served.swap(name, swap)
            gated = manage("load", "gated", str(HERE / "lint"))
            manage("unload", "gated")
            await load.run("warming up", requests=200)
            without = await load.run("ours without swaps")
            reports.clear()
            before = server.memory()
            figures = await load.run("ours", swap, seconds=LONG_PHASE_SECONDS)
        memory = server.memory() - before
        held = await settled(server)
        await server.stop()
        say("our server starts again")
        await server.start()
        survives = await served_right(served, load.answers)
        for name in NAMES:
            manage("rollback", name)
            served.live[name] -= 1
        remembers = await served_right(served, load.answers)
        parts = {part: median(report[part] for report in reports) for part in ("add_lora", "proof", "move")}
        figures |= {
            "without": without,
            "survives": survives,
            "remembers": remembers,
            "gated": gated,
            "memory": memory,
            "held": held,
            "names": len(NAMES),
            "slots": int(os.environ["SERVER_MAX_LORAS"]),
            "clients": CLIENTS,
            "pause": PAUSE,
            "parts": parts,
        }
        return figures, words, dict(variables)
    finally:
        await server.stop()


async def measure_stock(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The figures of each of vLLM's own ways, of the same image, words and environment without the plugin."""
    environment = {name: value for name, value in environment.items() if name != "VLLM_PLUGINS"}
    server = Server(words, "/health")
    server.environment = {**environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    try:
        served = Served("vLLM")
        clients = Load(server, served)
        say("vLLM's own server starts")
        await server.start()
        for name in NAMES:
            await served.swap(name, load)
        await clients.run("warming up", requests=200)
        without = await clients.run("vLLM without swaps")
        results = {"unload and load": await clients.run("unload and load", unload_and_load)}
        await server.stop()
        say("vLLM's own server starts again")
        await server.start()
        survives = await served_right(served, clients.answers)
        for name in NAMES:
            await served.swap(name, load)
        results["load_inplace"] = await clients.run("load_inplace", load_in_place)
        for figures in results.values():
            figures["survives"] = survives  # what either has loaded is kept in the same place
        await server.stop()
        results["restart with --lora-modules"] = await measure_restarts(server)
        return {title: {**figures, "without": without} for title, figures in results.items()}
    finally:
        await server.stop()


async def measure_restarts(server: Server) -> dict[str, Any]:
    """The adapters on vLLM's command line, and a restart for a new one."""
    served = Served("restart")
    clients = Load(server, served)

    async def restart(_name: str, _one: Generation) -> None:
        modules = [f"{name}={generations[-1].path}" for name, generations in served.begun.items()]
        await server.stop()
        await server.start("--lora-modules", *modules)

    for name in NAMES:
        served.begun[name].append(served.make(name))
        served.live[name] = 0
    say("vLLM's own server starts with --lora-modules")
    await restart("", served.begun[NAMES[0]][0])
    figures = await clients.run("restart", restart, RESTARTS, RESTART_REQUESTS, LONG_PHASE_SECONDS)
    # Its last swap was a restart.
    return {**figures, "survives": await served_right(served, clients.answers)}


async def measure_real_size() -> list[dict[str, float]]:
    """Seconds of the parts of a few loads into an idle base of the real shape, whose weights mean nothing."""
    own = Path("/models/base") / os.environ.get("SERVER_MODEL", MODEL)
    real = own.parents[1] / "real" / "size"
    real.mkdir(parents=True)
    for file in own.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, real / file.name)
    shape = json.loads((HERE / "shape.json").read_text())
    shape["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
    config = json.loads((own / "config.json").read_text())
    (real / "config.json").write_text(json.dumps({**config, **shape}))
    (real / ".complete").write_text(f"real/size@{os.environ['SERVER_MODEL_REVISION']}")
    os.environ["SERVER_ADAPTERS_DIR"] = str(HERE / "adapters")
    root().mkdir()
    os.environ |= {"SERVER_MODEL": "real/size", "SERVER_MODEL_ALIASES": MODEL}
    os.environ["SERVER_EXTRA_ARGS"] += " --load-format dummy"
    server = Server(["entrypoint.sh"], "/ready")
    say("our server starts with a base of the real shape")
    try:
        await server.start()
        paths = [renewed(HERE / "real", HERE / f"real-{number}") for number in range(REAL_LOADS)]
        return [manage("load", "real", str(path))["seconds"] for path in paths]
    finally:
        await server.stop()


async def main() -> None:
    """Measure, and print."""
    ours, words, environment = await measure_manager()
    stock = await measure_stock(words, environment)
    real = await measure_real_size()
    print(json.dumps({"ways": {"`adapter_manager.py load`": ours, **stock}, "real": real}))


if __name__ == "__main__":
    asyncio.run(main())
