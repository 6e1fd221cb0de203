"""Virtual tokens against peft: outputs, gradients, files, on transformers' models and on ours."""

from __future__ import annotations

import pytest
import torch

import peft
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.data.prepare import Sample
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.objectives.sft import SFT
from topwork.peft import PeftModel, get_peft_model

N = 3
CONTEXT = {
    "cpt_token_ids": [5, 9, 30, 2, 8, 8, 1, 17, 30, 4],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 4, 5, 6, 6, 0, 8],
}
DECAY = {
    "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7,
    "opt_projection_epsilon": 6.0, "opt_projection_format_epsilon": 4.0,
}  # fmt: skip
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
    ("CPT", "CPTConfig", {**CONTEXT, "opt_projection_epsilon": 8.0}),
    ("CPT", "CPTConfig", {**CONTEXT, **DECAY}),
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
    if kind != "CPT":  # the peer's last virtual token predicts the first given one; ours does not
        labels[:, 0] = -100
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


def test_the_context_stays_within_its_balls_as_the_peers_does_while_it_trains(tmp_path):
    options = {**CONTEXT, **DECAY, "opt_projection_epsilon": 0.5}
    theirs = peft.get_peft_model(base("qwen2"), config(peft, "CPTConfig", options))
    ours = get_peft_model(our_base("qwen2", tmp_path), config(topwork, "CPTConfig", options))
    moved = []
    for model in (theirs, ours):
        delta = model.prompt_encoder["default"].delta_embedding.weight
        optimizer = torch.optim.SGD([delta], lr=0.5)
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(delta.detach().clone())
    close(moved[1], moved[0], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        ours(IDS)
        lengths = ours.prompt_encoder["default"].delta_embedding.weight.norm(dim=1)
    kinds = torch.tensor(CONTEXT["cpt_tokens_type_mask"])
    unit = (24 / 2048) ** 0.5
    assert (lengths[kinds % 4 == 2] <= 0.5 * unit + 1e-6).all()
    assert lengths.max() > 0.5 * unit
    assert (lengths[kinds % 4 == 0] == 0).all()


def test_sft_trains_the_contexts_labels_as_the_peers_call_does(tmp_path):
    options = {**CONTEXT, **DECAY}
    theirs = peft.get_peft_model(base("qwen2"), config(peft, "CPTConfig", options))
    ours = get_peft_model(our_base("qwen2", tmp_path), config(topwork, "CPTConfig", options))
    labels = IDS.clone()
    labels[0, :3], labels[1, :6] = -100, -100
    wanted = theirs(input_ids=IDS, labels=labels).loss
    wanted.backward()
    samples = [Sample(i, IDS[i].numpy(), (labels[i] != -100).numpy()) for i in range(2)]
    objective = SFT(own_targets=ours.own_targets)
    batch = objective.assemble(ours, [samples])[0]
    assert objective.weight(batch) == 8 + 5 + 2 * ours.own_targets > 13
    found = objective.loss(ours, batch).over([objective.weight(batch)])
    found.backward()
    close(found, wanted)
    grads = [m.prompt_encoder["default"].delta_embedding.weight.grad for m in (ours, theirs)]
    close(*grads)


def test_a_contexts_loss_is_the_same_packed_and_counts_the_parts_that_are_told(tmp_path):
    options = {**CONTEXT, **DECAY}
    theirs = peft.get_peft_model(base("qwen2"), config(peft, "CPTConfig", options))
    ours = get_peft_model(our_base("qwen2", tmp_path), config(topwork, "CPTConfig", options))
    parts = torch.tensor([1, 2, 2, 3, 4, 4, 0, 5, 6, 8, 8]).expand(2, -1)
    call = {"input_ids": IDS, "labels": IDS}
    wanted = theirs(**call, input_type_mask=parts.clone()).loss
    close(ours(**call, input_type_mask=parts).loss, wanted)
    assert abs(ours(**call).loss - wanted) > 1e-3
    row = {"input_ids": IDS.view(1, -1), "labels": IDS.view(1, -1), "lengths": (11, 11)}
    close(ours(**row, input_type_mask=parts.reshape(1, -1)).loss, wanted)
    # The peer's loss of a context that does not end in a label is that of no token at all.
    last = {"cpt_token_ids": [5, 9], "cpt_tokens_type_mask": [1, 2]}
    assert peft.get_peft_model(base("qwen2"), config(peft, "CPTConfig", last))(**call).loss.isnan()
    one = get_peft_model(base("qwen2"), config(topwork, "CPTConfig", last))
    labels = torch.cat([torch.full((2, 2), -100), IDS], 1)
    embeds = base("qwen2").get_input_embeddings()
    words = torch.cat([embeds(torch.tensor([[5, 9]] * 2)), embeds(IDS)], 1)
    close(one(**call).loss, base("qwen2")(inputs_embeds=words, labels=labels).loss)


def test_a_context_that_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cpt_mask has 1 numbers for 2 cpt_token_ids"):
        topwork.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1])
    with pytest.raises(ConfigError, match=r"'decya'.*nearest: 'decay'"):
        topwork.CPTConfig(opt_weighted_loss_type="decya")
    with pytest.raises(ConfigError, match="opt_projection_epsilon=0 must be positive"):
        topwork.CPTConfig(opt_projection_epsilon=0)
    with pytest.raises(ConfigError, match="task_type='CAUSAL_LM', not 'SEQ_CLS'"):
        topwork.CPTConfig(task_type="SEQ_CLS")
    with pytest.warns(TopworkWarning, match="cpt_mask has zeros, which change nothing"):
        topwork.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[0, 1])
    ours = get_peft_model(our_base("qwen2", tmp_path), topwork.CPTConfig(cpt_token_ids=[1, 2]))
    cache = ours.new_cache()
    ours(IDS[:, :5], past_key_values=cache)
    with pytest.raises(ConfigError, match="cache that holds the virtual tokens"):
        ours(IDS[:, 5:], past_key_values=cache, labels=IDS[:, 5:])


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
