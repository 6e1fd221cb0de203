"""Mamba beyond the table of decoders: files, adapters, decoding with a state, bf16."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft
import topwork
from topwork.errors import ConfigError
from topwork.models.families.mamba import TINY
from topwork.nn.cache import KVCache
from topwork.peft import PeftModel

COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[0, 0, 0, 7, 9, 3, 4], [5, 6, 7, 8, 22, 60, 11]])
MASK = (IDS != 0).long()


def peer(**changes):
    torch.manual_seed(0)
    config = transformers.MambaConfig(**{**COMMON, **TINY, **changes})
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model


@pytest.fixture
def pair(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path / "model")
    return theirs, topwork.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_old_files_and_the_bare_model_load(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("backbone.embeddings", "backbone.embedding"): tensor
        for name, tensor in state.items()
    }
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        wanted = theirs.backbone(IDS[1:]).last_hidden_state
        for kind in ("AutoModel", "AutoModelForCausalLM"):
            model = getattr(topwork, kind).from_pretrained(tmp_path)
            torch.testing.assert_close(model.backbone(IDS[1:]), wanted, rtol=1e-4, atol=1e-5)
    bare = topwork.AutoModel.from_pretrained(tmp_path)
    bare.save_pretrained(tmp_path / "bare")
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_greedy_decoding_of_a_padded_batch_gives_the_peers_tokens(pair):
    theirs, ours = pair
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(IDS, attention_mask=MASK, **options)
    assert torch.equal(ours.generate(IDS, attention_mask=MASK, **options), wanted)


def test_beams_reorder_the_states(pair):
    theirs, ours = pair
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None,
               "pad_token_id": 0}  # fmt: skip
    wanted = theirs.generate(IDS[1:], **options, use_cache=False)
    assert torch.equal(ours.generate(IDS[1:], **options), wanted)


def test_branches_go_on_from_their_beginning(pair):
    _, ours = pair
    ids = torch.randint(3, 61, (1, 14))
    with torch.no_grad():
        shared = ours.backbone(ids, lengths=((5, 4, 3), 2))[0]
        first = ours.backbone(ids[:, :9])[0]
        second = ours.backbone(torch.cat((ids[:, :5], ids[:, 9:12]), 1))[0, 5:]
        third = ours.backbone(ids[:, 12:])[0]
    torch.testing.assert_close(shared, torch.cat((first, second, third)), rtol=1e-4, atol=1e-5)


def test_a_fresh_model_begins_as_the_paper_says():
    config = topwork.Config(model_type="mamba", time_step_max=0.05, **COMMON, **TINY)
    mixer = topwork.AutoModelForCausalLM.from_config(config).backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log[3].exp(), torch.arange(1.0, 7))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.00099
    assert steps.max() <= 0.0501
    assert mixer.dt_proj.weight.abs().max() <= 5**-0.5


def test_the_stack_is_described(pair):
    assert "layers 0-1: width=80; state=6; kernel=4; rank=5" in topwork.describe(pair[1])


def test_checkpointed_blocks_give_the_same_gradients(pair):
    _, ours = pair
    ours.train()
    ours(IDS[1:], labels=IDS[1:]).loss.backward()
    wanted = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours(IDS[1:], labels=IDS[1:]).loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(ours.parameters(), wanted))


def test_an_adapter_of_peft_loads_with_equal_outputs_and_gradients(pair, tmp_path):
    base, ours = pair
    options = {"r": 3, "target_modules": ["in_proj", "x_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    wanted, found = theirs(IDS[1:], labels=IDS[1:]), adapted(IDS[1:], labels=IDS[1:])
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    by_name = dict(theirs.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, by_name[name].grad, rtol=1e-4, atol=1e-6, msg=name
            )


@pytest.mark.parametrize("wide", [True, False])
def test_bf16_is_as_near_to_fp32_as_the_peer_is(wide, tmp_path):
    exact = peer(residual_in_fp32=wide)
    exact.save_pretrained(tmp_path)
    ids = torch.randint(3, 61, (4, 40))
    with torch.no_grad():
        truth = exact(ids).logits
        theirs = exact.to(torch.bfloat16)(ids).logits.float()
        model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
        found = model(ids).logits.float()
    assert (found - truth).norm() < 1.2 * (theirs - truth).norm()


def test_a_state_does_what_it_can_and_says_what_it_cannot(pair):
    _, ours = pair
    cache = ours.new_cache()
    with torch.no_grad():
        ours(IDS[1:, :4], past_key_values=cache)
        cache.crop(4)
        with pytest.raises(ValueError, match="cannot go back to 2"):
            cache.crop(2)
        cache.crop(0)
        again = ours(IDS[1:], past_key_values=cache).logits
        torch.testing.assert_close(again, ours(IDS[1:]).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(ConfigError, match="new_cache"):
            ours(IDS, past_key_values=KVCache(2))
        with pytest.raises(ConfigError, match="on the left"):
            ours(IDS.flip(1), attention_mask=MASK.flip(1), use_cache=True)
