"""From a configuration to its model: the Auto classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from topwork import hub, quant, weights
from topwork.errors import ConfigError, TopworkWarning, nearest
from topwork.models import families
from topwork.models.asked import changed, told_apart
from topwork.models.base import Model
from topwork.models.config import Config, ConfigReader, Remembered
from topwork.models.decoder import DECODER_MODELS
from topwork.weights.coded import check as check_coding

# What names the labels of a classifier.
LABELS = ("num_labels", "id2label", "label2id", "problem_type")


class Unfilled(TorchFunctionMode):
    """Within it no parameter is given its first values: those of the meta device have none, and
    torch would import its compiler (80 MB) to find that out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


class AutoConfig:
    """`AutoConfig.from_pretrained(name)` gives a `Config`; `given` may hold other values for its
    keys."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **given: Any) -> Config:
        _, where, changes = told_apart(given)
        labels = {k: changes.pop(k) for k in LABELS if k in changes}
        found = changed(Config.from_pretrained(name_or_path, **where), changes)
        return found.with_labels(**labels) if labels else found

    @staticmethod
    def for_model(model_type: str, **values: Any) -> Config:
        """A configuration of this family; what is not given is as the family has it."""
        return Config(model_type=model_type, **values)


def build(config: Config, task: str) -> Any:
    """The model that `config` describes, for `task`, with empty weights.

    ConfigError for an unknown model_type, a task that the family has no head for, or an option
    that it does not act on.
    """
    kind = config.model_type.replace("-", "_")
    if kind not in families.NAMES:
        raise ConfigError(
            f"model_type {config.model_type!r} is not known"
            f"{nearest(kind, families.NAMES, count=3)}; known: {', '.join(families.NAMES)}"
            + _fitting(config)
        )
    tasks = tasks_of(kind)
    if task not in tasks:
        raise ConfigError(f"model_type {kind!r} has no model for {task}; it has {', '.join(tasks)}")
    read = ConfigReader(config)
    model = tasks[task](config, read)
    read.finish()
    return model


def _fitting(config: Config) -> str:
    """What to try with an unknown model_type whose options one of our decoders reads in full."""
    fits = []
    for name in families.NAMES:
        spec = getattr(families.family(name), "spec", None)
        try:
            read = ConfigReader(config)
            if spec is not None:
                spec(read)
                read.finish()
                fits.append(name)
        except Exception:  # a strange configuration may fail anywhere; this is only a hint
            continue
    if not fits:
        return ""
    fits.sort(key=lambda name: name != "llama")
    return (
        f". Every option of this configuration has a meaning for {', '.join(fits[:4])}: if the "
        f"architecture is the same, load it with model_type {fits[0]!r} in its configuration, and "
        "compare its outputs with a reference"
    )


def tasks_of(model_type: str) -> dict[str, Callable[[Config, ConfigReader], Any]]:
    """Task name → what makes the family's model for it."""
    home = families.family(model_type)
    if hasattr(home, "spec"):
        return {
            task: lambda config, read, make=make: make(config, home.spec(read))
            for task, make in DECODER_MODELS.items()
        }
    return home.MODELS


class _Auto:
    """What the Auto classes share; each names its task."""

    task: ClassVar[str]

    def __new__(cls, config: Config, **given: Any) -> Any:
        return cls.from_config(config, **given)

    @classmethod
    def from_config(
        cls, config: Config, dtype: str | torch.dtype | None = None, **given: Any
    ) -> Any:
        """A model with fresh weights: normal with `initializer_range`, norms one, biases zero."""
        how, _, changes = told_apart(given)
        config, dtype = changed(config, changes), as_dtype(how.get("dtype", dtype))
        model = build(config, cls.task)
        initialise(model, [name for name, _ in model.named_parameters()])
        for module in model.modules():
            if hasattr(module, "start_fresh"):  # a part with its own way to begin
                module.start_fresh()
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device = "cpu",
        config: Config | None = None,
        num_labels: int | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, Any] | None = None,
        problem_type: str | None = None,
        quantization_config: Any = None,
        ignore_mismatched_sizes: bool = False,
        **given: Any,
    ) -> Any:
        """Load a folder, a Hub id or a .gguf file (dequantised to fp32 unless `dtype` says else).

        `dtype` "auto" keeps the file's, else a torch dtype or its name. The labels of a classifier
        may be given in place of the file's; a head that the file lacks starts fresh, with a
        TopworkWarning that names it. `quantization_config` (a `BitsAndBytesConfig`, or a dictionary
        of its fields): each linear is quantised as it is read. A file that is quantised already
        says so itself: 4 bits of bitsandbytes stay, other codes become plain weights.
        `ignore_mismatched_sizes`: a head of another size starts fresh as well. `given`: revision,
        token, cache_dir, local_files_only, force_download, subfolder, allow_bin as in
        `hub.resolve`; `device_map`, if it names one device; other values for keys of the
        configuration.
        """
        how, where, changes = told_apart(given)
        dtype, device = how.get("dtype", dtype), how.get("device", device)
        quantization_config = how.get("quantization_config", quantization_config)
        checkpoint = hub.resolve(name_or_path, want=("config", "weights"), **where)
        _must_be_a_model(checkpoint)
        config = changed(config or Config.of(checkpoint), changes)
        config = config.with_labels(num_labels, id2label, label2id, problem_type)
        config.__dict__["_name_or_path"] = str(
            name_or_path
        )  # an adapter's file says what its base is
        with torch.device("meta"), Unfilled():
            model = build(config, cls.task)
        quantised = _quantised(model, config, quantization_config, as_dtype(dtype))
        report = weights.load_weights(
            model,
            checkpoint,
            table=model.table,
            dtype=as_dtype(dtype),
            device=device,
            tied=model.tied,
            coding=_coding(config),
            lenient=ignore_mismatched_sizes,
        )
        model.quantization_config = quantised
        for alias in report.untied:
            model.tied.pop(alias)
        model.tie_weights()
        if report.fresh:
            _start_fresh(model, report, device, checkpoint.name, ignore_mismatched_sizes)
        if "generation_config.json" in checkpoint.files:
            model.generation_config = Remembered(checkpoint.json("generation_config.json"))
        return model.eval()


class AutoModel(_Auto):
    """Builds the bare model, without a head, that a checkpoint or a configuration names."""

    task = "base"


class AutoModelForCausalLM(_Auto):
    """Builds the causal model that a checkpoint or a configuration names."""

    task = "causal-lm"


class AutoModelForSequenceClassification(_Auto):
    """Builds the model that gives each text a class or a value."""

    task = "sequence-classification"


class AutoModelForTokenClassification(_Auto):
    """Builds the model that gives each token a class."""

    task = "token-classification"


class AutoModelForMaskedLM(_Auto):
    """Builds the model that fills in masked words."""

    task = "masked-lm"


class AutoModelForQuestionAnswering(_Auto):
    """Builds the model that finds where in a text a question's answer starts and ends."""

    task = "question-answering"


class AutoModelForMultipleChoice(_Auto):
    """Builds the model that chooses among several continuations."""

    task = "multiple-choice"


class AutoModelForSeq2SeqLM(_Auto):
    """Builds the encoder-decoder that turns one text into another."""

    task = "seq2seq-lm"


class AutoModelForSpeechSeq2Seq(_Auto):
    """Builds the encoder-decoder that writes down what is said."""

    task = "speech-seq2seq"


class AutoModelForCTC(_Auto):
    """Builds the model that says of each frame of a sound which letter it is, if any."""

    task = "ctc"


class AutoModelForAudioClassification(_Auto):
    """Builds the model that gives each sound a class."""

    task = "audio-classification"


class AutoModelForImageClassification(_Auto):
    """Builds the model that gives each image a class."""

    task = "image-classification"


class AutoModelForZeroShotImageClassification(_Auto):
    """Builds the model that tells how well each text fits each image."""

    task = "zero-shot-image-classification"


class AutoModelForImageTextToText(_Auto):
    """Builds the model that reads texts with images in them and goes on with them."""

    task = "image-text-to-text"


class AutoModelForVisualQuestionAnswering(_Auto):
    """Builds the model that answers questions about an image."""

    task = "visual-question-answering"


AutoModelForVision2Seq = AutoModelForImageTextToText

# Task name → its Auto class.
AUTO: dict[str, Any] = {made.task: made for made in _Auto.__subclasses__()}


def _must_be_a_model(checkpoint: hub.Checkpoint) -> None:
    """ConfigError for the files of an adapter alone."""
    if "adapter_config.json" in checkpoint.files and "config.json" not in checkpoint.files:
        base = checkpoint.json("adapter_config.json").get("base_model_name_or_path")
        raise ConfigError(
            f"{checkpoint.name} holds an adapter of {base}: load it with AutoPeftModelForCausalLM "
            "(…ForSequenceClassification …).from_pretrained, or its base and then "
            "PeftModel.from_pretrained"
        )


def initialise(model: Any, names: Iterable[str]) -> None:
    """Fresh values: matrices normal with `initializer_range`, biases zero, norms as they are."""
    std = model.config.get("initializer_range", 0.02)
    for name in names:
        parameter = model.get_parameter(name)
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)


def _quantised(
    model: Model, config: Config, given: Any, dtype: torch.dtype | None
) -> quant.BitsAndBytesConfig | None:
    """Make room in `model` for quantised weights; what they are, if there are any."""
    own = _coding(config)
    stored = config.get("quantization_config") if own is None else None
    if stored is not None and given is not None:
        raise ConfigError("the checkpoint is quantised already; leave quantization_config out")
    if stored is None and given is None:
        return None
    chosen = quant.BitsAndBytesConfig.of(stored or given)
    dtype = dtype or as_dtype(config.get("dtype") or config.get("torch_dtype")) or torch.float16
    quant.prepare(model, model.trunk, chosen, stored is not None, dtype)
    return chosen


def _coding(config: Config) -> dict[str, Any] | None:
    """How the checkpoint codes weights that are decoded as they are read, if it does."""
    own = config.get("quantization_config")
    if own is None or own.get("quant_method", "bitsandbytes") == "bitsandbytes":
        return None
    check_coding(own)
    return own


def _start_fresh(
    model: Model, report: weights.LoadReport, device: str | torch.device, name: str, lenient: bool
) -> None:
    """Fresh values for what the file lacks, with a TopworkWarning that names it."""
    dtype = model.get_parameter(report.loaded[0]).dtype if report.loaded else None
    for path in report.fresh:
        home, _, leaf = path.rpartition(".")
        shape = model.get_parameter(path).shape
        value = torch.ones(shape, dtype=dtype, device=device)
        setattr(model.get_submodule(home), leaf, torch.nn.Parameter(value))
    initialise(model, report.fresh)
    warnings.warn(
        f"{name} has no {', '.join(report.fresh)}{' of this size' if lenient else ''}: they start "
        "with fresh values and must be trained before they mean anything",
        TopworkWarning,
        stacklevel=3,
    )


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from itself or its name; None for "auto"."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        names = ("auto", "float32", "bfloat16", "float16")
        raise ConfigError(f"dtype={dtype!r} is not known{nearest(str(dtype), names)}")
    return found
