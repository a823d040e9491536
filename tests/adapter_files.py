"""Adapters made by code, byte by byte: what the tests and the benchmarks begin with."""

from __future__ import annotations

import json
import random
import struct
import tarfile
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any

from function_gemma.adapters.base import Base
from function_gemma.adapters.files import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MODEL = "google/functiongemma-270m-it"
SMALL = {  # the shape of the lab's model
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}

# Name -> type, shape, bytes of the values.
Tensors = dict[str, tuple[str, list[int], bytes]]


def make_base(area: Path, shape: Mapping[str, int] = SMALL, *, dtype: str = "bfloat16") -> Base:
    """What a server of a base with that shape leaves for admission, read as the manager reads it."""
    area.mkdir(parents=True, exist_ok=True)
    (area / "config.json").write_text(json.dumps({**SMALL, **shape}))
    facts = {
        "SERVER_MODEL": MODEL,
        "SERVER_MODEL_REVISION": "main",
        "SERVER_MODEL_ALIASES": "functiongemma local/functiongemma",
        "SERVER_DTYPE": dtype,
        "SERVER_MAX_LORA_RANK": 32,
        "SERVER_MAX_CPU_LORAS": 16,
        "MODEL_DIR": area,
    }
    (area / "vllm.base").write_text("".join(f"{name}={value}\n" for name, value in facts.items()))
    return Base.read(area / "vllm.base")


def make_config(**changes: object) -> dict[str, object]:
    """adapter_config.json as peft 0.21 writes it, with changes."""
    empty = (
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules "
        "kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config "
        "modules_to_save monteclora_config revision target_parameters trainable_token_indices use_bdlora "
        "velora_config"
    )
    config: dict[str, object] = {
        **dict.fromkeys(empty.split()),
        "alpha_pattern": {},
        "base_model_name_or_path": MODEL,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split(),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return {**config, **changes}


def make_values(dtype: str, count: int, random_bytes: random.Random) -> bytes:
    """Small values of both signs."""
    size = 4 if dtype == "F32" else 2
    values = bytearray(random_bytes.randbytes(count * size))
    values[size - 1 :: size] = (b"\x3c\xbc" * (count // 2 + 1))[:count]
    return bytes(values)


def make_tensors(base: Base, *, rank: int = 8, dtype: str = "BF16") -> Tensors:
    """Weights for every module of the base."""
    source = random.Random(4)  # noqa: S311 (weights are no secret)
    tensors: Tensors = {}
    for module, (inputs, outputs) in base.modules.items():
        for half, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
            name = f"base_model.model.{module}.lora_{half}.weight"
            tensors[name] = (dtype, shape, make_values(dtype, prod(shape), source))
    return tensors


def pack(tensors: Tensors, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> bytes:
    """A safetensors file; `edit` changes its header before it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(values)]}
        place += len(values)
    edit(header)
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + b"".join(values for *_, values in tensors.values())


def write(directory: Path, config: Mapping[str, object] | bytes, weights: bytes) -> None:
    """Write an adapter's two files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (directory / WEIGHTS).write_bytes(weights)


def tar_of(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """Pack contents, or ready members without content, under these names."""
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            packed.addfile(info, BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()
