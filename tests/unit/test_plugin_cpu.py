"""On CPUs no adapter has a part in the base model's tokens, whatever is in the last slot."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from function_gemma.vllm_plugin import cpu


class Row(list[int]):
    """As much of a tensor as the operations need."""

    def __lt__(self, other: Any) -> Any:  # noqa: ANN401 - int, as a tensor has it
        return Row(one < other for one in self)

    def unsqueeze(self, _dimension: int) -> "Row":
        return self

    def repeat_interleave(self, lengths: Iterable[int]) -> "Row":
        return Row(one for one, length in zip(self, lengths, strict=True) for _ in range(length))

    def masked_fill_(self, hits: "Row", value: int) -> None:
        self[:] = [value if hit else one for one, hit in zip(self, hits, strict=True)]


def last_slot_too(_inputs: object, weights: list[int], output: Row, *others: Any) -> None:  # noqa: ANN401
    """What vLLM does: -1 is the last slot."""
    slots = (
        others[2].repeat_interleave(others[1]) if len(others) > 2 else others[0]
    )  # of sequences, of tokens
    output[:] = [weights[slot] for slot in slots]


def test_tokens_of_the_base_model_get_nothing_of_the_last_slot() -> None:
    operations = SimpleNamespace(bgmv_shrink=last_slot_too, sgmv_shrink=last_slot_too)
    cpu.mask(operations)
    output = Row([9] * 4)
    operations.bgmv_shrink(None, [5, 6, 7], output, Row([0, -1, 2, -1]), 1.0)
    assert output == [5, 0, 7, 0]
    output = Row([9] * 4)
    operations.sgmv_shrink(None, [5, 6, 7], output, Row([0, 3]), Row([3, 1]), Row([-1, 1]), 2, 3, 4, 1.0)
    assert output == [0, 0, 0, 6]
