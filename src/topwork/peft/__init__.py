"""Adapters on any torch module."""

from topwork.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from topwork.peft.bare import (
    cast_mixed_precision_params,
    check_if_peft_model,
    get_peft_config,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    rescale_adapter_scale,
    set_peft_model_state_dict,
)
from topwork.peft.config import PeftConfig, PeftType, TaskType
from topwork.peft.convert import convert_to_lora, extract_lora, save_as_lora
from topwork.peft.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from topwork.peft.methods._lora_arrow import create_arrow_model
from topwork.peft.methods._lora_data import (
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from topwork.peft.methods._lora_eva import get_eva_state_dict, initialize_lora_eva_weights
from topwork.peft.methods._lora_options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from topwork.peft.methods.adalora import AdaLoraConfig
from topwork.peft.methods.adamss import AdamssConfig
from topwork.peft.methods.adaption_prompt import AdaptionPromptConfig
from topwork.peft.methods.beft import BeftConfig
from topwork.peft.methods.bn import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from topwork.peft.methods.boft import BOFTConfig
from topwork.peft.methods.bottleneck import BottleneckConfig
from topwork.peft.methods.c3a import C3AConfig
from topwork.peft.methods.cartridge import CartridgeConfig, initialize_kv_prefix_from_text
from topwork.peft.methods.compacter import CompacterConfig
from topwork.peft.methods.cpt import CPTConfig
from topwork.peft.methods.deft import DeftConfig
from topwork.peft.methods.delora import DeloraConfig
from topwork.peft.methods.fourierft import FourierFTConfig
from topwork.peft.methods.frod import FrodConfig
from topwork.peft.methods.glora import GloraConfig
from topwork.peft.methods.gralora import GraloraConfig
from topwork.peft.methods.hira import HiraConfig
from topwork.peft.methods.hra import HRAConfig
from topwork.peft.methods.ia3 import IA3Config
from topwork.peft.methods.lily import LilyConfig
from topwork.peft.methods.ln_tuning import LNTuningConfig
from topwork.peft.methods.loha import LoHaConfig
from topwork.peft.methods.lokr import LoKrConfig
from topwork.peft.methods.lora import LoraConfig
from topwork.peft.methods.miss import MissConfig
from topwork.peft.methods.multitask_prompt_tuning import (
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from topwork.peft.methods.oft import OFTConfig
from topwork.peft.methods.osf import OSFConfig
from topwork.peft.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from topwork.peft.methods.peanut import PeanutConfig
from topwork.peft.methods.poly import PolyConfig
from topwork.peft.methods.prefix_tuning import PrefixTuningConfig
from topwork.peft.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from topwork.peft.methods.psoft import PsoftConfig
from topwork.peft.methods.pvera import PveraConfig
from topwork.peft.methods.randlora import RandLoraConfig
from topwork.peft.methods.road import RoadConfig
from topwork.peft.methods.shadow import ShadowConfig
from topwork.peft.methods.shira import ShiraConfig
from topwork.peft.methods.supertuning import SupertuningConfig
from topwork.peft.methods.tinylora import TinyLoraConfig
from topwork.peft.methods.trainable_tokens import TrainableTokensConfig
from topwork.peft.methods.unilora import UniLoraConfig
from topwork.peft.methods.vblora import VBLoRAConfig
from topwork.peft.methods.vera import VeraConfig
from topwork.peft.methods.waveft import WaveFTConfig
from topwork.peft.methods.xlora import XLoraConfig
from topwork.peft.model import PeftModel, get_peft_model
from topwork.peft.optimisers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from topwork.peft.plain import get_base_model_state_dict, set_base_model_state_dict
from topwork.peft.prompts import PromptLearningConfig
from topwork.peft.status import get_layer_status, get_model_status

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AdaptionPromptConfig",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BaseTunerLayer",
    "BdLoraConfig",
    "BeftConfig",
    "BnConfig",
    "BottleneckConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CompacterConfig",
    "CordaConfig",
    "DeftConfig",
    "DeloraConfig",
    "DoubleSeqBnConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "MissConfig",
    "ModulesToSaveWrapper",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OSFConfig",
    "ParBnConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "SeqBnConfig",
    "ShadowConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeloraConfig",
    "VeraConfig",
    "WaveFTConfig",
    "XLoraConfig",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "extract_lora",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
