"""backup.sh and the way to it over SSH, with a stand-in for docker that writes down what it is asked."""

import os
import pty
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "server"
DOCKER = """#!/bin/bash
echo "$*" >>"$ASKED"
case $* in
*.Config.Image*) echo vllm-gemma:release ;;
*.Mounts*) echo /checkout ;;
*.Image*) echo sidecar ;;
*' health') [[ -e $JOINS ]] ;;
*' save '*) echo the tar ;;
*' restore'*) cat >"$ASKED.stdin"; [[ ! -e $REFUSES ]] ;;
esac
"""


@dataclass(frozen=True)
class Host:
    """Where backup.sh runs."""

    path: Path

    def run(
        self, script: str, *words: str, stdout: int = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as on the host."""
        env = {
            "PATH": f"{self.path}:{os.environ['PATH']}",
            "ASKED": str(self.path / "asked"),
            "JOINS": str(self.path / "joins"),
            "REFUSES": str(self.path / "refuses"),
        }
        return subprocess.run(
            [self.path / script, *words],
            input="the file",
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            check=False,
        )

    def asked(self, *of: str) -> list[str]:
        """What docker was asked to do with containers, backup.py's work by its words alone."""
        lines = (self.path / "asked").read_text().splitlines()
        words = [line.rpartition("vllm-gemma:release ")[2] for line in lines]
        return [one for one in words if one.startswith(of)]


@pytest.fixture
def server(tmp_path: Path) -> Host:
    """A host on which the stack runs, in the tailnet."""
    for name in ("backup.sh", "standby.sh", "handover.sh"):
        shutil.copy(SERVER / name, tmp_path)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "joins").touch()
    return Host(tmp_path)


def test_what_is_saved_is_all_that_goes_to_standard_output_and_docker_keeps_no_copy(server: Host) -> None:
    done = server.run("backup.sh", "save")
    assert (done.returncode, done.stdout) == (0, "the tar\n")
    (run,) = (line for line in (server.path / "asked").read_text().splitlines() if " save " in line)
    assert "--log-driver none" in run


@pytest.mark.parametrize("script", ["backup.sh", "handover.sh"])
def test_a_terminal_gets_no_backup(server: Host, script: str) -> None:
    if script == "handover.sh":
        shutil.move(server.path / script, server.path / "backup.sh")
    ours, theirs = pty.openpty()
    done = server.run("backup.sh", "save", stdout=theirs)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 1
    assert "backup.sh save >FILE" in done.stderr
    asked = server.path / "asked"
    assert not asked.exists() or " save" not in asked.read_text()


def test_a_restore_leaves_the_node_alone(server: Host) -> None:
    done = server.run("backup.sh", "restore")
    assert done.returncode == 0, done.stderr
    assert (server.path / "asked.stdin").read_text() == "the file"
    assert server.asked("restore", "stop", "take", "start") == ["restore"]


def test_an_identity_is_taken_while_the_sidecar_is_stopped(server: Host) -> None:
    done = server.run("backup.sh", "restore", "--identity")
    assert done.returncode == 0, done.stderr
    assert server.asked("restore", "stop", "take", "start", "undo", "settle") == [
        "restore identity",
        "stop tailscale-vllm",
        "take",
        "start tailscale-vllm",
        "settle",
    ]
    assert "changes its identity" in (server.path / ".update.log").read_text()


def test_a_backup_that_is_refused_does_not_stop_the_sidecar(server: Host) -> None:
    (server.path / "refuses").touch()
    assert server.run("backup.sh", "restore", "--identity").returncode == 1
    assert server.asked("stop", "take") == []


def test_an_identity_that_the_tailnet_does_not_take_is_given_back(server: Host) -> None:
    (server.path / "joins").unlink()
    script = (server.path / "backup.sh").read_text()
    (server.path / "backup.sh").write_text(script.replace("await 90s", "await 0s"))
    done = server.run("backup.sh", "restore", "--identity")
    assert done.returncode == 1
    assert "has its former identity again" in done.stdout
    assert server.asked("stop", "take", "start", "undo", "settle") == [
        "stop tailscale-vllm",
        "take",
        "start tailscale-vllm",
        "stop tailscale-vllm",
        "undo",
        "start tailscale-vllm",
    ]


@pytest.mark.parametrize("words", [[], ["keep"], ["save", "--identity"], ["restore", "--all"]])
def test_a_wrong_call_shows_the_usage_and_does_nothing(server: Host, words: list[str]) -> None:
    done = server.run("backup.sh", *words)
    assert done.returncode == 2
    assert "backup.sh restore [--identity] <FILE" in done.stderr
    assert not (server.path / "asked").exists()


def test_over_ssh_docker_keeps_no_copy_and_the_end_of_the_session_does_not_reach_the_run(
    server: Host,
) -> None:
    shutil.move(server.path / "handover.sh", server.path / "backup.sh")
    assert server.run("backup.sh", "restore", "--identity").returncode == 0
    (run,) = server.asked("run")
    assert run.startswith("run --rm -i --log-driver none --sig-proxy=false ")
    assert run.endswith("/checkout/server/backup.sh restore --identity")
    assert (server.path / "asked.stdin").read_text() == "the file"
