from __future__ import annotations

import re

import gguf
import pytest
import torch
from typer.testing import CliRunner

import tiny
from topwork import (
    AutoModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    extract_lora,
    get_peft_model,
)
from topwork.cli.main import app
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.weights.gguf import GgufFile

IDS = torch.arange(3, 20)[None]


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def make(home, base, config, seed=0):
    """A random adapter of `base` in a folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(home)
    return adapted


def lora(**more):
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**{**values, "init_lora_weights": False, "task_type": "CAUSAL_LM", **more})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """Adapters of several methods in one folder."""
    home = tmp_path_factory.mktemp("shelf")
    make(home / "first", base, lora())
    make(home / "second", base, lora(lora_alpha=12), seed=1)
    make(home / "ia3", base, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    make(home / "loha", base, LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False))
    return home


def test_a_folder_of_adapters_is_listed_and_a_broken_one_named(shelf, base):
    (shelf / "broken").mkdir(exist_ok=True)
    (shelf / "broken" / "adapter_config.json").write_text("{")
    output = run("adapters", "list", shelf)
    assert re.search(rf"first +LORA r=4 +576 +2\.3 kB +{base}", output)
    assert re.search(r"broken +\? +\S.*not readable as JSON", output)
    assert len(output.splitlines()) == 6
    with pytest.raises(ConfigError, match="no adapter at or below"):
        run("adapters", "list", base)


def test_inspect_tells_how_much_is_changed_and_that_it_fits(shelf, base, tmp_path):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), shelf / "first")
    merged, plain = adapted.merge_and_unload(), AutoModelForCausalLM.from_pretrained(base)
    norms = [
        (a.self_attn.q_proj.weight - b.self_attn.q_proj.weight).norm().item()
        for a, b in zip(merged.model.layers, plain.model.layers)
    ]
    output = run("adapters", "inspect", shelf / "first")
    found = re.search(r"layers\.\*\.self_attn\.q_proj +2 +4 +(\S+) +(\S+) +(\S+)", output)
    least, _, most = map(float, found.groups())
    assert (least, most) == pytest.approx((min(norms), max(norms)), rel=1e-3)
    assert f"fits {base} (llama): every name and shape" in output
    assert "vLLM: loads it\n" in output
    assert "leave out peft_type=IA3" in run("adapters", "inspect", shelf / "ia3")
    make(tmp_path / "x", base, lora(r=32, modules_to_save=["lm_head"]))
    assert "leave out modules_to_save" in run("adapters", "inspect", tmp_path / "x")
    make(tmp_path / "wide", base, lora(r=32))
    assert "vLLM: loads it with --max-lora-rank 32\n" in run(
        "adapters", "inspect", tmp_path / "wide"
    )


def test_an_adapter_whose_base_differs_is_refused_with_the_difference(shelf, tmp_path):
    tiny.model(hidden_size=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"wrong shape: .*q_proj.*\[4, 16\] .*\[4, 32\]"):
        run("adapters", "inspect", shelf / "first", "--base", tmp_path / "wider")
    tiny.model(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(CheckpointError, match=r"unexpected: .*layers\.1"):
        run("adapters", "compose", tmp_path / "out", shelf / "first", "--base",
            tmp_path / "shallow")  # fmt: skip


def test_diff_compares_the_changes_not_the_matrices(shelf, base, tmp_path):
    turned = make(tmp_path / "turned", base, lora())
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    for layer in turned.get_base_model().model.layers:
        a, b = (layer.self_attn.q_proj.get_submodule(f"lora_{m}").default for m in "AB")
        a.weight.data, b.weight.data = q @ a.weight.data, b.weight.data @ q.T
    turned.save_pretrained(tmp_path / "turned")
    assert "the same changes" in run("adapters", "diff", shelf / "first", tmp_path / "turned")
    output = run("adapters", "diff", shelf / "first", shelf / "second")
    assert "lora_alpha: 6 → 12" in output
    assert "the same changes" not in output


def test_compose_makes_the_weighted_sum_without_the_bases_weights(shelf, base, tmp_path):
    parts = (f"{shelf / 'first'}:0.7", f"{shelf / 'second'}:-2")
    run("adapters", "compose", tmp_path / "both", *parts, "--kind", "cat")
    weights = {}
    for name in ("first", "second"):
        model = AutoModelForCausalLM.from_pretrained(base)
        weights[name] = PeftModel.from_pretrained(model, shelf / name).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(base)
    both = PeftModel.from_pretrained(plain, tmp_path / "both")
    assert both.peft_config["default"].base_model_name_or_path == str(base)
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    one, two = weights["first"].state_dict(), weights["second"].state_dict()
    for key, value in both.merge_and_unload().state_dict().items():
        wanted = start[key] + 0.7 * (one[key] - start[key]) - 2 * (two[key] - start[key])
        torch.testing.assert_close(value, wanted)


def test_compose_refuses_adapters_of_different_bases(shelf, tmp_path):
    tiny.model().save_pretrained(tmp_path / "other")
    make(tmp_path / "stranger", tmp_path / "other", lora())
    words = ("adapters", "compose", tmp_path / "out", shelf / "first", tmp_path / "stranger")
    with pytest.raises(ConfigError, match="name different bases"):
        run(*words)
    run(*words, "--base", tmp_path / "other")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_any_method_is_converted_to_lora(shelf, base, tmp_path):
    run("adapters", "convert", shelf / "loha", tmp_path / "as_lora", "--rank", "16")
    outputs = []
    for home in (shelf / "loha", tmp_path / "as_lora"):
        model = AutoModelForCausalLM.from_pretrained(base)
        outputs.append(PeftModel.from_pretrained(model, home)(IDS).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_gguf_adapter_holds_the_same_change_in_llama_cpps_order(base, tmp_path, more):
    adapted = make(tmp_path / "a", base, lora(target_modules="all-linear", **more))
    run("adapters", "convert", tmp_path / "a", tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    # The change as the reader of weights would turn it back is the change of the weight here.
    kind = GgufFile.__init__.__globals__["ARCHITECTURES"]["llama"]
    merged = adapted.merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = plain.config.to_dict()
    for layer in range(2):
        for part, path in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                           ("ffn_down", "mlp.down_proj")):  # fmt: skip
            a = tensors[f"blk.{layer}.{part}.weight.lora_a"]
            b = tensors[f"blk.{layer}.{part}.weight.lora_b"]
            name = f"model.layers.{layer}.{path}.weight"
            wanted = merged.get_parameter(name) - plain.get_parameter(name)
            found = kind.convert(part, b @ a * alpha / len(a), config)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_llama_cpp_does_not_take_is_refused(shelf, base, tmp_path):
    with pytest.raises(ConfigError, match="is LOHA, not LORA"):
        run("adapters", "convert", shelf / "loha", tmp_path / "x.gguf")
    make(tmp_path / "dora", base, lora(use_dora=True))
    with pytest.raises(ConfigError, match="DoRA"):
        run("adapters", "convert", tmp_path / "dora", tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="--rank"):
        run("adapters", "convert", shelf / "first", tmp_path / "x")


def test_extract_finds_the_change_between_two_models(shelf, base, tmp_path):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), shelf / "first")
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
    output = run("extract", tmp_path / "tuned", base, tmp_path / "found", "--rank", "4")
    assert "4 linears" in output
    assert "100.0 % on average" in output
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "found"
    )
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(again(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-4)


def test_changes_outside_linears_are_named_or_kept_whole(base):
    plain, tuned = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.1 * torch.randn(24, 16)
        tuned.model.norm.weight += torch.randn(16)
    with pytest.warns(TopworkWarning, match=r"1 modules more.*model\.norm"):
        extract_lora(tuned, plain, 16)
    config, tensors = extract_lora(tuned, plain, 16, save_rest=True)
    assert config.modules_to_save == ["model.norm"]
    assert torch.equal(tensors["base_model.model.model.norm.weight"], tuned.model.norm.weight)
