#!/usr/bin/python
"""An Ansible module: several small files and directories in one go.

ansible.builtin.copy and file take two round trips for each: half of what a site.yml with nothing to do took.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
---
module: place_files
short_description: Several small files and directories in one go
description:
  - Makes directories and writes files, in the order given, each whole or not at all.
  - Knows check mode and shows differences, never those of a secret.
options:
  files:
    description: What is to be there; an entry without content and secret is a directory.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where it lies.
        type: path
        required: true
      mode:
        description: Its permissions, in octal digits.
        type: str
        required: true
      owner:
        description: Its owner, by name or number; unset, whoever owns it.
        type: str
      content:
        description: What the file holds.
        type: str
      secret:
        description: The same, where nobody may see it in an output or a log.
        type: str
author: function-gemma-server
"""

EXAMPLES = """
- name: Place the key
  place_files:
    files:
      - {path: /opt/secrets, mode: "0700"}
      - {path: /opt/secrets/key, mode: "0400", secret: "{{ key }}"}
"""

RETURN = """
changed_paths:
  description: The paths that were made or changed.
  returned: always
  type: list
"""


class QuietModule(AnsibleModule):  # type: ignore[misc]  # Ansible ships no types
    """Writes nothing into the journal: a secret is hidden there by its text, a key has escaped line ends."""

    @property
    def no_log(self) -> bool:
        """Always: Ansible sets it to what the task says, over the constructor's argument of this name."""
        return True

    @no_log.setter
    def no_log(self, _task: bool) -> None:
        pass


def main() -> None:
    """Bring every entry to what it should be."""
    entry = {
        "path": {"type": "path", "required": True},
        "mode": {"type": "str", "required": True},
        "owner": {"type": "str"},
        "content": {"type": "str"},
        "secret": {"type": "str", "no_log": True},
    }
    module = QuietModule(
        {"files": {"type": "list", "elements": "dict", "options": entry, "required": True}},
        supports_check_mode=True,
    )
    changed: list[str] = []
    diffs: list[dict[str, str]] = []
    for wanted in module.params["files"]:
        made = _place(module, wanted, diffs)
        if _attributes(module, wanted) or made:
            changed.append(wanted["path"])
    module.exit_json(changed=bool(changed), changed_paths=changed, diff=diffs)


def _place(module: AnsibleModule, wanted: dict[str, Any], diffs: list[dict[str, str]]) -> bool:
    """Whether the directory or the file's content was not as wanted; makes it so but in check mode."""
    path = Path(wanted["path"])
    text = wanted["content"] if wanted["secret"] is None else wanted["secret"]
    if text is None:
        if path.is_dir():
            return False
        if not module.check_mode:
            path.mkdir()
        return True
    before = path.read_bytes() if path.is_file() else b""
    if path.is_file() and before == text.encode():
        return False
    if wanted["secret"] is None:
        headers = {"before_header": str(path), "after_header": str(path)}
        diffs.append({"before": before.decode(errors="replace"), "after": text, **headers})
    if not module.check_mode:
        # Beside it, so that it is renamed into place; mkstemp lets nobody else read it.
        descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        module.atomic_move(new, str(path))
    return True


def _attributes(module: AnsibleModule, wanted: dict[str, Any]) -> bool:
    """Whether mode or owner was not as wanted; sets them but in check mode."""
    if not Path(wanted["path"]).exists():
        return False  # in check mode
    changed: bool = module.set_mode_if_different(wanted["path"], wanted["mode"], changed=False)
    return bool(module.set_owner_if_different(wanted["path"], wanted["owner"], changed))


if __name__ == "__main__":
    main()
