"""What the model answers to a few held-out prompts, at each evaluation, for the run's page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from topwork.data.prepare import Sample, marked_text
from topwork.training.callbacks import TrainerCallback
from topwork.training.report import COMPLETIONS

LONGEST = 64  # tokens of an answer


class SampleAnswers(TrainerCallback):
    """Answers the first `count` prompts that `objective` finds in the held-out `data` greedily, and
    keeps the answers in completions.jsonl. An objective without `prompt` gives none."""

    def __init__(
        self, objective: Any, data: Mapping[str, Sequence[Any]], processing: Any, count: int
    ) -> None:
        found = () if processing is None else _prompts(objective, data)
        self.prompts = list(islice(found, count))
        self.tokenizer: Any = getattr(processing, "tokenizer", processing)
        self.placer = getattr(objective, "placer", None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer = more["trainer"]
        if not self.prompts or not trainer.world.is_main or not _writes(trainer.model):
            return
        with trainer.judging():
            lines = [self._line(trainer.model, p, state.global_step) for p in self.prompts]
        home = Path(args.output_dir)
        home.mkdir(parents=True, exist_ok=True)
        with (home / COMPLETIONS).open("a", encoding="utf-8") as file:
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
            "completions": [self.tokenizer.decode(_said(out[0].tolist(), prompt))],
        }
        return json.dumps(entry, ensure_ascii=False) + "\n"


def _said(ids: list[int], prompt: Sample) -> list[int]:
    """What was written: all of `ids`, or what stands behind the prompt where they repeat it."""
    behind = len(prompt)
    return ids[behind:] if ids[:behind] == prompt.ids.tolist() else ids


def _prompts(objective: Any, data: Mapping[str, Sequence[Any]]) -> Iterator[Sample]:
    find = getattr(objective, "prompt", None)
    if find is None:
        return
    for samples in data.values():
        yield from (prompt for prompt in map(find, samples) if len(prompt) > 1)


def _writes(model: Any) -> bool:
    """Whether the model, below its adapter if it has one, writes texts."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return callable(getattr(inner, "generate", None))
