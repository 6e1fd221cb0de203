"""`pipeline(task, model=…)`: the right model, tokenizer and adapters for a task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from topwork.errors import ConfigError, nearest
from topwork.media import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor
from topwork.models.asked import told_apart
from topwork.models.auto import AUTO, AutoConfig, tasks_of
from topwork.models.families import NAMES
from topwork.pipelines.audio_classification import AudioClassificationPipeline
from topwork.pipelines.base import Pipeline
from topwork.pipelines.feature_extraction import FeatureExtractionPipeline
from topwork.pipelines.fill_mask import FillMaskPipeline
from topwork.pipelines.image_classification import ImageClassificationPipeline
from topwork.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from topwork.pipelines.image_text import (
    ImageTextToTextPipeline,
    ImageToTextPipeline,
    VisualQuestionAnsweringPipeline,
)
from topwork.pipelines.question_answering import QuestionAnsweringPipeline
from topwork.pipelines.speech_recognition import AutomaticSpeechRecognitionPipeline
from topwork.pipelines.text2text import (
    SummarizationPipeline,
    Text2TextGenerationPipeline,
    TranslationPipeline,
)
from topwork.pipelines.text_classification import TextClassificationPipeline
from topwork.pipelines.text_generation import TextGenerationPipeline
from topwork.pipelines.token_classification import TokenClassificationPipeline
from topwork.pipelines.zero_shot import ZeroShotClassificationPipeline
from topwork.pipelines.zero_shot_image import ZeroShotImageClassificationPipeline
from topwork.text import Tokenizer

# Task → its pipeline, and the model it takes when none is named.
TASKS: dict[str, tuple[type[Pipeline], str]] = {
    "audio-classification": (AudioClassificationPipeline, "superb/wav2vec2-base-superb-ks"),
    "automatic-speech-recognition": (AutomaticSpeechRecognitionPipeline, "openai/whisper-tiny"),
    "feature-extraction": (FeatureExtractionPipeline, "sentence-transformers/all-MiniLM-L6-v2"),
    "fill-mask": (FillMaskPipeline, "FacebookAI/roberta-base"),
    "image-classification": (ImageClassificationPipeline, "google/vit-base-patch16-224"),
    "image-feature-extraction": (ImageFeatureExtractionPipeline, "google/vit-base-patch16-224"),
    "image-text-to-text": (ImageTextToTextPipeline, "HuggingFaceTB/SmolVLM-256M-Instruct"),
    "image-to-text": (ImageToTextPipeline, "Salesforce/blip-image-captioning-base"),
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
    "visual-question-answering": (
        VisualQuestionAnsweringPipeline, "dandelin/vilt-b32-finetuned-vqa",
    ),
    "zero-shot-classification": (
        ZeroShotClassificationPipeline, "MoritzLaurer/deberta-v3-base-zeroshot-v1.1-all-33",
    ),
    "zero-shot-image-classification": (
        ZeroShotImageClassificationPipeline, "openai/clip-vit-base-patch32",
    ),
}  # fmt: skip
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification",
           "sentence-embeddings": "feature-extraction", "vqa": "visual-question-answering",
           "image-captioning": "image-to-text"}  # fmt: skip
# What a pipeline may need beside its model → how it is read from the model's files.
READERS: dict[str, Any] = {
    "tokenizer": Tokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "processor": AutoProcessor,
}


# Of other libraries, without effect: there is one kind of reader.
NO_OPTIONS = frozenset({"use_fast", "num_workers"})


def pipeline(
    task: str,
    model: Any = None,
    tokenizer: Any = None,
    *,
    image_processor: Any = None,
    feature_extractor: Any = None,
    processor: Any = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    device: str | torch.device | int | None = None,
    dtype: str | torch.dtype | None = "auto",
    batch_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    framework: str | None = None,
    **given: Any,
) -> Pipeline:
    """A pipeline for `task`, called with what it takes: texts, images, sounds.

    `model`: a folder, a Hub id or a model; without one the task's default. `tokenizer`,
    `image_processor`, `feature_extractor`, `processor`: those that the task needs, by default the
    model's; a `processor` may hold the others. `adapter`: a folder or Hub id, or several by name,
    to switch between. `device`: by default a GPU where there is one. `model_kwargs`: more of what
    `from_pretrained` takes. `given`: revision, token, cache_dir, local_files_only … as there, and
    options of the task, which every call has then. ConfigError for an unknown task and for a model
    that cannot do it.
    """
    if framework not in (None, "pt"):
        raise ConfigError(f"framework={framework!r}: there is torch, 'pt', alone")
    how, where, options = told_apart(given)
    dtype, placed = how.pop("dtype", dtype), how.pop("device", None)
    device = placed if device is None else device
    kind, languages = _resolve(task)
    maker, usual = TASKS[kind]
    source = usual if model is None else model
    named = isinstance(source, (str, Path))
    given = {
        "tokenizer": tokenizer,
        "image_processor": image_processor,
        "feature_extractor": feature_extractor,
        "processor": processor,
    }
    readers = {name: _reader(name, given, source if named else None, where) for name in maker.needs}
    device = _device(device)
    if named:
        made_for = _task_of(maker, source, where)
        load = {"dtype": dtype, "device": device, **where, **how, **(model_kwargs or {})}
        model = AUTO[made_for].from_pretrained(source, **load)
    else:
        _must_fit(kind, maker.model_task, source)
        model = source if device is None else source.to(device)
    made = maker(model, batch_size, **readers)
    made.task = task if isinstance(made, TranslationPipeline) and languages else kind
    options = {k: v for k, v in options.items() if k not in NO_OPTIONS}
    made.check(options)
    made.defaults = options
    adapters = {"default": adapter} if isinstance(adapter, (str, Path)) else adapter or {}
    for name, path in adapters.items():
        made.load_adapter(path, name)
    return made


def _task_of(maker: type[Pipeline], source: str | Path, where: Mapping[str, Any]) -> str:
    """What the model is loaded for: of several tasks the first that its family has."""
    if isinstance(maker.model_task, str):
        return maker.model_task
    kind = AutoConfig.from_pretrained(source, **where).model_type.replace("-", "_")
    tasks = tasks_of(kind) if kind in NAMES else {}
    return next((t for t in maker.model_task if t in tasks), maker.model_task[0])


def _reader(
    name: str, given: Mapping[str, Any], source: str | Path | None, where: Mapping[str, Any]
) -> Any:
    """The tokenizer or processor called `name`: the given one, or that of the model's files."""
    found = given[name]
    if found is None and not isinstance(given["processor"], (str, Path, type(None))):
        found = getattr(given["processor"], name, None)
    if found is not None and not isinstance(found, (str, Path)):
        return found
    place = found or source
    if place is None:
        raise ConfigError(f"a model object needs its {name}: pass {name}=…")
    return READERS[name].from_pretrained(place, **where)


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


def _must_fit(kind: str, tasks: str | tuple[str, ...], model: Any) -> None:
    """ConfigError when a model object is of another task."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(base, "task", None)
    several = (tasks,) if isinstance(tasks, str) else tasks
    wanted = next((task for task in several if task == found), several[0])
    if found is None:
        checks = {"causal-lm": "lm_head", "seq2seq-lm": "encoder_stack"}
        name = checks.get(wanted)
        fits = name is None or (hasattr(base, name) and (wanted != "causal-lm" or not hasattr(
            base, "encoder_stack")))  # fmt: skip
    else:
        both = found == "zero-shot-image-classification" and wanted == "base"
        fits = found == wanted or both
    if not fits:
        raise ConfigError(
            f"{kind} needs a model for {wanted}, got {type(base).__name__}"
            + (f" for {found}" if found else "")
            + f"; load it with {AUTO[wanted].__name__}"
        )
