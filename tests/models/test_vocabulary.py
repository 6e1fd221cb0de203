"""Another number of tokens: in every causal family, beside transformers, saved and read again."""

from __future__ import annotations

import pytest
import torch
import transformers

import tiny
from parity.test_decoders import BASE, NAMES, family_of
from parity.test_decoders import tiny as sizes_of
from sighted import pair
from topwork import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from topwork import AutoModelForImageTextToText as ImageText
from topwork.errors import ConfigError
from topwork.models import Config
from topwork.peft import LoraConfig, get_peft_model

IDS = torch.tensor([[45, 39, 33, 60, 42, 34, 37]])


def built(auto=AutoModelForCausalLM, **values):
    torch.manual_seed(0)
    made = auto.from_config(Config(**values)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    made.tie_weights()
    return made


@pytest.mark.parametrize(
    ("name", "tied"), [*((n, i % 2 == 0) for i, n in enumerate(NAMES)), ("llama", True),
                       ("llama", False), ("gpt2", True), ("gpt2", False)],
)  # fmt: skip
def test_old_tokens_keep_their_logits_and_files_say_the_new_size(name, tied, tmp_path):
    case = family_of(name).CASES[0]
    model = built(
        model_type=name, **{**BASE, **sizes_of(name), **case, "tie_word_embeddings": tied}
    )
    with torch.no_grad():
        before = model(IDS).logits
        words = model.resize_token_embeddings(66, pad_to_multiple_of=5)
        after = model(IDS).logits
    assert words is model.get_input_embeddings()
    assert (words.num_embeddings, after.shape[-1], model.config.vocab_size) == (70, 70, 70)
    torch.testing.assert_close(after[..., :61], before)
    torch.testing.assert_close(words.weight[61:], words.weight[:61].mean(0).expand(9, -1))
    head = model.get_output_embeddings()
    assert (head.weight is words.weight) == bool(model.tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.cat((IDS, torch.tensor([[61, 69]])), 1)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        made = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 9
    model.resize_token_embeddings(61)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before)


SIZES = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 5, "max_position_embeddings": 64,
         "vocab_size": 61,
         "pad_token_id": 0}  # fmt: skip
SEQ2SEQ = {"d_model": 40, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 5, "vocab_size": 61,
           "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
BART = {"d_model": 40, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 5,
        "decoder_attention_heads": 5, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56,
        "max_position_embeddings": 64, "vocab_size": 61, "decoder_start_token_id": 2,
        "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}  # fmt: skip
BESIDE = [
    ("llama", SIZES, "AutoModelForCausalLM", AutoModelForCausalLM),
    ("gemma", {**SIZES, "head_dim": 8, "num_key_value_heads": 1},
     "AutoModelForCausalLM", AutoModelForCausalLM),
    ("phi", SIZES, "AutoModelForCausalLM", AutoModelForCausalLM),
    ("gpt2", {"n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 64, "vocab_size": 61},
     "AutoModelForCausalLM", AutoModelForCausalLM),
    ("bert", SIZES, "AutoModelForMaskedLM", AutoModelForMaskedLM),
    ("roberta", SIZES, "AutoModelForMaskedLM", AutoModelForMaskedLM),
    ("bert", SIZES, "AutoModel", AutoModel),
    ("t5", SEQ2SEQ, "AutoModelForSeq2SeqLM", AutoModelForSeq2SeqLM),
    ("t5", {**SEQ2SEQ, "tie_word_embeddings": False}, "AutoModelForSeq2SeqLM",
     AutoModelForSeq2SeqLM),
    ("bart", BART, "AutoModelForSeq2SeqLM", AutoModelForSeq2SeqLM),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "theirs", "ours"), BESIDE)
def test_new_rows_are_the_peers_but_for_its_noise(kind, values, theirs, ours, tmp_path):
    """It draws around the mean with a variance of 1e-9 of the old rows'."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values)
    peer = getattr(transformers, theirs).from_config(config).eval()
    with torch.no_grad():
        for tensor in peer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            if tensor.shape == (61,):  # the peer gives new rows of BERT's bias 0, not the mean
                tensor.sub_(tensor.mean())
    peer.save_pretrained(tmp_path / "old")
    model = ours.from_pretrained(tmp_path / "old")
    peer.resize_token_embeddings(67, pad_to_multiple_of=4)
    model.resize_token_embeddings(67, pad_to_multiple_of=4)
    ids = torch.tensor([[5, 9, 33, 60, 12, 65, 67]])
    more = {"decoder_input_ids": ids} if "Seq2Seq" in theirs else {}
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, **more) for m in (peer, model))
        for key in ("logits", "last_hidden_state"):
            if getattr(wanted, key, None) is not None:
                torch.testing.assert_close(
                    getattr(found, key), getattr(wanted, key), atol=5e-3, rtol=1e-3
                )
    model.save_pretrained(tmp_path / "new")
    read = getattr(transformers, theirs).from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        again = read(input_ids=ids, **more)
    key = "logits" if hasattr(again, "logits") else "last_hidden_state"
    torch.testing.assert_close(getattr(again, key), getattr(found, key), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_models_of_images_in_texts(family, tmp_path):
    model = pair(family).model
    size = model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(size + 3)
        torch.testing.assert_close(model(IDS).logits[..., :size], before)
    model.save_pretrained(tmp_path)
    again = ImageText.from_pretrained(tmp_path)
    ids = torch.tensor([[45, 39, size + 2]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_rows_may_be_drawn_and_stay_frozen_or_trained():
    model = tiny.model().requires_grad_(False)
    torch.manual_seed(3)
    words = model.resize_token_embeddings(300, mean_resizing=False)
    assert not words.weight.requires_grad
    assert 0.2 < float(words.weight[259:].std()) < 0.4  # initializer_range is 0.3
    assert model.resize_token_embeddings(300) is words
    assert model.resize_token_embeddings() is words
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 320


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        tiny.model().resize_token_embeddings(0)
    adapted = get_peft_model(
        tiny.model(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    )
    with pytest.raises(ConfigError, match="before an adapter is added"):
        adapted.resize_token_embeddings(300)
    translator = built(
        AutoModelForSeq2SeqLM, model_type="marian",
        **{**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 61,
           "tie_word_embeddings": False},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a vocabulary of its own"):
        translator.resize_token_embeddings(70)
