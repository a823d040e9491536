"""Filter `lora_digest`: the digest under which the server's store keeps an adapter's content.

So that a run with nothing to load sends nothing to the host.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

# As function_gemma.adapters.store has them; a unit test holds the two together.
FILES = ("adapter_config.json", "adapter_model.safetensors")


def lora_digest(directory: str) -> str:
    """Return 12 hex digits of the content of the adapter in `directory`; OSError where a file is missing."""
    lines = ""
    for file in FILES:
        with (Path(directory) / file).open("rb") as content:
            lines += f"{file} {hashlib.file_digest(content, 'sha256').hexdigest()}\n"
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the filters of this file by name."""
        return {"lora_digest": lora_digest}
