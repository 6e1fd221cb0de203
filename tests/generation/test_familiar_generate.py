"""Generation called as scripts for transformers call it."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from topwork import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from topwork.errors import CheckpointError, ConfigError

IDS = torch.tensor([[5, 17, 9, 33], [9, 21, 5, 17]])


class Favour(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), 1e4)


class StopAfter(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_processors_and_criteria_of_ones_own_come_in_lists():
    model = tiny.model()
    first, last = Favour(7), LogitsProcessorList([Favour(7), lambda ids, scores: -scores])
    made = model.generate(IDS, max_new_tokens=3, logits_processor=LogitsProcessorList([first]))
    assert (made[:, 4:] == 7).all()
    assert (last(IDS, torch.zeros(2, 259)).argmin(-1) == 7).all()
    stops = StoppingCriteriaList([StopAfter(7), MaxLengthCriteria(99)])
    made = model.generate(IDS, max_new_tokens=3, logits_processor=[first], stopping_criteria=stops)
    assert made.shape == (2, 5)
    assert model.generate(IDS, max_new_tokens=1, logits_processor=None, stopping_criteria=None)[
        0, :4
    ].equal(IDS[0])


def test_criteria_say_for_each_row_whether_it_ends():
    stops = StoppingCriteriaList([StopAfter(33), MaxLengthCriteria(5)])
    assert stops(IDS, None).tolist() == [True, False]
    assert MaxLengthCriteria(4)(IDS).tolist() == [True, True]
    assert MaxTimeCriteria(0.0)(IDS).all()
    assert not MaxTimeCriteria(60.0)(IDS).any()
    for base in (StoppingCriteria, LogitsProcessor):
        with pytest.raises(NotImplementedError, match="__call__"):
            base()(IDS, torch.zeros(2, 3))


def test_a_prompt_comes_by_either_name_as_an_encoding_or_not_at_all():
    model, encoded = tiny.model(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    wanted = model.generate(IDS, max_new_tokens=3)
    assert model.generate(inputs=IDS, max_new_tokens=3).equal(wanted)
    assert model.generate(encoded, max_new_tokens=3).equal(wanted)
    assert model.generate(**encoded, token_type_ids=IDS, max_new_tokens=3).equal(wanted)
    begun = model.generate(bos_token_id=5, max_new_tokens=3)
    assert begun.equal(model.generate(torch.tensor([[5]]), max_new_tokens=3))
    with pytest.raises(ConfigError, match="bos_token_id"):
        model.generate(max_new_tokens=3)


@pytest.mark.parametrize("where", ["offloaded", "hybrid", "static"])
def test_where_a_cache_lies_changes_no_token(where):
    model = tiny.model()
    wanted = model.generate(IDS, max_new_tokens=5)
    assert model.generate(IDS, max_new_tokens=5, cache_implementation=where).equal(wanted)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_transition_scores_are_the_peers(llama, beams, normalised):
    peer, model = llama
    options = {"num_beams": beams, "max_new_tokens": 6, "return_dict_in_generate": True,
               "output_scores": True, "eos_token_id": 7}  # fmt: skip
    ours, theirs = (m.generate(IDS % 53, **options, pad_token_id=0) for m in (model, peer))
    assert ours.sequences.equal(theirs.sequences)
    rest = {"beam_indices": ours.beam_indices, "normalize_logits": normalised}
    found = model.compute_transition_scores(ours.sequences, ours.scores, **rest)
    rest["beam_indices"] = getattr(theirs, "beam_indices", None)
    wanted = peer.compute_transition_scores(theirs.sequences, theirs.scores, **rest)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_config_is_made_of_what_a_call_may_name():
    config = GenerationConfig(max_new_tokens=3, use_cache=True, num_beam_groups=1, top_k=None)
    assert (config.max_new_tokens, config.top_k) == (3, 0)
    for given, words in (({"num_beam_groups": 2}, "diverse"), ({"max_tokens": 2}, "no option")):
        with pytest.raises(ConfigError, match=words):
            GenerationConfig(**given)


def test_a_config_is_written_read_and_changed(tmp_path):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5)
    config.update(temperature=0.7, eos_token_id=[2, 7])
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said == config.to_dict() == {
        "do_sample": True, "eos_token_id": [2, 7], "max_new_tokens": 3, "temperature": 0.7,
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert GenerationConfig.from_pretrained(tmp_path, max_new_tokens=9).max_new_tokens == 9
    assert GenerationConfig.from_dict(said) == config
    assert GenerationConfig.from_model_config(tiny.model().config).eos_token_id == 2
    with pytest.raises(ConfigError, match="temperature"):
        config.update(temperature=-1.0)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path / "..")
