"""Stop strings and text streamers, over tokenizers whose tokens cut characters in pieces."""

from __future__ import annotations

import json
import queue
import re
import threading

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers import AutoModelForCausalLM as Theirs

from corpus import TEXTS
from topwork import AutoModelForCausalLM, TextIteratorStreamer, TextStreamer
from topwork.errors import ConfigError
from topwork.generation import StopStrings
from topwork.text import Tokenizer


def byte_level():
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def pieces():
    core = Core(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<s>", "</s>", "<unk>"],
        limit_alphabet=60,
    )  # fmt: skip
    core.train_from_iterator([t.replace(" ", "▁") for t in TEXTS * 3], trainer)
    model = json.loads(core.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    core = Core(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    return core


@pytest.fixture(scope="module", params=[byte_level, pieces])
def tokenizer(request):
    return Tokenizer(request.param(), {"eos_token": "</s>", "pad_token": "</s>"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=None,
        pad_token_id=2,
    )  # fmt: skip
    theirs = Theirs.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, AutoModelForCausalLM.from_pretrained(folder)


# -- stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t in TEXTS if len(t) > 20])
def test_a_row_ends_with_the_first_token_whose_text_completes_a_string(tokenizer, text):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for begin in range(0, len(whole) - 6, 5):
        for size in (1, 2, 6):
            stop = whole[begin : begin + size]
            criterion = StopStrings(tokenizer, [stop, "never there"])
            found = [n for n in range(1, len(ids) + 1) if criterion.ends(ids[:n])]
            texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
            wanted = [n for n in range(1, len(ids) + 1) if stop in texts[n]]
            assert found[0] == wanted[0]
            # Behind it, again wherever the text has one more, and grows.
            more = [
                n
                for n in range(1, len(ids) + 1)
                if texts[n].startswith(texts[n - 1])
                and texts[n].count(stop) > texts[n - 1].count(stop)
            ]
            assert set(more) <= set(found)
            if len(set(stop)) == len(stop) and text.isascii():
                assert found == more


def test_stop_strings_give_the_peers_tokens(pair):
    theirs, model = pair
    core = byte_level()
    ours = Tokenizer(core, {"eos_token": "</s>"})
    peers = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    prompt = torch.tensor([[50, 60, 70], [80, 90, 100], [7, 8, 9]])
    # With an eos id: without one the peer lets rows that have ended go on.
    plain = model.generate(prompt, max_new_tokens=30, eos_token_id=1)
    texts = " ".join(ours.decode(row[3:]) for row in plain)
    # Printable ones: the peer's own matching misses control characters.
    strings = sorted(set(re.findall(r"(?=([!-~]{1,3}))", texts)))[::2]
    assert len(strings) > 4
    stopped = 0
    for stop in [*strings, strings[:3]]:
        options = {"max_new_tokens": 30, "stop_strings": stop, "eos_token_id": 1}
        wanted = theirs.generate(prompt, tokenizer=peers, do_sample=False, **options)
        found = model.generate(prompt, tokenizer=ours, **options)
        assert torch.equal(found, wanted), stop
        stopped += bool((found[:, -1] == 2).any())
    assert stopped > 3


def test_a_string_may_begin_in_the_prompt(tokenizer):
    ids = tokenizer.encode("Hello, world! It's")
    stop = tokenizer.decode(ids)[-3:]
    assert StopStrings(tokenizer, stop)(torch.tensor([ids, ids[-1:] + ids[:-1]])).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_strings": "x"}, "needs the tokenizer"),
        ({"stop_strings": ["a", ""], "tokenizer": "given"}, "none of them empty"),
    ],
)
def test_stop_strings_that_cannot_be_meant_are_refused(pair, options, words):
    with pytest.raises(ConfigError, match=words):
        pair[1].generate(torch.tensor([[5, 6]]), **options)


# -- streamers -----------------------------------------------------------------------------------


def stream(streamer, prompt, ids):
    streamer.put(torch.tensor([prompt]))
    for one in ids:
        streamer.put(torch.tensor([one]))
    streamer.end()


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip()])
def test_the_streamed_pieces_are_the_text_and_no_piece_breaks_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    streamer = TextIteratorStreamer(tokenizer, timeout=1)
    stream(streamer, ids[:1], ids[1:])
    got = list(streamer)
    assert "".join(got) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in got)
    assert len(got) > 1 or len(ids) < 6


def test_a_text_streamer_prints_without_prompt_and_special_tokens(tokenizer, capsys):
    ids = tokenizer.encode("Hello, world! It's 日本")
    end = tokenizer.eos_token_id
    stream(TextStreamer(tokenizer), ids[:2], [*ids[2:], end])
    assert capsys.readouterr().out == tokenizer.decode(ids) + "</s>\n"
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for _ in range(2):  # it can be used again
        stream(streamer, ids[:2], [*ids[2:], end])
        assert capsys.readouterr().out == tokenizer.decode(ids[2:]) + "\n"


def test_half_a_character_at_the_very_end_comes_with_the_end():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a𐀁")
    streamer = TextIteratorStreamer(tokenizer, timeout=1)
    stream(streamer, ids[:1], ids[1:-1])
    got = list(streamer)
    assert got[0] == "a"
    assert set(got[1]) == {"\ufffd"}


def test_another_thread_reads_what_generate_makes(pair):
    model, tokenizer = pair[1], Tokenizer(byte_level())
    prompt = torch.tensor([[50, 60, 70]])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {"max_new_tokens": 25, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(prompt,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(prompt, max_new_tokens=25)[0, 3:])


def test_an_iterator_waits_no_longer_than_its_timeout(tokenizer):
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))


def test_a_text_streamer_takes_one_row(tokenizer):
    with pytest.raises(ConfigError, match="one row, not 2"):
        TextStreamer(tokenizer).put(torch.tensor([[1], [2]]))
