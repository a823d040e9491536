"""What the preflight says on a machine without the lab; the rest is in tests/molecule/preflight."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


def test_the_lab_inventory_while_the_lab_is_down_says_how_to_start_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "inventory" / "lab", tmp_path / "inventory" / "lab")  # without .cache beside it
    nobody = ("-e", "ansible_host=127.0.0.1", "-e", "ansible_port=9")
    done = subprocess.run(
        [PLAYBOOK, "playbooks/preflight.yml", "-i", tmp_path / "inventory" / "lab", *nobody],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode != 0, said
    assert "function-gemma-server cannot be reached" in said
    assert "the lab does not run; start it with `make lab`" in said
