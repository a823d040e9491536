"""How fast adapters are admitted, loaded and replaced, and how plain vLLM does it: docs/adapters.md.

    make bench

On a lab that is up and serves. What it loads on the host it takes away again; the swaps run in a container of
their own there, beside the server, which is idle meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lora import lora_plan

import admission
import common as lab
from adapter_files import SMALL, make_base, make_config, make_tensors, pack, tar_of, write
from function_gemma.adapters.store import digest_of
from report import machine
from stack import changes, host, playbook, ssh

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
PAGE = lab.ROOT / "docs" / "adapters.md"
MODEL = lab.CACHE / "model"
LINT, DOCSTRING = MODEL / "lint", MODEL / "docstring"
MANY = [f"a{number:03}" for number in range(100)]
MANAGER = "docker exec -i vllm-gemma adapter_manager.py"
CONTAINER = "bench-adapters"
Rows = list[tuple[str, str, str]]  # what was measured, the figure, its limit


def say(line: str) -> None:
    """Show what is being measured."""
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def adapter(folder: Path, shape: Mapping[str, int]) -> Path:
    """Write a rank-32 adapter of that shape."""
    tensors = make_tensors(make_base(folder / "base", shape), rank=32)
    write(folder / "adapter", make_config(r=32, lora_alpha=64), pack(tensors))
    return folder / "adapter"


def sent(directory: Path, prefix: str = "") -> dict[str, bytes]:
    """A directory's files, by the names that a tar gives them."""
    return {
        f"{prefix}{path.relative_to(directory)}": path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def total(files: Mapping[str, bytes]) -> int:
    """Bytes of all of them."""
    return sum(map(len, files.values()))


def pipe(command: str, members: dict[str, bytes]) -> str:
    """Run a command on the host with a tar on its standard input; what it writes to standard output."""
    return subprocess.run(
        ssh(command), input=tar_of(members), stdout=subprocess.PIPE, check=True
    ).stdout.decode()


def declared(sources: Mapping[str, Path]) -> list[dict[str, str]]:
    """lora_adapters with these."""
    return [{"name": name, "source": str(source)} for name, source in sources.items()]


def extra(sources: Mapping[str, Path]) -> tuple[str, str]:
    """Words that declare these adapters in place of the inventory's."""
    return ("-e", json.dumps({"lora_adapters": declared(sources)}))


# ── Loads ────────────────────────────────────────────────────────────────────────────────────────


def measure_load() -> tuple[Rows, str]:
    """load_adapter.yml for new content; the parts of one load over SSH, as a row of their table."""
    say("load_adapter.yml -e name=lint")
    try:
        start = time.perf_counter()
        run = playbook(
            "load_adapter.yml", "-e", "name=lint", *extra({"lint": DOCSTRING, "docstring": DOCSTRING})
        )
        took = time.perf_counter() - start
        assert changes(run) == 1, str(run)
        with tempfile.TemporaryDirectory() as scratch:
            members = sent(adapter(Path(scratch), SMALL))
        report = json.loads(pipe(f"{MANAGER} load bench - --json", members))
    finally:
        restore(["bench"])
    rows = [("`load_adapter.yml -e name=lint`, new content, to the reply", f"{took:.1f} s", "≤ 8 s")]
    return rows, parts("rank 32 of the lab's shape, over SSH", report["seconds"], total(members))


def measure_unchanged() -> Rows:
    """The role's stage for a hundred adapters that are as declared."""
    say(f"{len(MANY)} unchanged adapters")
    source = f"/models/adapters/lint/{digest_of(LINT)}"
    try:
        host(
            "docker exec -i vllm-gemma python3 -",
            stdin=script(f"for name in {MANY}:\n    run(parse(['load', name, {source!r}]))"),
        )
        with tempfile.NamedTemporaryFile("r") as log:
            os.environ["ANSIBLE_LOG_PATH"] = log.name
            start = time.perf_counter()
            run = playbook(
                "site.yml",
                "--tags",
                "lora",
                *extra({"lint": LINT, "docstring": DOCSTRING, **dict.fromkeys(MANY, LINT)}),
            )
            took = time.perf_counter() - start
            del os.environ["ANSIBLE_LOG_PATH"]
            stage = stage_seconds(log.read())
        assert changes(run) == 0, str(run)
    finally:
        restore(MANY)
    return [
        (f"{len(MANY)} unchanged adapters (small ones): the role's stage", f"{stage:.1f} s", "≤ 5 s"),
        ("all of that `site.yml --tags lora`, preflight and reply too", f"{took:.1f} s", ""),
        *measure_plan(),
    ]


def restore(names: list[str]) -> None:
    """Take these away, with their files, and let the host serve what the inventory declares."""
    say(f"taking {len(names)} adapters away, then site.yml --tags lora")
    host(
        "docker exec -i vllm-gemma python3 -",
        stdin=script(
            f"names = {names}\n"
            "for one in run(parse(['history']))['adapters']:\n"
            "    if one['name'] in names and one['serves']:\n"
            "        run(parse(['unload', one['name']]))\n"
            "Store(root()).prune({}, names)"
        ),
    )
    playbook("site.yml", "--tags", "lora")


def script(body: str) -> str:
    """A program for the server's container: a hundred commands in the time of a few."""
    return (
        "import sys\n"
        "sys.path.insert(0, '/usr/local/bin')\n"
        "from adapter_manager import Store, parse, root, run\n" + body
    )


def stage_seconds(log: str) -> float:
    """From the first task of the role lora to the next play, as Ansible's log has it."""
    stage = log.partition("PLAY [Bring the host to what the inventory says]")[2]
    lines = [line for line in stage.splitlines() if "| TASK [lora : " in line or "| PLAY [" in line]
    begin, end = lines[0], next(line for line in lines if "| PLAY [" in line)
    assert "| TASK [lora : " in begin, begin
    return (moment(end) - moment(begin)).total_seconds()


def moment(line: str) -> datetime:
    """When a line of Ansible's log was written."""
    found = re.match(r"\S+ [\d:]+,\d+", line)
    assert found, line
    return datetime.strptime(found[0], "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)


def measure_plan() -> Rows:
    """What of the stage depends on the adapters' size: the comparison on the controller."""
    say(f"the comparison of {len(MANY)} adapters of the real shape")
    with tempfile.TemporaryDirectory() as scratch:
        files = sent(adapter(Path(scratch), admission.SHAPE))
        sources = {name: Path(scratch) / name for name in MANY}
        for source in sources.values():
            source.mkdir()
            for name, content in files.items():
                (source / name).write_bytes(content)
        digest = digest_of(sources[MANY[0]])
        served = [{"name": name, "serves": digest, "source": None, "quarantined": None} for name in MANY]
        start = time.perf_counter()
        plan = lora_plan(declared(sources), served, scratch, only=[], state="present", rollback=False)
        took = time.perf_counter() - start
        assert not plan, plan
    size = total(files) / 1e6
    return [(f"the comparison alone of {len(MANY)} adapters of {size:.0f} MB each", f"{took:.1f} s", "≤ 5 s")]


# ── Swaps ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def container() -> Iterator[str]:
    """A container of the served image that does nothing yet, with a copy of the base model; its name."""
    image = host("docker inspect -f '{{.Config.Image}}' vllm-gemma").last
    remove = f"docker rm -f -v {CONTAINER}"
    host(remove, ok=None)
    try:
        host(
            # The settings of the server, with fewer GPU slots than names.
            f"docker exec vllm-gemma env | grep '^SERVER_' | docker run -d --init --name {CONTAINER} "
            "--network none --shm-size 1g --env-file /dev/stdin "
            "-e SERVER_MAX_LORAS=2 -e VLLM_HOST_IP=127.0.0.1 "
            "-e SERVER_AGENTS_DIR=/tmp/bench/agents -e PYTHONPATH=/usr/local/bin "
            "-v function-gemma-server_models-base:/base:ro -v /models/base -v /models/adapters "
            f"--entrypoint sleep {image} infinity"
        )
        host(f"docker exec {CONTAINER} sh -c 'mkdir /tmp/bench && cp -r /base/. /models/base/'")
        yield CONTAINER
    finally:
        host(remove, ok=None)


def measure_swaps() -> tuple[dict[str, Any], int]:
    """What swaps.py says, and the bytes of the adapter of the real shape."""
    with tempfile.TemporaryDirectory() as scratch:
        real = sent(adapter(Path(scratch), admission.SHAPE), "real/")
        members = {
            "swaps.py": (HERE / "swaps.py").read_bytes(),
            "answers.json": (lab.LAB / "model" / "answers.json").read_bytes(),
            "shape.json": json.dumps(admission.SHAPE).encode(),
            **sent(LINT, "lint/"),
            **sent(DOCSTRING, "docstring/"),
            **sent(lab.LAB / "model" / "agent", "agents/"),
            **real,
        }
    with container() as name:
        pipe(f"docker exec -i {name} tar -x -C /tmp/bench", members)
        run = f"docker exec {name} python3 /tmp/bench/swaps.py /tmp/bench"
        results: dict[str, Any] = json.loads(
            pipe(f"{run} || {{ docker exec {name} tail -n 50 /tmp/bench/server.log >&2; false; }}", {})
        )
    return results, total(real)


# ── The page ─────────────────────────────────────────────────────────────────────────────────────


def parts(title: str, seconds: Mapping[str, float], size: int) -> str:
    """A row of the table of one load's parts."""
    both = seconds["add_lora"] + seconds["move"]
    figures = [seconds["admission"], seconds["add_lora"], seconds["move"], both, seconds["proof"]]
    cells = [f"{size / 1e6:.1f}", *(f"{1000 * figure:.0f}" for figure in figures)]
    # What no gate takes is not nothing, but no millisecond.
    cells.append(f"{1000 * seconds['gate']:.0f}" if seconds["gate"] > 0.001 else "none")
    return f"| {title} | {' | '.join(cells)} |"


def counted(total: int, kinds: Mapping[str, int]) -> str:
    """A count, with its kinds."""
    return (
        f"{total} ({', '.join(f'{kind}: {count}' for kind, count in kinds.items())})" if kinds else str(total)
    )


def way(title: str, figures: Mapping[str, Any]) -> str:
    """A row of the comparison."""
    failed, without = figures["failed"], figures["without"]
    swaps = counted(figures["swaps"], figures["failed_swaps"])
    if figures["engine_died"]:
        swaps += ", then the engine died"
    cells = [
        title,
        swaps,
        figures["requests"],
        counted(sum(failed.values()), failed),
        figures["wrong"],
        figures["stale"],
        f"{1000 * figures['p50']:.0f} / {1000 * without['p50']:.0f}",
        f"{1000 * figures['p99']:.0f} / {1000 * without['p99']:.0f}",
        f"{figures['p99'] / without['p99']:.2f}",
        "never" if figures["live"] is None else f"{figures['live']:.2f}",
        "yes" if figures["survives"] else "no",
        "yes" if figures.get("remembers") else "no",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: Rows) -> str:
    """Rows with their limits."""
    return "\n".join(
        ["| what | measured | limit |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


PAGE_TEXT = """\
# How fast adapters are loaded and replaced

Made by `make bench` on {machine}.
Each figure is one run on the lab, whose base model is tiny; what depends on an adapter's size was measured
with one of rank 32 that has the shape of the real 270M model.

## Admission, a load, the unchanged

{rows}

## Where the time of one load goes

Milliseconds, on an idle server. Admission is the server's; the manager's before it takes as long. add_lora
and move together may take 100.

| adapter | MB | admission | add_lora | move | add_lora + move | proof | gate |
|---|---:|---:|---:|---:|---:|---:|---:|
{loads}

## Replaced under load, beside plain vLLM

{clients} clients ask without a pause, half of the answers are streamed, of 5 to 200 tokens, under {names}
names on {slots} GPU slots. Clients, server and manager share the cores. Each swap brings content that the
server has not seen. Each answer is compared with what its generation says, which `x-served-by` names. Plain
vLLM has no such header: there an answer is wrong if no generation of its name gives it, and stale if one gave
it that was replaced before the request was sent. Plain vLLM is the same image with the same arguments,
without the plugin, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

Wanted of the first row: 200 swaps, 0 failed, 0 wrong, 0 stale, p99 at most 1.2 times that without swaps.

| {head} |
|{rule}|
{ways}

Latencies are those of the requests that were answered. A client whose request failed waits {pause} s before
the next. "Survives" was tried with a restart by the same command, once for what unload and load and
load_inplace keep in the same place, and "goes back" with a rollback of every name; plain vLLM has no command
for the second. Restarts with `--lora-modules` survive because a person has written each new directory into
the command.

| after the swaps of the first row | measured | wanted |
|---|---:|---:|
| generations that the server holds | {held} | {names} |
| growth of the engine's memory | {memory:.0f} MiB | |
| add_lora, median | {add_lora:.0f} ms | |
| move, median | {move:.0f} ms | |
| proof, median: it queues as every request does | {proof:.0f} ms | |
"""
HEAD = [
    "way",
    "swaps",
    "requests",
    "failed (by HTTP status)",
    "wrong",
    "stale",
    "p50 ms, with / without swaps",
    "p99 ms, with / without swaps",
    "p99 ratio",
    "s until live (median)",
    "survives a restart",
    "goes back",
]


def page(rows: Rows, loads: list[str], ways: Mapping[str, Any]) -> str:
    """The whole of docs/adapters.md."""
    ours = next(iter(ways.values()))
    return PAGE_TEXT.format(
        machine=f"{datetime.now(UTC):%F}: {machine()}",
        rows=table(rows),
        loads="\n".join(loads),
        head=" | ".join(HEAD),
        rule="|".join(["---", *["---:"] * 9, "---", "---"]),
        ways="\n".join(way(title, figures) for title, figures in ways.items()),
        memory=ours["memory"] / 2**20,
        **{name: ours[name] for name in ("clients", "names", "slots", "pause", "held")},
        **{name: 1000 * value for name, value in ours["parts"].items()},
    )


def main() -> None:
    """Measure, and write the page."""
    say("admission")
    rows: Rows = admission.measure()
    load, over_ssh = measure_load()
    rows += [*load, *measure_unchanged()]
    say("swaps under load, in a container of their own")
    swaps, real_size = measure_swaps()
    ours = next(iter(swaps["ways"].values()))
    real = {part: median(one[part] for one in swaps["real"]) for part in swaps["real"][0]}
    loads = [
        over_ssh,
        parts(
            f"lint, with a gate of {ours['gated']['gate']['of']} prompts",
            ours["gated"]["seconds"],
            total(sent(LINT)),
        ),
        parts(f"rank 32 of the real shape (median of {len(swaps['real'])})", real, real_size),
    ]
    PAGE.write_text(page(rows, loads, swaps["ways"]))
    print(f"\n{PAGE.read_text()}")


if __name__ == "__main__":
    main()
