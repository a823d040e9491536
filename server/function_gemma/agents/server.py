"""Serves the folder agents/ below /agents/, read-only, on a unix socket that the gateway opens.

Every answer has a strong ETag of its content: a client keeps its copy and only asks whether it still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from function_gemma.agents.definition import path_of

# Not mimetypes: its answers depend on the host's files.
CONTENT_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".py": "text/x-python; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".yaml": "application/yaml",
}
# Ask before each use. Not no-cache, which also forbids the use of a copy while this server is away.
CACHE_CONTROL = "max-age=0"
ERROR_HEADERS = {"Cache-Control": "no-store"}


def etag_of(content: bytes) -> str:
    """Return the strong entity tag of a content."""
    return f'"{hashlib.sha256(content).hexdigest()}"'


def locate(root: Path, path: str) -> Path | None:
    """Return the file that `path` of a URL names below `root`, a resolved folder.

    None where there is no such file, for a path with an empty or hidden part or `..`, and for a link that
    leads out or to something hidden. Raises PermissionError where this process may not look.
    """
    if any(not part or part.startswith(".") for part in path.split("/")):
        return None
    try:
        found = (root / path).resolve(strict=True)
        inside = found.relative_to(root)
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError):  # absent or too long; a loop of links; a NUL or a link out
        return None
    hidden = any(part.startswith(".") for part in inside.parts)
    return found if found.is_file() and not hidden else None


def index(root: Path) -> bytes:
    """Return the index as JSON: each subagent's name, the path of its definition and that file's ETag."""
    agents = [
        {"name": folder.name, "path": f"/agents/{path_of(folder.name)}", "etag": etag_of(file.read_bytes())}
        for folder in sorted(root.iterdir())
        if (file := locate(root, path_of(folder.name)))
    ]
    return json.dumps({"agents": agents}, indent=2).encode() + b"\n"


def still_holds(if_none_match: str, etag: str) -> bool:
    """Say whether an If-None-Match names this ETag (weak comparison, RFC 9110 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


def create_app(directory: Path) -> FastAPI:
    """Make the application that serves `directory`."""
    root = directory.resolve(strict=True)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(PermissionError)
    def unreadable(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
        detail = "the agents service may not read this: on the host, chmod -R a+rX agents"
        return JSONResponse({"detail": detail}, 403, ERROR_HEADERS)

    @app.get("/health")
    def health() -> dict[str, str]:
        index(root)  # fails where the folder is gone or unreadable
        return {"status": "ok"}

    @app.api_route("/agents/{path:path}", methods=["GET", "HEAD"])
    def serve(path: str, request: Request) -> Response:
        if path:
            file = locate(root, path)
            if file is None:
                raise HTTPException(404, "no such file: /agents/ lists the subagents", ERROR_HEADERS)
            content, kind = file.read_bytes(), CONTENT_TYPES.get(file.suffix, "application/octet-stream")
        else:
            content, kind = index(root), CONTENT_TYPES[".json"]
        etag = etag_of(content)
        headers = {"Cache-Control": CACHE_CONTROL, "ETag": etag, "X-Content-Type-Options": "nosniff"}
        if still_holds(request.headers.get("If-None-Match", ""), etag):
            return Response(status_code=304, headers=headers)
        headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        return Response(content if request.method == "GET" else None, headers=headers)

    return app


def listen(path: Path) -> socket.socket:
    """Listen on the unix socket `path`, in place of one that nobody answers any more.

    Bound here, because uvicorn opens a socket that it binds itself to everybody (0666).
    """
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise SystemExit(f"{path} is served already: stop that server or set AGENTS_SERVER_SOCKET")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise SystemExit(f"cannot bind AGENTS_SERVER_SOCKET={path}: {error.strerror or error}") from error
    listener.listen()
    return listener


def main() -> None:
    """Serve AGENTS_SERVER_DIRECTORY on AGENTS_SERVER_SOCKET until SIGTERM."""
    directory = Path(os.environ.get("AGENTS_SERVER_DIRECTORY", "/agents"))
    path = Path(os.environ.get("AGENTS_SERVER_SOCKET", "/run/agents/agents.sock"))
    if not directory.is_dir():
        raise SystemExit(
            f"AGENTS_SERVER_DIRECTORY={directory} is no directory: mount the checkout's agents/ there"
        )
    os.umask(0o007)  # the gateway reaches the socket by its group
    listener = listen(path)
    # No access log: the gateway writes one, and the health check would fill this.
    application = create_app(directory)
    print(f"serving {directory} on {path}", flush=True)
    config = uvicorn.Config(application, access_log=False, lifespan="off", server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
