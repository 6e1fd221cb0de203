"""Post-training algorithms: each says what it accepts, how it becomes a batch, and its loss."""

from topwork.objectives.a2po import A2PO, A2POConfig, A2POTrainer
from topwork.objectives.bema import BEMACallback
from topwork.objectives.distill import Distillation, DistillationConfig, DistillationTrainer
from topwork.objectives.dpo import DPO, DPOConfig, DPOTrainer
from topwork.objectives.free import CPO, ORPO, CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
from topwork.objectives.gkd import GKD, GKDConfig, GKDTrainer
from topwork.objectives.gmpo import GMPOConfig, GMPOTrainer
from topwork.objectives.gold import GOLD, GOLDConfig, GOLDTrainer
from topwork.objectives.grpo import GRPO, GRPOConfig, GRPOTrainer
from topwork.objectives.iwopd import IWOPD, IWOPDConfig, IWOPDTrainer
from topwork.objectives.kto import KTO, KTOConfig, KTOTrainer
from topwork.objectives.merging import MergeConfig, MergeModelCallback
from topwork.objectives.online import (
    XPO,
    NashMD,
    NashMDConfig,
    NashMDTrainer,
    OnlineDPO,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    XPOConfig,
    XPOTrainer,
)
from topwork.objectives.ppo import PPO, PPOConfig, PPOTrainer
from topwork.objectives.prm import PRM, PRMConfig, PRMTrainer
from topwork.objectives.reward import Reward, RewardConfig, RewardTrainer
from topwork.objectives.rloo import RLOOConfig, RLOOTrainer
from topwork.objectives.sdpo import SDPO, SDPOConfig, SDPOTrainer
from topwork.objectives.selfdistill import (
    SelfDistillation,
    SelfDistillationConfig,
    SelfDistillationTrainer,
)
from topwork.objectives.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments
from topwork.objectives.serverdistill import (
    ServerDistillation,
    ServerDistillationConfig,
    ServerDistillationTrainer,
)
from topwork.objectives.sft import SFT, SFTConfig, SFTTrainer
from topwork.objectives.supervised import EvalPrediction, PredictionOutput, Trainer
from topwork.objectives.tpo import TPO, TPOConfig, TPOTrainer
from topwork.objectives.uld import ULD, ULDConfig, ULDTrainer
from topwork.objectives.vocabulary import clone_chat_template

__all__ = [
    "A2PO",
    "A2POConfig",
    "A2POTrainer",
    "BEMACallback",
    "Distillation",
    "DistillationConfig",
    "DistillationTrainer",
    "DPO",
    "DPOConfig",
    "DPOTrainer",
    "CPO",
    "CPOConfig",
    "CPOTrainer",
    "ORPO",
    "ORPOConfig",
    "ORPOTrainer",
    "GKD",
    "GKDConfig",
    "GKDTrainer",
    "IWOPD",
    "IWOPDConfig",
    "IWOPDTrainer",
    "ServerDistillation",
    "ServerDistillationConfig",
    "ServerDistillationTrainer",
    "SelfDistillation",
    "SelfDistillationConfig",
    "SelfDistillationTrainer",
    "ULD",
    "ULDConfig",
    "ULDTrainer",
    "GMPOConfig",
    "GMPOTrainer",
    "GOLD",
    "GOLDConfig",
    "GOLDTrainer",
    "GRPO",
    "GRPOConfig",
    "GRPOTrainer",
    "KTO",
    "KTOConfig",
    "KTOTrainer",
    "MergeConfig",
    "MergeModelCallback",
    "NashMD",
    "NashMDConfig",
    "NashMDTrainer",
    "OnlineDPO",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "XPO",
    "XPOConfig",
    "XPOTrainer",
    "PPO",
    "PPOConfig",
    "PPOTrainer",
    "PRM",
    "PRMConfig",
    "PRMTrainer",
    "Reward",
    "RewardConfig",
    "RewardTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "SDPO",
    "SDPOConfig",
    "SDPOTrainer",
    "SFT",
    "SFTConfig",
    "SFTTrainer",
    "TPO",
    "TPOConfig",
    "TPOTrainer",
    "EvalPrediction",
    "PredictionOutput",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "clone_chat_template",
]
