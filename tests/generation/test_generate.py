from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LogitsProcessorList
from transformers import AutoModelForCausalLM as Theirs
from transformers.generation import logits_process as peer

from topwork import AutoModelForCausalLM
from topwork.errors import ConfigError, TopworkError
from topwork.generation import GenerationConfig
from topwork.generation import sampling as ours


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = Theirs.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, AutoModelForCausalLM.from_pretrained(folder)


IDS = torch.arange(3, 27).view(2, 12)
MASK = torch.ones_like(IDS)
PADDED = MASK.clone()
PADDED[1, :5] = 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 18},
        {"repetition_penalty": 1.7},
        {"eos_token_id": [5, 9, 30, 41]},
        {"eos_token_id": list(range(0, 50, 2)), "min_new_tokens": 4},
    ],
)
@pytest.mark.parametrize("mask", [MASK, PADDED], ids=["whole", "left-padded"])
def test_greedy_tokens_equal_the_peer(pair, mask, options):
    theirs, model = pair
    options = {"do_sample": False, "pad_token_id": 0, **options}
    if "max_length" not in options:
        options["max_new_tokens"] = 20
    ids = IDS.masked_fill(mask == 0, 0)
    wanted = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), wanted)


def test_each_row_of_a_batch_comes_out_as_alone(pair):
    _, model = pair
    ids = IDS.masked_fill(PADDED == 0, 0)
    together = model.generate(ids, attention_mask=PADDED, max_new_tokens=9)
    alone = model.generate(IDS[1:, 5:], max_new_tokens=9)
    assert torch.equal(together[1, 12:], alone[0, 7:])


def test_a_seed_repeats_and_another_differs(pair):
    _, model = pair
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
    first = model.generate(IDS, seed=1, **options)
    assert first.shape == (6, 24)
    assert torch.equal(first, model.generate(IDS, seed=1, **options))
    assert not torch.equal(first, model.generate(IDS, seed=2, **options))


def test_a_streamer_sees_the_prompt_each_token_and_the_end(pair):
    class Sink:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.clone())

        def end(self):
            self.ended = True

    sink = Sink()
    out = pair[1].generate(IDS, max_new_tokens=4, streamer=sink)
    assert torch.equal(sink.seen[0], IDS)
    assert torch.equal(torch.stack(sink.seen[1:], 1), out[:, 12:])
    assert sink.ended


PROCESSORS = [
    (lambda x, s: ours.penalise_repeats(x, s, 1.3), peer.RepetitionPenaltyLogitsProcessor(1.3)),
    (lambda x, s: ours.keep_top_k(x, 7), peer.TopKLogitsWarper(7)),
    (lambda x, s: ours.keep_top_p(x, 0.6), peer.TopPLogitsWarper(0.6)),
    (lambda x, s: ours.keep_min_p(x, 0.1), peer.MinPLogitsWarper(0.1)),
    (
        lambda x, s: ours.shape(
            x, s, 0,
            GenerationConfig(
                do_sample=True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05,
                repetition_penalty=0.8,
            ),
        ),
        LogitsProcessorList(
            [
                peer.RepetitionPenaltyLogitsProcessor(0.8), peer.TemperatureLogitsWarper(0.7),
                peer.TopKLogitsWarper(9), peer.TopPLogitsWarper(0.8), peer.MinPLogitsWarper(0.05),
            ]
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mine", "theirs"), PROCESSORS, ids=range(len(PROCESSORS)))
def test_each_processor_equals_the_peer(mine, theirs):
    torch.manual_seed(0)
    logits = torch.randn(4, 53) * 3
    seen = torch.randint(0, 53, (4, 10))
    torch.testing.assert_close(mine(logits, seen), theirs(seen, logits.clone()))


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        (IDS[:, :0], {}, "empty"),
        (IDS + 50, {}, "vocabulary"),
        (IDS, {"attention_mask": PADDED.flip(1)}, "on the left"),
        (IDS, {"attention_mask": PADDED[:, 1:]}, "attention_mask"),
        (IDS.repeat(1, 9), {}, "context is 64"),
        (IDS, {"max_length": 5}, "no room"),
        (IDS, {"temprature": 1}, "nearest: 'temperature'"),
        (IDS, {"temperature": 0.0, "do_sample": True}, "do_sample=False"),
        (IDS, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (IDS, {"num_return_sequences": 2}, "do_sample=True"),
    ],
)
def test_bad_input_says_what_is_wrong(pair, ids, options, words):
    with pytest.raises(ConfigError, match=words):
        pair[1].generate(ids, **options)


def test_damaged_weights_stop_the_decoding_and_the_mode_is_kept(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TopworkError, match="not numbers"):
        model.generate(IDS)
    assert model.training


def test_the_call_comes_before_the_file(pair):
    config = GenerationConfig.of({"max_length": 9, "top_p": 0.5, "num_beams": 1}, {"top_p": 0.9})
    assert (config.max_length, config.top_p) == (9, 0.9)
    assert GenerationConfig.of({"max_length": 9}, {"max_new_tokens": 2}).max_length is None
    with pytest.raises(ConfigError, match="num_beams=4"):
        GenerationConfig.of({"num_beams": 4}, {})
