"""The engine: a request gets what it would get alone, whatever else is there."""

from __future__ import annotations

import asyncio

import pytest
import torch

from helpers_generation import finish, prompts
from topwork import AutoModelForCausalLM, LoraConfig
from topwork.errors import ConfigError, TopworkError
from topwork.generation import GenerationConfig
from topwork.generation.engine import Engine
from topwork.models import Config
from topwork.nn.paged import PagePool


def alone(model, ids, **options):
    engine = Engine(model, page_size=4, piece=16, step_tokens=32)
    request = engine.submit(ids, **options)
    for _ in engine.run():
        pass
    return request.new_ids


def test_greedy_rows_equal_generate(model):
    engine = Engine(model, page_size=4, piece=16, step_tokens=32)
    rows = prompts(9)
    asked = [engine.submit(ids, max_new_tokens=5 + i, eos_token_id=7) for i, ids in enumerate(rows)]
    finish(engine)
    for i, (ids, request) in enumerate(zip(rows, asked)):
        out = model.generate(torch.tensor([ids]), max_new_tokens=5 + i, eos_token_id=7)
        assert request.ids == out[0].tolist()
        assert request.finish_reason == ("stop" if request.ids[-1] == 7 else "length")
    assert engine.pool.spare == engine.pool.pages


OPTIONS = [
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "seed": 2, "top_k": 0},
    {"do_sample": True, "seed": 3, "top_k": 0, "top_p": 0.7, "temperature": 1.6},
    {"do_sample": True, "seed": 4, "min_p": 0.2, "top_k": 12},
    {"do_sample": True, "seed": 5, "typical_p": 0.8, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    {},
]


def test_no_row_depends_on_its_company(model):
    rows = prompts(len(OPTIONS), seed=3)
    wanted = [alone(model, ids, max_new_tokens=14, **o) for ids, o in zip(rows, OPTIONS)]
    engine = Engine(model, page_size=4, piece=16, step_tokens=32, max_rows=4)
    asked = []
    for i, (ids, options) in enumerate(zip(rows, OPTIONS)):  # they join while others run
        asked.append(engine.submit(ids, max_new_tokens=14, **options))
        for _ in range(i % 3):
            engine.step()
    finish(engine)
    assert [r.new_ids for r in asked] == wanted


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("do_sample")], ids=str)
def test_a_seed_draws_the_same_here_and_in_generate(model, options):
    ids = prompts(3, seed=6, low=20, high=21)
    seed = options["seed"]
    engine = Engine(model, page_size=4, piece=16, step_tokens=32)
    asked = [
        engine.submit(row, max_new_tokens=12, **{**options, "seed": seed + i})
        for i, row in enumerate(ids)
    ]
    finish(engine)
    out = model.generate(torch.tensor(ids), max_new_tokens=12, **options)
    assert out.tolist() == [r.ids for r in asked]
    assert len({tuple(r.new_ids) for r in asked}) == 3


class Letters:
    """A tokenizer of 80 letters."""

    def decode(self, ids, **_):
        return "".join(chr(48 + i) for i in ids)


def test_stop_strings_end_their_own_request(model):
    ids = prompts(1, seed=4)[0]
    whole = alone(model, ids, max_new_tokens=12)
    text = Letters().decode(whole)
    engine = Engine(model, page_size=4, piece=16, step_tokens=32)
    asked = [
        engine.submit(ids, max_new_tokens=12, stop_strings=text[3:6], tokenizer=Letters()),
        engine.submit(ids, max_new_tokens=12),
    ]
    finish(engine)
    assert asked[0].new_ids == whole[: text.find(text[3:6]) + 3]
    assert [r.finish_reason for r in asked] == ["stop", "length"]
    assert asked[1].new_ids == whole


def test_draws_follow_the_chances(model):
    ids = prompts(1)[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] / 3
    for options, chances in (
        ({"top_k": 0}, logits.softmax(-1)),
        ({"top_k": 5}, logits.masked_fill(logits < logits.topk(5).values[-1], -1e9).softmax(-1)),
    ):
        engine = Engine(model)
        asked = [
            engine.submit(ids, max_new_tokens=1, do_sample=True, temperature=3.0, seed=i, **options)
            for i in range(1500)
        ]
        finish(engine)
        counts = torch.bincount(torch.tensor([r.new_ids[0] for r in asked]), minlength=80)
        assert ((counts / 1500 - chances).abs() < 4 * (chances / 1500).sqrt() + 1e-3).all()


def test_a_request_tells_the_chance_of_each_draw(model):
    ids = prompts(1)[0]
    for options in ({"top_k": 0}, {"top_k": 5, "temperature": 2.0}, {"typical_p": 0.8}):
        engine = Engine(model)
        request = engine.submit(ids, max_new_tokens=6, do_sample=True, seed=1, **options)
        finish(engine)
        assert len(request.logprobs) == 6
        for i, (token, said) in enumerate(zip(request.new_ids, request.logprobs)):
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *request.new_ids[:i]]])).logits[0, -1]
            logits = logits / options.get("temperature", 1.0)
            if options.get("top_k"):
                logits = logits.masked_fill(logits < logits.topk(5).values[-1], -1e9)
            if "typical_p" in options:  # only a part is kept, so each has a greater chance
                assert said > float(logits.log_softmax(-1)[token])
            else:
                assert said == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-3)
    greedy = engine.submit(ids, max_new_tokens=2)
    finish(engine)
    assert greedy.logprobs == []


def test_each_row_goes_through_its_own_adapter(model, adapted):
    rows, names = prompts(8, seed=5), ["a", None, "b", "c", "a", "b", None, "c"]
    engine = Engine(adapted, page_size=4, piece=16, step_tokens=32)
    asked = [engine.submit(r, max_new_tokens=9, adapter=n) for r, n in zip(rows, names)]
    by_default = engine.submit(rows[0], max_new_tokens=9)
    finish(engine)
    for ids, name, request in zip(rows, names, asked):
        ids = torch.tensor([ids])
        if name is None:
            wanted = model.generate(ids, max_new_tokens=9)
        else:
            adapted.set_adapter(name)
            wanted = adapted.generate(ids, max_new_tokens=9)
        assert request.ids == wanted[0].tolist(), name
    adapted.set_adapter("a")
    assert by_default.ids == asked[0].ids
    with pytest.raises(ConfigError, match="no adapter 'd'"):
        engine.submit(rows[0], adapter="d")


def test_completions_of_one_prompt_share_its_pages(model):
    ids = prompts(1, low=50)[0]
    fed = []

    class Counting(type(Engine(model).runner)):
        def run(self, pieces):
            fed.append(sum(len(p.ids) for p in pieces))
            return super().run(pieces)

    engine = Engine(model, page_size=4, piece=64)
    engine.runner = Counting(model, engine.pool)
    asked = [
        engine.submit(ids, max_new_tokens=6, do_sample=True, seed=i, top_k=0) for i in range(8)
    ]
    finish(engine)
    assert fed[0] == len(ids)
    # The seven others read only what lies behind the last full page, then 8 rows go on.
    assert sum(fed) <= len(ids) + 7 * 4 + 8 * 5
    wanted = [
        alone(model, ids, max_new_tokens=6, do_sample=True, seed=i, top_k=0) for i in range(8)
    ]
    assert [r.new_ids for r in asked] == wanted


def test_changed_weights_forget_the_pages(model):
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    engine = Engine(fresh, page_size=4)
    ids = prompts(1, low=40)[0]
    before = engine.submit(ids, max_new_tokens=8)
    finish(engine)
    with torch.no_grad():
        fresh.model.layers[0].self_attn.v_proj.weight.neg_()
    after = engine.submit(ids, max_new_tokens=8)
    finish(engine)
    assert after.ids == fresh.generate(torch.tensor([ids]), max_new_tokens=8)[0].tolist()
    assert after.ids != before.ids


def test_scarce_pages_delay_requests_and_change_nothing(model):
    rows = prompts(6, seed=8, low=20, high=40)
    engine = Engine(model, page_size=4, cache_tokens=96, piece=16, step_tokens=32)
    asked = [engine.submit(ids, max_new_tokens=30) for ids in rows]
    finish(engine)
    for ids, request in zip(rows, asked):
        assert request.ids == model.generate(torch.tensor([ids]), max_new_tokens=30)[0].tolist()
    with pytest.raises(ConfigError, match="cache_tokens=96"):
        engine.submit(rows[0], max_new_tokens=90)


def test_a_cancelled_request_frees_its_pages_and_the_others_go_on(model):
    rows = prompts(3, seed=9)
    engine = Engine(model, page_size=4)
    asked = [engine.submit(ids, max_new_tokens=20) for ids in rows]
    for _ in range(4):
        engine.step()
    asked[1].cancel()
    held = len(asked[1].pages)
    assert held > 0
    events = finish(engine)
    assert asked[1].finish_reason == "cancelled"
    assert asked[1].pages == []
    assert any(e.request is asked[1] and e.token is None for e in events)
    assert engine.pool.spare == engine.pool.pages
    for i in (0, 2):
        wanted = model.generate(torch.tensor([rows[i]]), max_new_tokens=20)
        assert asked[i].ids == wanted[0].tolist()


def test_the_error_of_one_request_stops_no_other(model):
    def broken(seen, scores):
        if seen.shape[1] > 12:
            raise RuntimeError("on purpose")
        return scores

    rows = prompts(3, seed=10, low=10, high=12)
    engine = Engine(model)
    asked = [
        engine.submit(ids, max_new_tokens=8, logits_processor=[broken] if i == 1 else [])
        for i, ids in enumerate(rows)
    ]
    finish(engine)
    assert asked[1].finish_reason == "error"
    assert "on purpose" in str(asked[1].error)
    assert [asked[i].finish_reason for i in (0, 2)] == ["length", "length"]


def test_a_damaged_adapter_fails_its_own_requests_alone(adapted):
    fresh = prompts(2, seed=11)
    lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted.add_adapter("bad", lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".bad." in name:
                parameter.fill_(float("nan"))
    engine = Engine(adapted)
    good, bad = (engine.submit(i, max_new_tokens=4, adapter=a) for i, a in zip(fresh, ("b", "bad")))
    finish(engine)
    adapted.delete_adapter("bad")
    assert good.finish_reason == "length"
    assert isinstance(bad.error, TopworkError)
    assert "not numbers" in str(bad.error)


def test_bad_requests_are_refused_at_the_door(model):
    engine = Engine(model)
    for ids, options, words in (
        ([], {}, "empty"), ([99], {}, "vocabulary"), ([1] * 300, {}, "context is 256"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens"), ([1], {"num_beams": 2}, "num_beams"),
        ([1], {"eos_token_id": 99}, r"names \[99\]"), ([1], {"stop_strings": "a"}, "tokenizer"),
        ([1], {"temprature": 1}, "temperature"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            engine.submit(ids, **options)
    assert not engine.busy


def test_streams_of_one_loop_share_the_steps(model):
    rows = prompts(4, seed=12)

    async def read(engine, ids, stop_after=None):
        found = []
        async for token in engine.stream(ids, GenerationConfig(max_new_tokens=12)):
            found.append(token)
            if len(found) == stop_after:
                break
        return found

    async def everything():
        engine = Engine(model)
        found = await asyncio.gather(
            *(read(engine, ids, 3 if i == 2 else None) for i, ids in enumerate(rows))
        )
        while engine.busy:
            await asyncio.sleep(0.01)
        return engine, found

    engine, found = asyncio.run(everything())
    wanted = [model.generate(torch.tensor([i]), max_new_tokens=12)[0, len(i) :] for i in rows]
    assert [f == w.tolist()[: len(f)] for f, w in zip(found, wanted)] == [True] * 4
    assert [len(f) for f in found] == [12, 12, 3, 12]
    assert engine.pool.spare == engine.pool.pages


def test_a_stream_tells_its_error(model):
    def broken(seen, scores):
        raise RuntimeError("on purpose")

    async def read():
        engine = Engine(model)
        async for _ in engine.stream([1, 2], max_new_tokens=3, logits_processor=[broken]):
            pass

    with pytest.raises(RuntimeError, match="on purpose"):
        asyncio.run(read())


def test_a_recurrent_model_has_a_state_for_each_row():
    torch.manual_seed(0)
    config = Config(
        model_type="mamba", vocab_size=80, hidden_size=32, intermediate_size=64, state_size=8,
        num_hidden_layers=2, time_step_rank=4, conv_kernel=4, expand=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.eval()
    rows = prompts(7, seed=2, low=1, high=50)
    options = [{}, {"do_sample": True, "seed": 3}, {}, {"repetition_penalty": 1.5}, {}, {}, {}]
    engine = Engine(model, piece=16, step_tokens=32, max_rows=3)
    asked = [engine.submit(r, max_new_tokens=9, **o) for r, o in zip(rows, options)]
    for _ in range(3):
        engine.step()
    asked[1].cancel()
    finish(engine)
    for i, (ids, request) in enumerate(zip(rows, asked)):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=9, **options[i])[0].tolist()
        assert request.ids == wanted if i != 1 else request.ids == wanted[: len(request.ids)]
    assert engine.pool.spare == 3


def test_pages_are_counted():
    pool = PagePool(1, 3, 2)
    a, b = pool.take(2)
    name = pool.name_for(None, (1, 2))
    pool.name(a, name)
    assert pool.find(name) == a
    pool.release([a])
    pool.release([a])
    assert pool.spare == 2
    assert pool.find(name) == a
    pool.release([a, b])
    assert sorted(pool.take(3)) == [0, 1, 2]
    assert pool.find(name) is None
    with pytest.raises(MemoryError, match="1 pages are wanted, 0 are free"):
        pool.take(1)
