"""`Tokenizer`: a `tokenizer.json` with the names, sides and defaults of `tokenizer_config.json`.

`tokenizer.json` is authoritative: what it says of splitting and merging is never rerouted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.text.asked import SPECIAL, kind_of, plain_template, told_apart, with_word_ends
from topwork.text.encoding import Encoding, Source, as_tensors, columns_of, inputs_of, rows_of

SIDES = ("left", "right")
UNLIMITED = int(1e30)
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "offset_mapping": (0, 0),
           "special_tokens_mask": 1, "assistant_masks": 0}  # fmt: skip
# Whose token_type_ids a call returns, by the name of the tokenizer's class.
TYPED = ("Bert", "Electra", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM", "Lxmert",
         "Deberta", "DebertaV2", "FNet")  # fmt: skip


class Tokenizer:
    """Encodes and decodes text. `config` holds what `tokenizer_config.json` says."""

    def __init__(self, core: Core, config: dict[str, Any] | None = None) -> None:
        self.core = core
        self.config = dict(config or {})
        self.padding_side = self._side("padding_side")
        self.truncation_side = self._side("truncation_side")
        limit = self.config.get("model_max_length")
        self.model_max_length = int(limit) if limit is not None else UNLIMITED
        self.name_or_path = ""
        core.no_padding()
        core.no_truncation()
        self.chat_template: str | None = plain_template(self.config.get("chat_template"))
        for name in SPECIAL:
            setattr(self, name, _content(self.config.get(name)))

    def _side(self, name: str) -> str:
        side = self.config.get(name, "right")
        if side not in SIDES:
            raise ConfigError(f"{name}={side!r}; one of {SIDES}")
        return side

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, gguf_file: str | None = None, **given: Any
    ) -> Tokenizer:
        """The tokenizer of a folder, a Hub id or a .gguf file.

        `gguf_file` names such a file in the folder `name_or_path`. `given`: where to look, as in
        `hub.resolve`, and what to have otherwise than the files: `padding_side`,
        `truncation_side`, `model_max_length`, `chat_template`, special tokens by role.
        """
        where, changes = told_apart(given)
        found = cls._of_files(name_or_path, gguf_file, where)
        found.change(**changes)
        found.name_or_path = str(name_or_path)
        return found

    @classmethod
    def _of_files(
        cls, name_or_path: str | Path, gguf_file: str | None, where: dict[str, Any]
    ) -> Tokenizer:
        if gguf_file is not None:
            name_or_path = Path(name_or_path) / gguf_file
        checkpoint = hub.resolve(name_or_path, want=("tokenizer",), **where)
        if checkpoint.format == "gguf":
            from topwork.text.gguf import tokenizer_of_gguf

            return cls(*tokenizer_of_gguf(checkpoint.weight_files[0]))
        config: dict[str, Any] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if file in checkpoint.files:
                config |= checkpoint.json(file)
        cls = kind_of(cls, config)
        if "chat_template.jinja" in checkpoint.files:
            path = checkpoint.files["chat_template.jinja"]
            config["chat_template"] = path.read_text(encoding="utf-8")
        if "tokenizer.json" not in checkpoint.files:
            from topwork.text.convert import convert

            also = hub.resolve(name_or_path, want=("tokenizer", "sentencepiece"), **where)
            core, config = convert(also.files, config)
            return cls(with_word_ends(core), config)
        path = checkpoint.files["tokenizer.json"]
        try:
            core = Core.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
        return cls(with_word_ends(core), config)

    def change(self, add_prefix_space: bool | None = None, **values: Any) -> None:
        """Set attributes; `add_prefix_space`: a text's first word is read as one amid the text."""
        for name, value in values.items():
            setattr(self, name, value)
        if add_prefix_space is None:
            return
        if not isinstance(self.core.pre_tokenizer, ByteLevel):
            raise ConfigError("add_prefix_space: this tokenizer does not split as GPT-2's does")
        self.core.pre_tokenizer.add_prefix_space = add_prefix_space

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json into `folder`; the files' paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / "tokenizer.json"))
        config = {**self.config, "padding_side": self.padding_side}
        config["truncation_side"] = self.truncation_side
        config |= {n: getattr(self, n) for n in SPECIAL if getattr(self, n) is not None}
        config["model_max_length"] = self.model_max_length
        config.pop("chat_template", None)
        if self.chat_template is not None:
            path = folder / "chat_template.jinja"
            path.write_text(self.chat_template, encoding="utf-8")
        config["model_input_names"] = self.model_input_names
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        written = ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json")
        return tuple(str(folder / name) for name in written if (folder / name).is_file())

    # -- vocabulary ------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, **where: Any) -> str:
        """Put its files into a repository of the Hub; `where` as in `hub.upload`."""
        return hub.upload(self.save_pretrained, repo_id, **where)

    def __len__(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_token_id") and name.removesuffix("_id") in SPECIAL:
            token = getattr(self, name.removesuffix("_id"))
            return None if token is None else self.core.token_to_id(token)
        raise AttributeError(f"Tokenizer has no {name!r}{nearest(name, dir(type(self)))}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.endswith("_token_id") and name.removesuffix("_id") in SPECIAL:
            token = None if value is None else self.core.id_to_token(value)
            if value is not None and token is None:
                raise ConfigError(
                    f"{name}={value}: there is no such token; they end at {len(self)}"
                )
            name, value = name.removesuffix("_id"), token
        super().__setattr__(name, _content(value) if name in SPECIAL else value)

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(i for i, t in self.core.get_added_tokens_decoder().items() if t.special)

    def get_vocab(self) -> dict[str, int]:
        return self.core.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.core.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    get_added_vocab = added_tokens_encoder.fget

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns unasked."""
        types = ["token_type_ids"] if self.has_token_types else []
        return ["input_ids", *types, "attention_mask"]

    @property
    def backend_tokenizer(self) -> Core:
        return self.core

    @property
    def is_fast(self) -> bool:
        return True

    def add_tokens(
        self, tokens: Any, special: bool = False, special_tokens: bool | None = None
    ) -> int:
        """Add whole tokens, one or several; returns how many were new. The embeddings are not
        resized."""
        special = special if special_tokens is None else special_tokens
        made = [
            t
            if isinstance(t, AddedToken)
            else AddedToken(t, special=special, normalized=not special)
            for t in ([tokens] if isinstance(tokens, (str, AddedToken)) else tokens)
        ]
        return self.core.add_special_tokens(made) if special else self.core.add_tokens(made)

    def add_special_tokens(self, tokens: Mapping[str, Any] | Sequence[Any]) -> int:
        """Add special tokens, by role (`{"pad_token": "<pad>"}`) or as a list; how many were new.

        Further ones without a role stand under `additional_special_tokens`.
        """
        named = tokens if isinstance(tokens, Mapping) else {"additional_special_tokens": tokens}
        extra = ("additional_special_tokens", "extra_special_tokens")
        for role in named:
            if role not in SPECIAL + extra:
                raise ConfigError(f"no special token is called {role!r}{nearest(role, SPECIAL)}")
        added = 0
        for role, given in named.items():
            if role in SPECIAL:
                setattr(self, role, given)
                given = [given]
            made = [
                t if isinstance(t, AddedToken) else AddedToken(_content(t), normalized=False)
                for t in given
            ]
            added += self.core.add_special_tokens(made)
        return added

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens a call adds to a text, or to a pair."""
        return self.core.num_special_tokens_to_add(pair)

    @property
    def all_special_tokens(self) -> list[str]:
        return [str(self.core.id_to_token(i)) for i in self.all_special_ids]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {n: getattr(self, n) for n in SPECIAL if getattr(self, n) is not None}

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.core.decoder.decode(list(tokens)) if self.core.decoder else " ".join(tokens)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if isinstance(tokens, str):
            found = self.core.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> Any:
        if isinstance(ids, int):
            return self.core.id_to_token(ids)
        left_out = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.core.id_to_token(int(i)) for i in ids if int(i) not in left_out]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        return self.core.encode(text, pair, add_special_tokens=add_special_tokens).tokens

    def get_special_tokens_mask(
        self, token_ids_0: Sequence[int], token_ids_1: Any = None,
        already_has_special_tokens: bool = True,
    ) -> list[int]:  # fmt: skip
        """1 for each id of a whole row that is a special token."""
        if token_ids_1 is not None or not already_has_special_tokens:
            raise ConfigError("give the ids of a whole row: already_has_special_tokens=True")
        special = set(self.all_special_ids)
        return [int(i in special) for i in token_ids_0]

    # -- text to ids -----------------------------------------------------------------------------

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """The ids of one text (or pair)."""
        return self(text, text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        text_pair: str | Sequence[Any] | None = None,
        *,
        text_target: str | Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool = True,
        return_length: bool = False,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> Encoding:
        """Encode a text, a pair, or a batch of either.

        `padding`: True or "longest", "max_length"; `truncation`: True or "longest_first",
        "only_first", "only_second". With `return_overflowing_tokens` the rest of a long text comes
        as further rows that share `stride` tokens, and `overflow_to_sample_mapping` says whose.
        With `is_split_into_words` a text is a list of words. `text_target` gives `labels`.
        """
        shape = {
            "add_special_tokens": add_special_tokens, "truncation": truncation,
            "max_length": max_length, "padding": padding, "pad_to_multiple_of": pad_to_multiple_of,
            "is_split_into_words": is_split_into_words, "return_tensors": return_tensors,
        }  # fmt: skip
        if text is None and text_target is not None:
            return self(text_target, text_pair, **shape)
        single, inputs = inputs_of(text, text_pair, is_split_into_words)
        self._truncate(truncation, max_length, stride)
        try:
            encoded = self.core.encode_batch(
                inputs, add_special_tokens=add_special_tokens, is_pretokenized=is_split_into_words
            )
        finally:
            self.core.no_truncation()
        rows, owner = rows_of(encoded, return_overflowing_tokens)
        types = self.has_token_types if return_token_type_ids is None else return_token_type_ids
        result = columns_of(
            rows, types, return_attention_mask, return_offsets_mapping, return_special_tokens_mask
        )
        self._pad(result, padding, max_length, pad_to_multiple_of)
        sources = Source.of(rows, result["input_ids"], self.padding_side == "left")
        if return_length:
            result["length"] = [len(ids) for ids in result["input_ids"]]
        if return_overflowing_tokens:
            result["overflow_to_sample_mapping"] = owner
        if text_target is not None:
            targets = [text_target] if single else text_target
            result["labels"] = self(targets, **{**shape, "return_tensors": None})["input_ids"]
        if single and not return_overflowing_tokens and return_tensors is None:
            result = {key: value[0] for key, value in result.items()}
        return as_tensors(result, return_tensors).of(sources)

    @property
    def has_token_types(self) -> bool:
        """Whether a call returns `token_type_ids` unasked: as the files say."""
        names = self.config.get("model_input_names")
        if names is not None:
            return "token_type_ids" in names
        kind = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        return kind.removesuffix("Tokenizer") in TYPED

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Bring encoded rows to one length: a list of them, or one mapping of lists.

        What is no token-wise entry (labels, say) stays as it is.
        """
        if not isinstance(encoded_inputs, Mapping):
            keys = encoded_inputs[0] if encoded_inputs else {}
            encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in keys}
        if "input_ids" not in encoded_inputs:
            raise ConfigError(f"there are no input_ids to pad, only {list(encoded_inputs)}")
        rows = {
            key: value.tolist() if hasattr(value, "tolist") else list(value)
            for key, value in encoded_inputs.items()
        }
        rows = {
            key: [v.tolist() if hasattr(v, "tolist") else v for v in value]
            for key, value in rows.items()
        }
        single = bool(rows["input_ids"]) and isinstance(rows["input_ids"][0], int)
        if single:
            rows = {key: [value] for key, value in rows.items()}
        if padding is not False and "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
        self._pad(rows, padding, max_length, pad_to_multiple_of)
        made = as_tensors(rows, return_tensors)
        return Encoding({key: value[0] for key, value in made.items()}) if single else made

    def _truncate(self, truncation: bool | str, max_length: int | None, stride: int) -> None:
        kinds = ("longest_first", "only_first", "only_second")
        if truncation is False or truncation == "do_not_truncate":
            return
        strategy = "longest_first" if truncation is True else truncation
        if strategy not in kinds:
            raise ConfigError(f"truncation={truncation!r}{nearest(str(truncation), kinds)}")
        limit = max_length if max_length is not None else self.model_max_length
        if limit < UNLIMITED:
            self.core.enable_truncation(
                limit, stride=stride, strategy=strategy, direction=self.truncation_side
            )

    def _pad(
        self,
        result: dict[str, Any],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
    ) -> None:
        if padding is False or padding == "do_not_pad":
            return
        kinds = ("longest", "max_length")
        kind = "longest" if padding is True else padding
        if kind not in kinds:
            raise ConfigError(f"padding={padding!r}{nearest(str(padding), kinds)}")
        filler = self.pad_token_id
        if filler is None:
            raise ConfigError("padding needs a pad_token; set tokenizer.pad_token")
        lengths = [len(ids) for ids in result["input_ids"]]
        width = max(lengths, default=0)
        if kind == "max_length":
            limit = max_length if max_length is not None else self.model_max_length
            if limit >= UNLIMITED:
                raise ConfigError("padding='max_length' needs max_length")
            width = max(width, limit)
        if multiple:
            width = -(-width // multiple) * multiple
        fillers: dict[str, Any] = {**FILLERS, "input_ids": filler}
        for key in result.keys() & fillers.keys():
            extras = [[fillers[key]] * (width - len(row)) for row in result[key]]
            left = self.padding_side == "left"
            result[key][:] = [e + r if left else r + e for r, e in zip(result[key], extras)]

    # -- chats -----------------------------------------------------------------------------------

    def apply_chat_template(self, conversation: Sequence[Any], **options: Any) -> Any:
        """Messages (`role`, `content`) as the template writes them: ids, or text.

        `conversation` is one chat or a batch. `add_generation_prompt` ends with the header of the
        answer; `continue_final_message` ends inside the last message, to be gone on with. `tools`
        are functions or JSON schemas, `chat_template` another template. With `tokenize=False` the
        text comes; with `return_dict` an Encoding, with `return_assistant_tokens_mask` also
        `assistant_masks` (see `topwork.text.spans`). `padding`, `truncation`, `max_length` and
        `return_tensors` as in a call. Whatever else is given, the template can read.
        """
        from topwork.text.chat import apply_chat_template

        return apply_chat_template(self, conversation, **options)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that a chat is written by; ConfigError where there is none."""
        found = chat_template or self.chat_template
        if found is None:
            raise ConfigError("this tokenizer has no chat template; pass chat_template")
        return found

    # -- ids to text -----------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of one row of ids (list or tensor), or of each row of a batch.

        `clean_up_tokenization_spaces` takes blanks before punctuation away. By default it is as
        tokenizer_config.json says, but not for BPE, whose blanks belong to the text.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and not isinstance(ids[0], int):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        text = self.core.decode(ids, skip_special_tokens=skip_special_tokens)
        clean = clean_up_tokenization_spaces
        if clean is None:
            clean = self.config.get("clean_up_tokenization_spaces", False)
            clean = clean and not isinstance(self.core.model, BPE)
        return clean_up(text) if clean else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row."""
        return [
            self.decode(r, skip_special_tokens, clean_up_tokenization_spaces) for r in sequences
        ]


def clean_up(text: str) -> str:
    """`text` without the blanks that cutting English into words puts before its punctuation."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def _content(token: Any) -> str | None:
    if isinstance(token, AddedToken):
        return token.content
    return token.get("content") if isinstance(token, dict) else token
