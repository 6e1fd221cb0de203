"""A server on loopback that tells log-probabilities of prompts as vLLM's does."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Teacher(ThreadingHTTPServer):
    """`model` as "teacher"; `calls` holds what was asked; `broken` changes an answer."""

    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.calls, self.broken = model.eval(), [], None
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    @torch.no_grad()
    def told(self, ids, count):
        with self.lock:
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [None]
        for place, token in enumerate(ids[1:]):
            order = logprobs[place].argsort(descending=True).tolist()
            entry = {str(token): order.index(token) + 1}
            entry |= {str(other): rank for rank, other in enumerate(order[:count], 1)}
            found.append(
                {
                    other: {"logprob": logprobs[place, int(other)].item(), "rank": rank,
                            "decoded_token": "?"}
                    for other, rank in entry.items()
                }
            )  # fmt: skip
        return found


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._say({"object": "list", "data": [{"id": "teacher", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body))
        told = self.server.told(body["prompt"], body["prompt_logprobs"])
        answer = {"choices": [{"index": 0, "text": "?", "prompt_logprobs": told}]}
        self._say(self.server.broken(answer) if self.server.broken else answer)

    def _say(self, answer):
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        """Nothing is printed."""


@contextmanager
def teaching(model):
    server = Teacher(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
