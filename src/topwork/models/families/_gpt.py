"""What the GPT-shaped families read alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from topwork.models.base import Model
from topwork.models.config import Config, ConfigReader
from topwork.models.gpt import GPT_MODELS, GptSpec

Tasks = dict[str, Callable[[Config, ConfigReader], Model]]

# Options of GPT-2's summary head, which no model here has, and of the peer's own execution.
WITHOUT_EFFECT = (
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "gradient_checkpointing", "reorder_and_upcast_attn", "n_ctx",
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "classifier_dropout",
)  # fmt: skip


def models(spec: Callable[[ConfigReader], GptSpec], without: tuple[str, ...] = ()) -> Tasks:
    """The `MODELS` of a family whose configuration `spec` reads; `without` the tasks it has not."""

    def made(make: Callable[[Config, GptSpec], Model]) -> Callable[[Config, ConfigReader], Model]:
        def model(config: Config, read: ConfigReader) -> Model:
            read.ignore(*WITHOUT_EFFECT)
            return make(config, spec(read))

        return model

    return {task: made(make) for task, make in GPT_MODELS.items() if task not in without}


def either(read: ConfigReader, *keys: str) -> Any:
    """The value of the first of `keys` that the file has; the names of one option over time."""
    found = [read(key) for key in keys]
    return next((value for value in found if value is not None), None) or read.need(keys[0])
