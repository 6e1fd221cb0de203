"""`Tokenizer`: a `tokenizer.json` with the names, sides and defaults of `tokenizer_config.json`.

`tokenizer.json` is authoritative: what it says of splitting and merging is never rerouted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.text.template import TemplateError, render

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
           "mask_token")  # fmt: skip
SIDES = ("left", "right")
UNLIMITED = int(1e30)


class Encoding(dict[str, Any]):
    """The result of a call: `input_ids`, `attention_mask` and what else was asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding has no {name!r}{nearest(name, self)}") from None

    def to(self, device: Any) -> Encoding:
        """A copy with its tensors on `device`."""
        return Encoding({k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()})


class Tokenizer:
    """Encodes and decodes text. `config` holds what `tokenizer_config.json` says."""

    def __init__(self, core: Core, config: dict[str, Any] | None = None) -> None:
        self.core = core
        self.config = dict(config or {})
        self.padding_side = self._side("padding_side")
        self.truncation_side = self._side("truncation_side")
        limit = self.config.get("model_max_length")
        self.model_max_length = int(limit) if limit is not None else UNLIMITED
        core.no_padding()
        core.no_truncation()
        self.chat_template: str | None = _template(self.config.get("chat_template"))
        for name in SPECIAL:
            setattr(self, name, _content(self.config.get(name)))

    def _side(self, name: str) -> str:
        side = self.config.get(name, "right")
        if side not in SIDES:
            raise ConfigError(f"{name}={side!r}; one of {SIDES}")
        return side

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, gguf_file: str | None = None, **where: Any
    ) -> Tokenizer:
        """The tokenizer of a folder, a Hub id or a .gguf file.

        `gguf_file` names such a file in the folder `name_or_path`.
        """
        if gguf_file is not None:
            name_or_path = Path(name_or_path) / gguf_file
        checkpoint = hub.resolve(name_or_path, want=("tokenizer",), **where)
        if checkpoint.format == "gguf":
            from topwork.text.gguf import tokenizer_of_gguf

            return cls(*tokenizer_of_gguf(checkpoint.weight_files[0]))
        if "tokenizer.json" not in checkpoint.files:
            there = ", ".join(checkpoint.files) or "no tokenizer file"
            raise CheckpointError(f"{name_or_path}: there is no tokenizer.json, only {there}")
        path = checkpoint.files["tokenizer.json"]
        try:
            core = Core.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
        config: dict[str, Any] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if file in checkpoint.files:
                config |= checkpoint.json(file)
        if "chat_template.jinja" in checkpoint.files:
            path = checkpoint.files["chat_template.jinja"]
            config["chat_template"] = path.read_text(encoding="utf-8")
        return cls(core, config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`."""
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
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    # -- vocabulary ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_token_id") and name.removesuffix("_id") in SPECIAL:
            token = getattr(self, name.removesuffix("_id"))
            return None if token is None else self.core.token_to_id(token)
        raise AttributeError(f"Tokenizer has no {name!r}{nearest(name, dir(type(self)))}")

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(i for i, t in self.core.get_added_tokens_decoder().items() if t.special)

    def get_vocab(self) -> dict[str, int]:
        return self.core.get_vocab(with_added_tokens=True)

    def add_tokens(self, tokens: Sequence[str], special: bool = False) -> int:
        """Add whole tokens; returns how many were new. The embeddings are not resized."""
        made = [AddedToken(t, special=special, normalized=not special) for t in tokens]
        return self.core.add_special_tokens(made) if special else self.core.add_tokens(made)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if isinstance(tokens, str):
            found = self.core.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.core.id_to_token(ids)
        return [self.core.id_to_token(int(i)) for i in ids]

    def tokenize(self, text: str) -> list[str]:
        return self.core.encode(text, add_special_tokens=False).tokens

    # -- text to ids -----------------------------------------------------------------------------

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """The ids of one text (or pair)."""
        return self(text, text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int = 0,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> Encoding:
        """Encode a text, a pair, or a batch of either.

        `padding`: True or "longest", "max_length"; `truncation`: True or "longest_first",
        "only_first", "only_second". With `return_overflowing_tokens` the rest of a long text comes
        as further rows that share `stride` tokens, and `overflow_to_sample_mapping` says whose.
        """
        single = isinstance(text, str)
        if text_pair is not None and single is not isinstance(text_pair, str):
            raise ConfigError("text and text_pair must both be one text, or both a batch")
        firsts = [text] if isinstance(text, str) else list(text)
        inputs: list[Any] = firsts
        if text_pair is not None:
            seconds = [text_pair] if isinstance(text_pair, str) else list(text_pair)
            if len(seconds) != len(firsts):
                raise ConfigError(f"{len(firsts)} texts, but {len(seconds)} text pairs")
            inputs = list(zip(firsts, seconds))
        self._truncate(truncation, max_length, stride)
        try:
            encoded = self.core.encode_batch(inputs, add_special_tokens=add_special_tokens)
        finally:
            self.core.no_truncation()
        rows, owner = [], []
        for index, one in enumerate(encoded):
            pieces = [one, *one.overflowing] if return_overflowing_tokens else [one]
            rows += pieces
            owner += [index] * len(pieces)
        result = {
            "input_ids": [r.ids for r in rows],
            "attention_mask": [r.attention_mask for r in rows],
        }
        if return_offsets_mapping:
            result["offset_mapping"] = [r.offsets for r in rows]
        if return_special_tokens_mask:
            result["special_tokens_mask"] = [r.special_tokens_mask for r in rows]
        self._pad(result, padding, max_length, pad_to_multiple_of)
        if return_overflowing_tokens:
            result["overflow_to_sample_mapping"] = owner
        if single and not return_overflowing_tokens and return_tensors is None:
            result = {key: value[0] for key, value in result.items()}
        return _as_tensors(result, return_tensors)

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
        fillers = {
            "input_ids": filler, "attention_mask": 0, "offset_mapping": (0, 0),
            "special_tokens_mask": 1,
        }  # fmt: skip
        for key, rows in result.items():
            for i, row in enumerate(rows):
                extra = [fillers[key]] * (width - len(row))
                rows[i] = extra + row if self.padding_side == "left" else row + extra

    # -- chats -----------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """Messages (`role`, `content`) as the template writes them: ids, or text.

        `conversation` is one chat or a batch. `add_generation_prompt` ends with the header of the
        answer; `continue_final_message` ends inside the last message, to be gone on with.
        """
        source = chat_template or self.chat_template
        if source is None:
            raise ConfigError("this tokenizer has no chat template; pass chat_template")
        if continue_final_message and add_generation_prompt:
            raise ConfigError("continue_final_message and add_generation_prompt exclude each other")
        single = not conversation or isinstance(conversation[0], dict)
        special = {n: getattr(self, n) for n in SPECIAL if getattr(self, n) is not None}
        texts = []
        for chat in [conversation] if single else conversation:
            text = render(
                source, chat, tools=tools, documents=documents,
                add_generation_prompt=add_generation_prompt, **{**special, **variables},
            )  # fmt: skip
            texts.append(_open_end(text, chat) if continue_final_message else text)
        out: list[Any] = texts
        if tokenize:
            out = self(texts, add_special_tokens=False)["input_ids"]
        return out[0] if single else out

    # -- ids to text -----------------------------------------------------------------------------

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of one row of ids (list or tensor), or of each row of a batch.

        `clean_up_tokenization_spaces` takes blanks before punctuation away; by default as
        tokenizer_config.json says, else not.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and not isinstance(ids[0], int):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        text = self.core.decode(ids, skip_special_tokens=skip_special_tokens)
        clean = clean_up_tokenization_spaces
        if clean is None:
            clean = self.config.get("clean_up_tokenization_spaces", False)
        return clean_up(text) if clean else text

    def batch_decode(
        self,
        rows: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row."""
        return [self.decode(r, skip_special_tokens, clean_up_tokenization_spaces) for r in rows]


def clean_up(text: str) -> str:
    """`text` without the blanks that cutting English into words puts before its punctuation."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def _open_end(text: str, chat: Sequence[Any]) -> str:
    """`text` up to the end of the last message's content."""
    last = str(chat[-1].get("content") or "").strip()
    at = text.rfind(last)
    if not last or at < 0:
        raise TemplateError("continue_final_message: the template changes the last message")
    # Trailing blanks of the message stay where the template keeps them.
    whole = str(chat[-1]["content"]).lstrip()
    return text[:at] + (whole if text.startswith(whole, at) else last)


def _template(given: Any) -> str | None:
    """The template itself, or the one named "default" of a list."""
    if isinstance(given, list):
        return next((t["template"] for t in given if t.get("name") == "default"), None)
    return given


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _as_tensors(result: dict[str, Any], kind: str | None) -> Encoding:
    if kind is None:
        return Encoding(result)
    if kind not in ("pt", "np"):
        raise ConfigError(f"return_tensors={kind!r}; 'pt' or 'np'")
    if len({len(row) for row in result["input_ids"]}) > 1:
        raise ConfigError("rows of different lengths are no tensor; pass padding=True")
    if kind == "np":
        import numpy as np

        return Encoding({key: np.array(value) for key, value in result.items()})
    import torch

    return Encoding({key: torch.tensor(value) for key, value in result.items()})
