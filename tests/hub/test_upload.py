from __future__ import annotations

import pytest
import torch

import tiny
from hub_server import hub_server
from topwork import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    get_peft_model,
    hub,
)
from topwork.errors import CheckpointError


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server({}, token="hf_writes", uploads=tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield address


def test_what_is_pushed_comes_back_by_its_name(server, tmp_path):
    model, where = tiny.model(), {"token": "hf_writes"}
    model.push_to_hub("me/base", **where)
    tiny.tokenizer().push_to_hub("me/base", **where)
    tuned = get_peft_model(tiny.model(), LoraConfig(r=2, init_lora_weights=False))
    address = tuned.push_to_hub("me/tuned", **where)
    assert address.startswith(f"{server}/me/tuned/commit/")

    where["cache_dir"] = str(tmp_path / "cache")
    loaded = AutoModelForCausalLM.from_pretrained("me/base", **where)
    ids = AutoTokenizer.from_pretrained("me/base", **where)("hello", return_tensors="pt").input_ids
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = PeftModel.from_pretrained(loaded, "me/tuned", **where)
    torch.testing.assert_close(again(ids).logits, tuned(ids).logits)


def test_a_refusal_names_the_repository_and_what_to_do(server):
    with pytest.raises(CheckpointError, match=r"me/base: the Hub refused .* HF_TOKEN"):
        hub.upload(lambda home: (home / "a").write_text("x"), "me/base", token="hf_reads")
    with pytest.raises(CheckpointError, match="no valid name"):
        hub.upload(lambda home: (home / "a").write_text("x"), "a/b/c", token="hf_writes")


def test_a_trainer_pushes_its_model_and_tokenizer(server, tmp_path):
    args = SFTConfig(str(tmp_path / "run"), hub_model_id="me/run", hub_token="hf_writes")
    run = SFTTrainer(tiny.model(), args, tiny.chats(2), processing_class=tiny.tokenizer())
    assert run.push_to_hub(dataset_name="chats").startswith(f"{server}/me/run/commit/")
    where = {"token": "hf_writes", "cache_dir": str(tmp_path / "cache")}
    loaded = AutoModelForCausalLM.from_pretrained("me/run", **where)
    assert torch.equal(loaded.lm_head.weight, run.model.lm_head.weight)
    assert AutoTokenizer.from_pretrained("me/run", **where).eos_token == "<|im_end|>"
