"""Every method against peft, option by option: outputs, gradients, counts, files, merging.

A method's file without a row here fails `test_every_method_has_a_row`.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import peft
import topwork
from parity import test_prompts
from parity.bases import IDS, base, close, randomise
from topwork.errors import ConfigError
from topwork.peft import PeftConfig, PeftModel, get_peft_model, methods


@dataclass(frozen=True)
class Row:
    """A method with options, on a base; `merges` False: merging is refused."""

    config: str
    options: dict = field(default_factory=dict)
    base: str = "qwen2"
    merges: bool = True
    same_count: bool = True
    peer_gradient_is_wrong: bool = False

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "target_modules")
        return f"{self.config.removesuffix('Config')}-{self.base}-{shown}".replace(" ", "")


QV = ["q_proj", "v_proj"]
MIX = ["q_proj", "k_proj", "down_proj"]
CONVS = ["one", "two", "three", "head"]


def row(config, base="qwen2", merges=True, same_count=True, wrong=False, **options):
    targets = {
        "qwen2": MIX, "gpt2": ["c_attn", "c_fc"], "convs": CONVS, "moe": None, "llama": MIX,
        "mistral": MIX,
        "heads": ["attn", "out"],
    }[base]  # fmt: skip
    return Row(config, {"target_modules": targets, **options}, base, merges, same_count, wrong)


ROWS = [
    row("LoraConfig", r=4, use_dora=True),
    row("LoraConfig", r=4, use_dora=True, target_modules=["embed_tokens", "v_proj"]),
    row("LoraConfig", "gpt2", r=4, use_dora=True, fan_in_fan_out=True),
    row("LoraConfig", "convs", r=4),
    row("LoraConfig", "convs", r=4, use_dora=True),
    row("LoraConfig", "convs", r=4, target_modules=["grouped"], merges=False),
    row("LoraConfig", "convs", r=4, use_dora=True, target_modules=["grouped"], merges=False),
    row("LoraConfig", r=4, lora_bias=True, target_modules=QV),
    row("LoraConfig", r=4, lora_bias=True, target_modules=["down_proj"], merges=False),
    row("LoraConfig", r=4, trainable_token_indices=[1, 5, 2], target_modules=QV),
    row("LoraConfig", r=4, trainable_token_indices={"embed_tokens": [7, 3]}, target_modules=QV),
    row("LoraConfig", "llama", r=4, layer_replication=[(0, 2), (1, 2), (0, 1)]),
    row("LoraConfig", "moe", r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    row("LoraConfig", "moe", r=2, target_parameters=["experts.down_proj"], target_modules=QV,
        use_rslora=True),
    row("LoraConfig", r=3, target_modules=None, target_parameters=["mlp.down_proj.weight"]),
    row("LoraConfig", r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=QV),
    row("LoraConfig", r=4, init_lora_weights="olora", target_modules=QV),
    row("LoraConfig", "heads", wrong=True, r=3, rank_pattern={"out": 2}),
    row("LoraConfig", r=4, init_lora_weights="mica"),
    row("LoraConfig", r=4, kasa_config={"beta": 0.1}),
    row("LoraConfig", r=4, velora_config={"num_groups": 5}),
    row("LoraConfig", r=4, monteclora_config={"num_samples": 3}),
    row("LoraConfig", r=4, use_rslora=True,
        use_bdlora={"nblocks": 2, "target_modules_bd_a": ["q_proj", "down"],
                    "target_modules_bd_b": ["k_proj"]}),
    row("LoraConfig", r=4, alora_invocation_tokens=[3, 4], merges=False, task_type="CAUSAL_LM"),
    row("IA3Config", target_modules=None),
    row("IA3Config", feedforward_modules=["down_proj"]),
    row("IA3Config", "gpt2", feedforward_modules=["c_fc"]),
    row("IA3Config", "convs", target_modules=["two", "three", "head"], feedforward_modules=[]),
    row("IA3Config", "convs", target_modules=["two", "grouped"], feedforward_modules=["two"]),
    row("LoHaConfig", r=3, alpha=6, rank_pattern={"q_proj": 2}),
    row("LoHaConfig", "convs", r=3, use_effective_conv2d=True, target_modules=["one", "two"],
        wrong=True),
    row("LoHaConfig", "convs", r=3, target_modules=["one", "grouped", "head"]),
    row("LoKrConfig", r=2, alpha=6),
    row("LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    row("LoKrConfig", r=64),
    row("LoKrConfig", "convs", r=1, use_effective_conv2d=True, target_modules=["two"]),
    row("LoKrConfig", "convs", r=1, target_modules=["one", "grouped", "head"]),
    row("VeraConfig", r=5),
    row("VeraConfig", r=5, save_projection=False, projection_prng_key=3),
    row("VeraConfig", "gpt2", r=5, fan_in_fan_out=True),
    row("RandLoraConfig", r=5, randlora_alpha=8),
    row("RandLoraConfig", "gpt2", r=4, sparse=True, save_projection=False, fan_in_fan_out=True,
        randlora_alpha=8),
    row("RandLoraConfig", r=4, very_sparse=True, randlora_alpha=8),
    row("VBLoRAConfig", r=3, vector_length=4, num_vectors=9),
    row("VBLoRAConfig", r=3, vector_length=4, num_vectors=300, topk=3,
        save_only_topk_weights=True),
    row("HRAConfig", r=4),
    row("HRAConfig", r=3, apply_GS=True),
    row("HRAConfig", "convs", r=4, target_modules=["square"]),
    row("FourierFTConfig", n_frequency=30, n_frequency_pattern={"q_proj": 11}),
    row("FourierFTConfig", "gpt2", n_frequency=30, fan_in_fan_out=True),
    row("OFTConfig", oft_block_size=4),
    row("OFTConfig", oft_block_size=4, use_cayley_neumann=False, block_share=True),
    row("OFTConfig", oft_block_size=0, r=4, num_cayley_neumann_terms=2),
    row("OFTConfig", oft_block_size=7, num_cayley_neumann_terms=3, coft=True, eps=0.5),
    row("BOFTConfig", boft_block_size=4),
    row("BOFTConfig", boft_block_size=0, boft_block_num=2),
    row("BOFTConfig", "convs", boft_block_size=3, target_modules=["square"]),
    row("LNTuningConfig", target_modules=None),
    row("LNTuningConfig", "gpt2", target_modules=["ln_1", "ln_f"]),
    row("ShiraConfig", r=2, random_seed=5),
    row("BeftConfig", target_modules=None),
    row("BeftConfig", target_modules=["down_proj"], merges=False),
    row("MissConfig", r=6),
    row("MissConfig", r=7, init_weights=False),
    row("MissConfig", r=4, init_weights="bat"),
    row("MissConfig", r=4, mini_r=3, init_weights="mini"),
    row("RoadConfig", group_size=4),
    row("RoadConfig", group_size=6, variant="road_2"),
    row("RoadConfig", group_size=12, variant="road_4"),
    row("C3AConfig", wrong=True, block_size=4, block_size_pattern={"q_proj": 8}),
    row("DeloraConfig", r=3),
    row("HiraConfig", r=3),
    row("AdaLoraConfig", init_r=5, total_step=10),
    row("AdaLoraConfig", "convs", init_r=5, total_step=10, target_modules=["two", "head"]),
    row("AdaLoraConfig", "gpt2", init_r=5, total_step=10, fan_in_fan_out=True),
    row("AdamssConfig", r=10, num_subspaces=4, subspace_rank=2),
    row("AdamssConfig", r=30, init_weights=None, use_dynamic_rank=True, svd_threshold=0.4,
        subspace_rank=3, random_seed=5),
    row("AdamssConfig", "gpt2", num_subspaces=3, target_modules=["lm_head"]),
    row("TrainableTokensConfig", token_indices=[3, 0, 17], target_modules=None),
    row("HiraConfig", "gpt2", r=3, fan_in_fan_out=True),
    row("HiraConfig", r=3, target_modules=["embed_tokens", "v_proj"]),
    row("HiraConfig", "convs", r=3),
    row("GraloraConfig", r=4, alpha=5),
    row("GraloraConfig", r=4, hybrid_r=2, gralora_k=4),
    row("PveraConfig", r=5),
    row("PveraConfig", "gpt2", r=5, save_projection=False, fan_in_fan_out=True),
    row("UniLoraConfig", r=3, theta_d_length=200),
    row("UniLoraConfig", "gpt2", r=3, theta_d_length=90, proj_seed=7, fan_in_fan_out=True),
    row("GloraConfig", r=3, target_modules=QV),
    row("GloraConfig", config_A_B="vector", config_C="vector", config_D_E="vector"),
    row("GloraConfig", config_A_B="constant", config_C="none", config_D_E="none"),
    row("DeftConfig", r=3, alpha=5),
    row("DeftConfig", r=3, decomposition_method="qr", target_modules=QV),
    row("DeftConfig", "gpt2", r=3, para=True, fan_in_fan_out=True),
    row("PeanutConfig", r=3, depth=2, scaling=0.7),
    row("PeanutConfig", r=3, act_fn="silu"),
    row("PsoftConfig", r=4, psoft_alpha=6),
    row("PsoftConfig", r=4, ab_svd_init="pissa_init", psoft_orth=False, psoft_mag_a=False),
    row("PsoftConfig", r=4, use_cayley_neumann=True, cayley_neumann_eps=0.3, psoft_mag_b=False),
    row("PsoftConfig", r=3, use_cayley_neumann=True, num_cayley_neumann_terms=3),
    row("WaveFTConfig", n_frequency=40, n_frequency_pattern={"q_proj": 30}),
    row("WaveFTConfig", n_frequency=40, proportional_parameters=True),
    row("WaveFTConfig", "gpt2", n_frequency=40, use_idwt=False, fan_in_fan_out=True),
    row("AdaptionPromptConfig", "llama", adapter_len=3, adapter_layers=2, merges=False,
        target_modules=None),
    row("AdaptionPromptConfig", "mistral", adapter_len=4, adapter_layers=1, merges=False,
        target_modules="self_attn"),
    row("AdaptionPromptConfig", "gpt2", adapter_len=3, adapter_layers=1, merges=False,
        target_modules=None),
    row("TinyLoraConfig", r=4, u=60),
    row("TinyLoraConfig", r=3, u=7, weight_tying=0.6, init_weights="uniform"),
    row("TinyLoraConfig", r=3, u=9, target_modules=["embed_tokens", "v_proj"]),
    row("TinyLoraConfig", "gpt2", u=7, weight_tying=1.0, save_projection=False,
        fan_in_fan_out=True),
    row("LilyConfig", r=3, scaling=0.7, merges=False),
    row("LilyConfig", r=3, stride_A=2, num_B=3, init_weights=False, merges=False),
    row("LilyConfig", r=2, stride_A=2, target_modules=r".*self_attn\.(q|k)_proj", merges=False),
    row("LilyConfig", r=2, target_modules="all-linear", merges=False),
    row("FrodConfig", sparse_rate=0.05, progressbar=False),
    row("FrodConfig", save_projection=False, projection_prng_key=3, progressbar=False),
    row("FrodConfig", "gpt2", fan_in_fan_out=True, progressbar=False),
    row("OSFConfig"),
    row("OSFConfig", effective_rank=0.3, rank_pattern={"q_proj": 20}, init_weights=False,
        target_modules=["q_proj", "up_proj", "down_proj"]),
    row("SupertuningConfig", sparsity=0.9),
    row("SupertuningConfig", sparsity=0.7, select_top=False, r=3, init_weights=False),
    row("SupertuningConfig", "gpt2", sparsity=0.8, target_modules=["lm_head"]),
    row("ShadowConfig", "llama", merges=False, target_modules=None, r=4),
    row("ShadowConfig", "qwen2", merges=False, target_modules=None, r=4, shadow_hidden_size=12,
        shadow_num_attention_heads=2, shadow_num_hidden_layers=2, update_hidden_size=6,
        init_weights=False),
    row("ShadowConfig", "gpt2", merges=False, target_modules=r".*h\.\d", shadow_dropout=0.0),
    row("PolyConfig", r=3, n_tasks=3, n_skills=2, n_splits=2, merges=False,
        task_type="CAUSAL_LM"),
]  # fmt: skip
each = pytest.mark.parametrize("row", ROWS, ids=str)


def outputs(model, kind):
    if kind in ("convs", "heads"):
        return model(torch.linspace(-1, 1, 2 * 192).view(2, 192))
    return model(IDS, **of_tasks(model)).logits


def of_tasks(model):
    poly = getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "POLY"
    return {"task_ids": torch.tensor([2, 0])} if poly else {}


def peers(row):
    theirs = peft.get_peft_model(base(row.base), getattr(peft, row.config)(**row.options))
    randomise(theirs)
    return theirs.eval()


def save(theirs, folder):
    theirs.save_pretrained(folder, save_embedding_layers=False)


def our_config(row):
    return getattr(topwork, row.config)(**row.options)


def shared(name, peers=False):
    """The peer shows what layers share below its first layer, nests two stacked parameters, and
    has LLaMA-Adapter's around attention."""
    name = re.sub(r"^.*\.(vblora_vector_bank|unilora_theta_d)", r"\1", name)
    name = re.sub(r"\w+\.(adaption_(?:prompt|gate))\.default$", r"\1", name)
    name = re.sub(r"tinylora_v(\d+)\.default", r"tinylora_v.default.\1", name)
    name = re.sub(r"(?<=base_model\.).*\.(tinylora_v\.)", r"\1", name)
    name = name.replace("token_adapter.", "").replace("base_layer.out_proj.lora_", "lora_out_")
    if peers and "experts" in name:
        if ".base_layer." not in name:
            return re.sub(r"lora_([AB])", r"lora_\g<1>1", name)
        return name.replace("experts.base_layer.", "experts.")
    return name


@each
def test_peers_adapter_gives_equal_outputs_gradients_and_counts(row, tmp_path):
    theirs = peers(row)
    save(theirs, tmp_path)
    ours = PeftModel.from_pretrained(base(row.base), tmp_path, is_trainable=True)
    wanted, found = outputs(theirs, row.base), outputs(ours, row.base)
    assert not torch.allclose(wanted, outputs(base(row.base), row.base), atol=1e-3)
    close(found, wanted)
    if row.same_count:
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    weight = torch.linspace(-1, 1, wanted.numel()).view_as(wanted)
    (wanted * weight).sum().backward()
    (found * weight).sum().backward()
    grads = {shared(n, True): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = {shared(n): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    if not any("experts.lora_A1" in name for name in own):
        grads = {
            re.sub(r"experts.lora_([AB])1", r"experts.lora_\1", n): g for n, g in grads.items()
        }
    assert set(own) == set(grads)
    if row.peer_gradient_is_wrong:
        assert any(not torch.allclose(own[n], grads[n], rtol=1e-3) for n in own)
        check_slope(ours, row.base, weight)
        return
    for name, grad in own.items():
        if grads[name] is None:  # MonteCLoRA's spread, which acts in training only
            assert grad is None
            continue
        scale = 1 + grads[name].abs().max().item()
        close(grad, grads[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def check_slope(model, kind, weight, step=2e-3):
    """The gradients against a difference quotient along themselves."""
    trained = [p for p in model.parameters() if p.requires_grad]
    slope = sum(p.grad.square().sum() for p in trained).sqrt()
    ways = [p.grad / slope for p in trained]
    values = []
    for sign in (1, -2):
        for parameter, way in zip(trained, ways):
            parameter.add_(way, alpha=sign * step)
        values.append((outputs(model, kind).double() * weight).sum())
    torch.testing.assert_close(
        (values[0] - values[1]) / 2 / step, slope.double(), rtol=1e-2, atol=0
    )


@each
def test_our_adapter_saves_what_the_peer_loads(row, tmp_path):
    ours = get_peft_model(base(row.base), our_config(row))
    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(row.base), tmp_path)
    with torch.no_grad():
        close(outputs(ours, row.base), outputs(theirs, row.base))
        again = PeftModel.from_pretrained(base(row.base), tmp_path)
        if "save_only_topk_weights" in row.options:
            close(outputs(again, row.base), outputs(ours, row.base))
        else:
            assert torch.equal(outputs(again, row.base), outputs(ours, row.base))


@each
@torch.no_grad()
def test_merging_keeps_the_outputs_and_unmerging_the_weights(row, tmp_path):
    ours = get_peft_model(base(row.base), our_config(row))
    randomise(ours)
    ours.eval()
    if not row.merges:
        with pytest.raises(ConfigError, match="merge"):
            ours.merge_and_unload()
        return
    wanted = outputs(ours, row.base)
    before = copy.deepcopy(ours.state_dict())
    ours.merge_adapter(safe_merge=True)
    close(outputs(ours, row.base), wanted, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    merged = ours.merge_and_unload()
    if "layer_replication" not in row.options:  # there are more layers than before
        names = {n for n, _ in base(row.base).named_parameters()}
        assert {n for n, _ in merged.named_parameters()} == names
    close(outputs(merged, row.base), wanted, rtol=1e-4, atol=1e-4)


def variant(row):
    """LoRA's variants are methods of their own."""
    return row.config, *(name for name in topwork.LoraConfig.VARIANTS if name in row.options)


FIRST = list({variant(r): r for r in ROWS if r.base == "qwen2"}.values())


@pytest.mark.parametrize("row", FIRST, ids=str)
def test_adapters_kept_in_half_precision_compute_train_and_merge(row):
    model = base(row.base).bfloat16()
    ours = get_peft_model(model, our_config(row), autocast_adapter_dtype=False)
    randomise(ours)
    ours.eval()
    found = outputs(ours, row.base)
    found.float().square().mean().backward()
    assert any(p.grad is not None for p in ours.parameters() if p.requires_grad)
    if row.merges:
        ours.merge_adapter()
        merged = outputs(ours, row.base)
        off = (merged - found).float().norm() / found.float().norm()
        assert off < 0.05


@pytest.mark.parametrize("row", FIRST, ids=str)
def test_on_our_models_two_adapters_train_apart_in_bf16(row):
    torch.manual_seed(0)
    config = topwork.Config(
        model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = topwork.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    ours = get_peft_model(model, our_config(row)).train()
    ours.add_adapter("other", our_config(row))
    ours.set_adapter("other")
    trained = [p for p in ours.parameters() if p.requires_grad]
    whole = list(getattr(ours.base_model, "shadow_backbone", nn.Module()).parameters())
    whole += getattr(ours.base_model, "shadow_projection", nn.Module()).parameters()
    assert all(p.dtype == torch.float32 for p in trained if not any(p is w for w in whole))
    untouched = {k: v.clone() for k, v in ours.adapter_state("default").items()}
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(12):
        loss = ours(IDS, labels=IDS, **of_tasks(ours)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(v, untouched[k]) for k, v in ours.adapter_state("default").items())


def speed(row):
    return () if variant(row) == ("LoraConfig",) else pytest.mark.slow


@pytest.mark.parametrize("row", [pytest.param(r, id=str(r), marks=speed(r)) for r in FIRST])
def test_a_compiled_model_gives_the_same_outputs_and_gradients(row):
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = topwork.Config(
        model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    ours = get_peft_model(topwork.AutoModelForCausalLM.from_config(config), our_config(row)).eval()
    randomise(ours)

    def run(ids):
        return ours(ids, **of_tasks(ours)).logits

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grads = []
    for way in (run, compiled):
        logits = way(IDS)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        grads.append((logits.detach(), [p.grad for p in ours.parameters() if p.requires_grad]))
        ours.zero_grad()
    close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_every_method_has_a_row():
    rows = {getattr(topwork, row.config)().peft_type for row in ROWS}
    lacked = {"BN", "BOTTLENECK", "COMPACTER", "XLORA"}
    elsewhere = {kind for kind, *_ in test_prompts.PROMPTS} | lacked
    assert rows | elsewhere == set(methods.NAMES)


@pytest.mark.parametrize("name", methods.NAMES)
def test_fields_and_defaults_are_the_peers(name):
    ours, theirs = methods.config_class(name)(), None
    kind = type(ours).__name__
    if not hasattr(peft, kind):
        return
    needed = {
        "AdaLoraConfig": {"total_step": 10}, "CPTConfig": {"task_type": "CAUSAL_LM"}
    }.get(kind, {})  # fmt: skip
    ours = type(ours)(**needed)
    theirs = getattr(peft, kind)(**needed).to_dict()
    for key, value in ours.to_dict().items():
        if (name, key) == ("XLORA", "hidden_size"):
            continue  # the peer guesses 4096; we ask the model
        if key in theirs:
            default = theirs[key]
            assert value == (default.value if hasattr(default, "value") else default), key
        else:
            assert value is None, f"{kind} has {key}, which the peer has not"
    assert PeftConfig.from_dict(ours.to_dict()) == ours


def test_osf_and_supertuning_refuse_what_leaves_nothing_to_train():
    for rank in (1.0, 24, 0.01):
        config = topwork.OSFConfig(target_modules=QV, effective_rank=rank)
        with pytest.raises(ConfigError, match=r"OSF: \d+ of \d+ directions of .*q_proj"):
            get_peft_model(base("qwen2"), config)
    config = topwork.SupertuningConfig(target_modules=QV, sparsity=0.9999)
    with pytest.raises(ConfigError, match=r"leaves no entry of .*q_proj to train"):
        get_peft_model(base("qwen2"), config)
    with pytest.raises(ConfigError, match="no meaning without r"):
        topwork.SupertuningConfig(lora_alpha=4)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
def test_supertunings_places_are_found_again_where_they_are_not_written(tmp_path):
    config = topwork.SupertuningConfig(
        target_modules=MIX, sparsity=0.9, save_precomputed_indices=False
    )
    ours = get_peft_model(base("qwen2"), config)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    assert not any("indices" in key for key in ours.adapter_state())
    with torch.no_grad():
        again = PeftModel.from_pretrained(base("qwen2"), tmp_path)
        assert torch.equal(outputs(again, "qwen2"), outputs(ours, "qwen2"))
        theirs = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path)
        close(outputs(theirs, "qwen2"), outputs(ours, "qwen2"))
