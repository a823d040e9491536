"""Adapters held in a running vLLM: what each public name serves, and how that changes under load.

vLLM tells LoRA requests apart by their name alone: two generations of one name in a batch end its engine. So
each generation has an inner name, `name@digest`, and an integer id from the manifest that no other adapter
ever gets. Callers see public names only. vLLM is not imported here: what is used of it comes in by the
protocols below, and contract.py checks that vLLM has it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from function_gemma.adapters.errors import AdapterError, NotServedError, StoreError
from function_gemma.adapters.manifest import Manifest
from function_gemma.adapters.store import Store, check_name

# A child of vLLM's own logger, so that its handlers and its format apply.
_logger = logging.getLogger("vllm.function_gemma")


class LoRA(Protocol):
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int


class Engine(Protocol):
    """What is used of vLLM's engine client."""

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


@dataclass(frozen=True)
class Generation:
    """A generation that this process has loaded."""

    name: str
    digest: str
    request: LoRA


class Holder:
    """Loads, replaces and unloads adapters; the only writer of the manifest."""

    def __init__(
        self, store: Store, engine: Engine, models: Models, make_request: Callable[..., LoRA]
    ) -> None:
        """`make_request(lora_name=, lora_int_id=, lora_path=)` makes vLLM's LoRARequest."""
        self._store = store
        self._engine = engine
        self._models = models
        self._make_request = make_request
        self._loaded: dict[
            str, Generation
        ] = {}  # by inner name; one that was replaced may still be answering
        self._served: dict[str, Generation] = {}  # by public name
        self._set_aside: dict[str, str] = {}  # public name -> why
        self._changing = asyncio.Lock()
        # Ids below were given to --lora-modules, which vLLM numbers from 1.
        self._foreign_ids = max((request.lora_int_id for request in models.lora_requests.values()), default=0)
        self._show_public_names()

    def _show_public_names(self) -> None:
        model_name, show_available_models = self._models.model_name, self._models.show_available_models

        def public_name(lora_request: LoRA | None = None) -> str:
            generation = self._loaded.get(lora_request.lora_name) if lora_request else None
            return generation.name if generation else model_name(lora_request)

        async def show_public_names() -> ModelList:
            models: ModelList = await show_available_models()
            for card in models.data:
                if generation := self._loaded.get(card.id):
                    card.id = generation.name
            return models

        self._models.model_name = public_name
        self._models.show_available_models = show_public_names

    async def start(self) -> None:
        """Load what the manifest names, and set aside with its reason what cannot be loaded."""
        try:
            manifest = Manifest.read(self._store.root)
            if not manifest.adapters:
                return
            ids = await self._reserve(manifest, len(manifest.adapters))
        except StoreError as error:
            _logger.critical("No adapter is served: %s", error)
            return
        for (name, entry), lora_int_id in zip(manifest.adapters.items(), ids, strict=True):
            try:
                self._check(name)
                self._serve(await self._load(name, entry.digest, lora_int_id))
            except AdapterError as error:
                self._set_aside[name] = str(error)
                _logger.warning("Adapter '%s' (%s) is set aside: %s", name, entry.digest, error)

    async def load(self, name: str, path: str) -> bool:
        """Let `name` serve the generation at `path`; whether that changed anything.

        Requests that run finish on the generation that they began with. On an error what served before still
        serves.
        """
        self._check(name)
        digest = self._store.locate(name, path)
        async with self._changing:
            served = self._served.get(name)
            if served and served.digest == digest:
                return False
            manifest = Manifest.read(self._store.root)
            (lora_int_id,) = await self._reserve(manifest, 1)
            generation = await self._load(name, digest, lora_int_id)
            manifest.serve(name, digest)
            await asyncio.to_thread(manifest.write)
            self._serve(generation)
            return True

    async def unload(self, name: str) -> None:
        """Serve `name` no more, now and after a restart. Requests that run finish."""
        async with self._changing:
            manifest = Manifest.read(self._store.root)
            if manifest.adapters.pop(name, None) is None:
                raise NotServedError(
                    f"no adapter '{name}' is served: `adapter_manager.py list` shows those that are"
                )
            await asyncio.to_thread(manifest.write)
            self._set_aside.pop(name, None)
            # vLLM keeps the weights until it needs their place: requests that wait may still need them.
            if self._served.pop(name, None):
                del self._models.lora_requests[name]
            _logger.info("Adapter '%s' is unloaded", name)

    def adapters(self) -> list[Generation]:
        """Return what is served, by name."""
        return [self._served[name] for name in sorted(self._served)]

    def set_aside(self) -> Iterable[tuple[str, str, str]]:
        """Return name, digest and reason of what the manifest names and could not be loaded at the start."""
        manifest = Manifest.read(self._store.root)
        return [
            (name, entry.digest, self._set_aside[name])
            for name, entry in sorted(manifest.adapters.items())
            if name in self._set_aside
        ]

    async def check_health(self) -> None:
        """Raise where the engine is dead."""
        await self._engine.check_health()

    def _check(self, name: str) -> None:
        check_name(name)
        if self._models.is_base_model(name):
            raise AdapterError(f"'{name}' is the base model's name: choose another for the adapter")

    async def _reserve(self, manifest: Manifest, count: int) -> range:
        ids = manifest.take_ids(count, above=self._foreign_ids)
        # Before they are used: after a crash they are not handed out again.
        await asyncio.to_thread(manifest.write)
        return ids

    async def _load(self, name: str, digest: str, lora_int_id: int) -> Generation:
        """Bring a generation into the engine.

        One that was loaded before keeps its request and id, for requests of that time may still run: one
        inner name with two ids would end the engine.
        """
        inner_name = f"{name}@{digest}"
        generation = self._loaded.get(inner_name)
        if generation is None:
            request = self._make_request(
                lora_name=inner_name,
                lora_int_id=lora_int_id,
                lora_path=str(self._store.generation(name, digest)),
            )
            generation = Generation(name, digest, request)
        await asyncio.to_thread(self._store.verify, name, digest)
        try:
            await self._engine.add_lora(generation.request)
        except Exception as error:
            # A failed load leaves its id registered, with half of the weights: the id is spent.
            with contextlib.suppress(Exception):  # the first error is the one to tell
                await self._engine.remove_lora(generation.request.lora_int_id)
            raise AdapterError(f"vLLM refuses '{name}' ({digest}): {error}") from error
        self._loaded[inner_name] = generation
        return generation

    def _serve(self, generation: Generation) -> None:
        """Point the public name at `generation`, in one step of the event loop."""
        self._models.lora_requests[generation.name] = generation.request
        self._served[generation.name] = generation
        self._set_aside.pop(generation.name, None)
        _logger.info("Adapter '%s' serves %s", generation.name, generation.digest)
