"""An adapter together with the base model that its file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from topwork import models
from topwork.errors import CheckpointError, ConfigError
from topwork.peft.config import PeftConfig
from topwork.peft.layer import AdaptedLayer
from topwork.peft.model import PeftModel
from topwork.peft.saved import SavedModule


class AutoPeftModel:
    """Builds the base that the adapter's file names, for its task. The classes for one task refuse
    adapters of others."""

    auto: ClassVar[Any] = None
    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base that the adapter names, then the adapter (of `revision`).

        `kwargs` go to the base's `from_pretrained`. CheckpointError when no base is named.
        """
        where = {k: kwargs[k] for k in ("token", "cache_dir", "local_files_only") if k in kwargs}
        where["revision"] = revision
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        if not config.base_model_name_or_path:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: the adapter names no base model; load the base "
                "and use PeftModel.from_pretrained"
            )
        if cls.task and config.task_type not in (None, cls.task):
            raise ConfigError(
                f"{pretrained_model_name_or_path} is of task_type {str(config.task_type)!r}, "
                f"{cls.__name__} is for {cls.task!r}"
            )
        auto = cls.auto or _auto_of(config)
        base = auto.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **kwargs
        )
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **where
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    auto = models.AutoModelForCausalLM
    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    auto = models.AutoModelForSeq2SeqLM
    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    auto = models.AutoModelForSequenceClassification
    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    auto = models.AutoModelForTokenClassification
    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    auto = models.AutoModelForQuestionAnswering
    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    auto = models.AutoModel
    task = "FEATURE_EXTRACTION"


BY_TASK: dict[str | None, Any] = {kind.task: kind for kind in AutoPeftModel.__subclasses__()}


def _auto_of(config: PeftConfig) -> Any:
    """The `Auto` class for an adapter's task or, where it says none, for its base's class."""
    if config.task_type in BY_TASK:
        return BY_TASK[config.task_type].auto
    name = str((config.auto_mapping or {}).get("base_model_class", ""))
    base, found, kind = name.partition("For")
    if found:
        auto = getattr(models, f"AutoModelFor{kind}", None)
    else:
        auto = models.AutoModel if base.endswith("Model") else None
    if auto is None:
        raise ConfigError(
            f"the adapter says neither its task_type nor a known class of its base ({name!r}); "
            "take the class for its task, as AutoPeftModelForCausalLM"
        )
    return auto


# The names that scripts import; one class serves every task and mixes methods.
PeftMixedModel = PeftModel
PeftModelForCausalLM = PeftModel
PeftModelForFeatureExtraction = PeftModel
PeftModelForQuestionAnswering = PeftModel
PeftModelForSeq2SeqLM = PeftModel
PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModel

# What the layers with adapters are to scripts that look for them.
BaseTunerLayer = AdaptedLayer
LoraLayer = AdaptedLayer
ModulesToSaveWrapper = SavedModule
