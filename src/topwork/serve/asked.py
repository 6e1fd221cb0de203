"""What a request says: OpenAI's fields and those that vLLM has beside them, read and checked."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.errors import TopworkError, nearest
from topwork.text import Tokenizer
from topwork.text.chat import apply_chat_template

# Without effect on an answer.
INERT = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "spaces_between_special_tokens", "include_stop_str_in_output", "priority",
    "request_id",
})  # fmt: skip
# Fields that go to the engine under another name, or as they are.
DRAWN = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "seed": "seed", "min_tokens": "min_new_tokens",
    "task_id": "task_id",
}  # fmt: skip
SAID = frozenset({
    *DRAWN, "model", "stream", "stream_options", "n", "stop", "stop_token_ids", "ignore_eos",
    "max_tokens", "logit_bias", "logprobs", "response_format", "structured_outputs",
    "skip_special_tokens", "return_token_ids", "return_tokens_as_token_ids",
})  # fmt: skip
CHAT = SAID | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
}  # fmt: skip
TEXT = SAID | {"prompt", "prompt_logprobs", "echo", "suffix", "best_of"}
KINDS: dict[str, tuple[type, ...]] = {
    "temperature": (int, float), "top_p": (int, float), "min_p": (int, float), "top_k": (int,),
    "repetition_penalty": (int, float), "presence_penalty": (int, float), "seed": (int,),
    "frequency_penalty": (int, float), "min_tokens": (int,), "max_tokens": (int,), "n": (int,),
    "max_completion_tokens": (int,), "top_logprobs": (int,), "logit_bias": (dict,),
    "task_id": (int,),
    "stop": (str, list), "stop_token_ids": (list,), "messages": (list,), "tools": (list,),
    "model": (str,), "stream": (bool,), "response_format": (dict,), "structured_outputs": (dict,),
}  # fmt: skip
# How a template is applied, which is the server's to say.
OWN = frozenset(inspect.signature(apply_chat_template).parameters)
MOST = 128
"""Answers of one request."""
TOP = 20
"""Log-probabilities of other tokens than the one that was made."""


class RequestError(TopworkError):
    """A request that is answered with an error. `status` is HTTP's, `param` the field."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self), "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request. `options` are the engine's."""

    model: str | None
    chat: bool
    prompts: list[list[int]]
    count: int
    options: dict[str, Any]
    limit: int | None
    stops: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    usage: bool = False
    """Tell the tokens in a stream's last message."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """The same of the prompt's own tokens."""
    constraint: dict[str, Any] = field(default_factory=dict)
    tools: bool = False
    skip_special: bool = True
    with_ids: bool = False
    """Give the tokens' ids."""
    as_ids: bool = False
    """Name tokens by their ids among the log-probabilities."""


def read(body: Any, tokenizer: Tokenizer, chat: bool) -> Asked:
    """A request's body. RequestError names the field that cannot be meant."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    known = CHAT if chat else TEXT
    for name, value in given.items():
        if name not in known | INERT and value not in (False, [], {}, ""):
            raise RequestError(f"{name!r} is not known here{nearest(name, known)}", name)
        if name in KINDS and not _is(value, KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in KINDS[name])
            raise RequestError(f"{name}={value!r} must be {kinds}", name)
    for name, neutral in (("echo", False), ("suffix", ""), ("best_of", 1)):
        if given.get(name, neutral) != neutral:
            raise RequestError(f"{name}={given[name]!r} is not offered", name)
    count = given.get("n", 1)
    prompts = [_chat(given, tokenizer)] if chat else _texts(given.get("prompt"), tokenizer)
    if not 1 <= count * len(prompts) <= MOST:
        raise RequestError(
            f"{len(prompts)} prompts of n={count} answers: at most {MOST} in all", "n"
        )
    stream_options = given.get("stream_options") or {}
    return Asked(
        model=given.get("model"),
        chat=chat,
        prompts=prompts,
        count=count,
        options=_options(given),
        limit=given.get("max_completion_tokens", given.get("max_tokens")),
        stops=_stops(given.get("stop", [])),
        stop_ids=_ids(given.get("stop_token_ids", []), "stop_token_ids"),
        ignore_eos=bool(given.get("ignore_eos", False)),
        stream=given.get("stream", False),
        usage=bool(stream_options.get("include_usage")),
        logprobs=_logprobs(given, chat),
        prompt_logprobs=_prompt_logprobs(given),
        constraint=_constraint(given),
        tools=_tools(given) is not None,
        skip_special=bool(given.get("skip_special_tokens", True)),
        with_ids=bool(given.get("return_token_ids", False)),
        as_ids=bool(given.get("return_tokens_as_token_ids", False)),
    )


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """How to draw. Without a temperature it is as the model's file says."""
    found = {ours: given[name] for name, ours in DRAWN.items() if name in given}
    found["top_k"] = max(0, found["top_k"]) if "top_k" in found else None
    if found["top_k"] is None:
        del found["top_k"]
    if found.get("temperature") == 0:
        del found["temperature"]
        found["do_sample"] = False
    elif {"temperature", "top_p", "top_k", "min_p"} & set(found):
        found["do_sample"] = True
        found.setdefault("top_k", 0)
    if bias := given.get("logit_bias"):
        try:
            found["sequence_bias"] = {(int(token),): float(by) for token, by in bias.items()}
        except (TypeError, ValueError) as error:
            raise RequestError(f"logit_bias={bias!r} is no {{id: number}}", "logit_bias") from error
    return found


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(f"stop={given!r} must be texts, none of them empty", "stop")
    return list(stops)


def _ids(given: Any, name: str) -> list[int]:
    if not isinstance(given, list) or not all(_is(i, (int,)) for i in given):
        raise RequestError(f"{name} must be a list of token ids", name)
    return given


def _logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    """How many other tokens' log-probabilities are wanted; None: no token's."""
    wanted = given.get("logprobs")
    if chat:
        if not wanted:
            return None
        wanted = given.get("top_logprobs", 0)
    if wanted is None or wanted is False:
        return None
    if not _is(wanted, (int,)) or not 0 <= wanted <= TOP:
        name = "top_logprobs" if chat else "logprobs"
        raise RequestError(f"{name}={wanted!r} must be from 0 to {TOP}", name)
    return wanted


def _prompt_logprobs(given: Mapping[str, Any]) -> int | None:
    wanted = given.get("prompt_logprobs")
    if wanted is None:
        return None
    if not _is(wanted, (int,)) or not 0 <= wanted <= TOP:
        raise RequestError(f"prompt_logprobs={wanted!r} must be from 0 to {TOP}", "prompt_logprobs")
    if given.get("stream") or given.get("task_id") is not None:
        raise RequestError("prompt_logprobs goes with neither stream nor task_id", "stream")
    return wanted


def _constraint(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `Constraint` takes, from OpenAI's response_format or vLLM's structured_outputs."""
    kind = (given.get("response_format") or {}).get("type", "text")
    if outputs := given.get("structured_outputs"):
        names = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
        if len(outputs) != 1 or not set(outputs) <= set(names) or kind != "text":
            raise RequestError(
                "structured_outputs is one of json, regex, grammar", "structured_outputs"
            )
        ((name, value),) = outputs.items()
        return {names[name]: value}
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    schema = (given["response_format"].get("json_schema") or {}).get("schema")
    if kind != "json_schema" or not isinstance(schema, dict):
        raise RequestError(
            'response_format is {"type": "text"}, {"type": "json_object"} or {"type": '
            '"json_schema", "json_schema": {"schema": …}}', "response_format",
        )  # fmt: skip
    return {"json_schema": schema}


def _tools(given: Mapping[str, Any]) -> Sequence[Any] | None:
    tools, choice = given.get("tools") or None, given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise RequestError(
            f'tool_choice={choice!r} is not offered: "auto" or "none"', "tool_choice"
        )
    for tool in tools or ():
        if not isinstance(tool, dict) or not (tool.get("function") or {}).get("name"):
            raise RequestError('tools are {"type": "function", "function": {"name": …}}', "tools")
    return None if choice == "none" else tools


def _texts(given: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """`prompt`: a text or ids, or a list of those."""
    one = isinstance(given, str) or (isinstance(given, list) and given and _is(given[0], (int,)))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        raise RequestError("prompt must be a text, token ids, or a list of those", "prompt")
    found = [
        tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else _ids(prompt, "prompt")
        for prompt in prompts
    ]
    if not all(found):
        raise RequestError("prompt is empty", "prompt")
    return found


def _chat(given: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    messages = [_message(m, i) for i, m in enumerate(given.get("messages") or [])]
    if not messages:
        raise RequestError("messages must hold one message at least", "messages")
    if tokenizer.chat_template is None:
        raise RequestError("the model has no chat template; use /v1/completions", "messages")
    go_on = bool(given.get("continue_final_message", False))
    variables = given.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict) or not OWN.isdisjoint(variables):
        taken = ", ".join(sorted(OWN & set(variables))) if isinstance(variables, dict) else "a list"
        raise RequestError(
            f"chat_template_kwargs are what the template itself reads, not {taken}",
            "chat_template_kwargs",
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=_tools(given),
            add_generation_prompt=bool(given.get("add_generation_prompt", not go_on)),
            continue_final_message=go_on,
            **variables,
        )
    except (TopworkError, TypeError) as error:
        raise RequestError(f"messages: {error}", "messages") from error


def _message(given: Any, number: int) -> dict[str, Any]:
    """A message as templates read it: its content one text, its calls' arguments objects."""
    where = f"messages[{number}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise RequestError(f"{where} must be an object with a role", "messages")
    message = {k: v for k, v in given.items() if v is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise RequestError(
                    f"{where}: content of type {kind!r} is not read here", "messages"
                )
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}: content must be a text or a list of parts", "messages")
    message["content"] = content
    if calls := message.get("tool_calls"):
        try:
            message["tool_calls"] = [_call(call) for call in calls]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"{where}: tool_calls cannot be read ({error})", "messages"
            ) from error
    return message


def _call(given: dict[str, Any]) -> dict[str, Any]:
    function = dict(given["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**given, "function": function}
