"""Where in a text the answer to a question stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from topwork.errors import ConfigError, DataError
from topwork.pipelines.text import Text, TextPipeline

Answer = dict[str, Any]


class QuestionAnsweringPipeline(TextPipeline):
    """`pipe(question=…, context=…)` → {"score", "start", "end", "answer"}."""

    model_task = "question-answering"

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None,
                 **options: Any) -> Any:  # fmt: skip
        if inputs is None:
            if question is None or context is None:
                raise DataError("question-answering needs a question and a context")
            if isinstance(question, str) and isinstance(context, str):
                inputs = {"question": question, "context": context}
            else:
                asked = [question] * len(context) if isinstance(question, str) else list(question)
                texts = [context] * len(asked) if isinstance(context, str) else list(context)
                if len(asked) != len(texts):
                    raise DataError(f"{len(asked)} questions, but {len(texts)} contexts")
                inputs = [{"question": q, "context": c} for q, c in zip(asked, texts)]
        return super().__call__(inputs, **options)

    def run(
        self,
        items: list[Mapping[str, str]],
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> list[Any]:
        """`top_k` > 1 gives a list. Contexts of more than `max_seq_len` tokens with the question go
        in parts that share `doc_stride`. `handle_impossible_answer`: "" where none is likelier.
        """
        if top_k < 1 or max_answer_len < 1:
            raise ConfigError(f"top_k={top_k} and max_answer_len={max_answer_len} must be positive")
        parts: list[list[Text]] = []
        for i, item in enumerate(items):
            if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
                raise DataError(f"input {i} needs a question and a context")
            for name in ("question", "context"):
                if not str(item[name]).strip():
                    raise DataError(f"the {name} of input {i} is empty")
            parts.append(self._parts(item, max_seq_len, doc_stride, max_question_len))
        logits = iter(self.token_logits([text for row in parts for text in row]))
        results = []
        for item, row in zip(items, parts):
            answers: list[Answer] = []
            nothing = 1.0
            for text in row:
                start, end, allowed, null = chances(text, next(logits).numpy())
                nothing = min(nothing, null)
                for first, last, score in best(start, end, max_answer_len, top_k, allowed):
                    answers.append(_answer(text, first, last, score, item, align_to_words))
            if handle_impossible_answer:
                answers.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
            answers.sort(key=lambda answer: -answer["score"])
            results.append(answers[0] if top_k == 1 and answers else answers[:top_k])
        return results

    def _parts(
        self, item: Mapping[str, str], longest: int | None, stride: int | None, asked: int
    ) -> list[Text]:
        limit = min(longest or 384, self.limit or 384)
        stride = min(limit // 2, 128) if stride is None else stride
        question = self.texts([item["question"]], special=False, truncation=True, max_length=asked)
        room = limit - len(question[0].ids)
        if stride >= room - 4:
            raise ConfigError(
                f"doc_stride={stride} leaves no room for the context: the question has "
                f"{len(question[0].ids)} tokens of max_seq_len={limit}"
            )
        shown = item["question"]
        if question[0].encoding.overflowing:
            shown = shown[: question[0].encoding.offsets[-1][1]]
        whole = self.texts([shown], [item["context"]], truncation="only_second", max_length=limit,
                           stride=stride)[0]  # fmt: skip
        rest = [Text(e.ids, e.type_ids, e) for e in whole.encoding.overflowing]
        return [whole, *rest]


def chances(text: Text, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The chance of each token to start and to end the answer, which may be the answer's, and that
    there is none. The first token takes part, for models put what has no answer there."""
    allowed = np.array([part == 1 for part in text.encoding.sequence_ids])
    open_ = allowed.copy()
    open_[0] = True
    sides = []
    for column in (0, 1):
        scores = np.where(open_, logits[:, column], -10000.0).astype(np.float64)
        powers = np.exp(scores - scores.max())
        sides.append(powers / powers.sum())
    null = float(sides[0][0] * sides[1][0])
    for side in sides:
        side[0] = 0.0
    return sides[0], sides[1], allowed, null


def best(
    start: np.ndarray, end: np.ndarray, longest: int, count: int, allowed: np.ndarray
) -> list[tuple[int, int, float]]:
    """The likeliest (first, last, chance) of at most `longest` tokens."""
    both = np.tril(np.triu(np.outer(start, end)), longest - 1).ravel()
    order = np.argsort(-both, kind="stable")[: max(count, 1) * 4]
    found = [(int(i // len(end)), int(i % len(end)), float(both[i])) for i in order]
    return [f for f in found if allowed[f[0]] and allowed[f[1]]][:count]


def _answer(
    text: Text, first: int, last: int, score: float, item: Mapping[str, str], to_words: bool
) -> Answer:
    encoding = text.encoding
    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
    if to_words:
        words = encoding.token_to_word(first), encoding.token_to_word(last)
        if None not in words:
            spans = [encoding.word_to_chars(word, 1) for word in words]
            if None not in spans:
                start, end = spans[0][0], spans[1][1]
    return {"score": score, "start": start, "end": end, "answer": item["context"][start:end]}
