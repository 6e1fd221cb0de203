from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as Theirs

from topwork import AutoModelForCausalLM


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
