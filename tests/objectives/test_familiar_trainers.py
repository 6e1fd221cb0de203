"""The trainers' arguments as scripts for trl pass them."""

from __future__ import annotations

import pytest
import torch

import tiny
from topwork import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    get_peft_model,
)
from topwork.errors import ConfigError
from topwork.objectives.registry import OBJECTIVES
from topwork.quant.linear import QuantisedLinear

ARGS = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
PAIRS = [{"prompt": f"say {i}", "chosen": " yes", "rejected": " no"} for i in range(4)]
REFUSED = [
    ({"data_collator": list}, "Trainer takes a collator"),
    ({"compute_metrics": list}, "Trainer takes others"),
    ({"tokenizer": 1}, "called processing_class"),
    ({"max_seq_length": 8}, "max_length in args"),
    ({"optimisers": 1}, "no argument 'optimisers'; nearest: 'optimizers'"),
    ({"args": SFTTrainer}, "args is a type"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(home)
    tiny.tokenizer().save_pretrained(home)
    return str(home)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[next(iter(g)) for g, _ in REFUSED])
def test_every_trainer_says_what_to_use_instead(name, given, words):
    with pytest.raises(ConfigError, match=words):
        OBJECTIVES[name].trainer("never loaded", train_dataset=[], **given)


def test_what_is_passed_as_none_asks_for_nothing_and_the_tokenizer_lies_beside(folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig())
    run = SFTTrainer(
        model=model, args=SFTConfig(str(tmp_path), **ARGS), train_dataset=tiny.chats(4),
        data_collator=None, compute_metrics=None, optimizers=(None, None), quantization_config=None,
    )  # fmt: skip
    assert run.processing_class.eos_token == "<|im_end|>"
    assert len(run.train_dataset) == 4
    assert run.train().global_step == 2


def test_a_model_from_nowhere_needs_its_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="processing_class"):
        SFTTrainer(tiny.model(), SFTConfig(str(tmp_path)), tiny.chats(4))


def test_plain_arguments_become_those_of_the_trainer(folder, tmp_path):
    args = TrainingArguments(str(tmp_path), learning_rate=0.25, push_to_hub=False, **ARGS)
    run = DPOTrainer(folder, args=args, train_dataset=PAIRS)
    assert type(run.args) is DPOConfig
    assert (run.args.learning_rate, run.args.max_steps, run.args.beta) == (0.25, 2, 0.1)


def test_an_optimizer_and_its_scheduler_come_as_a_pair(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    args = SFTConfig(str(tmp_path), logging_steps=1, **ARGS)
    run = SFTTrainer(
        model, args=args, train_dataset=tiny.chats(4), optimizers=(optimizer, scheduler)
    )
    run.train()
    assert run.optimizer is optimizer
    rates = [e["learning_rate"] for e in run.state.log_history if "loss" in e]
    assert rates == [1.0, 0.5]


def test_a_named_model_is_quantised_as_the_trainer_is_told(folder, tmp_path):
    args = SFTConfig(str(tmp_path), **ARGS)
    bits = BitsAndBytesConfig(load_in_4bit=True)
    run = SFTTrainer(
        folder, args=args, train_dataset=tiny.chats(4), quantization_config=bits,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    assert any(isinstance(m, QuantisedLinear) for m in run.model.modules())
    assert args.model_init_kwargs is None
