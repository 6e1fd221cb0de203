"""Hidden states of each token, and one vector per text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.errors import ConfigError, nearest
from topwork.models.encoder_heads import POOLINGS
from topwork.pipelines.text import TextPipeline

NAMES = {"cls": "first", "first": "first", "mean": "mean"}


class FeatureExtractionPipeline(TextPipeline):
    """`pipe(text)` → [1][tokens][C]; with `pooling` one vector; `embed` gives a tensor."""

    model_task = "base"

    def run(
        self,
        items: list[str],
        pooling: str | None = None,
        normalize: bool = False,
        return_tensors: bool = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        tokenize_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """`pooling`: "mean" over the tokens, or "cls", the first token's; None keeps all tokens.

        `tokenize_kwargs` may hold `truncation` and `max_length` as well.
        """
        asked = {"truncation": truncation, "max_length": max_length, **(tokenize_kwargs or {})}
        if pooling is not None and pooling not in NAMES:
            raise ConfigError(f"pooling={pooling!r} is not known{nearest(pooling, NAMES)}")
        texts = self.texts(items, **asked)
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for group, lengths, output in self.outputs(texts):
            hidden = output.last_hidden_state
            if pooling is None:
                rows = list(hidden[0].split(list(lengths)))
            else:
                rows = POOLINGS[NAMES[pooling]](hidden, lengths)
                rows = list(F.normalize(rows, dim=-1) if normalize else rows)
            for i, row in zip(group, rows):
                found[i] = (row[None] if pooling is None else row).float().cpu()
        return found if return_tensors else [row.tolist() for row in found]

    def embed(
        self, texts: str | list[str], pooling: str = "mean", normalize: bool = True
    ) -> Tensor:
        """Sentence embeddings [N, C] of unit length (their products are cosines); long texts are
        cut."""
        items = [texts] if isinstance(texts, str) else list(texts)
        options = {"pooling": pooling, "normalize": normalize}
        rows = self.results(items, {**options, "return_tensors": True, "truncation": True})
        return torch.stack(rows) if rows else torch.empty(0)
