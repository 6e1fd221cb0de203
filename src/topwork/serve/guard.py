"""Who may ask, and how much: keys, hosts, origins and the size of a body, before any route."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topwork.errors import ConfigError
from topwork.serve.asked import RequestError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/health")


@dataclass(frozen=True)
class Door:
    """`hosts`: the names under which the server may be asked, None for any (which needs a `key`):
    a page on the web cannot make a browser ask a server on loopback under another name.
    `origins`: of pages, other than its own, that may ask."""

    key: str | None = None
    hosts: Sequence[str] | None = LOOPBACK
    origins: Sequence[str] = ()

    @classmethod
    def at(cls, host: str, key: str | None, origins: Sequence[str] = ()) -> Door:
        """For a server that listens at `host`. ConfigError where anybody could ask."""
        if host in LOOPBACK:
            return cls(key, LOOPBACK, tuple(origins))
        if not key:
            raise ConfigError(
                f"host={host!r} can be reached from other machines: set an API key (--api-key or "
                "TOPWORK_API_KEY), or listen at 127.0.0.1"
            )
        return cls(key, None, tuple(origins))

    def check(self, path: str, headers: Headers) -> None:
        """RequestError for what may not pass."""
        host = _name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise RequestError(f"this server is not asked as {host!r}", status=403, code="host")
        origin = headers.get("origin")
        if origin and origin not in self.origins and urlsplit(origin).netloc != headers.get("host"):
            raise RequestError(f"pages of {origin} may not ask (--allow-origin)", status=403)
        if self.key and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            fits = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not fits:
                raise RequestError(
                    "the API key is missing or wrong", status=401, code="invalid_api_key"
                )


def _name(host: str) -> str:
    """A Host header without its port."""
    return (urlsplit(f"//{host}").hostname or "") if host else ""


class Guard:
    """Lets a request through `door` if it is no larger than `limit` bytes."""

    def __init__(self, app: ASGIApp, door: Door, limit: int) -> None:
        self.app, self.door, self.limit = app, door, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self.door.check(scope["path"], headers)
            if int(headers.get("content-length") or 0) > self.limit:
                raise self._large()
        except (RequestError, ValueError) as error:
            known = error if isinstance(error, RequestError) else RequestError(f"headers: {error}")
            await JSONResponse(known.body(), known.status)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:  # it may have said less, or nothing
                raise self._large()
            return message

        await self.app(scope, counted, send)

    def _large(self) -> RequestError:
        return RequestError(f"the body is larger than {self.limit} bytes", status=413)
