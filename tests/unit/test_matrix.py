"""What `make matrix` says is what its rows did."""

import sys
from pathlib import Path

import pytest

from matrix import Row, main


def row(what: str, code: str) -> Row:
    return Row("Debian 12", "docker", "none", what, (sys.executable, "-c", code))


def test_a_row_that_fails_fails_the_command_shows_in_the_table_and_the_rest_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "systems.md"
    rows = [row("molecule bad", "print('its reason'); exit(3)"), row("molecule good", "")]

    assert main(rows, table, tmp_path / "log") == 1

    text = table.read_text()
    assert "| Debian 12 | docker | none | molecule bad | **failed** |" in text
    assert "| Debian 12 | docker | none | molecule good | passed |" in text
    log = tmp_path / "log" / "matrix-bad.log"
    assert f"matrix-bad: failed with status 3, see {log}" in capsys.readouterr().out
    assert log.read_text() == "its reason\n"


def test_a_table_without_a_failed_row_is_a_success_and_says_what_is_not_run(tmp_path: Path) -> None:
    table = tmp_path / "systems.md"

    assert main([row("molecule good", "")], table, tmp_path) == 0

    for left_out in ("Ubuntu 22.04 and 24.04", "Real GPUs"):
        assert left_out in table.read_text()


def test_a_row_is_told_its_debian_and_what_it_has(tmp_path: Path) -> None:
    asks = "import os; exit(os.environ['MOLECULE_SUITE'] != 'bookworm')"
    told = Row(
        "Debian 12", "docker", "1", "molecule x", (sys.executable, "-c", asks), {"MOLECULE_SUITE": "bookworm"}
    )

    assert main([told], tmp_path / "systems.md", tmp_path) == 0


def test_a_row_that_is_not_chosen_keeps_its_last_result_and_one_never_run_says_so(tmp_path: Path) -> None:
    table = tmp_path / "systems.md"
    rows = [row("molecule first", ""), row("molecule second", "exit(1)"), row("molecule third", "exit(1)")]

    assert main(rows, table, tmp_path, "first") == 0
    assert main(rows, table, tmp_path, "second") == 1

    results = [line.split(" | ")[3:5] for line in table.read_text().splitlines() if "| molecule" in line]
    assert results == [
        ["molecule first", "passed"],
        ["molecule second", "**failed**"],
        ["molecule third", "not run"],
    ]
