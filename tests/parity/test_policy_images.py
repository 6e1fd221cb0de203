"""The policy losses over answers to images against TRL's on the same answers, with gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, List, Value

import topwork
from parity.test_preference_images import homes
from sighted import picture
from topwork.objectives.draws import Drawn
from topwork.objectives.rollouts import Answer

SIZES, ADVANTAGES = (4, 7, 2, 6), torch.tensor([1.3, -0.7, 0.4, -1.1])


def padded(rows):
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_loss_and_gradients_equal_the_peer(family, name, tmp_path, monkeypatch):
    """One prompt with two images and four answers; here its images are computed once."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    processor, peer_processor = homes(family, tmp_path)
    pictures = [picture(16, 30, 1), picture(20, 20, 2)]
    rows = [{"prompt": [{"role": "user", "content": "which?"}], "images": pictures}]
    options = {"num_generations": 4, "max_completion_length": 9, "beta": 0.0,
               "per_device_train_batch_size": 4}  # fmt: skip
    more = {"loss_type": "dapo"} if name == "GRPO" else {}
    run = getattr(topwork, f"{name}Trainer")(
        topwork.AutoModelForImageTextToText.from_pretrained(tmp_path / "policy"),
        lambda completions, **_: [0.0] * len(completions),
        getattr(topwork, f"{name}Config")(
            output_dir=str(tmp_path / "ours"), importance_correction="none", **options, **more
        ),
        rows, processing_class=processor,
    )  # fmt: skip
    objective, (prompt,) = run.objective, run.train_data
    rng = np.random.default_rng(0)
    said = [rng.integers(40, 290, n).tolist() for n in SIZES]
    drawn = Drawn(prompt, [Answer(ids, True) for ids in said], torch.zeros(4, 1))
    rollout = objective._rollout(run.model, [drawn], ADVANTAGES[None])
    loss = objective.loss(run.model, rollout).over([objective.weight(rollout)])
    loss.backward()

    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "images": List(Image())})
    peer = getattr(trl, f"{name}Trainer")(
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "policy"),
        lambda completions, **_: [0.0] * len(completions),
        getattr(trl, f"{name}Config")(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, use_vllm=False, **options, **more,
        ),
        Dataset.from_list(rows * 4, features), processing_class=peer_processor,
    )  # fmt: skip
    peer.model.train()
    peer.current_gradient_accumulation_steps = 1
    call = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image", "image": p} for p in pictures),
                                      {"type": "text", "text": "which?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert prompt.ids.tolist() == call["input_ids"][0].tolist()
    ids, answers = call["input_ids"].expand(4, -1), padded(said)
    mask = padded([[1] * n for n in SIZES])
    whole = torch.cat((torch.ones_like(ids), mask), 1)
    images = {"pixel_values": torch.cat([call["pixel_values"]] * 4), "num_images": [2] * 4}
    if "image_grid_thw" in call:
        images["image_grid_thw"] = torch.cat([call["image_grid_thw"]] * 4)
        kinds = (torch.cat((ids, answers), 1) == peer_processor.image_token_id).int()
        images["mm_token_type_ids"] = kinds
    seen = {k: v for k, v in images.items() if k != "num_images"}
    with torch.no_grad():
        logits = peer.model(torch.cat((ids, answers), 1), attention_mask=whole, **seen).logits
        old = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        old = old.gather(2, answers[..., None])[..., 0]
    given = {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": answers,
        "completion_mask": mask, "advantages": ADVANTAGES, "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(), **images,
    }  # fmt: skip
    wanted = peer._compute_loss(peer.model, given)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    theirs = {n: p.grad for n, p in peer.model.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    assert len(mine) == len(theirs)
    norms = [sorted(float(g.norm()) for g in side.values()) for side in (mine, theirs)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=1e-6)
