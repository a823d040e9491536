"""Runs named steps side by side and shows what runs, since when, and where its log is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

HEARTBEAT_SECONDS = 30


class StepError(Exception):
    """A step that failed; the message says what, where its log is and what to do."""


@dataclass(frozen=True)
class Step:
    """A unit of work: ``run(log)`` starts once every step in ``needs`` has ended well.

    ``run`` returns what it did in a word or two ("reused", "built"), or raises.
    """

    name: str
    run: Callable[[TextIO], str]
    needs: Sequence[str] = ()
    detail: Callable[[], str] | None = None
    """What the step is at just now, for the lines that show progress."""


def call(log: TextIO, *command: str | Path, env: Mapping[str, str] | None = None) -> None:
    """Run ``command`` with its output in ``log``.

    Raises:
        StepError: the command ended with another status than 0.
    """
    words = [str(word) for word in command]
    print("+", *words, file=log, flush=True)
    code = subprocess.run(
        words, stdout=log, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL, check=False
    ).returncode
    if code:
        raise StepError(f"{words[0]} {words[1] if len(words) > 1 else ''} ended with status {code}")


def say(text: str) -> None:
    """One line of progress, with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def run(steps: Sequence[Step], log_dir: Path, *, workers: int) -> None:
    """Run all steps, at most ``workers`` at once, each as soon as what it needs is there.

    Raises:
        StepError: a step failed. Steps that already run are ended well first; none is started after.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    waiting = {step.name: step for step in steps}
    started: dict[str, float] = {}
    done: set[str] = set()
    running: dict[Future[str], Step] = {}
    failed: StepError | None = None
    lock = threading.Lock()

    def work(step: Step) -> str:
        with lock:
            started[step.name] = time.monotonic()
        path = log_dir / f"{step.name}.log"
        try:
            with path.open("w") as log:
                return step.run(log)
        except Exception as error:
            tail = "".join(f"    {line}\n" for line in path.read_text(errors="replace").splitlines()[-15:])
            message = (
                f"{step.name} failed: {error}\n{tail}  log: {path}\n  mend it and run the same command again"
            )
            raise StepError(message) from error

    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            if not failed:
                for step in [step for step in waiting.values() if done.issuperset(step.needs)]:
                    running[pool.submit(work, waiting.pop(step.name))] = step
            if not running:
                break
            ended, _ = wait(running, timeout=HEARTBEAT_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                step = running.pop(future)
                try:
                    what = future.result()
                except StepError as error:
                    say(str(error).splitlines()[0] + (", waiting for what still runs" if running else ""))
                    failed = failed or error
                else:
                    done.add(step.name)
                    seconds = time.monotonic() - started[step.name]
                    say(f"{step.name}: {what}" + (f" in {seconds:.0f} s" if seconds >= 1 else ""))
            if not ended:
                with lock:
                    ages = {
                        step.name + (f", {step.detail()}" if step.detail else ""): time.monotonic()
                        - started[step.name]
                        for step in running.values()
                        if step.name in started
                    }
                say(
                    "running: "
                    + ", ".join(f"{name} ({age:.0f} s)" for name, age in ages.items())
                    + (f"; next: {', '.join(waiting)}" if waiting else "")
                )
    if failed:
        raise failed


def fail(why: str) -> None:
    """Print why the command stops and stop with status 1."""
    print(f"\n{why}", file=sys.stderr)
    raise SystemExit(1)
