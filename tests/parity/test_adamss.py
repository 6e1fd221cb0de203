"""AdaMSS beside what peft has of scikit-learn: the groups, and which of them are trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import peft
import tiny
import topwork
from parity.bases import IDS, base, close, randomise
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import PeftModel, get_peft_model, inject
from topwork.peft.methods import adamss

TARGETS = ["q_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_the_groups_are_those_of_scikit_learn():
    torch.manual_seed(0)
    square = torch.linalg.qr(torch.randn(90, 90))[0].contiguous()  # all rows equally far
    alike = torch.randn(60, 5).index_fill(0, torch.arange(40), 0.0)
    for rows, count in ((torch.randn(300, 7), 5), (square, 6), (alike, 4), (torch.randn(3, 9), 5)):
        means = KMeans(
            min(count, len(rows)), init="random", n_init=1, max_iter=10, random_state=adamss.SEED
        )
        labels = means.fit_predict(rows.numpy())
        wanted = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
        found = adamss.groups(rows, count)
        assert [places.tolist() for places in found] == [places.tolist() for places in wanted]


def pair(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    options = {
        "target_modules": ["0", "2"], "r": 8, "num_subspaces": 4, "use_asa": True,
        "init_warmup": 1, "final_warmup": 11, "mask_interval": 3, **options,
    }  # fmt: skip
    ours, theirs = model, copy.deepcopy(model)
    ours = get_peft_model(ours, topwork.AdamssConfig(**options))
    theirs = peft.get_peft_model(theirs, peft.AdamssConfig(**options))
    randomise(ours)
    with torch.no_grad():
        own = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.copy_(own[name])
    return ours, theirs


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_allocation_goes_on_with_the_most_important_groups():
    ours, theirs = pair(asa_target_subspaces=3)
    x = torch.linspace(-1, 1, 60).view(3, 20)
    counts = []
    for step in range(10):
        for model in (ours, theirs):
            model.zero_grad()
            (model(x) * torch.linspace(-1, 1, 15).view(3, 5)).sum().backward()
        with torch.no_grad():
            for parameter in ours.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
            own = dict(ours.named_parameters())
            for name, parameter in theirs.named_parameters():
                parameter.copy_(own[name])
                parameter.grad = None if own[name].grad is None else own[name].grad.clone()
                parameter.requires_grad_(own[name].requires_grad)
        ours.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        if step == 3:
            # peft asks for more than the score of the last group that counts: one fewer
            assert trained(theirs) < trained(ours)
            assert len(trained(ours)) - len(trained(theirs)) == 2
        counts.append(len(trained(ours)) // 2)
    grafts = inject.grafts_of(ours, "default")
    config = ours.peft_config["default"]
    assert sum(len(graft.places) for graft in grafts) == 8
    later = [adamss.budget(config, 8, step) for step in (3, 3, 3, 6, 6, 6, 9)]
    assert counts == [8, 8, 8, *later]
    assert later == sorted(later, reverse=True)
    assert counts[-1] == 3
    with pytest.raises(ConfigError, match="init_warmup=9 must be smaller"):
        topwork.AdamssConfig(use_asa=True, init_warmup=9, final_warmup=9)


def test_a_run_leaves_groups_out_and_keeps_what_they_learnt(tmp_path):
    config = topwork.AdamssConfig(
        target_modules=["q_proj", "v_proj"], r=4, num_subspaces=3, use_asa=True, init_warmup=1,
        final_warmup=4, mask_interval=2, asa_target_subspaces=4,
    )  # fmt: skip
    model = get_peft_model(tiny.model(), config)
    args = topwork.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=0.1,
    )  # fmt: skip
    run = topwork.SFTTrainer(
        model, args, tiny.chats(8), processing_class=tiny.tokenizer(),
        callbacks=[topwork.AdamssAsaCallback()],
    )  # fmt: skip
    assert len(trained(model)) == 2 * 12
    run.train()
    assert len(trained(model)) == 2 * 4
    lists = [part for graft in inject.grafts_of(model, "default") for part in graft._lists()]
    frozen = [p for part in lists for p in part if not p.requires_grad]
    assert all(p.abs().sum() > 0 for p in frozen)


def test_a_file_of_another_device_is_read_by_its_own_directions(tmp_path, monkeypatch):
    config = topwork.AdamssConfig(target_modules=[*TARGETS, "up_proj"], r=9)
    ours = get_peft_model(base("qwen2"), config)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    wanted, own = ours(IDS).logits, inject.grafts_of(ours, "default")
    search = adamss.directions
    monkeypatch.setattr(adamss, "directions", lambda weight, r, seed: search(weight, r, seed + 1))
    elsewhere = inject.grafts_of(get_peft_model(base("qwen2"), config), "default")
    assert any(
        [p.tolist() for p in a.places] != [p.tolist() for p in b.places]
        for a, b in zip(own, elsewhere)
    )
    close(PeftModel.from_pretrained(base("qwen2"), tmp_path)(IDS).logits, wanted)
    other = base("qwen2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    with pytest.raises(CheckpointError, match=r"_proj: the file's groups have \[.*another base"):
        PeftModel.from_pretrained(other, tmp_path)
