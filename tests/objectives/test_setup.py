"""How a trainer loads the models that it is given by name."""

from __future__ import annotations

import pytest
import torch

import tiny
from topwork import (
    BitsAndBytesConfig,
    DistillationConfig,
    DistillationTrainer,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
)
from topwork.errors import ConfigError
from topwork.quant import QuantisedLinear

ROWS = tiny.chats(4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "inner"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def args_of(cls, tmp_path, **more):
    return cls(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True, **more)


def test_model_init_kwargs_reach_the_model_and_its_tokenizer(base, tmp_path):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    init = {"quantization_config": four, "subfolder": "inner"}
    trainer = SFTTrainer(
        str(base.parent), args_of(SFTConfig, tmp_path, model_init_kwargs=init), train_dataset=ROWS,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    assert any(isinstance(m, QuantisedLinear) for m in trainer.model.modules())
    trainer.train()
    assert "bnb_4bit_compute_dtype" in (tmp_path / "checkpoint-1/training_args.json").read_text()


def test_the_dtype_asked_for_comes_before_the_run_s(base, tmp_path):
    args = args_of(SFTConfig, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    trainer = SFTTrainer(base, args, train_dataset=ROWS)
    assert trainer.model.dtype == torch.bfloat16


def test_a_teacher_has_options_of_its_own(base, tmp_path):
    args = args_of(DistillationConfig, tmp_path, teacher_model_init_kwargs={"subfolder": "inner"})
    trainer = DistillationTrainer(base, str(base.parent), args, train_dataset=ROWS)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_options_to_load_what_is_loaded_are_refused(name, base, tmp_path):
    args = args_of(DistillationConfig, tmp_path, **{name: {"revision": "x"}})
    with pytest.raises(ConfigError, match=f"^{name}=.*loaded already"):
        DistillationTrainer(
            tiny.model(), tiny.model(), args, train_dataset=ROWS, processing_class=tiny.tokenizer()
        )
