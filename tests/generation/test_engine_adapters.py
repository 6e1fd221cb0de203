"""Adapters of every kind in one batch of the engine, each row as `PeftModel.generate` has it."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

import topwork
from helpers_generation import finish, prompts
from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model
from topwork.errors import ConfigError
from topwork.generation.engine import Engine
from topwork.models import Config
from topwork.ops.native import decode

CALL = [7, 8]  # what invokes an aLoRA
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
CAUSAL = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "a": LoraConfig(**LORA),
    "alora": LoraConfig(**LORA, **CAUSAL, alora_invocation_tokens=CALL),
    "later": LoraConfig(**LORA, **CAUSAL, alora_invocation_tokens=[9]),
    "prompt": topwork.PromptTuningConfig(**CAUSAL, num_virtual_tokens=9),
    "encoder": topwork.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=1, encoder_hidden_size=8),
    "prefix": topwork.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=6),
    "tasks": topwork.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=18, num_tasks=3),
    "poly": topwork.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["q_proj", "down_proj"]),
    "whole": LoraConfig(r=2, target_parameters=["o_proj.weight"], target_modules=["v_proj"]),
    "dora": LoraConfig(**LORA, use_dora=True),
}
WITH_TASKS = ("tasks", "poly")


def loud(model, seed=0):
    """The same with adapters that tell on every token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.3 if ".lora_" in name else 1.0))
    return model.eval()


def with_adapters(model, configs):
    """`model` with adapters under these names, loud."""
    (first, config), *others = configs.items()
    found = get_peft_model(model, config, first)
    for name, config in others:
        found.add_adapter(name, config)
    for seed, name in enumerate(configs):
        found.set_adapter(name)
        loud(found, seed)
    return found


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Two adapters to be mixed."""
    made = []
    for seed in range(2):
        fresh = AutoModelForCausalLM.from_config(model.config)
        one = loud(
            get_peft_model(fresh, LoraConfig(r=3, target_modules=["q_proj", "v_proj"])), seed
        )
        made.append(tmp_path_factory.mktemp("expert"))
        one.save_pretrained(made[-1])
    return made


@pytest.fixture(scope="module")
def every(model, folders):
    """One model with an adapter of each kind."""
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    found = with_adapters(fresh, ADAPTERS)
    mixed = topwork.XLoraConfig(
        adapters={"one": str(folders[0]), "two": str(folders[1])}, layerwise_scalings=True,
        xlora_depth=2, xlora_size=7,
    )  # fmt: skip
    found.add_adapter("mixed", mixed)
    found.set_adapter("mixed")
    return loud(found)


def by_generate(model, ids, name, task=None, **options):
    """What `generate` makes of one row under adapter `name`."""
    ids = torch.tensor([ids])
    tasks = {} if task is None else {"task_ids": torch.tensor([task])}
    with model.disable_adapter() if name is None else model.use_adapter(name):
        return model.generate(ids, **tasks, **options)[0].tolist()


def work(count, seed=0):
    """Rows of all kinds: (ids, adapter, task). Every other one has an invocation."""
    kinds = [*ADAPTERS, "mixed", None]
    rows = []
    for i, ids in enumerate(prompts(count, seed, low=12, high=60)):
        name = kinds[i % len(kinds)]
        middle = len(ids) // 2
        ids = [*ids[:middle], *CALL, *ids[middle:], 9] if i % 5 else ids
        rows.append((ids, name, i % 3 if name in WITH_TASKS else None))
    return rows


def submit(engine, rows, **options):
    return [engine.submit(ids, adapter=name, task_id=t, **options) for ids, name, t in rows]


@pytest.mark.parametrize("how", [
    {"piece": 16, "step_tokens": 32},
    {"piece": 128},
    {"piece": 8, "step_tokens": 64, "cache_tokens": 260, "max_rows": 5},
], ids=["pieces", "whole prompts", "few pages"])  # fmt: skip
def test_each_row_is_what_generate_makes_of_it(every, how):
    rows = work(24)
    wanted = [by_generate(every, *row, max_new_tokens=9) for row in rows]
    engine = Engine(every, page_size=4, **how)
    asked = submit(engine, rows, max_new_tokens=9)
    finish(engine)
    for (ids, name, _), request, expected in zip(rows, asked, wanted):
        assert request.error is None
        assert request.ids == expected, (name, len(ids))
    bare = [by_generate(every, ids, None, max_new_tokens=9) for ids, _, _ in rows]
    # each kind really acts
    acting = {name for (_, name, _), a, b in zip(rows, wanted, bare) if a != b}
    assert acting >= {*ADAPTERS, "mixed"}
    assert engine.pool.spare == engine.pool.pages


def counting(engine):
    """How many new tokens each step of `engine` computes."""
    runner, fed = engine.runner, []
    run = runner.run

    def counted(pieces):
        fed.append(sum(len(p.ids) for p in pieces))
        return run(pieces)

    runner.run = counted
    return fed


def test_an_alora_goes_on_from_the_pages_of_its_base(every):
    """What aLoRA is for: before its invocation a text is the base's, and is not read again."""
    ids = prompts(1, seed=5, low=58)[0]
    engine = Engine(every, page_size=4)
    fed = counting(engine)
    base = engine.submit(ids, adapter=None, max_new_tokens=6)
    finish(engine)
    talk = [*base.ids, *CALL, 3]
    asked = {}
    for name in ("alora", "a"):
        fed.clear()
        asked[name] = engine.submit(talk, adapter=name, max_new_tokens=5)
        engine.step()
        asked[name, "read"], asked[name, "page"] = fed[0], asked[name].pages[0]
        finish(engine)
        assert asked[name].ids == by_generate(every, talk, name, max_new_tokens=5)
    # The base's full pages are found; a plain LoRA's keys and values are its own.
    assert asked["alora", "read"] == len(talk) - (len(base.ids) - 1) // 4 * 4
    assert asked["a", "read"] == len(talk)
    # Another aLoRA, and the base itself, go on from there too, and from what each other read.
    fed.clear()
    rows = [([*talk[:-3], 9], "later"), (talk, "alora"), (talk[:-3], None)]
    found = [engine.submit(row, adapter=name, max_new_tokens=4) for row, name in rows]
    finish(engine)
    assert fed[0] <= 3 * 4 + 2
    for (row, name), request in zip(rows, found):
        assert request.ids == by_generate(every, row, name, max_new_tokens=4), name


def test_the_base_goes_on_from_the_pages_of_an_alora(every):
    ids = prompts(1, seed=6, low=58)[0]
    engine = Engine(every, page_size=4)
    engine.submit([*ids, *CALL], adapter="alora", max_new_tokens=3)
    finish(engine)
    fed = counting(engine)
    request = engine.submit(ids, adapter=None, max_new_tokens=3)
    finish(engine)
    assert fed[0] <= 4
    assert request.ids == by_generate(every, ids, None, max_new_tokens=3)


def test_a_page_is_not_taken_for_that_of_an_earlier_invocation(every):
    """The model itself says the invocation again: the same tokens, read under another start."""
    ids = [*prompts(1, seed=7, low=33, high=34)[0], *CALL, 3]

    def say_it_again(seen, scores):
        at = seen.shape[1] - len(ids)
        return scores.index_fill(1, torch.tensor(CALL[at]), 1e4) if at < 2 else scores

    engine = Engine(every, page_size=16)  # both starts lie in the third page
    first = engine.submit(ids, adapter="alora", max_new_tokens=16, logits_processor=[say_it_again])
    finish(engine)
    assert first.new_ids[:2] == CALL
    fed = counting(engine)
    again = engine.submit(first.ids[:-2], adapter="alora", max_new_tokens=6)
    finish(engine)
    assert fed[0] == len(first.ids) - 2 - 32
    assert again.ids == by_generate(every, first.ids[:-2], "alora", max_new_tokens=6)


@pytest.fixture
def damaged(request):
    """Within a test a model has aLoRA adapters "bad" and "worse" (at once) that are not numbers."""
    found = []

    def made(model, layers):
        for name, call in (("bad", CALL), ("worse", None)):
            config = LoraConfig(**CAUSAL, target_modules=layers, alora_invocation_tokens=call)
            model.add_adapter(name, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".bad." in name or ".worse." in name:
                    parameter.fill_(float("nan"))
        found.append(model)

    yield made
    for model in found:
        model.delete_adapter("bad")
        model.delete_adapter("worse")


def test_a_damaged_adapter_leaves_the_pages_of_others_alone(every, damaged):
    damaged(every, "all-linear")
    ids, short = prompts(1, seed=8, low=58)[0], [3, 4, 5]
    engine = Engine(every, page_size=4, piece=16, step_tokens=48)
    # It holds the first pages while shorter and longer rows decode beside it; others take them
    # later, and its base goes on from what it read before its invocation.
    rows = [(short, None), (short, "a"), (short[:1], None), (ids[:15], None), (short, "alora")]
    bad = [engine.submit(ids, adapter="worse", max_new_tokens=3)]
    asked = [engine.submit(row, adapter=name, max_new_tokens=12) for row, name in rows]
    engine.step()
    bad.append(engine.submit([*ids, *CALL], adapter="bad", max_new_tokens=3))
    finish(engine)
    rows += [(ids, None), (ids[:20], "a"), (ids, "alora")]
    asked += [engine.submit(row, adapter=name, max_new_tokens=12) for row, name in rows[-3:]]
    finish(engine)
    assert ["not numbers" in str(request.error) for request in bad] == [True] * 2
    for (row, name), request in zip(rows, asked):
        assert request.ids == by_generate(every, row, name, max_new_tokens=12)


def test_a_damaged_adapter_leaves_no_state_behind(damaged):
    found = with_adapters(tiny("mamba"), {"a": LoraConfig(target_modules=["in_proj"])})
    damaged(found, ["in_proj"])
    engine = Engine(found, max_rows=1)
    asked = [engine.submit([1, 2, 3], adapter=name, max_new_tokens=4) for name in ("worse", "a")]
    finish(engine)
    assert asked[0].error is not None
    assert asked[1].ids == by_generate(found, [1, 2, 3], "a", max_new_tokens=4)


def test_virtual_tokens_are_read_once(every):
    engine, (ids, other) = Engine(every, page_size=4), prompts(2, seed=9, low=20, high=21)
    fed = counting(engine)
    engine.submit(ids, adapter="tasks", task_id=1, max_new_tokens=1)
    finish(engine)
    assert sum(fed) == 18 + 20
    for task, read in ((1, 2 + 20), (0, 18 + 20)):  # 4 full pages; another task has others
        fed.clear()
        request = engine.submit(other, adapter="tasks", task_id=task, max_new_tokens=1)
        finish(engine)
        assert sum(fed) == read
        assert request.ids == by_generate(every, other, "tasks", task, max_new_tokens=1)


def test_draws_and_their_chances_are_those_of_generate(every):
    rows, draws = work(13, seed=3), {"do_sample": True, "top_k": 0, "seed": 5}
    engine = Engine(every, page_size=4, piece=16, step_tokens=64)
    asked = submit(engine, rows, max_new_tokens=6, **draws)
    finish(engine)
    for (ids, name, task), request in zip(rows, asked):
        assert request.ids == by_generate(every, ids, name, task, max_new_tokens=6, **draws), name
        tasks = {} if task is None else {"task_ids": torch.tensor([task])}
        with torch.no_grad(), every.disable_adapter() if name is None else every.use_adapter(name):
            # An aLoRA begins where the prompt says so, whatever comes later.
            with_prompt = every.generate(
                torch.tensor([ids]), max_new_tokens=6, output_logits=True,
                return_dict_in_generate=True, **tasks, **draws,
            )  # fmt: skip
        logits = torch.cat(with_prompt.logits).log_softmax(-1)
        chances = [float(row[token]) for row, token in zip(logits, request.new_ids)]
        assert request.logprobs == pytest.approx(chances, abs=1e-4), name


def test_what_a_request_cannot_mean_is_refused_at_submit(every):
    engine = Engine(every, page_size=4, cache_tokens=64)
    for adapter, task, words in (
        ("poly", None, "'poly' needs one of 0 to 2"), ("poly", 3, "task_id=3"),
        ("tasks", -1, "'tasks' needs one of"), ("a", 0, "'a' knows no tasks"),
        (None, 0, "None knows no tasks"), ("pol", 1, "no adapter 'pol'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            engine.submit([1, 2, 3], adapter=adapter, task_id=task)
    for adapter, task, new in (("prompt", None, 53), ("mixed", None, 30), ("tasks", 1, 44)):
        with pytest.raises(ConfigError, match="do not fit into cache_tokens=64"):
            engine.submit([1, 2, 3], adapter=adapter, task_id=task, max_new_tokens=new)
    assert not engine.busy


def test_modules_that_are_trained_whole_have_passes_of_their_own(model):
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    found = with_adapters(fresh, {
        "head": LoraConfig(**LORA, modules_to_save=["lm_head"]), "a": LoraConfig(**LORA),
        "words": LoraConfig(**LORA, trainable_token_indices=[3, 4, 5]),
    })  # fmt: skip
    names = ["head", None, "a", "words", "head", "a", None, "words"]
    rows = [(ids, name, None) for ids, name in zip(prompts(8, seed=4, low=3, high=40), names)]
    engine = Engine(found, page_size=4, piece=16, step_tokens=48)
    asked = submit(engine, rows, max_new_tokens=7)
    finish(engine)
    for row, request in zip(rows, asked):
        assert request.ids == by_generate(found, *row, max_new_tokens=7), row[1]


SIZES = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mamba": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "state_size": 8,
        "time_step_rank": 4, "conv_kernel": 4,
    },
}  # fmt: skip


def tiny(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Config(model_type=kind, vocab_size=80, **SIZES[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


FAMILIES = {
    "llama": {
        "bent": topwork.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
        "prompt": ADAPTERS["prompt"], "prefix": ADAPTERS["prefix"],
    },
    "gpt2": {
        "a": LoraConfig(r=4, target_modules=["c_attn"]), "prefix": ADAPTERS["prefix"],
        "prompt": ADAPTERS["prompt"],
        "alora": LoraConfig(**CAUSAL, target_modules=["c_attn"], alora_invocation_tokens=CALL),
    },
    "mamba": {
        "a": LoraConfig(r=4, target_modules=["in_proj"]),
        "poly": topwork.PolyConfig(n_tasks=3, target_modules=["in_proj"]),
        "prompt": replace(ADAPTERS["prompt"], num_attention_heads=1),
        "alora": LoraConfig(**CAUSAL, target_modules=["in_proj"], alora_invocation_tokens=CALL),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_skeletons_mix_them_too(kind):
    found = with_adapters(tiny(kind), FAMILIES[kind])
    names = [*FAMILIES[kind], None] * 2
    rows = [
        ([*ids[:3], *CALL, *ids[3:]], name, 2 if name == "poly" else None)
        for ids, name in zip(prompts(len(names), seed=4, low=4, high=40), names)
    ]
    rows.append(([5], "prompt", None))  # a state forgets what stands far behind
    engine = Engine(found, page_size=4, piece=16, step_tokens=48, max_rows=3)
    asked = submit(engine, rows, max_new_tokens=7)
    finish(engine)
    bare = [by_generate(found, ids, None, max_new_tokens=7) for ids, _, _ in rows]
    acting = set()
    for row, request, plain in zip(rows, asked, bare):
        assert request.ids == by_generate(found, *row, max_new_tokens=7), row[1]
        if request.ids != plain:
            acting.add(row[1])
    assert acting == FAMILIES[kind].keys()


def test_a_recurrent_model_refuses_a_prefix():
    found = get_peft_model(tiny("mamba"), replace(ADAPTERS["prefix"], num_attention_heads=1))
    with pytest.raises(ConfigError, match="no place for 'default', a prefix"):
        Engine(found.eval()).submit([1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_any_requests_gives_each_its_own(every, seed):
    draw = random.Random(seed)
    engine = Engine(
        every, page_size=draw.choice([1, 2, 4, 16]), piece=draw.choice([1, 3, 16, 40]),
        step_tokens=draw.choice([40, 128]), max_rows=draw.choice([1, 3, 8]),
        cache_tokens=draw.choice([160, 200, 2000]),
    )  # fmt: skip
    stem, asked = [draw.randrange(80) for _ in range(40)], []
    for _ in range(25):
        name = draw.choice([*ADAPTERS, "mixed", None])
        task = draw.randrange(3) if name in WITH_TASKS else None
        ids = [*stem[: draw.randrange(1, 40)], *draw.choice([[], CALL, [9, 3], [*CALL, 4, *CALL]])]
        if asked and draw.random() < 0.3:  # go on with what another one says
            ids = draw.choice(asked)[0].ids[:55]
        options = {"max_new_tokens": draw.randrange(1, 9)}
        request = engine.submit(ids, adapter=name, task_id=task, **options)
        asked.append((request, list(ids), name, task, options))
        for _ in range(draw.randrange(4)):
            engine.step()
        if draw.random() < 0.1:
            draw.choice(asked)[0].cancel()
    finish(engine)
    assert engine.pool.spare == engine.pool.pages
    for request, ids, name, task, options in asked:
        wanted = by_generate(every, ids, name, task, **options)
        whole = request.finish_reason != "cancelled"
        assert request.ids == (wanted if whole else wanted[: len(request.ids)]), name


@pytest.fixture(scope="module")
def halves(every):
    """The same in bf16."""
    return copy.deepcopy(every).to(torch.bfloat16)


@pytest.mark.skipif(not decode.ready(), reason="there is no C compiler")
def test_in_bf16_what_the_native_step_cannot_say_goes_by_modules_in_the_same_round(halves):
    rows = work(26, seed=1)
    engine = Engine(halves, piece=32, step_tokens=128)
    assert engine.runner.native
    run, by_modules = engine.runner._modules.run, set()

    def noted(pieces):
        by_modules.update((p.acting.adapter, p.is_virtual) for p in pieces)
        return run(pieces)

    engine.runner._modules.run = noted
    asked = submit(engine, rows, max_new_tokens=6)
    finish(engine)
    virtual = {(n, True) for n, c in ADAPTERS.items() if c.is_prompt_learning}
    assert by_modules == {*virtual, *((n, False) for n in ("poly", "whole", "dora", "mixed"))}
    for (ids, name, task), request in zip(rows, asked):
        tasks = {} if task is None else {"task_ids": torch.tensor([task])}
        with (
            torch.no_grad(),
            halves.disable_adapter() if name is None else halves.use_adapter(name),
        ):
            logits = halves(torch.tensor([request.ids]), **tasks).logits[0].float()
        for place in range(len(ids) - 1, len(request.ids) - 1):
            best, told = logits[place].max(), logits[place][request.ids[place + 1]]
            assert best - told < 0.06 * best.abs(), name
    # What is computed natively is the same to the bit in any company.
    for (ids, name, task), request in zip(rows, asked):
        if (name, False) not in by_modules:
            one = Engine(halves, piece=32, step_tokens=128)
            alone = one.submit(ids, adapter=name, task_id=task, max_new_tokens=6)
            finish(one)
            assert alone.ids == request.ids, name


@pytest.mark.skipif(not decode.ready(), reason="there is no C compiler")
def test_an_alora_shares_pages_with_its_base_natively_too(halves):
    ids = prompts(1, seed=5, low=58)[0]
    talk = [*ids[:40], *CALL, *ids[40:]]
    alone = Engine(halves)
    wanted = alone.submit(talk, adapter="alora", max_new_tokens=6)
    finish(alone)
    engine = Engine(halves)
    engine.submit(ids, adapter=None, max_new_tokens=6)
    finish(engine)
    fed = counting(engine)
    request = engine.submit(talk, adapter="alora", max_new_tokens=6)
    finish(engine)
    assert fed[0] == len(talk) - 32
    assert request.ids == wanted.ids


@pytest.mark.skipif(not decode.ready(), reason="there is no C compiler")
def test_a_damaged_adapter_leaves_pages_alone_natively_too(halves, damaged):
    damaged(halves, "all-linear")
    ids, short = prompts(1, seed=8, low=58)[0], [3, 4, 5]
    rows = [(ids, None), (short, None), (short, "a"), (short, "alora"), (short, "mixed")]
    engine = Engine(halves, piece=16)
    bad = engine.submit([*ids[:37], *CALL], adapter="bad", max_new_tokens=3)
    worse = engine.submit(ids, adapter="worse", max_new_tokens=3)
    engine.step()
    asked = [engine.submit(row, adapter=name, max_new_tokens=12) for row, name in rows]
    finish(engine)
    assert bad.error is not None
    assert worse.error is not None
    for (row, name), request in zip(rows, asked):
        one = Engine(halves, piece=16)
        alone = one.submit(row, adapter=name, max_new_tokens=12)
        finish(one)
        assert request.error is None
        assert request.ids == alone.ids or name == "mixed"
