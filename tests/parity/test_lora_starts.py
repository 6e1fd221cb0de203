"""LoRA's starts from data, from rounding and from ties, against peft; and aLoRA in use."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft.tuners.lora.config import CordaConfig as PeersCorda
from peft.tuners.lora.corda import preprocess_corda as peers_corda
from peft.tuners.lora.loraga import preprocess_loraga as peers_loraga
from safetensors.torch import load_file
from torch import nn

import peft
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.errors import ConfigError, TopworkWarning
from topwork.peft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["q_proj", "k_proj", "down_proj"]


def batches(count=3, rows=4, tokens=12):
    torch.manual_seed(5)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 37, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = ids.masked_fill((torch.rand(ids.shape) < 0.2) | (mask == 0), -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def plain(name):
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize("on", ["theirs", "ours"])
@pytest.mark.parametrize("options", [
    {"rho": 2.0}, {"rho": 1.0, "use_label_mask": False}, {"rho": 1.5, "whiten": True},
    {"rho": 2.0, "adjust_scaling_factors": False},
], ids=str)  # fmt: skip
def test_eva_finds_the_peers_directions_and_ranks(options, on, tmp_path):
    # where layers share an input the peer whitens it once for each of them
    targets = ["q_proj", "down_proj"] if options.get("whiten") else TARGETS
    settings = {"r": 4, "target_modules": targets, "init_lora_weights": "eva"}
    theirs = peft.get_peft_model(
        base("qwen2"), peft.LoraConfig(**settings, eva_config=peft.EvaConfig(tau=0.9, **options))
    )
    data = batches(2, rows=6, tokens=14)
    wanted = peft.get_eva_state_dict(theirs, data, show_progress_bar=False)
    model = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    config = LoraConfig(**settings, eva_config=topwork.EvaConfig(tau=0.9, **options))
    ours = get_peft_model(model, config)
    found = topwork.get_eva_state_dict(ours, data)
    assert {plain(n): len(a) for n, a in wanted.items()} == {n: len(a) for n, a in found.items()}
    for name, a in wanted.items():
        close(found[plain(name)], a.float(), rtol=1e-3, atol=1e-3)
    if on == "theirs":
        bare = topwork.get_eva_state_dict(base("qwen2"), data, config)
        assert all(torch.equal(bare[name], a) for name, a in found.items())
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=wanted)
    topwork.initialize_lora_eva_weights(ours, data)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = PeftModel.from_pretrained(base("qwen2"), tmp_path / "theirs")
    with torch.no_grad():
        close(again(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-4)
    ranks = {n: len(p) for n, p in ours.named_parameters() if "lora_A" in n}
    assert ranks == {n: len(p) for n, p in theirs.named_parameters() if "lora_A" in n}
    scales = {g.path: g.scale for m in ours.modules() for g in getattr(m, "grafts", {}).values()}
    for path, scale in scales.items():
        assert scale == pytest.approx(
            theirs.get_submodule(f"base_model.model.{path}").scaling["default"]
        )
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "ours")
    with torch.no_grad():
        close(back(IDS).logits, ours.eval()(IDS).logits, rtol=1e-4)


@pytest.mark.parametrize("how", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_corda_is_the_peers(how, kind, tmp_path):
    named = TARGETS if kind == "qwen2" else ["c_attn", "c_fc"]
    settings = {
        "r": 3, "lora_alpha": 5, "target_modules": named, "init_lora_weights": "corda",
        "fan_in_fan_out": kind == "gpt2",
    }  # fmt: skip
    data = [torch.randint(0, 37, (1, 30), generator=torch.Generator().manual_seed(1))]

    def run(model):
        return lambda: [model(ids) for ids in data]

    theirs, ours = base(kind), base(kind)
    peers = peft.LoraConfig(**settings, corda_config=PeersCorda(corda_method=how))
    peers_corda(theirs, peers, run(theirs))
    file = str(tmp_path / "directions.safetensors")
    config = LoraConfig(**settings, corda_config={"corda_method": how, "cache_file": file})
    topwork.preprocess_corda(ours, config, run(ours))
    theirs, ours = peft.get_peft_model(theirs, peers), get_peft_model(ours, config)
    with torch.no_grad():
        close(ours(IDS).logits, base(kind)(IDS).logits, atol=1e-3)
    pairs = list(zip(sorted(ours.state_dict().items()), sorted(theirs.state_dict().items())))
    for (name, found), (same, wanted) in pairs:
        assert name == same
        signless = (lambda t: t.abs()) if "lora_" in name else (lambda t: t)
        close(signless(found), signless(wanted), rtol=2e-3, atol=2e-3)
    again = base(kind)
    topwork.preprocess_corda(again, config)  # from the file, without data
    again = get_peft_model(again, config)
    assert all(torch.equal(v, ours.state_dict()[n]) for n, v in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("on", ["theirs", "ours"])
@pytest.mark.parametrize(
    ("direction", "scale"),
    [("ArB2r", "stable"), ("ArBr", "gd_scale"), ("A2rBr", "weight_svd"), ("ArB2r", "unit")],
)
def test_lora_ga_is_the_peers(direction, scale, on, tmp_path):
    settings = {"r": 3, "target_modules": TARGETS, "init_lora_weights": "lora_ga"}
    options = {"direction": direction, "scale": scale, "stable_gamma": 9}
    data = batches()

    def step(model):
        return lambda: [model(**batch).loss.backward() for batch in data]

    theirs = base("qwen2")
    peers = peft.LoraConfig(**settings, lora_ga_config=peft.LoraGAConfig(**options))
    peers_loraga(theirs, peers, step(theirs))
    theirs = peft.get_peft_model(theirs, peers)
    ours = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    plain = copy.deepcopy(ours)
    config = LoraConfig(**settings, lora_ga_config=options)
    topwork.preprocess_loraga(ours, config, step(ours), tmp_path / "gradients.safetensors")
    assert not any(p.grad is not None for p in ours.parameters())
    ours = get_peft_model(ours, config)
    # the peer estimates the weight's norm by a random projection of rank r
    tolerance = {"rtol": 0.1 if scale == "weight_svd" else 2e-3, "atol": 2e-3}
    for name, wanted in theirs.state_dict().items():
        if "lora_" in name:
            close(ours.state_dict()[name].abs(), wanted.abs(), **tolerance)
    with torch.no_grad():
        close(ours(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "gradients.safetensors").exists()


def test_loftq_takes_up_what_rounding_loses(tmp_path):
    errors = []
    for turns in (1, 5):
        model = base("qwen2")
        weight = model.model.layers[0].self_attn.q_proj.weight.clone()
        config = LoraConfig(
            r=6, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="loftq",
            loftq_config=topwork.LoftQConfig(loftq_iter=turns),
        )  # fmt: skip
        ours = get_peft_model(model, config)
        layer = ours.get_base_model().model.layers[0].self_attn.q_proj
        kept = layer.base_layer.weight
        again = topwork.peft.methods._lora_data.rounded(kept, 4)
        close(again, kept, atol=1e-6)  # NF4 holds it exactly
        (graft,) = layer.grafts.values()
        errors.append((kept + graft.delta() - weight).norm().item())
        plain = (topwork.peft.methods._lora_data.rounded(weight, 4) - weight).norm().item()
        assert errors[-1] < 0.7 * plain
    assert errors[1] < errors[0]


def test_loftq_mends_weights_that_are_quantised_already(tmp_path):
    base("qwen2").save_pretrained(tmp_path)
    quantised = topwork.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=topwork.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        ),
    )
    ours = get_peft_model(quantised, LoraConfig(r=8, target_modules="all-linear"))
    wanted = base("qwen2")(IDS).logits
    before = (ours(IDS).logits - wanted).norm()
    seen = []
    topwork.replace_lora_weights_loftq(
        ours, tmp_path, callback=lambda model, path: seen.append(path) or "down" not in path
    )
    assert (ours(IDS).logits - wanted).norm() < 0.8 * before
    assert len(seen) == 14
    state = ours.adapter_state()
    assert not any(t.any() for n, t in state.items() if "down_proj.lora_B" in n)
    fresh = ours.unload()
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        get_peft_model(fresh, LoraConfig(target_modules=["q_proj"], init_lora_weights="loftq"))


def test_qalora_adds_means_of_groups():
    net = nn.Sequential(nn.Linear(12, 5))
    config = LoraConfig(target_modules=["0"], r=2, use_qalora=True, qalora_group_size=4)
    ours = get_peft_model(net, config)
    randomise(ours)
    x, layer = torch.randn(3, 12), net[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 3)
    pooled = x.view(3, 3, 4).mean(2) * 3
    close(ours(x), layer.base_layer(x) + pooled @ a.t() @ b.t() * 4)
    with pytest.raises(ConfigError, match="does not divide"):
        get_peft_model(
            nn.Sequential(nn.Linear(10, 5)),
            LoraConfig(target_modules=["0"], use_qalora=True, qalora_group_size=4),
        )


def test_velora_trains_with_the_peers_gradients():
    options = {
        "r": 4, "target_modules": TARGETS,
        "velora_config": {"num_groups": 5, "scale": 0.7, "init_type": "batch_average_once"},
    }  # fmt: skip
    theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(**options)).train()
    ours = get_peft_model(base("qwen2"), LoraConfig(**options)).train()
    randomise(theirs)
    randomise(ours)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        for ids in (IDS, IDS.flip(0)):
            model(ids, labels=ids).loss.backward()
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, peers[name].grad, rtol=1e-4)


def test_kasas_penalty_is_the_peers():
    options = {"r": 3, "target_modules": TARGETS, "kasa_config": {"beta": 0.3, "gamma": 0.2}}
    theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(**options))
    ours = get_peft_model(base("qwen2"), LoraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    close(ours.penalty(), theirs.base_model._get_kasa_loss())


def tied():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen2", vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("options", [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
], ids=str)  # fmt: skip
def test_a_tied_head_follows_the_embeddings_adapter(options, tmp_path):
    options = {"r": 2, "ensure_weight_tying": True, **options}
    theirs = peft.get_peft_model(tied(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(tied(), tmp_path / "theirs", is_trainable=True)
    close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4)
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert not any("lm_head" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(IDS, labels=IDS).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "ours")
    held = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in held)
    again = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    with torch.no_grad():
        wanted = ours(IDS).logits
        close(again(IDS).logits, wanted, atol=1e-4)
        close(ours.merge_and_unload()(IDS).logits, wanted, atol=1e-4)


# -- aLoRA ---------------------------------------------------------------------------------------

CALL = [5, 6]
ALORA = {"r": 4, "target_modules": TARGETS, "alora_invocation_tokens": CALL,
         "task_type": "CAUSAL_LM"}  # fmt: skip


def activated(model):
    ours = get_peft_model(model, LoraConfig(**ALORA))
    randomise(ours)
    return ours.eval()


def prompts():
    ids = torch.tensor([[1, 2, 5, 6, 7, 8, 3], [4, 5, 6, 9, 5, 6, 2], [7, 8, 9, 1, 2, 3, 4]])
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    return ids, mask


@torch.no_grad()
def test_alora_on_our_models_is_the_peers_padded_packed_and_by_row(tmp_path):
    ours = activated(our_base("qwen2", tmp_path))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "adapter")
    ids, mask = prompts()
    wanted, real = theirs(ids, attention_mask=mask).logits, mask.bool()
    found = ours(ids, attention_mask=mask).logits
    close(found[real], wanted[real], atol=1e-4)
    plain = base("qwen2")(ids, attention_mask=mask).logits
    close(found[0, :2], plain[0, :2], atol=1e-4)  # before the invocation: the base
    close(found[2, 2:], plain[2, 2:], atol=1e-4)  # without one: the base
    packed = ours(ids[:2].view(1, -1), lengths=(7, 7)).logits
    close(packed[0], found[:2].flatten(0, 1), atol=1e-4)
    ours.add_adapter("other", LoraConfig(**{**ALORA, "alora_invocation_tokens": [9]}))
    rows = ours(ids, attention_mask=mask, adapter_names=["default", "__base__", "default"]).logits
    close(rows[0], found[0], atol=1e-4)
    close(rows[1], plain[1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("on", ["theirs", "ours"])
def test_alora_generates_what_the_peer_does_and_goes_on_from_the_bases_cache(on, tmp_path):
    model = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    ours = activated(model)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "adapter")
    ids, mask = prompts()
    call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = theirs.generate(input_ids=ids, **call)
    assert torch.equal(ours.generate(input_ids=ids, **call), wanted)
    plain = model if on == "theirs" else ours.get_base_model()
    whole = ours(input_ids=ids[:1], use_cache=True).logits
    with ours.disable_adapter():
        cache = plain(ids[:1, :2], use_cache=True).past_key_values
    rest = ours(input_ids=ids[:1, 2:5], past_key_values=cache).logits
    close(rest, whole[:, 2:5], atol=1e-4)
    last = ours(input_ids=ids[:1, 5:], past_key_values=cache).logits
    close(last, whole[:, 5:], atol=1e-4)


def test_alora_recomputes_with_its_tokens(tmp_path):
    ours = activated(our_base("qwen2", tmp_path)).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ids, mask = prompts()
        first = ours(ids, attention_mask=mask, labels=ids).loss
        second = ours(ids.flip(1), labels=ids).loss  # another mask, before the first's backward
        (first + 2 * second).backward()
        grads.append({n: p.grad for n, p in ours.named_parameters() if p.requires_grad})
        ours.zero_grad()
    for name, grad in grads[0].items():
        assert grad.any()
        close(grads[1][name], grad)


@pytest.mark.parametrize(("options", "words"), [
    ({"use_dora": True, "use_qalora": True}, "exclude each other"),
    ({"eva_config": {"rho": 0.5}, "init_lora_weights": "eva"}, "rho=0.5 must be at least 1"),
    ({"eva_config": {"roh": 2}, "init_lora_weights": "eva"}, "nearest: 'rho'"),
    ({"eva_config": {}, "init_lora_weights": True, "lora_ga_config": {}}, "no effect without"),
    ({"loftq_config": {"bits": 4}, "init_lora_weights": "loftq"}, "no option bits"),
    ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, "both of A"),
    ({"init_lora_weights": "corad"}, "nearest: 'corda'"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(target_modules=["q_proj"], **options)


def test_what_needs_data_says_so():
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="corda")
    with pytest.warns(TopworkWarning, match="needs preprocess_corda"):
        get_peft_model(base("qwen2"), config)
    eva = get_peft_model(
        base("qwen2"), LoraConfig(target_modules=["q_proj"], init_lora_weights="eva")
    )
    with pytest.raises(ConfigError, match="needs a dataloader"):
        topwork.initialize_lora_eva_weights(eva)
    with pytest.raises(ConfigError, match="no batch has the 16 tokens"):
        topwork.initialize_lora_eva_weights(eva, [{"input_ids": IDS[:1, :5]}])
    strict = {"nblocks": 2, "target_modules_bd_a": ["k_proj"]}
    with pytest.raises(ConfigError, match="match_strict=False"):
        get_peft_model(base("qwen2"), LoraConfig(target_modules=["q_proj"], use_bdlora=strict))
