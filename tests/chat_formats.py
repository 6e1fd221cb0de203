"""Chat formats in wide use: each a template, and the same format written out by hand in Python.

`write(messages)` gives (text, trained) pieces: what the format's own documentation says, with
True on what the model has to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Pieces = list[tuple[str, bool]]
SPECIALS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|eom_id|>",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "<|calls_begin|>", "<|calls_end|>", "<|channel|>", "<|message|>",
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    name: str
    template: str
    write: Callable[..., Pieces]
    eos: str = "</s>"
    bos: str = "<s>"
    system: bool = True
    alternates: bool = False
    tools: bool = False
    tags: str | None = None  # the same template with {% generation %}, where it can have them
    variables: dict[str, Any] = field(default_factory=dict)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TAGS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", own)]
        pieces.append(("\n", False))
    return pieces


# SmolLM2 puts a system message of its own before a chat that has none.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
) + CHATML.removeprefix("{% for m in messages %}")


def smollm2(messages: list[dict[str, Any]]) -> Pieces:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful AI assistant"}, *messages]
    return chatml(messages)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA3_TAGS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def llama3(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return pieces


# The first Llama 3 files wrote the answer's header always, asked or not.
LLAMA3_EAGER = LLAMA3.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")


def llama3_eager(messages: list[dict[str, Any]]) -> Pieces:
    return [*llama3(messages), ("<|start_header_id|>assistant<|end_header_id|>\n\n", False)]


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)


def mistral(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        if m["role"] == "user":
            pieces.append((f"[INST] {m['content']} [/INST]", False))
        else:
            pieces.append((f" {m['content']}</s>", True))
    return pieces


# Later Mistral files hold the system text back for the last question, and tools stand before it.
MISTRAL_LATE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + "
    "'[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' + m.content + "
    "'[/INST]' }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS][' }}{% for call in m.tool_calls %}"
    "{{ call.function | tojson }}{{ ', ' if not loop.last else '' }}{% endfor %}{{ ']' + eos_token"
    " }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}"
    "{% endfor %}"
)


def mistral_late(messages: list[dict[str, Any]], tools: Any = None) -> Pieces:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages[1:] if system is not None else messages
    last = max(k for k, m in enumerate(rest) if m["role"] == "user")
    same = [k for k, m in enumerate(rest) if m == rest[last]]
    pieces: Pieces = [("<s>", False)]
    for k, m in enumerate(rest):
        if m["role"] == "user":
            if tools and k in same:
                text = f"[AVAILABLE_TOOLS]{json.dumps(tools)}[/AVAILABLE_TOOLS]"
                pieces.append((text, False))
            lead = f"{system}\n\n" if system is not None and k + 1 == len(rest) else ""
            pieces.append((f"[INST]{lead}{m['content']}[/INST]", False))
        elif "tool_calls" in m:
            calls = ", ".join(
                json.dumps(c["function"], ensure_ascii=False) for c in m["tool_calls"]
            )
            pieces.append((f"[TOOL_CALLS][{calls}]</s>", True))
        elif m["role"] == "assistant":
            pieces.append((f" {m['content'].strip()}</s>", True))
        else:
            pieces.append((f"[TOOL_RESULTS]{m['content']}[/TOOL_RESULTS]", False))
    return pieces


GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        own = m["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if own else m['role']}\n", False))
        pieces += [(m["content"].strip() + "<end_of_turn>", own), ("\n", False)]
    return pieces


# Gemma 3 puts the system text in front of the first question.
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set lead = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set lead = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(lead if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3(messages: list[dict[str, Any]]) -> Pieces:
    if messages[0]["role"] == "system":
        lead, *rest = messages
        begin, header, first, *more = gemma(rest)
        return [begin, header, (lead["content"] + "\n\n", False), first, *more]
    return gemma(messages)


PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi3(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        pieces += [(f"<|{m['role']}|>\n", False), (m["content"] + "<|end|>", own), ("\n", False)]
    return [*pieces, ("</s>", False)]


ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)


def zephyr(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        pieces += [(f"<|{m['role']}|>\n", False), (m["content"] + "</s>", own), ("\n", False)]
    return pieces


ONCE = (  # plain words, closed only by one eos at the very end
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def once(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for k, m in enumerate(messages):
        own, last = m["role"] == "assistant", k + 1 == len(messages)
        pieces.append((f"### {m['role']}:\n", False))
        if own and last:
            pieces.append((m["content"] + "\n\n</s>", True))
        else:
            pieces += [(m["content"], own), ("\n\n", False)]
            pieces += [("</s>", False)] if last else []
    return pieces


QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' + tools | tojson + '</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and m.role == 'user' %}
        {%- set ns.looking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content or '' %}{%- set thought = '' %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string
                else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def qwen3(
    messages: list[dict[str, Any]], tools: Any = None, enable_thinking: bool = True
) -> Pieces:
    pieces: Pieces = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        lead = f"{system}\n\n" if system is not None else ""
        text = f"<|im_start|>system\n{lead}<tools>{json.dumps(tools)}</tools><|im_end|>\n"
        pieces.append((text, False))
    elif system is not None:
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    last = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
    for k, m in enumerate(messages):
        role = m["role"]
        if role == "user" or (role == "system" and k):
            pieces.append((f"<|im_start|>{role}\n{m['content']}<|im_end|>\n", False))
        elif role == "assistant":
            pieces.append(("<|im_start|>assistant\n", False))
            pieces += _qwen3_turn(m, k > last, k + 1 == len(messages), enable_thinking)
            pieces.append(("\n", False))
        elif role == "tool":
            first = messages[k - 1]["role"] != "tool"
            final = k + 1 == len(messages) or messages[k + 1]["role"] != "tool"
            text = "<|im_start|>user" if first else ""
            text += f"\n<tool_response>\n{m['content']}\n</tool_response>"
            pieces.append((text + ("<|im_end|>\n" if final else ""), False))
    return pieces


def _qwen3_turn(m: dict[str, Any], recent: bool, final: bool, thinking: bool) -> Pieces:
    content, thought = m["content"] or "", m.get("reasoning_content", "")
    if "</think>" in content and not thought:
        before, _, after = content.rpartition("</think>")
        thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        content = after.lstrip("\n")
        assert before
    pieces: Pieces = []
    if recent and (final or thought):
        text = f"<think>\n{thought}\n</think>\n\n"
        pieces.append((text, thinking or bool(thought)))
        content = content.lstrip("\n")
    text = content
    for n, call in enumerate(m.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text += "\n" if content or n else ""
        text += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}'
        text += "\n</tool_call>"
    return [*pieces, (text + "<|im_end|>", True)]


# Calls inside special tokens of their own, before the end of the turn.
CALLS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{{ m.content or '' }}{% if m.tool_calls %}{{ '<|calls_begin|>' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + '\n' + c.function.arguments | tojson + '\n' }}{% endfor %}"
    "{{ '<|calls_end|>' }}{% endif %}{{ eos_token }}{% else %}"
    "{{ '<|user|>' + m.role + ' ' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def calls(messages: list[dict[str, Any]], tools: Any = None) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        if m["role"] != "assistant":
            pieces.append((f"<|user|>{m['role']} {m['content']}", False))
            continue
        text = m["content"] or ""
        if m.get("tool_calls"):
            each = [
                c["function"]["name"] + "\n" + json.dumps(c["function"]["arguments"]) + "\n"
                for c in m["tool_calls"]
            ]
            text += "<|calls_begin|>" + "".join(each) + "<|calls_end|>"
        pieces += [("<|assistant|>", False), (text + "</s>", True)]
    return pieces


# A thought in its own channel, closed and reopened by special tokens inside one turn.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|im_start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{% endif %}{{ '<|im_start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|im_end|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def channels(messages: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for k, m in enumerate(messages):
        last = k + 1 == len(messages)
        if m["role"] != "assistant":
            text = f"<|im_start|>{m['role']}<|message|>{m['content']}<|end|>"
            pieces.append((text, False))
            continue
        text = ""
        if m.get("thinking") and last:
            text = f"<|channel|>analysis<|message|>{m['thinking']}<|end|><|im_start|>assistant"
        text += f"<|channel|>final<|message|>{m['content']}{'<|im_end|>' if last else '<|end|>'}"
        pieces += [("<|im_start|>assistant", False), (text, True)]
    return pieces


FORMATS = [
    Format("chatml", CHATML, chatml, eos="<|im_end|>", tags=CHATML_TAGS),
    Format("smollm2", SMOLLM2, smollm2, eos="<|im_end|>"),
    Format("llama3", LLAMA3, llama3, "<|eot_id|>", "<|begin_of_text|>", tags=LLAMA3_TAGS),
    Format("llama3-eager", LLAMA3_EAGER, llama3_eager, "<|eot_id|>", "<|begin_of_text|>"),
    Format("mistral", MISTRAL, mistral, system=False, alternates=True),
    Format("mistral-late", MISTRAL_LATE, mistral_late, alternates=True, tools=True),
    Format("gemma", GEMMA, gemma, "</s>", system=False, alternates=True),
    Format("gemma3", GEMMA3, gemma3, "</s>", alternates=True),
    Format("phi3", PHI3, phi3),
    Format("zephyr", ZEPHYR, zephyr),
    Format("once", ONCE, once),
    Format("qwen3", QWEN3, qwen3, eos="<|im_end|>", tools=True),
    Format(
        "qwen3-quiet", QWEN3, qwen3, eos="<|im_end|>", tools=True,
        variables={"enable_thinking": False},
    ),
    Format("calls", CALLS, calls, tools=True),
    Format("channels", CHANNELS, channels, eos="<|im_end|>"),
]  # fmt: skip
