"""HTTP servers with faults: one plays the hosts of `data/sources.csv`, the other the hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one response with content."""

    cut: int | None = None
    """The connection is closed after this many bytes of the content."""
    announced: int | None = None
    """`Content-Length`, if it is not that of the content."""
    status: int | None = None
    """The host responds this status and no content."""
    flip: int | None = None
    """Position, in the content of this response, of one byte that arrives with another value."""
    shift: int = 0
    """The content of a range request starts this many bytes too late, as `Content-Range` says."""


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, bytes by URL path without the leading slash. Each response with content takes the next of `faults`."""

    def __init__(self, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []
        self.errors: list[str] = []

    def next_fault(self) -> Fault:
        """Remove and return the first fault, or one without effect."""
        return self.faults.pop(0) if self.faults else Fault()

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}".rstrip("/")


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
        else:
            self.send_content(content, self.server.next_fault())

    def send_content(self, content: bytes, fault: Fault, **headers: str) -> None:
        """Send the content, or the requested range of it, with a fault."""
        # 1. Find the range.
        if fault.status is not None:
            self.send_error(fault.status)
            return
        requested = self.headers.get("Range") if self.server.ranges else None
        start, _, end = requested.removeprefix("bytes=").partition("-") if requested else ("0", "", "")
        first, last = int(start) + fault.shift * bool(requested), int(end or len(content) - 1)
        if first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return

        # 2. Send the headers and the content.
        part = bytearray(content[first : last + 1])
        self.send_response(206 if requested else 200)
        if requested:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part) if fault.announced is None else fault.announced))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if fault.flip is not None:
            part[fault.flip] ^= 1
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(part[: fault.cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server in a thread until the end of the context."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -------------------------------------------------------------------------------------------------------------- the hub
class Hub(Server):
    """The hub's HTTP interface to the repositories `root`/owner/name, each with one commit on the branch `main`.

    As on the hub, weights are large files: a request for one is redirected to another host (here another name of this one),
    and its ETag is its SHA-256. Only responses with large files have faults.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(HubHandler)
        self.repositories = {
            path.parent.relative_to(root).as_posix(): Repository(path.parent) for path in root.glob("*/*/model_index.json")
        }


class Repository:
    """Files of a repository by path, and its commit, which is derived from them."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        names = sorted(self.files)
        self.commit = hashlib.sha1("".join(f"{name} {etag(name, self.files[name])}\n" for name in names).encode()).hexdigest()


def is_large(path: str) -> bool:
    """Return whether a file is stored in LFS."""
    return path.endswith(".safetensors")


def etag(path: str, content: bytes) -> str:
    """Return the SHA-256 of a large file, and git's blob id of another file."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class HubHandler(Handler):
    """`/api/models/ID[/revision/REV | /tree/REV[/FOLDER]]`, `/ID/resolve/REV/PATH` and `/cdn/ID/PATH`."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        place = "api" if parts[:2] == ["api", "models"] else "cdn" if parts[0] == "cdn" else "resolve"
        parts = parts[{"api": 2, "cdn": 1, "resolve": 0}[place] :]
        repository, rest = self.server.repositories.get("/".join(parts[:2])), parts[2:]
        if repository is None:  # the hub answers so to anonymous clients, because the repository may be private
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif place == "cdn":
            self.send_content(repository.files["/".join(rest)], self.server.next_fault())
        elif len(rest) > 1 and rest[1] not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif place == "api":
            self.send_json(self.describe("/".join(parts[:2]), repository, rest, "blobs" in parse_qs(url.query)))
        else:
            self.send_file("/".join(parts[:2]), repository, "/".join(rest[2:]))

    def describe(self, name: str, repository: Repository, rest: list[str], with_sizes: bool) -> object:
        """Return the record of a repository, or the list of its files below a folder (`tree`)."""
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            return [
                {"type": "file", "oid": etag(path, content), "size": len(content), "path": path}
                | ({"lfs": {"oid": etag(path, content), "size": len(content), "pointerSize": 135}} if is_large(path) else {})
                for path, content in sorted(repository.files.items())
                if path.startswith(f"{folder}/" if folder else "")
            ]
        siblings: list[dict[str, object]] = []
        for path, content in sorted(repository.files.items()):
            oid = etag(path, content)
            lfs = {"lfs": {"sha256": oid, "size": len(content), "pointerSize": 135}} if is_large(path) else {}
            siblings.append({"rfilename": path} | ({"size": len(content), "blobId": oid} | lfs if with_sizes else {}))
        return {
            **{"_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": repository.commit},
            **{"lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z", "private": False},
            **{"gated": False, "disabled": False, "tags": ["diffusers", "license:openrail++"], "downloads": 0, "likes": 0},
            **{"library_name": "diffusers", "cardData": {"license": "openrail++"}, "siblings": siblings},
        }

    def send_file(self, name: str, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        if not is_large(path):
            self.send_content(content, Fault(), ETag=f'"{etag(path, content)}"', X_Repo_Commit=repository.commit)
            return
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{name}/{path}")
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("X-Linked-ETag", f'"{etag(path, content)}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, document: object) -> None:
        self.send_response(200)
        content = json.dumps(document).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.server.errors.append(f"{self.path}: {message}")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
