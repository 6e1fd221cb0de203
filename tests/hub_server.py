"""A small Hub on loopback: the few routes that huggingface_hub asks for to get and put files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(
    models: dict[str, Path], token: str | None = None, uploads: Path | None = None
) -> Iterator[str]:
    """Serve each folder of `models` (by "owner/name"); yields the endpoint's address.

    With `uploads`, new repositories are made below that folder, and commits write their files.
    """

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

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self.fail(401, "GatedRepo")
            path = self.path.strip("/").partition("?")[0].split("/")
            if uploads is None or path[0] != "api":
                return self.fail(404, "RepoNotFound")
            if path[1:] == ["repos", "create"]:
                name = json.loads(body)["name"]
                folder = uploads / f"me--{name}"
                folder.mkdir(parents=True, exist_ok=True)
                models[f"me/{name}"] = folder
                return self.say({"url": f"http://{self.headers['Host']}/me/{name}", "id": name})
            if path[1:] == ["validate-yaml"]:
                return self.say({"errors": [], "warnings": []})
            folder = models["/".join(path[2:4])]
            if path[4] == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for f in files]  # fmt: skip
                return self.say({"files": modes})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            address = f"http://{self.headers['Host']}/{'/'.join(path[2:4])}/commit/{COMMIT}"
            return self.say({"commitUrl": address, "commitOid": COMMIT, "success": True})

        def say(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
