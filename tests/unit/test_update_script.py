"""update.sh in a clone of its own, with a stand-in of `docker` that notes what it is asked."""

import fcntl
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "server"

DOCKER = """#!/bin/bash
echo "$*" >> "$FAKE/log"
[ ! -e .lock ] || ! flock -n .lock true || echo unlocked >> "$FAKE/log"
gateway=$FAKE/gateway  # a file for each of its servers, with the state that it was set to
[[ $* != *" check" || ! -s $FAKE/refusals ]] || { sed -i 1d "$FAKE/refusals"; exit 126; }
case "$*" in
    "ps -"*) name=${!#} name=${name#name=^/}; [[ ! -e $FAKE/containers/${name%\\$} ]] || echo id ;;
    "compose run -d "*)
        name="$*" name=${name#*--name } name=${name%% *}
        [[ -e $FAKE/standby-fails ]] || touch "$FAKE/containers/$name" ;;
    "rm -f "*) rm -f "$FAKE/containers/$3" ;;
    "exec gateway-gemma"*"set server "*)
        words=(${!#})
        echo "${words[4]}" >"$gateway/${words[2]}" ;;
    "exec gateway-gemma"*"show stat "*)
        words=(${!#})
        for server in "$gateway/${words[2]}"/*; do
            [[ $(cat "$server") == ready ]] && state=UP || state=MAINT
            echo "${words[2]},${server##*/},0,0,0,,,,,,,,,,,,,$state,1"
        done ;;
    "top "*) cat "$FAKE/rss" 2>/dev/null || printf "PID RSS\\n1 1000\\n" ;;
    "exec "*-standby" "*"healthcheck.py"*) [[ -e $FAKE/containers/$2 ]] ;;
    "exec agents-gemma "*) [[ ! -e $FAKE/agents-fail ]] ;;
    "exec tailscale-vllm "*) [[ ! -e $FAKE/no-tailnet ]] || { echo "not in the tailnet"; exit 1; } ;;
    "compose up "*" tailscale")
        echo "$TAILSCALE_VLLM_TAG" >>"$FAKE/sidecars"
        [[ ! -e $FAKE/up-fails ]] || touch "$FAKE/no-tailnet" ;;
    *" adapter_manager.py check") ! rm "$FAKE/check-fails" 2>/dev/null ;;
    "compose config --images")
        echo "vllm-gemma:$FUNCTION_GEMMA_TAG"
        echo "tailscale-vllm:$TAILSCALE_VLLM_TAG" ;;
    "image inspect "*) echo "sha256:of-${!#}" ;;
    "image ls --format "*) ls "$FAKE/images" ;;
    "image rm "*) rm "$FAKE/images/$3" ;;
    *" adapter_manager.py list") echo "lint  sha256:a" ;;
    "compose config --services")
        printf '%s\\n' pod tailscale gateway vllm-server agents
        sed -nE 's/^ *container_name: vllm-gemma(-[0-9]+)$/vllm-server\\1/p' "$FAKE/config" 2>/dev/null ;;
    "compose config") cat "$FAKE/config" 2>/dev/null || true ;;
    "compose --dry-run up "*) cat "$FAKE/dry-run" 2>/dev/null || true ;;
    "image ls -q "*) cat "$FAKE/images/${!#}" 2>/dev/null || true ;;
    "compose ps -a --orphans=false --services")
        cat "$FAKE/services" 2>/dev/null || printf 'gateway\\ntailscale\\nvllm-server\\n' ;;
    "compose build "*)
        [ ! -e "$FAKE/build-fails" ] || exit 1
        mkdir -p "$FAKE/images"
        echo id > "$FAKE/images/vllm-gemma:$FUNCTION_GEMMA_TAG"
        echo id > "$FAKE/images/tailscale-vllm:$TAILSCALE_VLLM_TAG" ;;
    "exec "*nvidia-smi*) cat "$FAKE/gpus" ;;
    *nvidia-smi*) [ ! -e "$FAKE/no-gpu" ] || { echo "Failed to initialize NVML"; exit 1; } ;;
    *"vllm-server fetch") [ ! -e "$FAKE/fetch-fails" ] || { echo "no model"; exit 1; } ;;
    "inspect "*)
        [ -s "$FAKE/health" ] || echo "healthy 0 200" > "$FAKE/health"
        sed -n '1{p;q}' "$FAKE/health"
        sed -i 1d "$FAKE/health" ;;
    "exec "*healthcheck.py*)
        [[ ! -s $FAKE/health || $(head -n1 "$FAKE/health") == healthy* ]] || exit 1
        [[ ! -s $FAKE/health ]] || sed -i 1d "$FAKE/health" ;;
    "exec "*test_connection.py*) echo "SUCCESS: model answered: reply" ;;
esac
"""

REPLACE_VLLM = " DRY-RUN MODE -  Container 0123456789ab_vllm-gemma  Recreate\n"


class Host:
    """A clone of a small project, its forge, and what the stand-in of docker saw."""

    def __init__(self, path: Path) -> None:
        self.fake, self.forge, self.clone = path / "fake", path / "forge", path / "clone"
        (self.fake / "containers").mkdir(parents=True)
        for backend in ("vllm", "agents"):
            (self.fake / "gateway" / backend).mkdir(parents=True)
        self.runs("vllm-gemma", "vllm-gemma-1")
        (self.fake / "docker").write_text(DOCKER)
        (self.fake / "docker").chmod(0o755)
        server = self.forge / "server"
        (server / "function_gemma").mkdir(parents=True)
        (server / "function_gemma" / "a.py").write_text("a = 1\n")
        (server / "haproxy").mkdir()
        (server / "haproxy" / "haproxy.cfg").write_text("global\n")
        (server / "Dockerfile").write_text("FROM x\nCOPY function_gemma /opt/\n")
        (server / "Dockerfile.tailscale").write_text("FROM x\nCOPY tailscale.sh handover.sh /root/\n")
        for name in ["update.sh", "standby.sh", "releases.sh", "tailscale.sh", "handover.sh"]:
            shutil.copy(SERVER / name, server / name)
        shutil.copy(SERVER.parent / ".gitignore", self.forge)
        self.git("init", "-q", "-b", "main")
        self.commit()
        self.git("clone", "-q", str(self.forge), str(self.clone))

    def git(self, *arguments: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e@x"]
        command = ["git", "-C", str(self.forge), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-qm", "x")
        return self.git("rev-parse", "--short=12", "HEAD")

    def update(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake)}
        command = [str(self.clone / "server" / "update.sh"), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )

    def runs(self, *containers: str) -> None:
        for name in containers:
            (self.fake / "containers" / name).touch()

    def serves(self) -> None:
        """Let the gateway run and send its requests to vllm-gemma and agents-gemma."""
        self.runs("gateway-gemma")
        for backend in (self.fake / "gateway").iterdir():
            (backend / "main").write_text("ready\n")
            (backend / "standby").write_text("maint\n")

    def gateway(self, backend: str = "vllm") -> dict[str, str]:
        return {path.name: path.read_text().strip() for path in (self.fake / "gateway" / backend).iterdir()}

    def calls(self) -> list[str]:
        log = self.fake / "log"
        return log.read_text().splitlines() if log.exists() else []

    def tags(self) -> dict[str, str]:
        lines = (self.clone / "server" / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def last(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout.splitlines()[-1]


def test_a_second_run_builds_nothing_and_says_so_in_its_last_line(host: Host) -> None:
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    first = host.update()
    assert last(first) == "changed=1"
    assert "compose build --quiet vllm-server tailscale" in host.calls()
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container vllm-gemma  Running\n")
    (host.fake / "log").unlink()
    second = host.update()
    assert "SUCCESS: model answered: reply" in second.stdout
    assert last(second) == "changed=0"
    assert not [call for call in host.calls() if call.startswith(("compose build", "compose up"))]


def test_a_plan_needs_no_images_and_changes_nothing(host: Host) -> None:
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    plan = host.update("--plan")
    assert "would build: the image of vllm-server" in plan.stdout
    assert "would replace or start: vllm-gemma" in plan.stdout
    assert last(plan) == "changed=1"
    status = ["git", "-C", str(host.clone), "status", "--short", "--ignored"]
    assert subprocess.run(status, check=True, capture_output=True, text=True).stdout == ""
    assert not [
        call for call in host.calls() if call.startswith(("compose build", "compose up", "compose run"))
    ]


def test_a_build_beside_another_run_replaces_nothing_and_waits_for_none(host: Host) -> None:
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    lock = host.clone / "server" / ".lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        built = host.update("--no-pull", "--build", "vllm-server")
    assert last(built) == "changed=1"
    assert "compose build --quiet vllm-server" in host.calls()
    assert not [call for call in host.calls() if call.startswith(("compose up", "compose run"))]
    assert not (host.clone / "server" / ".env").exists()
    assert last(host.update("--no-pull", "--build", "vllm-server")) == "changed=0"


def test_a_plan_names_what_would_be_pulled_and_pulls_nothing(host: Host) -> None:
    before = host.git("rev-parse", "--short=12", "HEAD")
    (host.forge / "new").touch()
    after = host.commit()
    plan = host.update("--plan")
    assert f"would pull main: {before} → {after}" in plan.stdout
    assert last(plan) == "changed=1"
    assert not (host.clone / "new").exists()


def test_a_pull_goes_on_as_the_new_code(host: Host) -> None:
    host.update()
    script = host.forge / "server" / "update.sh"
    script.write_text(
        script.read_text().replace('say() { echo "update.sh:', 'say() { echo "the new update.sh:')
    )
    haproxy = host.forge / "server" / "haproxy" / "haproxy.cfg"
    haproxy.write_text("changed\n")
    host.commit()
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container gateway-gemma  Recreate\n")
    before = host.tags()
    result = host.update()
    assert "update.sh: pulled main" in result.stdout
    assert "the new update.sh: replace or start: gateway-gemma" in result.stdout
    assert last(result) == "changed=1"
    assert host.tags()["GATEWAY_CONFIG_TAG"] != before["GATEWAY_CONFIG_TAG"]
    assert host.tags()["FUNCTION_GEMMA_TAG"] == before["FUNCTION_GEMMA_TAG"]


def test_git_goes_by_the_proxy_that_env_names(host: Host) -> None:
    git = shutil.which("git")
    (host.fake / "git").write_text(
        f'#!/bin/sh\necho "git $http_proxy $https_proxy" >>"$FAKE/log"\nexec {git} "$@"\n'
    )
    (host.fake / "git").chmod(0o755)
    (host.clone / "server" / ".env").write_text(
        "HTTP_PROXY='http://p:1'\nHTTPS_PROXY='http://p:2'\nX='$(false)'\n"
    )
    host.update()
    assert {call for call in host.calls() if call.startswith("git ")} == {"git http://p:1 http://p:2"}


def test_a_checkout_at_a_commit_is_not_pulled_and_it_says_so(host: Host) -> None:
    subprocess.run(["git", "-C", host.clone, "checkout", "-q", "--detach"], check=True)
    (host.forge / "new").touch()
    host.commit()
    result = host.update()
    assert "on no branch: nothing is pulled" in result.stdout
    assert result.returncode == 0
    assert not (host.clone / "new").exists()


def test_a_pull_that_is_no_fast_forward_changes_nothing(host: Host) -> None:
    host.git("commit", "-q", "--amend", "-m", "rewritten")
    result = host.update()
    assert result.returncode == 1
    assert "nothing has changed" in result.stdout
    assert host.calls() == []


GPU = "    deploy:\n      devices:\n        - capabilities:\n            - gpu\n          driver: cdi\n"


def test_a_new_container_that_sees_no_gpu_replaces_nothing(host: Host) -> None:
    (host.fake / "config").write_text(GPU)
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    (host.fake / "no-gpu").touch()
    result = host.update()
    assert result.returncode == 1
    assert "a container of the new image sees no GPU" in result.stdout
    assert "nvidia-ctk cdi list" in result.stdout
    assert not [
        call for call in host.calls() if call.endswith("fetch") or "compose up -d --no-build --pull" in call
    ]
    (host.fake / "no-gpu").unlink()
    assert host.update().returncode == 0


def test_a_stack_without_a_gpu_is_asked_for_none(host: Host) -> None:
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    assert host.update().returncode == 0
    assert not [call for call in host.calls() if "nvidia-smi" in call]


def tag_after(host: Host, path: str, content: str) -> tuple[str, str]:
    """Return the image's tag before and after a file of server/ is written."""
    host.update("--no-pull")
    before = host.tags()["FUNCTION_GEMMA_TAG"]
    target = host.clone / "server" / path
    target.parent.mkdir(exist_ok=True)
    target.write_text(content)
    host.update("--no-pull")
    return before, host.tags()["FUNCTION_GEMMA_TAG"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("function_gemma/a.py", "a = 2\n"),
        ("function_gemma/b.py", ""),
        ("Dockerfile", "FROM y\nCOPY function_gemma /opt/\n"),
    ],
)
def test_another_image_has_another_tag(host: Host, path: str, content: str) -> None:
    before, after = tag_after(host, path, content)
    assert before != after


@pytest.mark.parametrize(
    ("path", "content"), [("README.md", "prose\n"), ("function_gemma/__pycache__/a.pyc", "x")]
)
def test_what_is_not_built_changes_no_tag(host: Host, path: str, content: str) -> None:
    before, after = tag_after(host, path, content)
    assert before == after


def test_the_base_image_that_compose_resolves_is_part_of_the_tag(host: Host) -> None:
    host.update("--no-pull")
    before = host.tags()
    (host.fake / "config").write_text("      args:\n        VLLM_IMAGE: other:v1\n")
    host.update("--no-pull")
    assert host.tags()["FUNCTION_GEMMA_TAG"] != before["FUNCTION_GEMMA_TAG"]
    assert host.tags()["TAILSCALE_VLLM_TAG"] == before["TAILSCALE_VLLM_TAG"]


def test_the_settings_in_env_stay(host: Host) -> None:
    env = host.clone / "server" / ".env"
    env.write_text("# mine\nCOMPOSE_FILE=a.yml\nFUNCTION_GEMMA_TAG=old\n")
    host.update("--no-pull")
    lines = env.read_text().splitlines()
    assert lines[:2] == ["# mine", "COMPOSE_FILE=a.yml"]
    assert len([line for line in lines if line.startswith("FUNCTION_GEMMA_TAG=")]) == 1


@pytest.mark.parametrize("broken", ["build-fails", "fetch-fails"])
def test_what_fails_before_a_replacement_replaces_nothing(host: Host, broken: str) -> None:
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    (host.fake / broken).touch()
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "nothing was replaced" in result.stdout
    assert "compose up -d --no-build" not in host.calls()
    assert not (host.clone / "server" / ".env").exists()


def test_pod_and_tailscale_come_up_before_there_is_a_model(host: Host) -> None:
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container tailscale-vllm  Creating\n")
    result = host.update("--no-pull", "pod", "tailscale")
    assert last(result) == "changed=1"
    assert "compose build --quiet tailscale" in host.calls()
    assert "compose up -d --no-build pod tailscale" in host.calls()
    assert not [call for call in host.calls() if "test_connection.py" in call or call.endswith("fetch")]
    assert "FUNCTION_GEMMA_TAG" not in host.tags()


def test_a_pod_that_is_replaced_takes_along_what_lives_in_it(host: Host) -> None:
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container function-gemma-pod  Recreate\n")
    host.update("--no-pull", "gateway")
    assert "compose up -d --no-build gateway gateway tailscale vllm-server" in host.calls()


def test_a_bare_host_gets_a_pod_and_a_sidecar(host: Host) -> None:
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container function-gemma-pod  Creating\n")
    (host.fake / "services").write_text("\n")  # what Compose prints where there is no container
    host.update("--no-pull", "pod", "tailscale")
    assert "compose up -d --no-build pod tailscale" in host.calls()


def test_a_second_run_waits_and_says_who_is_at_work(host: Host) -> None:
    lock = host.clone / "server" / ".lock"
    lock.write_text("the run of ops, process 7, since noon\n")
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        environment = {**os.environ, "PATH": f"{host.fake}:{os.environ['PATH']}", "FAKE": str(host.fake)}
        second = subprocess.Popen(
            [host.clone / "server" / "update.sh", "--no-pull"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert second.stdout
        assert second.stdout.readline() == "update.sh: waiting for the run of ops, process 7, since noon\n"
        assert host.calls() == []
        fcntl.flock(held, fcntl.LOCK_UN)
        assert second.communicate(timeout=30)[0].splitlines()[-1] == "changed=1"
    assert "unlocked" not in host.calls()


def test_a_server_that_waits_for_a_model_is_not_waited_for(host: Host) -> None:
    (host.fake / "health").write_text("starting 0 loading\n" * 2 + "starting 0 waiting: no model x\n" * 2)
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "vllm-gemma does not serve" in result.stdout
    assert "no model x" in result.stdout


def test_a_server_that_crashes_again_and_again_is_not_waited_for(host: Host) -> None:
    (host.fake / "health").write_text("".join(f"starting {count} \n" for count in range(3, 9)))
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "docker logs vllm-gemma" in result.stdout


TWO = "    container_name: vllm-gemma\n    container_name: vllm-gemma-1\n"


def test_a_server_that_listens_and_is_not_ready_is_not_waited_for(host: Host) -> None:
    (host.fake / "health").write_text("starting 0 waiting: loading\n" * 2 + "unhealthy 0 HTTP/1.1 404\n" * 2)
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "vllm-gemma does not serve: it is unhealthy" in result.stdout


def test_every_vllm_is_waited_for_and_one_that_does_not_serve_is_named(host: Host) -> None:
    (host.fake / "config").write_text(TWO)
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container vllm-gemma-1  Creating\n")
    # The first is healthy, the second is looked at, looked for and crashes.
    crashes = "".join(f"starting {count} \n" for count in range(9))
    (host.fake / "health").write_text("healthy 0 200\n" + crashes)
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "vllm-gemma-1 does not serve: it is starting" in result.stdout
    assert "docker logs vllm-gemma-1" in result.stdout
    assert [call for call in host.calls() if call.endswith("vllm-server fetch")]


def test_the_vllms_of_further_gpus_go_with_the_first_and_those_of_none_go(host: Host) -> None:
    (host.fake / "config").write_text(TWO)
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    host.update("--no-pull", "vllm-server")
    assert "compose up -d --no-build vllm-server vllm-server vllm-server-1" in host.calls()
    host.update("--no-pull")
    every = "pod tailscale gateway vllm-server agents vllm-server-1"
    assert f"compose up -d --no-build --remove-orphans {every}" in host.calls()


def test_a_wrong_option_shows_the_usage_and_does_nothing(host: Host) -> None:
    result = host.update("--bogus")
    assert result.returncode == 2
    assert "update.sh [--no-pull] [--plan | --build | --settle] [--sidecar] [SERVICE…]" in result.stdout
    assert host.calls() == []


def positions(calls: list[str], *wanted: str) -> list[int]:
    """Where the first call that has each of the words stands."""
    return [next(n for n, call in enumerate(calls) if one in call) for one in wanted]


def test_a_standby_answers_while_vllm_is_replaced(host: Host) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    result = host.update("--no-pull")
    assert last(result) == "changed=1"
    order = positions(
        host.calls(),
        "vllm-server fetch",
        "--name vllm-gemma-standby -e SERVER_SOCKET=/run/vllm/vllm-standby.sock",
        "exec vllm-gemma-standby adapter_manager.py check",
        "set server vllm/standby state ready",
        "set server vllm/main state drain",
        "compose up -d --no-build vllm-server",
        "exec vllm-gemma adapter_manager.py check",
        "set server vllm/main state ready",
        "set server vllm/standby state drain",
        "set server vllm/standby state maint",
        "rm -f vllm-gemma-standby",
    )
    assert order == sorted(order)
    assert host.gateway() == {"main": "ready", "standby": "maint"}


@pytest.mark.parametrize("broken", ["standby-fails", "check-fails"])
def test_a_standby_that_does_not_answer_replaces_nothing_and_goes(host: Host, broken: str) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    (host.fake / broken).touch()
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "vllm-gemma serves as before" in result.stdout
    assert "compose up -d --no-build vllm-server" not in host.calls()
    assert not (host.clone / "server" / ".env").exists()
    assert host.gateway() == {"main": "ready", "standby": "maint"}
    assert not (host.fake / "containers" / "vllm-gemma-standby").exists()


@pytest.mark.parametrize(("refusals", "code"), [(2, 0), (3, 1)])
def test_a_check_that_the_engine_did_not_start_is_begun_up_to_three_times(
    host: Host, refusals: int, code: int
) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    (host.fake / "refusals").write_text("refused\n" * refusals)
    result = host.update("--no-pull")
    assert result.returncode == code, result
    assert ("vllm-gemma serves as before" in result.stdout) == bool(code)
    assert host.calls().count("exec vllm-gemma-standby adapter_manager.py check") == 3


@pytest.mark.parametrize(("first", "standby"), [("900, 100", False), ("100, 900", True)])
def test_the_memory_of_the_first_of_several_gpus_decides(host: Host, first: str, standby: bool) -> None:  # noqa: FBT001
    host.serves()
    (host.fake / "config").write_text(GPU)
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    other = "900, 100" if standby else "4, 996"
    (host.fake / "gpus").write_text(f"OCI runtime exec failed\n{first}\n{other}\n")
    assert host.update("--no-pull").returncode == 0
    assert ("rm -f vllm-gemma-standby" in host.calls()) == standby


def test_requests_wait_where_the_settings_or_the_memory_want_it(host: Host) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    (host.fake / "rss").write_text("1 " + "9" * 15)
    host.update("--no-pull")
    (host.fake / "rss").unlink()
    (host.clone / "server" / ".env").write_text("UPDATE_STRATEGY='queue'\n")
    host.update("--no-pull")
    order = positions(
        host.calls(),
        "set server vllm/main state drain",
        "compose up -d --no-build vllm-server",
        "set server vllm/main state ready",
    )
    assert order == sorted(order)
    assert host.calls().count("compose up -d --no-build vllm-server") == 2
    assert not [call for call in host.calls() if call.startswith("compose run -d")]
    assert host.gateway() == {"main": "ready", "standby": "maint"}
    (host.clone / "server" / ".env").write_text("UPDATE_STRATEGY=both\n")
    wrong = host.update("--no-pull")
    assert "UPDATE_STRATEGY in server/.env is auto, surge or queue, not both" in wrong.stdout


def test_what_a_killed_run_left_is_ended_and_one_that_alone_answers_is_not(host: Host) -> None:
    host.serves()
    host.runs("vllm-gemma-standby", "gateway-gemma-standby")
    unsettled = host.clone / "server" / ".unsettled"
    unsettled.touch()
    (host.fake / "gateway" / "vllm" / "main").write_text("drain\n")
    (host.fake / "gateway" / "vllm" / "standby").write_text("ready\n")
    (host.fake / "health").write_text("starting 0 loading\n")
    assert "the standby does: it stays" in host.update("--settle").stdout
    assert host.gateway()["standby"] == "ready"
    assert unsettled.exists()
    (host.fake / "health").unlink()
    assert host.update("--settle").returncode == 0
    assert host.gateway() == {"main": "ready", "standby": "maint"}
    assert not list((host.fake / "containers").glob("*-standby"))
    assert not unsettled.exists()


def test_a_second_gateway_listens_while_the_first_is_replaced(host: Host) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(" DRY-RUN MODE -  Container gateway-gemma  Recreate\n")
    assert last(host.update("--no-pull")) == "changed=1"
    order = positions(
        host.calls(),
        "gateway haproxy -c",
        "--name gateway-gemma-standby -e GATEWAY_SOCKET=/run/gateway/standby.sock "
        "-e GATEWAY_BEFORE=/run/gateway/gateway.sock gateway",
        "exec gateway-gemma-standby",
        "compose up -d --no-build gateway",
        "rm -f gateway-gemma-standby",
    )
    assert order == sorted(order)


REPLACE_AGENTS = " DRY-RUN MODE -  Container 0123456789ab_agents-gemma  Recreate\n"
REPLACE_SIDECAR = " DRY-RUN MODE -  Container 0123456789ab_tailscale-vllm  Recreate\n"


def test_a_second_agents_service_answers_while_the_first_is_replaced(host: Host) -> None:
    host.serves()
    (host.fake / "dry-run").write_text(REPLACE_AGENTS)
    assert last(host.update("--no-pull")) == "changed=1"
    order = positions(
        host.calls(),
        "--name agents-gemma-standby -e AGENTS_SERVER_SOCKET=/run/agents/agents-standby.sock agents",
        "exec agents-gemma-standby healthcheck.py /run/agents/agents-standby.sock",
        "set server agents/standby state ready",
        "set server agents/main state drain",
        "compose up -d --no-build agents",
        "set server agents/main state ready",
        "set server agents/standby state drain",
        "set server agents/standby state maint",
        "rm -f agents-gemma-standby",
    )
    assert order == sorted(order)
    assert host.gateway("agents") == {"main": "ready", "standby": "maint"}


def test_a_second_agents_service_that_alone_answers_stays_until_the_first_does(host: Host) -> None:
    host.serves()
    host.runs("agents-gemma-standby")
    (host.clone / "server" / ".unsettled").touch()
    (host.fake / "gateway" / "agents" / "main").write_text("drain\n")
    (host.fake / "gateway" / "agents" / "standby").write_text("ready\n")
    (host.fake / "agents-fail").touch()
    host.update("--settle")
    assert host.gateway("agents") == {"main": "drain", "standby": "ready"}
    (host.fake / "agents-fail").unlink()
    host.update("--settle")
    assert host.gateway("agents") == {"main": "ready", "standby": "maint"}
    assert not (host.fake / "containers" / "agents-gemma-standby").exists()


def sidecars(host: Host) -> list[str]:
    """The tags of the sidecars that compose was told to bring up alone."""
    path = host.fake / "sidecars"
    return path.read_text().split() if path.exists() else []


def test_a_sidecar_that_runs_is_replaced_only_when_asked_for(host: Host) -> None:
    host.update("--no-pull", "tailscale")
    before = host.tags()["TAILSCALE_VLLM_TAG"]
    host.serves()
    host.runs("tailscale-vllm")
    (host.fake / "dry-run").write_text(REPLACE_SIDECAR + REPLACE_AGENTS)
    (host.clone / "server" / "tailscale.sh").write_text("other\n")
    unasked = host.update("--no-pull")
    assert "update.sh --no-pull tailscale" in unasked.stdout
    assert "replace or start: tailscale-vllm" not in unasked.stdout
    assert "compose up -d --no-build --remove-orphans pod gateway vllm-server agents" in host.calls()
    assert host.tags()["TAILSCALE_VLLM_TAG"] == before
    assert sidecars(host) == []
    (host.fake / "dry-run").write_text(REPLACE_SIDECAR)
    assert last(host.update("--no-pull")) == "changed=0"
    assert last(host.update("--no-pull", "--sidecar")) == "changed=1"
    assert sidecars(host)[0] == host.tags()["TAILSCALE_VLLM_TAG"] != before


def test_a_sidecar_that_is_not_in_the_tailnet_is_taken_back(host: Host) -> None:
    host.update("--no-pull", "tailscale")
    before = host.tags()["TAILSCALE_VLLM_TAG"]
    host.runs("tailscale-vllm")
    (host.fake / "dry-run").write_text(REPLACE_SIDECAR)
    (host.clone / "server" / "tailscale.sh").write_text("other\n")
    (host.fake / "up-fails").touch()
    text = (host.clone / "server" / "standby.sh").read_text()
    (host.clone / "server" / "standby.sh").write_text(text.replace("await 60s", "await 0s"))
    result = host.update("--no-pull", "tailscale")
    assert result.returncode == 1
    assert "tailscale-vllm is not in the tailnet, and what was before returns" in result.stdout
    assert sidecars(host)[1:] == [before]
    assert sidecars(host)[0] != before
    assert host.tags()["TAILSCALE_VLLM_TAG"] == before


def test_a_longest_request_without_a_unit_changes_nothing(host: Host) -> None:
    (host.fake / "config").write_text("      GATEWAY_LONGEST_REQUEST: 5m\n")
    result = host.update("--no-pull")
    assert result.returncode == 1
    assert "is seconds with an s, such as 300s, not 5m" in result.stdout
    assert host.calls() == ["compose config"]


def test_a_server_that_a_killed_run_drained_gets_requests_again_once_it_is_ready(host: Host) -> None:
    host.serves()
    (host.fake / "gateway" / "vllm" / "main").write_text("drain\n")
    (host.fake / "health").write_text("starting 0 loading\n")
    (host.clone / "server" / ".unsettled").touch()
    assert host.update("--settle").returncode == 0
    assert host.gateway() == {"main": "ready", "standby": "maint"}


def serve_commits(host: Host, *contents: str) -> list[str]:
    """Update to a commit for each content of a file that the image is built of; return the commits."""
    commits = []
    for content in contents:
        (host.forge / "server" / "function_gemma" / "a.py").write_text(content)
        commits.append(host.commit())
        assert host.update().returncode == 0
    return commits


def head(host: Host) -> str:
    command = ["git", "-C", str(host.clone), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def numbers(host: Host) -> list[str]:
    return sorted(path.name for path in (host.clone / "server" / ".releases").glob("[0-9]*"))


def test_what_served_is_on_record_with_commit_images_settings_and_adapters(host: Host) -> None:
    (commit,) = serve_commits(host, "a = 2\n")
    shown = host.update("--releases").stdout
    tag = host.tags()["FUNCTION_GEMMA_TAG"]
    assert shown.startswith("release 1, which serves\n")
    assert f"\n  commit {commit}" in shown
    assert f"\n  image vllm-gemma:{tag} sha256:of-vllm-gemma:{tag}\n" in shown
    assert "\n  adapter lint  sha256:a\n" in shown
    assert re.search(r"\n  settings [0-9a-f]{12}\n", shown)
    host.update()
    assert numbers(host) == ["1"]


def test_a_rollback_has_code_and_settings_of_the_release_before(host: Host) -> None:
    settings = host.clone / "server" / "entrypoint.env"
    settings.write_text("SERVER_DTYPE=float32\n")
    first, _ = serve_commits(host, "a = 2\n", "a = 3\n")
    settings.unlink()
    (host.clone / "server" / "gateway.env").write_text("GATEWAY_MAX_BODY=1\n")
    host.update("--no-pull")
    assert numbers(host) == ["1", "2", "3"]
    plan = host.update("--to", "1", "--plan")
    assert f"would go back to release 1 of {time.strftime('%F')}" in plan.stdout
    assert last(plan) == "changed=1"
    assert head(host) != first
    result = host.update("--to", "1")
    assert result.returncode == 0, result
    assert f"back to release 1, commit {first}" in result.stdout
    assert head(host) == first
    assert settings.read_text() == "SERVER_DTYPE=float32\n"
    assert not (host.clone / "server" / "gateway.env").exists()
    assert numbers(host) == ["2", "3", "4"]
    assert "release 4, which serves" in host.update("--releases").stdout
    assert host.update("--to", "former").returncode == 0
    assert "GATEWAY_MAX_BODY=1" in (host.clone / "server" / "gateway.env").read_text()


def test_a_release_that_does_not_know_the_sidecars_word_is_gone_back_to(host: Host) -> None:
    script = host.forge / "server" / "update.sh"
    present = script.read_text()
    for text in (present.replace("--sidecar", "--other"), present):
        script.write_text(text)
        host.commit()
        assert host.update().returncode == 0
    result = host.update("--to", "1", "--sidecar")
    assert result.returncode == 0, result
    assert "back to release 1" in result.stdout


def test_former_is_what_served_before_and_after_a_failed_update_what_serves(host: Host) -> None:
    first, second = serve_commits(host, "a = 2\n", "a = 3\n")
    (host.forge / "server" / "function_gemma" / "a.py").write_text("a = 4\n")
    host.commit()
    (host.fake / "build-fails").touch()
    failed = host.update()
    assert failed.returncode == 1
    assert "update.sh --to 2" in failed.stdout
    (host.fake / "build-fails").unlink()
    assert host.update("--to", "former").returncode == 0
    assert head(host) == second
    assert host.update("--to", "former").returncode == 0
    assert head(host) == first


def test_the_last_releases_stay_on_record_with_their_images_and_no_others(host: Host) -> None:
    serve_commits(host, *(f"a = {number}\n" for number in range(10, 15)))
    assert numbers(host) == ["3", "4", "5"]
    vllm = [path.name for path in (host.fake / "images").glob("vllm-gemma:*")]
    assert len(vllm) == 3
    (host.clone / "server" / ".env").open("a").write("UPDATE_RELEASES_KEPT=1\n")
    host.update()
    assert numbers(host) == ["6"]


def test_local_work_is_not_lost_by_a_rollback(host: Host) -> None:
    serve_commits(host, "a = 2\n", "a = 3\n")
    work = host.clone / "server" / "function_gemma" / "a.py"
    work.write_text("a = 5\n")
    result = host.update("--to", "1")
    assert result.returncode == 1
    assert "the checkout has changes of its own" in result.stdout
    assert work.read_text() == "a = 5\n"


def test_a_release_that_is_not_on_record_changes_nothing(host: Host) -> None:
    (commit,) = serve_commits(host, "a = 2\n")
    none = host.update("--to", "former")
    assert none.returncode == 1
    assert "no release before this one is on record" in none.stdout
    result = host.update("--to", "7")
    assert result.returncode == 1
    assert "there is no release 7 on record, but 1" in result.stdout
    assert head(host) == commit


def test_where_nothing_else_answers_a_vllm_that_does_not_is_replaced_by_what_served(host: Host) -> None:
    (first,) = serve_commits(host, "a = 2\n")
    host.serves()
    (host.clone / "server" / ".env").open("a").write("UPDATE_STRATEGY=queue\n")
    (host.forge / "server" / "function_gemma" / "a.py").write_text("a = 3\n")
    host.commit()
    (host.fake / "dry-run").write_text(REPLACE_VLLM)
    host.update("--no-pull")
    (host.fake / "check-fails").touch()
    result = host.update()
    assert result.returncode == 1
    assert "does not answer as it should" in result.stdout
    assert f"back to release 2, commit {first}" in result.stdout
    assert head(host) == first
    assert host.gateway() == {"main": "ready", "standby": "maint"}


def test_a_setting_that_moved_to_another_file_is_named_before_anything_changes(host: Host) -> None:
    (host.clone / "server" / "gateway.env").write_text("GATEWAY_LONGEST_REQUEST=600s\n")
    result = host.update()
    assert result.returncode == 1
    assert "move its line there from server/gateway.env" in result.stdout
    assert host.calls() == []
