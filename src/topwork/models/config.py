"""Model configurations: the file's keys as attributes, and a reader that leaves none unread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topwork import hub
from topwork.errors import ConfigError, nearest
from topwork.weights import GgufFile

# Keys that say nothing about what the network computes.
INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "rope_interleaved",
        "quantization_config",  # read where the weights are loaded
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
    }
)
# What absent keys mean.
USUAL: dict[str, Any] = {
    "architectures": None, "bos_token_id": None, "decoder_start_token_id": None,
    "eos_token_id": None, "is_decoder": False, "is_encoder_decoder": False, "pad_token_id": None,
    "problem_type": None, "sep_token_id": None, "tokenizer_class": None, "use_cache": True,
    "output_attentions": False, "output_hidden_states": False, "return_dict": True,
    "use_return_dict": True, "_name_or_path": "", "name_or_path": "",
}  # fmt: skip
# Present, and without effect, only at these values.
INERT_AT: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
}


class Remembered(dict[str, Any]):
    """What `generation_config.json` says, also by attribute; None for what it does not say."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Config:
    """The keys of a `config.json` as attributes.

    What a file leaves out as usual reads as that (`usual`); other absent keys raise AttributeError
    by name.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self.__dict__.setdefault("model_type", "")
        if isinstance(self.__dict__.get("id2label"), Mapping):
            self.__dict__["id2label"] = {int(i): label for i, label in values["id2label"].items()}

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **where: Any) -> Config:
        """Read the configuration of a folder, a Hub id or a .gguf file."""
        return cls.of(hub.resolve(name_or_path, want=("config",), **where))

    @classmethod
    def of(cls, checkpoint: hub.Checkpoint) -> Config:
        """The configuration of a checkpoint that was found already."""
        if checkpoint.format == "gguf":
            return cls(**GgufFile(checkpoint.weight_files[0]).config())
        return cls(**checkpoint.json("config.json"))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__.get(key, default)

    def part(self, key: str) -> Config:
        """The configuration nested at `key`, as of a model of its own (`vision_config`)."""
        values = self.get(key)
        if not isinstance(values, Mapping):
            nested = [k for k, v in self.__dict__.items() if isinstance(v, Mapping)]
            raise ConfigError(f"there is no configuration nested at {key!r}{nearest(key, nested)}")
        usual = f"{self.model_type}_{key.removesuffix('_config')}_model"
        return Config(**{"model_type": usual, **values})

    def with_labels(
        self,
        num_labels: int | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, Any] | None = None,
        problem_type: str | None = None,
    ) -> Config:
        """A copy for a classifier of these labels; ConfigError when they contradict each other."""
        values = self.to_dict()
        if id2label is None and label2id is not None:
            id2label = {index: label for label, index in label2id.items()}
        if id2label is None and num_labels is not None:
            id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
        if id2label is not None:
            names = {int(i): label for i, label in id2label.items()}
            if sorted(names) != list(range(len(names))):
                raise ConfigError(f"id2label={names} must number its labels 0, 1, 2 …")
            if num_labels not in (None, len(names)):
                raise ConfigError(f"num_labels={num_labels}, but id2label names {len(names)}")
            ids = {label: i for i, label in names.items()}
            if label2id is not None and {k: int(v) for k, v in label2id.items()} != ids:
                raise ConfigError(f"label2id={dict(label2id)} contradicts id2label={names}")
            values |= {"id2label": names, "label2id": ids}
            values.pop("num_labels", None)
        if problem_type is not None:
            values["problem_type"] = problem_type
        return Config(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")

    @property
    def usual(self) -> dict[str, Any]:
        """What absent keys of a file mean, of those that are not the network's."""
        named = self.get("id2label") or {i: f"LABEL_{i}" for i in range(self.get("num_labels", 2))}
        dtype = self.get("dtype") or self.get("torch_dtype")
        return {
            **USUAL, "dtype": dtype, "torch_dtype": dtype, "num_labels": len(named),
            "id2label": named, "label2id": {label: i for i, label in named.items()},
        }  # fmt: skip

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def get_text_config(self, **_: Any) -> Config:
        """The configuration of the language model within: its own, or that of its `text_config`."""
        return self.part("text_config") if self.get("text_config") else self

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and name in (usual := self.usual):
            return usual[name]
        raise AttributeError(f"the configuration has no {name!r}{nearest(name, self.__dict__)}")

    def __repr__(self) -> str:
        return f"Config({json.dumps(self.to_dict(), sort_keys=True, default=str)})"


class ConfigReader:
    """Reads a configuration and remembers which keys were read.

    An option that nobody reads loads cleanly and computes something else; so `finish` refuses
    every key that was neither read nor is known to be without effect.
    """

    def __init__(self, config: Config) -> None:
        self._values = config.to_dict()
        self._read: set[str] = set()
        self._parts: list[ConfigReader] = []
        self.model_type = config.model_type

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` when it is absent or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the file names `key`, be it null."""
        self._read.add(key)
        return key in self._values

    def get(self, key: str, default: Any) -> Any:
        """The value of `key`; `default` only when it is absent: null is a value here."""
        return self(key) if self.has(key) else default

    def need(self, key: str) -> Any:
        """The value of `key`, which must be there."""
        value = self(key)
        if value is None:
            raise ConfigError(
                f"config.json of model_type {self.model_type!r} lacks {key!r}"
                f"{nearest(key, self._values)}"
            )
        return value

    def part(
        self, *keys: str, model_type: str = "", usual: Mapping[str, Any] | None = None
    ) -> ConfigReader:
        """A reader of the configuration nested at `keys` (a later one wins; empty when absent).

        `finish` looks at it too. `model_type`: what it is when it does not say; `usual`: what it
        leaves out.
        """
        values = {"model_type": model_type or self.model_type, **(usual or {})}
        for key in keys:
            values |= self(key, {})
        made = ConfigReader(Config(**values))
        self._parts.append(made)
        return made

    @property
    def config(self) -> Config:
        """What is being read."""
        return Config(**self._values)

    def rate(self, key: str, default: float = 0.0) -> float:
        """The rate of a dropout, from 0 to below 1."""
        value = self(key, default)
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ConfigError(
                f"{key}={value!r} of model_type {self.model_type!r} is no rate (0 … 1)"
            )
        return float(value)

    def only(self, key: str, *values: Any) -> None:
        """Read `key`, which must be absent, null or one of `values`."""
        value = self(key)
        if value is not None and value not in values:
            raise ConfigError(
                f"{key}={value!r} is not supported for model_type {self.model_type!r}, only "
                + ", ".join(repr(v) for v in values)
            )

    def ignore(self, *keys: str) -> None:
        """Count `keys` as read: in this family they have no effect here."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise ConfigError when a key was not read and could matter."""
        for nested in self._parts:
            nested.finish()
        unread = sorted(
            key
            for key, value in self._values.items()
            if key not in self._read
            and key not in INERT
            and not (key in INERT_AT and value in INERT_AT[key])
        )
        if unread:
            raise ConfigError(
                f"config.json of model_type {self.model_type!r} has options that this model does "
                f"not act on: {', '.join(f'{k}={self._values[k]!r}' for k in unread)}; loading it "
                "would compute something else than meant"
            )
