"""What the served base model expects of an adapter, from the facts file that entrypoint.sh writes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AdapterError, NoAnswerError

_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names
# vLLM's "auto" serves a base of float32 in one of the shorter types: what overflows in neither is safe.
_AUTO = {"float32": "float16"}


def server_socket() -> Path:
    """Where the server in this container listens."""
    return Path(os.environ.get("SERVER_SOCKET") or "/run/vllm/vllm.sock")


def container(socket: Path | None = None) -> str:
    """Return the container of the server that listens there (by default this one): vllm-gemma-1 …."""
    return f"vllm-gemma{(socket or server_socket()).stem.removeprefix('vllm')}"


@dataclass(frozen=True)
class Base:
    """The served base model."""

    names: tuple[str, ...]  # its name, then its declared aliases
    dtype: str  # bfloat16, float16 or float32: what weights are converted to
    max_rank: int
    max_cpu_loras: int
    modules: dict[str, tuple[int, int]]  # full name -> (inputs, outputs) of each layer that takes LoRA

    @classmethod
    def read(cls, path: Path | None = None) -> "Base":
        """Read the facts file at `path`, by default that of the server in this container."""
        if path is None:
            path = server_socket().with_suffix(".base")
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError as error:
            raise NoAnswerError(
                f"{path} is not there: the server does not serve a model yet: see `docker logs {container()}`"
            ) from error
        facts = dict(line.split("=", 1) for line in lines if "=" in line)
        try:
            directory = Path(facts["MODEL_DIR"])
            names = (facts["SERVER_MODEL"], *facts["SERVER_MODEL_ALIASES"].split())
            max_rank, max_cpu_loras = int(facts["SERVER_MAX_LORA_RANK"]), int(facts["SERVER_MAX_CPU_LORAS"])
            dtype = facts["SERVER_DTYPE"]
        except (KeyError, ValueError) as error:
            raise AdapterError(
                f"{path} lacks a fact ({error}): another release wrote it, so restart the server with "
                "`docker compose restart vllm-server`"
            ) from error
        config = _config(directory)
        if dtype == "auto":
            found = str(config.get("dtype") or config.get("torch_dtype"))
            dtype = _AUTO.get(found, found)
        dtype = _DTYPES.get(dtype, dtype)
        if dtype not in ("bfloat16", "float16", "float32"):
            raise AdapterError(
                f"the server's dtype is {dtype}: set SERVER_DTYPE to bfloat16, float16 or float32 in "
                "server/entrypoint.env"
            )
        return cls(names, dtype, max_rank, max_cpu_loras, _modules(config, directory / "config.json"))


def _config(directory: Path) -> dict[str, Any]:
    """Return the part of the base's config.json that describes its text layers."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
        text: dict[str, Any] = config.get("text_config") or config
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}): remove {directory} and restart the server, so that it fetches "
            "the model again"
        ) from error
    return text


def _modules(config: dict[str, Any], path: Path) -> dict[str, tuple[int, int]]:
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        size = int(config.get("head_dim") or hidden // heads)
        query, key = heads * size, int(config.get("num_key_value_heads") or heads) * size
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdapterError(
            f"{path} lacks a usable {error}: SERVER_MODEL in server/entrypoint.env must be a model "
            "like Gemma 3, whose adapters can be checked"
        ) from error
    shapes = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}
