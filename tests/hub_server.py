"""A small Hub on loopback: the few routes that huggingface_hub asks for when it downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(models: dict[str, Path], token: str | None = None) -> Iterator[str]:
    """Serve each folder of `models` (by "owner/name"); yields the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, with_body: bool) -> None:
            owner, name, verb, revision, *rest = [*self.path.strip("/").split("/"), "", "", ""]
            folder = models.get(f"{owner}/{name}")
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self.fail(401, "GatedRepo")
            if folder is None or verb != "resolve":
                return self.fail(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.fail(404, "RevisionNotFound")
            path = folder / "/".join(part for part in rest if part)
            if not path.is_file():
                return self.fail(404, "EntryNotFound")
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)
            return None

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
