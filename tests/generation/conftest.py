from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as Theirs

from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model
from topwork.models import Config


def make_pair(kind, folder, **more):
    """A tiny random model of a family, the peer's and ours."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    theirs = Theirs.from_config(AutoConfig.for_model(kind, **{**options, **more})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    theirs.save_pretrained(folder)
    return theirs, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session", params=["llama", "qwen2", "mistral"])
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_pair("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Config(
        model_type="qwen3", vocab_size=80, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=256, use_sliding_window=True, sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.eval()


@pytest.fixture(scope="module")
def adapted(model):
    """The same weights with three adapters."""
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    found = get_peft_model(fresh, lora, "a")
    for name in ("b", "c"):
        found.add_adapter(name, lora)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    return found.eval()
