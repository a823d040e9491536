"""The promises of the module that places files and secrets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULE = Path(__file__).resolve().parents[2] / "playbooks/modules/place_files.py"
SECRET = "hunter2-hunter2"


def run(*files: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The module's result, called as Ansible calls one that stands alone."""
    arguments = {"ANSIBLE_MODULE_ARGS": {"files": files, "_ansible_check_mode": check, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, MODULE],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=True,
    )
    assert SECRET not in done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# Says on stderr what the module would write into the journal. A module takes a first argument for its own.
LOGGED = """
import runpy, sys
from ansible.module_utils import basic
basic.has_journal = False
basic.AnsibleModule._log_to_syslog = lambda self, message: print(message, file=sys.stderr)
runpy.run_path(sys.argv.pop(), run_name="__main__")
"""


def test_the_journal_gets_no_line_of_a_key_of_several_lines(tmp_path: Path) -> None:
    files = [{"path": str(tmp_path / "key"), "mode": "0400", "secret": f"BEGIN\n{SECRET}\nEND\n"}]
    done = subprocess.run(
        [sys.executable, "-c", LOGGED, MODULE],
        # Of a task that says nothing of it, which Ansible lets override what the module says.
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {"files": files, "_ansible_no_log": False}}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert SECRET in (tmp_path / "key").read_text()
    assert SECRET not in done.stderr


def entries(folder: Path) -> list[dict[str, Any]]:
    return [
        {"path": str(folder / "secrets"), "mode": "0700"},
        {"path": str(folder / "secrets/key"), "mode": "0400", "secret": SECRET},
        {"path": str(folder / "settings"), "mode": "0640", "content": "A='1'\n"},
    ]


def modes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o7777) for path in sorted(folder.rglob("*"))
    }


def test_files_and_directories_are_there_as_asked_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    result = run(*entries(tmp_path))
    assert result["changed_paths"] == [entry["path"] for entry in entries(tmp_path)]
    assert modes(tmp_path) == {"secrets": "0o700", "secrets/key": "0o400", "settings": "0o640"}
    assert (tmp_path / "secrets/key").read_text() == SECRET
    again = run(*entries(tmp_path))
    assert (again["changed"], again["changed_paths"], again["diff"]) == (False, [], [])


def test_check_mode_says_what_would_change_and_changes_nothing(tmp_path: Path) -> None:
    result = run(*entries(tmp_path), check=True)
    assert result["changed_paths"] == [entry["path"] for entry in entries(tmp_path)]
    assert modes(tmp_path) == {}


def test_the_difference_of_a_setting_is_shown_and_that_of_a_secret_never(tmp_path: Path) -> None:
    run(*entries(tmp_path))
    former = [{**entry, "content": "A='2'\n"} if "content" in entry else entry for entry in entries(tmp_path)]
    former[1]["secret"] = "another"
    result = run(*former)
    assert [(part["before"], part["after"]) for part in result["diff"]] == [("A='1'\n", "A='2'\n")]
    assert result["changed_paths"] == [str(tmp_path / "secrets/key"), str(tmp_path / "settings")]


def test_permissions_that_somebody_changed_are_set_again(tmp_path: Path) -> None:
    run(*entries(tmp_path))
    (tmp_path / "secrets/key").chmod(0o644)
    assert run(*entries(tmp_path))["changed_paths"] == [str(tmp_path / "secrets/key")]
    assert modes(tmp_path)["secrets/key"] == "0o400"
