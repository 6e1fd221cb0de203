"""A server of `topwork.serve` on loopback, in a thread, and a client of a few lines."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import uvicorn

from topwork.serve import Door, Limits, Served, create_app


@contextmanager
def running(model, tokenizer, door=None, limits=None, **options):
    """The port and what is served."""
    served = Served(model.eval(), tokenizer, "tiny", limits or Limits(max_new_tokens=64), **options)
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(served, door or Door())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], served
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def ask(port, path, body=None, headers=None, raw=None):
    """Status and answer: of JSON, of a stream its events, else the text."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    link.request("GET" if data is None else "POST", path, data, headers or {})
    reply = link.getresponse()
    text, kind = reply.read().decode(), reply.headers.get("content-type", "")
    link.close()
    if "event-stream" in kind:
        events = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
        assert events.pop() == "[DONE]"
        return reply.status, [json.loads(e) for e in events]
    return reply.status, json.loads(text) if "json" in kind else text


@contextmanager
def process(*words):
    """The address of `topwork serve WORDS`, a process of its own."""
    start = [sys.executable, "-c", "from topwork.cli.main import main; main()", "serve"]
    command = [*start, *map(str, words), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            line = running.stdout.readline()
            address = re.match(r"(http://127\.0\.0\.1:\d+)/ is the page", line)
            assert address, line
            yield address[1]
        finally:
            running.send_signal(signal.SIGINT)
            assert running.wait(20) in (0, -signal.SIGINT, 130)
