"""Pipelines made and called as scripts for transformers do it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors

import tiny
from topwork import AutoModel, AutoModelForSequenceClassification, Config, pipeline
from topwork.errors import ConfigError
from topwork.pipelines import KeyDataset
from topwork.text import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "day", "rain"]
SIZES = {
    "model_type": "bert", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
    "pad_token_id": 0, "initializer_range": 0.5, "type_vocab_size": 2,
}  # fmt: skip
TEXTS = ["good day", "bad rain day", "rain"]


def write(home, auto, **changes):
    torch.manual_seed(0)
    auto.from_config(Config(**SIZES, **changes)).save_pretrained(home)
    core = Core(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    Tokenizer(core, {"pad_token": "[PAD]", "unk_token": "[UNK]"}).save_pretrained(home)
    return str(home)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write(tmp_path_factory.mktemp("judge"), AutoModelForSequenceClassification)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    home = tmp_path_factory.mktemp("talker")
    tiny.model().save_pretrained(home)
    tiny.tokenizer().save_pretrained(home)
    return str(home)


def test_how_a_model_is_loaded_is_said_as_elsewhere(judge):
    pipe = pipeline(
        "text-classification", judge, torch_dtype=torch.bfloat16, device_map="auto",
        trust_remote_code=False, use_fast=True, framework="pt",
        model_kwargs={"attn_implementation": "eager"},
    )  # fmt: skip
    assert pipe.model.dtype is torch.bfloat16
    assert pipe.device.type in ("cpu", "cuda")
    assert pipe.task == "text-classification"
    kept = pipeline("text-classification", judge, model_kwargs={"dtype": "bfloat16"})
    assert kept.model.dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="'pt', alone"):
        pipeline("text-classification", judge, framework="tf")


def test_options_given_at_the_start_are_those_of_every_call(judge):
    pipe = pipeline("text-classification", judge, top_k=None)
    plain = pipeline("text-classification", judge)
    assert pipe("rain") == plain("rain", top_k=None)
    assert pipe(TEXTS) == plain(TEXTS, top_k=None)
    assert pipe(TEXTS, top_k=1) == plain(TEXTS, top_k=1)
    with pytest.raises(ConfigError, match="no option 'topk'; nearest: 'top_k'"):
        pipeline("text-classification", judge, topk=1)


def test_a_call_may_say_its_batch_size_and_what_has_no_effect(judge):
    pipe = pipeline("text-classification", judge)
    wanted = pipe(TEXTS)
    found = pipe(TEXTS, batch_size=2, num_workers=2, padding=True, truncation=True)
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in wanted])
    assert pipe.batch_size is None
    assert list(pipe((t for t in TEXTS), batch_size=2))[2]["label"] == wanted[2]["label"]
    with pytest.raises(ConfigError, match="at least 1"):
        pipe(TEXTS, batch_size=0)


def test_a_column_of_a_data_set_is_read_as_a_list(judge):
    pipe, rows = pipeline("text-classification", judge), [{"text": text} for text in TEXTS]
    column = KeyDataset(rows, "text")
    assert len(column) == 3
    assert list(pipe(column)) == pipe(TEXTS)


def test_a_pipeline_is_saved_with_all_it_needs(judge, tmp_path):
    pipe = pipeline("text-classification", judge)
    pipe.save_pretrained(tmp_path)
    assert pipeline("text-classification", str(tmp_path))(TEXTS) == pipe(TEXTS)


def test_features_take_the_tokenizers_options_together(tmp_path):
    pipe = pipeline("feature-extraction", write(tmp_path, AutoModel))
    found = pipe("rain " * 9, tokenize_kwargs={"truncation": True, "max_length": 5})
    assert len(found[0]) == 5


def test_texts_come_as_ids_or_tidied(talker):
    pipe = pipeline("text-generation", talker, max_new_tokens=4, do_sample=False)
    (text,) = pipe("ab")
    (ids,) = pipe("ab", return_tensors=True)
    tokenizer = pipe.tokenizer
    start = tokenizer("ab")["input_ids"]
    assert ids["generated_token_ids"][: len(start)] == start
    assert tokenizer.decode(ids["generated_token_ids"], True) == text["generated_text"]
    assert pipe("a n't .", clean_up_tokenization_spaces=True, max_new_tokens=1)[0][
        "generated_text"
    ].startswith("an't.")
    pipe.generation_config.max_new_tokens = 2
    assert len(pipe("ab", max_new_tokens=1, return_tensors=True)[0]["generated_token_ids"]) == 3
