"""The engine when a request fails: it ends with its error, and the others get what they would."""

from __future__ import annotations

import pytest
import torch

from helpers_generation import finish, prompts
from topwork import AutoModelForCausalLM, LoraConfig
from topwork.errors import ConfigError, TopworkError
from topwork.generation.engine import Engine
from topwork.models import Config


def mamba():
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
    return model.eval()


def failing(engine, id):
    """Let a pass over a piece with `id` raise once it is computed; how many pieces it had."""
    runner, told = getattr(engine.runner, "_modules", engine.runner), []
    after = runner._hidden

    def raising(pieces, *rest):
        found = after(pieces, *rest)
        if any(id in p.ids for p in pieces):
            told.append(len(pieces))
            raise RuntimeError("on purpose")
        return found

    runner._hidden = raising
    return told


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_what_fails_in_a_step_fails_alone(model, kind):
    model = model if kind == "attention" else mamba()
    options = {"max_new_tokens": 9, "suppress_tokens": [5]}
    rows = [[i if i != 5 else 6 for i in row] for row in prompts(5, seed=1, low=10, high=50)]
    wanted = [model.generate(torch.tensor([r]), **options)[0].tolist() for r in rows]
    rows[2].append(5)
    engine = Engine(model, page_size=4, piece=16, step_tokens=64, max_rows=5)
    asked = [engine.submit(ids, **options) for ids in rows]
    told = failing(engine, 5)
    for _ in range(4):
        engine.step()
    asked.append(engine.submit(rows[2], **options))  # others decode by now, in the same step
    events = finish(engine)
    assert len(told) == 4  # each in company, then alone
    for bad in (asked[2], asked[5]):
        assert [str(bad.error), bad.finish_reason] == ["on purpose", "error"]
        assert [e.done for e in events if e.request is bad] in ([True], [])
    assert [asked[i].ids for i in (0, 1, 3, 4)] == [wanted[i] for i in (0, 1, 3, 4)]
    assert engine.pool.spare == engine.pool.pages


def test_a_stopping_criterion_that_raises_ends_its_own_request(model):
    def broken(ids, scores):
        if ids.shape[1] > 14:
            raise RuntimeError("on purpose")
        return False

    rows = prompts(3, seed=10, low=10, high=12)
    for options in ({}, {"do_sample": True, "seed": 3, "top_k": 0}):
        wanted = [model.generate(torch.tensor([r]), max_new_tokens=8, **options) for r in rows]
        engine = Engine(model)
        asked = [
            engine.submit(r, max_new_tokens=8, stopping_criteria=[broken] * (i == 1), **options)
            for i, r in enumerate(rows)
        ]
        events = finish(engine)
        assert str(asked[1].error) == "on purpose"
        assert asked[1].ids == wanted[1][0, :15].tolist()
        last = [e for e in events if e.request is asked[1]][-1]
        assert (last.done, last.token) == (True, asked[1].ids[-1])
        assert [asked[i].ids for i in (0, 2)] == [wanted[i][0].tolist() for i in (0, 2)]


@pytest.mark.parametrize(("broken", "words"), [
    (lambda seen, scores: scores[:, :-1], "79"),
    (lambda seen, scores: scores * float("nan"), "no token"),
    (lambda seen, scores: scores.fill_(float("-inf")), "no token"),
    (lambda seen, scores: None, "shape"),
], ids=["cut", "nan", "nothing", "none"])  # fmt: skip
@pytest.mark.parametrize("drawn", [True, False])
def test_a_processor_that_makes_no_scores_ends_its_own_request(model, broken, words, drawn):
    options = {"do_sample": True, "seed": 1, "top_k": 0} if drawn else {}
    rows = prompts(2, seed=10, low=10, high=12)
    wanted = model.generate(torch.tensor([rows[0]]), max_new_tokens=5, **options)
    engine = Engine(model)
    good = engine.submit(rows[0], max_new_tokens=5, **options)
    bad = engine.submit(rows[1], max_new_tokens=5, logits_processor=[broken], **options)
    finish(engine)
    assert words in str(bad.error)
    assert bad.new_ids == []
    assert good.ids == wanted[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_is_taken_away_ends_its_own_requests(adapted, dtype):
    own, rows = adapted.to(dtype), prompts(3, seed=2)
    own.add_adapter("gone", LoraConfig(r=2, target_modules=["q_proj"]))
    engine = Engine(own)
    asked = [
        engine.submit(ids, max_new_tokens=6, adapter=name)
        for ids, name in zip(rows, ("a", "gone", None))
    ]
    own.delete_adapter("gone")
    finish(engine)
    own.to(torch.float32)
    assert isinstance(asked[1].error, ConfigError)
    assert "'gone'" in str(asked[1].error)
    assert [asked[i].finish_reason for i in (0, 2)] == ["length", "length"]


def test_an_adapter_of_the_same_name_does_not_get_the_old_ones_pages(adapted):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    engine, ids = Engine(adapted, page_size=4), prompts(1, seed=3, low=40)[0]
    found = []
    for _ in range(2):
        adapted.add_adapter("again", lora)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".again." in name:
                    parameter.mul_(3)
        with adapted.use_adapter("again"):
            wanted = adapted.generate(torch.tensor([ids]), max_new_tokens=6)[0].tolist()
        request = engine.submit(ids, max_new_tokens=6, adapter="again")
        finish(engine)
        assert request.ids == wanted
        adapted.delete_adapter("again")
        found.append(wanted)
    assert found[0] != found[1]


def test_a_broken_model_ends_every_request_and_leaves_an_engine_that_works(model):
    engine, rows = Engine(model), prompts(3, seed=4)
    run, engine.runner.run = engine.runner.run, lambda pieces: 1 / 0
    asked = [engine.submit(ids, max_new_tokens=4) for ids in rows]
    finish(engine)
    assert all(isinstance(r.error, ZeroDivisionError) for r in asked)
    engine.runner.run = run
    again = engine.submit(rows[0], max_new_tokens=4)
    finish(engine)
    assert again.finish_reason == "length"
    assert not isinstance(again.error, TopworkError)
