"""Tokenizers called as scripts for transformers call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

import tiny
from topwork import AutoTokenizer
from topwork.errors import ConfigError
from topwork.text import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "on", "mat", "##ter", "."]
PAIRS = (["the cats sat", "mat"], ["on the matter .", "cats"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    core = Core(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
             "sep_token": "[SEP]", "tokenizer_class": "BertTokenizer"}  # fmt: skip
    made = Tokenizer(core, names)
    made.add_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], special_tokens=True)
    home = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(home)
    return home


def ours(folder, **options):
    return AutoTokenizer.from_pretrained(folder, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_things_of_a_padded_pair_stand_is_the_peers(folder, side):
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, padding_side=side)
    calls = [t(*PAIRS, padding=True) for t in (ours(folder, padding_side=side), peer)]
    for row in (0, 1):
        for name in ("word_ids", "sequence_ids"):
            found, wanted = (getattr(call, name)(row) for call in calls)
            assert found == wanted
        for place in range(3):
            for name in ("char_to_token", "word_to_tokens"):
                for part in (0, 1):
                    found, wanted = (getattr(call, name)(row, place, part) for call in calls)
                    assert found == wanted, (name, row, place, part)
        width = len(calls[0]["input_ids"][row])
        real = [i for i, m in enumerate(calls[0]["attention_mask"][row]) if m]
        for place in real:
            for name in ("token_to_chars", "token_to_word"):
                found, wanted = (getattr(call, name)(row, place) for call in calls)
                assert found == wanted, (name, row, place)
        assert len(real) <= width
        pads = ["[PAD]"] * (width - len(real))
        own = calls[0].tokens(row)
        assert (pads + own if side == "left" else own + pads) == calls[1].tokens(row)
    alone = [t("the cats") for t in (ours(folder), peer)]
    assert alone[0].char_to_token(5) == alone[1].char_to_token(5)
    assert alone[0].to("cpu").word_ids() == alone[1].word_ids()


def test_what_the_files_say_is_replaced_by_name(folder):
    found = ours(
        folder, use_fast=True, trust_remote_code=False, padding_side="left", truncation_side="left",
        model_max_length=3, pad_token="[SEP]", chat_template="{{ 1 }}",
    )  # fmt: skip
    assert found(["the cat sat on", "mat"], padding=True, truncation=True)["input_ids"] == [
        [2, 8, 3], [2, 9, 3],
    ]  # fmt: skip
    assert (found.pad_token_id, found.get_chat_template()) == (3, "{{ 1 }}")
    assert found.name_or_path == str(folder)
    with pytest.raises(ConfigError, match="no option 'paddin_side'; nearest: 'padding_side'"):
        ours(folder, paddin_side="left")
    with pytest.raises(ConfigError, match="no chat template"):
        ours(folder).get_chat_template()


def test_the_first_word_may_be_read_as_one_amid_the_text(folder, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    plain, spaced = ours(tmp_path), ours(tmp_path, add_prefix_space=True)
    assert spaced("ab")["input_ids"] == plain(" ab")["input_ids"]
    with pytest.raises(ConfigError, match="GPT-2"):
        ours(folder, add_prefix_space=True)


def test_decoding_takes_its_arguments_by_name(folder):
    tokenizer = ours(folder)
    ids = tokenizer.encode("the cats", return_tensors="pt")
    assert tokenizer.decode(token_ids=ids[0], skip_special_tokens=True) == "the cats"
    assert tokenizer.batch_decode(sequences=ids, skip_special_tokens=True) == ["the cats"]
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist(), skip_special_tokens=True) == [
        "the", "cat", "##s",
    ]  # fmt: skip
    assert tokenizer.tokenize("cats", add_special_tokens=True) == ["[CLS]", "cat", "##s", "[SEP]"]
    assert tokenizer.get_special_tokens_mask([2, 4, 3]) == [1, 0, 1]


def test_the_vocabulary_is_told_and_grows(folder):
    tokenizer = ours(folder)
    assert tokenizer.vocab == tokenizer.get_vocab()
    assert tokenizer.get_added_vocab() == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    assert tokenizer.added_tokens_decoder[3].content == "[SEP]"
    assert tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert tokenizer.add_tokens("<one>") == 1
    assert tokenizer.add_tokens(["<one>", AddedToken("<two>")]) == 1
    assert tokenizer.add_tokens(["<three>"], special_tokens=True) == 1
    assert tokenizer.decode(tokenizer("cat <three> <one>")["input_ids"], True) == "cat <one>"


def test_saving_tells_what_was_written(folder, tmp_path):
    written = ours(folder, chat_template="x").save_pretrained(tmp_path)
    assert {Path(path).name for path in written} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert all(Path(path).is_file() for path in written)


def test_an_encoding_keeps_what_it_knows_as_tensors(folder):
    call = ours(folder)(["the cats"], return_tensors="pt")
    assert isinstance(call.data["input_ids"], torch.Tensor)
    assert call.encodings[0].tokens == call.tokens()
    with pytest.raises(AttributeError, match="nearest: 'input_ids'"):
        call.input_id  # noqa: B018
