"""Every setting of every objective is read by a run, or is known to be read by some runs alone."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest
import torch

import tiny
from cli.test_objectives import PAIRS, ROWS
from teaching import teaching
from topwork import LoraConfig
from topwork.errors import ConfigError
from topwork.objectives.registry import OBJECTIVES
from topwork.training import TrainingArguments

# Settings, and what has to be set besides for them to be read.
WHEN = {
    "resize_to_multiple_of": "added_tokens",
    "packing_strategy": "packing",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
    "ref_model_mixup_alpha": "sync_ref_model",
    "ref_model_sync_steps": "sync_ref_model",
    "rollout_timeout": "rollout_server",
    "importance_correction_max": "importance_correction",
    "importance_correction_min": "importance_correction",
    "distillation_alpha": "distillation_mode",
    "distillation_add_tail": "distillation_topk",
    "distillation_topk": "distillation_mode",
    "feedback_template": "include_environment_feedback",
    "steps_per_generation": "it becomes num_mini_batches when it is set",
}
# GRPO's part of SDPO's loss, which `distillation_weight` below 1 asks for.
GRPOS = {
    "delta", "epsilon", "epsilon_high", "importance_sampling_level", "loss_type",
    "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos",
    "use_bias_correction_kl",
}  # fmt: skip
# Refused at any value that would ask for something.
REFUSED = {
    "distill": {"loss_type": "dft", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
                "token_metrics": True, "streaming": True, "eval_packing": True, "packing": True},
    "prm": {"eos_token": "</s>"},
    "rloo": {"advantage": "group", "entropy_coef": 0.1, "normalise_rewards_first": True,
             "off_policy_mask_threshold": 0.1, "scale_rewards": "batch"},
    "sdpo": {"entropy_coef": 0.1},
    "a2po": {"importance_correction": "token_mask"},
    "online_dpo": {"importance_correction": "token_mask"},
}  # fmt: skip
REFUSED["server_distill"] = {
    **REFUSED["distill"], "teacher_model_init_kwargs": {"dtype": "auto"}, "seq_kd": True,
    "temperature": 0.5,
}  # fmt: skip
LIKE = {"gkd": "distill", "iw_opd": "distill", "uld": "distill", "gold": "distill",
        "xpo": "online_dpo", "nash_md": "online_dpo"}  # fmt: skip
QUIET = (
    "training/arguments.py",
    "training/familiar.py",
    "dataclasses.py",
    "objectives/familiar.py",
)


def watched(config, seen):
    """`config` as a class that notes which of its settings a run reads."""
    names = {f.name for f in fields(config)}

    class Watched(config):
        def __getattribute__(self, name):
            if name in names:
                code = sys._getframe(1).f_code
                if code.co_name != "__post_init__" and not code.co_filename.endswith(QUIET):
                    seen.add(name)
            return super().__getattribute__(name)

    return Watched


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def longer(completions, **_):
    return [float(len(c)) for c in completions]


@pytest.mark.filterwarnings("ignore:.*start with fresh values")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_setting_is_read(name, base, tmp_path):
    entry, seen = OBJECTIVES[name], set()
    names = {f.name for f in fields(entry.config)} - {f.name for f in fields(TrainingArguments)}
    short = {n: 4 for n in ("max_completion_length", "max_new_tokens") if n in names}
    args = watched(entry.config, seen)(
        output_dir=str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1,
        disable_tqdm=True, **short,
    )  # fmt: skip
    more = {"teacher_model": base} if "teacher" in entry.models else {}
    if "reward" in entry.models:
        more["reward_funcs"] = longer
    seen.clear()
    rows = ROWS.get(name, PAIRS)
    torch.manual_seed(0)
    with teaching(tiny.model()) as server:
        if name == "server_distill":
            args.teacher_model_server_url = server.url
        entry.trainer(
            base, args=args, train_dataset=rows, eval_dataset=rows, peft_config=LoraConfig(r=2),
            **more,
        ).train()  # fmt: skip
    refused = REFUSED.get(LIKE.get(name, name), {})
    lost = names - seen - set(WHEN) - set(refused) - (GRPOS if name == "sdpo" else set())
    assert not lost


@pytest.mark.parametrize(
    ("name", "setting"),
    [(n, s) for n in OBJECTIVES for s in REFUSED.get(LIKE.get(n, n), {})],
)
def test_what_is_not_read_is_refused(name, setting):
    value = REFUSED[LIKE.get(name, name)][setting]
    with pytest.raises(ConfigError, match=setting):
        OBJECTIVES[name].config(**{setting: value})
