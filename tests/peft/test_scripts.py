"""What scripts written for peft rely on beside the verbs: the layers' attributes and methods, what
is trained when, warnings, files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from topwork import AutoModelForCausalLM, AutoModelForSequenceClassification, Config
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.peft import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))


def tuned(seed=1, name="default", **options):
    torch.manual_seed(seed)
    settings = {"target_modules": ["0", "2"], "r": 2, "init_lora_weights": False, **options}
    return get_peft_model(net(), LoraConfig(**settings), name)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_layer_shows_its_adapters_by_name():
    model = tuned(lora_alpha=6, use_rslora=True)
    layer = model.base_model.model[0]
    assert dict(layer.r) == {"default": 2}
    assert layer.use_rslora["default"]
    assert not layer.use_dora["default"]
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.get_base_layer().weight is layer.weight
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 6 / 2**0.5
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    before = model(X) - net()(X)
    for one in (layer, model.base_model.model[2]):
        one.scaling["default"] = 0.0
    torch.testing.assert_close(model(X), net()(X))
    assert before.abs().max() > 1e-2
    with pytest.raises(ConfigError, match="follows from"):
        layer.use_dora["default"] = True


def test_a_layer_is_switched_merged_and_unmerged_by_itself():
    model, bare = tuned(), net()
    wanted = model(X)
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.merge()
        assert layer.merged
        assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(model(X), wanted)
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.unmerge()
        layer.enable_adapters(False)
        assert layer.disable_adapters
        assert not layer.merged
    assert torch.equal(model(X), bare(X))
    model.enable_adapter_layers()
    torch.testing.assert_close(model(X), wanted)
    model.disable_adapter_layers()
    assert torch.equal(model(X), bare(X))


def test_disabling_takes_merged_adapters_out_of_the_weights_for_the_while():
    model = tuned()
    model.merge_adapter()
    merged = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    assert torch.equal(model(X), merged)
    assert model.base_model.model[0].merged


def test_merging_twice_is_told_and_changes_nothing():
    model = tuned()
    model.merge_adapter()
    merged = model(X)
    with pytest.warns(TopworkWarning, match="merged already"):
        model.merge_adapter()
    assert torch.equal(model(X), merged)
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.delete_adapter("other")
    with pytest.raises(ConfigError, match="is merged"):
        model.delete_adapter("default")


def test_trained_biases_are_told_where_adapters_are_disabled():
    model = tuned(bias="lora_only")
    with pytest.warns(TopworkWarning, match="biases that default trains"), model.disable_adapter():
        model(X)


def test_an_adapter_that_is_added_or_loaded_is_trained_only_where_asked(tmp_path):
    tuned().save_pretrained(tmp_path)
    model = tuned()
    model.get_base_model()[1].register_parameter("gain", nn.Parameter(torch.ones(1)))
    before = trained(model)
    model.add_adapter("added", LoraConfig(target_modules=["0"]))
    model.load_adapter(tmp_path, "loaded", torch_device="cpu", low_cpu_mem_usage=True)
    assert trained(model) == before
    model.load_adapter(tmp_path, "more", is_trainable=True)
    more = trained(model) - before
    assert len(more) == 4
    assert all(".more." in name for name in more)
    model.set_requires_grad(["default", "more"], False)
    assert trained(model) == {"base_model.model.1.gain"}
    model.set_requires_grad("added")
    assert len(trained(model)) == 3


def test_combining_adapters_for_inference_leaves_them_untrained(tmp_path):
    tuned().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path, ephemeral_gpu_offload=False)
    model.load_adapter(tmp_path, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "cat")
    assert trained(model) == set()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changed_the_base_is_taken_off_in_the_file(tmp_path, rslora):
    options = {"init_lora_weights": "pissa", "use_rslora": rslora, "rank_pattern": {"2": 1}}
    model = tuned(**options)
    model.save_pretrained(tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    loaded = PeftModel.from_pretrained(net(), tmp_path / "end")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)
    assert loaded.peft_config["default"].r == 4


def test_a_start_of_another_adapter_is_refused(tmp_path):
    tuned(r=3).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="before training"):
        tuned().save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path)


def test_names_of_a_file_are_replaced_by_patterns(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    other = nn.ModuleDict({"body": net()})
    config = copy.copy(model.peft_config["default"])
    config.target_modules = ["body.0", "body.2"]
    loaded = PeftModel.from_pretrained(
        other, tmp_path, config=config, key_mapping={r"^(\d)": r"body.\1"}
    )
    torch.testing.assert_close(loaded.base_model.model["body"](X), model(X))


def test_tensors_say_to_which_layers_an_adapter_goes():
    model = tuned(target_modules=["2"])
    tensors = get_peft_model_state_dict(model)
    config = LoraConfig(target_modules=["0", "2"], r=2)
    plain = inject_adapter_in_model(config, net(), state_dict=tensors)
    result = set_peft_model_state_dict(plain, tensors)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert plain.peft_config["default"].target_modules == ["0", "2"]
    torch.testing.assert_close(plain(X), model(X))
    with pytest.raises(ConfigError, match="no tensor of a module"):
        inject_adapter_in_model(config, net(), state_dict={"other.lora_A.weight": X})


def test_an_adapters_tensors_are_taken_from_values_gathered_elsewhere():
    model = tuned()
    gathered = {name: torch.full_like(t, 3.0) for name, t in model.state_dict().items()}
    found = get_peft_model_state_dict(model, state_dict=gathered)
    assert found.keys() == get_peft_model_state_dict(model).keys()
    assert all(bool((t == 3).all()) for t in found.values())


def test_the_bases_own_tensors_are_read_and_set_below_adapters():
    model, other = tuned(modules_to_save=["1"]), net()
    model.load_state_dict(model.state_dict())
    own = get_base_model_state_dict(model)
    assert own.keys() == other.state_dict().keys()
    twice = {name: 2 * tensor for name, tensor in own.items()}
    set_base_model_state_dict(model, twice)
    other.load_state_dict(twice)
    with model.disable_adapter():
        assert torch.equal(model(X), other(X))
    with pytest.raises(CheckpointError, match=r"missing: 0\.bias"):
        set_base_model_state_dict(model, {"0.weight": own["0.weight"]})
    assert set_base_model_state_dict(model, {"x": X}, strict=False).unexpected_keys == ["x"]


def test_an_adapter_of_another_task_is_refused(tmp_path):
    LoraConfig(task_type="SEQ_CLS", base_model_name_or_path="x").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="task_type 'SEQ_CLS'"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    LoraConfig(base_model_name_or_path="x").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="neither its task_type"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_the_base_is_built_for_the_task_that_the_file_says(tmp_path):
    base = AutoModelForSequenceClassification.from_config(
        Config(
            model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["q_proj"],
        base_model_name_or_path=str(tmp_path / "base"),
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert loaded(torch.arange(5)[None]).logits.shape == (1, 3)
    assert loaded.peft_config["default"].peft_type.value == "LORA"


def test_each_row_goes_through_its_adapters_own_head():
    model = tuned(modules_to_save=["2"], target_modules=["0"])
    model.add_adapter("other", LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    wanted = []
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted.append(model(X))
    with model.disable_adapter():
        wanted.append(model(X))
    mixed = model(X, adapter_names=["other", "default", "__base__", "other", "default"])
    rows = [wanted[at][row] for row, at in enumerate((1, 0, 2, 1, 0))]
    torch.testing.assert_close(mixed, torch.stack(rows))


def test_what_is_trained_whole_is_no_target_and_no_container():
    model = tuned(target_modules=["0", "2"], modules_to_save=["2"])
    assert {name.split(".")[2] for name in trained(model)} == {"0", "2"}
    assert not any("2.lora" in name for name in trained(model))
    boxed = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.ModuleList([nn.Linear(6, 6)])})
    with pytest.raises(ConfigError, match="b is a ModuleList"):
        get_peft_model(boxed, LoraConfig(target_modules=["a"], modules_to_save=["b"]))


def test_two_adapters_do_not_train_the_same_biases():
    model = tuned(bias="lora_only")
    with pytest.raises(ConfigError, match="'default' trains biases"):
        model.add_adapter("other", LoraConfig(target_modules=["0"], bias="all"))
    model.add_adapter("other", LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("first", [0, 1])
def test_methods_that_call_their_matrices_alike_stand_on_one_layer(first, tmp_path):
    kinds = [
        LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
        AdaLoraConfig(target_modules=["0"], init_r=3, total_step=9, init_lora_weights=False),
    ]
    configs = [kinds[first], kinds[1 - first]]
    alone = [get_peft_model(net(), config) for config in configs]
    for at, model in enumerate(alone):
        model.save_pretrained(tmp_path / str(at))
    both = PeftModel.from_pretrained(net(), tmp_path / "0")
    both.load_adapter(tmp_path / "1", "other")
    for at, name in enumerate(("default", "other")):
        both.set_adapter(name)
        torch.testing.assert_close(both(X), alone[at].eval()(X))
    both.delete_adapter("default")
    torch.testing.assert_close(both(X), alone[1](X))


def test_the_verbs_are_also_those_of_what_stands_around_the_model():
    model = tuned()
    inner = model.base_model
    wanted = model(X)
    assert inner.peft_config is model.peft_config
    inner.disable_adapter_layers()
    assert torch.equal(model(X), net()(X))
    inner.enable_adapter_layers()
    copied = copy.deepcopy(model)
    merged = inner.merge_and_unload()
    torch.testing.assert_close(merged(X), wanted)
    copied.base_model.delete_adapter("default")
    assert torch.equal(copied(X), net()(X))


def test_an_adapters_tensors_are_read_from_and_put_into_a_compiled_model():
    model, other = tuned(), tuned(seed=2)
    wanted = get_peft_model_state_dict(model)
    compiled = torch.compile(other, backend="eager")
    set_peft_model_state_dict(compiled, get_peft_model_state_dict(torch.compile(model)))
    assert get_peft_model_state_dict(other).keys() == wanted.keys()
    torch.testing.assert_close(other(X), model(X))


def test_a_files_heads_of_its_task_need_not_all_be_there(tmp_path):
    config = LoraConfig(target_modules=["0"], modules_to_save=["2", "classifier", "score"])
    get_peft_model(net(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, device_map="cpu", dtype=torch.float32)
    assert loaded.load_adapter(tmp_path, "more").missing_keys == []


def test_two_copies_of_one_module_are_not_active_together():
    model = tuned(target_modules=["0"], modules_to_save=["2"])
    model.add_adapter("other", LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    with pytest.raises(ConfigError, match="a copy each of one Linear"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


def test_embeddings_are_saved_where_the_base_has_another_number_of_words(tmp_path):
    sizes = {
        "model_type": "llama", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(Config(**sizes)).save_pretrained(tmp_path / "base")
    for words, written in ((31, False), (33, True)):
        grown = AutoModelForCausalLM.from_config(Config(**{**sizes, "vocab_size": words}))
        options = {"base_model_name_or_path": str(tmp_path / "base")}
        model = get_peft_model(grown, LoraConfig(target_modules=["q_proj"], **options))
        model.save_pretrained(tmp_path / "tuned")
        tensors = load_peft_weights(tmp_path / "tuned")
        assert ("base_model.model.model.embed_tokens.weight" in tensors) == written
    fresh = AutoModelForCausalLM.from_config(Config(**{**sizes, "vocab_size": 33}))
    rest = get_base_model_state_dict(model)
    set_base_model_state_dict(
        fresh, {k: t for k, t in rest.items() if "embed" not in k and "head" not in k}, strict=False
    )
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "tuned")
    ids = torch.tensor([[1, 32]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_tensors_say_where_an_adapter_goes_in_a_compiled_model_and_for_other_methods():
    config = IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    tensors = get_peft_model_state_dict(get_peft_model(net(), config))
    plain = net()
    inject_adapter_in_model(config, torch.compile(plain), state_dict=tensors)
    shapes = {key: t.shape for key, t in get_peft_model_state_dict(plain).items()}
    assert shapes == {k.removeprefix("base_model.model."): t.shape for k, t in tensors.items()}


def test_names_of_starts_are_read_in_any_case():
    assert LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"


@pytest.mark.parametrize("plain", [False, True])
def test_several_dora_adapters_add_up_and_merge_as_they_compute(plain):
    model = tuned(use_dora=True, name="default")
    config = LoraConfig(target_modules=["0", "2"], r=3, init_lora_weights=False, use_dora=not plain)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    bare = net()[0]
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(model.base_model.model[0](X) - bare(X))
    model.set_adapter(["default", "other"])
    assert model.base_model.active_adapter == ["default", "other"]
    torch.testing.assert_close(model.base_model.model[0](X), bare(X) + sum(changes))
    wanted = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


def test_tensors_of_the_base_in_a_state_are_put_into_it():
    model, other = tuned(bias="all"), tuned(seed=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    tensors = get_peft_model_state_dict(model)
    assert set_peft_model_state_dict(other, tensors).unexpected_keys == []
    torch.testing.assert_close(other(X), model(X))


def test_a_configuration_by_itself_is_written_as_it_is(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == LoraConfig(r=3)
    tuned().save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).inference_mode


def test_several_adapters_are_deleted_at_once_or_none():
    model = tuned()
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="no adapter 'd'"):
        model.delete_adapter(["b", "d"])
    model.delete_adapter(["default", "b"])
    assert (list(model.peft_config), model.active_adapters) == (["c"], ["c"])


def test_a_rank_that_a_convolutions_groups_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="2 groups"):
        get_peft_model(
            nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraConfig(target_modules=["0"], r=3)
        )


def test_layers_that_were_given_other_adapters_are_merged_as_they_compute():
    model = tuned()
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.set_adapter(["default", "other"])
    wanted = model(X)
    model.merge_adapter()
    assert model.base_model.model[0].merged_adapters == ["default", "other"]
    torch.testing.assert_close(model(X), wanted)


def test_the_layers_with_adapters_are_named():
    model = tuned(modules_to_save=["1"])
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    assert model.targeted_module_names == ["0", "2"]
    assert model.base_model.targeted_module_names == ["0", "2"]


def test_an_exclusion_that_excludes_nothing_is_told():
    with pytest.warns(TopworkWarning, match="excludes none"):
        tuned(exclude_modules=["3"])


def test_biases_are_trained_beside_layers_without_any():
    model = tuned(bias="all", target_modules=["2"])
    assert "base_model.model.0.bias" in trained(model)
    model = tuned(bias="lora_only", target_modules=[], target_parameters=["0.weight"])
    assert sum(name.endswith("bias") for name in trained(model)) == 1


def test_it_is_known_whether_an_adapter_converts_to_lora():
    assert tuned().supports_lora_conversion()
    model = get_peft_model(net(), IA3Config(target_modules=["0"], feedforward_modules=[]))
    nn.init.normal_(model.base_model.model[0].ia3_l["default"])
    assert not model.supports_lora_conversion()  # its factors are the bias's too
