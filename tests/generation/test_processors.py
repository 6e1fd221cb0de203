"""Each processor's scores against the peer's."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as peer

from topwork.generation import GenerationConfig
from topwork.generation import processors as ours

V = 53
STOPS = [5, 9]
BIAS = {(7,): 2.0, (8, 11): -4.0, (3, 3, 7): 3.0, (3, 7): 1.0}
ROWS = [
    (partial(ours.penalise_repeats, penalty=1.3), peer.RepetitionPenaltyLogitsProcessor(1.3)),
    (partial(ours.no_repeated_ngrams, n=1), peer.NoRepeatNGramLogitsProcessor(1)),
    (partial(ours.no_repeated_ngrams, n=2), peer.NoRepeatNGramLogitsProcessor(2)),
    (partial(ours.no_repeated_ngrams, n=11), peer.NoRepeatNGramLogitsProcessor(11)),
    (partial(ours.bias_sequences, biases=BIAS.items()), peer.SequenceBiasLogitsProcessor(BIAS)),
    (
        partial(ours.bias_sequences, biases=[((3, 7), -math.inf), ((9,), -math.inf)]),
        peer.NoBadWordsLogitsProcessor([[3, 7], [9]]),
    ),
    (
        partial(ours.no_end_before, length=12, stops=STOPS),
        peer.MinLengthLogitsProcessor(12, STOPS),
    ),
    (
        partial(ours.no_end_before, length=11, stops=STOPS),
        peer.MinNewTokensLengthLogitsProcessor(4, 7, STOPS),
    ),
    (partial(ours.force_at, length=10, ids=[4]), peer.ForcedEOSTokenLogitsProcessor(11, 4)),
    (
        partial(ours.suppress_at, length=None, ids=[1, 2]),
        peer.SuppressTokensLogitsProcessor([1, 2]),
    ),
    (
        partial(ours.suppress_at, length=10, ids=[1]),
        peer.SuppressTokensAtBeginLogitsProcessor([1], 10),
    ),
    (ours.finite, peer.InfNanRemoveLogitsProcessor()),
    (
        partial(ours.urge_end, start=6, factor=1.2, stops=STOPS),
        peer.ExponentialDecayLengthPenalty((2, 1.2), STOPS, 4),
    ),
    (partial(ours.heat, temperature=0.7), peer.TemperatureLogitsWarper(0.7)),
    (partial(ours.keep_top_k, k=7), peer.TopKLogitsWarper(7)),
    (partial(ours.keep_top_p, p=0.6), peer.TopPLogitsWarper(0.6)),
    (partial(ours.keep_top_p, p=0.1, least=3), peer.TopPLogitsWarper(0.1, min_tokens_to_keep=3)),
    (partial(ours.keep_top_h, h=0.6), peer.TopHLogitsWarper(0.6)),
    (partial(ours.keep_min_p, p=0.1), peer.MinPLogitsWarper(0.1)),
    (partial(ours.keep_min_p, p=0.9, least=4), peer.MinPLogitsWarper(0.9, min_tokens_to_keep=4)),
    (partial(ours.keep_typical, mass=0.5), peer.TypicalLogitsWarper(0.5)),
    (
        partial(ours.keep_typical, mass=0.1, least=4),
        peer.TypicalLogitsWarper(0.1, min_tokens_to_keep=4),
    ),
    (partial(ours.keep_epsilon, epsilon=0.02), peer.EpsilonLogitsWarper(0.02)),
    (
        partial(ours.keep_epsilon, epsilon=0.9, least=2),
        peer.EpsilonLogitsWarper(0.9, min_tokens_to_keep=2),
    ),
    (partial(ours.keep_eta, epsilon=0.02), peer.EtaLogitsWarper(0.02)),
    (ours.normalise, peer.LogitNormalization()),
]


@pytest.mark.parametrize(("mine", "theirs"), ROWS, ids=[type(t).__name__ for _, t in ROWS])
def test_each_processor_equals_the_peer(mine, theirs):
    torch.manual_seed(0)
    logits = torch.randn(4, V) * 3
    seen = torch.randint(0, 9, (4, 10))
    seen[2, -2:] = 3
    before = logits.clone()
    found = mine(seen, logits)
    torch.testing.assert_close(found, theirs(seen, logits.clone()))
    assert torch.equal(logits, before)
    idle = mine is ours.finite or isinstance(theirs, peer.NoRepeatNGramLogitsProcessor)
    assert idle or not torch.equal(found, before)


def test_infinite_scores_become_finite_as_in_the_peer():
    logits = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    wanted = peer.InfNanRemoveLogitsProcessor()(torch.zeros(1, 1).long(), logits.clone())
    assert torch.equal(ours.finite(torch.zeros(1, 1).long(), logits), wanted)


def test_all_together_stand_in_the_peers_order():
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_h=0.9, top_k=9, top_p=0.8, min_p=0.05, typical_p=0.9,
        epsilon_cutoff=1e-3, eta_cutoff=1e-3, repetition_penalty=0.8, no_repeat_ngram_size=2,
        sequence_bias=BIAS, eos_token_id=STOPS, min_new_tokens=7, renormalize_logits=True,
    )  # fmt: skip
    theirs = LogitsProcessorList(
        [
            peer.SequenceBiasLogitsProcessor(BIAS), peer.RepetitionPenaltyLogitsProcessor(0.8),
            peer.NoRepeatNGramLogitsProcessor(2),
            peer.MinNewTokensLengthLogitsProcessor(4, 7, STOPS),
            peer.TemperatureLogitsWarper(0.7), peer.TopHLogitsWarper(0.9),
            peer.TopKLogitsWarper(9), peer.TopPLogitsWarper(0.8), peer.MinPLogitsWarper(0.05),
            peer.TypicalLogitsWarper(0.9), peer.EpsilonLogitsWarper(1e-3),
            peer.EtaLogitsWarper(1e-3), peer.LogitNormalization(),
        ]
    )  # fmt: skip
    torch.manual_seed(1)
    logits, seen = torch.randn(4, V) * 3, torch.randint(0, V, (4, 10))
    found = ours.apply(ours.processors(config, V, 4, 30), seen, logits)
    torch.testing.assert_close(found, theirs(seen, logits.clone()))


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    logits, seen = torch.randn(1, V), torch.tensor([[3, 4, 3]])
    padded = torch.tensor([[V, V, 3, 4, 3]])
    for run in (
        partial(ours.penalise_repeats, penalty=2.0),
        partial(ours.no_repeated_ngrams, n=1),
        partial(ours.no_repeated_ngrams, n=2),
        partial(ours.bias_sequences, biases=[((4, 3, 9), 1.0), ((1, 4, 3, 8), 5.0)]),
    ):
        assert torch.equal(run(seen, logits), run(padded, logits))
    assert torch.isfinite(ours.no_repeated_ngrams(torch.tensor([[V, V, V]]), logits, 2)).all()
