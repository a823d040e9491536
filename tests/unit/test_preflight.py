"""What the preflight says on a machine without the lab; the rest is in tests/molecule/preflight."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def refusal(inventory: Path, *words: str) -> str:
    """Run the preflight, which must refuse and change nothing; return what it said with single spaces."""
    playbook = Path(sys.executable).with_name("ansible-playbook")
    env = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        [playbook, "playbooks/preflight.yml", "-i", inventory, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0, done.stdout
    recap = done.stdout.rpartition("PLAY RECAP")[2]
    assert recap.count("changed=") == recap.count("changed=0"), done.stdout
    return " ".join(f"{done.stdout} {done.stderr}".split())


def test_the_lab_inventory_while_the_lab_is_down_says_how_to_start_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "inventory" / "lab", tmp_path / "inventory" / "lab")  # without .cache beside it
    nobody = ("-e", "ansible_host=127.0.0.1", "-e", "ansible_port=9")
    said = refusal(tmp_path / "inventory" / "lab", *nobody)
    assert "function-gemma-server cannot be reached" in said
    assert "the lab does not run; start it with `make lab`" in said
