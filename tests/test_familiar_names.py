"""Names of other libraries: what they mean here, or what to use instead."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers

import tiny
import topwork
from topwork._familiar import ABSENT, PLAIN
from topwork.errors import DataError

MEANT = {
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPTNeoXForCausalLM": "AutoModelForCausalLM",
    "BertModel": "AutoModel",
    "CLIPModel": "AutoModel",
    "DistilBertForSequenceClassification": "AutoModelForSequenceClassification",
    "Wav2Vec2ForSequenceClassification": "AutoModelForAudioClassification",
    "Wav2Vec2ForCTC": "AutoModelForCTC",
    "XLMRobertaForTokenClassification": "AutoModelForTokenClassification",
    "DebertaV2ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "MarianMTModel": "AutoModelForSeq2SeqLM",
    "WhisperForConditionalGeneration": "AutoModelForSpeechSeq2Seq",
    "LlavaForConditionalGeneration": "AutoModelForImageTextToText",
    "ViTForImageClassification": "AutoModelForImageClassification",
    "BertTokenizerFast": "AutoTokenizer",
    "GPT2Tokenizer": "AutoTokenizer",
    "ViTImageProcessor": "AutoImageProcessor",
    "Wav2Vec2FeatureExtractor": "AutoFeatureExtractor",
    "WhisperProcessor": "AutoProcessor",
}


@pytest.mark.parametrize("name", MEANT)
def test_a_familys_class_is_the_auto_class_of_its_task(name):
    assert getattr(topwork, name) is getattr(topwork, MEANT[name])
    assert hasattr(transformers, name)


def test_a_familys_configuration_says_whose_it_is():
    config = topwork.LlamaConfig(**tiny.model().config.to_dict())
    assert isinstance(config, topwork.Config)
    made = topwork.LlamaForCausalLM(config)
    assert made.num_parameters() == tiny.model().num_parameters()
    assert topwork.GPT2Config(n_embd=8).model_type == "gpt2"


@pytest.mark.parametrize("name", PLAIN)
def test_base_classes_are_there_for_isinstance_and_hints(name):
    assert isinstance(getattr(topwork, name), type)
    assert hasattr(transformers, name)


def test_models_and_tokenizers_are_of_the_base_classes():
    assert isinstance(tiny.model(), topwork.PreTrainedModel)
    assert isinstance(tiny.tokenizer(), topwork.PreTrainedTokenizerBase)
    assert isinstance(tiny.tokenizer()("a"), topwork.BatchEncoding)


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_an_absent_name_says_what_to_use(name):
    with pytest.raises(ImportError, match=f"topwork has no {name}: "):
        exec(f"from topwork import {name}")


@pytest.mark.parametrize("name", ["BertForPreTraining", "FooModel", "tree", "SFTTraner"])
def test_an_unknown_name_is_none_at_all(name):
    assert not hasattr(topwork, name)
    assert not hasattr(importlib.import_module("topwork"), name)


def test_choices_are_collated_as_the_peer_does():
    rows = [
        {"input_ids": [[5, 6, 7], [8]], "attention_mask": [[1, 1, 1], [1]], "label": 1},
        {"input_ids": [[9], [5, 6]], "attention_mask": [[1], [1, 1]], "label": 0},
    ]
    found = topwork.DataCollatorForMultipleChoice(tiny.tokenizer())(rows)
    assert found["input_ids"].tolist() == [[[5, 6, 7], [8, 0, 0]], [[9, 0, 0], [5, 6, 0]]]
    assert found["attention_mask"].sum((1, 2)).tolist() == [4, 3]
    assert torch.equal(found["labels"], torch.tensor([1, 0]))
    with pytest.raises(DataError, match="choices"):
        topwork.DataCollatorForMultipleChoice(tiny.tokenizer())(
            [rows[0], {"input_ids": [[1]], "attention_mask": [[1]], "label": 0}]
        )
