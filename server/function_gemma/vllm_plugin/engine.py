"""What is used of vLLM, which is not imported here: the real things come in by these protocols.

contract.py checks at the image's build that vLLM has them.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol


class LoRA(Protocol):
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int


class Engine(Protocol):
    """What is used of vLLM's engine client."""

    generate: Callable[..., AsyncGenerator[Any, None]]

    async def add_lora(self, lora_request: LoRA) -> bool:
        """Load an adapter."""

    async def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter."""

    async def check_health(self) -> None:
        """Raise where the engine is dead."""


class Card(Protocol):
    """A line of /v1/models."""

    id: str


class ModelList(Protocol):
    """The body of /v1/models."""

    data: list[Card]


class Models(Protocol):
    """What is used of vLLM's OpenAIServingModels: requests find their adapter in `lora_requests`."""

    lora_requests: dict[str, LoRA]
    model_name: Callable[..., str]
    show_available_models: Callable[[], Any]

    def is_base_model(self, model_name: str) -> bool:
        """Tell whether that is one of the base model's names."""
