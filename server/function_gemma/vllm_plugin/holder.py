"""Adapters held in a running vLLM: what each public name serves, and how that changes under load.

vLLM tells LoRA requests apart by their name alone: two generations of one name in a batch end its engine. So
each generation has an inner name, `name@digest`, and an integer id from the manifest that no other adapter
ever gets. Callers see public names only.

Several vLLMs, one for each GPU, serve from one manifest. A name moves in two phases: all prepare, then all
commit; and whoever missed it, because it was just starting, follows the manifest before it is ready.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeVar

from function_gemma.adapters.admission import admit
from function_gemma.adapters.base import Base
from function_gemma.adapters.errors import AdapterError, EngineError, NotServedError, StoreError
from function_gemma.adapters.manifest import Manifest, edit, read
from function_gemma.adapters.store import Store, check_name

from .engine import Engine, LoRA, ModelList, Models
from .trial import Passed, Trial
from .usage import QUARANTINED, Loaded, LoRARequests, Usage, count_tokens

# A child of vLLM's own logger, so that its handlers and its format apply.
_logger = logging.getLogger("vllm.function_gemma")

_T = TypeVar("_T")

Phase = Literal["prepare", "commit", "abort"]


@dataclass
class Report:
    """What a load did, and how long each part of it took."""

    changed: bool
    seconds: dict[str, float]
    gate: Passed | None = None


class Holder:
    """Loads, replaces and unloads adapters; the only writer of the manifest."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        models: Models,
        make_request: Callable[..., LoRA],
        usage: Usage,
    ) -> None:
        """`make_request(lora_name=, lora_int_id=, lora_path=)` makes vLLM's LoRARequest."""
        self._store = store
        self._engine = engine
        self._models = models
        self._make_request = make_request
        self._usage = usage
        self._refusal: str | None = None
        self._served: dict[str, Loaded] = {}  # by public name
        self._prepared: dict[str, Loaded] = {}  # by public name: proven, and not served yet
        self._quarantined: dict[str, tuple[str, str]] = {}  # name -> digest and reason
        self._followed: bytes | None = b""  # the manifest's file as it was last compared with what is served
        self._following = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        # Ids below were given to --lora-modules, which vLLM numbers from 1.
        self._foreign_ids = max((request.lora_int_id for request in models.lora_requests.values()), default=0)
        models.lora_requests = LoRARequests(models.lora_requests, usage)
        usage.idle = self._retire_soon
        count_tokens(engine, usage)
        self._show_public_names()

    def _show_public_names(self) -> None:
        model_name, show_available_models = self._models.model_name, self._models.show_available_models

        def public_name(lora_request: LoRA | None = None) -> str:
            one = self._usage.find(lora_request)
            return one.name if one else model_name(lora_request)

        async def show_public_names() -> ModelList:
            models: ModelList = await show_available_models()
            on_trial = {
                inner for inner, one in self._usage.loaded.items() if self._served.get(one.name) is not one
            }
            models.data = [card for card in models.data if card.id not in on_trial]
            for card in models.data:
                if one := self._usage.loaded.get(card.id):
                    card.id = one.name
            return models

        self._models.model_name = public_name
        self._models.show_available_models = show_public_names

    async def start(self, refusal: str | None = None) -> None:
        """Load what the manifest names; quarantine with its reason what cannot be loaded. Raises nothing.

        `refusal` says why this server must load no adapter at all.
        """
        self._refusal = refusal
        await self.follow()

    async def follow(self) -> None:
        """Serve what the manifest names, where the plugin of another vLLM has changed it. Raises nothing."""
        async with self._following:
            try:
                content = read(self._store.root)
                if content == self._followed:
                    return
                self._followed = content
                if any(self._behind(Manifest.read(self._store.root))):
                    async with self._changing:
                        await self._catch_up(Manifest.read(self._store.root))
            except Exception:  # a server without adapters is better than none
                _logger.critical("Not all adapters are served", exc_info=True)

    def _behind(self, manifest: Manifest) -> tuple[dict[str, str], list[str]]:
        """Return what is to be loaded, name -> digest, and the names that are to be served no more."""
        wanted = {name: entry.serves for name, entry in manifest.adapters.items() if entry.serves}
        served = {name: one.digest for name, one in self._served.items()}
        tried = {name: digest for name, (digest, _) in self._quarantined.items()}
        loads = {
            name: digest
            for name, digest in wanted.items()
            if digest not in (served.get(name), tried.get(name))
        }
        return loads, [name for name in {**served, **tried} if name not in wanted]

    async def _catch_up(self, manifest: Manifest) -> None:
        loads, unloads = self._behind(manifest)
        for name in unloads:
            await self._forget(name)
        if not loads:
            return
        ids = await self._edit(lambda manifest: manifest.take_ids(len(loads), self._foreign_ids))
        reasons = {
            name: await self._start(name, digest, lora_int_id)
            for (name, digest), lora_int_id in zip(loads.items(), ids, strict=True)
        }

        def note(manifest: Manifest) -> None:
            for (name, digest), lora_int_id in zip(loads.items(), ids, strict=True):
                manifest.start(name, digest, lora_int_id, reasons[name])

        await self._edit(note)

    async def _start(self, name: str, digest: str, lora_int_id: int) -> str | None:
        """Serve what has been proven elsewhere or at an earlier start; return why it cannot be served."""
        try:
            self._check(name)
            one, served = await self._load(name, digest, lora_int_id, {}), self._served.get(name)
            self._serve(one)
            for former in (served, self._prepared.pop(name, None)):
                if former:
                    await self._retire(former)
        except Exception as error:  # whatever is wrong with one, the others are served
            reason = str(error) or type(error).__name__
            self._end_quarantine(name)
            self._quarantined[name] = (digest, reason)
            QUARANTINED.labels(name, digest, reason).set(1)
            _logger.warning("Adapter '%s' (%s) is quarantined: %s", name, digest, reason)
            return reason
        return None

    async def load(
        self, name: str, path: str, source: str | None, trial: Trial, phase: Phase | None = None
    ) -> Report:
        """Let `name` serve the generation at `path`, once it has answered in its trial.

        Requests that run finish on the generation that they began with. On an error what served before still
        serves.

        Where several vLLMs serve, each is to "prepare" first, which is all but the move, and when all have,
        to "commit". "abort" forgets what was prepared.
        """
        self._check(name)
        digest = self._store.locate(name, path)
        async with self._changing:
            served, one = self._served.get(name), self._prepared.pop(name, None)
            if one and (phase != "commit" or one.digest != digest):
                await self._retire(one)
                one = None
            if phase == "abort":
                return Report(changed=False, seconds={})
            if served and served.digest == digest:
                if phase != "prepare":
                    await self._note(served, source)
                return Report(changed=False, seconds={})
            report = Report(changed=True, seconds={})
            if one is None:
                (lora_int_id,) = await self._edit(lambda manifest: manifest.take_ids(1, self._foreign_ids))
                one = await self._load(name, digest, lora_int_id, report.seconds)
                try:
                    report.gate = await self._try(one, trial, report.seconds)
                except BaseException:
                    await self._retire(one)
                    raise
            if phase == "prepare":
                self._prepared[name] = one
                return report
            try:
                with _timed(report.seconds, "move"):
                    await self._note(one, source)
                    self._serve(one)
            except BaseException:
                await self._retire(one)
                raise
            if served:
                await self._retire(served)
            return report

    async def unload(self, name: str) -> str:
        """Serve `name` no more, now and after a restart; return the digest that it served.

        Requests that run finish. The name's generations stay for a rollback.
        """
        async with self._changing:
            one = self._served.get(name)

            def forget(manifest: Manifest) -> str:
                entry = manifest.adapters.get(name)
                if entry and entry.serves:
                    manifest.unload(name)
                    return entry.serves
                if one:  # the plugin of another vLLM has written it
                    return one.digest
                raise NotServedError(
                    f"no adapter '{name}' is served: `adapter_manager.py list` shows those that are"
                )

            digest = await self._edit(forget)
            await self._forget(name)
            return digest

    async def _forget(self, name: str) -> None:
        """Serve `name` no more."""
        self._end_quarantine(name)
        if prepared := self._prepared.pop(name, None):
            await self._retire(prepared)
        if one := self._served.pop(name, None):
            del self._models.lora_requests[name]
            await self._retire(one)
        _logger.info("Adapter '%s' is unloaded", name)

    def adapters(self) -> list[tuple[Loaded, str | None]]:
        """Return what is served and from which hf:// address, by name."""
        manifest = Manifest.read(self._store.root)
        sources = {
            (name, one.digest): one.source
            for name, entry in manifest.adapters.items()
            for one in entry.generations
        }
        return [(one, sources.get((name, one.digest))) for name, one in sorted(self._served.items())]

    def quarantined(self) -> list[tuple[str, str, str]]:
        """Return name, digest and reason of what the manifest names and could not be loaded here."""
        return [(name, digest, reason) for name, (digest, reason) in sorted(self._quarantined.items())]

    async def check_health(self) -> None:
        """Raise where the engine is dead."""
        await self._engine.check_health()

    def _check(self, name: str) -> None:
        if self._refusal:
            raise AdapterError(self._refusal)
        check_name(name)
        if self._models.is_base_model(name):
            raise AdapterError(f"'{name}' is the base model's name: choose another for the adapter")

    async def _edit(self, change: Callable[[Manifest], _T]) -> _T:
        """Change the manifest, with its wait for the disk and for other processes in a thread."""

        def run() -> _T:
            with edit(self._store.root) as manifest:
                return change(manifest)

        return await asyncio.to_thread(run)

    async def _note(self, one: Loaded, source: str | None) -> None:
        """Have the manifest name what is served; the plugin of another vLLM may have written it already."""
        entry = Manifest.read(self._store.root).adapters.get(one.name)
        serving = entry.serving if entry and not entry.quarantined else None
        if serving is None or (serving.digest, serving.source) != (one.digest, source):
            await self._edit(
                lambda manifest: manifest.serve(one.name, one.digest, one.request.lora_int_id, source)
            )

    async def _load(self, name: str, digest: str, lora_int_id: int, seconds: dict[str, float]) -> Loaded:
        """Bring a generation into the engine.

        One that is loaded still keeps its request and id, for requests of that time may still run: one inner
        name with two ids would end the engine.
        """
        inner_name = f"{name}@{digest}"
        if one := self._usage.loaded.get(inner_name):
            return one
        path = self._store.generation(name, digest)
        with _timed(seconds, "admission"):
            try:
                files = self._store.hold(name, digest)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be read ({error.strerror}): load '{name}' again from its source"
                ) from error
            try:
                await asyncio.to_thread(_admit, path)
            except BaseException:
                os.close(files)
                raise
        request = self._make_request(lora_name=inner_name, lora_int_id=lora_int_id, lora_path=str(path))
        with _timed(seconds, "add_lora"):
            try:
                await self._engine.add_lora(request)
            except Exception as error:
                os.close(files)
                # A failed load leaves its id registered, with half of the weights: the id is spent.
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    await self._engine.remove_lora(lora_int_id)
                raise EngineError(f"vLLM refuses '{name}' ({digest}): {error}") from error
        one = self._usage.loaded[inner_name] = Loaded(name, digest, request, files)
        return one

    async def _try(self, one: Loaded, trial: Trial, seconds: dict[str, float]) -> Passed | None:
        """Ask a generation, which is served under its inner name meanwhile."""
        inner_name = one.request.lora_name
        self._models.lora_requests[inner_name] = one.request
        try:
            with _timed(seconds, "proof"):
                await trial.prove(inner_name)
            with _timed(seconds, "gate"):
                return await trial.pass_gate(inner_name)
        finally:
            del self._models.lora_requests[inner_name]

    def _serve(self, one: Loaded) -> None:
        """Point the public name at a generation, in one step of the event loop."""
        self._models.lora_requests[one.name] = one.request
        self._served[one.name] = one
        self._end_quarantine(one.name)
        _logger.info("Adapter '%s' serves %s", one.name, one.digest)

    def _end_quarantine(self, name: str) -> None:
        self._quarantined.pop(name, None)
        for metric in QUARANTINED.collect():
            for sample in metric.samples:
                if sample.labels["adapter"] == name:
                    QUARANTINED.remove(name, sample.labels["digest"], sample.labels["reason"])

    def _retire_soon(self, one: Loaded) -> None:
        """Retire a generation whose last request has just ended, if it serves no more."""
        if self._served.get(one.name) is one:
            return

        async def retire() -> None:
            async with self._changing:
                await self._retire(one)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, one: Loaded) -> None:
        """Have the engine forget a generation and let its files be pruned, unless it is wanted or in use."""
        inner_name = one.request.lora_name
        wanted = one in (self._served.get(one.name), self._prepared.get(one.name))
        if one.uses or wanted or self._usage.loaded.get(inner_name) is not one:
            return
        del self._usage.loaded[inner_name]
        try:
            await self._engine.remove_lora(one.request.lora_int_id)
        except Exception:
            _logger.warning("vLLM did not forget '%s'", inner_name, exc_info=True)
        finally:
            os.close(one.files)


def _admit(path: Path) -> None:
    """Refuse a generation that does not fit the base model, or that was changed."""
    if admit(path, Base.read()).digest != path.name:
        raise StoreError(
            f"{path} was changed after it was installed: load '{path.parent.name}' again from its source"
        )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = perf_counter()
    try:
        yield
    finally:
        seconds[part] = perf_counter() - start
