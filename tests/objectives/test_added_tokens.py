"""Tokens that a run adds: trained beside the adapter, saved with it, read again."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import trl
from typer.testing import CliRunner

import peft
import tiny
import topwork
from topwork import (
    AutoModelForCausalLM,
    AutoTokenizer,
    IA3Config,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
)
from topwork.cli.main import app
from topwork.errors import ConfigError

ROWS = [tiny.chat(f"find {i}", f"<find>otter</find> {i}") for i in range(4)]
MARKS = {"added_tokens": ["otter"], "added_special_tokens": ["<find>", "</find>"]}


def settings(home, **more):
    return {"output_dir": str(home), "max_steps": 2, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, **more}  # fmt: skip


def based(home, **changes):
    tiny.model(**changes).save_pretrained(home)
    tiny.tokenizer().save_pretrained(home)
    return home


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_trained_and_read_again_by_us_and_by_peft(tmp_path, tied, family):
    more = {"model_type": family, "head_dim": 8} if family == "gemma" else {}
    base = based(tmp_path / "base", tie_word_embeddings=tied, **more)
    trainer = SFTTrainer(
        str(base), SFTConfig(**settings(tmp_path / "out", learning_rate=0.05, **MARKS)), ROWS,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    model, tokenizer = trainer.model, trainer.tokenizer
    ids = tokenizer("<find>otter</find> 1")["input_ids"]
    assert ids[:3] == [260, 259, 261]
    assert trainer.prepared.samples[0].ids.tolist().count(260) == 1
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    rows = [n for n in trained if "trainable_tokens" in n]
    assert len(rows) == (2 if not model.tied else 1)
    assert all(trained[n] == (3, 16) for n in rows)
    before = model.get_input_embeddings().weight.clone()
    trainer.train()
    assert torch.equal(model.get_input_embeddings().weight, before)
    trainer.save_model()
    call = torch.tensor([ids])
    with torch.no_grad():
        wanted = model(call).logits
        with model.disable_adapter():
            plain = model(call).logits
    assert not torch.allclose(wanted[..., 259:], plain[..., 259:], atol=1e-3)

    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("<find>otter</find> 1")["input_ids"] == ids
    assert again.decode(ids, skip_special_tokens=True) == "otter 1"
    with torch.no_grad():
        ours = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "out"
        )
        torch.testing.assert_close(ours(call).logits, wanted, rtol=1e-4, atol=1e-5)
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(call).logits, wanted, rtol=1e-4, atol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
        theirs.resize_token_embeddings(len(again))
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
        torch.testing.assert_close(theirs(call).logits, wanted, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert whole.config.vocab_size == 262
    with torch.no_grad():
        torch.testing.assert_close(whole(call).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_with_them(tmp_path):
    base = based(tmp_path / "base")

    def run(home, **more):
        torch.manual_seed(0)
        return SFTTrainer(
            str(base), SFTConfig(**settings(home, **{**MARKS, **more})), ROWS,
            peft_config=LoraConfig(r=2),
        )  # fmt: skip

    whole = run(tmp_path / "a", max_steps=4, learning_rate=0.01)
    whole.train()
    half = run(tmp_path / "b", max_steps=4, learning_rate=0.01, save_strategy="steps", save_steps=2)
    half.train()
    late = run(tmp_path / "b", max_steps=4, learning_rate=0.01)
    late.train(resume_from_checkpoint=tmp_path / "b" / "checkpoint-2")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), late.model.named_parameters()):
        assert torch.equal(a, b), name


def test_without_an_adapter_the_grown_model_is_saved_whole(tmp_path):
    base = based(tmp_path / "base")
    args = SFTConfig(**settings(tmp_path / "out", resize_to_multiple_of=64, **MARKS))
    trainer = SFTTrainer(str(base), args, ROWS)
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().num_embeddings == 320
    call = torch.tensor([[260, 259, 261]])
    with torch.no_grad():
        torch.testing.assert_close(again(call).logits, trainer.model(call).logits)


def test_spare_rows_are_used_first_and_begin_as_the_mean(tmp_path):
    """Checkpoints often have more rows than their tokenizer has tokens."""
    model = tiny.model(vocab_size=264)
    old = model.get_input_embeddings().weight.clone()
    SFTTrainer(model, SFTConfig(**settings(tmp_path, **MARKS)), ROWS,
               processing_class=tiny.tokenizer(), peft_config=LoraConfig(r=2))  # fmt: skip
    words = topwork.peft.targets.base_of(model.get_input_embeddings())
    assert words.num_embeddings == 264
    torch.testing.assert_close(words.weight[259:262], old[:259].mean(0).expand(3, -1))
    assert torch.equal(words.weight[262:], old[262:])


PAIRS = [{"prompt": "ask", "chosen": f"<find> {i}", "rejected": "otter"} for i in range(4)]
OTHERS = [
    ("DPO", PAIRS, {}, {"ref_model": True}), ("DPO", PAIRS, {}, {}), ("ORPO", PAIRS, {}, {}),
    ("KTO", PAIRS, {}, {}),
    ("GRPO", PAIRS, {"max_completion_length": 4, "num_generations": 2, "beta": 0.1},
     {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}),
    ("PPO", PAIRS, {"max_completion_length": 4},
     {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}),
    ("SelfDistillation", [{"prompt": "<find>", "privileged_context": "otter"}] * 4,
     {"max_completion_length": 4}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "args", "more"), OTHERS)
def test_other_trainers_take_them_too(name, rows, args, more, tmp_path):
    more = {k: tiny.model(1) if k == "ref_model" else v for k, v in more.items()}
    trainer = getattr(topwork, f"{name}Trainer")(
        tiny.model(),
        args=getattr(topwork, f"{name}Config")(
            **settings(tmp_path, learning_rate=0.01, **MARKS, **args)
        ),
        train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=LoraConfig(r=2), **more,
    )  # fmt: skip
    words = [p for n, p in trainer.model.named_parameters() if "trainable_tokens" in n]
    before = [p.detach().clone() for p in words]
    trainer.train()
    assert len(words) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, words))


def test_from_the_command_line(tmp_path):
    base, rows = based(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    common = ["--model", base, "--data", rows, "--added_special_tokens", "[<find>, </find>]"]

    def run(*words):
        result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
        return result.output

    plain = run("preview", "--model", base, "--data", rows)
    fewer = run("preview", *common)
    sizes = [int(t.split("row 0: ")[1].split(" tokens")[0]) for t in (plain, fewer)]
    assert sizes[0] - sizes[1] == len("<find></find>") - 2
    out = tmp_path / "out"
    run("train", *common, "--output_dir", out, "--max_steps", 2, "--disable_tqdm",
        "--learning_rate", 0.05, "--lora.r", 2, "--lora.target_modules", "[q_proj]")  # fmt: skip
    run("generate", base, "find 1", "--adapter", out, "--max-new-tokens", 4)
    run("merge", base, out, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 261


def test_what_trains_no_rows_and_what_has_an_adapter_is_refused(tmp_path):
    args = SFTConfig(**settings(tmp_path, **MARKS))
    words = tiny.tokenizer()
    with pytest.raises(ConfigError, match="IA3 trains no rows of the embedding; use LoraConfig"):
        SFTTrainer(tiny.model(), args, ROWS, processing_class=words, peft_config=IA3Config())
    adapted = topwork.get_peft_model(tiny.model(), LoraConfig(r=2))
    with pytest.raises(ConfigError, match="has an adapter already"):
        SFTTrainer(adapted, args, ROWS, processing_class=tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"different texts, not \['a'\]"):
        SFTConfig(output_dir=str(tmp_path), added_tokens=["a"], added_special_tokens=["a"])
    with pytest.raises(ConfigError, match="different texts"):
        SFTConfig(output_dir=str(tmp_path), added_tokens=[""])


def test_rows_that_are_trained_anyway_stay_as_the_configuration_says(tmp_path):
    args = SFTConfig(**settings(tmp_path, **MARKS))
    whole = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trainer = SFTTrainer(
        tiny.model(), args, ROWS, processing_class=tiny.tokenizer(), peft_config=whole
    )
    assert trainer.model.active_peft_config.trainable_token_indices is None
    named = LoraConfig(r=2, trainable_token_indices={"embed_tokens": [7, 259]})
    trainer = SFTTrainer(
        tiny.model(), args, ROWS, processing_class=tiny.tokenizer(), peft_config=named
    )
    found = trainer.model.active_peft_config.trainable_token_indices
    assert found == {"embed_tokens": [7, 259, 260, 261], "lm_head": [259, 260, 261]}


def test_an_adapter_of_a_grown_base_makes_room_for_itself(tmp_path):
    """Also one of peft's, which holds the whole embeddings."""
    base = based(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(270)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    call = torch.tensor([[5, 269, 261]])
    ours = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "theirs"
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(call).logits, theirs.eval()(call).logits)
    small = topwork.get_peft_model(tiny.model(), LoraConfig(r=2, trainable_token_indices=[5]))
    late = LoraConfig(r=2, trainable_token_indices=[262])
    grown = tiny.model()
    grown.resize_token_embeddings(263)
    topwork.get_peft_model(grown, late).save_pretrained(tmp_path / "late")
    with pytest.raises(ConfigError, match="before an adapter is added"):
        small.load_adapter(tmp_path / "late", "late")


@pytest.mark.parametrize("multiple", [64, None])
def test_a_chat_template_is_cloned_as_the_peer_clones_it(tmp_path, multiple):
    base = based(tmp_path / "base", vocab_size=259)
    plain = tiny.tokenizer(None)
    plain.eos_token = "<|pad|>"
    plain.save_pretrained(base)
    source = tiny.tokenizer()
    source.add_tokens(["<|tool|>", "<|end|>"], special=True)
    source.add_tokens(["otter"])
    source.eos_token = "<|end|>"
    source.save_pretrained(tmp_path / "source")
    model, words, ids = clone_chat_template(
        AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base),
        tmp_path / "source", multiple,
    )  # fmt: skip
    theirs, their_words, their_ids = trl.clone_chat_template(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        transformers.AutoTokenizer.from_pretrained(base), str(tmp_path / "source"), multiple,
    )  # fmt: skip
    assert ids == their_ids
    assert words.get_vocab() == their_words.get_vocab()
    assert words.chat_template == their_words.chat_template
    assert words.eos_token_id == their_words.eos_token_id == model.config.eos_token_id
    assert model.generation_config["eos_token_id"] == words.eos_token_id
    assert model.config.vocab_size == theirs.config.vocab_size == (320 if multiple else 262)
    chat = [{"role": "user", "content": "<|tool|>otter"}]
    call = torch.tensor([words.apply_chat_template(chat, add_generation_prompt=True)])
    assert 259 in call[0]
    with torch.no_grad():
        torch.testing.assert_close(model(call).logits, theirs(call).logits, atol=5e-3, rtol=1e-3)
    tiny.tokenizer(None).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no chat template"):
        clone_chat_template(model, words, tmp_path / "plain")
