"""What is done to the next token's scores before one is chosen.

A processor is any function (seen [B, T], scores [B, V]) -> scores. `seen` holds the ids so far;
padding stands in it as V, which is no token, so a row scores the same padded and alone.
`processors` builds the list that a configuration asks for, in the field's usual order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.generation.config import GenerationConfig

Processor = Callable[[Tensor, Tensor], Tensor]
NEVER = float("-inf")


def _drop(scores: Tensor, ids: Sequence[int]) -> Tensor:
    return scores.index_fill(1, torch.tensor(ids, device=scores.device), NEVER)


def _only(scores: Tensor, ids: Sequence[int]) -> Tensor:
    index = torch.tensor(ids, device=scores.device)
    return torch.full_like(scores, NEVER).index_fill(1, index, 0.0)


def _counts(seen: Tensor, vocab: int) -> Tensor:
    """How often each token stands in `seen` [B, T] → [B, V], fp32."""
    counts = torch.zeros(seen.shape[0], vocab + 1, device=seen.device)
    return counts.scatter_add_(1, seen, torch.ones_like(seen, dtype=counts.dtype))[:, :vocab]


# -- for every way of decoding --------------------------------------------------------------------


def penalise_repeats(seen: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative scores of seen tokens (arXiv:1909.05858)."""
    there = _counts(seen, scores.shape[1]) > 0
    return torch.where(there, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def penalise_counts(
    seen: Tensor, scores: Tensor, prompt: int, presence: float, frequency: float
) -> Tensor:
    """Subtract `presence` once and `frequency` per use from tokens made after the prompt."""
    counts = _counts(seen[:, prompt:], scores.shape[1])
    return scores - presence * (counts > 0) - frequency * counts


def no_repeated_ngrams(seen: Tensor, scores: Tensor, n: int) -> Tensor:
    """Forbid the token that would complete an n-gram that is there already."""
    length, vocab = seen.shape[1], scores.shape[1]
    if length < n:
        return scores
    grams = seen.unfold(1, n, 1)  # [B, T - n + 1, n]
    same = (grams[..., :-1] == seen[:, None, length + 1 - n :]).all(-1)
    last = torch.where(same & (grams != vocab).all(-1), grams[..., -1], vocab)
    return scores.masked_fill(_counts(last, vocab) > 0, NEVER)


def bias_sequences(
    seen: Tensor, scores: Tensor, biases: Sequence[tuple[tuple[int, ...], float]]
) -> Tensor:
    """Add each sequence's bias to its last token, where the tokens before it have been said."""
    total = torch.zeros_like(scores)
    single = {ids[0]: bias for ids, bias in biases if len(ids) == 1}
    if single:
        total[:, list(single)] = torch.tensor(list(single.values()), device=scores.device)
    for ids, bias in biases:
        before, length = ids[:-1], len(ids) - 1
        if not 0 < length <= seen.shape[1]:
            continue
        ends = seen[:, seen.shape[1] - length :]
        fits = (ends == torch.tensor(before, device=seen.device, dtype=seen.dtype)).all(1)
        total[:, ids[-1]] += torch.where(fits, bias, 0.0)
    return scores + total


def no_end_before(seen: Tensor, scores: Tensor, length: int, stops: Sequence[int]) -> Tensor:
    """Forbid the stop tokens while there are fewer than `length` ids."""
    return _drop(scores, stops) if seen.shape[1] < length else scores


def force_at(seen: Tensor, scores: Tensor, length: int, ids: Sequence[int]) -> Tensor:
    """Allow `ids` alone when there are `length` ids."""
    return _only(scores, ids) if seen.shape[1] == length else scores


def suppress_at(seen: Tensor, scores: Tensor, length: int | None, ids: Sequence[int]) -> Tensor:
    """Forbid `ids`, always or only when there are `length` ids."""
    return _drop(scores, ids) if length is None or seen.shape[1] == length else scores


def finite(seen: Tensor, scores: Tensor) -> Tensor:
    """NaN becomes 0, and infinities the largest numbers."""
    return scores.nan_to_num(0.0)


def urge_end(
    seen: Tensor, scores: Tensor, start: int, factor: float, stops: Sequence[int]
) -> Tensor:
    """Raise the stop tokens' scores s by |s| (factor^k - 1) from k = 1 token after `start` on."""
    if seen.shape[1] <= start:
        return scores
    old = scores[:, list(stops)]
    raised = old + old.abs() * (factor ** (seen.shape[1] - start) - 1)
    scores = scores.clone()
    scores[:, list(stops)] = torch.where(old.isfinite(), raised, old)
    return scores


# -- when a token is drawn ------------------------------------------------------------------------


def heat(seen: Tensor, scores: Tensor, temperature: float) -> Tensor:
    return scores / temperature


def keep_top_h(seen: Tensor, scores: Tensor, h: float) -> Tensor:
    """Of the 100 best, those that make up the share `h` of their entropy (arXiv:2509.02510)."""
    best, index = scores.topk(min(100, scores.shape[1]))
    logs = best.log_softmax(-1)
    parts = -logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)
    keep = parts.cumsum(-1) <= h * parts.sum(-1, keepdim=True)
    keep[:, 0] = True
    return torch.full_like(scores, NEVER).scatter(1, index, best.masked_fill(~keep, NEVER))


def keep_top_k(seen: Tensor, scores: Tensor, k: int) -> Tensor:
    """Only the `k` most likely (ties with the last of them stay)."""
    last = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < last, NEVER)


def keep_top_p(seen: Tensor, scores: Tensor, p: float, least: int = 1) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches `p` (arXiv:1904.09751)."""
    ordered, index = scores.sort(descending=False)
    below = ordered.softmax(-1).cumsum(-1) <= 1 - p
    below[:, -least:] = False
    return scores.masked_fill(below.scatter(1, index, below), NEVER)


def _but_the_best(scores: Tensor, below: Tensor, least: int) -> Tensor:
    """Forbid `below`, yet keep the `least` best."""
    best = scores.topk(min(least, scores.shape[1])).indices
    return scores.masked_fill(below.scatter(1, best, False), NEVER)


def keep_min_p(seen: Tensor, scores: Tensor, p: float, least: int = 1) -> Tensor:
    """Those at least `p` times as likely as the most likely one (arXiv:2407.01082)."""
    chances = scores.softmax(-1)
    return _but_the_best(scores, chances < p * chances.amax(-1, keepdim=True), least)


def keep_typical(seen: Tensor, scores: Tensor, mass: float, least: int = 1) -> Tensor:
    """Those whose surprise is nearest to the entropy, up to `mass` (arXiv:2202.00666)."""
    logs = scores.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    far, index = (-logs - entropy).abs().sort()
    reached = scores.gather(1, index).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(1, keepdim=True).clamp_max(scores.shape[1] - 1)
    drop = far > far.gather(1, last)
    drop[:, :least] = False
    return scores.masked_fill(drop.scatter(1, index, drop), NEVER)


def keep_epsilon(seen: Tensor, scores: Tensor, epsilon: float, least: int = 1) -> Tensor:
    """Those with a probability of at least `epsilon` (arXiv:2210.15191)."""
    return _but_the_best(scores, scores.softmax(-1) < epsilon, least)


def keep_eta(seen: Tensor, scores: Tensor, epsilon: float, least: int = 1) -> Tensor:
    """Those above min(ε, √ε · exp(-entropy)) (arXiv:2210.15191)."""
    chances = scores.softmax(-1)
    entropy = torch.special.entr(chances).sum(-1, keepdim=True)
    bound = (epsilon**0.5 * (-entropy).exp()).clamp_max(epsilon)
    return _but_the_best(scores, chances < bound, least)


def normalise(seen: Tensor, scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)


# -- the list -------------------------------------------------------------------------------------


def processors(
    config: GenerationConfig,
    vocab: int,
    prompt: int,
    longest: int,
    *,
    first: Sequence[Processor] = (),
    extra: Sequence[Processor] = (),
) -> list[Processor]:
    """What `config` asks for, after a prompt of `prompt` ids of at most `longest` in all.

    `first` comes before everything (guidance), `extra` before the cuts made for sampling.
    """
    _known_ids(config, vocab)
    chosen = [*first, *_always(config, prompt, longest), *extra]
    if config.do_sample:
        chosen += cuts(config)
    if config.renormalize_logits:
        chosen.append(normalise)
    return chosen


def _always(config: GenerationConfig, prompt: int, longest: int) -> list[Processor]:
    stops, c = config.stops, config
    bad = [tuple(w) for w in c.bad_words_ids or () if list(w) not in [[s] for s in stops]]
    start = prompt if prompt > 1 or c.forced_bos_token_id is None else prompt + 1
    decay = c.exponential_decay_length_penalty or (0, 1.0)
    table: list[tuple[object, Processor]] = [
        (c.sequence_bias, partial(bias_sequences, biases=c.biases)),
        (c.repetition_penalty != 1, partial(penalise_repeats, penalty=c.repetition_penalty)),
        (
            c.presence_penalty or c.frequency_penalty,
            partial(
                penalise_counts, prompt=prompt,
                presence=c.presence_penalty, frequency=c.frequency_penalty,
            ),
        ),
        (c.no_repeat_ngram_size, partial(no_repeated_ngrams, n=c.no_repeat_ngram_size)),
        (bad, partial(bias_sequences, biases=[(w, NEVER) for w in bad])),
        (stops and c.min_length, partial(no_end_before, length=c.min_length, stops=stops)),
        (
            stops and c.min_new_tokens,
            partial(no_end_before, length=prompt + c.min_new_tokens, stops=stops),
        ),
        (
            c.forced_bos_token_id is not None,
            partial(force_at, length=1, ids=[c.forced_bos_token_id or 0]),
        ),
        (c.forced_ends, partial(force_at, length=longest - 1, ids=c.forced_ends)),
        (c.remove_invalid_values, finite),
        (
            c.exponential_decay_length_penalty and stops,
            partial(urge_end, start=prompt + decay[0], factor=decay[1], stops=stops),
        ),
        (c.suppress_tokens, partial(suppress_at, length=None, ids=c.suppress_tokens or ())),
        (
            c.begin_suppress_tokens,
            partial(suppress_at, length=start, ids=c.begin_suppress_tokens or ()),
        ),
    ]  # fmt: skip
    return [run for wanted, run in table if wanted]


def cuts(config: GenerationConfig) -> list[Processor]:
    """What restricts drawing to likely tokens."""
    c = config
    # Beams need something to go on with when the best tokens all end the row.
    least = max(2, len(c.stops) + 1) if c.num_beams > 1 else 1
    table: list[tuple[object, Processor]] = [
        (c.temperature != 1, partial(heat, temperature=c.temperature)),
        (c.top_h is not None, partial(keep_top_h, h=c.top_h or 1.0)),
        (c.top_k, partial(keep_top_k, k=max(c.top_k, least))),
        (c.top_p < 1, partial(keep_top_p, p=c.top_p, least=least)),
        (c.min_p, partial(keep_min_p, p=c.min_p or 0.0, least=least)),
        (c.typical_p < 1, partial(keep_typical, mass=c.typical_p, least=least)),
        (c.epsilon_cutoff, partial(keep_epsilon, epsilon=c.epsilon_cutoff, least=least)),
        (c.eta_cutoff, partial(keep_eta, epsilon=c.eta_cutoff, least=least)),
    ]
    return [run for wanted, run in table if wanted]


def _known_ids(config: GenerationConfig, vocab: int) -> None:
    """ConfigError when an option names a token that the model does not have."""
    groups = {
        "eos_token_id": config.stops,
        "forced_bos_token_id": [i for i in [config.forced_bos_token_id] if i is not None],
        "forced_eos_token_id": config.forced_ends,
        "suppress_tokens": config.suppress_tokens or [],
        "begin_suppress_tokens": config.begin_suppress_tokens or [],
        "bad_words_ids": [i for word in config.bad_words_ids or [] for i in word],
        "sequence_bias": [i for ids, _ in config.biases for i in ids],
    }
    for name, ids in groups.items():
        wrong = sorted({i for i in ids if not 0 <= i < vocab})
        if wrong:
            raise ConfigError(f"{name} names {wrong}: the model has the tokens 0 to {vocab - 1}")


def apply(chosen: Sequence[Processor], seen: Tensor, scores: Tensor) -> Tensor:
    for run in chosen:
        scores = run(seen, scores)
    return scores
