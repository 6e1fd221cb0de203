"""Classes that the model was never trained on, each told in words (arXiv:2103.00020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from topwork.errors import ConfigError
from topwork.models.contrastive import unit
from topwork.pipelines.images import ImagePipeline
from topwork.pipelines.zero_shot import hypotheses, names_of
from topwork.text import Tokenizer


class ZeroShotImageClassificationPipeline(ImagePipeline):
    """`pipe(image, candidate_labels=[…])` → [{"score", "label"}], the likeliest first."""

    model_task = "zero-shot-image-classification"
    needs = ("image_processor", "tokenizer")
    tokenizer: Tokenizer

    def __call__(self, inputs: Any, candidate_labels: Any = None, **options: Any) -> Any:
        if candidate_labels is None:
            raise ConfigError("zero-shot-image-classification needs candidate_labels")
        return super().__call__(inputs, candidate_labels=candidate_labels, **options)

    def run(
        self,
        items: list[Any],
        candidate_labels: list[str] | str = (),  # type: ignore[assignment]
        hypothesis_template: str = "This is a photo of {}.",
    ) -> list[list[dict[str, Any]]]:
        """Scores sum to one where the model was trained to choose among texts (CLIP); where it
        judges each pair by itself (SigLIP), they do not."""
        labels = names_of(candidate_labels)
        texts = self.texts(hypotheses(labels, hypothesis_template))
        alone = self.base.spec.loss == "sigmoid"
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        for group, pixels in self.batches(self.pixels(items)):
            images = unit(self.base.get_image_features(pixels))
            logits = self.base.logits_of(images, texts).float().cpu()
            scores = logits.sigmoid() if alone else logits.softmax(-1)
            for i, row in zip(group, scores.tolist()):
                order = sorted(range(len(labels)), key=lambda k: -row[k])
                results[i] = [{"score": row[k], "label": labels[k]} for k in order]
        return results

    def texts(self, sentences: list[str]) -> Tensor:
        """The vectors [N, P] of texts, once for all images."""
        base = self.base
        options: dict[str, Any] = {"padding": True}
        if base.spec.loss == "sigmoid":  # trained on texts filled up to one length, and unmasked
            context = base.spec.text.context
            options = {"padding": "max_length", "max_length": context, "truncation": True}
        rows = self.tokenizer(sentences, return_tensors="pt", **options).to(base.device)
        mask = None if base.spec.loss == "sigmoid" else rows["attention_mask"]
        return unit(base.get_text_features(rows["input_ids"], mask))
