"""Settings as scripts for other libraries give them: what is taken, what is told, what refused."""

from __future__ import annotations

import pytest

from topwork import (
    A2POConfig,
    DPOConfig,
    GKDConfig,
    GMPOConfig,
    GOLDConfig,
    GRPOConfig,
    IWOPDConfig,
    RLOOConfig,
    SDPOConfig,
    Seq2SeqTrainingArguments,
    ServerDistillationConfig,
    SFTConfig,
    TPOConfig,
    TrainingArguments,
)
from topwork.errors import ConfigError, TopworkWarning
from topwork.training.familiar import familiar_of

NAMED = (SFTConfig, DPOConfig, GRPOConfig, GMPOConfig, TPOConfig, SDPOConfig, A2POConfig, GKDConfig,
         IWOPDConfig, GOLDConfig, ServerDistillationConfig)  # fmt: skip
# What examples set although it asks for nothing.
QUIET = [
    (TrainingArguments, {"fp16": False, "push_to_hub": False, "fsdp": "", "deepspeed": None}),
    (TrainingArguments, {"do_train": True, "do_eval": True, "overwrite_output_dir": True}),
    (TrainingArguments, {"fsdp": [], "include_for_metrics": [], "label_smoothing_factor": 0}),
    (SFTConfig, {"dataset_num_proc": None, "pad_token": None, "neftune_noise_alpha": 5.0}),
    (DPOConfig, {"truncation_mode": "keep_start", "rpo_alpha": None, "reference_free": False}),
    (GRPOConfig, {"use_vllm": False, "sync_ref_model": False, "reward_clip_range": None}),
]
TOLD = [
    (TrainingArguments, {"remove_unused_columns": False}, "never reach the model"),
    (TrainingArguments, {"dataloader_num_workers": 4, "log_level": "info"}, "workers.*; log_level"),
    (TrainingArguments, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "reentrance"),
    (Seq2SeqTrainingArguments, {"group_by_length": True}, "no padding"),
    (SFTConfig, {"dataset_num_proc": 4}, "by the tokenizer itself"),
    (SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "as they are"),
    (DPOConfig, {"padding_free": True}, "no padding"),
    (GRPOConfig, {"vllm_gpu_memory_utilization": 0.5}, "rollout server"),
]
REFUSED = [
    (TrainingArguments, {"fp16": True}, "bf16=True"),
    (TrainingArguments, {"push_to_hub": True}, r"trainer.push_to_hub\(\)"),
    (TrainingArguments, {"evaluation_strategy": "steps"}, "called eval_strategy"),
    (TrainingArguments, {"learning_rat": 1}, "nearest: 'learning_rate'"),
    (TrainingArguments, {"use_vllm": True}, "no field 'use_vllm'"),
    (TrainingArguments, {"optim": "paged_adamw_8bit"}, "use adamw_torch"),
    (SFTConfig, {"max_seq_length": 8}, "called max_length"),
    (SFTConfig, {"trust_remote_code": True}, "nothing executes"),
    (DPOConfig, {"rpo_alpha": 1.0}, r'\["sigmoid", "sft"\]'),
    (DPOConfig, {"max_prompt_length": 8}, "max_length bounds"),
    (GRPOConfig, {"use_vllm": True}, "rollout_server"),
    (GRPOConfig, {"scale_rewards": "grup"}, "nearest: 'group'"),
    (GRPOConfig, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "a multiple of"),
]


@pytest.mark.parametrize(("cls", "given"), QUIET)
def test_what_asks_for_nothing_is_taken_and_stays_readable(cls, given):
    args = cls("runs", **given)
    assert args.output_dir == "runs"
    assert {name: getattr(args, name) for name in given} == given
    remembered = set(given) - {"neftune_noise_alpha"}  # which is a field of SFTConfig
    assert not remembered & set(args.to_dict())


@pytest.mark.parametrize(("cls", "given", "words"), TOLD)
def test_what_has_no_effect_is_told_once(cls, given, words):
    with pytest.warns(TopworkWarning, match=words) as told:
        cls(**given)
    assert len(told) == 1


@pytest.mark.parametrize(("cls", "given", "words"), REFUSED)
def test_what_would_do_something_else_is_refused_with_what_to_use(cls, given, words):
    with pytest.raises(ConfigError, match=words):
        cls(**given)
    with pytest.raises(ConfigError, match=words):
        cls.of(given)


def test_a_familiar_name_that_was_not_given_reads_as_its_default():
    args = DPOConfig()
    assert not args.push_to_hub
    assert args.local_rank == -1
    assert args.max_prompt_length is None
    with pytest.raises(AttributeError, match="nearest: 'logging_steps'"):
        args.logging_step  # noqa: B018


@pytest.mark.parametrize("cls", [TrainingArguments, *NAMED])
def test_every_familiar_name_takes_its_own_default(cls):
    for name, one in familiar_of(cls).items():
        assert getattr(cls(**{name: one.default}), name) == one.default


def test_rewards_are_scaled_as_yes_and_no_say():
    assert GRPOConfig(scale_rewards=True).scale_rewards == "group"
    assert RLOOConfig(scale_rewards=False).scale_rewards == "none"


def test_micro_batches_that_share_a_draw_are_counted_either_way():
    one = GRPOConfig(gradient_accumulation_steps=2, steps_per_generation=6)
    other = GRPOConfig(gradient_accumulation_steps=6, num_mini_batches=3)
    assert one == other


def test_arguments_tell_their_batch_and_their_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = TrainingArguments(per_device_train_batch_size=3, per_device_eval_batch_size=5)
    assert (args.train_batch_size, args.eval_batch_size, args.world_size) == (3, 5, 4)
    assert '"learning_rate": 5e-05' in args.to_json_string()
