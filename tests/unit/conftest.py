"""An adapter of a few bytes, for tests that need no model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from function_gemma.adapters.store import FILES

CONFIG, WEIGHTS = FILES


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory that looks like an adapter, with these weights."""

    def make(weights: str = "one", name: str = "lint") -> Path:
        path = tmp_path / "sources" / weights / name
        path.mkdir(parents=True)
        (path / CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
        (path / WEIGHTS).write_text(weights)
        (path / "README.md").write_text("not part of a generation")
        return path

    return make
