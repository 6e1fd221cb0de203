"""Adapters that are mixed or routed, against peft: X-LoRA, Arrow, Poly; Compacter; cartridges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.errors import ConfigError
from topwork.peft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["q_proj", "down_proj"]
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters, each with one direction that dominates."""
    made = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(r=3, target_modules=TARGETS))
        randomise(theirs, seed + 1)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name:
                    parameter[:, 0] *= 9
        theirs.save_pretrained(folder)
        made.append(str(folder))
    return made


def without_cache(kind="qwen2"):
    model = base(kind)
    model.config.use_cache = False
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("options", [
    {}, {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 7},
    {"top_k_lora": 2, "softmax_temperature": 0.5, "global_scaling_weight": 1.7},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("on", ["theirs", "ours"])
def test_xlora_is_the_peers(options, on, folders, tmp_path):
    options = {
        "task_type": "CAUSAL_LM", "hidden_size": 24,
        "adapters": {str(i): path for i, path in enumerate(folders)}, **options,
    }  # fmt: skip
    theirs = peft.get_peft_model(without_cache(), peft.XLoraConfig(**options))
    randomise(theirs)
    theirs.eval()
    model = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    ours = get_peft_model(model, topwork.XLoraConfig(**options)).eval()
    # the peer leaves classifier layers that are numbered as its adapters are out of its files
    source = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(source[name])
    wanted = theirs(IDS, attention_mask=MASK).logits
    found = ours(IDS, attention_mask=MASK).logits
    real = MASK.bool()
    close(found[real], wanted[real], atol=1e-4)
    weight = torch.linspace(-1, 1, wanted[real].numel()).view_as(wanted[real])
    (wanted[real] * weight).sum().backward()
    (found[real] * weight).sum().backward()
    peers = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert set(own) == set(peers)
    for name, grad in own.items():
        close(grad, peers[name], atol=1e-3, rtol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(without_cache(), tmp_path / "ours")
    with torch.no_grad():
        close(again.eval()(IDS).logits, ours(IDS).logits, atol=1e-4)
        with ours.disable_adapter():
            close(ours(IDS).logits, base("qwen2")(IDS).logits, atol=1e-4)
    with pytest.raises(ConfigError, match="cannot be merged"):
        ours.merge_adapter(["default"])


@torch.no_grad()
def test_xlora_generates_with_a_cache_what_it_does_without(folders, tmp_path):
    config = topwork.XLoraConfig(adapters=dict(zip("abc", folders)), layerwise_scalings=True)
    ours = get_peft_model(our_base("qwen2", tmp_path), config)
    randomise(ours)
    ours.eval()
    made = ours.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    ids = IDS[:, :5]
    for _ in range(4):
        ids = torch.cat([ids, ours(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids)
    packed = ours(IDS.view(1, -1), lengths=(11, 11)).logits[0]
    close(packed, ours(IDS).logits.flatten(0, 1), atol=1e-4)


def test_xlora_tells_its_scalings_and_is_set(folders, tmp_path):
    config = topwork.XLoraConfig(adapters=dict(zip("abc", folders)), layerwise_scalings=True)
    ours = get_peft_model(our_base("qwen2", tmp_path), config).eval()
    randomise(ours)
    ours.enable_scalings_logging()
    with torch.no_grad():
        plain = [ours(IDS[:, :n]).logits for n in (5, 3, 5)]
    ours.disable_scalings_logging()
    log = ours.get_scalings_log()
    assert [values.shape[1] for values in log] == [5, 3, 5]
    assert ours.get_bucketed_scalings_log()[5][0] == [0, 2]
    close(ours.get_latest_scalings().sum(-1), torch.ones(log[0].shape[:-1]))
    ours.set_global_scaling_weight(0.0)
    assert (
        ours.get_global_scaling_weight() == ours.peft_config["default"].global_scaling_weight == 0
    )
    with torch.no_grad(), ours.disable_adapter():
        bare = ours(IDS[:, :5]).logits
    with torch.no_grad():
        close(ours(IDS[:, :5]).logits, bare)
        ours.set_global_scaling_weight(1.0)
        ours.set_topk_lora(1)
        assert not torch.allclose(ours(IDS[:, :5]).logits, plain[0], atol=1e-4)
    assert len(ours.get_scalings_log()) == 3
    ours.clear_scalings_log()
    assert not ours.get_scalings_log()


def test_xlora_trains_under_checkpointing(folders, tmp_path):
    config = topwork.XLoraConfig(adapters=dict(zip("abc", folders)), xlora_dropout_p=0.0)
    ours = get_peft_model(our_base("qwen2", tmp_path), config).train()
    ours.gradient_checkpointing_enable()
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(8):
        loss = ours(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("general", [False, True])
@torch.no_grad()
def test_arrow_routes_as_the_peer_does(general, folders, tmp_path):
    options = {"top_k": 2, "router_temperature": 0.7, "use_gks": general}
    tasks, others = folders[:2], folders[2:]
    theirs = peft.create_arrow_model(
        base("qwen2"), tasks, peft.ArrowConfig(**options, rng_seed=1), others if general else None
    ).eval()
    for model in (base("qwen2"), our_base("qwen2", tmp_path)):
        ours = topwork.create_arrow_model(
            model, tasks, topwork.ArrowConfig(**options), others if general else None
        ).eval()
        # the peer finds directions by some steps of power iteration
        close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="routes by token"):
        ours.merge_and_unload()


def test_arrow_needs_adapters_of_one_shape(folders, tmp_path):
    other = get_peft_model(base("qwen2"), LoraConfig(r=2, target_modules=TARGETS))
    other.save_pretrained(tmp_path)
    config = topwork.ArrowConfig(top_k=1)
    with pytest.raises(ConfigError, match="other layers or ranks"):
        topwork.create_arrow_model(base("qwen2"), [folders[0], tmp_path], config)


def test_poly_mixes_by_the_rows_task_padded_packed_and_by_row(tmp_path):
    config = topwork.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=TARGETS)
    ours = get_peft_model(our_base("qwen2", tmp_path), config)
    randomise(ours)
    ours.eval()
    tasks, real = torch.tensor([2, 0]), MASK.bool()
    with torch.no_grad():
        alone = [ours(IDS[i : i + 1], task_ids=tasks[i : i + 1]).logits[0] for i in (0, 1)]
        padded = ours(IDS, attention_mask=MASK, task_ids=tasks).logits
        packed = ours(IDS.view(1, -1), lengths=(11, 11), task_ids=tasks).logits[0]
        made = ours.generate(IDS[:, :4], max_new_tokens=2, do_sample=False, task_ids=tasks)
        one = ours.generate(IDS[1:, :4], max_new_tokens=2, do_sample=False, task_ids=tasks[1:])
    close(packed, torch.cat(alone), atol=1e-4)
    close(padded[1][real[1]], alone[1][real[1]], atol=1e-4)
    assert torch.equal(made[1:], one)
    with pytest.raises(ConfigError, match="needs task_ids"):
        ours(IDS)


@pytest.mark.parametrize("shared", [True, False])
def test_compacter_is_a_bottleneck_of_kronecker_products(shared, tmp_path):
    net = nn.Sequential(nn.Linear(6, 8))
    config = topwork.CompacterConfig(
        target_modules=["0"], reduction_factor=2, phm_dim=2, shared_phm_rule=shared, scaling=0.7
    )
    model = get_peft_model(net, config)
    x, plain = torch.randn(3, 6), net[0].base_layer
    close(model(x), plain(x))
    randomise(model)
    state = {k.rpartition(".")[2]: v for k, v in model.adapter_state().items()}

    def weight(side):
        rule = state["compacter_rule" if shared else f"compacter_{side}_rule"]
        left, right = state[f"compacter_{side}_left"], state[f"compacter_{side}_right"]
        return sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(2))

    y = plain(x)
    inner = nn.functional.gelu(y @ weight("down") + state["compacter_down_bias"])
    close(model(x), y + 0.7 * (inner @ weight("up") + state["compacter_up_bias"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(plain), tmp_path)
    close(again(x), model(x))
    with pytest.raises(ConfigError, match="not linear"):
        model.merge_and_unload()


@torch.no_grad()
@pytest.mark.parametrize("on", ["theirs", "ours"])
def test_a_cartridge_of_a_text_is_the_text(on, tmp_path):
    model = base("qwen2") if on == "theirs" else our_base("qwen2", tmp_path)
    config = topwork.CartridgeConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    ours = get_peft_model(model, config).eval()
    text = IDS[0, :5].tolist()
    topwork.initialize_kv_prefix_from_text(ours, lambda text: {"input_ids": text}, text)
    rest = IDS[:1, 5:]
    whole = base("qwen2")(IDS[:1]).logits
    close(ours(rest).logits, whole[:, 5:], atol=1e-4)
    with pytest.raises(ConfigError, match="has 3 tokens, the cartridge 5"):
        topwork.initialize_kv_prefix_from_text(ours, lambda text: {"input_ids": text}, text[:3])
