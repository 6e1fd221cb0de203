"""A class for each sound."""

from __future__ import annotations

from typing import Any

from topwork.pipelines.scores import apply, best, checked, usual
from topwork.pipelines.sounds import SoundPipeline, with_mask


class AudioClassificationPipeline(SoundPipeline):
    """`pipe(sound)` → [{"label", "score"}], the likeliest first."""

    model_task = "audio-classification"
    needs = ("feature_extractor",)

    def run(
        self, items: list[Any], top_k: int | None = None, function_to_apply: str | None = None
    ) -> list[list[dict[str, Any]]]:
        """`top_k`: so many labels, by default all. `function_to_apply`: softmax, sigmoid or none;
        by default what the model's problem asks for."""
        function = checked(function_to_apply or usual(self.config))
        sounds = self.samples(items)
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        for group in self.together([len(s) for s in sounds]):
            out = self.model(**with_mask(self.features([sounds[i] for i in group])))
            scores = apply(function, out.logits.float().cpu())
            for i, row in zip(group, scores.tolist()):
                results[i] = best(row, self.label, top_k)
        return results
