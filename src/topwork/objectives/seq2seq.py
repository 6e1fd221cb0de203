"""`Seq2SeqTrainer`: evaluation by what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topwork.data.prepare import Sample
from topwork.errors import ConfigError
from topwork.objectives.labelled import Labelled, LabelledBatch, base
from topwork.objectives.supervised import PredictionOutput, Trainer
from topwork.training import Loss, TrainingArguments
from topwork.training.familiar import settings

# Inputs that belong to the answer.
ANSWERS = ("labels", "decoder_")


@settings
class Seq2SeqTrainingArguments(TrainingArguments):
    """A run whose evaluation may write answers."""

    predict_with_generate: bool = False
    """Predictions are generated tokens, padded with the pad token, not logits."""
    generation_max_length: int | None = None
    """Tokens of an answer, its beginning counted; None: as the model's files say."""
    generation_num_beams: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generation_max_length", "generation_num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


class Answered(Labelled):
    """Rows whose texts the model answers."""

    def prompt(self, sample: tuple[int, Any]) -> Sample:
        """What the encoder reads, without padding; empty where a row has no `input_ids`."""
        number, row = sample
        ids = np.asarray(row.get("input_ids", ()), np.int32).reshape(-1)
        keep = np.asarray(row.get("attention_mask", np.ones(len(ids)))).astype(bool).reshape(-1)
        ids = ids[keep]
        return Sample(number, ids, np.zeros(len(ids), np.bool_))


class Seq2SeqTrainer(Trainer):
    """The trainer whose `compute_metrics` may get what the model writes (`predict_with_generate`).

    `evaluate` and `predict` take options of `generate`, such as max_length and num_beams.
    """

    options: dict[str, Any]

    def labelled(self, args: TrainingArguments) -> type[Labelled]:
        return Answered if getattr(args, "predict_with_generate", False) else Labelled

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] = (),
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        self.options = self.usual_options | gen_kwargs
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(  # type: ignore[override]
        self,
        test_dataset: Any,
        ignore_keys: Sequence[str] = (),
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        self.options = self.usual_options | gen_kwargs
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @property
    def writes(self) -> bool:
        return getattr(self.args, "predict_with_generate", False)

    @property
    def usual_options(self) -> dict[str, Any]:
        """What the run's arguments say of generation."""
        given = {
            "max_length": getattr(self.args, "generation_max_length", None),
            "num_beams": getattr(self.args, "generation_num_beams", None),
        }
        return {k: v for k, v in given.items() if v is not None}

    @property
    def filler(self) -> float:
        if not self.writes:
            return super().filler
        found = getattr(self.processing_class, "pad_token_id", None)
        config = base(self.model).config
        found = config.get("pad_token_id") if found is None else found  # type: ignore[operator]
        if found is None:
            raise ConfigError("predict_with_generate needs a pad_token_id to fill up answers")
        return found

    def judge(self, batch: LabelledBatch) -> tuple[Loss | None, Any]:
        if not self.writes:
            return super().judge(batch)
        model: Any = self.model
        asked = {k: v for k, v in batch.inputs.items() if not k.startswith(ANSWERS)}
        if "lengths" in asked:
            raise ConfigError("predict_with_generate needs padded rows: data_collator=…")
        answers = model.generate(**asked, **self.options)
        loss = self.objective.loss(model, batch) if batch.labels else None
        return loss, answers
