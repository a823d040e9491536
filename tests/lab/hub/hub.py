#!/usr/bin/env python3
"""The lab's model hub: as much of the Hugging Face Hub as `hf download` needs.

    hub.py ROOT TOKEN_FILE PORT

Serves the folders ROOT/<organisation>/<name>. Each has one commit, named by its content, and is gated as the
Hub gates a model whose licence must be accepted: anyone may list the files, only the token gets one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
INFO = re.compile(rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)")
FILE = re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class RefusedError(Exception):
    """An answer with an error code of the Hub, by which its clients choose what they raise."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def blob_id(content: bytes) -> str:
    """The file's name in git, which is the Hub's ETag for it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Repository:
    """The files of one folder as they are now."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        listing = json.dumps({path: blob_id(content) for path, content in self.files.items()})
        self.commit = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()

    def info(self) -> dict[str, object]:
        """What /api/models/<name> says."""
        siblings = [{"rfilename": path} for path in self.files]
        return {
            "id": self.name,
            "sha": self.commit,
            "gated": "manual",
            "private": False,
            "siblings": siblings,
        }

    def tree(self) -> list[dict[str, object]]:
        """What /api/models/<name>/tree/<revision>?recursive=true says."""
        return [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            for path, content in self.files.items()
        ]


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the three kinds of address."""

    protocol_version = "HTTP/1.1"
    root: Path
    token: str

    def bearer(self) -> str | None:
        """The caller's token: None without one."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if kind == "Bearer" else None

    def may_read(self) -> bool:
        """Whether the caller has the token."""
        return secrets.compare_digest((self.bearer() or "").encode(), self.token.encode())

    def repository(self, match: re.Match[str]) -> Repository:
        """The repository at the revision of the address."""
        name, revision = match["repository"], match["revision"]
        folder = self.root / name
        if not folder.is_dir():
            # Whether a repository is private or absent, the Hub tells nobody who may not know.
            status = HTTPStatus.NOT_FOUND if self.may_read() else HTTPStatus.UNAUTHORIZED
            raise RefusedError(status, "RepoNotFound", "Repository not found")
        found = Repository(name, folder)
        if revision not in (None, "main", found.commit):
            raise RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def answer(self) -> None:
        """Route one request."""
        address = unquote(urlsplit(self.path).path)
        if match := TREE.fullmatch(address):
            self.send_json(HTTPStatus.OK, self.repository(match).tree())
        elif match := INFO.fullmatch(address):
            self.send_json(HTTPStatus.OK, self.repository(match).info())
        elif match := FILE.fullmatch(address):
            self.send_file(self.repository(match), match["path"])
        else:
            raise RefusedError(
                HTTPStatus.NOT_FOUND, "EntryNotFound", f"no such address in the lab's hub: {address}"
            )

    def send_file(self, repository: Repository, path: str) -> None:
        """Send a file, from where the caller's Range begins."""
        if not self.may_read():
            status = HTTPStatus.UNAUTHORIZED if self.bearer() is None else HTTPStatus.FORBIDDEN
            message = (
                f"Access to model {repository.name} is restricted: accept its licence, then use your token."
            )
            raise RefusedError(status, "GatedRepo", message)
        content = repository.files.get(path)
        if content is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{path} is not in {repository.name}")
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{blob_id(content)}"',
            "X-Repo-Commit": repository.commit,
        }
        status, size = HTTPStatus.OK, len(content)
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and int(
            span[1]
        ) < size:
            first, last = int(span[1]), min(int(span[2] or size - 1), size - 1)
            status, content = HTTPStatus.PARTIAL_CONTENT, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send(status, headers, content)

    def send_json(self, status: HTTPStatus, value: object, **headers: str) -> None:
        """Send a value; a header's name has - where the keyword has _."""
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        self.send(status, {"Content-Type": "application/json", **names}, json.dumps(value).encode())

    def send(self, status: HTTPStatus, headers: dict[str, str], content: bytes) -> None:
        """Send it all, to a HEAD without the content."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        try:
            self.answer()
        except RefusedError as error:
            self.send_json(
                error.status, {"error": str(error)}, X_Error_Code=error.code, X_Error_Message=str(error)
            )

    def do_HEAD(self) -> None:
        self.do_GET()


def serve(root: Path, token: str, port: int) -> ThreadingHTTPServer:
    """A server of `root` on every address, not yet started; port 0 takes a free one."""
    handler = type("RootHandler", (Handler,), {"root": root, "token": token})
    return ThreadingHTTPServer(("", port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve folders of models as the Hugging Face Hub does.")
    parser.add_argument("root", type=Path, help="has a folder <organisation>/<name> for each repository")
    parser.add_argument("token_file", type=Path, help="holds the one token that opens them")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    serve(arguments.root, arguments.token_file.read_text().strip(), arguments.port).serve_forever()


if __name__ == "__main__":
    main()
