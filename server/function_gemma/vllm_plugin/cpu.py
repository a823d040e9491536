"""What vLLM's CPU backend computes wrongly while adapters are loaded, set right in the engine's process.

A token of the base model has the slot -1 among those of the adapters, which the operations in PyTorch take
for the last one: once that has an adapter, the base model answers as it (vLLM 0.32; a GPU's kernels know -1).
"""

import importlib
from collections.abc import Callable
from typing import Protocol, cast


class Tensor(Protocol):
    """What is used of PyTorch's tensors."""

    def __lt__(self, other: int, /) -> "Tensor":
        """Tell for each element whether it is less."""

    def unsqueeze(self, dim: int, /) -> "Tensor":
        """Return it with one more dimension."""

    def repeat_interleave(self, repeats: "Tensor", /) -> "Tensor":
        """Return each element as often as `repeats` says."""

    def masked_fill_(self, mask: "Tensor", value: float, /) -> object:
        """Put the value where the mask is true."""


class Operations(Protocol):
    """vLLM's module of them."""

    bgmv_shrink: Callable[..., None]
    sgmv_shrink: Callable[..., None]


def spare_base() -> None:
    """Let no adapter have a part in the base model's tokens; vLLM calls this in each of its processes."""
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        mask(cast("Operations", importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")))


def mask(operations: Operations) -> None:
    """Replace the first half of an adapter's part by one that gives the base model's tokens nothing."""
    by_token, by_sequence = operations.bgmv_shrink, operations.sgmv_shrink

    def bgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scale: float) -> None:
        by_token(inputs, weights, output, slots, scale)
        output.masked_fill_((slots < 0).unsqueeze(1), 0)

    def sgmv_shrink(  # noqa: PLR0913, PLR0917 - as vLLM has it
        inputs: Tensor,
        weights: Tensor,
        output: Tensor,
        starts: Tensor,
        lengths: Tensor,
        slots: Tensor,
        *others: float,
    ) -> None:
        by_sequence(inputs, weights, output, starts, lengths, slots, *others)
        output.masked_fill_((slots.repeat_interleave(lengths) < 0).unsqueeze(1), 0)

    operations.bgmv_shrink, operations.sgmv_shrink = bgmv_shrink, sgmv_shrink
