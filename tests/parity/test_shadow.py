"""Shadow beside peft: its own loss, classifiers, generation, shadows loaded or taken out."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import peft
import tiny
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork import ShadowConfig
from topwork.errors import ConfigError
from topwork.peft import PeftModel, get_peft_model

SMALL = {"shadow_hidden_size": 12, "shadow_num_attention_heads": 2}
LABELS = IDS.clone()
LABELS[:, :3] = -100


def pair(tmp_path, **options):
    """peft's model, and ours on our base and on transformers'."""
    options = {"task_type": "CAUSAL_LM", "r": 4, "auxiliary_loss_weight": 0.3, **options}
    theirs = peft.get_peft_model(base("llama"), peft.ShadowConfig(**options))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    return theirs, *(
        PeftModel.from_pretrained(made, tmp_path / "adapter", is_trainable=True)
        for made in (our_base("llama", tmp_path), base("llama"))
    )


@pytest.mark.parametrize("options", [{}, SMALL])
def test_the_loss_has_the_shadows_own(tmp_path, options):
    theirs, *ours = pair(tmp_path, **options)
    wanted = theirs(input_ids=IDS, labels=LABELS)
    wanted.loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for model in ours:
        found = model(IDS, labels=LABELS)
        close(found.loss, wanted.loss)
        close(found.shadow_loss, wanted.shadow_loss)
        found.loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(own) == set(grads)
        for name, grad in own.items():
            close(grad, grads[name], atol=2e-5)


def test_padded_and_packed_rows_and_checkpointing_change_nothing(tmp_path):
    ours = pair(tmp_path)[1]
    short = 7
    mask = torch.ones_like(IDS)
    mask[1, short:] = 0
    flat = torch.cat([IDS[0], IDS[1, :short]])[None]
    with torch.no_grad():
        packed = ours(flat, lengths=(11, short)).logits[0]
        close(ours(IDS, attention_mask=mask).logits[mask.bool()], packed)
        close(ours(IDS[1:, :short]).logits[0], packed[11:])
        states = ours(IDS, output_hidden_states=True).hidden_states
        assert {state.shape for state in states} == {(2, 11, 24)}
    grads = []
    for on in (False, True):
        (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        ours.zero_grad()
        ours(IDS, labels=LABELS).loss.backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    close(grads[1], grads[0])


def test_generation_reads_the_shadow_token_by_token(tmp_path):
    theirs, ours, on_theirs = pair(tmp_path, **SMALL)
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 36, "eos_token_id": None}
    wanted = theirs.generate(input_ids=IDS, **told)
    assert (
        ours.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=[]).tolist()
        == wanted.tolist()
    )
    assert on_theirs.generate(input_ids=IDS, **told).tolist() == wanted.tolist()
    beams = {**told, "num_beams": 3}
    found = on_theirs.generate(input_ids=IDS, **beams)
    assert found.tolist() == theirs.generate(input_ids=IDS, **beams).tolist()
    with torch.no_grad():
        first = on_theirs(input_ids=IDS[:, :6], use_cache=True)
        then = on_theirs(input_ids=IDS[:, 6:], past_key_values=first.past_key_values)
        close(then.logits, ours(IDS).logits[:, 6:])
        with on_theirs.disable_adapter():
            bare = on_theirs(input_ids=IDS[:, :6], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="holds no shadow"):
        on_theirs(input_ids=IDS[:, 6:], past_key_values=bare)
    with torch.no_grad():
        cache = ours.new_cache()
        parts = [ours(part, past_key_values=cache).logits for part in IDS.split([4, 3, 4], 1)]
        close(torch.cat(parts, 1), ours(IDS).logits)
    with ours.disable_adapter():
        close(ours(IDS).logits, base("llama")(IDS).logits)


@pytest.mark.parametrize("options", [{}, SMALL, {"share_embeddings": False}])
def test_the_shadow_taken_out_is_a_model_of_its_own(tmp_path, options):
    theirs, *ours = pair(tmp_path, **options)
    with torch.no_grad():
        wanted = theirs.base_model.unload_shadow().eval()(input_ids=IDS).logits
        for i, model in enumerate(ours):
            alone = model.unload_shadow()
            close(alone(IDS).logits, wanted)
            alone.save_pretrained(tmp_path / str(i))
            again = topwork.AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
            close(again(IDS).logits, wanted)


LLAMA = {
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "opt": {"ffn_dim": 40, "max_position_embeddings": 40, "word_embed_proj_dim": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma3_text": {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "mixtral": {**LLAMA, "num_local_experts": 3},
    "bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_a_shadow_of_their_own_kind(family, tmp_path):
    sizes = {"hidden_size": 24, **FAMILIES[family]}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=37, pad_token_id=36, **sizes)
    first = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    first.eval().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(first, peft.ShadowConfig(task_type="CAUSAL_LM", r=4))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    second = topwork.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ours = PeftModel.from_pretrained(second, tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(input_ids=IDS, labels=IDS, use_cache=False)
        found = ours(IDS, labels=IDS)
    close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    close(found.loss, wanted.loss, rtol=1e-4, atol=1e-4)


def classifiers(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_labels=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classes")
    return [
        auto.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classes")
        for auto in (transformers, topwork, transformers)
    ]


def test_a_classifiers_shadow_has_a_head_of_its_own(tmp_path):
    first, *others = classifiers(tmp_path)
    options = {"task_type": "SEQ_CLS", "auxiliary_loss_weight": 0.5, **SMALL}
    theirs = peft.get_peft_model(first, peft.ShadowConfig(**options))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[ids == 0] = 5
    mask[1, 7:], ids[1, 7:] = 0, 0
    call = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0])}
    wanted = theirs(**call)
    for other in others:
        ours = PeftModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True)
        found = ours(**call)
        close(found.logits, wanted.logits)
        close(found.loss, wanted.loss)
        found.loss.backward()
        assert ours.base_model.shadow_head["default"].weight.grad.abs().sum() > 0
        alone, whole = ours.unload_shadow(), theirs.base_model.unload_shadow().eval()
        with torch.no_grad():
            short = {"input_ids": ids[:1], "attention_mask": mask[:1]}
            close(alone(**short).logits, whole(**short).logits)


def test_a_shadow_that_is_loaded(tmp_path):
    net = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    ))  # fmt: skip
    net.save_pretrained(tmp_path / "plain")
    small = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=37, hidden_size=8, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    ))  # fmt: skip
    (tmp_path / "projected").mkdir()
    values = {"model_type": "causal_lm_with_hidden_projection",
              "shadow_model_config": small.config.to_diff_dict()}  # fmt: skip
    (tmp_path / "projected" / "config.json").write_text(json.dumps(values))
    tensors = {f"shadow_model.{k}": v for k, v in small.state_dict().items()}
    tensors["shadow_hidden_projection.weight"] = torch.randn(24, 8) * 0.3
    save_file(tensors, tmp_path / "projected" / "model.safetensors")
    for name in ("plain", "projected"):
        theirs, *ours = pair(tmp_path, shadow_model=str(tmp_path / name))
        wanted = theirs(input_ids=IDS).logits
        for model in ours:
            close(model(IDS).logits, wanted)
            assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def test_sft_counts_the_shadows_loss_once_a_token(tmp_path):
    torch.manual_seed(0)
    losses = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(1)
        config = ShadowConfig(task_type="CAUSAL_LM", auxiliary_loss_weight=weight, shadow_dropout=0)
        model = get_peft_model(tiny.model(), config)
        args = topwork.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True,
        )  # fmt: skip
        run = topwork.SFTTrainer(model, args, tiny.chats(4), processing_class=tiny.tokenizer())
        batch = run.objective.assemble(model, [[run.train_data[i] for i in range(4)]])[0]
        own = model.unload_shadow()
        hidden = own.backbone(batch.input_ids, lengths=batch.lengths)[0, batch.positions]
        shadows = -own.token_logprobs(hidden, batch.targets).mean()
        run.train()
        losses[weight] = run.state.log_history[0]["loss"], float(shadows.detach())
    assert losses[0.5][0] == pytest.approx(losses[0.0][0] + 0.5 * losses[0.5][1], rel=1e-4)


def test_what_cannot_be_is_refused():
    model = base("llama")
    config = topwork.Config(
        model_type="llama", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    made = topwork.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="one after the other"):
        get_peft_model(made, ShadowConfig(target_modules=["layers.0", "layers.2"]))
    with pytest.raises(ConfigError, match=r"finds no block among model.layers.0"):
        get_peft_model(model, ShadowConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has sizes already"):
        ShadowConfig(shadow_model="somewhere", shadow_hidden_size=3)
    ours = get_peft_model(model, ShadowConfig(task_type="CAUSAL_LM"))
    ours.add_adapter("other", ShadowConfig(task_type="CAUSAL_LM"))
    ours.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="one shadow at a time"):
        ours(IDS)
    ours.set_adapter("other")
    trained = {n.split(".")[2] for n, p in ours.named_parameters()
               if p.requires_grad and "shadow_backbone" in n}  # fmt: skip
    assert trained == {"other"}
    ours.delete_adapter("default")
    assert list(ours.base_model.shadow_backbone) == ["other"]
    with pytest.raises(ConfigError, match="adapter_names: a shadow is of all rows"):
        ours.eval()(IDS, adapter_names=["other", "__base__"])
