"""Names of post-training's settings in other libraries that are no fields here (see
`topwork.training.familiar`), and what their trainers take besides."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from topwork.errors import ConfigError, nearest
from topwork.training import TrainingArguments
from topwork.training.familiar import Familiar, idle, refused

TEXTS = {
    **idle("rows are shuffled as `shuffle` says", shuffle_dataset=False),
    **idle("batches hold no padding", pad_token=None, pad_to_multiple_of=None, padding_value=None,
           label_pad_token_id=-100),
    **idle("rows with input_ids are taken as they are", dataset_kwargs=None),
    **idle("only trained tokens meet the head", use_logits_to_keep=False),
    **refused(
        truncation_mode=("keep_start", "rows keep their start; cut them before you pass them"),
        chat_template_path=(None, "pass the template itself: chat_template=…"),
        trust_remote_code=(False, "nothing executes that came from a file"),
    ),
}  # fmt: skip
ANSWERS = {
    **TEXTS,
    **refused(
        max_prompt_length=(None, "max_length bounds prompt and answer together"),
        max_completion_length=(None, "max_length bounds prompt and answer together"),
        max_target_length=(None, "max_length bounds prompt and answer together"),
        generate_during_eval=(False, "sample_answers says how many prompts are answered"),
        reference_free=(False, "CPOTrainer and ORPOTrainer take no reference"),
        rpo_alpha=(None, 'use loss_type=["sigmoid", "sft"] with loss_weights=[1.0, rpo_alpha]'),
        is_encoder_decoder=(None, "answers are gone on with by causal models alone"),
        model_adapter_name=(None, "the active adapter is trained"),
        ref_adapter_name=(None, 'the reference is the adapter "ref", if there is one'),
    ),
}  # fmt: skip
DRAWS = {
    **TEXTS,
    **idle("the rollout server is started by itself, with options of its own", vllm_mode="colocate",
           vllm_model_impl="auto", vllm_enable_sleep_mode=False, vllm_server_base_url=None,
           vllm_server_host="0.0.0.0", vllm_server_port=8000, vllm_server_timeout=240.0,
           vllm_group_port=51216, vllm_gpu_memory_utilization=0.3, vllm_max_model_length=None,
           vllm_tensor_parallel_size=1, ds3_gather_for_generation=True),
    **idle("answers are drawn by the engine of this library", cache_implementation=None,
           use_transformers_paged=False, use_transformers_continuous_batching=False,
           transformers_continuous_batching_config=None),
    **idle("completions.jsonl in output_dir keeps the first group of each step",
           num_completions_to_print=None, log_unique_prompts=False, log_multimodal=True),
    **refused(
        use_vllm=(False, "name the server: rollout_server='http://localhost:8000'"),
        vllm_structured_outputs_regex=(None, "judge the form by a reward function"),
        vllm_importance_sampling_correction=(True, "it is called importance_correction"),
        vllm_importance_sampling_mode=("sequence_mask", "it is called importance_correction"),
        vllm_importance_sampling_cap=(None, "it is called importance_correction_max"),
        vllm_importance_sampling_clip_max=(None, "it is called importance_correction_max"),
        vllm_importance_sampling_clip_min=(None, "it is called importance_correction_min"),
        generation_batch_size=(None, "set steps_per_generation, in micro-batches"),
        num_generations_eval=(None, "evaluation draws num_generations answers as well"),
        chat_template_kwargs=(None, "write what they say into chat_template"),
        generation_kwargs=(None, "set temperature, top_p, top_k, min_p and repetition_penalty"),
        sync_ref_model=(False, "the reference is the policy as it starts"),
        ref_model_mixup_alpha=(0.6, "the reference is the policy as it starts"),
        ref_model_sync_steps=(512, "the reference is the policy as it starts"),
        use_adaptive_entropy=(False, "entropy_coef stays as it is"),
        multi_objective_aggregation=("sum_then_normalize", "set normalise_rewards_first=True"),
        cast_lm_head_to_fp32=(False, "log-probabilities are computed in fp32"),
        reward_clip_range=(None, "clip in your reward function"),
        log_completions_hub_repo=(None, "completions.jsonl is in output_dir"),
    ),
}  # fmt: skip
C = TypeVar("C", bound=TrainingArguments)
# Of distillation on the student's own answers.
WRITES = {
    **idle("answers are drawn by the engine of this library", vllm_mode="colocate",
           vllm_model_impl="vllm", vllm_enable_sleep_mode=False, vllm_server_base_url=None,
           vllm_server_host="0.0.0.0", vllm_server_port=8001, vllm_server_timeout=240.0,
           vllm_group_port=51216, vllm_gpu_memory_utilization=0.3, vllm_max_model_length=None,
           vllm_tensor_parallel_size=1, vllm_sync_frequency=1, ds3_gather_for_generation=True,
           cache_implementation=None),
    **idle("sample_answers shows answers on the run's page", log_completions=False,
           log_completions_steps=100, num_completions_to_print=None, log_unique_prompts=False,
           wandb_log_unique_prompts=True),
    **refused(
        use_vllm=(False, "the student's answers are drawn in this process"),
        vllm_structured_outputs_regex=(None, "answers are drawn freely"),
        use_teacher_server=(False, "take ServerDistillationTrainer"),
        teacher_model_server_url=(None, "take ServerDistillationTrainer"),
        teacher_model_name_or_path=(None, "pass it as teacher_model"),
        teacher_model_revision=(None, "set teacher_model_init_kwargs"),
        max_completion_length=(None, "it is called max_new_tokens"),
        max_prompt_length=(None, "max_length bounds a row"),
        generation_batch_size=(None, "the answers of a step are drawn at once"),
        generation_kwargs=(None, "set temperature, top_p and top_k"),
        num_generations=(1, "repeat the rows"),
    ),
}  # fmt: skip
SCALES: dict[str | bool, str] = {True: "group", False: "none"}
"""What `scale_rewards` means where it is no name."""

# What trainers take elsewhere and what to do instead; at None they ask for nothing.
ELSEWHERE = {
    "data_collator": "rows become batches as they are; Trainer takes a collator",
    "compute_metrics": "evaluation tells the objective's own metrics; Trainer takes others",
    "preprocess_logits_for_metrics": "logits are never whole in memory; Trainer takes it",
    "compute_loss_func": "set loss_type; Trainer takes any loss",
    "optimizer_cls_and_kwargs": "pass optimizers=(optimizer, None)",
    "model_init": "pass the model",
    "rollout_func": "tools and environment_factory make answers of several turns",
    "tokenizer": "it is called processing_class",
    "max_seq_length": "set max_length in args",
    **dict.fromkeys(
        ("max_length", "packing", "dataset_text_field", "beta", "loss_type", "dataset_num_proc"),
        "set it in args",
    ),
}


def settled(
    args: TrainingArguments | None, config: type[C], optimizer: Any, given: Mapping[str, Any]
) -> tuple[C, Any]:
    """A trainer's settings, as a `config`, and its optimizer, or a pair of it and a scheduler.

    `given`: what was passed besides: `optimizers`, `quantization_config` (of a model that is loaded
    by name), and what has no meaning here. ConfigError says what to do instead.
    """
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(f"args is a {type(args).__name__}, not a {config.__name__}")
    found = config() if args is None else args
    if not isinstance(found, config):
        found = config.of(found.to_dict())
    for name, value in given.items():
        if name == "optimizers":
            optimizer = optimizer or (tuple(value) if any(value) else None)
        elif name == "quantization_config":
            if value is not None:
                found = copy.copy(found)
                found.model_init_kwargs = {**(found.model_init_kwargs or {}), name: value}
        elif name not in ELSEWHERE:
            known = ("optimizers", "quantization_config", *ELSEWHERE)
            raise ConfigError(f"the trainer has no argument {name!r}{nearest(name, known)}")
        elif value is not None:
            raise ConfigError(f"{name} has no meaning here: {ELSEWHERE[name]}")
    return found, optimizer


__all__ = ["ANSWERS", "DRAWS", "SCALES", "TEXTS", "WRITES", "Familiar", "settled"]
