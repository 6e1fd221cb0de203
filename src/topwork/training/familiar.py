"""Names that scripts for other libraries set, and what becomes of them here.

Some ask for nothing at the value that scripts give them, some for what is done anyway; the others
are refused with what to use instead. What such a name was given stays readable, for scripts look
at it again (`if args.push_to_hub: …`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from topwork.errors import ConfigError, TopworkWarning, nearest

T = TypeVar("T")


class Familiar(NamedTuple):
    """A name: what it reads as when it is not given, why it is no field, and whether a value is
    merely without effect (told by a warning with the reason, if there is one) or refused. `plain`:
    further values that ask for nothing."""

    default: Any
    reason: str
    harmless: bool = False
    plain: tuple[Any, ...] = ()

    def asks(self, value: Any) -> bool:
        """Whether `value` asks for something."""
        return value is not None and all(value != v for v in (self.default, *self.plain))


def idle(reason: str, **names: Any) -> dict[str, Familiar]:
    """Names with their defaults, all of them without effect for one reason."""
    return {name: Familiar(default, reason, harmless=True) for name, default in names.items()}


def refused(**names: tuple[Any, str]) -> dict[str, Familiar]:
    """Names with their defaults and what to use instead."""
    return {name: Familiar(default, reason) for name, (default, reason) in names.items()}


# Read by scripts alone.
FLAGS = {
    name: Familiar(False, "it is for scripts to read", True, (True,))
    for name in ("do_train", "do_eval", "do_predict", "overwrite_output_dir")
}
RUN = {
    **FLAGS,
    "resume_from_checkpoint": Familiar(None, "pass it to trainer.train()", True),
    **idle("batches hold no padding", group_by_length=False, length_column_name="length",
           train_sampling_strategy="random", padding_free=False),
    **idle("batches are made in the process that trains", dataloader_num_workers=0,
           dataloader_pin_memory=True, dataloader_persistent_workers=False,
           dataloader_prefetch_factor=None, dataloader_multiprocessing_context=None,
           dataloader_in_order=True),
    **idle("the last step of an epoch takes the rows that are left", dataloader_drop_last=False),
    **idle("columns that are not used never reach the model", remove_unused_columns=True),
    **idle("labels are recognised by their names", label_names=None),
    **idle("rows are tokenized in parallel by the tokenizer itself", dataset_num_proc=None),
    **idle("activations are computed again without reentrance", gradient_checkpointing_kwargs=None),
    **idle("gradient_checkpointing=True keeps less", activation_offloading=False),
    **idle("the hot functions are fused already", torch_compile=False, torch_compile_backend=None,
           torch_compile_mode=None),
    **idle("the loss never holds all logits", use_liger_kernel=False, liger_kernel_config=None),
    **idle("the run says before it starts which batch fits", auto_find_batch_size=False),
    **idle("memory is kept by torch", torch_empty_cache_steps=None),
    **idle("predictions leave the device batch by batch", eval_accumulation_steps=None),
    **idle("losses are always normalised over all devices", average_tokens_across_devices=True),
    **idle("a loss that is no number stops the run", logging_nan_inf_filter=True),
    **idle("torchrun says how processes work together", local_rank=-1, ddp_backend=None,
           ddp_find_unused_parameters=None, ddp_bucket_cap_mb=None, ddp_broadcast_buffers=None,
           ddp_static_graph=None, ddp_timeout=1800, fsdp_config=None, accelerator_config=None,
           parallelism_config=None, save_on_each_node=False, log_on_each_node=True),
    **idle("set disable_tqdm for a quiet run", log_level="passive", log_level_replica="warning"),
    **idle("the log is log.jsonl in output_dir, TensorBoard's is runs/ beside it", logging_dir=None,
           skip_memory_metrics=True, include_num_input_tokens_seen=False),
    **idle("a checkpoint holds what resuming needs", save_only_model=False,
           restore_callback_states_from_checkpoint=False, enable_jit_checkpoint=False),
    # Read by trainer.push_to_hub.
    **idle("", hub_model_id=None, hub_token=None, hub_private_repo=None, hub_strategy="every_save",
           hub_always_push=False, hub_revision=None),
    **idle("training keeps no cache", use_cache=False),
    **refused(
        fp16=(False, "there is no loss scaling here; use bf16=True"),
        fp16_full_eval=(False, "use bf16=True"),
        bf16_full_eval=(False, "bf16=True computes everything in bfloat16"),
        half_precision_backend=("auto", "use bf16=True"),
        deepspeed=(None, "use torchrun, which shards or replicates by itself"),
        push_to_hub=(False, "call trainer.push_to_hub() after the run"),
        tf32=(None, "set torch.backends.cuda.matmul.allow_tf32"),
        evaluation_strategy=(None, "it is called eval_strategy"),
        per_gpu_train_batch_size=(None, "it is called per_device_train_batch_size"),
        per_gpu_eval_batch_size=(None, "it is called per_device_eval_batch_size"),
        max_seq_length=(None, "it is called max_length"),
        no_cuda=(False, "it is called use_cpu"),
        save_safetensors=(True, "files are safetensors alone"),
        prediction_loss_only=(False, "without compute_metrics there is the loss alone"),
        include_inputs_for_metrics=(False, "compute_metrics gets predictions and labels"),
        batch_eval_metrics=(False, "compute_metrics gets all rows at once"),
        eval_do_concat_batches=(True, "compute_metrics gets all rows at once"),
        eval_use_gather_object=(False, "predictions are arrays"),
        eval_delay=(0, "evaluation follows eval_strategy from the first step on"),
        ignore_data_skip=(False, "a resumed run goes on where it was"),
        full_determinism=(False, "call torch.use_deterministic_algorithms(True)"),
        optim_args=(None, "pass an optimizer of your own: optimizers=(optimizer, None)"),
        optim_target_modules=(None, "pass an optimizer: optimizers=(optimizer, None)"),
        debug=("", "use torch.autograd.set_detect_anomaly"),
        label_smoothing_factor=(0.0, "smooth the labels in compute_loss_func"),
        neftune_noise_alpha=(None, "it is a field of SFTConfig"),
    ),
    "fsdp": Familiar(
        "", "use torchrun, which shards or replicates by itself", plain=(False, [], "no")
    ),
    "include_for_metrics": Familiar([], "compute_metrics gets predictions and labels", plain=((),)),
}  # fmt: skip


def familiar_of(cls: type) -> dict[str, Familiar]:
    """The familiar names of `cls` and its bases that are no fields of it."""
    found: dict[str, Familiar] = {}
    for part in reversed(cls.__mro__):
        found |= vars(part).get("familiar", {})
    known = {f.name for f in fields(cls)}
    return {name: one for name, one in found.items() if name not in known}


def taken(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of `given` are fields of `cls`, and what is merely remembered.

    ConfigError for a familiar name that asks for what is not there, with what to use instead, and
    for an unknown one with the nearest; one TopworkWarning names those that have no effect.
    """
    known, familiar = {f.name for f in fields(cls)}, familiar_of(cls)
    own, kept, told = {}, {}, []
    for name, value in given.items():
        if name in known:
            own[name] = value
            continue
        if name not in familiar:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")
        one = familiar[name]
        if one.asks(value) and not one.harmless:
            raise ConfigError(f"{name}={value!r} has no meaning here: {one.reason}")
        if one.asks(value) and one.reason:
            told.append(f"{name} ({one.reason})")
        kept[name] = value
    if told:
        warnings.warn(f"without effect here: {'; '.join(told)}", TopworkWarning, stacklevel=4)
    return own, kept


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """`cls` as a dataclass of keywords, whose constructor knows the familiar names too."""
    made = dataclass(kw_only=True)(cls)
    plain: Callable[..., None] = made.__init__

    @functools.wraps(plain)
    def init(self: Any, *place: Any, **given: Any) -> None:
        own, kept = taken(made, given)
        self.__dict__.update(kept)
        plain(self, *place, **own)

    made.__init__ = init  # type: ignore[method-assign]
    return made
