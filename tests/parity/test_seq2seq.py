"""Every encoder-decoder against transformers (eager), option by option."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from topwork import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, Config
from topwork.errors import ConfigError, TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of

NAMES = [name for name in ALL if "seq2seq-lm" in tasks_of(name)]
BART = {
    "vocab_size": 61, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 61, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
SIZES = {"t5": T5, "mt5": T5}
ROWS = [(name, i) for name in NAMES for i in range(len(family_of(name).CASES))]
each_row = pytest.mark.parametrize(("family", "case"), ROWS, ids=[f"{n}-{i}" for n, i in ROWS])
each_family = pytest.mark.parametrize("family", NAMES)


def peer(family, case, **changes):
    """The peer's model with every trained parameter random."""
    options = {**SIZES.get(family, BART), **json.loads(json.dumps(family_of(family).CASES[case]))}
    config = transformers.AutoConfig.for_model(family, **options, **changes)
    torch.manual_seed(0)
    maker = transformers.AutoModelForSeq2SeqLM
    model = maker.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = 0.1 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * size)
        if getattr(model, "final_logits_bias", None) is not None:
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


@pytest.fixture
def pair(family, case, tmp_path):
    theirs = peer(family, case)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "theirs")


def batch(vocab=50):
    """Two texts, the second shorter, and their answers, the first shorter."""
    torch.manual_seed(1)
    ids, answers = torch.randint(5, vocab, (2, 17)), torch.randint(5, vocab, (2, 11))
    mask = torch.ones_like(ids)
    ids[1, 12:], mask[1, 12:], answers[0, 8:] = 1, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": answers}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def gradients(model):
    model.zero_grad(set_to_none=True)
    logits = model(**batch()).logits[batch()["labels"] != -100]
    (
        logits * torch.arange(logits.numel(), dtype=logits.dtype).cos().view_as(logits)
    ).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@each_row
def test_logits_loss_and_gradients_equal_the_peer(pair):
    theirs, ours = pair
    wanted, found, real = theirs(**batch()), ours(**batch()), batch()["labels"] != -100
    assert relative(found.logits[real], wanted.logits[real]) < 1e-5
    assert relative(found.loss, wanted.loss) < 1e-5
    exact = copy.deepcopy(theirs).double()
    wanted, found, truth = gradients(theirs), gradients(ours), gradients(exact)
    assert wanted.keys() == found.keys()
    together = [torch.cat([g[n].flatten() for n in wanted]) for g in (found, wanted, truth)]
    assert relative(*together[:2]) < max(1e-5, 3 * relative(together[1], together[2])) < 3e-4
    found = gradients(ours.double())
    noise = 1e-9 * max(gradient.norm() for gradient in truth.values())
    for name, gradient in truth.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm() + noise, name


@each_row
def test_answers_equal_the_peer_token_by_token(pair):
    theirs, ours = pair
    data = {k: v for k, v in batch().items() if k != "labels"}
    ways = [
        {"max_new_tokens": 12},
        {"max_length": 9, "num_beams": 3, "length_penalty": 0.8},
        {"max_new_tokens": 7, "min_new_tokens": 3, "no_repeat_ngram_size": 2, "num_beams": 2,
         "num_return_sequences": 2},
        {"max_new_tokens": 6, "forced_bos_token_id": 9, "forced_eos_token_id": 2, "num_beams": 2},
        {"max_new_tokens": 6, "forced_bos_token_id": 9, "repetition_penalty": 1.3},
    ]  # fmt: skip
    for options in ways:
        wanted = theirs.generate(**data, do_sample=False, **options)
        found = ours.generate(**data, do_sample=False, **options)
        assert found.tolist() == wanted.tolist(), options


@pytest.mark.parametrize(("family", "case"), [r for r in ROWS if r[0] in ("marian", "m2m_100")])
def test_a_forced_language_without_repeats_equals_the_peer(pair):
    theirs, ours = pair
    data = {k: v for k, v in batch().items() if k != "labels"}
    forced = {"forced_bos_token_id": 9, "max_new_tokens": 14, "suppress_tokens": [1]}
    ways = [
        {"num_beams": 5, "no_repeat_ngram_size": 2, "num_return_sequences": 2,
         "early_stopping": "never", "length_penalty": 0.6, "repetition_penalty": 1.4},
        {"num_beams": 2, "no_repeat_ngram_size": 1, "num_return_sequences": 2},
        {"num_beams": 3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "early_stopping": True,
         "bad_words_ids": [[7, 8], [9]], "forced_eos_token_id": 2},
    ]  # fmt: skip
    for options in ways:
        wanted = theirs.generate(**data, do_sample=False, **forced, **options)
        found = ours.generate(**data, do_sample=False, **forced, **options)
        assert found.tolist() == wanted.tolist(), options


@pytest.mark.parametrize(("family", "case"), [("m2m_100", 2)])
@torch.no_grad()
def test_a_pad_that_is_said_has_a_place_as_any_token(pair):
    """The peer gives it none, and lets it count for what follows only without a cache, so that its
    own answers differ between the two ways. fairseq's steps, and ours, count every token."""
    theirs, ours = pair
    data = {k: v for k, v in batch().items() if k != "labels"}

    def both_ways(model, answer):
        past, steps = None, []
        for piece in answer.split(1, 1):
            out = model(**data, decoder_input_ids=piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
        return torch.cat(steps, 1), model(**data, decoder_input_ids=answer).logits

    plain = torch.tensor([[2, 9, 29, 6, 37, 34]] * 2)
    padded = torch.tensor([[2, 9, 29, 1, 37, 34]] * 2)
    for answer in (plain, padded):
        torch.testing.assert_close(*both_ways(ours, answer))
    torch.testing.assert_close(*both_ways(theirs, plain))
    torch.testing.assert_close(both_ways(ours, plain), both_ways(theirs, plain))
    steps, whole = both_ways(theirs, padded)
    assert (steps - whole)[:, 4:].abs().amin(1).amax() > 1e-3
    # By hand: with the place's sines in the pad's embedding, the peer says what we do.
    table = theirs.model.decoder.embed_positions.weights  # from place pad + 1 = 2 on
    embedded = theirs.model.decoder.embed_tokens(padded)
    theirs.model.decoder.embed_positions.weights = torch.zeros_like(table)
    by_hand = theirs(**data, decoder_inputs_embeds=embedded + table[2 : 2 + padded.shape[1]]).logits
    torch.testing.assert_close(by_hand, both_ways(ours, padded)[1])


@each_row
def test_packed_padded_and_single_texts_agree_and_so_do_cached_steps(pair):
    _, ours = pair
    ids, answer = torch.randint(5, 50, (3, 13)), torch.randint(5, 50, (3, 9))
    mask = torch.zeros_like(ids)
    for i, n in enumerate((13, 6, 6)):
        mask[i, 13 - n :] = 1  # padded on the left
    with torch.no_grad():
        padded = ours(ids, mask, decoder_input_ids=answer).logits
        for i in range(3):
            alone = ours(ids[i : i + 1, mask[i] == 1], decoder_input_ids=answer[i : i + 1]).logits
            torch.testing.assert_close(padded[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        cache = ours.cache_of(ours.encode(ids, mask))
        pieces = [
            ours(decoder_input_ids=piece, past_key_values=cache).logits
            for piece in answer.split((1, 5, 1, 2), 1)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), padded, rtol=1e-4, atol=1e-5)


@each_row
def test_what_we_save_loads_in_the_peer(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_a_head_of_its_own_in_the_file_stays_untied(tmp_path):
    """Flan-T5: the head differs from the embeddings, and the scaling is off."""
    theirs = peer("t5", 1)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.randn(61, 48)
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("scale_decoder_outputs")
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    real = batch()["labels"] != -100
    assert relative(ours(**batch()).logits[real], again(**batch()).logits[real]) < 1e-5


def test_sampling_draws_and_streams(tmp_path):
    peer("t5", 0).save_pretrained(tmp_path)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    data = {k: v for k, v in batch().items() if k != "labels"}
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "seed": 4}
    first, second = (ours.generate(**data, **options) for _ in range(2))
    assert first.shape == (6, 9)
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > 1


@each_family
def test_checkpointed_blocks_give_the_same_gradients(family, tmp_path):
    """With the same masks of dropout, drawn again."""
    peer(family, 0).save_pretrained(tmp_path)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).train()
    torch.manual_seed(2)
    wanted = gradients(ours)
    ours.gradient_checkpointing_enable()
    torch.manual_seed(2)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_bad_calls_say_what_is_wrong():
    model = AutoModelForSeq2SeqLM.from_config(Config(model_type="bart", **BART))
    ids = torch.full((2, 5), 7)
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        model(ids)
    with pytest.raises(ConfigError, match="max_length=40"):
        model(torch.full((1, 41), 7), decoder_input_ids=ids[:1])
    with pytest.raises(ConfigError, match="row 1"):
        model(ids, torch.tensor([[1] * 5, [0] * 5]), decoder_input_ids=ids)
    with pytest.raises(ConfigError, match="normalize_before"):
        AutoModelForSeq2SeqLM.from_config(Config(model_type="bart", **BART, normalize_before=True))
    with pytest.raises(ConfigError, match="gated-ACT"):
        AutoModelForSeq2SeqLM.from_config(Config(model_type="t5", **T5, feed_forward_proj="a-b"))
    nameless = Config(model_type="t5", **{**T5, "decoder_start_token_id": None})
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        AutoModelForSeq2SeqLM.from_config(nameless).generate(ids)


def test_each_family_has_its_rows():
    assert {name for name, _ in ROWS} == set(NAMES)
    assert all(len(family_of(name).CASES) >= 3 for name in NAMES)


def test_bart_classifies_texts_as_the_peer_does(tmp_path):
    options = {**BART, "num_labels": 3}
    torch.manual_seed(0)
    config = transformers.BartConfig(**options)
    theirs = transformers.BartForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.5))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(5, 60, (3, 12))
    ids[:, -1] = 2
    labels = torch.tensor([0, 2, 1])
    wanted, found = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert relative(found.logits, wanted.logits) < 1e-5
    assert relative(found.loss, wanted.loss) < 1e-5
    row = torch.cat((ids[0], ids[1, 5:], ids[2]))[None]
    alone = torch.cat([ours(i).logits for i in (ids[:1], ids[1:2, 5:], ids[2:])])
    torch.testing.assert_close(ours(row, lengths=(12, 7, 12)).logits, alone)
    with pytest.raises(ConfigError, match="text 0 has no end-of-text"):
        ours(ids[:, :5])
    ours.save_pretrained(tmp_path / "ours")
    _, info = transformers.BartForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    peer("bart", 0).save_pretrained(tmp_path / "lm")
    with pytest.warns(TopworkWarning, match="classification_head"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm")
