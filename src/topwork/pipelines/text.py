"""Pipelines of texts: tokenized, and computed packed, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from topwork import ops
from topwork.errors import DataError
from topwork.pipelines.base import Pipeline
from topwork.text import Tokenizer

TOKENS = 4096  # in one pass, where no batch size is given


@dataclass(frozen=True)
class Text:
    """A tokenized text or pair; `encoding` is the tokenizers library's, with its offsets."""

    ids: list[int]
    types: list[int]
    encoding: Any


class TextPipeline(Pipeline):
    """Texts are computed packed and sorted by length; `batch_size` bounds how many go together (by
    default as many as make 4096 tokens)."""

    needs = ("tokenizer",)
    takes: ClassVar[str] = "texts"
    tokenizer: Tokenizer

    @property
    def limit(self) -> int | None:
        """The most tokens that a text may have; None for no limit."""
        spec = getattr(getattr(self.base, "trunk", None), "spec", None)
        table = getattr(spec, "embedding", None)
        limits = [self.tokenizer.model_max_length]
        if table is not None and table.context:
            limits.append(table.context - table.first)
        elif table is None and self.config.get("max_position_embeddings"):
            limits.append(self.config.get("max_position_embeddings"))
        found = min(limits)
        return found if found < 10**9 else None

    def texts(
        self,
        firsts: Sequence[str],
        seconds: Sequence[str] | None = None,
        *,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int = 0,
        special: bool = True,
    ) -> list[Text]:
        """Tokenize; with `stride` a long text's further parts follow as `encoding.overflowing`.

        DataError for an empty text, and for one that is too long and may not be cut.
        """
        for i, text in enumerate(firsts):
            if not isinstance(text, str):
                raise DataError(f"input {i} is {type(text).__name__}, not a text")
            if not text.strip():
                raise DataError(f"input {i} is empty")
        core, limit = self.tokenizer.core, max_length or self.limit
        if truncation and limit is not None:
            strategy = "longest_first" if truncation is True else str(truncation)
            core.enable_truncation(
                limit, stride=stride, strategy=strategy, direction=self.tokenizer.truncation_side
            )
        pairs = list(firsts) if seconds is None else list(zip(firsts, seconds))
        try:
            encodings = core.encode_batch(pairs, add_special_tokens=special)
        finally:
            core.no_truncation()
        for i, encoding in enumerate(encodings):
            if limit is not None and len(encoding.ids) > limit:
                raise DataError(
                    f"input {i} has {len(encoding.ids)} tokens, more than the {limit} that the "
                    "model takes: pass truncation=True to cut it, or split the text"
                )
        return [Text(e.ids, e.type_ids, e) for e in encodings]

    def groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices that go together, longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        group: list[int] = []
        filled = 0
        for i in order:
            full = filled + lengths[i] > TOKENS if self.batch_size is None else (
                len(group) == self.batch_size
            )  # fmt: skip
            if group and full:
                yield group
                group, filled = [], 0
            group.append(i)
            filled += lengths[i]
        if group:
            yield group

    def outputs(self, texts: Sequence[Text]) -> Iterator[tuple[list[int], tuple[int, ...], Any]]:
        """The model's output for packed texts, group by group: indices, lengths, output."""
        for group in self.groups([len(t.ids) for t in texts]):
            lengths = tuple(len(texts[i].ids) for i in group)
            device = self.base.device
            row = torch.tensor([[t for i in group for t in texts[i].ids]], device=device)
            extra = {}
            if any(any(texts[i].types) for i in group) and self.tells_types:
                types = [t for i in group for t in texts[i].types]
                extra = {"token_type_ids": torch.tensor([types], device=device)}
            with ops.sums_of_two():
                output = self.model(input_ids=row, lengths=lengths, **extra)
            yield group, lengths, output

    @property
    def tells_types(self) -> bool:
        """Whether the model has embeddings for the parts of a pair."""
        spec = getattr(getattr(self.base, "trunk", None), "spec", None)
        return bool(getattr(getattr(spec, "embedding", None), "types", 0))

    def text_logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """Each text's logits [labels], fp32 on the CPU."""
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for group, _, output in self.outputs(texts):
            for i, row in zip(group, output.logits.float().cpu()):
                found[i] = row
        return found

    def token_logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """Each text's logits [tokens, labels], fp32 on the CPU."""
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for group, lengths, output in self.outputs(texts):
            for i, rows in zip(group, output.logits[0].float().cpu().split(list(lengths))):
                found[i] = rows
        return found
