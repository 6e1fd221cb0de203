"""LLaMA-Adapter on our models against peft on transformers' models of the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import peft
import topwork
from parity.bases import IDS, close, randomise
from topwork.errors import ConfigError
from topwork.peft import PeftModel, get_peft_model

OPTIONS = {"adapter_len": 3, "adapter_layers": 2}
SIZES: dict[str, dict] = {
    "llama": {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "mistral": {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4,
    },
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
SIZES["llama with biases"] = {**SIZES["llama"], "attention_bias": True}
each = pytest.mark.parametrize("kind", SIZES)


def peers_base(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind.partition(" ")[0], vocab_size=37, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, **SIZES[kind],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture
def bare(tmp_path):
    """Makes our model with the weights of `peers_base`."""

    def make(kind):
        peers_base(kind).save_pretrained(tmp_path / kind)
        return topwork.AutoModelForCausalLM.from_pretrained(tmp_path / kind)

    return make


def adapted(model, **options):
    ours = get_peft_model(model, topwork.AdaptionPromptConfig(**{**OPTIONS, **options}))
    randomise(ours)
    return ours.eval()


@each
def test_on_our_models_outputs_losses_and_gradients_equal_the_peers(kind, bare, tmp_path):
    theirs = peft.get_peft_model(
        peers_base(kind), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **OPTIONS)
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(bare(kind), tmp_path / "theirs", is_trainable=True)
    keep = torch.ones_like(IDS)
    keep[1, -4:] = 0
    call = {"input_ids": IDS, "attention_mask": keep, "labels": IDS.masked_fill(keep == 0, -100)}
    wanted, found = theirs(**call), ours(**call)
    close(found.logits[keep.bool()], wanted.logits[keep.bool()], rtol=1e-4, atol=1e-4)
    close(found.loss, wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    grads = {n.rpartition("attn.")[0] + n.rpartition(".")[2]: p.grad
             for n, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    own = {n.rpartition("attn.")[0] + n.split(".")[-2]: p.grad
           for n, p in ours.named_parameters() if p.requires_grad}  # fmt: skip
    assert len(own) == 4
    assert own.keys() == grads.keys()
    for name, grad in own.items():
        close(grad, grads[name], rtol=1e-3, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(peers_base(kind), tmp_path / "ours")
    close(again(IDS).logits, theirs(IDS).logits)


@each
@torch.no_grad()
def test_packed_padded_cached_and_generated_agree(kind, bare):
    ours = adapted(bare(kind))
    whole = ours(IDS).logits
    assert not torch.allclose(whole, bare(kind)(IDS).logits, atol=1e-2)
    close(ours(IDS.view(1, -1), lengths=(11, 11)).logits.view(2, 11, -1), whole, atol=1e-4)
    padded = torch.cat([IDS.new_zeros(2, 3), IDS], 1)
    keep = torch.cat([IDS.new_zeros(2, 3), torch.ones_like(IDS)], 1)
    close(ours(padded, attention_mask=keep).logits[:, 3:], whole, atol=1e-4)
    cache = ours.new_cache()
    steps = [ours(part, past_key_values=cache).logits for part in IDS.split((5, 1, 5), 1)]
    close(torch.cat(steps, 1), whole, atol=1e-4)
    made = ours.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    ids = IDS[:, :4]
    for _ in range(4):
        ids = torch.cat([ids, ours(ids).logits[:, -1:].argmax(-1)], 1)
    ended = (made[:, 4:] == 2).cumsum(1).bool()  # what stands after the end is padding
    assert torch.equal(made[:, 4:][~ended], ids[:, 4:][~ended])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_starts_as_nothing_and_adapters_train_apart_under_checkpointing(kind, bare):
    model = bare(kind)
    before = model(IDS).logits
    close(get_peft_model(model, topwork.AdaptionPromptConfig(**OPTIONS))(IDS).logits, before)
    model = bare(kind).to(torch.bfloat16)
    before = model(IDS).logits
    ours = get_peft_model(model, topwork.AdaptionPromptConfig(**OPTIONS))
    nothing = ours(IDS).logits
    ours.gradient_checkpointing_enable()
    ours.train()
    ours.add_adapter("other", topwork.AdaptionPromptConfig(adapter_len=5, adapter_layers=3))
    first = {k: v.clone() for k, v in ours.adapter_state("default").items()}
    ours.set_adapter("other")
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == 6
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(25):
        loss = ours(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(v, first[k]) for k, v in ours.adapter_state("default").items())
    changed = ours(IDS).logits
    assert not torch.allclose(changed, nothing, atol=0.1)
    ours.set_adapter("default")
    assert torch.equal(ours(IDS).logits, nothing)
    ours.set_adapter("other")
    with ours.disable_adapter():
        close(ours(IDS).logits, before, atol=0.03, rtol=0.03)  # bf16: kernels differ in training
    assert torch.equal(copy.deepcopy(ours)(IDS).logits, changed)
    ours.delete_adapter("default")
    assert torch.equal(ours(IDS).logits, changed)
    plain = ours.unload()
    close(plain(IDS).logits, before, atol=0.03, rtol=0.03)
    assert not any(m._forward_pre_hooks for m in plain.modules())


@torch.no_grad()
def test_it_stands_beside_lora(bare):
    ours = adapted(bare("llama"))
    ours.add_adapter("lora", topwork.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    ours.set_adapter("lora")
    randomise(ours, seed=2)
    lora = ours(IDS).logits
    ours.set_adapter(["default", "lora"])
    assert not torch.allclose(ours(IDS).logits, lora, atol=1e-2)
    ours.set_adapter("lora")
    close(ours.merge_and_unload()(IDS).logits, lora, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_model_gives_the_same_outputs_and_gradients(kind, bare):
    ours = adapted(bare(kind), adapter_layers=1)
    torch._dynamo.reset()
    grads = []
    for run in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        logits = run(IDS).logits
        logits.square().mean().backward()
        grads.append((logits.detach(), [p.grad for p in ours.parameters() if p.requires_grad]))
        ours.zero_grad()
    close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_meant_is_refused(bare):
    config = topwork.AdaptionPromptConfig
    model = bare("llama")
    with pytest.raises(ConfigError, match=r"adapter_layers=4, but .* has 3 modules"):
        get_peft_model(model, config(adapter_len=2, adapter_layers=4))
    with pytest.raises(ConfigError, match="needs adapter_len"):
        get_peft_model(model, config(adapter_layers=1))
    with pytest.raises(ConfigError, match="adapter_len=0 must be at least 1"):
        config(adapter_len=0)
    with pytest.raises(ConfigError, match="layers_to_transform has no meaning"):
        config(layers_to_transform=[1])
    other = topwork.AutoModelForCausalLM.from_config(
        topwork.Config(
            model_type="qwen2", vocab_size=9, hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="knows llama, mistral, gpt2, not model_type 'qwen2'"):
        get_peft_model(other, config(adapter_len=2, adapter_layers=1))
    ours = adapted(model)
    with pytest.raises(ConfigError, match="no weight to merge into"):
        ours.merge_adapter()
    with pytest.raises(ConfigError, match="one adapter for all rows"):
        ours(IDS, adapter_names=["default", "__base__"])
