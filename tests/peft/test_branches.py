"""Documents that share a beginning, under adapters that see more than their layers do."""

from __future__ import annotations

import pytest
import torch

import topwork
from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model, ops
from topwork.models import Config

CALL = [7, 8]
CAUSAL = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "prompt": topwork.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "prefix": topwork.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "alora": LoraConfig(**CAUSAL, target_modules="all-linear", alora_invocation_tokens=CALL),
}
BEGIN, BRANCHES = [3, 4, 9, 5], ([6, 2, 11], [12], [10, 13, 1, 2, 3])


def adapted(kind):
    torch.manual_seed(0)
    config = Config(
        model_type="llama", vocab_size=20, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config), ADAPTERS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def hidden(model, begin, branches):
    """Of the beginning and its branches in one, and of plain documents, each in the same order."""
    ids = torch.tensor([[*begin, *(i for branch in branches for i in branch), 5, 6]])
    lengths = ((len(begin), *map(len, branches)), 2)
    plain = ops.unshared(lengths, ids.device)
    with torch.no_grad():
        found = model.backbone(ids, lengths=lengths)[0]
        wanted = model.backbone(ids[:, plain.take], lengths=plain.lengths)[0]
    return found, wanted[plain.back]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_branches_are_as_documents_of_their_own(kind):
    model = adapted(kind)
    bare = model.get_base_model()
    begins = {"there": [*BEGIN, *CALL, 2], "not": BEGIN}
    for begin in begins.values():
        found, wanted = hidden(model, begin, BRANCHES)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            without, _ = hidden(bare, begin, BRANCHES)
        if kind != "alora" or begin is begins["there"]:
            assert (found - without).abs().max() > 0.1


def test_an_invocation_in_a_branch_acts_on_that_branch_alone():
    model = adapted("alora")
    found, wanted = hidden(model, BEGIN, ([6, *CALL, 11], [12, 4], [7]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # Half of it in the beginning: what all share stays the bare model's.
    found, wanted = hidden(model, [*BEGIN, 7], ([8, 11], [9, 1]))
    torch.testing.assert_close(found[7:], wanted[7:], rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        bare = model.backbone(torch.tensor([[*BEGIN, 7]]))[0]
    torch.testing.assert_close(found[:5], bare, rtol=1e-4, atol=1e-5)


def test_what_a_branch_says_after_the_invocation_is_weighed_as_it_was_made():
    model = adapted("alora")
    begin, answer = [*BEGIN, *CALL, 2], [6, *CALL, 9, 1]

    def say(seen, scores):
        at = seen.shape[1] - len(begin)
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor(answer[at]), 0.0)

    made = model.generate(
        torch.tensor([begin]), max_new_tokens=len(answer), logits_processor=[say],
        return_dict_in_generate=True, output_logits=True, eos_token_id=None,
    )  # fmt: skip
    assert made.sequences[0, len(begin) :].tolist() == answer
    found, _ = hidden(model, begin, (answer, [3]))
    with torch.no_grad():
        logits = model.head(found[len(begin) - 1 : len(begin) + len(answer) - 1])
    torch.testing.assert_close(logits, torch.cat(made.logits), rtol=1e-4, atol=1e-4)
