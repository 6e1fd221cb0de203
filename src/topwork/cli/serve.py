"""`topwork serve`: a model and its adapters over HTTP."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from topwork.cli import talk
from topwork.errors import ConfigError
from topwork.serve import Door, Limits, Served, create_app


def load(
    model: str, adapters: list[str], name: str | None, dtype: str, bits: list[str]
) -> tuple[Any, Any, str]:
    """The model with its adapters, the tokenizer, and the model's name."""
    model, own = talk.base_of(model)
    named = {} if own is None else {Path(own).resolve().name: own}
    for one in adapters:
        given, equals, path = one.partition("=")
        path = path if equals else one
        given = given if equals else Path(path).resolve().name
        if given in named:
            raise ConfigError(f"two adapters are called {given!r}: name them, NAME=PATH")
        named[given] = path
    name = name or (Path(model).stem if Path(model).exists() else model)
    return *talk.load_several(model, named, dtype, bits), name


def serve(
    model: str, adapters: list[str], name: str | None, dtype: str, bits: list[str],
    *, door: Door, limits: Limits, host: str, port: int, **options: Any,
) -> None:  # fmt: skip
    """Load what `model` and `adapters` name and serve it until it is stopped."""
    import uvicorn

    with listen(host, port) as listening:
        net, tokenizer, name = load(model, adapters, name, dtype, bits)
        served = Served(net.eval(), tokenizer, name, limits, **options)
        at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        names = ", ".join([name, *served.adapters])
        print(f"{at}/ is the page, {at}/v1 the API: {names}", flush=True)
        app = create_app(served, door)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`. ConfigError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from error
