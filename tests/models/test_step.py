"""One token through a decoder's stack is what its modules say of it."""

from __future__ import annotations

import pytest
import torch

from topwork import AutoModelForSeq2SeqLM, Config, LoraConfig, get_peft_model
from topwork.models.seq2seq import DecoderView
from topwork.models.step import StackStep

SIZES = {
    "t5": {
        "vocab_size": 90, "d_model": 256, "d_kv": 64, "d_ff": 320, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
    },
    "bart": {
        "vocab_size": 90, "d_model": 256, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 320,
        "decoder_ffn_dim": 320, "max_position_embeddings": 9, "scale_embedding": True,
        "decoder_start_token_id": 2, "pad_token_id": 1,
    },
}  # fmt: skip


def made(family):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(Config(model_type=family, **SIZES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.5))
    return model.eval()


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_modules(family, dtype):
    model = made(family).to(dtype)
    ids, mask = torch.randint(5, 90, (3, 7)), torch.ones(3, 7)
    mask[1, 4:] = 0
    answers = torch.randint(5, 90, (6, 8))  # two of each text
    with torch.inference_mode():
        memory = model.encode(ids, mask)
        view = DecoderView(model, memory)
        assert view._step is not None
        caches = view.new_cache(), view.new_cache()
        order = torch.tensor([1, 0, 3, 2, 4, 4])
        for at, tokens in enumerate(answers.split(1, 1)):
            found = view.backbone(tokens, cache=caches[0])
            wanted = model.decode(None, tokens, cache=caches[1])
            error = (found - wanted).norm() / wanted.norm()
            assert error < (1e-5 if dtype is torch.float32 else 0.02)
            assert caches[0].length == caches[1].length == at + 1
            if at % 3 == 2:
                for cache in caches:
                    cache.select(order)


@pytest.mark.parametrize("family", SIZES)
def test_modules_run_where_the_step_would_miss_something(family):
    model = made(family)
    stack = model.decoder_stack
    assert StackStep.of(stack) is None  # a gradient may be asked for
    with torch.inference_mode():
        assert StackStep.of(stack) is not None
        assert StackStep.of(model.encoder_stack) is None
        handle = stack.blocks[1].register_forward_hook(lambda *_: None)
        assert StackStep.of(stack) is None
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert StackStep.of(stack) is None
        assert StackStep.of(stack.train()) is None
    names = {"t5": ["q"], "bart": ["q_proj"]}[family]
    adapted = get_peft_model(model.eval(), LoraConfig(r=4, target_modules=names)).eval()
    with torch.inference_mode():
        assert StackStep.of(model.decoder_stack) is None
    ids = torch.randint(5, 90, (2, 7))
    plain = adapted.generate(input_ids=ids, max_new_tokens=5)
    assert plain.shape[0] == 2
