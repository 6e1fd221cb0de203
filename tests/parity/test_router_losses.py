"""The routers' loss beside those of preferences and policies, against TRL's on a tiny Mixtral."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset

import tiny
import topwork
from parity.test_preference import (
    TEMPLATE,
    assert_same,
    both,
    both_dpo,
    our_options,
    peer_options,
    quiet,  # noqa: F401 (a fixture)
    text_pairs,
)
from topwork.data.groups import Group, collate_groups
from topwork.data.prepare import Sample
from topwork.objectives.draws import Rollout
from topwork.objectives.grpo import GRPO
from topwork.objectives.rloo import RLOO

MIXTURE = {
    "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.3, "output_router_logits": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("policy", 1)):
        tiny.model(seed, **MIXTURE).save_pretrained(folder / name)
        tiny.tokenizer(TEMPLATE).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("options", [{}, {"router_aux_loss_coef": 0.7}], ids=["config", "given"])
def test_dpo(homes, tmp_path, options):
    assert_same(*both_dpo(homes, tmp_path, **options), "aux_loss")


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_preferences_without_reference(homes, tmp_path, name):
    from importlib import import_module

    peers, upper = import_module(f"trl.experimental.{name}"), name.upper()
    found = both(
        homes, tmp_path, *(
            (getattr(where, f"{upper}Trainer"), getattr(where, f"{upper}Config"))
            for where in (topwork, peers)
        ), text_pairs(), beta=0.7, peer_extra={"remove_unused_columns": False},
    )  # fmt: skip
    assert found[0]["aux_loss"] > 0
    assert_same(*found)


def test_kto(homes, tmp_path):
    rows = [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": bool(i % 2)}
        for i, r in enumerate(text_pairs(4))
    ]
    ours, theirs = (
        trainer(
            auto.from_pretrained(homes / "policy"), auto.from_pretrained(homes / "base"), args,
            train_dataset=data, processing_class=words.from_pretrained(homes / "policy"),
        )
        for trainer, auto, args, data, words in (
            (topwork.KTOTrainer, topwork.AutoModelForCausalLM,
             topwork.KTOConfig(**our_options(tmp_path, shuffle=False)), rows,
             topwork.AutoTokenizer),
            (trl.KTOTrainer, transformers.AutoModelForCausalLM,
             trl.KTOConfig(**peer_options(tmp_path)), Dataset.from_list(rows),
             transformers.AutoTokenizer),
        )
    )  # fmt: skip
    ours.train()
    theirs.train()
    assert_same(ours.state.log_history[0], theirs.state.log_history[0], "aux_loss")


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_policies(homes, tmp_path, name):
    """One group whose answers share their prompt here, and stand in rows of their own there."""
    sizes, advantages = (4, 7, 2, 6), torch.tensor([1.3, -0.7, 0.4, -1.1])
    rng = np.random.default_rng(0)
    prompt, *rest = (rng.integers(3, 250, n).astype(np.int32) for n in (5, *sizes))
    group = Group(0, prompt, tuple(Sample(0, ids, np.ones(len(ids), bool)) for ids in rest))
    args = getattr(topwork, f"{name}Config")(
        num_generations=4, importance_correction="none", max_completion_length=9
    )
    model = topwork.AutoModelForCausalLM.from_pretrained(homes / "policy")
    ours = {"GRPO": GRPO, "RLOO": RLOO}[name](args, None)  # type: ignore[arg-type]
    rollout = Rollout(collate_groups([group]), advantages)
    loss = ours.loss(model, rollout).over([ours.weight(rollout)])
    loss.backward()

    options = peer_options(tmp_path, num_generations=4, max_completion_length=9, beta=0.0)
    more = {"use_vllm": False}
    peer = getattr(trl, f"{name}Trainer")(
        transformers.AutoModelForCausalLM.from_pretrained(homes / "policy"),
        lambda completions, **_: [0.0] * len(completions),
        getattr(trl, f"{name}Config")(**options, **more),
        Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            homes / "policy", padding_side="left"
        ),
    )
    peer.model.train()
    peer.current_gradient_accumulation_steps = 1
    rows = torch.zeros(4, max(sizes), dtype=torch.long)
    for i, ids in enumerate(rest):
        rows[i, : len(ids)] = torch.from_numpy(ids).long()
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
    beginning = torch.from_numpy(prompt).long().expand(4, -1)
    with torch.no_grad():
        whole = torch.cat((torch.ones_like(beginning), mask), 1)
        found = peer.model(torch.cat((beginning, rows), 1), attention_mask=whole).logits
        old = found[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, rows[..., None])[..., 0]
    wanted = peer._compute_loss(
        peer.model,
        {
            "prompt_ids": beginning, "prompt_mask": torch.ones_like(beginning),
            "completion_ids": rows, "completion_mask": mask, "advantages": advantages,
            "old_per_token_logps": old, "old_logps": (old * mask).sum(1),
            "num_items_in_batch": mask.sum(),
        },
    )  # fmt: skip
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for key, parameter in model.named_parameters():
        if "mlp.gate" in key or "embed_tokens" in key or "q_proj" in key:
            theirs = peer.model.get_parameter(key).grad
            assert (parameter.grad - theirs).norm() < 1e-4 * theirs.norm() + 1e-7, key
