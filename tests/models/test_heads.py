"""Bare models and classifiers against transformers, and the labels they take."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import topwork
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES, family

TINY = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 3, 4, 8, 7, 1]])
MASK = (IDS != 0).long()


def peer(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **{**TINY, **changes})
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


LABELS = [
    ({"num_labels": 3}, torch.tensor([2, 0])),
    ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
    ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ({"num_labels": 3, "problem_type": "regression"}, torch.randn(2, 3)),
]


@pytest.mark.parametrize(("changes", "labels"), LABELS, ids=range(len(LABELS)))
def test_a_text_classifier_equals_the_peer_and_saves_as_it_does(changes, labels, tmp_path):
    theirs = peer("AutoModelForSequenceClassification", **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = topwork.AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    wanted = theirs(IDS, attention_mask=MASK, labels=labels)
    found = ours(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    by_pad = ours(IDS).logits[1]  # without a mask the padding id tells
    torch.testing.assert_close(by_pad, wanted.logits[1], rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(IDS, attention_mask=MASK).logits, wanted.logits)


def test_a_token_classifier_equals_the_peer(tmp_path):
    theirs = peer("AutoModelForTokenClassification", num_labels=4)
    theirs.save_pretrained(tmp_path)
    ours = topwork.AutoModelForTokenClassification.from_pretrained(tmp_path)
    labels = torch.randint(0, 4, IDS.shape).masked_fill(MASK == 0, -100)
    wanted = theirs(IDS, attention_mask=MASK, labels=labels)
    found = ours(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    real = MASK == 1
    torch.testing.assert_close(found.logits[real], wanted.logits[real], rtol=1e-5, atol=1e-5)
    ours.train()
    assert not torch.equal(ours(IDS).logits, ours(IDS).logits)  # dropout before the head


def test_the_bare_model_reads_causal_files_and_writes_names_without_the_head(tmp_path):
    theirs = peer("AutoModelForCausalLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "causal")
    ours = topwork.AutoModel.from_pretrained(tmp_path / "causal")
    wanted = theirs.model(IDS, attention_mask=MASK).last_hidden_state
    found = ours(IDS, attention_mask=MASK).last_hidden_state
    real = MASK == 1
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert set(ours.state_dict()) == set(theirs.model.state_dict())
    ours.save_pretrained(tmp_path / "bare")
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        topwork.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")


def test_the_bare_model_is_one_with_its_trunk():
    model = topwork.AutoModel.from_config(topwork.Config(model_type="llama", **TINY))
    model.embed_tokens = torch.nn.Embedding(31, 16)
    assert model.trunk.embed_tokens is model.embed_tokens
    model.train()
    assert model.trunk.training
    model.gradient_checkpointing_enable()
    model(IDS).last_hidden_state.sum().backward()
    assert model.embed_tokens.weight.grad is not None
    cached = model.eval()(IDS[:1, :3], use_cache=True)
    tail = model(IDS[:1, 3:], past_key_values=cached.past_key_values).last_hidden_state
    torch.testing.assert_close(tail, model(IDS[:1]).last_hidden_state[:, 3:], rtol=1e-5, atol=1e-5)


def test_a_head_that_the_file_lacks_starts_fresh_and_is_named(tmp_path):
    peer("AutoModelForCausalLM").save_pretrained(tmp_path)
    with pytest.warns(TopworkWarning, match=r"has no score\.weight"):
        model = topwork.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, id2label={0: "bad", 1: "good", 2: "fine"}, dtype="bfloat16"
        )
    assert model.score.weight.shape == (3, 16)
    assert model.score.weight.dtype == torch.bfloat16
    assert 0.01 < model.score.weight.float().std() < 0.04
    assert model.config.label2id == {"bad": 0, "good": 1, "fine": 2}


def test_packed_texts_get_the_classes_that_they_get_alone(tmp_path):
    peer("AutoModelForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    model = topwork.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    packed = model(torch.cat([IDS[0, :4], IDS[1]])[None], lengths=(4, 6)).logits
    torch.testing.assert_close(packed, model(IDS, attention_mask=MASK).logits)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"id2label": {0: "a", 2: "b"}}, "number its labels"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "names 2"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "contradicts"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(labels, words):
    with pytest.raises(ConfigError, match=words):
        topwork.Config(model_type="llama").with_labels(**labels)


def test_texts_without_a_known_end_are_refused():
    config = topwork.Config(model_type="llama", **{**TINY, "pad_token_id": None})
    model = topwork.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError, match="attention_mask"):
        model(IDS)
    config = topwork.Config(model_type="llama", **TINY, problem_type="regresion")
    model = topwork.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError, match="nearest: 'regression'"):
        model(IDS, labels=torch.zeros(2))


HEADED = [
    name
    for name in NAMES
    if "sequence-classification" in tasks_of(name)
    and "causal-lm" in tasks_of(name)
    and name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    and hasattr(family(name), "spec")
]


@pytest.mark.parametrize("name", HEADED)
def test_a_text_classifier_of_each_decoder_equals_the_peer(name, tmp_path):
    sizes = {**TINY, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}
    sizes |= {"max_position_embeddings": 64, "num_labels": 3}
    torch.manual_seed(0)
    values = {**sizes, **getattr(family(name), "TINY", {}), **family(name).CASES[0]}
    config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(values)))
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = topwork.AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(IDS, attention_mask=MASK).logits
        found = ours(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
