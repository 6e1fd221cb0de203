"""One text into another: translation, summaries, and what else a model was taught."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch

from topwork.errors import ConfigError
from topwork.pipelines.text import Text, TextPipeline


class Text2TextGenerationPipeline(TextPipeline):
    """`pipe(text)` → [{"generated_text": …}]."""

    model_task = "seq2seq-lm"
    key: ClassVar[str] = "generated_text"
    task: str = "text2text-generation"

    def __call__(self, inputs: Any, **options: Any) -> Any:
        found = super().__call__(inputs, **options)
        return [found] if self.is_single(inputs) and isinstance(found, dict) else found

    def run(
        self,
        items: list[str],
        truncation: bool | str = False,
        max_length_in: int | None = None,
        clean_up_tokenization_spaces: bool = False,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **generation: Any,
    ) -> list[Any]:
        """`truncation` cuts texts that are too long. `src_lang`, `tgt_lang`: the codes of a model
        of many languages. All other options are those of `generate`; with several sequences asked
        for, each text gives a list."""
        texts = self.texts(
            [self.prefix + item if isinstance(item, str) and item.strip() else item
             for item in items],
            truncation=truncation, max_length=max_length_in,
        )  # fmt: skip
        options = {**self.usual, **generation}
        if src_lang is not None:
            texts = [self._from_language(text, src_lang) for text in texts]
        if tgt_lang is not None:
            options["forced_bos_token_id"] = self.language(tgt_lang)
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        filler = self.tokenizer.pad_token_id or 0
        for group in self.groups([len(t.ids) for t in texts]):
            width = max(len(texts[i].ids) for i in group)
            device = self.base.device
            pads = [(texts[i].ids, width - len(texts[i].ids)) for i in group]
            rows = torch.tensor([ids + [filler] * n for ids, n in pads], device=device)
            mask = torch.tensor([[1] * len(ids) + [0] * n for ids, n in pads], device=device)
            out = self.model.generate(rows, attention_mask=mask, **options)
            copies = len(out) // len(group)
            for place, ids in enumerate(out):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                text = _tidy(text) if clean_up_tokenization_spaces else text
                results[group[place // copies]].append({self.key: text})
        return [row[0] if len(row) == 1 else row for row in results]

    @property
    def special(self) -> dict[str, Any]:
        """What the model's configuration says of this task."""
        return dict((self.config.get("task_specific_params") or {}).get(self.task) or {})

    @property
    def prefix(self) -> str:
        """What stands before each text."""
        return self.special.get("prefix", self.config.get("prefix")) or ""

    @property
    def usual(self) -> dict[str, Any]:
        """The task's own options of `generate`."""
        return {k: v for k, v in self.special.items() if k != "prefix"}

    def language(self, code: str) -> int:
        """The id of a language's token, of NLLB, mBART (`fr_XX`) or M2M-100 (`fr`)."""
        for name in (code, f"__{code}__"):
            found = self.tokenizer.core.token_to_id(name)
            if found is not None:
                return found
        raise ConfigError(f"this tokenizer has no language {code!r}")

    def _from_language(self, text: Text, code: str) -> Text:
        """The text with the mark of its language in place of the one that the tokenizer set."""
        new, tok = self.language(code), self.tokenizer
        usual = {tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id,
                 tok.cls_token_id, tok.sep_token_id}  # fmt: skip
        marks = [i for i, special in enumerate(text.encoding.special_tokens_mask)
                 if special and text.ids[i] not in usual]  # fmt: skip
        if not marks:
            raise ConfigError("src_lang: this tokenizer puts no mark of a language on its texts")
        ids = list(text.ids)
        ids[marks[0]] = new
        return Text(ids, text.types, text.encoding)


class SummarizationPipeline(Text2TextGenerationPipeline):
    """`pipe(text)` → [{"summary_text": …}]."""

    key = "summary_text"
    task = "summarization"


class TranslationPipeline(Text2TextGenerationPipeline):
    """`pipe(text)` → [{"translation_text": …}]; of the task `translation_en_to_de` the languages
    are known."""

    key = "translation_text"
    task = "translation"


def _tidy(text: str) -> str:
    """Without blanks before punctuation and within contractions."""
    return re.sub(r" (?=[.,!?]|n't|'m\b|'s\b|'ve\b|'re\b)", "", text)
