"""The tokenizer against transformers' PreTrainedTokenizerFast, on tokenizers trained here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from topwork.errors import CheckpointError, ConfigError
from topwork.text import Tokenizer

CORPUS = ["The quick brown fox jumps over the lazy dog.", "Zürich — naïve café, 東京 and Ελλάδα",
          "def f(x):\n    return x ** 2  # it",
          "مرحبا بالعالم 🙂🙃 and  two  spaces"]  # fmt: skip
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def trained(kind):
    if kind == "bytes":
        core = Core(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    else:
        core = Core(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        )
    core.train_from_iterator(CORPUS * 4, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return core


@pytest.fixture(scope="module", params=["bytes", "unigram"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=trained(request.param), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", model_max_length=64,
    )  # fmt: skip
    theirs.save_pretrained(folder)
    return theirs, Tokenizer.from_pretrained(folder)


OPTIONS = [
    {},
    {"add_special_tokens": False},
    {"padding": True},
    {"padding": "max_length", "max_length": 30, "truncation": True},
    {"padding": True, "pad_to_multiple_of": 8},
    {"truncation": True, "max_length": 7},
    {"truncation": "only_first", "max_length": 9},
    {"return_offsets_mapping": True, "return_special_tokens_mask": True, "padding": True},
    {"truncation": True, "max_length": 9, "stride": 2, "return_overflowing_tokens": True,
     "padding": True},
]  # fmt: skip
KEYS = ("input_ids", "attention_mask", "offset_mapping", "special_tokens_mask",
        "overflow_to_sample_mapping")  # fmt: skip


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_batches_equal_the_peer(pair, options, side, pairs):
    theirs, ours = pair
    for one in pair:
        one.padding_side = one.truncation_side = side
    second = CORPUS[::-1] if pairs else None
    if pairs and "stride" in options:
        options = {**options, "truncation": "only_second", "max_length": 60}
    if pairs and options.get("truncation") == "only_first":
        options = {**options, "max_length": 70}
    wanted, found = theirs(CORPUS, second, **options), ours(CORPUS, second, **options)
    for key in KEYS:
        if key in found:
            assert [list(r) if isinstance(r, (list, tuple)) else r for r in found[key]] == [
                list(r) if isinstance(r, (list, tuple)) else r for r in wanted[key]
            ], key
    assert ("offset_mapping" in found) == ("return_offsets_mapping" in options)


def test_single_texts_tensors_and_decoding_equal_the_peer(pair):
    theirs, ours = pair
    for text in CORPUS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.tokenize(text) == theirs.tokenize(text)
        for skip in (True, False):
            ids = ours.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    one = ours(CORPUS[0], return_tensors="pt")
    assert torch.equal(one.input_ids, theirs(CORPUS[0], return_tensors="pt").input_ids)
    for name in ("eos_token", "eos_token_id", "pad_token_id", "bos_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.convert_ids_to_tokens([1, 9]) == theirs.convert_ids_to_tokens([1, 9])
    assert ours.convert_tokens_to_ids(["</s>", "?no?"]) == [2, 0]


def test_what_we_save_loads_in_the_peer(pair, tmp_path):
    ours = pair[1]
    ours.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in CORPUS:
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.eos_token == "</s>"


def test_added_tokens_stay_whole(tmp_path):
    ours = Tokenizer(trained("bytes"))
    before = len(ours)
    assert ours.add_tokens(["<|call|>"], special=True) == 1
    assert ours.encode("a<|call|>b", add_special_tokens=False).count(before) == 1
    assert before in ours.all_special_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"padding": "longst"}, "nearest: 'longest'"),
        ({"truncation": "only_frist"}, "nearest: 'only_first'"),
        ({"return_tensors": "tf"}, "'pt' or 'np'"),
        ({"return_tensors": "pt"}, "padding=True"),
        ({"text_pair": "x"}, "both"),
        ({"text_pair": ["x"]}, "4 texts, but 1"),
    ],
)
def test_wrong_calls_say_what_is_wrong(pair, options, words):
    with pytest.raises(ConfigError, match=words):
        pair[1](CORPUS, **options)


def test_a_folder_without_or_with_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
