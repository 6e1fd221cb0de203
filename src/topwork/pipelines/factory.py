"""`pipeline(task, model=…)`: the right model, tokenizer and adapters for a task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from topwork.errors import ConfigError, nearest
from topwork.models.auto import AUTO
from topwork.pipelines.base import Pipeline
from topwork.pipelines.feature_extraction import FeatureExtractionPipeline
from topwork.pipelines.fill_mask import FillMaskPipeline
from topwork.pipelines.question_answering import QuestionAnsweringPipeline
from topwork.pipelines.text2text import (
    SummarizationPipeline,
    Text2TextGenerationPipeline,
    TranslationPipeline,
)
from topwork.pipelines.text_classification import TextClassificationPipeline
from topwork.pipelines.text_generation import TextGenerationPipeline
from topwork.pipelines.token_classification import TokenClassificationPipeline
from topwork.pipelines.zero_shot import ZeroShotClassificationPipeline
from topwork.text import Tokenizer

# Task → its pipeline, and the model it takes when none is named.
TASKS: dict[str, tuple[type[Pipeline], str]] = {
    "feature-extraction": (FeatureExtractionPipeline, "sentence-transformers/all-MiniLM-L6-v2"),
    "fill-mask": (FillMaskPipeline, "FacebookAI/roberta-base"),
    "question-answering": (
        QuestionAnsweringPipeline, "distilbert/distilbert-base-cased-distilled-squad",
    ),
    "summarization": (SummarizationPipeline, "google-t5/t5-small"),
    "text2text-generation": (Text2TextGenerationPipeline, "google/flan-t5-small"),
    "text-classification": (
        TextClassificationPipeline, "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    ),
    "text-generation": (TextGenerationPipeline, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "token-classification": (TokenClassificationPipeline, "dslim/bert-base-NER"),
    "translation": (TranslationPipeline, "google-t5/t5-small"),
    "zero-shot-classification": (
        ZeroShotClassificationPipeline, "MoritzLaurer/deberta-v3-base-zeroshot-v1.1-all-33",
    ),
}  # fmt: skip
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification",
           "sentence-embeddings": "feature-extraction"}  # fmt: skip


def pipeline(
    task: str,
    model: Any = None,
    tokenizer: Any = None,
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    device: str | torch.device | int | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    **where: Any,
) -> Pipeline:
    """A pipeline for `task`, called with texts.

    `model` and `tokenizer`: a folder, a Hub id or the objects themselves; without a model the
    task's default, without a tokenizer the model's. `adapter`: a folder or Hub id, or several by
    name, to switch between. `device`: by default a GPU where there is one. `where`: revision,
    token, cache_dir, local_files_only … as for `from_pretrained`. ConfigError for an unknown task
    and for a model that cannot do it.
    """
    kind, languages = _resolve(task)
    maker, usual = TASKS[kind]
    source = usual if model is None else model
    named = isinstance(source, (str, Path))
    if tokenizer is None and not named:
        raise ConfigError("a model object needs its tokenizer: pass tokenizer=…")
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = Tokenizer.from_pretrained(tokenizer or source, **where)
    device = _device(device)
    if named:
        model = AUTO[maker.model_task].from_pretrained(source, dtype=dtype, device=device, **where)
    else:
        _must_fit(kind, maker.model_task, source)
        model = source if device is None else source.to(device)
    made = maker(model, tokenizer, batch_size)
    if isinstance(made, TranslationPipeline) and languages:
        made.task = task
    adapters = {"default": adapter} if isinstance(adapter, (str, Path)) else adapter or {}
    for name, path in adapters.items():
        made.load_adapter(path, name)
    return made


def _resolve(task: str) -> tuple[str, bool]:
    task = ALIASES.get(task, task)
    if re.fullmatch(r"translation_\w+_to_\w+", task):
        return "translation", True
    if task not in TASKS:
        known = [*TASKS, *ALIASES]
        raise ConfigError(
            f"there is no task {task!r}{nearest(task, known)}; there are {', '.join(known)}"
        )
    return task, False


def _device(device: str | torch.device | int | None) -> str | torch.device:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int):
        return "cpu" if device < 0 else f"cuda:{device}"
    return device


def _must_fit(kind: str, wanted: str, model: Any) -> None:
    """ConfigError when a model object is of another task."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(base, "task", None)
    if found is None:
        checks = {"causal-lm": "lm_head", "seq2seq-lm": "encoder_stack"}
        name = checks.get(wanted)
        fits = name is None or (hasattr(base, name) and (wanted != "causal-lm" or not hasattr(
            base, "encoder_stack")))  # fmt: skip
    else:
        fits = found == wanted
    if not fits:
        raise ConfigError(
            f"{kind} needs a model for {wanted}, got {type(base).__name__}"
            + (f" for {found}" if found else "")
            + f"; load it with {AUTO[wanted].__name__}"
        )
