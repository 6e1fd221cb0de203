"""Chat templates rendered here and by transformers: the same text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topwork.errors import ConfigError
from topwork.text import Tokenizer
from topwork.text.template import TemplateError, render

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
TOOLS = (
    "{%- if tools %}\n    {{- '<tools>' }}\n    {%- for tool in tools %}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if message.role == 'skip' %}{% continue %}{% endif %}"
    "\n"
    "    {%- if message.role == 'assistant' %}\n        {% generation %}{{ message.content }}"
    "{% endgeneration %}\n    {%- else %}\n        {{- message.role ~ ':' ~ message.content }}\n"
    "    {%- endif %}\n{%- endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Hi <b>&'"}],
    [{"role": "user", "content": " a "}, {"role": "assistant", "content": "  b\n"}],
    [
        {"role": "user", "content": "é🙂"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x {{ 1 }}"},
    ],
]  # fmt: skip
TOOL = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]


@pytest.fixture(scope="module")
def pair():
    core = Core(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names), Tokenizer(core, names)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("source", [CHATML, LLAMA3, ALTERNATING, TOOLS])
def test_the_text_equals_the_peer(pair, source, chat, prompt):
    options = {"chat_template": source, "tokenize": False, "add_generation_prompt": prompt}
    for tools in (None, TOOL):
        wanted, found = (t.apply_chat_template(chat, tools=tools, **options) for t in pair)
        assert found == wanted


@pytest.mark.parametrize("source", [CHATML, LLAMA3, ALTERNATING])
def test_an_open_end_equals_the_peer(pair, source):
    options = {"chat_template": source, "tokenize": False, "continue_final_message": True}
    for chat in ([*CHATS[0], {"role": "assistant", "content": "Sure, the"}], CHATS[2]):
        wanted, found = (t.apply_chat_template(chat, **options) for t in pair)
        assert found == wanted


def test_what_the_template_refuses_comes_as_its_own_words(pair):
    with pytest.raises(TemplateError, match="roles must alternate"):
        pair[1].apply_chat_template([CHATS[1][1]], chat_template=ALTERNATING)
    with pytest.raises(TemplateError, match="does not parse"):
        render("{% for %}", CHATS[0])
    with pytest.raises(ConfigError, match="no chat template"):
        pair[1].apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ (raise_exception|attr('__globals__')) }}{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(TemplateError):
        render(source, [*CHATS[0]])


def test_a_template_is_kept_with_the_tokenizer(pair, tmp_path):
    ours = Tokenizer(pair[1].core, {"bos_token": "<s>", "chat_template": CHATML})
    ours.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).chat_template == CHATML
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CHATS[0], tokenize=False) == ours.apply_chat_template(
        CHATS[0], tokenize=False
    )
