"""Rollouts by a vLLM server, over its public API: completions, and adapters loaded while it runs.

Start it where it reads this run's files, so that it may take up the adapter at each step:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 64 \
        --logprobs-mode processed_logprobs

`topwork serve BASE --load-adapters --processed-logprobs` does the same.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from topwork.errors import ConfigError, TrainingError
from topwork.objectives.rollouts import Answer
from topwork.peft import PeftModel
from topwork.peft.files import beyond_lora
from topwork.training.distributed import World

REQUESTS = 64  # at a time
TOKEN = "token_id:"


@dataclass
class ServerWriter:
    """A server at `url`. Its adapters lie in `folder`, the newest `keep` of them loaded."""

    url: str
    options: Mapping[str, Any]
    folder: Path
    keep: int = 1
    timeout: float = 600.0
    world: World = field(default_factory=World)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.url = address_of(self.url, "rollout_server")

    def follow(self, model: Any, step: int) -> None:
        """Let the server load the adapter as it is, under a name of its own."""
        if not isinstance(model, PeftModel):
            raise ConfigError("rollout_server takes up adapters alone: pass peft_config")
        check_servable(model)
        name = f"topwork-{self.folder.parent.name}-{step}"
        if name in self.loaded:
            return
        path = self.folder / name
        if self.world.is_main:
            model.save_pretrained(path, selected_adapters=[model.active_adapter])
            where = path if model.active_adapter == "default" else path / model.active_adapter
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(where.resolve())})
        self.world.wait()
        self.loaded.append(name)
        while len(self.loaded) > self.keep:
            old = self.loaded.pop(0)
            if self.world.is_main:
                self._post("unload_lora_adapter", {"lora_name": old})
                _remove(self.folder / old)

    def write(
        self, model: Any, texts: Sequence[Sequence[int]], limits: Sequence[int], seeds: list[int]
    ) -> list[Answer]:
        name = self.loaded[-1]
        with ThreadPoolExecutor(min(REQUESTS, len(texts))) as pool:
            asked = [
                pool.submit(self._one, name, list(text), limit, seed)
                for text, limit, seed in zip(texts, limits, seeds)
            ]
            return [one.result() for one in asked]

    def _one(self, name: str, text: list[int], limit: int, seed: int) -> Answer:
        asked = self.options
        body: dict[str, Any] = {
            "model": name, "prompt": text, "max_tokens": limit, "seed": seed, "n": 1,
            "temperature": asked["temperature"], "top_p": asked["top_p"],
            "top_k": asked["top_k"] or -1, "min_p": asked["min_p"] or 0.0,
            "repetition_penalty": asked["repetition_penalty"],
            "stop_token_ids": [asked["eos_token_id"]], "skip_special_tokens": False,
            "logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = self._post("completions", body)
        try:
            choice = found["choices"][0]
            ids = choice.get("token_ids")
            told = choice["logprobs"]
            if ids is None:
                ids = [int(t.removeprefix(TOKEN)) for t in told["tokens"]]
            logprobs = [float("nan") if p is None else float(p) for p in told["token_logprobs"]]
            ended = choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.url}: the answer has no token ids with their log-probabilities "
                f"({type(error).__name__}: {error}): {str(found)[:300]}"
            ) from error
        if len(ids) != len(logprobs) or not ids:
            raise TrainingError(
                f"{self.url}: {len(ids)} tokens came with {len(logprobs)} log-probabilities"
            )
        return Answer(list(ids), ended, logprobs)

    def _post(self, verb: str, body: dict[str, Any]) -> Any:
        return ask(self.url, verb, body, self.timeout, "rollout_server")


def address_of(url: str, name: str) -> str:
    """The server's address without its version. ConfigError, naming the field, for none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name}={url!r} is no address like http://host:8000")
    return url.rstrip("/").removesuffix("/v1")


def ask(url: str, verb: str, body: dict[str, Any] | None, timeout: float, name: str) -> Any:
    """What the server at `url` answers to `verb` of its API: of JSON, else the text.

    TrainingError when it refuses or cannot be reached; `name`: the field that has its address.
    """
    address = f"{url}/v1/{verb}"
    request = urllib.request.Request(
        address, None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        hint = ""
        if error.code == 404 and "lora" in verb:
            hint = "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        raise TrainingError(f"{address} answered {error.code}: {said}{hint}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise TrainingError(
            f"{address} cannot be reached ({reason}): is the server of {name} running?"
        ) from error
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_servable(model: PeftModel) -> None:
    """ConfigError for an active adapter of which the server would leave something out: it knows
    low-rank terms on linears, and nothing else."""
    if len(model.active_adapters) != 1:
        raise ConfigError(f"rollout_server takes one adapter, {model.active_adapters} are active")
    config: Any = model.active_peft_config
    if config.peft_type != "LORA":
        raise ConfigError(f"rollout_server takes LoRA adapters, not {config.peft_type}")
    if found := beyond_lora(config):
        raise ConfigError(
            f"rollout_server: vLLM leaves {', '.join(found)} out of an adapter, so its answers "
            "would not be the policy's; leave it out, or draw in this process"
        )


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
