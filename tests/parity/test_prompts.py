"""Virtual tokens against peft: outputs, gradients, files, on transformers' models and on ours."""

from __future__ import annotations

import pytest
import torch

import peft
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import PeftModel, get_peft_model

N = 3
PROMPTS = [
    ("PROMPT_TUNING", "PromptTuningConfig", {}),
    ("PROMPT_TUNING", "PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    ("P_TUNING", "PromptEncoderConfig", {"encoder_hidden_size": 10}),
    ("P_TUNING", "PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"}),
    ("PREFIX_TUNING", "PrefixTuningConfig", {}),
    ("PREFIX_TUNING", "PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
    ("MULTITASK_PROMPT_TUNING", "MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    ("CARTRIDGE", "CartridgeConfig", {"num_frozen_tokens": 1}),
    ("CARTRIDGE", "CartridgeConfig", {"num_frozen_tokens": 0}),
]
each = pytest.mark.parametrize(("kind", "name", "options"), PROMPTS)
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0


def config(library, name, options):
    return getattr(library, name)(task_type="CAUSAL_LM", num_virtual_tokens=N, **options)


def extra(kind):
    return {"task_ids": torch.tensor([2, 0])} if kind == "MULTITASK_PROMPT_TUNING" else {}


def given(output):
    """The peer's outputs of the given tokens."""
    return output.logits[:, -IDS.shape[1] :]


def copy_encoder(theirs, ours):
    """Weights from the peer's encoder, which its file does not hold."""
    source = theirs.prompt_encoder["default"].state_dict()
    target = ours.prompt_encoder["default"].state_dict()
    assert set(source) == set(target)
    for key, value in source.items():
        target[key].copy_(value)


@each
@pytest.mark.parametrize("on", ["theirs", "ours"])
def test_outputs_losses_and_gradients_equal_the_peers(kind, name, options, on, tmp_path):
    theirs = peft.get_peft_model(base("qwen2"), config(peft, name, options))
    randomise(theirs)
    model = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    ours = get_peft_model(model, config(topwork, name, options))
    with torch.no_grad():
        copy_encoder(theirs, ours)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[:, 0] = -100  # the peer lets the last virtual token predict the first one; we do not
    call = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    wanted, found = theirs(**call, **extra(kind)), ours(**call, **extra(kind))
    real = MASK.bool()
    close(found.logits[real], given(wanted)[real], rtol=1e-4)
    close(found.loss, wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    peers = dict(theirs.prompt_encoder.named_parameters())
    for key, parameter in ours.prompt_encoder.named_parameters():
        close(parameter.grad, peers[key].grad, rtol=1e-3)


@each
def test_files_pass_both_ways(kind, name, options, tmp_path):
    theirs = peft.get_peft_model(base("qwen2"), config(peft, name, options))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base("qwen2"), tmp_path / "theirs")
    with torch.no_grad():
        close(ours(IDS, **extra(kind)).logits, given(theirs(IDS, **extra(kind))))
        mine = get_peft_model(base("qwen2"), config(topwork, name, options)).eval()
        randomise(mine)
        mine.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "ours")
        close(mine(IDS, **extra(kind)).logits, given(again(IDS, **extra(kind))))


@each
def test_packed_padded_cached_and_generated_agree(kind, name, options, tmp_path):
    if kind == "MULTITASK_PROMPT_TUNING":
        return
    ours = get_peft_model(our_base("qwen2", tmp_path), config(topwork, name, options)).eval()
    randomise(ours)
    with torch.no_grad():
        whole = ours(IDS).logits
        packed = ours(IDS[:, :6].reshape(1, 12), lengths=(6, 6)).logits
        close(packed.view(2, 6, -1), whole[:, :6])
        cache = ours.new_cache()
        first = ours(IDS[:, :5], past_key_values=cache).logits
        rest = ours(IDS[:, 5:], past_key_values=cache).logits
        assert cache.length == IDS.shape[1]
        close(torch.cat([first, rest], 1), whole)
        made = ours.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
        ids = IDS[:, :4]
        for _ in range(5):
            ids = torch.cat([ids, ours(ids).logits[:, -1:].argmax(-1)], 1)
        ended = (made[:, 4:] == 2).cumsum(1).bool()  # what stands after the end is padding
        assert torch.equal(made[:, 4:][~ended], ids[:, 4:][~ended])
        with ours.disable_adapter():
            close(ours(IDS).logits, our_base("qwen2", tmp_path)(IDS).logits)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_generation_of_the_peers_model_equals_the_peers(name, tmp_path):
    theirs = peft.get_peft_model(base("qwen2"), config(peft, name, {}))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base("qwen2"), tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 36}
    mask = torch.ones_like(IDS)
    wanted = theirs.generate(input_ids=IDS, attention_mask=mask, **options)
    assert torch.equal(ours.generate(input_ids=IDS, attention_mask=mask, **options), wanted)


@each
def test_a_prompt_trains_on_our_model(kind, name, options, tmp_path):
    ours = get_peft_model(our_base("qwen2", tmp_path), config(topwork, name, options)).train()
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(10):
        loss = ours(IDS, labels=IDS, **extra(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_a_multitask_prompt_starts_from_a_source(tmp_path):
    options = {"num_tasks": 3, "num_ranks": 2}
    source = get_peft_model(base("qwen2"), config(topwork, "MultitaskPromptTuningConfig", options))
    source.save_pretrained(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    for how, expected in (("AVERAGE_SOURCE_TASKS", None), ("EXACT_SOURCE_TASK", 1)):
        options = {
            "num_ranks": 2, "prompt_tuning_init": how, "prompt_tuning_init_task": 1,
            "prompt_tuning_init_state_dict_path": path,
        }  # fmt: skip
        made = get_peft_model(
            base("qwen2"), config(topwork, "MultitaskPromptTuningConfig", options)
        )
        rows = source.prompt_encoder["default"].prefix_task_rows
        wanted = rows.mean(0, keepdim=True) if expected is None else rows[1:2]
        close(made.prompt_encoder["default"].prefix_task_rows, wanted)


def test_what_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs num_virtual_tokens"):
        get_peft_model(base("qwen2"), topwork.PromptTuningConfig())
    with pytest.raises(ConfigError, match=r"SAMPLE_VOCB.*nearest: 'SAMPLE_VOCAB'"):
        topwork.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCB")
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_text"):
        topwork.PromptTuningConfig(prompt_tuning_init="TEXT")
    ours = get_peft_model(base("qwen2"), topwork.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="no weight to merge"):
        ours.merge_and_unload()
    ours.save_pretrained(tmp_path)
    other = topwork.PromptTuningConfig(num_virtual_tokens=4)
    with pytest.raises(CheckpointError, match=r"prompt_embeddings \[4, 24\] expected"):
        PeftModel.from_pretrained(base("qwen2"), tmp_path, config=other)
    tasks = get_peft_model(
        base("qwen2"), topwork.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2)
    )
    with pytest.raises(ConfigError, match="needs task_ids"):
        tasks(IDS)
