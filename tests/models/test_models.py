from __future__ import annotations

import pytest
import torch

from topwork import AutoModel, AutoModelForCausalLM, Config, describe
from topwork.errors import CheckpointError, ConfigError
from topwork.models.capabilities import capabilities
from topwork.models.families import NAMES, family
from topwork.nn.cache import KVCache

SMALL = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Config(**{**SMALL, **changes}))


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match="clip_qkv=8"):
        build(clip_qkv=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "nearest: 'llama'"),
        ({"hidden_act": "sillu"}, "nearest: 'silu'"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_wrong_configuration_names_the_key(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(**changes)


def test_a_missing_attribute_of_the_configuration_names_the_nearest():
    with pytest.raises(AttributeError, match="nearest: 'hidden_size'"):
        _ = Config(hidden_size=1).hiden_size


def test_checkpointed_blocks_give_the_same_gradients():
    model = build().train()
    ids = torch.randint(0, 31, (1, 9))
    model(ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted))


def test_token_logprobs_sum_to_the_loss():
    model = build(tie_word_embeddings=True)
    ids = torch.randint(0, 31, (1, 9))
    hidden = model.backbone(ids)
    found = model.token_logprobs(hidden[0, :-1], ids[0, 1:])
    torch.testing.assert_close(-found.mean(), model(ids, labels=ids).loss)


def test_packed_labels_do_not_cross_documents():
    model = build()
    ids = torch.randint(0, 31, (1, 9))
    packed = model(ids, labels=ids, lengths=(4, 5)).loss
    one, two = (model(x, labels=x).loss for x in (ids[:, :4], ids[:, 4:]))
    torch.testing.assert_close(packed, (3 * one + 4 * two) / 7)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lengths": (3,)}, "sum"),
        ({"attention_mask": torch.zeros(1, 4)}, "every token"),
        ({"attention_mask": torch.tensor([[0, 1, 1]]), "cache": KVCache(2)}, "columns"),
    ],
)
def test_bad_calls_say_what_is_wrong(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        build().backbone(torch.zeros(1, 4, dtype=torch.long), **kwargs)


def test_a_cache_can_be_cropped_and_reordered():
    model = build().eval()
    ids = torch.randint(0, 31, (2, 8))
    with torch.no_grad():
        cache = model.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(5)
        cache.select(torch.tensor([1]))
        found = model(ids[1:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids[1:]).logits[:, 5:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(99)


def test_save_and_load_keep_dtype_and_tied_weights(tmp_path):
    model = build(tie_word_embeddings=True).to(torch.bfloat16)
    model.generation_config = {"eos_token_id": [3, 4]}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config == {"eos_token_id": [3, 4]}
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    with pytest.raises(ConfigError, match="nearest: 'float32'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float3")


def test_a_checkpoint_of_another_size_lists_every_tensor(tmp_path):
    build().save_pretrained(tmp_path)
    config = Config(**{**SMALL, "num_hidden_layers": 3, "intermediate_size": 20})
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    text = str(caught.value)
    assert "missing: model.layers.2.input_layernorm.weight" in text
    assert "model.layers.0.mlp.gate_proj.weight [24, 16] in the file, [20, 16] here" in text


def test_describe_tells_the_stack():
    text = describe(build())
    assert "layers 0-1" in text
    assert "heads=2" in text


def test_each_family_has_cases():
    assert all(len(family(name).CASES) >= 3 for name in NAMES)


def test_the_gelu_of_gemmas_first_files_is_its_tanh_form():
    models = [
        build(model_type="gemma", head_dim=8, num_key_value_heads=1, hidden_act=act)
        for act in ("gelu", "gelu_pytorch_tanh")
    ]
    ids = torch.arange(9)[None]
    assert torch.equal(*(model(ids).logits for model in models))


def test_an_option_without_meaning_here_is_refused():
    with pytest.raises(ConfigError, match="use_bidirectional_attention=True is not supported"):
        build(model_type="gemma", head_dim=8, use_bidirectional_attention=True)


@pytest.mark.parametrize("rate", ["resid_pdrop", "embd_pdrop"])
def test_dropout_acts_in_training_alone(rate):
    model = build(model_type="phi", **{rate: 0.5})
    ids = torch.arange(9)[None]
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_token_logprobs_pass_the_heads_scale_and_softcap():
    model = build(model_type="gemma2", head_dim=8, final_logit_softcapping=0.1)
    ids = torch.randint(0, 31, (1, 9))
    found = model.token_logprobs(model.backbone(ids)[0, :-1], ids[0, 1:])
    torch.testing.assert_close(-found.mean(), model(ids, labels=ids).loss)


def test_checkpointed_blocks_of_every_placing_of_norms_give_the_same_gradients():
    for kind in ("gemma2", "olmo2", "cohere"):
        model = build(model_type=kind, head_dim=8).train()
        ids = torch.randint(0, 31, (1, 9))
        model(ids, labels=ids).loss.backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted))


def test_an_unknown_llama_shaped_model_is_told_which_spec_to_try():
    with pytest.raises(ConfigError, match=r"has a meaning for llama, .*model_type 'llama'"):
        build(model_type="yi_new")
    with pytest.raises(ConfigError, match="has a meaning for granite"):
        build(model_type="newgranite", residual_multiplier=0.2, logits_scaling=8.0)
    with pytest.raises(ConfigError) as caught:
        build(model_type="strange", moon_phase=3)
    assert "has a meaning" not in str(caught.value)


def test_an_unknown_model_type_lists_the_near_ones():
    with pytest.raises(ConfigError, match="nearest: 'qwen3_moe', 'qwen2_moe'"):
        build(model_type="qwen4_moe", moon_phase=3)


def test_capabilities_come_from_the_code():
    table = capabilities()
    assert set(table) == set(NAMES)
    assert table["llama"]["sequence-classification"]
    assert not table["llama"]["masked-lm"]


def test_describe_shows_runs_of_layers_and_what_differs_from_the_usual():
    model = build(model_type="gemma2", head_dim=8, num_hidden_layers=3, sliding_window=7)
    lines = describe(model).splitlines()
    assert [line.split(":")[0] for line in lines[2:5]] == ["layer 0", "layer 1", "layer 2"]
    assert "window=7" in lines[2]
    assert "window" not in lines[3]
    assert "softcap=50" in lines[3]
    assert "rms-offset" in lines[-1]


@pytest.mark.parametrize("task", [AutoModel, AutoModelForCausalLM])
def test_states_between_blocks_are_given_when_asked_for_and_attentions_refused(task):
    values = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    model = task.from_config(Config(model_type="llama", **values)).eval()
    ids = torch.arange(9)[None]
    found = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in found] == [(1, 9, 16)] * 3
    assert torch.equal(found[0], model.get_input_embeddings()(ids))
    cache = model.new_cache()
    model(ids[:, :8], past_key_values=cache)
    step = model(ids[:, 8:], past_key_values=cache, output_hidden_states=True).hidden_states
    torch.testing.assert_close(step[1], found[1][:, 8:])
    assert model(ids).hidden_states is None
    with pytest.raises(ConfigError, match="never formed as a whole"):
        model(ids, output_attentions=True)
