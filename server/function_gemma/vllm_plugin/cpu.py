"""What vLLM's CPU backend computes wrongly while adapters are loaded, set right in the engine's process.

A token of the base model has the slot -1 among those of the adapters, which the operations in PyTorch take
for the last one: once that has an adapter, the base model answers as it (vLLM 0.32; a GPU's kernels know -1).
"""

import importlib
from typing import Any


def spare_base() -> None:
    """Let no adapter have a part in the base model's tokens; vLLM calls this in each of its processes."""
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        mask(importlib.import_module("vllm.lora.punica_wrapper.punica_cpu"))


def mask(operations: Any) -> None:  # noqa: ANN401 - vLLM's module
    """Replace the first half of an adapter's part by one that gives the base model's tokens nothing."""
    by_token, by_sequence = operations.bgmv_shrink, operations.sgmv_shrink

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, slots: Any, scale: float) -> None:  # noqa: ANN401
        by_token(inputs, weights, output, slots, scale)
        output.masked_fill_((slots < 0).unsqueeze(1), 0)

    def sgmv_shrink(*arguments: Any) -> None:  # noqa: ANN401
        by_sequence(*arguments)
        _inputs, _weights, output, _starts, lengths, slots = arguments[:6]
        output.masked_fill_((slots.repeat_interleave(lengths) < 0).unsqueeze(1), 0)

    operations.bgmv_shrink, operations.sgmv_shrink = bgmv_shrink, sgmv_shrink
