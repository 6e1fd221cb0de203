from __future__ import annotations

import pytest

from topwork.text.calls import Call, read_calls

ADD = Call("add", {"a": 1, "b": [2]})
JSON = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"so: <tool_call>\n{JSON}\n</tool_call>", "so:", [ADD]),
        (f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>", "", [ADD, ADD]),
        (f"<tool_call>{JSON}", "", [ADD]),
        (
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n"
            "</parameter>\n</function>\n</tool_call>",
            "", [ADD],
        ),
        ("<tool_call><function=say><parameter=x>a b</parameter></function></tool_call>", "",
         [Call("say", {"x": "a b"})]),
        (f"well [TOOL_CALLS] [{JSON}, {JSON}]", "well", [ADD, ADD]),
        (f"<|python_tag|>{JSON.replace('arguments', 'parameters')}", "", [ADD]),
        (JSON, "", [ADD]),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}', "", [ADD]),
        ("nothing to call", "nothing to call", []),
        ('{"answer": 3}', '{"answer": 3}', []),
    ],
)  # fmt: skip
def test_each_way_to_write_a_call_is_read(text, content, calls):
    assert read_calls(text) == (content, calls)


@pytest.mark.parametrize(
    ("body", "words"),
    [("{not json", "no JSON"), ('{"nam": 1}', '"name"'), ("[]", "empty"),
     ('{"name": "add", "arguments": 3}', "no JSON object")],
)  # fmt: skip
def test_a_call_that_cannot_be_read_says_why(body, words):
    (call,) = read_calls(f"<tool_call>{body}</tool_call>")[1]
    assert words in (call.error or "")
