"""A hub on localhost, as far as ``huggingface_hub`` needs one to look up a model and fetch its files.

A stand-in: the real hub cannot be reached from where these tests run. It speaks the endpoints that the client calls
(model info, tree, resolve with HEAD, GET and ranges), and it keeps a list of what was asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models by id, each a folder; gated ids; and ``(method, file, bytes sent)`` of what was fetched."""

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    fetched: list[tuple[str, str, int]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            if api:
                parts = parts[2:]
            repo, rest = "/".join(parts[:2]), parts[2:]
            folder = hub.models.get(repo)
            if folder is None:
                return self.send(b"{}", 401, {"X-Error-Code": "RepoNotFound"})
            if api and rest[:1] != ["tree"]:
                files = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                return self.send_json({"id": repo, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
            if repo in hub.gated:
                return self.send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
            if api:
                entries = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)}
                    for p in sorted(folder.iterdir())
                ]
                return self.send_json(entries)
            path = folder / "/".join(rest[2:])
            if rest[:1] != ["resolve"] or not path.is_file():
                return self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
            return self.send_file(path)

        def send_file(self, path: Path) -> None:
            content, status = path.read_bytes(), 200
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[int(first) : int(last or len(content)) + 1], 206
            hub.fetched.append((self.command, path.name, len(content) if self.command == "GET" else 0))
            self.send(content, status, headers)

        def send_json(self, value: object) -> None:
            self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

        def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(path: Path) -> str:
    """What names a file's contents."""
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
