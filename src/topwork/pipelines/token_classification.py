"""A class for each token, and words of one class as one entity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topwork.errors import ConfigError, nearest
from topwork.pipelines.text import Text, TextPipeline

STRATEGIES = ("none", "simple", "first", "average", "max")
Entity = dict[str, Any]


class TokenClassificationPipeline(TextPipeline):
    """`pipe(text)` → [{"entity", "score", "index", "word", "start", "end"}], or entity groups."""

    model_task = "token-classification"

    def run(
        self,
        items: list[str],
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[list[Entity]]:
        """`aggregation_strategy`: simple joins neighbours of one class; first, average and max let
        a word have one class before. `stride`: long texts in parts that share so many tokens."""
        if aggregation_strategy not in STRATEGIES:
            raise ConfigError(
                f"aggregation_strategy={aggregation_strategy!r}"
                f"{nearest(aggregation_strategy, STRATEGIES)}; one of {', '.join(STRATEGIES)}"
            )
        if stride is not None and aggregation_strategy == "none":
            raise ConfigError("stride needs an aggregation_strategy other than 'none'")
        limit = self.limit
        if stride is not None and (limit is None or not 0 <= stride < limit):
            raise ConfigError(f"stride={stride} must be below the {limit} tokens that fit")
        wholes = self.texts(items, truncation=stride is not None, stride=stride or 0)
        parts = [[t, *(_part(e) for e in t.encoding.overflowing)] for t in wholes]
        logits = iter(self.token_logits([part for row in parts for part in row]))
        results = []
        for sentence, row in zip(items, parts):
            found: list[Entity] = []
            for text in row:
                scores = next(logits).softmax(-1).numpy()
                tokens = self._tokens(sentence, text, scores)
                entities = self._aggregate(tokens, aggregation_strategy)
                found += [e for e in entities if _name(e) not in ignore_labels]
            results.append(_without_overlaps(found) if len(row) > 1 else found)
        return results

    def _tokens(self, sentence: str, text: Text, scores: np.ndarray) -> list[Entity]:
        """Each token that is not special, with the scores of all classes."""
        encoding, found = text.encoding, []
        knows_words = bool(getattr(self.tokenizer.core.model, "continuing_subword_prefix", None))
        for i, row in enumerate(scores):
            if encoding.special_tokens_mask[i]:
                continue
            word, (start, end) = encoding.tokens[i], encoding.offsets[i]
            shown = sentence[start:end]
            if knows_words:
                inside = len(word) != len(shown)
            else:
                inside = start > 0 and " " not in sentence[start - 1 : start + 1]
            if text.ids[i] == self.tokenizer.unk_token_id:
                word, inside = shown, False
            found.append(
                {"word": word, "scores": row, "start": start, "end": end, "index": i,
                 "inside": inside}
            )  # fmt: skip
        return found

    def _aggregate(self, tokens: list[Entity], strategy: str) -> list[Entity]:
        if strategy in ("none", "simple"):
            entities = [
                {
                    "entity": self.label(int(t["scores"].argmax())),
                    "score": t["scores"].max(),
                    **{k: t[k] for k in ("index", "word", "start", "end")},
                }
                for t in tokens
            ]
            return entities if strategy == "none" else self._grouped(entities)
        words: list[list[Entity]] = []
        for token in tokens:
            if words and token["inside"]:
                words[-1].append(token)
            else:
                words.append([token])
        return self._grouped([self._word(word, strategy) for word in words])

    def _word(self, tokens: list[Entity], strategy: str) -> Entity:
        if strategy == "first":
            scores = tokens[0]["scores"]
        elif strategy == "max":
            scores = max((t["scores"] for t in tokens), key=lambda row: row.max())
        else:
            scores = np.mean([t["scores"] for t in tokens], axis=0)
        return {
            "entity": self.label(int(scores.argmax())),
            "score": scores.max(),
            "word": self._joined(tokens),
            "start": tokens[0]["start"],
            "end": tokens[-1]["end"],
        }

    def _grouped(self, entities: list[Entity]) -> list[Entity]:
        """Neighbours of one class as one; B- begins a new one."""
        groups: list[list[Entity]] = []
        for entity in entities:
            begins, kind = _tag(entity["entity"])
            if groups and not begins and _tag(groups[-1][-1]["entity"])[1] == kind:
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": np.mean([e["score"] for e in group]),
                "word": self._joined(group),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]

    def _joined(self, tokens: list[Entity]) -> str:
        words, decoder = [t["word"] for t in tokens], self.tokenizer.core.decoder
        return decoder.decode(words) if decoder is not None else " ".join(words)


def _part(encoding: Any) -> Text:
    return Text(encoding.ids, encoding.type_ids, encoding)


def _name(entity: Entity) -> str:
    return entity.get("entity", entity.get("entity_group", ""))


def _tag(label: str) -> tuple[bool, str]:
    """Whether it begins an entity, and its class; labels without B- or I- go on."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _without_overlaps(entities: list[Entity]) -> list[Entity]:
    """Of entities that overlap, as parts of a text do, the longer, then the likelier one."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda e: e["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
            continue
        sizes = [(e["end"] - e["start"], e["score"]) for e in (entity, kept[-1])]
        if sizes[0] > sizes[1]:
            kept[-1] = entity
    return kept
