"""A class for each image."""

from __future__ import annotations

from typing import Any

from topwork.pipelines.images import ImagePipeline
from topwork.pipelines.scores import apply, best, checked, usual


class ImageClassificationPipeline(ImagePipeline):
    """`pipe(image)` → [{"label", "score"}], the likeliest first."""

    model_task = "image-classification"

    def run(
        self, items: list[Any], top_k: int | None = 5, function_to_apply: str | None = None
    ) -> list[list[dict[str, Any]]]:
        """`top_k` None gives all labels. `function_to_apply`: softmax, sigmoid or none; by default
        what the model's problem asks for."""
        function = checked(function_to_apply or usual(self.config))
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        for group, pixels in self.batches(self.pixels(items)):
            scores = apply(function, self.model(pixel_values=pixels).logits.float().cpu())
            for i, row in zip(group, scores.tolist()):
                results[i] = best(row, self.label, top_k)
        return results
