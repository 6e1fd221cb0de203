"""What the model answers to a few held-out prompts, at each evaluation, for the run's page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topwork.data.prepare import Sample, marked_text
from topwork.media.placed import Placer
from topwork.training import TrainerCallback
from topwork.training.report import COMPLETIONS

LONGEST = 64  # tokens of an answer


def prompt_of(sample: Any) -> Sequence[int]:
    """The tokens before the first one that is trained; empty where there is no such prompt."""
    first = sample[0] if isinstance(sample, tuple) else sample  # the first row of a pack
    prompt = getattr(first, "prompt", None)
    if prompt is not None:
        return list(prompt)
    trained = first.trained.nonzero()[0]
    return first.ids[: int(trained[0])].tolist() if len(trained) else []


def beginning(sample: Any) -> Sample:
    """The prompt of `sample`, with its images."""
    first = sample[0] if isinstance(sample, tuple) else sample
    ids = np.asarray(prompt_of(first), np.int32)
    images = tuple(i for i in getattr(first, "images", ()) if i.stop <= len(ids))
    return Sample(first.row, ids, np.zeros(len(ids), np.bool_), images=images)


class SampleAnswers(TrainerCallback):
    """Answers the first `count` of `samples` greedily, and keeps them in completions.jsonl.

    `placer` reads the images of their prompts.
    """

    def __init__(
        self, samples: Iterable[Any], tokenizer: Any, count: int, placer: Placer | None = None
    ) -> None:
        prompts = (p for p in map(beginning, samples) if len(p) > 1)
        self.prompts = [p for _, p in zip(range(count), prompts)]
        self.tokenizer, self.placer = tokenizer, placer

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        model, trainer = more["model"], more["trainer"]
        if (
            not self.prompts
            or not trainer.world.is_main
            or not callable(getattr(model, "generate", None))
        ):
            return
        with trainer.judging():
            lines = [self._line(model, prompt, state.global_step) for prompt in self.prompts]
        with (Path(args.output_dir) / COMPLETIONS).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _line(self, model: Any, prompt: Sample, step: int) -> str:
        device = next(model.parameters()).device
        ids = torch.tensor([prompt.ids.tolist()], device=device)
        images = {} if self.placer is None else self.placer.tensors([prompt])
        out = model.generate(
            ids, max_new_tokens=LONGEST, do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            **{name: tensor.to(device) for name, tensor in images.items()},
        )  # fmt: skip
        entry = {
            "step": step,
            "prompt": "".join(text for text, _ in marked_text(prompt, self.tokenizer)),
            "completions": [self.tokenizer.decode(out[0, len(prompt) :].tolist())],
        }
        return json.dumps(entry, ensure_ascii=False) + "\n"
