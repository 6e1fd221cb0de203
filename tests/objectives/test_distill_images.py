"""Distillation over rows with images: both models see them, and students write answers to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sighted import pair, rows
from topwork import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    IWOPDConfig,
    IWOPDTrainer,
    LoraConfig,
)
from topwork.data.packing import collate
from topwork.ops import divergence


def settings(home, kind, **more):
    usual = {
        "output_dir": str(home), "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "max_length": None, "max_steps": 2,
    }  # fmt: skip
    return kind(**{**usual, **more})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_the_divergence_is_that_of_both_models_familiar_calls(family, tmp_path):
    """Row by row, on the logits before each trained token."""
    made, other = pair(family), pair(family, 1)
    run = DistillationTrainer(
        made.model, other.model, settings(tmp_path, DistillationConfig, beta=0.3, temperature=1.5),
        rows(family), processing_class=made.processor,
    )  # fmt: skip
    samples, placer = run.prepared.samples, run.objective.placer
    wanted = 0.0
    for sample in samples:
        one = collate([sample], placer)
        said = []
        for model in (made.model.eval(), other.model):
            with torch.no_grad():
                logits = model(one.input_ids, **one.images).logits[0]
            at = torch.from_numpy(np.flatnonzero(sample.trained)) - 1
            said.append((logits[at].float() / 1.5).log_softmax(-1))
        wanted += float(divergence(*said, 0.3).sum())
    with torch.no_grad():
        found = run.objective.loss(run.model, collate(samples, placer)).total
    assert float(found) == pytest.approx(wanted, rel=1e-4)
    run.train()
    assert any("[image" in line for line in run.notes)


@pytest.mark.parametrize("more", [{"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}])
def test_students_and_teachers_answer_prompts_with_images(more, tmp_path):
    made, other = pair("llava"), pair("llava", 1)
    run = GKDTrainer(
        made.model, other.model,
        settings(tmp_path, GKDConfig, max_new_tokens=5, temperature=1e-4, **more), rows("llava"),
        processing_class=made.processor, peft_config=LoraConfig(r=2),
    )  # fmt: skip
    samples = run.prepared.samples
    (batch,) = run.objective.assemble(run.model, [samples], run.world)
    assert batch.images["pixel_values"].shape[0] == sum(len(s.images) for s in samples)
    writer = made.model if more["lmbda"] else other.model
    at = 0
    for row, size in zip(batch.rows, batch.lengths):
        (sample,) = (s for s in samples if s.row == row)
        ids = batch.input_ids[:, at : at + size]
        at += size
        first = int(np.flatnonzero(sample.trained)[0])
        call = ids[:, :first]
        images = {} if not sample.images else run.objective.placer.tensors([sample])
        images.pop("token_type_ids", None)
        out = writer.generate(
            call,
            **images,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=2,
            suppress_tokens=[made.image],
        )
        assert ids.tolist() == out.tolist()
    run.train()
    assert all(np.isfinite(e["loss"]) for e in run.state.log_history if "loss" in e)


def test_tokens_of_answers_to_images_are_weighed(tmp_path):
    made, other = pair("qwen2_vl"), pair("qwen2_vl", 1)
    run = IWOPDTrainer(
        made.model, other.model,
        settings(tmp_path, IWOPDConfig, max_new_tokens=4, lmbda=1.0), rows("qwen2_vl"),
        processing_class=made.processor, peft_config=LoraConfig(r=2),
    )  # fmt: skip
    (batch,) = run.objective.assemble(run.model, [run.prepared.samples], run.world)
    assert len(batch.images["pixel_values"])
    run.train()
    assert all(np.isfinite(e["loss"]) for e in run.state.log_history if "loss" in e)
