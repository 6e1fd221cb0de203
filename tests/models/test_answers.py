"""Decoders that find answers, against transformers and by themselves."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

import topwork
from topwork.errors import TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES, family

WORDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY = {
    "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 4, 11], [9, 3, 4, 8, 0, 0]])
MASK = (IDS != 0).long()
ANSWERS = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 9])}
DECODERS = [
    name
    for name in NAMES
    if {"causal-lm", "question-answering"} <= tasks_of(name).keys()
    and name in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
    and not hasattr(family(name), "encoder")
]


def peer(name, kind="AutoModelForQuestionAnswering"):
    values = {**WORDS, **getattr(family(name), "TINY", TINY), **family(name).CASES[0]}
    config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(values)))
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", DECODERS)
def test_a_question_answerer_of_each_decoder_equals_the_peer_and_saves_as_it_does(name, tmp_path):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = topwork.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "theirs")
    wanted = theirs(IDS, attention_mask=MASK)
    found = ours(IDS, attention_mask=MASK)
    real = MASK == 1
    for side in ("start_logits", "end_logits"):
        there = getattr(wanted, side)
        torch.testing.assert_close(getattr(found, side)[real], there[real], rtol=1e-4, atol=1e-5)
    wanted, found = theirs(IDS, **ANSWERS), ours(IDS, **ANSWERS)  # 9 lies outside: no end
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    head = theirs.qa_outputs.weight.grad
    torch.testing.assert_close(ours.qa_outputs.weight.grad, head, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "theirs")
    again, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(IDS).end_logits, theirs(IDS).end_logits)


def test_they_are_the_families_that_the_peer_has():
    assert {"gpt2", "llama", "qwen2", "qwen3", "mistral", "mixtral", "gptj", "bloom", "falcon",
            "opt", "mpt", "gpt_neo", "gpt_neox", "smollm3"} <= set(DECODERS)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_trunk_comes_from_a_causal_file_and_the_head_starts_fresh(name, tmp_path):
    theirs = peer(name, "AutoModelForCausalLM")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(TopworkWarning, match=r"qa_outputs"):
        ours = topwork.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs.base_model(IDS[:1]).last_hidden_state
        torch.testing.assert_close(ours.backbone(IDS[:1]), wanted, rtol=1e-4, atol=1e-4)


def test_padding_and_packing_change_neither_logits_nor_loss(tmp_path):
    peer("llama").save_pretrained(tmp_path)
    ours = topwork.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    where = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 2])}
    right = ours(IDS, attention_mask=MASK, **where)
    packed = torch.cat([IDS[0], IDS[1, :4]])[None]
    together = ours(packed, lengths=(6, 4), **where)
    torch.testing.assert_close(together.logits[0], right.logits[MASK == 1])
    torch.testing.assert_close(together.loss, right.loss)
    left, mask = IDS.clone(), MASK.clone()
    left[1], mask[1] = left[1].roll(2), mask[1].roll(2)
    moved = {key: at + torch.tensor([0, 2]) for key, at in where.items()}
    found = ours(left, attention_mask=mask, **moved)
    torch.testing.assert_close(found.loss, right.loss)
    missing = ours(left, attention_mask=mask, **where)  # the second answer starts in the padding
    by_hand = ours(left[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([3]))
    logits = ours(left[1:, 2:])
    end = torch.nn.functional.cross_entropy(logits.end_logits, torch.tensor([0]))
    start_one = torch.nn.functional.cross_entropy(by_hand.start_logits, torch.tensor([1]))
    end_one = torch.nn.functional.cross_entropy(by_hand.end_logits, torch.tensor([3]))
    torch.testing.assert_close(missing.loss, (start_one + (end_one + end) / 2) / 2)
