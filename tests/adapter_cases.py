"""Every kind of wrong adapter, made by code, with what admission says of it.

`make tables` writes docs/bad-input.md from it. CASES drives the unit test of admission, the page, and whoever
sends each case to a real server.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import random
import re
import signal
import socket
import struct
import tarfile
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hub
from adapter_files import (
    MODEL,
    Tensors,
    make_base,
    make_config,
    make_tensors,
    make_values,
    pack,
    tar_of,
    write,
)
from function_gemma.adapters.admission import admit
from function_gemma.adapters.errors import AdapterError
from function_gemma.adapters.files import CONFIG, WEIGHTS
from function_gemma.adapters.source import from_directory, from_hub, from_tar
from function_gemma.adapters.store import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from function_gemma.adapters.base import Base

    Make = Callable[[Path], "Attempt"]  # makes it below an empty directory
    Row = tuple[str, Make, str] | tuple[str, Make, str, str]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bad-input.md"
TOKEN = "hf_of-the-test"
REPOSITORY = "someone/lint-lora"
SECONDS = 20  # after which an attempt counts as hanging
NOBODY = 65534
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
LONGEST = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


@dataclass(frozen=True)
class Attempt:
    """What is asked of the server."""

    source: Path | bytes | str  # a directory, a tar, or an address of the Hub
    name: str = "lint"
    meanwhile: Callable[[], object] = lambda: None  # happens when the first piece was read
    as_nobody: bool = False  # root may read everything
    token: str | None = TOKEN
    hub_answers: bool = True


@dataclass(frozen=True)
class Case:
    """A kind of wrong adapter."""

    group: str
    name: str
    make: Make
    says: str  # expression for the message
    plain: str = "not tried"  # what vLLM 0.32 alone answers


def group(name: str, *rows: Row) -> list[Case]:
    """Cases of one group."""
    return [Case(name, *row) for row in rows]


def good(area: Path) -> Path:
    """A directory with an adapter that nothing is wrong with."""
    directory = area / "lint"
    write(directory, make_config(), pack(make_tensors(make_base(area / "base"))))
    return directory


def config(**changes: object) -> Make:
    """The good adapter with another config."""
    return config_file(json.dumps(make_config(**changes)).encode())


def config_without(key: str) -> Make:
    """The good adapter without a key in its config."""
    return config_file(json.dumps({k: v for k, v in make_config().items() if k != key}).encode())


def config_file(content: bytes) -> Make:
    """The good adapter with that config, byte for byte."""

    def make(area: Path) -> Attempt:
        directory = good(area)
        (directory / CONFIG).write_bytes(content)
        return Attempt(directory)

    return make


def tensors(
    edit: Callable[[Tensors], object] = lambda _: None,
    *,
    dtype: str = "BF16",
    rank: int = 8,
    shape: Mapping[str, int] | None = None,
    **changes: object,
) -> Make:
    """The good adapter with other weights, made for a base of another shape or changed by `edit`."""

    def make(area: Path) -> Attempt:
        made = make_tensors(make_base(area / "other", shape or {}), rank=rank, dtype=dtype)
        edit(made)
        write(area / "lint", make_config(**changes), pack(made))
        return Attempt(area / "lint")

    return make


def header(edit: Callable[[dict[str, Any]], object]) -> Make:
    """The good adapter with another header over the same bytes."""

    def make(area: Path) -> Attempt:
        weights = pack(make_tensors(make_base(area / "base")), edit)
        write(area / "lint", make_config(), weights)
        return Attempt(area / "lint")

    return make


def weights_file(edit: Callable[[bytes], bytes]) -> Make:
    """The good adapter with its weights changed as bytes."""

    def make(area: Path) -> Attempt:
        directory = good(area)
        file = directory / WEIGHTS
        file.write_bytes(edit(file.read_bytes()))
        return Attempt(directory)

    return make


def directory(edit: Callable[[Path], object], *, as_nobody: bool = False) -> Make:
    """The good adapter in a directory that `edit` changes."""

    def make(area: Path) -> Attempt:
        found = good(area)
        edit(found)
        return Attempt(found, as_nobody=as_nobody)

    return make


def changing(change: Callable[[Path], object]) -> Make:
    """The good adapter whose weights change while they are copied."""

    def make(area: Path) -> Attempt:
        found = good(area)
        file = found / WEIGHTS
        return Attempt(found, meanwhile=lambda: change(file))

    return make


def tar(members: Mapping[str, bytes | tarfile.TarInfo], *, cut: int | None = None) -> Make:
    """A tar with these contents, or ready members without content."""

    def make(_: Path) -> Attempt:
        return Attempt(tar_of(members)[:cut])

    return make


def member(kind: bytes) -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def tar_with_a_huge_header(_: Path) -> Attempt:
    """A tar whose first member claims a name of a gigabyte."""
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    return Attempt(info.tobuf(tarfile.GNU_FORMAT))


def named(name: str) -> Make:
    """The good adapter under a bad name."""
    return lambda area: Attempt(good(area), name=name)


def on_hub(
    edit: Callable[[Path], object] = lambda _: None,
    *,
    address: str = "hf://{repository}@{commit}",
    token: str | None = TOKEN,
    hub_answers: bool = True,
) -> Make:
    """The good adapter in a gated repository, changed by `edit`, under an address."""

    def make(area: Path) -> Attempt:
        folder = area / "hub" / REPOSITORY
        folder.parent.mkdir(parents=True)
        good(area).rename(folder)
        edit(folder)
        commit = hub.Repository(REPOSITORY, folder).commit
        where = address.format(repository=REPOSITORY, commit=commit)
        return Attempt(where, token=token, hub_answers=hub_answers)

    return make


def put(tensor: str, place: int, bits: bytes) -> Callable[[Tensors], object]:
    """Overwrite a tensor's bytes at `place`; negative counts from its end."""

    def edit(made: Tensors) -> None:
        dtype, shape, values = made[tensor]
        start = place % len(values)
        made[tensor] = (dtype, shape, values[:start] + bits + values[start + len(bits) :])

    return edit


def reshape(shapes: dict[str, list[int]]) -> Callable[[Tensors], object]:
    """Give tensors, or new ones, these shapes and as many values."""

    def edit(made: Tensors) -> None:
        for name, shape in shapes.items():
            made[name] = ("BF16", shape, make_values("BF16", prod(shape), random.Random(5)))  # noqa: S311 (no secret)

    return edit


def zero(half: str) -> Callable[[Tensors], object]:
    """Untrain all of one half: half of the zeros are negative ones."""

    def edit(made: Tensors) -> None:
        for name, (dtype, shape, values) in made.items():
            if half in name:
                made[name] = (dtype, shape, b"\0\0\0\x80" * (len(values) // 4))

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    """Change all names of tensors."""

    def edit(made: Tensors) -> None:
        changed = {name.replace(old, new): value for name, value in made.items()}
        made.clear()
        made.update(changed)

    return edit


def drop(part: str) -> Callable[[Tensors], object]:
    """Leave out the tensors with `part` in their name."""

    def edit(made: Tensors) -> None:
        for name in [name for name in made if part in name]:
            del made[name]

    return edit


def replace_by_link(folder: Path) -> None:
    """Make the weights a link that leads out of the directory."""
    (folder / WEIGHTS).rename(folder.parent / "outside")
    (folder / WEIGHTS).symlink_to("../outside")


def replace_by_fifo(folder: Path) -> None:
    """Make the weights a FIFO that nobody writes to."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def replace_by_socket(folder: Path) -> None:
    """Make the weights a socket."""
    (folder / WEIGHTS).unlink()
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path is short
        one.bind(WEIGHTS)
        os.chdir(here)


def replace_by_directory(folder: Path) -> None:
    """Make the weights a directory."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def pickle_instead(folder: Path) -> None:
    """Have the weights as a pickle alone."""
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def enlarge(folder: Path, name: str = CONFIG, size: int = 2 << 20) -> None:
    """Make a file larger than any adapter's, with a hole."""
    os.truncate(folder / name, size)


def entry(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Change the first tensor's entry in the header."""
    return lambda head: head[FIRST].update(changes)


def beside(*names: str) -> Callable[[Path], object]:
    """Put empty files beside the adapter."""

    def edit(folder: Path) -> None:
        for name in names:
            os.mknod(folder / name)

    return edit


NAN, INF, MINUS_INF = b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"  # in BF16
NESTED = b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TEXT = json.dumps(make_config())
SAYS_EMPTY = "is .*, expected it empty: "

CASES = [
    *group(
        "values",
        ("lora_alpha 0", config(lora_alpha=0), "lora_alpha is 0, expected a number above 0", "200"),
        (
            "lora_alpha negative",
            config(lora_alpha=-16),
            "lora_alpha is -16, expected a number above 0",
            "200",
        ),
        ("lora_alpha NaN", config(lora_alpha=float("nan")), "NaN is no JSON number", "200"),
        ("lora_alpha Infinity", config(lora_alpha=float("inf")), "Infinity is no JSON number"),
        (
            "lora_alpha 1e999",
            config_file(TEXT.replace("16,", "1e999,", 1).encode()),
            "lora_alpha is inf, expected",
        ),
        (
            "lora_alpha 1e30",
            config(lora_alpha=1e30),
            r"lora_alpha is 1e\+30, expected .* at most 51200",
            "200",
        ),
        ("lora_alpha with 4,000 digits", config(lora_alpha=10**4000), "lora_alpha is 1000.*at most 51200"),
        ("scaling of 150", config(lora_alpha=1200), "scaling of 150, expected 0.001 to 100"),
        ("scaling of almost nothing", config(lora_alpha=1e-6), "scaling of 1.25e-07, expected 0.001 to 100"),
        ("scaling of 283 by rsLoRA", config(lora_alpha=800, use_rslora=True), "scaling of 283, expected"),
        ("NaN in the last bytes", tensors(put(LAST, -2, NAN)), rf"{LAST}: .*NaN at \[63, 7\]", "200"),
        (
            "infinity in the last bytes",
            tensors(put(LAST, -2, INF)),
            rf"{LAST}: .*infinity at \[63, 7\]",
            "200",
        ),
        (
            "minus infinity in the first bytes",
            tensors(put(FIRST, 0, MINUS_INF)),
            rf"{FIRST}: .*infinity at \[0, 0\]",
            "200",
        ),
        ("NaN in F16", tensors(put(LAST, 4, b"\x00\x7e"), dtype="F16"), r"NaN at \[0, 2\]", "200"),
        ("NaN in F32", tensors(put(LAST, 8, b"\x00\x00\xc0\xff"), dtype="F32"), r"NaN at \[0, 2\]", "200"),
        (
            "F32 that overflows bfloat16",
            tensors(put(LONGEST, -4, b"\xff\xff\x7f\x7f"), dtype="F32"),
            r"3\.403e\+38 at \[7, 127\], which overflows bfloat16",
            "200",
        ),
        (
            "lora_B that overflows with the scaling",
            tensors(put(LAST, 0, b"\x7f\x7f")),
            r"which overflows bfloat16",
        ),
        ("all zero", tensors(zero("lora_")), "every lora_B is all zero, expected trained weights", "200"),
        ("every lora_B zero", tensors(zero("lora_B")), "every lora_B is all zero, expected trained weights"),
        ("every lora_A zero", tensors(zero("lora_A")), "every lora_A is all zero, expected trained weights"),
    ),
    *group(
        "shapes",
        (
            "fewer layers",
            tensors(drop("layers.1.")),
            r"layers\.1\.self_attn\.q_proj.*expected by target_modules",
            "200",
        ),
        (
            "extra layers",
            tensors(shape={"num_hidden_layers": 3}),
            r"layers\.2\..*expected a module of the base",
            "200",
        ),
        (
            "smaller dimensions",
            tensors(shape={"hidden_size": 32}),
            r"expected \[8, 64\] .* found \[8, 32\]",
            "200",
        ),
        (
            "larger dimensions",
            tensors(shape={"hidden_size": 128}),
            r"expected \[8, 64\] .* found \[8, 128\]",
            "refused",
        ),
        (
            "one tensor larger",
            tensors(reshape({LONGEST: [8, 256]})),
            rf"{LONGEST}: expected \[8, 128\]",
        ),
        (
            "another rank in one layer",
            tensors(reshape({LONGEST: [4, 128], LAST: [64, 4]})),
            rf"{LONGEST}: expected rank 8 .*found 4",
            "200",
        ),
        (
            "another rank in lora_A alone",
            tensors(reshape({FIRST: [4, 64]})),
            rf"{FIRST}: expected rank 8 .*found 4",
            "200",
        ),
        ("another rank than r in the whole file", tensors(rank=4), "expected rank 8 .*found 4", "200"),
        ("half a pair missing, lora_B", tensors(drop(LAST)), rf"{LAST}: expected beside .*, found nothing"),
        ("half a pair missing, lora_A", tensors(drop(FIRST)), rf"{FIRST}: expected beside .*, found nothing"),
        ("transposed", tensors(reshape({FIRST: [64, 8]})), "expected rank 8 .*found 64"),
        ("one dimension", header(entry(shape=[512])), r"two dimensions, found \[512\]"),
        ("three dimensions", header(entry(shape=[8, 8, 8])), "two dimensions, found"),
        ("a dimension of 0", header(entry(shape=[0, 64])), r"found \[0, 64\]"),
        ("negative dimensions", header(entry(shape=[-8, -64])), r"found \[-8, -64\]"),
        (
            "wrong prefix",
            tensors(rename("model.model.layers", "model.layers")),
            "expected a module of the base.*found 'layers.0",
            "200",
        ),
        (
            "no prefix",
            tensors(rename("base_model.model.", "")),
            "is no LoRA tensor, expected base_model.model",
        ),
        (
            "the adapter's name in the tensors' names",
            tensors(rename(".weight", ".default.weight")),
            "is no LoRA tensor",
        ),
        (
            "a tensor of embed_tokens",
            tensors(reshape({"base_model.model.model.embed_tokens.lora_embedding_A": [8, 64]})),
            "embed_tokens.lora_embedding_A' is no LoRA tensor",
        ),
        (
            "a magnitude of DoRA",
            tensors(reshape({"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": [128, 1]})),
            "lora_magnitude_vector' is no LoRA tensor",
        ),
        (
            "a whole module",
            tensors(reshape({"base_model.model.lm_head.weight": [64, 64]})),
            "lm_head.weight' is no LoRA tensor",
        ),
    ),
    *group(
        "config",
        (
            "another base",
            config(base_model_name_or_path="google/gemma-3-1b-it"),
            f"expected {MODEL} or .*SERVER_MODEL_ALIASES",
            "200",
        ),
        ("no base", config(base_model_name_or_path=None), "base_model_name_or_path is None"),
        ("fan_in_fan_out", config(fan_in_fan_out=True), f"fan_in_fan_out {SAYS_EMPTY}", "200"),
        ("layers_to_transform", config(layers_to_transform=[0]), f"layers_to_transform {SAYS_EMPTY}", "200"),
        ("layers_pattern", config(layers_pattern="layers"), f"layers_pattern {SAYS_EMPTY}"),
        (
            "trainable_token_indices",
            config(trainable_token_indices=[1]),
            f"trainable_token_indices {SAYS_EMPTY}",
            "200",
        ),
        ("rank_pattern", config(rank_pattern={"q_proj": 4}), f"rank_pattern {SAYS_EMPTY}", "200"),
        ("alpha_pattern", config(alpha_pattern={"q_proj": 4}), f"alpha_pattern {SAYS_EMPTY}"),
        ("target_modules null", config(target_modules=None), "target_modules is None", "200"),
        ("target_modules empty", config(target_modules=[]), r"target_modules is \[\]"),
        ("target_modules a number", config(target_modules=7), "target_modules is 7"),
        (
            "target_modules with a number",
            config(target_modules=["q_proj", 7]),
            r"target_modules is \['q_proj', 7\]",
        ),
        (
            "target_modules too few",
            config(target_modules=["q_proj", "v_proj"]),
            "expected only what target_modules",
            "200",
        ),
        (
            "target_modules matching nothing",
            config(target_modules=["query_key_value"]),
            "target_modules names 'query_key_value'",
            "200",
        ),
        (
            "target_modules with one too many",
            config(
                target_modules=[*"down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split(), "lm_head"]
            ),
            "target_modules names 'lm_head'",
        ),
        (
            "target_modules with embed_tokens",
            config(target_modules=["q_proj", "embed_tokens"]),
            "names 'embed_tokens'",
            "refused",
        ),
        (
            "target_modules for modules without weights",
            tensors(drop("v_proj")),
            "v_proj.*expected by target_modules .*, found nothing",
        ),
        ("an expression that matches nothing", config(target_modules=r".*\.query"), "matches no module"),
        (
            "an expression that matches too few",
            config(target_modules=r".*\.[qv]_proj"),
            "expected only what target_modules",
        ),
        ("an expression that does not compile", config(target_modules="(q_proj"), "does not compile"),
        ("an expression that never ends", config(target_modules=r"(?:.|.)*(?=y)"), "takes longer than 1 s"),
        (
            "an expression of 2,000 characters",
            config(target_modules="a" * 2000),
            "has 2000 characters, expected at most 1000",
        ),
        ("DoRA", config(use_dora=True), f"use_dora {SAYS_EMPTY}", "refused"),
        ("IA3", config(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'", "200"),
        ("no peft_type", config_without("peft_type"), "peft_type is None, expected 'LORA'"),
        ("SEQ_CLS", config(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS', expected 'CAUSAL_LM'", "200"),
        ("bias", config(bias="lora_only"), f"bias {SAYS_EMPTY}"),
        ("lora_bias", config(lora_bias=True), f"lora_bias {SAYS_EMPTY}"),
        ("modules_to_save", config(modules_to_save=["score"]), f"modules_to_save {SAYS_EMPTY}", "200"),
        ("exclude_modules", config(exclude_modules=["q_proj"]), f"exclude_modules {SAYS_EMPTY}"),
        ("target_parameters", config(target_parameters=["mlp.weight"]), f"target_parameters {SAYS_EMPTY}"),
        (
            "alora_invocation_tokens",
            config(alora_invocation_tokens=[1, 2]),
            f"alora_invocation_tokens {SAYS_EMPTY}",
        ),
        ("layer_replication", config(layer_replication=[[0, 1]]), f"layer_replication {SAYS_EMPTY}"),
        ("PiSSA", config(init_lora_weights="pissa_niter_16"), "init_lora_weights is 'pissa_niter_16'"),
        ("OLoRA", config(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
        ("LoftQ", config(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
        (
            "a key that nobody knows",
            config(use_tomorrows_lora=True),
            "'use_tomorrows_lora' is True, expected no key",
        ),
        ("use_rslora as text", config(use_rslora="false"), "use_rslora is 'false', expected true or false"),
        (
            "a harmless key of another type",
            config(lora_dropout="none"),
            "lora_dropout is 'none', expected int or float",
        ),
        (
            "duplicated keys",
            config_file(TEXT.replace('"r": 8', '"r": 64, "r": 8').encode()),
            "the key 'r' stands twice",
            "200",
        ),
        ("r as text", config(r="8"), "r is '8', expected a whole number"),
        ("r as boolean", config(r=True), "r is True, expected a whole number"),
        ("r as fraction", config(r=8.0), "r is 8.0, expected a whole number"),
        ("r 0", config(r=0), "r is 0, expected a whole number"),
        ("r negative", config(r=-8), "r is -8, expected a whole number"),
        (
            "r over the server's",
            config(r=64),
            "r is 64, expected at most 32: .*SERVER_MAX_LORA_RANK",
            "refused",
        ),
        ("no r", config_without("r"), "r is None, expected a whole number"),
        ("no lora_alpha", config_without("lora_alpha"), "lora_alpha is None"),
        ("lora_alpha as text", config(lora_alpha="16"), "lora_alpha is '16'"),
        ("lora_alpha as boolean", config(lora_alpha=True), "lora_alpha is True"),
    ),
    *group(
        "file",
        ("config empty", config_file(b""), f"{CONFIG} is not JSON"),
        ("config cut off", config_file(TEXT[:-1].encode()), f"{CONFIG} is not JSON"),
        ("config a list", config_file(b"[]"), r"holds \[\], expected an object"),
        (
            "config not UTF-8",
            config_file(TEXT.replace("lora_alpha", "lora\xe4lpha").encode("latin-1")),
            f"{CONFIG} is not UTF-8",
        ),
        ("config in UTF-16", config_file(TEXT.encode("utf-16")), f"{CONFIG} is not UTF-8"),
        ("config nested 100,000 deep", config_file(NESTED), f"{CONFIG} nests deeper"),
        ("config of 2 MiB", directory(enlarge), f"{CONFIG} has 2097152 bytes, expected at most 1048576"),
        ("config missing", directory(lambda folder: (folder / CONFIG).unlink()), f"no {CONFIG}"),
        ("weights missing", directory(lambda folder: (folder / WEIGHTS).unlink()), f"no {WEIGHTS}"),
        ("weights empty", weights_file(lambda _: b""), "has 0 bytes, expected at least 8", "refused"),
        ("weights cut off", weights_file(lambda content: content[:-1]), "it is cut off", "refused"),
        (
            "weights cut off in the header",
            weights_file(lambda content: content[:1000]),
            "says that its header has",
            "refused",
        ),
        (
            "weights with something after them",
            weights_file(lambda content: content + b"\0"),
            "something was added",
        ),
        (
            "weights of 5 GiB",
            directory(lambda folder: enlarge(folder, WEIGHTS, 5 << 30)),
            "expected at most 4294967296",
        ),
        (
            "header larger than the file",
            weights_file(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]),
            "says that its header has 9223372036854775807 bytes",
            "refused",
        ),
        (
            "header no JSON",
            weights_file(lambda content: content[:8] + b"\0" + content[9:]),
            "the header of .* is not JSON",
            "refused",
        ),
        (
            "header with a key twice",
            weights_file(lambda content: content.replace(b".1.mlp.up_proj.lora_A", b".0.mlp.up_proj.lora_A")),
            "stands twice",
        ),
        ("header without tensors", weights_file(lambda _: struct.pack("<Q", 2) + b"{}"), "holds no tensor"),
        (
            "metadata that is no text",
            header(lambda head: head.update(__metadata__={"format": 1})),
            "__metadata__ .*expected text only",
        ),
        ("offsets that overlap", header(entry(data_offsets=[2, 1026])), "begins at byte 2, expected 0"),
        ("offsets of another size", header(entry(data_offsets=[0, 1000])), "expected 1024 bytes for BF16"),
        ("offsets backwards", header(entry(data_offsets=[1024, 0])), "expected 1024 bytes for BF16"),
        ("offsets as text", header(entry(data_offsets=["0", "1024"])), "expected two offsets"),
        (
            "an entry without offsets",
            header(lambda head: head[FIRST].pop("data_offsets")),
            "expected dtype, shape, data_offsets",
        ),
        ("an entry with something more", header(entry(scale=2)), "expected dtype, shape, data_offsets"),
        ("dtype a list", header(entry(dtype=["BF16"])), "expected F32, F16 or BF16"),
        *(
            (f"dtype {dtype}", header(entry(dtype=dtype)), f"BF16, found '{dtype}'", "200")
            for dtype in ["I8", "BOOL", "F8_E4M3"]
        ),
        *(
            (f"dtype {dtype}", header(entry(dtype=dtype)), f"BF16, found '{dtype}'")
            for dtype in ["F64", "I64"]
        ),
        ("a pickle instead", directory(pickle_instead), "adapter_model.bin is a pickle", "200"),
        *(
            (f"a pickle beside, {name}", directory(beside(name)), f"{name} is a pickle")
            for name in ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"]
        ),
        ("a link that leads out", directory(replace_by_link), f"'{WEIGHTS}' in .* is a link or a device"),
        (
            "a link beside",
            directory(lambda folder: (folder / "README.md").symlink_to("/etc/passwd")),
            "'README.md' in .* is a link",
        ),
        ("a FIFO", directory(replace_by_fifo), f"'{WEIGHTS}' in .* is a link or a device"),
        ("a socket", directory(replace_by_socket), f"'{WEIGHTS}' in .* is a link or a device"),
        ("a directory as weights", directory(replace_by_directory), f"{WEIGHTS} is a link, a directory"),
        ("10,000 files", directory(beside(*map(str, range(10_000)))), "holds over 1000 files"),
        (
            "no permission for the weights",
            directory(lambda folder: (folder / WEIGHTS).chmod(0), as_nobody=True),
            f"{WEIGHTS} cannot be read",
        ),
        (
            "no permission for the directory",
            directory(lambda folder: folder.chmod(0o711), as_nobody=True),
            "cannot be read .*chmod -R",
        ),
        (
            "changing while it is read",
            changing(lambda file: os.utime(file, (1, 1))),
            "changed while it was read",
        ),
        (
            "growing while it is read",
            changing(lambda file: os.truncate(file, 1 << 20)),
            "changed while it was read",
        ),
        (
            "shrinking while it is read",
            changing(lambda file: os.truncate(file, 9)),
            "changed while it was read",
        ),
        ("tar: nothing", tar({}, cut=0), "no whole tar"),
        ("tar: something else", lambda _: Attempt(b"not a tar" * 100), "no whole tar"),
        ("tar: cut off", tar({f"lint/{WEIGHTS}": b"x" * 9999}, cut=4000), "no whole tar"),
        *(
            (f"tar: {what}", tar({f"lint/{CONFIG}": member(kind)}), "a link or a device")
            for what, kind in [
                ("a symbolic link", tarfile.SYMTYPE),
                ("a hard link", tarfile.LNKTYPE),
                ("a device", tarfile.CHRTYPE),
                ("a FIFO", tarfile.FIFOTYPE),
            ]
        ),
        ("tar: a path with ..", tar({f"../{CONFIG}": b""}), "leads out of it"),
        ("tar: a path with .. inside", tar({"lint/../../x": b""}), "leads out of it"),
        ("tar: an absolute path", tar({f"/lint/{CONFIG}": b""}), "leads out of it"),
        (
            "tar: two adapters",
            tar({f"lint/{CONFIG}": b"", f"docstring/{WEIGHTS}": b""}),
            "pack the directory of one adapter",
        ),
        (
            "tar: one adapter in another",
            tar({CONFIG: b"", f"other/{CONFIG}": b""}),
            "pack the directory of one adapter",
        ),
        (
            "tar: a file twice",
            tar({f"lint/{CONFIG}": b"", f"./lint/{CONFIG}": b""}),
            "pack the directory of one adapter",
        ),
        (
            "tar: a pickle beside",
            tar({f"lint/{CONFIG}": b"", "lint/adapter_model.bin": b""}),
            "adapter_model.bin is a pickle",
        ),
        ("tar: 1,001 files", tar({f"x{number}": b"" for number in range(1001)}), "over 1000 files"),
        ("tar: a config of 2 MiB", tar({CONFIG: bytes(2 << 20)}), "expected at most 1048576"),
        ("tar: a name of 1 GiB", tar_with_a_huge_header, "header of 1073741824 bytes"),
    ),
    *group(
        "names",
        *(
            (what, named(name), "cannot name an adapter")
            for what, name in [
                ("with a /", "a/b"),
                ("with an @", "lint@0123456789ab"),
                ("..", ".."),
                ("that begins with a dot", ".staging"),
                ("that begins with -", "-lint"),
                ("with a space", "a b"),
                ("with a newline", "lint\n"),
                ("with capitals", "Lint"),
                ("in another alphabet", "\u043bint"),
                ("with a digit of another alphabet", "lint\u0663"),
                ("of 256 bytes", "a" * 256),
                ("empty", ""),
            ]
        ),
        ("the base's own", named(MODEL), "cannot name an adapter", "refused"),
    ),
    *group(
        "hub",
        ("no commit", on_hub(address="hf://{repository}"), "write hf://ORG/REPO@COMMIT"),
        ("a branch", on_hub(address="hf://{repository}@main"), "write hf://ORG/REPO@COMMIT"),
        ("half a commit", on_hub(address="hf://{repository}@0123456"), "write hf://ORG/REPO@COMMIT"),
        ("a path out", on_hub(address="hf://../..@{commit}"), "write hf://ORG/REPO@COMMIT"),
        ("wrong commit", on_hub(address="hf://{repository}@" + "0" * 40), "has no commit 0000"),
        (
            "missing repository",
            on_hub(address="hf://someone/else@{commit}"),
            "is private, gated or not there|is not on the Hub",
        ),
        ("missing token", on_hub(token=None), "there is no token: .*server/secrets/huggingface/token"),
        ("another's token", on_hub(token="hf_of-another"), "the token may not read it: .*server_hf_token"),
        ("a pickle in the repository", on_hub(beside("adapter_model.bin")), "is a pickle"),
        (
            "no weights in the repository",
            on_hub(lambda folder: (folder / WEIGHTS).unlink()),
            f"holds no {WEIGHTS} at",
        ),
        ("a config of 2 MiB in the repository", on_hub(enlarge), "expected at most 1048576"),
        ("1,001 files in the repository", on_hub(beside(*map(str, range(1001)))), "over 1000 files"),
        ("a hub that does not answer", on_hub(hub_answers=False), "did not give someone/lint-lora"),
    ),
]


@cache
def refusal(case: Case) -> str:
    """Make the case, attempt it as the manager does, and return what that says.

    Raises AssertionError where it is admitted, HangingError where it takes longer than SECONDS.
    """
    with tempfile.TemporaryDirectory() as folder:
        area = Path(folder)
        attempt = case.make(area)
        base = make_base(area / "base")
        if attempt.as_nobody and os.geteuid() == 0:
            message = _as_nobody(lambda: _attempt(attempt, area, base), area)
        else:
            message = _attempt(attempt, area, base)
        return message.replace(str(area), "…")


def _attempt(attempt: Attempt, area: Path, base: Base) -> str:
    with in_time(), served(attempt, area):
        try:
            check_name(attempt.name)
            copy(attempt, area)
            admit(area / "copy", base)
        except AdapterError as error:
            return str(error)
    raise AssertionError("it was admitted")


def copy(attempt: Attempt, area: Path) -> None:
    """Copy what is attempted to area/copy."""
    if isinstance(attempt.source, bytes):
        files = from_tar(BytesIO(attempt.source))
    elif isinstance(attempt.source, str):
        files = from_hub(attempt.source, area / "download")
    else:
        files = from_directory(attempt.source)
    (area / "copy").mkdir(exist_ok=True)
    for name, content in files:
        with (area / "copy" / name).open("wb") as file:
            for chunk in content:
                file.write(chunk)
                if name == WEIGHTS:
                    attempt.meanwhile()


class HangingError(BaseException):
    """It takes too long; no code takes this for an error of its own."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """End what hangs with HangingError after SECONDS."""

    def end(_: int, __: FrameType | None) -> None:
        raise HangingError(f"{SECONDS} s are over")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def served(attempt: Attempt, area: Path) -> Iterator[None]:
    """Where the source is on the Hub: serve it, with the token and the endpoint where they are looked for."""
    if not isinstance(attempt.source, str):
        yield
        return
    if attempt.token:
        (area / "token").write_text(attempt.token)
    with hub.serve(area / "hub", TOKEN, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        changed = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port if attempt.hub_answers else 1}",
            "HF_TOKEN_PATH": str(area / "token"),
        }
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            server.shutdown()
            thread.join()


def _as_nobody(work: Callable[[], str], area: Path) -> str:
    """Run `work` in a child without root's rights; return what it returns."""
    area.chmod(0o755)
    (area / "copy").mkdir()
    os.chown(area / "copy", NOBODY, NOBODY)
    answer, says = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(says, work().encode())
        except BaseException as error:  # the child ends here, and says of what
            os.write(says, repr(error).encode())
        finally:
            os._exit(0)
    os.close(says)
    with os.fdopen(answer, "rb") as stream:
        message = stream.read().decode()
    os.waitpid(child, 0)
    return message


HEAD = """\
# What is refused, and what it says

Written by `make tables` from tests/adapter_cases.py: each case is made, goes the way of a load, and is
answered by the real code. None reaches the GPU. "Plain vLLM" is what vLLM 0.32 alone answers: 200 means that
it serves the adapter, with wrong answers.
"""


def page() -> str:
    """The page, with what each case says now."""
    lines = [HEAD]
    for name in dict.fromkeys(case.group for case in CASES):
        lines += [f"## {name.capitalize()}", "", "| case | plain vLLM | here |", "|---|---|---|"]
        lines += [
            f"| {cell(case.name)} | {case.plain} | {cell(refusal(case))} |"
            for case in CASES
            if case.group == name
        ]
        lines.append("")
    accepted = sum(case.plain == "200" for case in CASES)
    lines.append(f"{len(CASES)} cases, of which plain vLLM is known to accept {accepted}.")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text for a table: without what only one machine or one run has."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", "http://hub", re.sub(r"\buid \d+", "uid N", text))
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", "\\n")


if __name__ == "__main__":
    PAGE.write_text(page())
