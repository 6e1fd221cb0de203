"""Models called as scripts for transformers call them: loading, outputs, configurations."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import tiny
from topwork import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
)
from topwork.errors import ConfigError, TopworkWarning

BERT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(home)
    return home


def encoder_of(home, kind="BertModel", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, **options)
    made = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    made.save_pretrained(home)
    return made


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto", "torch_dtype": "auto"},
        {"device_map": {"": "cpu"}, "attn_implementation": "flash_attention_2"},
        {"trust_remote_code": True, "low_cpu_mem_usage": True, "use_safetensors": True},
        {"use_cache": False, "revision": "main", "token": None, "local_files_only": True},
    ],
)
def test_options_that_change_no_number_are_taken(folder, options):
    found = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(found.lm_head.weight, tiny.model().lm_head.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "one device"),
        ({"use_safetensors": False}, "allow_bin=True"),
        ({"max_memory": {0: "1GB"}}, "one device"),
        ({"tp_plan": "auto"}, "torchrun"),
        ({"atn_implementation": "eager"}, "no option 'atn_implementation'; nearest: 'attn"),
        ({"mixture_of_rivers": 3}, "does not act on: mixture_of_rivers=3"),
    ],
)
def test_options_that_ask_for_something_else_are_refused(folder, options, words):
    with pytest.raises(ConfigError, match=words):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_dtype_goes_by_its_old_name_too(folder):
    found = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert found.dtype is torch.bfloat16
    made = AutoModelForCausalLM.from_config(found.config, torch_dtype="bfloat16")
    assert made.dtype is torch.bfloat16


def test_bits_are_asked_for_by_their_old_names_too(folder):
    found = AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    assert found.quantization_config.load_in_8bit


def test_keys_of_the_configuration_are_changed_by_name(folder):
    found = AutoModelForCausalLM.from_pretrained(folder, pad_token_id=7, rms_norm_eps=1e-3)
    assert (found.config.pad_token_id, found.model.norm.eps) == (7, 1e-3)
    assert AutoConfig.from_pretrained(folder, num_labels=5).num_labels == 5
    assert AutoConfig.for_model("bert", hidden_size=8).hidden_size == 8


def test_a_head_of_another_size_starts_fresh_where_that_is_asked_for(tmp_path):
    encoder_of(tmp_path, "BertForSequenceClassification", num_labels=2)
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(OSError, match=r"classifier\.weight"):
        load(tmp_path, num_labels=5)
    with pytest.warns(TopworkWarning, match=r"classifier\.weight of this size"):
        found = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert found(torch.tensor([[1, 2]])).logits.shape == (1, 5)


def test_the_folder_of_an_adapter_says_how_it_is_loaded(tmp_path):
    get_peft_model(tiny.model(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="AutoPeftModelForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_models_save_safetensors_alone(tmp_path):
    tiny.model().save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match="safetensors alone"):
        tiny.model().save_pretrained(tmp_path, safe_serialization=False)


# -- outputs -----------------------------------------------------------------------------------


def test_outputs_are_read_by_attribute_name_and_place():
    ids = torch.tensor([[3, 4, 5]])
    bare, labelled = tiny.model()(ids), tiny.model()(ids, labels=ids)
    assert bare[0] is bare.logits is bare["logits"]
    assert list(bare) == bare.keys() == ["logits"]
    loss, logits = labelled[:2]
    assert loss is labelled["loss"]
    assert logits is labelled.to_tuple()[1]
    assert "loss" in labelled
    assert "loss" not in bare
    assert bare.get("loss") is None
    with pytest.raises(KeyError):
        bare["loss"]
    (logits,) = tiny.model()(ids, return_dict=False)
    assert logits.equal(bare.logits)
    assert tiny.model()(ids, return_dict=True).logits.equal(logits)


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_states_between_an_encoders_blocks_are_the_peers(tmp_path, kind, padded):
    peer = encoder_of(tmp_path, kind)
    auto = AutoModel if kind == "BertModel" else AutoModelForSequenceClassification
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1 - padded, 1 - padded]])
    asked = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    found, wanted = auto.from_pretrained(tmp_path)(**asked), peer(**asked)
    assert len(found.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states):
        real = mask.bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


def test_attention_weights_are_refused_by_encoders_too(tmp_path):
    encoder_of(tmp_path)
    with pytest.raises(ConfigError, match="output_attentions"):
        AutoModel.from_pretrained(tmp_path)(torch.tensor([[1]]), output_attentions=True)


# -- configurations and small things -----------------------------------------------------------


def test_absent_keys_read_as_they_are_meant():
    config = tiny.model().config
    assert (config.use_cache, config.is_encoder_decoder, config.problem_type) == (True, False, None)
    assert (config.num_labels, config.id2label[1], config.label2id) == (
        2, "LABEL_1", {"LABEL_0": 0, "LABEL_1": 1},
    )  # fmt: skip
    assert json.loads(config.to_json_string())["vocab_size"] == 259
    assert config.get_text_config() is config
    with pytest.raises(AttributeError, match="nearest: 'hidden_size'"):
        config.hiden_size  # noqa: B018


def test_labels_of_a_file_are_numbered(tmp_path):
    encoder_of(tmp_path, "BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert found.config.id2label[found(torch.tensor([[1, 2]])).logits.argmax().item()] in (
        "bad", "good",
    )  # fmt: skip
    assert found.num_labels == 2
    assert found.base_model is found.bert


def test_what_the_generation_config_says_is_set_by_attribute(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.max_new_tokens is None
    model.generation_config.max_new_tokens = 3
    model.generation_config.pad_token_id = model.config.eos_token_id
    assert model.generate(torch.tensor([[5, 6]]), eos_token_id=[]).shape == (1, 5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.to_dict()["max_new_tokens"] == 3


def test_embeddings_are_replaced_and_let_gradients_through():
    model = tiny.model()
    model.set_input_embeddings(torch.nn.Embedding(259, 16))
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert model.get_memory_footprint() == 4 * model.num_parameters()
