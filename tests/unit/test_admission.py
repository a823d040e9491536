"""Nothing wrong is admitted, each refusal says what is wrong, and nothing right is refused."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

import adapter_cases
from adapter_cases import CASES, Attempt, Case, beside, on_hub, refusal
from adapter_files import MODEL, make_base, make_config, make_tensors, pack, write
from function_gemma.adapters import files, weights
from function_gemma.adapters.admission import admit, inspect
from function_gemma.adapters.base import Base
from function_gemma.adapters.errors import AdapterError, NoAnswerError, RefusedError
from function_gemma.adapters.files import CONFIG, WEIGHTS
from function_gemma.adapters.source import from_directory, from_tar
from function_gemma.adapters.store import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVER = Path(files.__file__).parents[2]
FULL = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]

# Cases that a controller can tell, which knows no base.
EARLY = (
    "config: (IA3|DoRA|r as text|r 0|duplicated)|shapes: (half|another rank)|"
    "file: (config|weights|header|a link|a FIFO|a pickle)"
)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


def save(directory: Path, base: Base, modules: str = "", *, dtype: str = "BF16", **config: object) -> Path:
    """Write a good adapter for the modules of the base whose names match."""
    tensors = {k: v for k, v in make_tensors(base, dtype=dtype).items() if re.search(modules, k)}
    write(directory, make_config(**config), pack(tensors))
    return directory


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}")
def test_every_wrong_adapter_is_refused_in_time_and_says_why(case: Case) -> None:
    said = refusal(case)
    assert re.search(case.says, said), said
    assert adapter_cases.TOKEN not in said


def test_the_page_says_what_the_code_says() -> None:
    assert adapter_cases.PAGE.read_text() == adapter_cases.page(), "run `make tables`"


def test_a_case_has_a_name_of_its_own() -> None:
    names = [(case.group, case.name) for case in CASES]
    assert len(set(names)) == len(names) >= 84


@pytest.mark.parametrize(
    ("modules", "config"),
    [
        ("", {}),
        ("", {"target_modules": "all-linear"}),
        ("q_proj", {"target_modules": ["q_proj"]}),
        ("q_proj", {"target_modules": ["self_attn.q_proj"]}),
        ("q_proj", {"target_modules": FULL}),
        ("q_proj", {"target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"}),
        ("layers.0.mlp", {"target_modules": r".*layers\.0\.mlp\..*"}),
        ("", {"use_rslora": True, "lora_alpha": 8}),
        ("", {"lora_alpha": 12.5, "task_type": None, "lora_dropout": 0.1, "bias": None}),
        ("", {"base_model_name_or_path": "local/functiongemma"}),
        ("", {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
        ("", {"init_lora_weights": False, "inference_mode": False, "revision": "main"}),
        ("", {"auto_mapping": {"base_model_class": "Gemma3ForCausalLM"}, "a_key_of_tomorrow": None}),
    ],
)
def test_what_peft_saves_is_admitted(
    base: Base, tmp_path: Path, modules: str, config: dict[str, Any]
) -> None:
    directory = save(tmp_path / "lint", base, modules, **config)
    inspect(directory)
    admitted = admit(directory, base)
    assert (admitted.digest, admitted.rank) == (digest_of(directory), 8)
    assert admitted.alpha == config.get("lora_alpha", 16)
    assert admitted.bytes == sum((directory / name).stat().st_size for name in (CONFIG, WEIGHTS))


@pytest.mark.parametrize("served", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_type_is_admitted_for_every_served_type(tmp_path: Path, dtype: str, served: str) -> None:
    base = make_base(tmp_path / "base", dtype=served)
    assert admit(save(tmp_path / "lint", base, dtype=dtype), base).tensors == 28


def test_tensors_may_lie_in_any_order_and_mix_types(base: Base, tmp_path: Path) -> None:
    single, double = make_tensors(base), make_tensors(base, dtype="F32")
    mixed = {name: (double if number % 3 else single)[name] for number, name in enumerate(reversed(single))}
    write(tmp_path / "lint", make_config(), pack(mixed, lambda header: header.pop("__metadata__")))
    assert admit(tmp_path / "lint", base).tensors == 28


def test_an_odd_number_of_bytes_before_a_wider_type_does_not_hide_a_nan(base: Base, tmp_path: Path) -> None:
    tensors = make_tensors(base)
    *_, last = tensors
    _, shape, _ = tensors[last]
    # A header of a length that is no multiple of 4 moves all values to odd places in the file.
    values = bytearray(4 * shape[0] * shape[1])
    values[-4:] = struct.pack("<f", float("nan"))
    tensors[last] = ("F32", shape, bytes(values))
    for padding in ("", "x", "xx", "xxx"):
        edit = partial(set_padding, padding)
        write(tmp_path / "lint", make_config(), pack(tensors, edit))
        with pytest.raises(RefusedError, match=rf"{last}: .*NaN at \[63, 7\]"):
            admit(tmp_path / "lint", base)


def set_padding(padding: str, header: dict[str, Any]) -> None:
    header["__metadata__"]["padding"] = padding


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_value_that_is_not_finite_is_found_at_any_place(tmp_path: Path, dtype: str) -> None:
    # Larger than a chunk of the reader, so that its borders are among the places.
    base = make_base(tmp_path / "base", {"intermediate_size": 20_000})
    tensors = make_tensors(base, dtype=dtype)
    size = 4 if dtype == "F32" else 2
    write(tmp_path / "lint", make_config(), pack(tensors))
    content = (tmp_path / "lint" / WEIGHTS).read_bytes()
    start = len(content) - sum(len(values) for *_, values in tensors.values())
    count = (len(content) - start) // size
    border = weights._CHUNK // size
    places = {0, 1, border - 1, border, border + 1, 2 * border - 1, 2 * border, count // 2, count - 1}
    infinity = weights._INFINITIES[dtype]
    for place in sorted(places):
        for bits in (infinity, infinity + 1, infinity | 1 << (8 * size - 1), (1 << 8 * size) - 1):
            at = start + place * size
            changed = content[:at] + bits.to_bytes(size, "little") + content[at + size :]
            (tmp_path / "lint" / WEIGHTS).write_bytes(changed)
            with pytest.raises(RefusedError, match=r"expected finite values, found (NaN|infinity)"):
                admit(tmp_path / "lint", base)


@pytest.mark.parametrize(
    ("dtype", "served", "largest", "overflows"),
    [
        ("F32", "bfloat16", b"\xff\x7f\x7f\x7f", b"\x00\x80\x7f\x7f"),
        ("F32", "float16", struct.pack("<f", 65519.9), struct.pack("<f", 65520)),
        ("BF16", "float16", b"\x7f\x47", b"\x80\x47"),
        ("F16", "float16", b"\xff\x7b", None),
        ("BF16", "bfloat16", b"\x7f\x7f", None),
        ("F32", "float32", b"\xff\xff\x7f\x7f", None),
    ],
)
def test_a_value_is_refused_from_the_first_that_overflows_the_served_type(
    tmp_path: Path, dtype: str, served: str, largest: bytes, overflows: bytes | None
) -> None:
    base = make_base(tmp_path / "base", dtype=served)
    tensors = make_tensors(base, dtype=dtype)
    first = next(iter(tensors))  # a lora_A, which is not multiplied
    _, shape, values = tensors[first]
    for bits in (largest, overflows):
        if bits is not None:
            tensors[first] = (dtype, shape, bits + values[len(bits) :])
            write(tmp_path / "lint", make_config(), pack(tensors))
            if bits is largest:
                admit(tmp_path / "lint", base)
            else:
                with pytest.raises(RefusedError, match=f"overflows {served}"):
                    admit(tmp_path / "lint", base)


def test_a_scaling_counts_for_lora_b_alone_and_only_above_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="float16")
    tensors = make_tensors(base, dtype="F16")
    half = struct.pack("<e", 40_000)
    for name, alpha, passes in [("lora_A", 16, True), ("lora_B", 8, True), ("lora_B", 16, False)]:
        changed = dict(tensors)
        tensor = next(one for one in tensors if name in one)
        changed[tensor] = ("F16", tensors[tensor][1], half + tensors[tensor][2][2:])
        write(tmp_path / "lint", make_config(lora_alpha=alpha), pack(changed))
        if passes:
            admit(tmp_path / "lint", base)
        else:
            with pytest.raises(RefusedError, match="overflows float16"):
                admit(tmp_path / "lint", base)


def test_one_trained_value_is_enough(base: Base, tmp_path: Path) -> None:
    tensors = {
        name: (dtype, shape, bytes(len(values)))
        for name, (dtype, shape, values) in make_tensors(base).items()
    }
    *_, last_a, last_b = tensors
    for name in (last_a, last_b):
        dtype, shape, values = tensors[name]
        tensors[name] = (dtype, shape, values[:-2] + b"\x01\x80")
    write(tmp_path / "lint", make_config(), pack(tensors))
    admit(tmp_path / "lint", base)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    "kind", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.parent.parent / path.name)]
)
def test_what_is_no_file_is_refused_at_once_without_following_it(
    base: Base, tmp_path: Path, kind: Callable[[Path], None], name: str
) -> None:
    directory = save(tmp_path / "lint", base)
    (directory / name).rename(tmp_path / name)
    kind(directory / name)
    with adapter_cases.in_time(), pytest.raises(RefusedError, match=f"{name} is a link, a directory, a FIFO"):
        admit(directory, base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (partial(os.utime, times=(1, 1)), "changed while it was read"),
        (lambda file: os.truncate(file, 9), "became shorter while it was read"),
    ],
)
def test_a_file_that_changes_while_it_is_checked_is_refused(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], says: str
) -> None:
    directory = save(tmp_path / "lint", base)

    def change_and_read(file: IO[bytes], buffer: memoryview, name: str) -> None:
        change(directory / WEIGHTS)
        files.read_exactly(file, buffer, name)

    monkeypatch.setattr(weights, "read_exactly", change_and_read)
    with pytest.raises(RefusedError, match=says):
        admit(directory, base)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.group in ("shapes", "config", "file") and re.search(EARLY, f"{case.group}: {case.name}")
    ],
    ids=lambda case: case.name,
)
def test_a_controller_refuses_what_needs_no_base_in_the_same_words(case: Case, tmp_path: Path) -> None:
    attempt = case.make(tmp_path)
    assert isinstance(attempt.source, Path)
    with pytest.raises(AdapterError, match=case.says):
        inspect(attempt.source)


def test_inspect_needs_the_standard_library_alone(base: Base, tmp_path: Path) -> None:
    directory = save(tmp_path / "lint", base)
    code = (
        "import pathlib, sys; from function_gemma.adapters.admission import inspect; "
        f"inspect(pathlib.Path({str(directory)!r})); print(*sorted(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SERVER).stdout.split()
    assert not {"numpy", "regex", "huggingface_hub", "safetensors", "torch"} & set(modules)


def test_what_people_keep_beside_an_adapter_is_passed_over(base: Base, tmp_path: Path) -> None:
    directory = save(tmp_path / "lint", base)
    beside("README.md", "tokenizer.json", "training_args.bin", "optimizer.pt", "scheduler.pt")(directory)
    (directory / "checkpoint-10").mkdir()
    beside("adapter_model.bin")(directory / "checkpoint-10")
    assert [name for name, content in from_directory(directory) if list(content)] == [CONFIG, WEIGHTS]
    packed = subprocess.run(["tar", "c", "lint"], cwd=tmp_path, check=True, capture_output=True).stdout
    taken = {name: b"".join(content) for name, content in from_tar(io.BytesIO(packed))}
    assert taken == {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    inspect(directory)


@pytest.fixture
def hub_attempt(tmp_path: Path) -> Iterator[Attempt]:
    attempt = on_hub(beside("README.md", "training_args.bin"))(tmp_path)
    with adapter_cases.served(attempt, tmp_path):
        yield attempt


def test_an_adapter_comes_from_the_hub_at_its_commit_though_the_server_is_offline(
    base: Base, hub_attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter_cases.copy(hub_attempt, tmp_path)
    assert admit(tmp_path / "copy", base).digest == digest_of(tmp_path / "hub" / adapter_cases.REPOSITORY)
    assert {path.name for path in (tmp_path / "download").iterdir()} == {CONFIG, WEIGHTS, ".cache"}


def test_a_token_that_cannot_be_read_is_told_with_the_command(
    hub_attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(AdapterError, match="sudo chown 10001:10000 server/secrets/huggingface/token"):
        adapter_cases.copy(hub_attempt, tmp_path)


def test_the_base_is_what_its_config_and_the_facts_say(base: Base) -> None:
    assert base.names == (MODEL, "functiongemma", "local/functiongemma")
    assert (base.dtype, base.max_rank, base.max_cpu_loras) == ("bfloat16", 32, 16)
    shapes = {name.rsplit(".", 1)[1]: shape for name, shape in base.modules.items()}
    assert shapes == {
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 128),
        "up_proj": (64, 128),
        "down_proj": (128, 64),
    }
    assert len(base.modules) == 14
    assert FULL[0] in base.modules


def test_a_config_may_keep_its_text_model_apart_and_leave_out_what_has_a_default(tmp_path: Path) -> None:
    make_base(tmp_path)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert Base.read(tmp_path / "vllm.base").modules["model.layers.0.self_attn.k_proj"] == (64, 64)


@pytest.mark.parametrize(
    ("served", "config", "dtype"),
    [
        ("half", {}, "float16"),
        ("auto", {"dtype": "bfloat16"}, "bfloat16"),
        ("auto", {"torch_dtype": "float32"}, "float16"),
    ],
)
def test_every_name_of_a_type_is_understood(
    tmp_path: Path, served: str, config: dict[str, str], dtype: str
) -> None:
    path = tmp_path / "vllm.base"
    make_base(tmp_path)
    path.write_text(path.read_text().replace("SERVER_DTYPE=bfloat16", f"SERVER_DTYPE={served}"))
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | config))
    assert Base.read(path).dtype == dtype


def test_a_base_that_cannot_be_read_says_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_SOCKET", str(tmp_path / "vllm.sock"))
    with pytest.raises(NoAnswerError, match="docker logs vllm-gemma"):
        Base.read()
    make_base(tmp_path)
    assert Base.read().max_rank == 32
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="lacks a usable 'hidden_size'"):
        Base.read()
    (tmp_path / "config.json").unlink()
    with pytest.raises(AdapterError, match="fetches the model again"):
        Base.read()
    facts = (tmp_path / "vllm.base").read_text()
    (tmp_path / "vllm.base").write_text(facts.replace("SERVER_DTYPE=bfloat16", "SERVER_DTYPE=int4"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="set SERVER_DTYPE"):
        Base.read()
    (tmp_path / "vllm.base").write_text("SERVER_MODEL=x\n")
    with pytest.raises(AdapterError, match="docker compose restart vllm-server"):
        Base.read()


def test_a_rank_over_the_servers_is_refused_by_the_server_alone(base: Base, tmp_path: Path) -> None:
    directory = save(tmp_path / "lint", base)
    inspect(directory)
    with pytest.raises(RefusedError, match="SERVER_MAX_LORA_RANK"):
        admit(directory, replace(base, max_rank=4))
