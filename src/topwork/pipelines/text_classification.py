"""A class for each text: sentiment, spam, entailment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topwork.errors import DataError
from topwork.pipelines.scores import apply, best, checked, usual
from topwork.pipelines.text import TextPipeline


class TextClassificationPipeline(TextPipeline):
    """`pipe(text)` → [{"label", "score"}]; a pair is {"text": …, "text_pair": …}."""

    model_task = "sequence-classification"

    def __call__(self, inputs: Any, **options: Any) -> Any:
        found = super().__call__(inputs, **options)
        # One text without top_k gives a list of one, as it always has.
        plain = "top_k" not in {**self.defaults, **options} and self.is_single(inputs)
        return [found] if plain and isinstance(inputs, str) else found

    def run(
        self,
        items: list[Any],
        top_k: int | None = 1,
        function_to_apply: str | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding: bool | str = False,
        listed: bool = False,
    ) -> list[Any]:
        """`top_k` None gives all labels, the likeliest first; given at all, each result is a list.

        `function_to_apply`: softmax, sigmoid or none; by default what the model's problem asks for.
        `padding` has no effect: none is computed.
        """
        firsts, seconds = split_pairs(items)
        texts = self.texts(firsts, seconds, truncation=truncation, max_length=max_length)
        function = checked(function_to_apply or usual(self.config))
        results = [
            best(apply(function, logits).tolist(), self.label, top_k)
            for logits in self.text_logits(texts)
        ]
        return results if listed else [row[0] for row in results]

    def results(self, items: list[Any], options: dict[str, Any]) -> list[Any]:
        listed = "top_k" in {**self.defaults, **options}
        return super().results(items, {**options, "listed": listed})


def split_pairs(items: list[Any]) -> tuple[list[str], list[str] | None]:
    """Texts, and their second parts where the items are {"text", "text_pair"}."""
    if not any(isinstance(item, Mapping) for item in items):
        return items, None
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or "text" not in item:
            raise DataError(f'input {i}: expected {{"text": …, "text_pair": …}} like the others')
    firsts = [item["text"] for item in items]
    if not any(item.get("text_pair") for item in items):
        return firsts, None
    for i, item in enumerate(items):
        if not item.get("text_pair"):
            raise DataError(f"input {i} has no text_pair, but others have")
    return firsts, [item["text_pair"] for item in items]
