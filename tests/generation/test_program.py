"""The native step against the modules, on tiny random models in bf16."""

from __future__ import annotations

import pytest
import torch

from topwork import (
    AutoModelForCausalLM,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from topwork.generation import loop
from topwork.generation.engine import Engine
from topwork.generation.program import compile_step
from topwork.models import Config
from topwork.ops.native import decode
from topwork.quant import Blocks, QuantisedLinear, quantise
from topwork.quant.config import linears_of

pytestmark = pytest.mark.skipif(not decode.ready(), reason="there is no C compiler")

BASE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "rope_theta": 500.0},
    "tied, biases, gelu": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True,
        "mlp_bias": True, "hidden_act": "gelu",
    },
    "wide heads": {"model_type": "llama", "head_dim": 96, "num_key_value_heads": 1},
    "windows": {"model_type": "mistral", "sliding_window": 7, "num_key_value_heads": 4},
    "biases": {"model_type": "qwen2", "hidden_size": 128},
    "head norms": {"model_type": "qwen3", "head_dim": 64, "num_attention_heads": 6},
    "fused": {"model_type": "phi3", "sliding_window": None, "pad_token_id": 0},
    "offset norms, caps": {
        "model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    },
    "multipliers": {
        "model_type": "granite", "residual_multiplier": 0.4, "logits_scaling": 3.0,
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
    },
    "norms over all heads, behind the branches": {"model_type": "olmo2"},
    "norms without weights": {"model_type": "olmo"},
    "layer norms, one for both branches, neighbours turn": {
        "model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.5,
    },
    "no positions": {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 0},
    "half the head turns, no gate, parallel": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "biased norms, norms by head": {
        "model_type": "stablelm", "partial_rotary_factor": 0.25, "qk_layernorm": True,
        "use_qkv_bias": True,
    },
    "biased norms, no gate": {"model_type": "starcoder2", "sliding_window": 8},
    "neighbours of half the head turn, sandwiched": {
        "model_type": "glm4", "partial_rotary_factor": 0.5, "pad_token_id": 0,
        "attention_bias": True,
    },
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    options = {**BASE, **FAMILIES[name]}
    if options["model_type"] not in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "glm4"):
        options.pop("head_dim")
        options["hidden_size"] = 128
    model = AutoModelForCausalLM.from_config(Config(**options))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            scale = 0.3 if "norm" in path else 0.15
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in path))
    return model.to(torch.bfloat16).eval()


def by_program(model, ids, splits, *, portable=False, **options):
    """Logits [T, V] of one text, whose tokens are the rows of one run per split."""
    step = compile_step(model, 64, 128, portable=portable, **options)
    assert step is not None
    size = 16
    caches = [
        [torch.randn(20, size, k, d).to(torch.bfloat16) for k, d in step.shapes] for _ in "kv"
    ]
    step.bind(*caches)
    pages = torch.tensor([[7, 3, 12, 5, 1, 9]], dtype=torch.int32)
    found, at = [], 0
    for count in splits:
        places = torch.arange(at, at + count)
        found.append(step.run(ids[places], places, pages.repeat(count, 1)).clone())
        at += count
    return torch.cat(found)


def agree(found, wanted, exact):
    """Both are bf16's distance from the fp32 result `exact`."""
    scale = exact.std()
    mine, theirs = ((t.float() - exact).pow(2).mean().sqrt() / scale for t in (found, wanted))
    assert mine < 1.3 * theirs + 2e-3, (mine, theirs)


@pytest.mark.parametrize("portable", [False, True], ids=["amx", "portable"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_program_computes_what_the_modules_do(name, portable):
    model = make(name)
    ids = torch.randint(0, 96, (45,))
    found = by_program(model, ids, [45], portable=portable)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
        exact = model.float()(ids[None]).logits[0]
    agree(found, wanted, exact)


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
def test_a_row_is_the_same_to_the_bit_in_any_company(bits):
    model = make("head norms")
    if bits:
        quantise(model, bits)
    ids = torch.randint(0, 96, (45,))
    whole = by_program(model, ids, [45], steady=True)
    assert torch.equal(by_program(model, ids, [1] * 45, steady=True), whole)
    assert torch.equal(by_program(model, ids, [3, 17, 1, 1, 23], steady=True), whole)


@pytest.mark.parametrize("portable", [False, True], ids=["amx", "portable"])
@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
def test_weights_of_few_bits_compute_as_dequantised(bits, count, portable):
    model = quantise(make("llama"), bits)
    ids = torch.randint(0, 96, (40,))
    found = by_program(model, ids, [count] * (40 // count), portable=portable)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    assert (found.float() - wanted.float()).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("portable", [False, True], ids=["amx", "portable"])
def test_the_first_of_the_largest_logits_is_told_and_what_is_no_number(portable):
    model = make("tied, biases, gelu")
    step = compile_step(model, 64, 128, portable=portable)
    assert step is not None
    x, found, peak = torch.randn(64, 1300).to(torch.bfloat16), step.best, step.peak
    x[3, 700] = x[3, 701] = x[3, 90] = 9
    x[5], x[6, 1299] = -3, 8
    x[7, 650] = float("nan")
    x[8] = float("-inf")
    step.program._code.clear()
    step.program.best(x, found, peak)
    step.run(torch.zeros(40, dtype=torch.long), *[torch.zeros(40, 1, dtype=torch.int32)] * 2)
    wanted = x[:40].float().max(-1)
    assert found[3] == 90
    assert found[6] == 1299
    assert peak[7].isnan()
    rest = torch.arange(40) != 7
    assert torch.equal(found[:40][rest], wanted.indices[rest].int())
    assert torch.equal(peak[:40][rest], wanted.values[rest])


@pytest.mark.parametrize("portable", [False, True], ids=["amx", "portable"])
def test_wanted_rows_go_through_their_own_adapters_head(portable):
    model = make("llama")
    lora = LoraConfig(r=40, target_modules=["lm_head", "up_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora, "a")
    model.add_adapter("b", LoraConfig(r=5, target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    step = compile_step(model, 64, 128, ["a", "b"], portable=portable)
    assert step is not None
    shape = [(20, 16, k, d) for k, d in step.shapes]
    step.bind(*([torch.zeros(s, dtype=torch.bfloat16) for s in shape] for _ in "kv"))
    ids, rows = torch.randint(0, 96, (3,)), torch.arange(3, dtype=torch.int32)
    found = step.run(
        ids, torch.zeros(3, dtype=torch.long), rows[:, None].contiguous(),
        adapter=torch.tensor([0, 1, -1], dtype=torch.int32), wanted=rows[[2, 1]].contiguous(),
    )  # fmt: skip
    with torch.no_grad(), model.disable_adapter():
        wanted = [model(ids[2:, None]).logits[0, -1]]
    model.set_adapter("b")
    with torch.no_grad():
        wanted.append(model(ids[1:2, None]).logits[0, -1])
    wanted = torch.stack(wanted)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("form", [Blocks("nf4"), Blocks("fp4", double=True)], ids=str)
@pytest.mark.parametrize("count", [1, 20])
def test_flat_blocks_compute_as_dequantised(form, count):
    model = make("biases")
    for path, linear in list(linears_of(model, model.trunk)):
        home, _, name = path.rpartition(".")
        if linear.in_features % 64 == 0:
            setattr(model.get_submodule(home), name, QuantisedLinear.of(linear, form))
    ids = torch.randint(0, 96, (40,))
    found = by_program(model, ids, [count] * (40 // count))
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    assert (found.float() - wanted.float()).abs().max() < 0.05 * wanted.abs().max()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.native_weight() is layer.native_weight()
    before = layer.native_weight()
    layer.set_weight(torch.randn(layer.shape))
    assert layer.native_weight() is not before


@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
def test_a_fused_linear_of_few_bits_is_read_in_parts(bits):
    model = quantise(make("fused"), bits)
    ids = torch.randint(0, 96, (20,))
    found = by_program(model, ids, [20])
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    assert (found.float() - wanted.float()).abs().max() < 0.05 * wanted.abs().max()


def without_program(monkeypatch):
    monkeypatch.setattr(loop.CachedProgram, "of", classmethod(lambda *_: None))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_generate_scores_as_without_it(monkeypatch, options, padded):
    model = make("windows")
    ids = torch.randint(0, 96, (1 if "prompt_lookup_num_tokens" in options else 2, 12))
    mask = torch.ones_like(ids)
    if padded and len(ids) > 1:
        mask[1, :5] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 30, "return_dict_in_generate": True,
        "output_scores": True, **options,
    }  # fmt: skip
    found = model.generate(ids, **options)
    without_program(monkeypatch)
    wanted = model.generate(ids, **options)
    # Rounding may turn a near tie; until then the scores agree.
    for mine, theirs in zip(found.scores, wanted.scores):
        if (mine.argmax(-1) != theirs.argmax(-1)).any():
            break
        assert (mine - theirs).abs().max() < 0.1 * theirs.abs().max()
    assert found.sequences.shape[0] == wanted.sequences.shape[0]
    assert torch.equal(found.sequences[:, :14], wanted.sequences[:, :14])


def test_a_mask_of_padding_gives_what_the_row_gives_alone():
    model = make("llama")
    ids = torch.randint(1, 96, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 1, "return_dict_in_generate": True}
    both = model.generate(ids, attention_mask=mask, **options).past_key_values
    alone = model.generate(ids[1:, 5:], **options).past_key_values
    new = torch.tensor([[4], [9]])
    step = loop.Stepper(model, both, torch.cat((mask, mask.new_ones(2, 9)), 1), None, 21)
    lone = loop.Stepper(model, alone, None, None, 16)
    found = [step(new)[1, -1], lone(new[1:])[0, -1]]
    assert step._program is not None
    assert lone._program is not None
    assert (found[0] - found[1]).abs().max() < 0.05 * found[1].abs().max()


def adapted():
    model = get_peft_model(
        make("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "a"
    )
    model.add_adapter(
        "b", LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    return model.eval()


def test_adapters_of_rows_compute_as_in_the_modules(monkeypatch):
    model = adapted()
    rows = [torch.randint(0, 96, (n,)).tolist() for n in (9, 20, 13, 7, 30)]
    names = ["a", None, "b", "a", "b"]
    engine = Engine(model, page_size=16)
    assert engine.runner.native
    asked = [engine.submit(r, max_new_tokens=6, adapter=n) for r, n in zip(rows, names)]
    list(engine.run())
    for ids, name, request in zip(rows, names, asked):
        one = Engine(model, page_size=16)
        alone = one.submit(ids, max_new_tokens=6, adapter=name)
        list(one.run())
        assert alone.ids == request.ids
        with torch.no_grad():
            if name is None:
                with model.disable_adapter():
                    logits = model(torch.tensor([request.ids])).logits[0]
            else:
                model.set_adapter(name)
                logits = model(torch.tensor([request.ids])).logits[0]
        for place in range(len(ids) - 1, len(request.ids) - 1):
            row = logits[place].float()
            assert row.max() - row[request.ids[place + 1]] < 0.05 * row.abs().max(), name


def test_a_changed_adapter_is_read_again():
    model = adapted()
    engine = Engine(model, page_size=16)
    ids = list(range(3, 20))
    before = engine.submit(ids, max_new_tokens=12, adapter="a")
    list(engine.run())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.a" in name:
                parameter.mul_(-4)
    after = engine.submit(ids, max_new_tokens=12, adapter="a")
    list(engine.run())
    fresh = Engine(model, page_size=16)
    again = fresh.submit(ids, max_new_tokens=12, adapter="a")
    list(fresh.run())
    assert after.ids == again.ids != before.ids


def test_what_has_no_words_is_left_to_the_modules():
    model = make("llama")
    assert compile_step(model.float(), 4, 32) is None
    model = make("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert compile_step(model, 4, 32) is None
    odd = AutoModelForCausalLM.from_config(
        Config(**{**BASE, "model_type": "llama", "head_dim": 20})
    )
    assert compile_step(odd.to(torch.bfloat16), 4, 32) is None


GRAFTS = {
    "LoRA": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "DoRA": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "aLoRA": LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, alora_invocation_tokens=[5, 6],
        task_type="CAUSAL_LM",
    ),
    "IA3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAFTS)
def test_generate_uses_the_active_adapter(kind):
    model = make("llama")
    ids = torch.tensor([[9, 5, 6, 40, 3, 77, 5, 6, 12]])
    bare = model.generate(ids, max_new_tokens=8)
    adapted = get_peft_model(model, GRAFTS[kind]).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "ia3" not in name:
            parameter.data.mul_(3)
        elif parameter.requires_grad:
            parameter.data.copy_(1 + torch.randn_like(parameter))
    found = adapted.generate(ids, max_new_tokens=8)
    assert found.tolist() != bare.tolist()
    for end in range(ids.shape[1], found.shape[1]):
        logits = adapted(found[:, :end]).logits[0, -1].float()
        best, told = logits.max(), logits[found[0, end]]
        assert best - told <= 0.03 * best.abs()  # bf16: near ties may fall either way
    with adapted.disable_adapter():
        assert adapted.generate(ids, max_new_tokens=8).tolist() == bare.tolist()


def test_a_text_may_outgrow_the_trained_context_in_the_engine():
    model = make("llama")
    model.config.max_position_embeddings = 64
    engine = Engine(model)
    request = engine.submit(list(range(1, 61)), max_new_tokens=30)
    list(engine.run())
    assert engine.runner.native
    assert request.error is None
    alone = model.generate(torch.arange(1, 61)[None], max_new_tokens=30)
    assert len(request.ids) == alone.shape[1]
    assert request.ids[:64] == alone[0, :64].tolist()
