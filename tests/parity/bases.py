"""Tiny random models that the comparisons with peft stand on."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import topwork

IDS = torch.arange(22).view(2, 11)


class Convs(nn.Module):
    """One convolution of each dimension and one in groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.three = nn.Conv3d(2, 4, (1, 3, 2), bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.square = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        one = self.one(x[:, :32].view(-1, 4, 8)).mean(2)
        two = self.grouped(self.two(x[:, :192].view(-1, 3, 8, 8))).mean((1, 2, 3))
        three = self.three(x[:, :96].view(-1, 2, 4, 4, 3)).mean((1, 2, 3, 4))
        square = self.square(x[:, :192].view(-1, 3, 8, 8)).mean((1, 2, 3))
        return self.head(one) + (two + three + square)[:, None]


class Heads(nn.Module):
    """Torch's own attention, with a mask, and a linear behind it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        x = x.view(2, -1, 12)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.out(self.attn(x, x, x, attn_mask=later, need_weights=False)[0])


def base(kind):
    torch.manual_seed(0)
    if kind in ("convs", "heads"):
        model = Convs() if kind == "convs" else Heads()
    else:
        sizes = {
            "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32},
            "moe": {
                "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2,
                "moe_intermediate_size": 10, "shared_expert_intermediate_size": 12,
                "experts_implementation": "eager",
            },
            "llama": {
                "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2,
            },
            "mistral": {
                "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2,
            },
            "qwen2": {
                "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2,
            },
        }[kind]  # fmt: skip
        name = {"moe": "qwen2_moe"}.get(kind, kind)
        config = transformers.AutoConfig.for_model(
            name, vocab_size=37, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **sizes
        )
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype) * 0.2)


def our_base(kind, folder):
    """The same model as `base(kind)`, as ours."""
    base(kind).save_pretrained(folder / "base")
    return topwork.AutoModelForCausalLM.from_pretrained(folder / "base")


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found, wanted, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})
