"""A shared prompt computed once gives what separate rows give: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from topwork.data.groups import Group, collate_groups
from topwork.data.packing import collate
from topwork.data.prepare import Sample
from topwork.models import Config
from topwork.objectives.logprobs import token_logprobs
from topwork.ops import Layout, Rule, attention


def sample(row, size, trained=None):
    ids = np.random.default_rng(row).integers(3, 250, size).astype(np.int32)
    return Sample(row, ids, np.ones(size, bool) if trained is None else trained)


def groups():
    marks = np.array([True, False, True, True])
    return [
        Group(0, sample(10, 6).ids, (sample(1, 4, marks), sample(2, 7))),
        Group(1, sample(11, 1).ids, (sample(3, 2), sample(4, 3), sample(5, 1))),
    ]


def apart():
    rows = []
    for group in groups():
        for answer in group.answers:
            ids = np.concatenate((group.prompt, answer.ids))
            rows.append(Sample(0, ids, np.concatenate((group.prompt < 0, answer.trained))))
    return rows


@pytest.mark.parametrize("window", [None, 4])
def test_shared_prompts_give_the_same_logprobs_and_gradients(window):
    changes = {"model_type": "mistral", "sliding_window": window}
    model = tiny.model(**changes)
    shared = collate_groups(groups())
    assert shared.lengths == ((6, 4, 7), (1, 2, 3, 1))
    assert shared.tokens == 24
    found = token_logprobs(model, shared)
    wanted = torch.cat([token_logprobs(model, collate([row])) for row in apart()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    parameters = list(model.parameters())
    ours, theirs = (
        torch.autograd.grad((logprobs * weight).sum(), parameters) for logprobs in (found, wanted)
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_owners_and_rows_tell_whose_each_target_is():
    batch = collate_groups(groups())
    assert torch.bincount(batch.owners).tolist() == [3, 7, 2, 3, 1]
    assert batch.rows == (0, 1)


def test_transformers_models_see_the_same_groups(tmp_path):
    import transformers

    ours = tiny.model()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = collate_groups(groups())
    torch.testing.assert_close(
        token_logprobs(theirs, batch), token_logprobs(ours, batch), rtol=1e-4, atol=1e-4
    )


def test_a_branch_sees_its_beginning_and_not_its_siblings():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    out = attention(q, k, v, Layout(((3, 2, 4),)), Rule(0.3))
    rows = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    alone = attention.reference(*(t[:, rows] for t in (q, k, v)), Layout((7,)), Rule(0.3))
    torch.testing.assert_close(out[:, rows], alone)


def test_classifiers_pool_each_branch():
    from topwork.models import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config)
    batch = collate_groups(groups())
    shared = model(batch.input_ids, lengths=batch.lengths).logits
    alone = torch.cat(
        [model(torch.from_numpy(r.ids)[None].long(), lengths=(len(r),)).logits for r in apart()]
    )
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
