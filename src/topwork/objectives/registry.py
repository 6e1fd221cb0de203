"""The objectives by name, for the command line: their configuration, trainer and preview."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from topwork.data.preferences import JUDGED, PAIRS, TRIPLES
from topwork.objectives import (
    a2po,
    distill,
    dpo,
    free,
    gkd,
    gmpo,
    gold,
    grpo,
    iwopd,
    kto,
    online,
    ppo,
    prm,
    reward,
    rloo,
    sdpo,
    selfdistill,
    serverdistill,
    sft,
    tpo,
    uld,
)
from topwork.objectives.previews import (
    Preview,
    preview_advised,
    preview_answers,
    preview_prompts,
    preview_rows,
    preview_steps,
)


@dataclass(frozen=True)
class Entry:
    """One objective. `models`: further models of a run, its key → the trainer's argument;
    `images`: its trainer takes rows with images."""

    config: Any
    trainer: Any
    preview: Preview
    models: dict[str, str] = field(default_factory=dict)
    images: bool = False


DRAWN = {"reward": "reward_funcs", "tools": "tools", "environment": "environment_factory"}
ONLINE = {"reward": "reward_funcs", "ref_model": "ref_model"}
OBJECTIVES = {
    "sft": Entry(sft.SFTConfig, sft.SFTTrainer, preview_rows, images=True),
    "dpo": Entry(
        dpo.DPOConfig, dpo.DPOTrainer, preview_answers(PAIRS), {"ref_model": "ref_model"}, True
    ),
    "kto": Entry(
        kto.KTOConfig, kto.KTOTrainer, preview_answers(JUDGED, single=True),
        {"ref_model": "ref_model"}, True,
    ),
    "orpo": Entry(
        free.ORPOConfig, free.ORPOTrainer,
        preview_answers(PAIRS, check=free.check_prompts), images=True,
    ),
    "cpo": Entry(free.CPOConfig, free.CPOTrainer, preview_answers(PAIRS), images=True),
    "tpo": Entry(tpo.TPOConfig, tpo.TPOTrainer, preview_answers(TRIPLES), images=True),
    "reward": Entry(
        reward.RewardConfig, reward.RewardTrainer, preview_answers(PAIRS, whole=True)
    ),
    "prm": Entry(prm.PRMConfig, prm.PRMTrainer, preview_steps),
    "distill": Entry(
        distill.DistillationConfig, distill.DistillationTrainer, preview_rows,
        {"teacher": "teacher_model"}, True,
    ),
    "gkd": Entry(
        gkd.GKDConfig, gkd.GKDTrainer, preview_rows, {"teacher": "teacher_model"}, True
    ),
    "server_distill": Entry(
        serverdistill.ServerDistillationConfig, serverdistill.ServerDistillationTrainer,
        preview_rows,
    ),
    "iw_opd": Entry(
        iwopd.IWOPDConfig, iwopd.IWOPDTrainer, preview_rows, {"teacher": "teacher_model"}, True
    ),
    "uld": Entry(
        uld.ULDConfig, uld.ULDTrainer, preview_rows, {"teacher": "teacher_model"}
    ),
    "gold": Entry(
        gold.GOLDConfig, gold.GOLDTrainer, preview_rows, {"teacher": "teacher_model"}
    ),
    "self_distill": Entry(
        selfdistill.SelfDistillationConfig, selfdistill.SelfDistillationTrainer, preview_advised
    ),
    "grpo": Entry(
        grpo.GRPOConfig, grpo.GRPOTrainer, preview_prompts, DRAWN, images=True
    ),
    "gmpo": Entry(
        gmpo.GMPOConfig, gmpo.GMPOTrainer, preview_prompts, DRAWN, images=True
    ),
    "sdpo": Entry(
        sdpo.SDPOConfig, sdpo.SDPOTrainer, preview_prompts, {"reward": "reward_funcs"}, True
    ),
    "rloo": Entry(
        rloo.RLOOConfig, rloo.RLOOTrainer, preview_prompts, DRAWN, images=True
    ),
    "a2po": Entry(
        a2po.A2POConfig, a2po.A2POTrainer, preview_prompts, {"reward": "reward_funcs"}, True
    ),
    "online_dpo": Entry(
        online.OnlineDPOConfig, online.OnlineDPOTrainer, preview_prompts, {**DRAWN, **ONLINE}, True
    ),
    "xpo": Entry(online.XPOConfig, online.XPOTrainer, preview_prompts, ONLINE, True),
    "nash_md": Entry(online.NashMDConfig, online.NashMDTrainer, preview_prompts, ONLINE),
    "ppo": Entry(
        ppo.PPOConfig, ppo.PPOTrainer, preview_prompts,
        {**DRAWN, "value_model": "value_model"}, True,
    ),
}  # fmt: skip
