"""The likeliest words for a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError, DataError
from topwork.pipelines.text import Text, TextPipeline


class FillMaskPipeline(TextPipeline):
    """`pipe("Paris is the [MASK] of France.")` → [{"score", "token", "token_str", "sequence"}]."""

    model_task = "masked-lm"

    def run(
        self,
        items: list[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
    ) -> list[Any]:
        """`targets`: only these words. With several masks a text gives a list for each."""
        mask = self.tokenizer.mask_token_id
        if mask is None:
            raise ConfigError("this tokenizer has no mask_token")
        allowed = None if targets is None else self._targets(targets)
        texts = self.texts(items, truncation=truncation, max_length=max_length)
        where = [[i for i, token in enumerate(text.ids) if token == mask] for text in texts]
        for i, places in enumerate(where):
            if not places:
                raise DataError(f"input {i} has no {self.tokenizer.mask_token}: {items[i][:60]!r}")
        rows = self._masked_logits(texts, where)
        return [
            self._answers(text, places, logits.softmax(-1), top_k, allowed)
            for text, places, logits in zip(texts, where, rows)
        ]

    def _masked_logits(self, texts: list[Text], where: list[list[int]]) -> list[Tensor]:
        """The logits at the masks alone [masks, V]: all others would fill the memory."""
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for group, lengths, output in self.outputs(texts):
            for i, rows in zip(group, output.logits[0].split(list(lengths))):
                found[i] = rows[where[i]].float().cpu()
        return found

    def _answers(
        self, text: Text, places: list[int], chances: Tensor, top_k: int, allowed: list[int] | None
    ) -> Any:
        if allowed is not None:
            chances = chances[:, allowed]
        values, indices = chances.topk(min(top_k, chances.shape[-1]))
        results = []
        for place, scores, chosen in zip(places, values.tolist(), indices.tolist()):
            row = []
            for score, index in zip(scores, chosen):
                token = index if allowed is None else allowed[index]
                ids = [token if i == place else t for i, t in enumerate(text.ids)]
                row.append(
                    {
                        "score": score,
                        "token": token,
                        "token_str": self.tokenizer.decode([token]),
                        "sequence": self.tokenizer.decode(
                            ids, skip_special_tokens=len(places) == 1
                        ),
                    }
                )
            results.append(row)
        return results[0] if len(results) == 1 else results

    def _targets(self, targets: str | Sequence[str]) -> list[int]:
        words = [targets] if isinstance(targets, str) else list(targets)
        vocab, ids = self.tokenizer.get_vocab(), []
        for word in words:
            found = vocab.get(word)
            if found is None:
                pieces = self.tokenizer.encode(word, add_special_tokens=False)
                if not pieces:
                    raise ConfigError(f"targets: {word!r} is no word of the vocabulary")
                found = pieces[0]
            ids.append(found)
        if not ids:
            raise ConfigError("targets is empty")
        return sorted(set(ids))
