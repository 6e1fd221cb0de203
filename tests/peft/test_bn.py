"""Bottleneck adapters of the `adapters` library: its outputs, its files, what is refused.

`adapters_library.json` holds what adapters 1.3.0 (over transformers 4.57.6) computed and wrote
for tiny models whose weights follow from their names.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import topwork
from parity.bases import base, close, our_base
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import PeftModel, get_peft_model

KNOWN = json.loads(Path(__file__).with_name("adapters_library.json").read_text())
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SMALL = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "bert": {**SMALL, "pad_token_id": 0, "type_vocab_size": 2},
    "roberta": {**SMALL, "pad_token_id": 0, "type_vocab_size": 2},
    "gpt2": {"vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "llama": {**SMALL, "num_key_value_heads": 1},
}
NORMS = ("orm.weight", "before.weight", "after.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")


def values(name, shape):
    """Numbers that follow from a tensor's name."""
    phase = zlib.crc32(name.encode()) % 1000
    count = torch.Size(shape).numel()
    wave = 0.4 * torch.sin(phase + 1.7 * torch.arange(count, dtype=torch.float64))
    return (wave + float(name.endswith(NORMS))).view(shape).float()


def a_model(family):
    config = topwork.Config(model_type=family, **MODELS[family])
    kind = topwork.AutoModel if "bert" in family else topwork.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(values(name, tensor.shape))
    return model


def settings(name):
    return {**KNOWN["defaults"], **KNOWN["configs"][name]}


def written(folder, family, name, tensors):
    """A folder as the library writes it."""
    folder.mkdir()
    facts = {**KNOWN["files"][family], "config": settings(name)}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def filled(model):
    """`model` with an adapter whose numbers follow from their names in files."""
    state = model.adapter_state()
    with torch.no_grad():
        for name in state:
            state[name].copy_(values(name, state[name].shape))
    return model


def last(model):
    with torch.no_grad():
        output = model(IDS)
    found = getattr(output, "logits", None)
    found = output.last_hidden_state if found is None else found
    return found[:, -1, :8].flatten()


@pytest.mark.parametrize("case", KNOWN["outputs"])
def test_it_computes_as_the_library_and_reads_what_it_wrote(case, tmp_path):
    family, name = case.split()
    config = topwork.PeftConfig.from_dict({**KNOWN["files"][family], "config": settings(name)})
    made = filled(get_peft_model(a_model(family), config).eval())
    wanted = torch.tensor(KNOWN["outputs"][case])
    close(last(made), wanted, atol=3e-5, rtol=1e-4)
    tensors = {key: t.detach().clone() for key, t in made.adapter_state().items()}
    if case in KNOWN["names"]:
        assert {key: list(t.shape) for key, t in tensors.items()} == KNOWN["names"][case]
    folder = written(tmp_path / "theirs", family, name, tensors)
    read = PeftModel.from_pretrained(a_model(family), folder)
    close(last(read), wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_written_is_what_the_library_writes(family, tmp_path):
    config = topwork.PeftConfig.from_dict({**KNOWN["files"][family], "config": settings("layers")})
    model = filled(get_peft_model(a_model(family), config))
    model.save_pretrained(tmp_path / "ours")
    facts = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert facts.pop("version").startswith("topwork.")
    own = facts.pop("config")
    assert {**KNOWN["defaults"], **own} == settings("layers")
    theirs = {k: v for k, v in KNOWN["files"][family].items() if k != "version"}
    assert {**facts, "model_name": ""} == theirs
    again = PeftModel.from_pretrained(a_model(family), tmp_path / "ours")
    assert torch.equal(last(again), last(model.eval()))
    assert again.peft_config["default"].reduction_factor == {"1": 4, "default": 2}


def test_other_names_for_the_same_tensors_are_read(tmp_path):
    made = filled(get_peft_model(a_model("gpt2"), topwork.SeqBnConfig(name="sst")).eval())
    tensors = {key: t.detach().clone() for key, t in made.adapter_state().items()}
    old = {
        key.removeprefix("transformer.").replace(
            ".adapters.sst", ".layer_text_task_adapters.sst"
        ): t
        for key, t in tensors.items()
    }
    folder = tmp_path / "old"
    folder.mkdir()
    old_config = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "ln_before": False,
        "non_linearity": "relu", "original_ln_before": True, "original_ln_after": True,
        "invertible_adapter": {"block_type": "nice", "reduction_factor": 2},
    }  # fmt: skip
    facts = {"config": old_config, "model_type": "gpt2", "hidden_size": 8, "name": "sst"}
    write = (folder / "adapter_config.json").write_text
    write(json.dumps({**facts, "type": "text_task"}))
    torch.save(old, folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="only with allow_bin=True"):
        PeftModel.from_pretrained(a_model("gpt2"), folder)
    read = PeftModel.from_pretrained(a_model("gpt2"), folder, allow_bin=True)
    assert torch.equal(last(read), last(made))
    write(json.dumps(facts))
    with pytest.raises(ConfigError, match="inv_adapter="):
        PeftModel.from_pretrained(a_model("gpt2"), folder, allow_bin=True)
    assert topwork.PeftConfig.from_dict(
        {**facts, "config": {**old_config, "invertible_adapter": None, "non_linearity": "gelu"}}
    ).non_linearity == "gelu_new"  # fmt: skip
    by_name = topwork.PeftConfig.from_dict({**facts, "config": "houlsby"})
    assert (by_name.mh_adapter, by_name.non_linearity) == (True, "swish")


@pytest.mark.parametrize("config", [topwork.SeqBnConfig, topwork.ParBnConfig])
def test_on_transformers_models_it_is_the_same(config, tmp_path):
    ids = IDS + 20
    ours = get_peft_model(our_base("llama", tmp_path), config(reduction_factor=4))
    theirs = get_peft_model(base("llama"), config(reduction_factor=4))
    filled(ours), filled(theirs)
    for model in (ours, theirs):
        model.train()(ids, labels=ids).loss.backward()
    close(ours(ids).logits, theirs(ids).logits, rtol=1e-4)
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (ours, theirs)]
    assert len(grads[0]) == 8
    for one, other in zip(*grads):
        close(one, other, rtol=1e-4)


def test_generation_rows_and_recomputing_give_the_same():
    model = get_peft_model(a_model("llama"), topwork.SeqBnConfig(mh_adapter=True)).eval()
    model.add_adapter("other", topwork.ParBnConfig(name="other"))
    filled(model)
    state = model.adapter_state("other")
    for name, tensor in state.items():
        tensor.data = values(name, tensor.shape)
    found = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        again = IDS
        for _ in range(4):
            again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, again)
        mixed = model(IDS, adapter_names=["other", "__base__"]).logits
        with model.use_adapter("other"):
            close(mixed[0], model(IDS).logits[0])
        with model.disable_adapter():
            close(mixed[1], model(IDS).logits[1])
    grads = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.train()(IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    assert len(grads[0]) == len(grads[1]) == 16
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_starts_are_what_their_names_say():
    for start, spread in (("bert", 0.02), ("houlsby", 0.0088)):
        torch.manual_seed(0)
        mlp = topwork.peft.methods.bn.Mlp(topwork.BnConfig(init_weights=start), 64, 64)
        for layer in (mlp.adapter_down[0], mlp.adapter_up):
            assert layer.weight.std().item() == pytest.approx(spread, rel=0.05)
            assert not layer.bias.any()
    plain = a_model("llama")
    before = last(plain)
    assert torch.equal(last(get_peft_model(plain, topwork.ParBnConfig())), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phm_layer": True}, "phm_layer=True"),
        ({"use_gating": True}, "use_gating=True"),
        ({"cross_adapter": True}, "cross_adapter=True"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
        ({"architecture": "lora"}, "architecture='lora'"),
        ({"scaling": "learnt"}, "nearest: 'learned'"),
        ({"non_linearity": "rellu"}, "nearest: 'relu'"),
        ({"mh_adapter": False, "output_adapter": False}, "both off"),
        ({"reduction_factor": {"0": 2}}, "neither 1 nor 'default'"),
        ({"leave_out": [0, 1]}, "no block for BN"),
    ],
)
def test_what_is_not_acted_on_is_refused_by_name(changes, message):
    values = {**KNOWN["files"]["llama"], "config": {**settings("seq_bn"), **changes}}
    with pytest.raises(ConfigError, match=message):
        get_peft_model(a_model("llama"), topwork.PeftConfig.from_dict(values))


def test_models_that_do_not_fit_are_refused():
    config = topwork.PeftConfig.from_dict({**KNOWN["files"]["bert"], "config": "seq_bn"})
    with pytest.raises(ConfigError, match="made for model_type 'bert', not 'llama'"):
        get_peft_model(a_model("llama"), config)
    with pytest.raises(ConfigError, match="made for hidden_size 768"):
        get_peft_model(a_model("llama"), topwork.SeqBnConfig(hidden_size=768))
    with pytest.raises(ConfigError, match="mh_adapter, output_adapter and leave_out say"):
        topwork.SeqBnConfig(target_modules=["down_proj"])
    model = get_peft_model(a_model("llama"), topwork.SeqBnConfig())
    with pytest.raises(ConfigError, match="not linear"):
        model.merge_and_unload()
    qwen = topwork.Config(model_type="qwen2", **{**SMALL, "num_key_value_heads": 1})
    with pytest.raises(ConfigError, match="does not know the blocks of model_type 'qwen2'"):
        get_peft_model(topwork.AutoModelForCausalLM.from_config(qwen), topwork.SeqBnConfig())
