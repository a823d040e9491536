"""How fast an adapter is admitted, on one core and from the page cache, and how much memory that takes.

    PYTHONPATH=server:tests python tests/benchmarks/admission.py

The adapter has rank 32 and the shape of the real 270M model. What a machine can do at all is hashing, which
is measured beside it in the same run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_files import make_base, make_config, make_tensors, pack, write
from function_gemma.adapters.admission import admit
from function_gemma.adapters.files import FILES, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
PASSES = 20
# Prints the most memory that the process ever had, in KiB, after it admitted FOLDER/lint or did nothing.
# Not getrusage's figure: a child begins that with the memory of its parent.
MEMORY = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
if sys.argv[2] == "admit":
    from function_gemma.adapters.admission import admit
    from function_gemma.adapters.base import Base
    admit(folder / "lint", Base.read(folder / "vllm.base"))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several passes; the first warms the page cache."""
    took = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def memory(folder: Path, what: str) -> int:
    """The most memory of a fresh interpreter that does `what`, in KiB."""
    command = [sys.executable, "-c", MEMORY, str(folder), what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def measure() -> list[tuple[str, str, str]]:
    """What was measured, the figure, and its limit."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            base = make_base(folder, SHAPE)
            write(folder / "lint", make_config(r=32, lora_alpha=64), pack(make_tensors(base, rank=32)))
            size = sum((folder / "lint" / name).stat().st_size for name in FILES)
            content = (folder / "lint" / WEIGHTS).read_bytes()
            admission = size / best(lambda: admit(folder / "lint", base)) / 1e9
            hashing = size / best(lambda: hashlib.sha256(content)) / 1e9
            above = (memory(folder, "admit") - memory(folder, "nothing")) / 1024
    finally:
        os.sched_setaffinity(0, cores)
    return [
        (f"admission of {size / 1e6:.0f} MB on one core", f"{admission:.2f} GB/s", "≥ 1 GB/s"),
        ("sha256 alone of the same bytes", f"{hashing:.2f} GB/s", ""),
        ("admission as a share of sha256 alone", f"{admission / hashing:.0%}", ""),
        ("memory above a bare interpreter", f"{above:.0f} MiB", "≤ 64 MB"),
    ]


if __name__ == "__main__":
    for what, measured, limit in measure():
        print(f"{what:40} {measured:>12} {limit:>10}")
