"""Classes that the model was never trained on, by entailment (arXiv:1909.00161)."""

from __future__ import annotations

from typing import Any

import torch

from topwork.errors import ConfigError
from topwork.pipelines.text import TextPipeline


class ZeroShotClassificationPipeline(TextPipeline):
    """`pipe(text, candidate_labels=[…])` → {"sequence", "labels", "scores"}, likeliest first."""

    model_task = "sequence-classification"

    def __call__(self, inputs: Any, candidate_labels: Any = None, **options: Any) -> Any:
        if candidate_labels is None:
            raise ConfigError("zero-shot-classification needs candidate_labels")
        return super().__call__(inputs, candidate_labels=candidate_labels, **options)

    @property
    def entailment(self) -> int:
        """The label that says that the hypothesis follows."""
        names = self.config.get("id2label") or {}
        for index, name in names.items():
            if str(name).lower().startswith("entail"):
                return int(index)
        raise ConfigError(
            "no label of this model begins with 'entail': zero-shot classification needs a model "
            f"trained on entailment; its labels are {', '.join(map(str, names.values())) or 'none'}"
        )

    def run(
        self,
        items: list[str],
        candidate_labels: list[str] | str = (),  # type: ignore[assignment]
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
    ) -> list[dict[str, Any]]:
        """`multi_label`: each label by itself; otherwise the scores of all sum to one."""
        labels = names_of(candidate_labels)
        texts = self.texts(
            [item for item in items for _ in labels],
            hypotheses(labels, hypothesis_template) * len(items),
            truncation="only_first",
        )
        logits = torch.stack(self.text_logits(texts)).view(len(items), len(labels), -1)
        entails = self.entailment
        if multi_label or len(labels) == 1:
            against = -1 if entails == 0 else 0
            scores = logits[..., [against, entails]].softmax(-1)[..., 1]
        else:
            scores = logits[..., entails].softmax(-1)
        results = []
        for item, row in zip(items, scores.tolist()):
            order = sorted(range(len(labels)), key=lambda i: -row[i])
            results.append(
                {
                    "sequence": item,
                    "labels": [labels[i] for i in order],
                    "scores": [row[i] for i in order],
                }
            )
        return results


def names_of(labels: list[str] | str) -> list[str]:
    """Labels from a list, or from one text with commas between."""
    given = labels.split(",") if isinstance(labels, str) else list(labels)
    names = [label.strip() for label in given if label.strip()]
    if not names:
        raise ConfigError("candidate_labels is empty")
    return names


def hypotheses(labels: list[str], template: str) -> list[str]:
    """Each label in its sentence."""
    if template.format(labels[0]) == template:
        raise ConfigError(f"hypothesis_template={template!r} has no {{}} for the label")
    return [template.format(label) for label in labels]
