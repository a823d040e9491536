"""Which adapters may reach the GPU: the one answer, for the manager, for vLLM's plugin and for a controller.

vLLM itself answers 200 to many a wrong adapter, and a NaN in one poisons the answers of all.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from . import config, weights
from .base import Base
from .files import CONFIG, WEIGHTS, digest, opened
from .source import survey


@dataclass(frozen=True)
class Admitted:
    """An adapter that may be served."""

    digest: str  # 12 hex digits of the content
    rank: int
    alpha: float
    tensors: int
    bytes: int  # of both files


def admit(directory: Path, base: Base) -> Admitted:
    """Check the adapter in `directory`, a copy that nobody else writes to, and hash it, in one pass.

    RefusedError names the first thing that is wrong, what was expected, and what to do.
    """
    content, declared = _config(directory)
    config.check_base(declared, base)
    with opened(directory / WEIGHTS) as (file, size):
        header = weights.read_header(file, size)
        weights.check_pairs(header.tensors, declared.rank)
        weights.check_modules(header.tensors, base, config.targeted(declared, base.modules))
        sha256 = weights.check_values(file, header, declared, base.dtype)
    hashes = {CONFIG: hashlib.sha256(content).hexdigest(), WEIGHTS: sha256}
    return Admitted(digest(hashes), declared.rank, declared.alpha, len(header.tensors), len(content) + size)


def inspect(directory: Path) -> None:
    """Check what needs neither a base nor the values, in a moment and with the standard library alone."""
    survey(directory)
    _, declared = _config(directory)
    with opened(directory / WEIGHTS) as (file, size):
        header = weights.read_header(file, size)
    weights.check_pairs(header.tensors, declared.rank)


def _config(directory: Path) -> tuple[bytes, config.Config]:
    with opened(directory / CONFIG) as (file, size):
        content = file.read(size)
    return content, config.parse(content)
