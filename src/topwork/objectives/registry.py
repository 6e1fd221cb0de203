"""The objectives by name, for the command line: their configuration, trainer and preview."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.data.preferences import JUDGED, PAIRS
from topwork.data.prepare import marked_text, prepare
from topwork.data.rows import read_rows
from topwork.objectives import (
    answers,
    distill,
    dpo,
    free,
    gkd,
    grpo,
    kto,
    online,
    ppo,
    prm,
    reward,
    rloo,
    selfdistill,
    sft,
    uld,
)
from topwork.objectives.begin import describe_prompts
from topwork.objectives.rollouts import read_prompts
from topwork.text import Tokenizer

Runs = Sequence[tuple[str, bool]]
"""A text in pieces, each with whether it is trained."""
Preview = Callable[[Any, Tokenizer, Any], tuple[list[str], Iterator[tuple[str, Runs]]]]
"""(rows, tokenizer, arguments) → lines about all rows, and each row's title and text."""


@dataclass(frozen=True)
class Entry:
    """One objective. `models`: further models of a run, its key → the trainer's argument."""

    config: Any
    trainer: Any
    preview: Preview
    models: dict[str, str] = field(default_factory=dict)


def preview_rows(
    rows: Any, tokenizer: Tokenizer, args: Any
) -> tuple[list[str], Iterator[tuple[str, Runs]]]:
    """Rows of fine-tuning."""
    prepared = prepare(read_rows(rows), tokenizer, sft.marking_of(args, tokenizer))
    shown = (
        (
            f"row {s.row}: {len(s)} tokens, {s.supervised} trained",
            list(marked_text(s, tokenizer)),
        )
        for s in prepared.samples
    )
    return sft.report(prepared, tokenizer)[:-2], shown


def preview_answers(known: Any, whole: bool = False, single: bool = False) -> Preview:
    """Rows of judged answers in one of the `known` formats."""

    def preview(
        rows: Any, tokenizer: Tokenizer, args: Any
    ) -> tuple[list[str], Iterator[tuple[str, Runs]]]:
        data = answers.read_answers(rows, None, tokenizer, args, known, whole, single)
        lines = [
            line for line in answers.report(data, tokenizer, whole) if not line.startswith("  ")
        ]

        def each() -> Iterator[tuple[str, Runs]]:
            for s in data.train.samples:
                margin = f", margin {s.value:g}" if s.value is not None and not single else ""
                runs = [(tokenizer.decode(s.prompt.tolist()), False)]
                for number, answer in enumerate(s.answers):
                    runs.append((f"\n{answers.title(s, number)}: ", False))
                    runs += marked_text(answer, tokenizer)
                yield f"row {s.row}: {len(s)} tokens computed of {s.apart}{margin}", runs

        return lines[:-1], each()

    return preview


def preview_steps(
    rows: Any, tokenizer: Tokenizer, args: Any
) -> tuple[list[str], Iterator[tuple[str, Runs]]]:
    """Rows of labelled steps."""
    prepared = prm.prepare_steps(rows, tokenizer, args)

    def each() -> Iterator[tuple[str, Runs]]:
        for s in prepared.samples:
            runs, at = [], 0
            for end, label in zip(s.ends, s.labels):
                runs.append((tokenizer.decode(s.ids[at:end].tolist()), False))
                runs.append((f"[{'right' if label else 'wrong'}]", True))
                runs.append((tokenizer.decode(s.ids[end : end + 1].tolist()), False))
                at = end + 1
            yield f"row {s.row}: {len(s.ids)} tokens, {len(s.ends)} steps", runs

    return prm.report(prepared), each()


def preview_prompts(
    rows: Any, tokenizer: Tokenizer, args: Any
) -> tuple[list[str], Iterator[tuple[str, Runs]]]:
    """Prompts to be answered."""
    prompts, long = read_prompts(rows, tokenizer, args.max_prompt_length)
    lines = describe_prompts(prompts, long, args)
    shown = (
        (f"row {p.row}: {len(p)} tokens", [(tokenizer.decode(p.ids.tolist()), False)])
        for p in prompts
    )
    return lines, shown


DRAWN = {"reward": "reward_funcs", "tools": "tools", "environment": "environment_factory"}
ONLINE = {"reward": "reward_funcs", "ref_model": "ref_model"}
OBJECTIVES = {
    "sft": Entry(sft.SFTConfig, sft.SFTTrainer, preview_rows),
    "dpo": Entry(
        dpo.DPOConfig, dpo.DPOTrainer, preview_answers(PAIRS), {"ref_model": "ref_model"}
    ),
    "kto": Entry(
        kto.KTOConfig, kto.KTOTrainer, preview_answers(JUDGED, single=True),
        {"ref_model": "ref_model"},
    ),
    "orpo": Entry(free.ORPOConfig, free.ORPOTrainer, preview_answers(PAIRS)),
    "cpo": Entry(free.CPOConfig, free.CPOTrainer, preview_answers(PAIRS)),
    "reward": Entry(
        reward.RewardConfig, reward.RewardTrainer, preview_answers(PAIRS, whole=True)
    ),
    "prm": Entry(prm.PRMConfig, prm.PRMTrainer, preview_steps),
    "distill": Entry(
        distill.DistillationConfig, distill.DistillationTrainer, preview_rows,
        {"teacher": "teacher_model"},
    ),
    "gkd": Entry(
        gkd.GKDConfig, gkd.GKDTrainer, preview_rows, {"teacher": "teacher_model"}
    ),
    "uld": Entry(
        uld.ULDConfig, uld.ULDTrainer, preview_rows, {"teacher": "teacher_model"}
    ),
    "self_distill": Entry(
        selfdistill.SelfDistillationConfig, selfdistill.SelfDistillationTrainer, preview_prompts
    ),
    "grpo": Entry(
        grpo.GRPOConfig, grpo.GRPOTrainer, preview_prompts, DRAWN
    ),
    "rloo": Entry(
        rloo.RLOOConfig, rloo.RLOOTrainer, preview_prompts, DRAWN
    ),
    "online_dpo": Entry(
        online.OnlineDPOConfig, online.OnlineDPOTrainer, preview_prompts, ONLINE
    ),
    "xpo": Entry(online.XPOConfig, online.XPOTrainer, preview_prompts, ONLINE),
    "nash_md": Entry(online.NashMDConfig, online.NashMDTrainer, preview_prompts, ONLINE),
    "ppo": Entry(
        ppo.PPOConfig, ppo.PPOTrainer, preview_prompts,
        {**DRAWN, "value_model": "value_model"},
    ),
}  # fmt: skip
