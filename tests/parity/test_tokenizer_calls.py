"""What scripts call on a tokenizer, against transformers: chats as batches, pad, roles, words."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import BertTokenizer, PreTrainedTokenizerFast

from chat_formats import CHATML, CHATML_TAGS, QWEN3, SPECIALS
from corpus import TEXTS
from topwork.errors import ConfigError
from topwork.text import Tokenizer

CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, you"}],
    [{"role": "user", "content": "One two three"}, {"role": "assistant", "content": "four"}],
]


def core():
    made = Core(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return made


@pytest.fixture
def pair():
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=core(), **names)
    return theirs, Tokenizer(core(), names)


def lists(encoded):
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in dict(encoded).items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": True, "return_tensors": "pt"},
        {"padding": True, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 12},
        {"add_generation_prompt": True, "padding": True},
        {"return_assistant_tokens_mask": True},
        {"return_assistant_tokens_mask": True, "truncation": True, "max_length": 20},
    ],
    ids=str,
)
def test_chats_as_a_batch_and_alone_equal_the_peer(pair, options, side):
    for one in pair:
        one.padding_side = one.truncation_side = side
    if side == "left" and "truncation" in options and "return_assistant_tokens_mask" in options:
        pytest.skip("the peer's mask does not follow a cut on the left")
    for chats in (CHATS, CHATS[0]):
        wanted = pair[0].apply_chat_template(
            chats, chat_template=CHATML_TAGS, return_dict=True, **options
        )
        found = pair[1].apply_chat_template(
            chats, chat_template=CHATML_TAGS, return_dict=True, **options
        )
        assert lists(found) == lists(wanted)
        plain = {k: v for k, v in options.items() if "mask" not in k}
        ids = pair[1].apply_chat_template(chats, chat_template=CHATML, **plain)
        assert lists({"x": ids})["x"] == lists(found)["input_ids"]
    if options.get("return_tensors") == "pt":
        assert isinstance(found.input_ids, torch.Tensor)
    if options.get("return_tensors") == "np":
        assert isinstance(found.input_ids, np.ndarray)


def test_a_mask_padded_with_its_batch_follows_it(pair):
    ours = pair[1]
    ours.padding_side = "left"
    found = ours.apply_chat_template(
        CHATS, chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True,
        padding=True, return_tensors="pt",
    )  # fmt: skip
    said = [ours.decode(ids[m.bool()]) for ids, m in zip(found.input_ids, found.assistant_masks)]
    assert said == ["Hello there, you<|im_end|>", "four<|im_end|>"]


def test_functions_as_tools_give_the_peers_text(pair):
    def weather(city: str, days: int = 3) -> str:
        """The weather.

        Args:
            city: where
            days: how many
        """
        return city + str(days)

    options = {"chat_template": QWEN3, "tools": [weather], "tokenize": False}
    assert pair[1].apply_chat_template(CHATS[0], **options) == pair[0].apply_chat_template(
        CHATS[0], **options
    )


def test_an_assistant_mask_needs_ids_and_a_dictionary(pair):
    with pytest.raises(ConfigError, match="needs tokenize=True and return_dict=True"):
        pair[1].apply_chat_template(CHATS, chat_template=CHATML, return_assistant_tokens_mask=True)


ROWS = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [8], "attention_mask": [1]}]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_tensors": "pt"},
        {"padding": "max_length", "max_length": 5},
        {"pad_to_multiple_of": 4},
        {"padding": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_equals_the_peer(pair, options, side):
    for one in pair:
        one.padding_side = side
    as_lists = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    for given in (ROWS, as_lists, [{"input_ids": [1, 2]}, {"input_ids": [3]}], ROWS[0]):
        if options == {"padding": False} and isinstance(given, list):
            given = as_lists
        wanted, found = (t.pad(copy.deepcopy(given), **options) for t in pair)  # the peer's writes
        assert lists(found) == lists(wanted)
    with pytest.raises(ConfigError, match="no input_ids to pad, only"):
        pair[1].pad({"labels": [1]})


def test_roles_are_set_by_token_and_by_id(pair):
    for one in pair:
        one.pad_token = one.eos_token
        assert one.pad_token_id == one.eos_token_id
        one.pad_token_id = 5
        assert one.pad_token == one.convert_ids_to_tokens(5)
        assert (
            one.add_special_tokens({"pad_token": "[NEW]", "additional_special_tokens": ["<x>"]})
            == 2
        )
        assert one.add_special_tokens({"pad_token": "[NEW]"}) == 0
    theirs, ours = pair
    assert (ours.pad_token_id, len(ours)) == (theirs.pad_token_id, len(theirs))
    assert ours.encode("a[NEW]<x>b") == theirs.encode("a[NEW]<x>b")
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add() == 0
    assert ours.special_tokens_map["pad_token"] == "[NEW]"
    with pytest.raises(ConfigError, match="called 'pad_tokn'; nearest: 'pad_token'"):
        ours.add_special_tokens({"pad_tokn": "x"})
    with pytest.raises(ConfigError, match="no such token"):
        ours.pad_token_id = 10_000


def test_words_targets_lengths_and_batches_to_decode_equal_the_peer(pair):
    theirs, ours = pair
    theirs_words = theirs([["Hello", "world"], ["a"]], is_split_into_words=True, padding=True)
    ours_words = ours([["Hello", "world"], ["a"]], is_split_into_words=True, padding=True)
    assert lists(ours_words) == lists(theirs_words)
    assert [ours_words.word_ids(i) for i in (0, 1)] == [theirs_words.word_ids(i) for i in (0, 1)]
    for text in ("one", ["one", "two three"]):
        options = {"text_target": text, "return_attention_mask": False}
        assert lists(ours(text, **options)) == lists(theirs(text, **options))
    assert ours(text_target="a").input_ids == theirs(text_target="a").input_ids
    assert ours(["a b", "c"], return_length=True)["length"] == [
        len(ids) for ids in ours(["a b", "c"])["input_ids"]
    ]
    ids = ours(["Hello , world . It 's", "do n't"])["input_ids"]
    for options in ({}, {"skip_special_tokens": True}):
        assert ours.batch_decode(ids, **options) == theirs.batch_decode(ids, **options)
        assert ours.decode(ids, **options) == theirs.batch_decode(ids, **options)
    assert ours.decode(ids, clean_up_tokenization_spaces=True) == ["Hello, world. It's", "don't"]
    tokens = ours.tokenize("Hello é")
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    with pytest.raises(ConfigError, match="neither text nor text_target"):
        ours()


@pytest.fixture
def bert(tmp_path):
    made = Core(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    )  # fmt: skip
    made.train_from_iterator(TEXTS, trainer)
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", model_input_names=BertTokenizer.model_input_names,
        clean_up_tokenization_spaces=True,
    )  # fmt: skip
    return theirs, Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("second", [None, TEXTS[::-1]])
def test_token_types_come_where_the_peer_gives_them(bert, second):
    wanted, found = (t(TEXTS, second, padding=True) for t in bert)
    assert "token_type_ids" in found
    assert lists(found) == lists(wanted)
    assert bert[1].num_special_tokens_to_add(True) == bert[0].num_special_tokens_to_add(True) == 3
    assert "token_type_ids" not in bert[1]("a", return_token_type_ids=False)
    ids = bert[1]("Hello , world . It 's")["input_ids"]
    for clean in (True, False):
        options = {"clean_up_tokenization_spaces": clean}
        assert bert[1].decode(ids, **options) == bert[0].decode(ids, **options)
