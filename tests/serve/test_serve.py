"""The server: OpenAI's protocol over the engine, with equal tokens, and its door."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tiny
from serving import ask, running
from topwork import LoraConfig, PolyConfig, PromptTuningConfig, get_peft_model
from topwork.errors import ConfigError
from topwork.generation import Engine
from topwork.serve import Door, Limits, Served
from topwork.serve.answers import Text

CHAT = "/v1/chat/completions"
TEXTS = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def adapted(names=("red", "blue")):
    model = None
    for seed, name in enumerate(names):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        if model is None:
            model = get_peft_model(tiny.model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


@pytest.fixture(scope="module")
def server():
    with running(adapted(), tiny.tokenizer()) as found:
        yield found


@pytest.fixture
def port(server):
    return server[0]


def alone(prompt, adapter=None, **options):
    """What the engine makes of one prompt by itself."""
    engine = Engine(adapted().eval())
    request = engine.submit(prompt, adapter=adapter, **options)
    for _ in engine.run():
        pass
    return request


def test_adapters_of_other_methods_are_served_beside_each_other():
    causal = {"task_type": "CAUSAL_LM"}
    model = get_peft_model(
        tiny.model(), PromptTuningConfig(**causal, num_virtual_tokens=40), adapter_name="words"
    )
    model.add_adapter("poly", PolyConfig(n_tasks=2, init_weights=False, target_modules=["q_proj"]))
    prompt = [5, 6, 7, 8, 9]
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    call = {"alora_invocation_tokens": [8, 9], **causal}
    model.add_adapter("asked", dataclasses.replace(lora, **call))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{key}" in name for key in ("poly", "lora_", "words")):
                parameter.normal_()
    with running(model.eval(), tiny.tokenizer()) as (port, *_):
        for name, task in (("words", None), ("poly", 0), ("poly", 1), ("asked", None)):
            body = {"model": name, "prompt": prompt, "max_tokens": 8, "return_token_ids": True}
            status, reply = ask(port, TEXTS, {**body, "task_id": task})
            tasks = {} if task is None else {"task_ids": torch.tensor([task])}
            with model.use_adapter(name):
                wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, **tasks)
            assert status == 200
            assert reply["choices"][0]["token_ids"] == wanted[0, len(prompt) :].tolist()
        for name, task in (("poly", None), ("poly", 2), ("words", 0)):
            status, reply = ask(port, TEXTS, {**body, "model": name, "task_id": task})
            assert status == 400
            assert f"{name!r}" in reply["error"]["message"]


def prompt_of(messages):
    return tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["tiny", "red", "blue"])
def test_a_chat_is_what_the_engine_makes_of_its_template(port, name):
    body = {"model": name, "messages": HELLO, "max_tokens": 12, "return_token_ids": True}
    status, reply = ask(port, CHAT, body)
    want = alone(prompt_of(HELLO), None if name == "tiny" else name, max_new_tokens=12)
    (choice,) = reply["choices"]
    assert status == 200
    assert choice["token_ids"] == want.new_ids
    shown = [i for i in want.new_ids if i not in want.config.stops]
    assert choice["message"] == {
        "role": "assistant",
        "content": tiny.tokenizer().decode(shown, skip_special_tokens=True),
    }
    made = len(want.new_ids)
    length = len(prompt_of(HELLO))
    assert reply["usage"] == {
        "prompt_tokens": length, "completion_tokens": made, "total_tokens": length + made,
    }  # fmt: skip
    assert choice["finish_reason"] == {"stop": "stop", "length": "length"}[want.finish_reason]


def test_a_stream_says_the_same_piece_by_piece(port):
    body = {"messages": HELLO, "max_tokens": 20, "temperature": 0.9, "seed": 3, "logprobs": True,
            "top_logprobs": 2}  # fmt: skip
    whole = ask(port, CHAT, body)[1]
    _, events = ask(port, CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["usage"] == whole["usage"]
    pieces = [e["choices"][0] for e in events[1:-1]]
    text = "".join(p["delta"].get("content", "") for p in pieces)
    assert text == whole["choices"][0]["message"]["content"]
    told = [one for p in pieces for one in p["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]
    assert [p["finish_reason"] for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_log_probabilities_are_the_model_s_or_those_of_the_draws(port):
    body = {"prompt": "go", "max_tokens": 6, "temperature": 0.5, "top_k": 4, "seed": 1,
            "logprobs": 3, "return_token_ids": True}  # fmt: skip
    choice = ask(port, TEXTS, body)[1]["choices"][0]
    ids = tiny.tokenizer()("go")["input_ids"] + choice["token_ids"]
    model = adapted().eval()
    with torch.no_grad(), model.disable_adapter():
        said = model(torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
    want = said.gather(1, torch.tensor(choice["token_ids"])[:, None])[:, 0]
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    for row, top in zip(said, choice["logprobs"]["top_logprobs"]):
        best = row.topk(3).values.tolist()
        assert sorted(top.values(), reverse=True) == pytest.approx(best, abs=1e-4)
    with running(adapted(), tiny.tokenizer(), processed_logprobs=True) as (other, _):
        choice = ask(other, TEXTS, body)[1]["choices"][0]
    drawn = alone(ids[:2], max_new_tokens=6, do_sample=True, temperature=0.5, top_k=4, seed=1)
    assert choice["token_ids"] == drawn.new_ids
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(drawn.logprobs, abs=1e-6)


@pytest.mark.parametrize("name", ["tiny", "blue"])
def test_what_the_model_says_of_a_prompt_is_its_forward_pass(port, name):
    prompts = [[7, 9, 11, 13], [5, 200]]
    body = {"model": name, "prompt": prompts, "prompt_logprobs": 3, "max_tokens": 1}
    choices = ask(port, TEXTS, body)[1]["choices"]
    model = adapted().eval()
    for prompt, choice in zip(prompts, choices):
        told = choice["prompt_logprobs"]
        names = ["__base__" if name == "tiny" else name]
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), adapter_names=names).logits[0]
        assert told[0] is None
        for place, entry in enumerate(told[1:], 1):
            said = logits[place - 1].log_softmax(-1)
            best = said.topk(3).indices.tolist()
            assert {int(t) for t in entry} == {*best, prompt[place]}
            for token, facts in entry.items():
                assert facts["logprob"] == pytest.approx(said[int(token)].item(), abs=1e-4)
                assert facts["rank"] == 1 + int((said > said[int(token)]).sum())
    status, reply = ask(port, TEXTS, {**body, "stream": True})
    assert (status, reply["error"]["param"]) == (400, "stream")


def test_several_prompts_of_several_answers(port):
    body = {"prompt": ["one", [5, 6, 7]], "n": 2, "max_tokens": 4, "temperature": 1.0, "seed": 9,
            "return_token_ids": True}  # fmt: skip
    choices = ask(port, TEXTS, body)[1]["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    for index, (prompt, seed) in enumerate(
        [(tiny.tokenizer()("one")["input_ids"], 9), (tiny.tokenizer()("one")["input_ids"], 10),
         ([5, 6, 7], 9), ([5, 6, 7], 10)]
    ):  # fmt: skip
        options = {"do_sample": True, "top_k": 0, "seed": seed, "max_new_tokens": 4}
        assert choices[index]["token_ids"] == alone(prompt, **options).new_ids


def test_many_clients_at_once_each_get_their_own(port):
    def one(i):
        body = {"model": ("tiny", "red", "blue")[i % 3], "prompt": f"go {i}", "max_tokens": 5 + i,
                "return_token_ids": True}  # fmt: skip
        return ask(port, TEXTS, body)[1]["choices"][0]["token_ids"]

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(one, range(9)))
    for i, ids in enumerate(found):
        prompt = tiny.tokenizer()(f"go {i}")["input_ids"]
        adapter = (None, "red", "blue")[i % 3]
        assert ids == alone(prompt, adapter, max_new_tokens=5 + i).new_ids


def test_a_stop_string_ends_the_text_before_it(port):
    letters = dict.fromkeys(tiny.tokenizer()("abcdefgh")["input_ids"], 100)
    drawn = {"prompt": "go", "max_tokens": 30, "logit_bias": letters, "temperature": 1, "seed": 1}
    plain = ask(port, TEXTS, drawn)[1]["choices"][0]["text"]
    assert len(plain) == 30
    stop = plain[4:6]
    body = {**drawn, "stop": [stop, "never at all"]}
    choice = ask(port, TEXTS, body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == plain[: plain.index(stop)]
    streamed = ask(port, TEXTS, {**body, "stream": True})[1]
    assert "".join(e["choices"][0]["text"] for e in streamed) == choice["text"]


def test_text_never_shows_the_beginning_of_a_stop_string():
    text = Text(tiny.tokenizer(), ["</end>"], True)
    pieces = [text.push(i) for i in tiny.tokenizer()("a < b </en </end> c")["input_ids"]]
    assert "".join(pieces) == "a < b </en "
    assert "</end" not in "".join(pieces)
    assert text.finish() == ""
    text = Text(tiny.tokenizer(), ["</end>"], True)
    half = "".join(text.push(i) for i in tiny.tokenizer()("x </en")["input_ids"])
    assert half == "x "
    assert text.finish() == "</en"


def test_calls_of_tools_are_told_apart(port, server, monkeypatch):
    said = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    ids = tiny.tokenizer()(said)["input_ids"]

    def answer(self, *args, **options):
        def processor(seen, scores):
            at = seen.shape[1] - len(args[0])
            wanted = [*ids, 2][at]
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)

        options["logits_processor"] = [processor]
        return submit(self, *args, **options)

    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", answer)
    body = {"messages": HELLO, "tools": [TOOL], "max_tokens": 100}
    choice = ask(port, CHAT, body)[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert choice["message"]["content"] is None
    events = ask(port, CHAT, {**body, "stream": True})[1]
    (call,) = events[-1]["choices"][0]["delta"]["tool_calls"]
    assert (call["index"], call["function"]["name"]) == (0, "add")
    assert ask(port, CHAT, {**body, "tool_choice": "none"})[1]["choices"][0]["message"] == {
        "role": "assistant", "content": said,
    }  # fmt: skip


def test_an_answer_follows_a_rule(port):
    pytest.importorskip("llguidance")
    body = {"prompt": "go", "max_tokens": 20, "structured_outputs": {"regex": "[xy]{3}z"}}
    assert re.fullmatch("[xy]{3}z", ask(port, TEXTS, body)[1]["choices"][0]["text"])
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"],
              "additionalProperties": False,
              "x-guidance": {"whitespace_flexible": False}}  # fmt: skip
    kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": HELLO, "max_tokens": 60, "response_format": kind}
    said = ask(port, CHAT, body)[1]["choices"][0]["message"]["content"]
    assert set(json.loads(said)) == {"n"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHAT, {"messages": HELLO, "temprature": 1}, 400, "nearest: 'temperature'"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature='hot' must be int or"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature=-1 must be positive"),
        (CHAT, {"messages": HELLO, "model": "gren"}, 404, "there are tiny, red, blue"),
        (CHAT, {"messages": []}, 400, "one message at least"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         r"messages\[0\]: content of type 'image_url'"),
        (CHAT, {"messages": HELLO, "max_tokens": 1000}, 400, "the context holds 256"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "at least 1"),
        (CHAT, {"messages": HELLO, "top_logprobs": 99, "logprobs": True}, 400, "from 0 to 20"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": False, "x": 1}}, 400,
         "not tokenize"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400,
         "not chat_template"),
        (TEXTS, {"prompt": "x", "structured_outputs": {"regex": "(("}}, 400, "regex"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice='required'"),
        (CHAT, {"messages": HELLO, "stop": [""]}, 400, "none of them empty"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, 400, "json_schema"),
        (TEXTS, {"prompt": ""}, 400, "prompt is empty"),
        (TEXTS, {"prompt": [1, 9999]}, 400, "outside the vocabulary"),
        (TEXTS, {"prompt": "x", "n": 1000}, 400, "at most 128"),
        (TEXTS, {"prompt": "x", "echo": True}, 400, "echo=True is not offered"),
        (TEXTS, {"prompt": "x", "n": True}, 400, "n=True must be int"),
        (TEXTS, [1], 400, "a JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(port, path, body, status, words):
    found, reply = ask(port, path, body)
    assert found == status
    assert re.search(words, reply["error"]["message"]), reply
    assert reply["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_or_too_large_is_refused(port):
    assert ask(port, CHAT, raw=b"{")[0] == 400
    with running(tiny.model(), tiny.tokenizer(), limits=Limits(max_body=100)) as (small, _):
        body = {"messages": [{"role": "user", "content": "x" * 200}]}
        status, reply = ask(small, CHAT, body)
        assert (status, reply["error"]["message"]) == (413, "the body is larger than 100 bytes")
        link = http.client.HTTPConnection("127.0.0.1", small, timeout=60)
        link.request("POST", CHAT, iter([b"x" * 90, b"y" * 90]), encode_chunked=True,
                     headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert link.getresponse().status == 413
        link.close()


def test_who_leaves_ends_the_answer_and_frees_its_pages(server):
    port, served = server
    spare = served.engine.pool.spare
    for stream in (True, False):
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "go", "max_tokens": 64, "ignore_eos": True, "n": 8, "temperature": 1.0,
                "stream": stream}  # fmt: skip
        link.request("POST", TEXTS, json.dumps(body))
        if stream:
            link.getresponse().read(1)
        link.close()
    until = time.monotonic() + 20
    while (served.engine.busy or served.open) and time.monotonic() < until:
        time.sleep(0.05)
    assert (served.engine.busy, served.open) == (False, 0)
    assert served.engine.pool.spare == spare


def test_a_busy_server_says_come_back_later():
    limits = Limits(max_waiting=2, max_new_tokens=64)
    with running(tiny.model(), tiny.tokenizer(), limits=limits) as (port, _):
        status, reply = ask(port, TEXTS, {"prompt": "x", "n": 3, "temperature": 1.0})
        assert (status, reply["error"]["code"]) == (429, "busy")
        assert ask(port, TEXTS, {"prompt": "x", "n": 2, "temperature": 1.0})[0] == 200


def test_an_answer_that_breaks_is_told_and_no_other_breaks(server, monkeypatch):
    port, served = server

    def broken(self, *args, **options):
        if args[0] == [5, 6]:
            options["logits_processor"] = [lambda ids, scores: 1 / 0]
        return submit(self, *args, **options)

    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", broken)
    status, reply = ask(port, TEXTS, {"prompt": [5, 6], "max_tokens": 4})
    assert (status, reply["error"]["message"]) == (500, "ZeroDivisionError")
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("POST", TEXTS, json.dumps({"prompt": [5, 6], "stream": True}))
    assert '"message": "ZeroDivisionError"' in link.getresponse().read().decode()
    link.close()
    assert ask(port, TEXTS, {"prompt": [5, 7], "max_tokens": 4})[0] == 200
    assert served.open == 0


# -- the door --------------------------------------------------------------------------------------


def test_a_key_is_asked_for_everywhere_but_at_the_page():
    with running(tiny.model(), tiny.tokenizer(), Door("secret")) as (port, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert ask(port, "/v1/models", headers=headers)[0] == 401
        assert ask(port, "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert ask(port, "/health")[0] == 200
        assert "<title>Topwork</title>" in ask(port, "/")[1]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Origin": "https://good.example"}, 200),
    ],
)
def test_pages_of_others_cannot_ask_a_server_on_loopback(headers, status):
    door = Door(origins=("https://good.example",))
    with running(tiny.model(), tiny.tokenizer(), door) as (port, _):
        assert ask(port, "/v1/models", headers=headers)[0] == status


def test_off_loopback_a_key_is_a_must():
    with pytest.raises(ConfigError, match="TOPWORK_API_KEY"):
        Door.at("0.0.0.0", None)
    assert Door.at("0.0.0.0", "secret").hosts is None


# -- adapters --------------------------------------------------------------------------------------


def test_adapters_are_loaded_and_forgotten_while_it_serves(tmp_path):
    made = adapted()
    made.save_pretrained(tmp_path)
    with running(tiny.model(), tiny.tokenizer(), loads_adapters=True) as (port, served):
        body = {"prompt": "go", "max_tokens": 8, "return_token_ids": True}
        base = ask(port, TEXTS, body)[1]["choices"][0]["token_ids"]
        for name in ("red", "blue"):
            path = str(tmp_path / name)
            load = {"lora_name": f"my-{name}", "lora_path": path}
            assert ask(port, "/v1/load_lora_adapter", load)[0] == 200
            found = ask(port, TEXTS, {**body, "model": f"my-{name}"})[1]["choices"][0]["token_ids"]
            prompt = tiny.tokenizer()("go")["input_ids"]
            assert found == alone(prompt, name, max_new_tokens=8).new_ids
            assert ask(port, TEXTS, body)[1]["choices"][0]["token_ids"] == base
        listed = [m["id"] for m in ask(port, "/v1/models")[1]["data"]]
        assert listed == ["tiny", "my-red", "my-blue"]
        assert ask(port, "/v1/load_lora_adapter", load)[0] == 400  # the name is taken
        for name in ("my-red", "my-blue"):
            assert ask(port, "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
        assert served.adapters == []
        assert ask(port, TEXTS, body)[1]["choices"][0]["token_ids"] == base
        assert ask(port, "/v1/unload_lora_adapter", {"lora_name": "my-red"})[0] == 404


def test_adapters_are_not_loaded_unless_the_server_allows_it(port, tmp_path):
    load = {"lora_name": "x", "lora_path": str(tmp_path)}
    assert ask(port, "/v1/load_lora_adapter", load)[0] == 403


def test_an_adapter_may_not_have_the_model_s_name():
    with pytest.raises(ConfigError, match="has the model's name, 'red'"):
        Served(adapted(), tiny.tokenizer(), "red")
