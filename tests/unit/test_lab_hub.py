"""The lab's hub answers the real `hf` as the Hugging Face Hub would."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

import hub

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "google/functiongemma-270m-it"
TOKEN = "hf_of-the-test"
FILES = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 40, "onnx/model.onnx": b"below"}


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """A hub with one model."""
    for name, content in FILES.items():
        path = tmp_path / "root" / MODEL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with hub.serve(tmp_path / "root", TOKEN, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def hf_download(
    endpoint: str, to: Path, *, token: str | None = TOKEN, model: str = MODEL, revision: str = "main"
) -> subprocess.CompletedProcess[str]:
    """Run the real command with a home of its own and the token in a file, as entrypoint.sh does."""
    home = to.parent / "home"
    home.mkdir(exist_ok=True)
    (home / "token").write_text(token or "")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    command = [str(Path(sys.executable).with_name("hf")), "download", model, "--revision", revision]
    return subprocess.run(
        [*command, "--local-dir", str(to)],
        env={**env, "HF_TOKEN_PATH": str(home / "token")},
        capture_output=True,
        text=True,
        check=False,
    )


def fetched(folder: Path) -> dict[str, bytes]:
    """The files of a download without the downloader's own notes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_download_by_branch_and_by_commit_gives_the_very_files(endpoint: str, tmp_path: Path) -> None:
    commit = httpx.get(f"{endpoint}/api/models/{MODEL}/revision/main").json()["sha"]
    for revision in ("main", commit):
        done = hf_download(endpoint, tmp_path / revision, revision=revision)
        assert done.returncode == 0, done.stderr
        assert fetched(tmp_path / revision) == FILES


def test_second_download_gets_what_changed(endpoint: str, tmp_path: Path) -> None:
    assert hf_download(endpoint, tmp_path / "to").returncode == 0
    before = (tmp_path / "to/model.safetensors").stat().st_mtime_ns
    (tmp_path / "root" / MODEL / "config.json").write_bytes(b"{ }\n")
    assert hf_download(endpoint, tmp_path / "to").returncode == 0
    assert fetched(tmp_path / "to") == {**FILES, "config.json": b"{ }\n"}
    assert (tmp_path / "to/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"token": None}, "access denied"),
        ({"token": "hf_of-somebody-else"}, "access denied"),
        ({"model": "google/no-such-model"}, "model 'google/no-such-model' not found"),
        ({"revision": "no-such-branch"}, f"revision not found in model '{MODEL}'"),
    ],
)
def test_refusal_is_named_by_the_real_client(
    endpoint: str, tmp_path: Path, refused: dict[str, str], words: str
) -> None:
    done = hf_download(endpoint, tmp_path / "to", **refused)
    assert done.returncode != 0
    assert words in done.stderr.lower()
    assert fetched(tmp_path / "to") == {}


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        (f"/{MODEL}/resolve/main/config.json", None, 401, "GatedRepo"),
        (f"/{MODEL}/resolve/main/config.json", "hf_of-somebody-else", 403, "GatedRepo"),
        (f"/{MODEL}/resolve/main/no-such-file", TOKEN, 404, "EntryNotFound"),
        (f"/{MODEL}/resolve/no-such-branch/config.json", TOKEN, 404, "RevisionNotFound"),
        ("/api/models/google/no-such-model", TOKEN, 404, "RepoNotFound"),
        ("/api/models/google/no-such-model", None, 401, "RepoNotFound"),
    ],
)
def test_refusal_has_the_status_and_code_of_the_hub(
    endpoint: str, path: str, token: str | None, status: int, code: str
) -> None:
    answer = httpx.get(endpoint + path, headers={"Authorization": f"Bearer {token}"} if token else {})
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (status, code)


def test_download_goes_on_where_it_was_cut_off(endpoint: str) -> None:
    address = f"{endpoint}/{MODEL}/resolve/main/model.safetensors"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    rest = httpx.get(address, headers={**headers, "Range": "bytes=10000-"})
    assert rest.status_code == httpx.codes.PARTIAL_CONTENT
    assert rest.headers["Content-Range"] == "bytes 10000-10239/10240"
    assert rest.content == FILES["model.safetensors"][10000:]
    whole = httpx.head(address, headers=headers)
    assert (whole.headers["Content-Length"], whole.content) == ("10240", b"")
    assert whole.headers["ETag"] == rest.headers["ETag"]


@pytest.mark.parametrize("path", ["../../../token", "%2e%2e/%2e%2e/x", "/etc/passwd"])
def test_nothing_outside_the_repository_is_served(endpoint: str, path: str) -> None:
    address = httpx.URL(endpoint, raw_path=f"/{MODEL}/resolve/main/{path}".encode())
    answer = httpx.get(address, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == httpx.codes.NOT_FOUND
