"""On CPUs no adapter has a part in the base model's tokens, whatever is in the last slot."""

from dataclasses import dataclass
from types import SimpleNamespace

from function_gemma.vllm_plugin import cpu


@dataclass
class Row:
    """As much of a tensor as the operations need."""

    values: list[int]

    def __lt__(self, other: int) -> "Row":
        return Row([one < other for one in self.values])

    def unsqueeze(self, _dimension: int) -> "Row":
        return self

    def repeat_interleave(self, lengths: "Row") -> "Row":
        pairs = zip(self.values, lengths.values, strict=True)
        return Row([one for one, length in pairs for _ in range(length)])

    def masked_fill_(self, hits: "Row", value: int) -> None:
        pairs = zip(self.values, hits.values, strict=True)
        self.values = [value if hit else one for one, hit in pairs]


# What vLLM does: -1 is the last slot.
def by_token(_inputs: object, weights: list[int], output: Row, slots: Row, _scale: float) -> None:
    output.values = [weights[slot] for slot in slots.values]


def by_sequence(
    inputs: object, weights: list[int], output: Row, _starts: Row, lengths: Row, slots: Row, *others: float
) -> None:
    by_token(inputs, weights, output, slots.repeat_interleave(lengths), others[-1])


def test_tokens_of_the_base_model_get_nothing_of_the_last_slot() -> None:
    operations = SimpleNamespace(bgmv_shrink=by_token, sgmv_shrink=by_sequence)
    cpu.mask(operations)
    output = Row([9] * 4)
    operations.bgmv_shrink(None, [5, 6, 7], output, Row([0, -1, 2, -1]), 1.0)
    assert output == Row([5, 0, 7, 0])
    output = Row([9] * 4)
    operations.sgmv_shrink(None, [5, 6, 7], output, Row([0, 3]), Row([3, 1]), Row([-1, 1]), 2, 3, 4, 1.0)
    assert output == Row([0, 0, 0, 6])
