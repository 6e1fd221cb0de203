"""`topwork serve` as a process of its own."""

from __future__ import annotations

import json
import re
import socket
import urllib.request

import pytest
from typer.testing import CliRunner

import tiny
from serving import process
from topwork import LoraConfig, get_peft_model
from topwork.cli.main import app
from topwork.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base):
    found = []
    for name in ("red", "blue"):
        config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base))
        get_peft_model(tiny.model(), config).save_pretrained(base.parent / name)
        found.append(base.parent / name)
    return found


@pytest.mark.parametrize("given", ["a base", "an adapter"])
def test_a_model_and_its_adapters_by_their_names(base, adapters, given):
    red, blue = adapters
    words = [base, f"--adapter=rouge={red}", f"--adapter={blue}"] if given == "a base" else [red]
    names = ["base", "rouge", "blue"] if given == "a base" else ["base", "red"]
    with process(*words) as address, urllib.request.urlopen(f"{address}/v1/models") as reply:
        listed = json.load(reply)["data"]
    assert [m["id"] for m in listed] == names


def refused(words, message):
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    assert isinstance(result.exception, ConfigError)
    assert re.search(message, str(result.exception)), result.exception


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(adapters):
    refused(["absent", "--host", "0.0.0.0"], "set an API key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(["absent", "--port", port], f"cannot listen at 127.0.0.1:{port}")
    red = adapters[0]
    refused([red, "--adapter", red, "--port", 0], "two adapters are called 'red'")
