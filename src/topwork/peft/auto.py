"""An adapter together with the base model that its file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from topwork import models
from topwork.errors import CheckpointError
from topwork.peft.config import PeftConfig
from topwork.peft.model import PeftModel


class _AutoPeft:
    """What the classes share; each names its task's `Auto` class."""

    auto: ClassVar[Any]

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
        base = cls.auto.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **kwargs
        )
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **where
        )


class AutoPeftModelForCausalLM(_AutoPeft):
    auto = models.AutoModelForCausalLM


class AutoPeftModelForSequenceClassification(_AutoPeft):
    auto = models.AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(_AutoPeft):
    auto = models.AutoModelForTokenClassification


class AutoPeftModelForFeatureExtraction(_AutoPeft):
    auto = models.AutoModel


# The names that scripts import; one class serves every task and mixes methods.
PeftMixedModel = PeftModel
PeftModelForCausalLM = PeftModel
PeftModelForFeatureExtraction = PeftModel
PeftModelForQuestionAnswering = PeftModel
PeftModelForSeq2SeqLM = PeftModel
PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModel
