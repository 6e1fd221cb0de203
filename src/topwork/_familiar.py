"""Names of other libraries by rule: `LlamaForCausalLM` is AutoModelForCausalLM.

A family is in the files here, not in a class; so what follows the family's name says which Auto
class is meant.
"""

from __future__ import annotations

import importlib
from typing import Any

# What follows a family's name → tasks; the first that the family has is meant.
TASKS = {
    "ForCausalLM": ("causal-lm",),
    "LMHeadModel": ("causal-lm",),
    "MTModel": ("seq2seq-lm",),
    "ForConditionalGeneration": ("seq2seq-lm", "speech-seq2seq", "image-text-to-text"),
    "ForSequenceClassification": ("sequence-classification", "audio-classification"),
    "ForTokenClassification": ("token-classification",),
    "ForMaskedLM": ("masked-lm",),
    "ForMultipleChoice": ("multiple-choice",),
    "ForQuestionAnswering": ("question-answering", "visual-question-answering"),
    "ForImageClassification": ("image-classification",),
    "ForAudioClassification": ("audio-classification",),
    "ForCTC": ("ctc",),
    "Model": ("base",),
}
# The same for what reads a model's inputs.
READERS = {
    "TokenizerFast": "AutoTokenizer",
    "Tokenizer": "AutoTokenizer",
    "ImageProcessorFast": "AutoImageProcessor",
    "ImageProcessor": "AutoImageProcessor",
    "FeatureExtractor": "AutoFeatureExtractor",
    "Processor": "AutoProcessor",
}
PLAIN = {
    "PreTrainedModel": ("topwork.models", "Model"),
    "PretrainedConfig": ("topwork.models", "Config"),
    "PreTrainedConfig": ("topwork.models", "Config"),
    "PreTrainedTokenizer": ("topwork.text", "Tokenizer"),
    "PreTrainedTokenizerBase": ("topwork.text", "Tokenizer"),
    "PreTrainedTokenizerFast": ("topwork.text", "Tokenizer"),
    "BatchEncoding": ("topwork.text.encoding", "Encoding"),
    "Pipeline": ("topwork.pipelines", "Pipeline"),
}
COMMAND = "`topwork train` reads a run from YAML and the command line"
OPTION = "generate has an option for it"
ROWS = "the trainers take rows of every format as they are"
# Names that mean nothing here, and what to do instead.
ABSENT = {
    **dict.fromkeys(("HfArgumentParser", "TrlParser", "ScriptArguments", "ModelConfig",
                     "get_kbit_device_map", "get_quantization_config"), COMMAND),
    **dict.fromkeys(("DynamicCache", "StaticCache"), "call model.new_cache()"),
    **dict.fromkeys(("PrinterCallback", "ProgressCallback", "RichProgressCallback"),
                    "a run shows where it stands by itself; disable_tqdm=True keeps it quiet"),
    "DefaultFlowCallback": "set logging_steps, eval_steps and save_steps",
    "LogCompletionsCallback": "sample_answers says how many prompts are answered",
    "WinRateCallback": "pass a callback with on_evaluate",
    "SyncRefModelCallback": "set sync_ref_model=True",
    **dict.fromkeys(("IntervalStrategy", "SchedulerType", "SaveStrategy"), "give its text"),
    **dict.fromkeys(("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
                     "MinPLogitsWarper", "TypicalLogitsWarper", "RepetitionPenaltyLogitsProcessor",
                     "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
                     "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
                     "EosTokenCriteria", "StopStringCriteria"), OPTION),
    "AutoModelForCausalLMWithValueHead": "PPOTrainer makes its value model itself",
    "create_reference_model": "leave ref_model out: it is the policy as it starts",
    **dict.fromkeys(("apply_chat_template", "maybe_apply_chat_template", "is_conversational",
                     "extract_prompt", "maybe_extract_prompt", "unpair_preference_dataset",
                     "maybe_unpair_preference_dataset", "pack_dataset", "truncate_dataset",
                     "DataCollatorForPreference"), ROWS),
    "setup_chat_format": "set chat_template",
    "DataCollatorForCompletionOnlyLM": "SFTTrainer trains the answers alone, wherever rows tell "
    "them apart",
    "DataCollatorForWholeWordMask": "DataCollatorForLanguageModeling hides tokens",
    "DefaultDataCollator": "pass default_data_collator, a function",
    "DataCollatorWithFlattening": "DataCollatorWithPacking puts texts one after the other",
    "logging": "use Python's logging",
    "is_torch_available": "torch is always there",
}  # fmt: skip


def find(name: str) -> Any:
    """What `name` means here.

    ImportError where something else is to be used, AttributeError where it means nothing.
    """
    if name in ABSENT:
        raise ImportError(f"topwork has no {name}: {ABSENT[name]}")
    if name in PLAIN:
        home, known = PLAIN[name]
        return getattr(importlib.import_module(home), known)
    for ending in (*TASKS, *READERS, "Config"):
        family = _family(name.removesuffix(ending)) if name.endswith(ending) else None
        if family is None:
            continue
        if ending in READERS:
            return getattr(importlib.import_module("topwork"), READERS[ending])
        auto = importlib.import_module("topwork.models.auto")
        if ending == "Config":
            return _config(name, family)
        tasks = auto.tasks_of(family)
        task = next((task for task in TASKS[ending] if task in tasks), None)
        if task is not None:
            return auto.AUTO[task]
    raise AttributeError(f"module 'topwork' has no attribute {name!r}")


def _family(given: str) -> str | None:
    """The family that is written so: GPTNeoX is gpt_neox."""
    names = importlib.import_module("topwork.models.families").NAMES
    return next((n for n in names if n.replace("_", "") == given.lower()), None)


def _config(name: str, family: str) -> type:
    """The class of configurations that are of this family unless they say otherwise."""
    base: Any = importlib.import_module("topwork.models").Config

    def init(self: Any, **values: Any) -> None:
        base.__init__(self, **{"model_type": family, **values})

    return type(name, (base,), {"__init__": init, "__doc__": f"Configurations of {family}."})
