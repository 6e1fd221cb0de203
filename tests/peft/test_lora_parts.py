"""LoRA's other parts on our models: stacked experts, token rows, tied weights, replication."""

from __future__ import annotations

import pytest
import torch

import topwork
from parity.bases import IDS, close, randomise
from topwork.errors import ConfigError
from topwork.peft import LoraConfig, PeftModel, get_peft_model


def model(kind="qwen2_moe", **more):
    torch.manual_seed(0)
    experts = {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 12,
    }  # fmt: skip
    config = topwork.Config(
        model_type=kind, vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        **(experts if "moe" in kind else {}), **more,
    )  # fmt: skip
    return topwork.AutoModelForCausalLM.from_config(config)


def trained(ours, steps=8):
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = ours(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(ours):
    with torch.no_grad():
        return ours(IDS).logits


def test_stacked_experts_train_merge_and_load_again(tmp_path):
    config = LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ours = get_peft_model(model(), config)
    close(logits(ours), logits(model()))
    losses = trained(ours.train())
    assert losses[-1] < losses[0] - 0.05
    wanted = logits(ours.eval())
    ours.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(model(), tmp_path)), wanted)
    ours.merge_adapter()
    close(logits(ours), wanted, atol=1e-4)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), wanted)
    close(logits(ours.merge_and_unload()), wanted, atol=1e-4)


def test_token_rows_of_a_tied_head_stay_tied(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    ours = get_peft_model(model("qwen2", tie_word_embeddings=True), config)
    tokens = [n for n, p in ours.named_parameters() if "trainable_tokens" in n and p.requires_grad]
    assert len(tokens) == 1
    randomise(ours)
    wanted = logits(ours.eval())
    plain = logits(model("qwen2", tie_word_embeddings=True))
    assert not torch.allclose(wanted[..., 3], plain[..., 3], atol=1e-2)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model("qwen2", tie_word_embeddings=True), tmp_path)
    close(logits(again), wanted)
    merged = ours.merge_and_unload()
    close(logits(merged), wanted, atol=1e-4)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_token_rows_of_a_scaled_embedding_are_scaled_too(tmp_path):
    """Gemma multiplies what its embedding gives: trained rows start as the base's."""
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    ours = get_peft_model(model("gemma", head_dim=8), config)
    close(logits(ours.eval()), logits(model("gemma", head_dim=8)))
    randomise(ours)
    wanted = logits(ours)
    ours.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(model("gemma", head_dim=8), tmp_path)), wanted)
    close(logits(ours.merge_and_unload()), wanted, atol=1e-4)


def test_merging_into_a_tied_embedding_leaves_the_head_alone(tmp_path):
    config = LoraConfig(target_modules=["embed_tokens"], r=2)
    ours = get_peft_model(model("qwen2", tie_word_embeddings=True), config)
    randomise(ours)
    wanted = logits(ours.eval())
    merged = ours.merge_and_unload()
    close(logits(merged), wanted, atol=1e-4)
    merged.save_pretrained(tmp_path)
    close(logits(topwork.AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, atol=1e-4)


def test_replicated_layers_share_weights_and_have_their_own_adapters():
    size = model("qwen2").num_parameters()
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    ours = get_peft_model(model("qwen2"), config)
    assert len(ours.get_base_model().model.layers) == 3
    trainable, total = ours.get_nb_trainable_parameters()
    assert trainable == 3 * 2 * 48
    assert total == size + trainable
    losses = trained(ours.train())
    assert losses[-1] < losses[0] - 0.02
    made = ours.eval().generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert made.shape == (2, 7)


@pytest.mark.parametrize(("options", "words"), [
    ({"target_parameters": ["experts.gate_up_prj"]}, "nearest: 'experts.gate_up_proj'"),
    ({"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1}, "lora_dropout"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [99]}, "of the 37 rows"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": {"wte": [1]}}, "no module 'wte'"),
    ({"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "two parts"),
    ({"target_modules": ["q_proj"], "layer_replication": [(1, 4)]}, "no range of 2"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        get_peft_model(model(), LoraConfig(**options))


@pytest.mark.parametrize("tied", [True, False])
def test_a_heads_trained_rows_take_the_fused_path_with_equal_gradients(tied):
    """Of the loss and of its gradients: against the logits whole."""
    indices = [3, 5, 11] if tied else {"embed_tokens": [3, 5, 11], "lm_head": [5, 11]}
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
    ours = get_peft_model(model("qwen2", tie_word_embeddings=tied), config)
    randomise(ours)
    ids = torch.tensor([[3, 7, 5, 11, 5, 2, 3, 9]])
    weights = torch.randn(7)
    assert ours.get_output_embeddings().swapped() is not None
    found = []
    for whole in (True, False):
        ours.zero_grad()
        hidden = ours.backbone(ids)[0, :-1]
        if whole:
            said = ours.head(hidden).float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        else:
            said = ours.token_logprobs(hidden, ids[0, 1:])
        (said * weights).sum().backward()
        grads = [p.grad for p in ours.parameters() if p.grad is not None]
        found.append((said.detach(), *grads))
    for a, b in zip(*found, strict=True):
        close(b, a, atol=1e-5)
    with ours.disable_adapter():
        assert ours.get_output_embeddings().swapped() is None
    ours.merge_adapter()
    assert ours.get_output_embeddings().swapped() is None
