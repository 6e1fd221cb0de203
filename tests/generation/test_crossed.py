"""The native step of an encoder-decoder says what its modules say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topwork import AutoModelForSeq2SeqLM, Config, IA3Config, LoraConfig, get_peft_model
from topwork.errors import TopworkError
from topwork.generation.crossed import CompiledStep
from topwork.models.auto import AutoModelForSpeechSeq2Seq
from topwork.models.seq2seq import DecoderView
from topwork.models.stack import Memory
from topwork.ops.native import crossed

pytestmark = pytest.mark.skipif(not crossed.ready(), reason="no kernel for this processor")

T5 = {
    "vocab_size": 91, "d_model": 64, "d_kv": 32, "d_ff": 80, "num_layers": 2, "num_heads": 3,
    "decoder_start_token_id": 0, "pad_token_id": 0, "relative_attention_max_distance": 12,
    "relative_attention_num_buckets": 8, "eos_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": 91, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80, "max_position_embeddings": 40, "decoder_start_token_id": 2,
    "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = {
    "num_mel_bins": 8, "max_source_positions": 21, "max_target_positions": 40,
    **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
}  # fmt: skip
MODELS = {
    "t5": T5,
    "t5 gated": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5 silu": {**T5, "feed_forward_proj": "gated-silu", "d_kv": 16, "num_heads": 4},
    "mt5": T5,
    "bart": BART,
    "bart relu": {**BART, "activation_function": "relu", "scale_embedding": True},
    "mbart": {**BART, "activation_function": "gelu_new"},
    "pegasus": BART,
    "marian": {**BART, "activation_function": "swish", "scale_embedding": True},
    "m2m_100": BART,
    "whisper": WHISPER,
}


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    auto = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_config(Config(model_type=name.split()[0], **MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
        if model.spec.bias:
            model.final_logits_bias.normal_()
    return model.to(dtype).eval()


def views(model, texts=3):
    """One view for the native step and one for the modules, of ragged texts."""
    if hasattr(model, "listen"):
        memory = Memory(model.listen(torch.randn(texts, 8, 42).to(model.dtype)).hidden)
    else:
        mask = torch.ones(texts, 21)
        mask[0, 5:] = mask[-1, 20:] = 0
        memory = model.encode(torch.randint(5, 90, (texts, 21)), mask)
    return DecoderView(model, memory), DecoderView(model, memory)


def said_by_modules(view, tokens, cache):
    return view.head(view.model.decode(None, tokens, cache=cache)).float()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_modules_while_rows_change_places(name, dtype):
    model = made(name, dtype)
    with torch.inference_mode():
        native, plain = views(model)
        caches = native.new_cache(), plain.new_cache()
        step = CompiledStep.of(native, caches[0], 20)
        for tokens in torch.randint(5, 90, (6, 20)).split(1, 1):  # two rows of each text
            assert step.takes(tokens, 1)
            found = step.step(tokens, 1)
            wanted = said_by_modules(plain, tokens, caches[1])
            error = (found - wanted).norm() / wanted.norm()
            assert error < (2e-6 if dtype is torch.float32 else 0.02)
            caches[0].crop(caches[0].length - 1)
            peak, best = step.greedy(tokens)
            assert torch.equal(best, found[:, 0].argmax(-1))
            assert torch.equal(peak, found[:, 0].amax(-1))
            order = torch.randint(0, 2, (6,)) + torch.tensor([0, 0, 2, 2, 4, 4])
            for cache in caches:
                cache.select(order)
        assert not step.takes(tokens, 1)  # there was room for twenty
        assert caches[0].length == caches[1].length == 20


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 31, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_of_one_text(rows, dtype):
    model = made("bart", dtype)
    with torch.inference_mode():
        native, plain = views(model, 1)
        caches = native.new_cache(), plain.new_cache()
        step = CompiledStep.of(native, caches[0], 4)
        tokens = torch.randint(5, 90, (rows, 4))
        for at in range(4):
            found = step.step(tokens[:, at : at + 1], 1)
            wanted = said_by_modules(plain, tokens[:, at : at + 1], caches[1])
            assert (found - wanted).norm() / wanted.norm() < (2e-6 if dtype.itemsize == 4 else 0.02)
        assert len(caches[0].texts[0][0]) == 1  # the text stands there once
        assert not step.takes(torch.zeros(97, 1, dtype=torch.long), 1)


def test_a_cache_with_beams_in_it_can_be_gone_on_with():
    model = made("bart")
    with torch.inference_mode():
        mixed, plain = views(model)
        caches, room = (mixed.new_cache(), plain.new_cache()), 4
        tokens = torch.randint(5, 90, (6, 38))
        for at in range(38):
            if at in (0, 3, 20):  # each with stores of its own size
                step = CompiledStep.of(mixed, caches[0], room)
                room += 90
            ids = tokens[:, at : at + 1]
            found, wanted = step.step(ids, 1), said_by_modules(plain, ids, caches[1])
            assert torch.allclose(found, wanted, atol=1e-4)
            for cache in caches:
                cache.select(torch.tensor([1, 0, 3, 3, 5, 5]))


def test_native_step_and_modules_hand_the_cache_to_each_other():
    model = made("t5")
    with torch.inference_mode():
        mixed, plain = views(model)
        caches = mixed.new_cache(), plain.new_cache()
        step = CompiledStep.of(mixed, caches[0], 30)
        tokens = torch.randint(5, 90, (6, 30))
        at = 0
        for native, new in [(0, 2), (1, 1), (1, 1), (0, 1), (1, 1), (0, 3), (1, 1), (1, 1)]:
            ids = tokens[:, at : at + new]
            wanted = said_by_modules(plain, ids, caches[1])[:, -1]
            found = step.step(ids, 1) if native else said_by_modules(mixed, ids, caches[0])
            assert torch.allclose(found[:, -1], wanted, atol=1e-4)
            at += new
            for cache in caches:
                cache.select(torch.tensor([1, 0, 3, 3, 5, 5]))
                if at == 5:
                    cache.crop(4)
            at = caches[1].length
        for cache in caches:
            cache.select(torch.tensor([0, 2]))  # fewer rows, of two texts
        found, wanted = (
            step.step(tokens[:2, :1], 1),
            said_by_modules(plain, tokens[:2, :1], caches[1]),
        )
        assert torch.allclose(found, wanted, atol=1e-4)


WAYS = [
    {}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.3},
]  # fmt: skip


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("name", ["t5 gated", "bart", "marian"])
def test_generate_gives_the_same_with_and_without_it(name, options, monkeypatch):
    model = made(name)
    ids, mask = torch.randint(5, 90, (3, 9)), torch.ones(3, 9)
    mask[1, 4:] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    runs = []
    inner = crossed.Program.run
    monkeypatch.setattr(crossed.Program, "run", lambda *a: runs.append(1) or inner(*a))
    native = model.generate(**call, **options)
    assert len(runs) >= native.shape[1] - 1
    monkeypatch.setattr(crossed, "ready", lambda: False)
    assert torch.equal(native, model.generate(**call, **options))


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6])
def test_screened_best_are_those_of_all_logits(rows, spread):
    model = made("bart")
    head = nn.Linear(64, 1003, bias=False)
    more = 0.1 * spread * torch.randn(1003)
    more[400:600] = 0
    with torch.inference_mode():
        head.weight *= torch.randn(1003, 1).exp() * spread
        head.weight[7] = 0
        cache = model.cache_of(model.encode(torch.randint(5, 90, (rows, 9))))
        step = CompiledStep.over(model.decoder_stack, head, cache, 40, more=more)
        tried = []
        for at in range(40):
            tokens = torch.randint(5, 90, (rows, 1))
            logits = step.step(tokens, 1)[:, 0].clone()
            if at % 2:  # a close race of two hundred, some of which are equal
                state = step._program._made["y"][:1]
                head.weight[400:600] = 9 * spread * state * (1 + 1e-7 * torch.randn(200, 1))
                head.weight[420:430] = head.weight[410]
                cache.crop(at)
                logits = step.step(tokens, 1)[:, 0].clone()
                assert logits[0].argmax() in range(400, 600)
            step._program.screen()
            cache.crop(at)
            peak, best = step.greedy(tokens)
            assert torch.equal(best, logits.argmax(-1))
            assert torch.equal(peak, logits.amax(-1))
            tried.append(step._program.tried)
        assert min(tried) < 100 * rows
        assert min(tried[1::2]) >= 200


def test_a_large_head_is_screened_where_that_pays_and_damage_is_still_named():
    torch.manual_seed(0)
    options = {**MODELS["bart"], "vocab_size": 20_000}
    model = AutoModelForSeq2SeqLM.from_config(Config(model_type="bart", **options)).eval()
    with torch.inference_mode():
        view = DecoderView(model, model.encode(torch.randint(5, 90, (2, 9))))
        cache, tokens = view.new_cache(), torch.tensor([[2], [2]])
        step = CompiledStep.of(view, cache, 30)
        for _ in range(3):
            step.greedy(tokens)
        assert step._program.screened
        assert 2 <= step._program.tried < 2000
    with torch.no_grad():
        model.lm_head.weight[19_990, 5] = float("nan")
    with pytest.raises(TopworkError, match="not numbers"):
        model.generate(torch.randint(5, 80, (1, 6)), max_new_tokens=30, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["t5 gated", "bart"])
def test_low_rank_adapters_act_while_they_are_on(name, dtype):
    model = made(name, dtype)
    adapted = get_peft_model(
        model, LoraConfig(r=5, lora_alpha=8, target_modules="all-linear")
    ).eval()  # fmt: skip
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.1)

    def said(terms):
        with torch.inference_mode():
            native, plain = views(model)
            step = CompiledStep.of(native, cache := native.new_cache(), 8)
            assert (len(step._program.kept) > 6) is terms
            other, found = plain.new_cache(), []
            for ids in torch.tensor([[5, 6, 7, 8]] * 3).split(1, 1):
                found.append(step.step(ids, 1).clone())
                wanted = said_by_modules(plain, ids, other)
                error = (found[-1] - wanted).norm() / wanted.norm()
                assert error < (3e-6 if dtype is torch.float32 else 0.02)
            assert cache.length == 4
            return torch.cat(found, 1)

    torch.manual_seed(1)
    on = said(True)
    torch.manual_seed(1)
    with adapted.disable_adapter():
        off = said(False)
    assert (on - off).norm() > 0.04 * on.norm()
    torch.manual_seed(1)
    adapted.merge_adapter()
    assert (said(False) - on).norm() < (1e-5 if dtype is torch.float32 else 0.05) * on.norm()


def test_a_text_longer_than_the_positions_is_refused_as_ever():
    model = made("bart")
    ids = torch.randint(5, 90, (1, 6))
    with pytest.raises(ValueError, match="longer than the 40 positions"):
        model.generate(ids, max_new_tokens=60, eos_token_id=None)


def test_damaged_weights_are_named():
    model = made("t5")
    with torch.no_grad():
        model.lm_head.weight[88, 3] = float("nan")
    with pytest.raises(TopworkError, match="not numbers"):
        model.generate(torch.randint(5, 80, (2, 6)), max_new_tokens=4, do_sample=False)


def test_modules_run_where_the_native_step_would_miss_something():
    model = made("bart")
    ids = torch.randint(5, 90, (2, 6))

    def compiled(model):
        with torch.inference_mode():
            view = DecoderView(model, model.encode(ids))
            return CompiledStep.of(view, view.new_cache(), 8)

    assert compiled(model) is not None
    assert compiled(made("bart", torch.float64)) is None
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert compiled(model) is None
    handle.remove()
    norm = model.decoder_stack.blocks[1].encoder_attn_layer_norm
    norm.eps = 0.5  # unlike the others'
    assert compiled(model) is None
    norm.eps = 1e-5
    assert compiled(model) is not None
    get_peft_model(model, IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]))
    assert compiled(model) is None
