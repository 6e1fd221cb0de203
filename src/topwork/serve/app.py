"""The routes: OpenAI's chat completions, completions and models, vLLM's adapters, and the page."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from topwork.errors import TopworkError
from topwork.serve.answers import Answer, Part
from topwork.serve.asked import Asked, RequestError, read
from topwork.serve.guard import Door, Guard
from topwork.serve.served import Served

LOOK = 0.25
"""Seconds between two looks whether a client is still there."""


def create_app(served: Served, door: Door | None = None) -> Starlette:
    """The ASGI application over one served model."""
    door, faces = door or Door(), Faces(served)
    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", faces.health),
            Route("/v1/models", faces.models),
            Route("/v1/chat/completions", faces.chat, methods=["POST"]),
            Route("/v1/completions", faces.complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", faces.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", faces.unload, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                CORSMiddleware, allow_origins=list(door.origins), allow_headers=["*"],
                allow_methods=["GET", "POST"],
            ),
            Middleware(Guard, door, served.limits.max_body),
        ],
        exception_handlers={TopworkError: _refused, Exception: _refused},
    )  # fmt: skip


async def page(request: Request) -> Response:
    """The page, which holds its style and its script and asks this server alone."""
    text = files("topwork.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


@dataclass(frozen=True)
class Faces:
    """The routes that answer for one served model."""

    served: Served

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "open": self.served.open})

    async def models(self, request: Request) -> Response:
        served = self.served
        entry = {"object": "model", "created": served.started, "owned_by": "topwork"}
        listed = [{"id": served.name, "root": served.name, "parent": None, **entry}]
        for name in served.adapters:
            listed.append({"id": name, "root": name, "parent": served.name, **entry})
        return JSONResponse({"object": "list", "data": listed})

    async def chat(self, request: Request) -> Response:
        return await self._reply(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._reply(request, chat=False)

    async def _reply(self, request: Request, chat: bool) -> Response:
        served = self.served
        body = await _body(request)
        # Templates, long texts and schemas take their time: not the event loop's.
        asked = await asyncio.to_thread(read, body, served.tokenizer, chat)
        heard = await served.heard(asked)
        answers = served.answers(asked, await asyncio.to_thread(served.rules, asked))
        reply = Reply(asked, served.name, answers, heard)
        if asked.stream:
            return Streamed(served, reply)
        try:
            return JSONResponse(await _while_there(request, reply.whole()))
        finally:
            served.leave(answers)

    async def load(self, request: Request) -> Response:
        name, path = await _fields(request, "lora_name", "lora_path")
        await self.served.load(name, path)
        return PlainTextResponse(f"Success: adapter {name} is loaded")

    async def unload(self, request: Request) -> Response:
        (name,) = await _fields(request, "lora_name")
        await self.served.unload(name)
        return PlainTextResponse(f"Success: adapter {name} is forgotten")


async def _refused(request: Request, error: Exception) -> Response:
    told = _told(error)
    return JSONResponse(told.body(), told.status)


def _told(error: Exception) -> RequestError:
    """What a client is told of an error; of one that nobody meant, only its kind."""
    if isinstance(error, RequestError):
        return error
    known = isinstance(error, TopworkError)
    return RequestError(str(error) if known else type(error).__name__, status=500)


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error


async def _fields(request: Request, *names: str) -> list[str]:
    body = await _body(request)
    found = [body.get(name) if isinstance(body, dict) else None for name in names]
    for name, value in zip(names, found):
        if not isinstance(value, str) or not value:
            raise RequestError(f"the body must be an object with {name}, a text", name)
    return [str(value) for value in found]


async def _while_there(request: Request, work: Any) -> Any:
    """What `work` gives, unless the client leaves, which ends it."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=LOOK))[0]:
            if await request.is_disconnected():
                raise RequestError("the client has left", status=499)
        return task.result()
    finally:
        task.cancel()


class Streamed(StreamingResponse):
    """The messages of `reply` as events; however it ends, also before the first, its answers do."""

    def __init__(self, served: Served, reply: Reply) -> None:
        self.served, self.reply = served, reply
        super().__init__(self._events(), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.served.leave(self.reply.answers)

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for message in self.reply.stream():
                yield f"data: {json.dumps(message, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(_told(error).body())}\n\n"


class Reply:
    """The messages of one request, whole or as a stream."""

    def __init__(
        self, asked: Asked, model: str, answers: Sequence[Answer], heard: Sequence[Any] = ()
    ) -> None:
        self.asked, self.answers, self.heard = asked, answers, heard
        kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind,
            "created": int(time.time()), "model": asked.model or model,
        }  # fmt: skip

    # -- whole -----------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        tasks = [asyncio.ensure_future(self._choice(answer)) for answer in self.answers]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def _choice(self, answer: Answer) -> dict[str, Any]:
        text = "".join([part.text async for part in answer.parts()])
        places = range(len(answer.ids))
        choice: dict[str, Any] = {"index": answer.index}
        if self.asked.chat:
            choice["message"] = answer.message(text)
            choice["logprobs"] = answer.chat_logprobs(places)
        else:
            choice["text"] = text
            choice["logprobs"] = answer.text_logprobs(places)
        if self.asked.with_ids:
            choice["token_ids"] = answer.ids
        if self.heard:
            choice["prompt_logprobs"] = self.heard[answer.index // self.asked.count]
        return {**choice, "finish_reason": answer.finish}

    def usage(self) -> dict[str, int]:
        read = sum(len(prompt) for prompt in self.asked.prompts)
        made = sum(len(answer.ids) for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    # -- a stream --------------------------------------------------------------------------------

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The messages in the order in which they are made; answers with tools come whole, for
        only then it is known what is a call."""
        queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._told(answer, queue)) for answer in self.answers]
        try:
            left = len(tasks)
            while left:
                message = await queue.get()
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    left -= 1
                else:
                    yield message
            if self.asked.usage:
                yield {**self._chunk(), "choices": [], "usage": self.usage()}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _told(self, answer: Answer, queue: asyncio.Queue[Any]) -> None:
        try:
            if self.asked.chat:
                start = {"role": "assistant", "content": ""}
                queue.put_nowait(self._piece(answer, {"delta": start}, None))
            if self.asked.tools:
                await self._told_whole(answer, queue)
            else:
                shown = 0
                async for part in answer.parts():
                    if part.text or part.finish:
                        at = len(answer.ids) if part.at is None else part.at + 1
                        queue.put_nowait(self._part(answer, part, range(shown, at)))
                        shown = at
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def _told_whole(self, answer: Answer, queue: asyncio.Queue[Any]) -> None:
        text = "".join([part.text async for part in answer.parts()])
        message = answer.message(text)
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
        delta = {"content": message["content"], **({"tool_calls": calls} if calls else {})}
        piece = {"delta": delta, "logprobs": answer.chat_logprobs(range(len(answer.ids)))}
        queue.put_nowait(self._piece(answer, piece, answer.finish))

    def _part(self, answer: Answer, part: Part, places: range) -> dict[str, Any]:
        if self.asked.chat:
            piece: dict[str, Any] = {"delta": {"content": part.text} if part.text else {}}
            piece["logprobs"] = answer.chat_logprobs(places)
        else:
            piece = {"text": part.text, "logprobs": answer.text_logprobs(places)}
        if self.asked.with_ids:
            piece["token_ids"] = [answer.ids[i] for i in places]
        return self._piece(answer, piece, part.finish)

    def _piece(self, answer: Answer, piece: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": answer.index, **piece, "finish_reason": finish}
        return {**self._chunk(), "choices": [choice]}

    def _chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return {**self.head, "object": kind}
