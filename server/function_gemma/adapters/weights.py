"""adapter_model.safetensors, strictly read: its header, then every value in the one pass that hashes it.

The format: 8 bytes (little-endian) give the header's length, a JSON object of that length says where each
tensor lies in the bytes that follow.
"""

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .base import Base
from .config import Config
from .errors import RefusedError
from .files import CONFIG, WEIGHTS, parse_object, read_exactly, show

if TYPE_CHECKING:
    import numpy as np

_HEADER_LIMIT = 16 << 20  # bytes; an adapter's takes some 130 for a tensor
_CHUNK = 256 << 10  # bytes; fits the processor's cache, so that hashing finds it there after the check
_NAME = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<half>[AB])\.weight")
_FORM = "base_model.model.<module>.lora_A.weight and lora_B.weight"

_COUNTS = 1 << 63  # more than any file has bytes
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of one value
_INFINITIES = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # their bits; NaN lies above
# Where a value becomes infinite when it is rounded to a type.
_OVERFLOWS = {"bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0, "float32": 2.0**128}

_SAVE = "save it with peft's save_pretrained()"


class Tensor(NamedTuple):
    """One half of a LoRA pair."""

    name: str
    module: str  # full name in the base
    half: str  # A, [rank, inputs], or B, [outputs, rank]
    dtype: str
    shape: tuple[int, int]
    begin: int  # in bytes after the header
    end: int

    @property
    def rank(self) -> int:
        """Rank by its shape."""
        return self.shape[0 if self.half == "A" else 1]


@dataclass(frozen=True)
class Header:
    """The file's beginning."""

    content: bytes  # with the length before it
    tensors: tuple[Tensor, ...]  # in the order of their bytes, which they share out


def read_header(file: IO[bytes], size: int) -> Header:
    """Read the header of `file`, which has `size` bytes, by all rules of the format and of LoRA's names."""
    if size < 8:
        raise RefusedError(f"{WEIGHTS} has {size} bytes, expected at least 8: it is cut off; copy it again")
    start = _read(file, 8)
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, _HEADER_LIMIT):
        raise RefusedError(
            f"{WEIGHTS} says that its header has {length} bytes, expected at most "
            f"{min(size - 8, _HEADER_LIMIT)}: it is cut off or no safetensors file; {_SAVE}"
        )
    content = _read(file, length)
    entries = parse_object(content, f"the header of {WEIGHTS}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RefusedError(f"__metadata__ of {WEIGHTS} is {show(metadata)}, expected text only: {_SAVE}")
    if not entries:
        raise RefusedError(f"{WEIGHTS} holds no tensor, expected {_FORM}: {_SAVE}")
    tensors = sorted((_tensor(name, entry) for name, entry in entries.items()), key=lambda one: one.begin)
    place = 0
    for tensor in tensors:
        if tensor.begin != place:
            raise RefusedError(
                f"{tensor.name}: begins at byte {tensor.begin}, expected {place}, where the one before it "
                f"ends: {_SAVE}"
            )
        place = tensor.end
    if place != size - 8 - length:
        raise RefusedError(
            f"{WEIGHTS} has {size - 8 - length} bytes after its header, expected {place}, where "
            f"{tensors[-1].name} ends: it is cut off or something was added; copy it again"
        )
    return Header(start + content, tuple(tensors))


def check_pairs(tensors: Iterable[Tensor], rank: int) -> None:
    """Refuse half a pair, and a tensor whose rank is not `rank`."""
    halves = {(tensor.module, tensor.half) for tensor in tensors}
    for tensor in tensors:
        other = "B" if tensor.half == "A" else "A"
        if (tensor.module, other) not in halves:
            raise RefusedError(
                f"base_model.model.{tensor.module}.lora_{other}.weight: expected beside {tensor.name}, found "
                f"nothing: {_SAVE}"
            )
        if tensor.rank != rank:
            raise RefusedError(
                f"{tensor.name}: expected rank {rank} (r in {CONFIG}), found {tensor.rank} in "
                f"{list(tensor.shape)}: vLLM takes one rank for all; train without rank_pattern, or correct r"
            )


def check_modules(tensors: Iterable[Tensor], base: Base, targets: set[str]) -> None:
    """Refuse any but the tensors of `targets`, full names of the base's modules, in the base's dimensions."""
    missing = dict.fromkeys(module for module in base.modules if module in targets)
    for tensor in tensors:
        if tensor.module not in base.modules:
            names = list(base.modules)
            raise RefusedError(
                f"{tensor.name}: expected a module of the base, {names[0]} to {names[-1]}, found "
                f"{show(tensor.module)}: train on the served base and {_SAVE}"
            )
        if tensor.module not in targets:
            raise RefusedError(
                f"{tensor.name}: expected only what target_modules in {CONFIG} names, found "
                f"{tensor.module}: add it to target_modules, if it was trained"
            )
        inputs, outputs = base.modules[tensor.module]
        expected = (tensor.rank, inputs) if tensor.half == "A" else (outputs, tensor.rank)
        if tensor.shape != expected:
            raise RefusedError(
                f"{tensor.name}: expected {list(expected)} by the base's config.json, found "
                f"{list(tensor.shape)}: train on the served base"
            )
        missing.pop(tensor.module, None)
    for module in missing:
        raise RefusedError(
            f"base_model.model.{module}.lora_A.weight: expected by target_modules in {CONFIG}, found "
            "nothing: train every layer of the served base, or correct target_modules"
        )


def check_values(file: IO[bytes], header: Header, config: Config, dtype: str) -> str:
    """Read the values, from where `read_header` stopped, once; return the sha256 (hex) of the whole file.

    Refuses a value that is not finite, or not after it was converted to `dtype` and multiplied with the
    scaling (of lora_B), as vLLM does; and weights that were never trained, lora_A or lora_B all zero.
    """
    import numpy as np  # noqa: PLC0415 (a tenth of a second, which no other command should take)

    sha256 = hashlib.sha256(header.content)
    buffer = memoryview(bytearray(_CHUNK))
    untrained = {"A", "B"}  # halves of which no value but zero was seen yet
    for run in _runs(header.tensors):
        unsigned, signed = (np.uint32, np.int32) if run[0].dtype == "F32" else (np.uint16, np.int16)
        limits = {half: _limit(run[0].dtype, dtype, config.scaling if half == "B" else 1) for half in "AB"}
        lowest = min(limits.values())
        sign = 1 << (8 * _SIZES[run[0].dtype] - 1)
        for begin in range(run[0].begin, run[-1].end, _CHUNK):
            chunk = buffer[: min(_CHUNK, run[-1].end - begin)]
            read_exactly(file, chunk, WEIGHTS)
            sha256.update(chunk)
            # A value's bits without its sign grow with its magnitude: two maxima tell of both signs.
            bits = np.frombuffer(chunk, unsigned)
            if np.frombuffer(chunk, signed).max() >= lowest or bits.max() >= sign + lowest:
                for tensor, first, values in _within(run, begin, bits):
                    _check_magnitudes(tensor, first, values & (sign - 1), limits[tensor.half], dtype)
            if untrained:
                for tensor, _, values in _within(run, begin, bits):
                    if tensor.half in untrained and (values & (sign - 1)).any():
                        untrained.discard(tensor.half)
    for half in sorted(untrained, reverse=True):
        raise RefusedError(
            f"{WEIGHTS}: every lora_{half} is all zero, expected trained weights: it would change no answer; "
            f"train it, then {_SAVE}"
        )
    return sha256.hexdigest()


def _read(file: IO[bytes], count: int) -> bytes:
    content = bytearray(count)
    read_exactly(file, memoryview(content), WEIGHTS)
    return bytes(content)


def _tensor(name: str, entry: Any) -> Tensor:  # noqa: ANN401 (whatever stands in the JSON)
    match = _NAME.fullmatch(name)
    if not match:
        raise RefusedError(f"{show(name)} is no LoRA tensor, expected {_FORM} only: {_SAVE}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise RefusedError(f"{show(name)} has {show(entry)}, expected dtype, shape, data_offsets: {_SAVE}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise RefusedError(
            f"{name}: expected F32, F16 or BF16, found {show(dtype)}: vLLM would take its bytes for numbers; "
            "save it unquantised"
        )
    if not _are_two_counts(shape) or 0 in shape:
        raise RefusedError(f"{name}: expected a shape of two dimensions, found {show(shape)}: {_SAVE}")
    if not _are_two_counts(offsets):
        raise RefusedError(f"{name}: expected two offsets in bytes, found {show(offsets)}: {_SAVE}")
    begin, end = offsets
    if end - begin != (size := shape[0] * shape[1] * _SIZES[dtype]):
        raise RefusedError(
            f"{name}: expected {size} bytes for {dtype} {shape}, found offsets {show(offsets)}: {_SAVE}"
        )
    return Tensor(name, match["module"], match["half"], dtype, (shape[0], shape[1]), begin, end)


def _are_two_counts(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    one, two = value
    return type(one) is type(two) is int and 0 <= one < _COUNTS and 0 <= two < _COUNTS


def _runs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Split the file where the type of values changes: from there on they lie at another alignment."""
    run: list[Tensor] = []
    for tensor in tensors:
        if run and tensor.dtype != run[0].dtype:
            yield run
            run = []
        run.append(tensor)
    yield run


def _limit(dtype: str, served: str, scale: float) -> int:
    """Return the least bits without sign, of type `dtype`, that are not finite once served."""
    value = _OVERFLOWS[served]
    if scale > 1:
        value = value / scale * (1 - 2.0**-7)  # rounding may lift a value by 2^-9 before it is multiplied
    try:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
    except OverflowError:
        return _INFINITIES[dtype]
    if dtype == "F32":
        return int(bits)
    if dtype == "BF16":
        return int(bits + 0xFFFF) >> 16
    try:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    except OverflowError:
        return _INFINITIES[dtype]


def _within(
    run: list[Tensor], begin: int, bits: "np.ndarray[Any, Any]"
) -> Iterator[tuple[Tensor, int, "np.ndarray[Any, Any]"]]:
    """Yield the tensors in a chunk that begins at byte `begin`: each, its first value's place, its values."""
    size = bits.itemsize
    for tensor in run:
        if tensor.end > begin and tensor.begin < begin + bits.nbytes:
            first = max(tensor.begin, begin)
            last = min(tensor.end, begin + bits.nbytes)
            yield (
                tensor,
                (first - tensor.begin) // size,
                bits[(first - begin) // size : (last - begin) // size],
            )


def _check_magnitudes(
    tensor: Tensor, first: int, magnitudes: "np.ndarray[Any, Any]", limit: int, dtype: str
) -> None:
    over = (magnitudes >= limit).nonzero()[0]
    if not len(over):
        return
    row, column = divmod(first + int(over[0]), tensor.shape[1])
    bits = int(magnitudes[over[0]])
    place = f"{tensor.name}: expected finite values, found"
    infinity = _INFINITIES[tensor.dtype]
    if bits >= infinity:
        kind = "NaN" if bits > infinity else "infinity"
        raise RefusedError(f"{place} {kind} at [{row}, {column}]: save a checkpoint from before it diverged")
    if tensor.dtype == "F16":
        (value,) = struct.unpack("<e", struct.pack("<H", bits))
    else:
        (value,) = struct.unpack("<f", struct.pack("<I", bits << 16 if tensor.dtype == "BF16" else bits))
    raise RefusedError(
        f"{place} {value:.4g} at [{row}, {column}], which overflows {dtype}, the served type: save a "
        "checkpoint from before it diverged"
    )
