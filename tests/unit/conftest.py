"""A base model of a few numbers and adapters that fit it, for tests that need no model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_files import make_base, make_config, make_tensors, pack, write
from function_gemma.adapters import base as base_module
from function_gemma.adapters.base import Base

SERVER = Path(base_module.__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """The base model, with the file of facts about it that entrypoint.sh leaves beside the socket."""
    monkeypatch.setenv("SERVER_SOCKET", os.fspath(tmp_path / "vllm.sock"))
    return make_base(tmp_path)


@pytest.fixture
def store(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a container that has an empty store, and in which no server runs."""
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("SERVER_ADAPTERS_DIR", str(root))
    monkeypatch.setenv("SERVER_AGENTS_DIR", str(tmp_path / "agents"))
    monkeypatch.setenv("PYTHONPATH", str(SERVER))
    assert base == Base.read()
    return root


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory with a good adapter, whose content follows from a word."""
    weights = make_tensors(make_base(tmp_path / "shape"))

    def make(word: str = "one", name: str = "lint") -> Path:
        path = tmp_path / "sources" / word / name
        write(path, make_config(), pack(weights, lambda header: header["__metadata__"].update(word=word)))
        (path / "README.md").write_text("not part of a generation")
        return path

    return make
