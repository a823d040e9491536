"""entrypoint.sh with stand-ins of `hf` and `vllm`, in directories of its own."""

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parents[2] / "server" / "entrypoint.sh"
MODEL = "google/functiongemma-270m-it"

HF = """#!/bin/sh
echo "hf $*" >> "$LOG"
case "$1 $HUB" in
    *up) ;;
    "download half") echo half > "${7:-$6}/config.json"; echo "Error: Connection reset" >&2; exit 1 ;;
    *half) ;;
    *gated) echo "Error: Access denied. Model '$2' requires approval." >&2; exit 1 ;;
    *unknown) echo "Error: Model '$MODEL' not found." >&2; exit 1 ;;
    *revision) echo "Error: Revision 'main' not found on '$MODEL'." >&2; exit 1 ;;
    *) echo "httpx.ConnectError: [Errno 111] Connection refused" >&2; exit 1 ;;
esac
[ "$1" != download ] || while [ $# -gt 0 ]; do
    [ "$1" != --local-dir ] || echo "$MODEL" > "$2/config.json"
    shift
done
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run entrypoint.sh with a hub that is up, gated, unknown, revision, half or down."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "run" / "vllm").mkdir(parents=True)
    for name, text in {
        "hf": HF,
        "vllm": '#!/bin/sh\necho "vllm $*"\necho "$VLLM_PLUGINS $VLLM_ALLOW_RUNTIME_LORA_UPDATING"\n'
        'echo "worker apart: ${VLLM_ENABLE_V1_MULTIPROCESSING-unsaid}, threads: ${OMP_NUM_THREADS-unsaid}"\n',
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    script = tmp_path / "entrypoint.sh"
    text = ENTRYPOINT.read_text()
    script.write_text(text.replace("/models/", f"{tmp_path}/models/").replace("/run/", f"{tmp_path}/run/"))

    def start(*arguments: str, hub: str = "up", **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "HUB": hub,
            "MODEL": settings.get("SERVER_MODEL", MODEL),
        }
        command = ["bash", str(script), *arguments]
        return subprocess.run(
            command, env={**environment, **settings}, capture_output=True, text=True, timeout=20, check=False
        )

    return start


def base(tmp_path: Path, model: str = MODEL) -> Path:
    return tmp_path / "models" / "base" / model


def test_fetch_leaves_a_complete_copy_and_says_so_by_its_exit_status(run: Run, tmp_path: Path) -> None:
    assert run("fetch").returncode == 0
    assert (base(tmp_path) / "config.json").read_text().strip() == MODEL
    assert (base(tmp_path) / ".complete").read_text().strip() == f"{MODEL}@main"


def test_a_complete_copy_is_served_without_asking_the_hub(run: Run, tmp_path: Path) -> None:
    run("fetch")
    (tmp_path / "log").unlink()
    served = run(hub="down")
    assert f"vllm serve {base(tmp_path)} --served-model-name {MODEL}" in served.stdout
    assert not (tmp_path / "log").exists()


def test_another_revision_is_fetched(run: Run, tmp_path: Path) -> None:
    run("fetch")
    assert run("fetch", SERVER_MODEL_REVISION="v2").returncode == 0
    assert (base(tmp_path) / ".complete").read_text().strip() == f"{MODEL}@v2"
    assert "--revision v2" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("hub", ["down", "half"])
def test_a_fetch_that_fails_leaves_the_copy_that_serves(run: Run, tmp_path: Path, hub: str) -> None:
    run("fetch")
    assert run("fetch", hub=hub, SERVER_MODEL_REVISION="v2").returncode == 1
    assert (base(tmp_path) / "config.json").read_text().strip() == MODEL
    assert run("fetch", hub="down").returncode == 0


def test_what_an_earlier_try_left_does_not_pass_for_a_model(run: Run, tmp_path: Path) -> None:
    assert run("fetch", hub="half").returncode == 1
    assert run("fetch", hub="down").returncode == 1
    assert not base(tmp_path).exists()


@pytest.mark.parametrize(
    ("hub", "why", "mend"),
    [
        ("gated", "requires approval", "server/secrets/huggingface/token"),
        ("unknown", "not found", "SERVER_MODEL in server/entrypoint.env"),
        ("revision", "Revision 'main' not found", "SERVER_MODEL_REVISION in server/entrypoint.env"),
        ("down", "Connection refused", "curl -I"),
    ],
)
def test_a_failed_fetch_says_in_one_line_what_is_wrong_and_what_mends_it(
    run: Run, hub: str, why: str, mend: str
) -> None:
    result = run("fetch", hub=hub)
    assert result.returncode == 1
    [line] = result.stdout.splitlines()
    assert line.startswith(f"entrypoint.sh: no model {MODEL}@main: ")
    assert why in line
    assert mend in line


def test_it_says_what_it_serves_and_where(run: Run, tmp_path: Path) -> None:
    run("fetch")
    assert "serving it at http://0.0.0.0:8000/v1" in run().stdout
    stale = tmp_path / "run" / "vllm" / "vllm.sock"
    stale.touch()
    behind = run(SERVER_SOCKET=str(stale))
    assert f"base model: {MODEL}@main" in behind.stdout
    assert "serving it at http://function-gemma-server:8000/v1" in behind.stdout
    assert f"--uds {stale}" in behind.stdout
    assert not stale.exists()


def test_settings_become_arguments(run: Run) -> None:
    run("fetch", SERVER_MODEL="some/model")
    served = run(SERVER_MODEL="some/model", SERVER_MAX_LORAS="3", SERVER_EXTRA_ARGS="--seed 1").stdout
    assert "--max-loras 3 " in served
    assert "--enable-prefix-caching" in served
    assert " --seed 1 " in served
    assert served.splitlines()[-2].startswith("function_gemma ")


def test_no_setting_lets_adapters_in_past_the_plugin(run: Run) -> None:
    run("fetch")
    extra = {"SERVER_EXTRA_ARGS": "--api-server-count 2", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    served = run(**extra).stdout.splitlines()
    assert served[-3].endswith(" --api-server-count 2 --api-server-count 1")  # the last one counts
    assert served[-2] == "function_gemma 0"


@pytest.mark.parametrize(
    ("version", "settings", "said"),
    [
        ("0.32.0+cpu", {}, f"0, threads: {max(1, len(os.sched_getaffinity(0)) - 1)}"),
        ("0.32.0+cpu", {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "7"}, "1, threads: 7"),
        ("0.32.0", {}, "unsaid, threads: unsaid"),
    ],
)
def test_on_cpus_the_engine_computes_by_itself_unless_the_settings_say_otherwise(
    run: Run, tmp_path: Path, version: str, settings: dict[str, str], said: str
) -> None:
    run("fetch")
    distribution = tmp_path / f"vllm-{version}.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    served = run(**settings, PYTHONPATH=str(tmp_path)).stdout
    assert served.splitlines()[-1] == f"worker apart: {said}"


def facts(socket: Path) -> dict[str, str]:
    lines = socket.with_suffix(".base").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_what_the_base_expects_of_an_adapter_lies_beside_the_socket(run: Run, tmp_path: Path) -> None:
    run("fetch")
    run()
    usual = {
        "SERVER_MODEL": MODEL,
        "SERVER_MODEL_REVISION": "main",
        "SERVER_MODEL_ALIASES": "",
        "SERVER_DTYPE": "bfloat16",
        "SERVER_MAX_LORA_RANK": "32",
        "SERVER_MAX_CPU_LORAS": "256",
        "MODEL_DIR": str(base(tmp_path)),
    }
    assert facts(tmp_path / "run" / "vllm" / "vllm.sock") == usual
    elsewhere = tmp_path / "elsewhere" / "vllm.sock"
    elsewhere.parent.mkdir()
    aliases = "unsloth/functiongemma-270m-it ../base"
    run(SERVER_SOCKET=str(elsewhere), SERVER_MODEL_ALIASES=aliases, SERVER_MAX_LORA_RANK="8")
    assert facts(elsewhere) == {**usual, "SERVER_MODEL_ALIASES": aliases, "SERVER_MAX_LORA_RANK": "8"}
    written = elsewhere.with_suffix(".base")
    assert stat.filemode(written.stat().st_mode) == "-rw-rw----"
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == ["vllm.base", "vllm.waiting"]


def test_what_an_earlier_start_said_of_its_base_is_gone_while_there_is_no_model(
    run: Run, tmp_path: Path
) -> None:
    socket, seen = tmp_path / "run" / "vllm" / "vllm.sock", tmp_path / "seen"
    socket.with_suffix(".base").write_text("SERVER_MODEL=another/model\n")
    (tmp_path / "bin" / "hf").write_text(HF.replace("\n", f"\nls {socket.parent} >>{seen}\n", 1))
    run(SERVER_SOCKET=str(socket))
    assert "vllm.base" not in seen.read_text().split()
    assert facts(socket)["SERVER_MODEL"] == MODEL


def test_any_other_command_is_run(run: Run) -> None:
    assert run("echo", "hello").stdout == "hello\n"
