"""What all pipelines share: inputs of every kind, batches without padding, adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from topwork.errors import ConfigError, DataError, nearest
from topwork.peft import PeftModel
from topwork.text import Tokenizer

TOKENS = 4096  # in one pass, where no batch size is given
WINDOW = 256  # items of a generator that are looked at together


@dataclass(frozen=True)
class Text:
    """A tokenized text or pair; `encoding` is the tokenizers library's, with its offsets."""

    ids: list[int]
    types: list[int]
    encoding: Any


class Pipeline:
    """Texts in, answers out, in the order they came in.

    One input gives one result, a list a list; a generator or any other iterable is read as the
    results are taken. Texts are computed packed and sorted by length; `batch_size` bounds how many
    go together (by default as many as make 4096 tokens).
    """

    model_task: ClassVar[str]
    run: Callable[..., list[Any]]  # (items, the task's options) → one result for each item

    def __init__(self, model: Any, tokenizer: Tokenizer, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, inputs: Any, *, adapter: str | None = None, **options: Any) -> Any:
        """The results; `adapter` names the one to use from now on. Options are the task's."""
        if adapter is not None:
            self.set_adapter(adapter)
        self.check(options)
        if self.is_single(inputs):
            return self.results([inputs], options)[0]
        if isinstance(inputs, (list, tuple)):
            return self.results(list(inputs), options)
        if not isinstance(inputs, Iterable):
            raise DataError(f"{type(self).__name__} takes texts, got {type(inputs).__name__}")
        return self._stream(iter(inputs), options)

    def _stream(self, items: Iterator[Any], options: dict[str, Any]) -> Iterator[Any]:
        while window := list(islice(items, WINDOW)):
            yield from self.results(window, options)

    def results(self, items: list[Any], options: dict[str, Any]) -> list[Any]:
        if not items:
            return []
        with torch.inference_mode():
            return self.run(items, **options)

    def check(self, options: Mapping[str, Any]) -> None:
        """ConfigError for an option that `run` does not have."""
        known = [p.name for p in inspect.signature(self.run).parameters.values()]
        if "generation" in known:
            return
        for name in options:
            if name not in known[1:]:
                raise ConfigError(
                    f"{type(self).__name__} has no option {name!r}{nearest(name, known[1:])}; "
                    f"it has {', '.join(known[1:])}"
                )

    def is_single(self, inputs: Any) -> bool:
        return isinstance(inputs, (str, Mapping))

    # -- adapters --------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    def load_adapter(self, path: str | Path, name: str = "default") -> None:
        """Load an adapter; the first one is used at once, later ones after `set_adapter`."""
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, name)
        self.model.eval()

    def set_adapter(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ConfigError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}; "
                              f"there are: {known}")  # fmt: skip
        self.model.set_adapter(name)

    @property
    def base(self) -> Any:
        """The model below the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def config(self) -> Any:
        return self.base.config

    # -- tokens ----------------------------------------------------------------------------------

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
            yield group, lengths, self.model(input_ids=row, lengths=lengths, **extra)

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

    def label(self, index: int) -> str:
        names = self.config.get("id2label") or {}
        return names.get(str(index), names.get(index, f"LABEL_{index}"))
