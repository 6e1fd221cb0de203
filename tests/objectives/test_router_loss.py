"""The routers' load-balancing loss beside the tokens' loss, in the trainer and in the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import tiny
import topwork
from topwork import AutoModelForCausalLM, LoraConfig, SFTConfig, SFTTrainer, get_peft_model
from topwork.data.groups import Group, collate_groups
from topwork.data.packing import collate
from topwork.data.prepare import Sample
from topwork.errors import ConfigError
from topwork.objectives.logprobs import score
from topwork.objectives.routing import routed
from topwork.objectives.setup import router_weight
from topwork.objectives.sft import SFT
from topwork.training import Loss

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [1], "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "olmoe": {"num_experts": 4},
}


def pair(family, folder, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family], **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    return theirs.eval(), AutoModelForCausalLM.from_pretrained(folder)


def samples(lengths):
    """Rows whose later half is trained."""
    rng = np.random.default_rng(0)
    return [
        Sample(i, rng.integers(0, 259, n).astype(np.int32), np.arange(n) >= n // 2)
        for i, n in enumerate(lengths)
    ]


def padded(rows):
    width = max(len(row) for row in rows)
    ids, labels = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        own = torch.from_numpy(row.ids).long()
        ids[i, : len(row)], mask[i, : len(row)] = own, 1
        labels[i, : len(row)] = own.masked_fill(~torch.from_numpy(row.trained), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_objective_the_call_and_the_peer_give_one_loss(family, tmp_path):
    """Of rows of several lengths, in which no padding counts."""
    theirs, ours = pair(family, tmp_path, output_router_logits=True)
    rows = samples((13, 7, 10))
    batch = collate(rows)
    wanted, called = theirs(**padded(rows)), ours(**padded(rows))
    packed = SFT().loss(ours, batch)
    count = len(batch.targets)
    torch.testing.assert_close(called.loss, wanted.loss)
    torch.testing.assert_close(called.aux_loss, wanted.aux_loss)
    torch.testing.assert_close(packed.total / count, wanted.loss)
    assert packed.metrics["aux_loss"] == pytest.approx((count * wanted.aux_loss.item(), count))
    for a, b in zip(gradients(ours, called.loss), gradients(ours, packed.total / count)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_configuration_is_followed_unless_the_argument_says_else(tmp_path):
    """As in the peer's trainer, whatever output_router_logits says."""
    _, ours = pair("mixtral", tmp_path)
    batch = collate(samples((13, 7)))
    plain = SFT(router=0.0).loss(ours, batch)
    assert "aux_loss" not in plain.metrics
    units = len(batch.targets)
    for given, weight in ((None, 0.3), (0.7, 0.7)):
        found = SFT(router=given).loss(ours, batch)
        balanced = found.metrics["aux_loss"][0] / units
        assert (found.total - plain.total).item() / units == pytest.approx(
            weight * balanced, rel=1e-4
        )
    adapted = get_peft_model(ours, LoraConfig(r=2, target_modules=["q_proj"]))
    assert router_weight(adapted, None) == 0.3


def test_each_micro_batch_counts_by_its_trained_tokens(tmp_path):
    """The loss is of a pass: cut into passes it is their mean, weighted like the tokens' loss."""
    _, ours = pair("qwen3_moe", tmp_path)
    parts = [collate(samples((13, 7))), collate(samples((20,)))]
    losses = [SFT().loss(ours, part) for part in parts]
    units = [len(part.targets) for part in parts]
    plain = [SFT(router=0.0).loss(ours, part).total for part in parts]
    balanced = [loss.metrics["aux_loss"][0] / n for loss, n in zip(losses, units)]
    mean = sum(n * b for n, b in zip(units, balanced)) / sum(units)
    together = sum(loss.total for loss in losses) / sum(units)
    assert together.item() == pytest.approx((sum(plain) / sum(units)).item() + 0.3 * mean, rel=1e-5)
    same = SFT().loss(ours, collate(samples((13, 7)) * 2)).total  # twice the same: the same loss
    assert same.item() == pytest.approx(2 * losses[0].total.item(), rel=1e-5)


def test_checkpointed_blocks_give_the_same_gradients(tmp_path):
    _, ours = pair("mixtral", tmp_path)
    ours.train()
    batch = collate(samples((13, 7)))
    wanted = gradients(ours, SFT().loss(ours, batch).total)
    ours.gradient_checkpointing_enable()
    found = gradients(ours, SFT().loss(ours, batch).total)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_logs_it_and_a_model_without_experts_refuses_it(tmp_path):
    _, ours = pair("mixtral", tmp_path / "base")
    values = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "logging_steps": 1,
              "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    run = SFTTrainer(ours, SFTConfig(**values), tiny.chats(4), processing_class=tiny.tokenizer())
    run.train()
    assert run.state.log_history[0]["aux_loss"] > 0
    with pytest.raises(ConfigError, match="no routers"):
        SFTTrainer(
            tiny.model(), SFTConfig(**values, router_aux_loss_coef=0.1), tiny.chats(4),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="at least 0"):
        SFTConfig(**values, router_aux_loss_coef=-0.1)


# -- beyond fine-tuning ----------------------------------------------------------------------------


def mixture(seed=0, **changes):
    """A tiny Mixtral over the shared tokenizer."""
    values = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
              "router_aux_loss_coef": 0.3}  # fmt: skip
    return tiny.model(seed, **{**values, **changes})


def test_a_shared_prompt_counts_with_each_of_its_answers():
    """As in rows of their own: the loss and its gradient."""
    rng = np.random.default_rng(0)
    prompt, answers = rng.integers(3, 250, 9), [rng.integers(3, 250, n) for n in (4, 7, 2)]
    marked = [Sample(0, a.astype(np.int32), np.ones(len(a), bool)) for a in answers]
    shared = collate_groups([Group(0, prompt.astype(np.int32), tuple(marked))])
    whole = [np.concatenate([prompt, a]).astype(np.int32) for a in answers]
    apart = collate([Sample(0, ids, np.arange(len(ids)) >= len(prompt)) for ids in whole])
    assert shared.tokens < apart.tokens
    model, found = mixture(), []
    for batch in (shared, apart):
        with routed(model, batch, 1.0) as routers:
            score(model, batch)
        loss = routers.beside(Loss(torch.zeros(2)), 5.0).total
        assert loss[1] == 0
        found.append((loss[0], *gradients(model, loss[0])))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


PAIRS = [{"prompt": f"ask {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(4)]
JUDGED = [{"prompt": f"ask {i}", "completion": f" {i}", "label": i % 2 == 0} for i in range(4)]
DRAWN = {"max_completion_length": 4}
GROUPS = {**DRAWN, "num_generations": 2, "per_device_train_batch_size": 4}


def lengths(completions, **_):
    return [float(len(c)) for c in completions]


TRAINERS = [
    ("DPO", PAIRS, {}, {}), ("KTO", JUDGED, {}, {}), ("ORPO", PAIRS, {}, {}),
    ("CPO", PAIRS, {}, {}),
    ("Distillation", tiny.chats(3), {}, {"teacher_model": 1}),
    ("GKD", tiny.chats(3), {"max_new_tokens": 4}, {"teacher_model": 1}),
    ("ULD", tiny.chats(3), {},
     {"teacher_model": 1, "teacher_processing_class": tiny.tokenizer()}),
    ("SelfDistillation", [{"prompt": "ask", "privileged_context": "7"}] * 4, DRAWN, {}),
    ("GRPO", PAIRS, GROUPS, {"reward_funcs": lengths}),
    ("RLOO", PAIRS, GROUPS, {"reward_funcs": lengths}),
    ("PPO", PAIRS, DRAWN, {"reward_funcs": lengths}),
    ("OnlineDPO", PAIRS, GROUPS, {"reward_funcs": lengths}),
    ("NashMD", PAIRS, GROUPS, {"reward_funcs": lengths}),
]  # fmt: skip


def logged(name, rows, args, more, home, **changes):
    more = dict(more)
    if "teacher_model" in more:
        more["teacher_model"] = tiny.model(more["teacher_model"])
    values = {"output_dir": str(home), "max_steps": 1, "logging_steps": 1, "disable_tqdm": True,
              "save_strategy": "no", "learning_rate": 0.0}  # fmt: skip
    trainer = getattr(topwork, f"{name}Trainer")(
        mixture(), args=getattr(topwork, f"{name}Config")(**{**values, **args, **changes}),
        train_dataset=rows, processing_class=tiny.tokenizer(), **more,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(("name", "rows", "args", "more"), TRAINERS, ids=[t[0] for t in TRAINERS])
def test_every_objective_adds_it_once_a_step(name, rows, args, more, tmp_path):
    plain = logged(name, rows, args, more, tmp_path, router_aux_loss_coef=0.0)
    assert "aux_loss" not in plain
    cut = {"gradient_accumulation_steps": 2}
    if "per_device_train_batch_size" not in args:
        cut["per_device_train_batch_size"] = 2
    for changes, weight in (({}, 0.3), ({"router_aux_loss_coef": 0.7}, 0.7)):
        found = logged(name, rows, args, more, tmp_path, **changes)
        assert found["aux_loss"] > 0.5
        gain = found["loss"] - plain["loss"]
        assert gain == pytest.approx(weight * found["aux_loss"], rel=1e-3)
    if name not in ("GKD", "SelfDistillation", "Distillation", "ULD"):  # odd numbers of rows
        one = logged(name, rows, args, more, tmp_path, **cut, router_aux_loss_coef=0.0)
        two = logged(name, rows, args, more, tmp_path, **cut)
        assert two["loss"] - one["loss"] == pytest.approx(0.3 * two["aux_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "rows", "args", "more"),
    [*(t for t in TRAINERS if t[0] in ("DPO", "Distillation", "ULD", "GRPO")),
     ("Reward", PAIRS, {}, {})],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_models_without_routers_refuse_it_in_every_trainer(name, rows, args, more, tmp_path):
    more = dict(more)
    if "teacher_model" in more:
        more["teacher_model"] = tiny.model(more["teacher_model"])
    model = tiny.model()
    if name == "Reward":
        config = topwork.Config(**{**model.config.to_dict(), "num_labels": 1})
        model = topwork.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError, match="has no routers"):
        getattr(topwork, f"{name}Trainer")(
            model, train_dataset=rows, processing_class=tiny.tokenizer(), **more,
            args=getattr(topwork, f"{name}Config")(
                output_dir=str(tmp_path), router_aux_loss_coef=0.1, **args
            ),
        )  # fmt: skip
